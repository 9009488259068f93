"""Gradient checkpointing that keeps what attention gives; everything else of a block is computed again.

Of a checkpointed block only the inputs stay until the backward pass, which runs the block again (arXiv 1604.06174). At
image lengths attention is most of that second run, while its output is no larger than the block's input: kept, it need
not run. (Selective recomputation as in arXiv 2205.05198, where it is attention that is computed again.)
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from dpdmd.kernels.runtime import kept
from dpdmd.kernels.runtime.registration import transformed
from dpdmd.kernels.runtime.saved import Function


def selective_checkpoint(
    function: Callable, *args: Any, parameters: Iterable[nn.Parameter] | None = None, **kwargs: Any
) -> Any:
    """function(*args, **kwargs) without its graph, which the backward pass makes by running function again; attention's
    Triton kernels do not run again: their outputs are kept, (B, S, H, D) and a float32 per query and head each.

        transformer.enable_gradient_checkpointing(selective_checkpoint)  # diffusers

    function: an nn.Module, or another callable with the `parameters` that it reads. It runs first under no_grad, then
        with a graph, with the same random numbers and autocast: gradients are those without a checkpoint, bit for bit
        where function repeats.
    args, kwargs: tensors are found inside tuples, lists and dictionaries too. function does not write to them.
    Returns what function returns, likewise.

    Beside torch.utils.checkpoint: one node of the graph and no hooks on saved tensors, so that the host does less;
    gradients are first-order. Left to torch's (use_reentrant=False), with nothing kept, are torch.compile's traces and
    functions that compute with other tensors than the parameters that they have when called: a module that FSDP or
    ZeRO-3 shards inside the call, DTensors, FSDP1's flat parameters and views of them, other tensor subclasses. Where
    hooks around the call have gathered the weights, as DeepSpeed's in this trainer and FSDP2's, attention is kept. In
    torch.nn.utils.parametrize.cached() function is called without a checkpoint.

    Raises TypeError for a function that is no callable, or is no module and comes without parameters; ValueError for
    one that writes to an argument. The backward pass raises RuntimeError where function depends on another tensor that
    requires a gradient than args, kwargs and parameters. (It looks at each pass of a function, and of a module at the
    first with these parameters and every 32nd: 0.1 ms for a block of 230 operations.)
    """
    if not callable(function):
        raise TypeError(f"function is a {type(function).__name__}; it needs to be an nn.Module or another callable")
    if parameters is None and not isinstance(function, nn.Module):
        raise TypeError(
            f"function is a {type(function).__name__}, not an nn.Module; it needs to come with parameters=: "
            f"those that it reads, which would get no gradient otherwise"
        )
    # Inside an outer checkpoint, which runs this one's function again too, it is a plain call. So it is where weights
    # that are computed are cached: what the first run caches has no graph, and the second would take it. Inside a
    # transform of torch.func there is no second run.
    if not torch.is_grad_enabled() or kept.keeping() or parametrize._cache_enabled or transformed():
        return function(*args, **kwargs)
    if torch.compiler.is_compiling():
        return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False, **kwargs)
    own, swapped = _parameters_of(function) if isinstance(function, nn.Module) else ([], False)
    read = own if parameters is None else list(parameters)
    if swapped or _replaced(read):
        return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False, **kwargs)
    read = [parameter for parameter in read if parameter.requires_grad]
    values, structure = tree_flatten((args, kwargs))
    places = [i for i, value in enumerate(values) if isinstance(value, Tensor)]
    tensors = [values[i] for i in places]
    if not read and not any(tensor.requires_grad for tensor in tensors):
        return function(*args, **kwargs)
    for i in places:
        values[i] = None
    run = _Run(function, values, places, structure)
    outputs = _Checkpoint.apply(run, len(tensors), *tensors, *read)
    return tree_unflatten(outputs, run.output_structure)


def _parameters_of(module: nn.Module) -> tuple[list[Tensor], bool]:
    """Its parameters, with buffers that require a gradient, and whether hooks of a wrapper inside it swap them while it
    runs. (Module.parameters() alone takes longer.)"""
    found: dict[int, Tensor] = {}
    swapped = hooked = False
    seen, modules = {module}, [module]
    for each in modules:  # which grows
        # FSDP1 notes in the modules themselves that it takes their parameters away.
        swapped = swapped or _swaps(type(each)) or each.__dict__.get("_fsdp_use_orig_params") is False
        hooked = hooked or bool(each._forward_pre_hooks)
        for parameter in each._parameters.values():
            if parameter is not None:
                found[id(parameter)] = parameter
        for buffer in each._buffers.values():
            if buffer is not None and buffer.requires_grad:
                found[id(buffer)] = buffer
        for child in each._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                modules.append(child)
    parameters = list(found.values())
    # ZeRO-3's hooks give weights back after each module, and weights that are whole now need not be so in the replay.
    return parameters, swapped or (hooked and any("ds_id" in parameter.__dict__ for parameter in parameters))


@functools.cache
def _swaps(kind: type) -> bool:
    """Whether modules of this class have FSDP's hooks. By name: importing it takes seconds."""
    return any(base.__module__.startswith("torch.distributed.fsdp") for base in kind.__mro__)


def _replaced(parameters: Iterable[Tensor]) -> bool:
    """Whether a function that is called now may compute with other tensors in the place of some."""
    for parameter in parameters:
        if type(parameter) not in _PLAIN or not parameter.is_leaf:  # FSDP2's; FSDP1's inside its hooks
            return True
        marks = parameter.__dict__
        if marks and ("_fsdp_flattened" in marks or "_is_flat_param" in marks):
            return True
        if marks and marks.get("ds_numel", 0) > 0 and parameter.numel() == 0:  # ZeRO-3's between gatherings
            return True
    return False


_PLAIN = (nn.Parameter, Tensor)


@dataclass
class _Run:
    """A function, its arguments that are no tensors, and how arguments and outputs go together."""

    function: Callable
    values: list[Any]  # None for a tensor
    places: list[int]  # of the tensors
    structure: TreeSpec
    output_structure: Any = None  # a TreeSpec, known after a run

    def __call__(self, tensors: Iterable[Tensor]) -> list[Any]:
        values = list(self.values)
        for place, tensor in zip(self.places, tensors, strict=True):
            values[place] = tensor
        args, kwargs = tree_unflatten(values, self.structure)
        outputs, self.output_structure = tree_flatten(self.function(*args, **kwargs))
        return outputs


class _Checkpoint(Function):
    @staticmethod
    def forward(ctx, run, num_inputs, *tensors):
        inputs, parameters = tensors[:num_inputs], tensors[num_inputs:]
        ctx.run, ctx.parameters = run, parameters
        ctx.differentiable = ctx.needs_input_grad[2 : 2 + num_inputs]
        ctx.surroundings = _Surroundings({tensor.device for tensor in tensors})
        versions = [tensor._version for tensor in inputs]
        with kept.recording() as recorded:
            outputs = run(inputs)
        if versions != [tensor._version for tensor in inputs]:
            raise ValueError(
                "function writes to a tensor among its arguments, which a checkpoint runs it on a second time; it needs "
                "to leave them as they are, or to be called without a checkpoint"
            )
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
        with torch.enable_grad(), kept.replaying(recorded), ctx.surroundings.again():
            outputs = ctx.run(inputs)
        pairs = zip(outputs, upstream, strict=True)
        reached = [(output, grad) for output, grad in pairs if grad is not None and output.requires_grad]
        tensors = [*inputs, *ctx.parameters]
        if not reached:
            return None, None, *(None for _ in tensors)
        wanted = [tensor for tensor in tensors if tensor.requires_grad]
        reached, upstream = zip(*reached, strict=True)
        _refuse_others(ctx, reached, wanted)
        gradients = iter(torch.autograd.grad(reached, wanted, upstream, allow_unused=True))
        return None, None, *[next(gradients) if tensor.requires_grad else None for tensor in tensors]


# Of a module, the graph is looked through at the first of so many passes: what is left of it is 3 us a pass.
PERIOD = 32
_passes: WeakKeyDictionary[nn.Module, dict[int, int]] = WeakKeyDictionary()


def _refuse_others(ctx, outputs: Iterable[Tensor], known: list[Tensor]) -> None:
    """Raises RuntimeError where the outputs' graph ends in a tensor that is none of the known ones: its gradient would
    be lost."""
    module = _module_of(ctx.run.function)
    if module is None:  # another function may read other tensors each time
        _look_through(outputs, known)
        return
    passes = _passes.get(module)
    if passes is None:
        passes = _passes[module] = {}
    key = hash((ctx.differentiable, *map(id, ctx.parameters)))
    count = passes.get(key, 0)
    if count % PERIOD == 0:
        _look_through(outputs, known)
        if len(passes) > PERIOD:  # parameters that come and go
            passes.clear()
    passes[key] = count + 1


def _module_of(function: Callable) -> nn.Module | None:
    """The module that is called, or whose method is, wrapped or not."""
    if isinstance(function, nn.Module):
        return function
    function = getattr(function, "__wrapped__", function)
    owner = function if isinstance(function, nn.Module) else getattr(function, "__self__", None)
    return owner if isinstance(owner, nn.Module) else None


def _look_through(outputs: Iterable[Tensor], known: Iterable[Tensor]) -> None:
    ids = {id(tensor) for tensor in known}
    others = [output for output in outputs if output.grad_fn is None and id(output) not in ids]
    nodes: list[Any] = [output.grad_fn for output in outputs if output.grad_fn is not None]
    seen = set(nodes)
    while nodes and not others:
        for node, _ in nodes.pop().next_functions:
            if node is None or node in seen:
                continue
            seen.add(node)
            nodes.append(node)
            if type(node) is _Leaf and id(node.variable) not in ids:
                others.append(node.variable)
    if others:
        other = others[0]
        raise RuntimeError(
            f"the function of a checkpoint depends on a tensor {tuple(other.shape)} of {other.dtype} that requires a "
            f"gradient and is neither among its arguments nor among its parameters, and would get none; pass it as one "
            f"of them (of parameters=, as they are at the call: fully_shard puts others into its modules), or checkpoint "
            f"with torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
        )


_Leaf = torch._C._functions.AccumulateGrad  # pyright: ignore[reportAttributeAccessIssue]


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
