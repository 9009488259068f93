"""Gradient checkpointing that keeps what attention gives; everything else of a block is computed again.

Of a checkpointed block only the inputs stay until the backward pass, which runs the block again (arXiv 1604.06174). At
image lengths attention is most of that second run, while its output is no larger than the block's input: kept, it need
not run. (Selective recomputation as in arXiv 2205.05198, where it is attention that is computed again.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from dpdmd.kernels import _kept


def selective_checkpoint(
    function: Callable, *args: Any, parameters: Iterable[nn.Parameter] | None = None, **kwargs: Any
) -> Any:
    """function(*args, **kwargs) without its graph, which the backward pass makes by running function again; attention's
    Triton kernels do not run again: their outputs are kept, (B, S, H, D) and a float32 per query and head each.

        transformer.enable_gradient_checkpointing(selective_checkpoint)  # diffusers

    function: an nn.Module, or another callable with the `parameters` that it reads. It runs first under no_grad, then
        with a graph, with the same random numbers and autocast: gradients are those without a checkpoint, bit for bit
        where function repeats. Other tensors that it reads and that require a gradient get none.
    args, kwargs: tensors are found inside tuples, lists and dictionaries too.
    Returns what function returns, likewise.

    Beside torch.utils.checkpoint: one node of the graph and no hooks on saved tensors, so that the host does less;
    gradients are first-order. Left to torch's, with nothing kept, are torch.compile's traces, and parameters that ZeRO-3
    has sharded away when function is called (inside DeepSpeed's hooks, as in this trainer, they are whole).

    Raises TypeError for a function that is no callable, or is no module and comes without parameters.
    """
    if not callable(function):
        raise TypeError(f"function is a {type(function).__name__}; it needs to be an nn.Module or another callable")
    if parameters is None:
        if not isinstance(function, nn.Module):
            raise TypeError(
                f"function is a {type(function).__name__}, not an nn.Module; it needs to come with parameters=: "
                f"those that it reads, which would get no gradient otherwise"
            )
        parameters = function.parameters()
    if not torch.is_grad_enabled() or _kept.keeping():  # an outer checkpoint runs this one's function again too
        return function(*args, **kwargs)
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    if torch.compiler.is_compiling() or any(_sharded(parameter) for parameter in parameters):
        return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False, **kwargs)
    values, structure = tree_flatten((args, kwargs))
    places = [i for i, value in enumerate(values) if isinstance(value, Tensor)]
    tensors = [values[i] for i in places]
    if not parameters and not any(tensor.requires_grad for tensor in tensors):
        return function(*args, **kwargs)
    for i in places:
        values[i] = None
    run = _Run(function, values, places, structure)
    outputs = _Checkpoint.apply(run, len(tensors), *tensors, *parameters)
    return tree_unflatten(outputs, run.output_structure)


def _sharded(parameter: nn.Parameter) -> bool:
    return parameter.numel() == 0 and getattr(parameter, "ds_numel", 0) > 0


@dataclass
class _Run:
    """A function, its arguments that are no tensors, and how arguments and outputs go together."""

    function: Callable
    values: list[Any]  # None for a tensor
    places: list[int]  # of the tensors
    structure: TreeSpec
    output_structure: TreeSpec | None = None  # known after a run

    def __call__(self, tensors: Iterable[Tensor]) -> list[Any]:
        values = list(self.values)
        for place, tensor in zip(self.places, tensors, strict=True):
            values[place] = tensor
        args, kwargs = tree_unflatten(values, self.structure)
        outputs, self.output_structure = tree_flatten(self.function(*args, **kwargs))
        return outputs


class _Checkpoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run, num_inputs, *tensors):
        inputs, parameters = tensors[:num_inputs], tensors[num_inputs:]
        ctx.run, ctx.parameters = run, parameters
        ctx.differentiable = ctx.needs_input_grad[2 : 2 + num_inputs]
        ctx.surroundings = _Surroundings({tensor.device for tensor in tensors})
        with _kept.recording() as recorded:
            outputs = run(inputs)
        ctx.surroundings.drop_unused()
        ctx.sizes = [len(results) for results in recorded]
        ctx.save_for_backward(*inputs, *[each for results in recorded for each in results])
        ctx.set_materialize_grads(False)
        return tuple(each.detach() if isinstance(each, Tensor) else each for each in outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *upstream):
        saved = iter(ctx.saved_tensors)
        inputs = _leaves([next(saved) for _ in ctx.differentiable], ctx.differentiable)
        recorded = [tuple(next(saved) for _ in range(size)) for size in ctx.sizes]
        with torch.enable_grad(), _kept.replaying(recorded), ctx.surroundings.again():
            outputs = ctx.run(inputs)
        pairs = zip(outputs, upstream, strict=True)
        reached = [(output, grad) for output, grad in pairs if grad is not None and output.requires_grad]
        tensors = [*inputs, *ctx.parameters]
        if not reached:
            return None, None, *(None for _ in tensors)
        wanted = [tensor for tensor in tensors if tensor.requires_grad]
        reached, upstream = zip(*reached, strict=True)
        gradients = iter(torch.autograd.grad(reached, wanted, upstream, allow_unused=True))
        return None, None, *[next(gradients) if tensor.requires_grad else None for tensor in tensors]


def _leaves(tensors: Iterable[Tensor], differentiable: Iterable[bool]) -> list[Tensor]:
    return [x.detach().requires_grad_(wanted) for x, wanted in zip(tensors, differentiable, strict=True)]


class _Surroundings:
    """Autocast and the random generators' states as they are now."""

    def __init__(self, devices: set[torch.device]):
        self._devices = [device for device in devices if device.type not in ("cpu", "meta")]
        self._autocast = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), torch.is_autocast_cache_enabled())
            for kind in {device.type for device in devices}
            if torch.amp.is_autocast_available(kind)
        ]
        self._random_states = self._states()

    def _states(self) -> list[Tensor]:
        others = [torch.get_device_module(device).get_rng_state(device) for device in self._devices]
        return [torch.get_rng_state(), *others]

    def drop_unused(self) -> None:
        """Forgets the generators where no number was drawn since."""
        if all(torch.equal(then, now) for then, now in zip(self._random_states, self._states(), strict=True)):
            self._random_states = []

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Everything as it was then, inside the block."""
        with contextlib.ExitStack() as stack:
            for kind, dtype, enabled, cache_enabled in self._autocast:
                stack.enter_context(torch.autocast(kind, dtype, enabled, cache_enabled))
            if self._random_states:
                device_type = self._devices[0].type if self._devices else "cuda"
                stack.enter_context(torch.random.fork_rng(self._devices, device_type=device_type))
                torch.set_rng_state(self._random_states[0])
                for device, state in zip(self._devices, self._random_states[1:], strict=True):
                    torch.get_device_module(device).set_rng_state(state, device)
            yield
