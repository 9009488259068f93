"""Gradient checkpointing that keeps attention's outputs and recomputes everything else of a block.

A checkpointed block keeps its inputs only, and the backward pass runs the block again (arXiv 1604.06174). At image lengths
attention takes most of that second run, while its output is no larger than the block's input. (arXiv 2205.05198, selective
recomputation, recomputes attention instead.)
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
    """function(*args, **kwargs) without its graph, which the backward pass makes by running function again. The outputs of
    attention's Triton kernels are kept, (B, S, H, D) and a float32 per query and head each, so that these do not run again.

        transformer.enable_gradient_checkpointing(selective_checkpoint)  # diffusers

    function: an nn.Module, or another callable with the `parameters` that it reads. It runs first under no_grad, then
        with a graph, with the same random numbers and autocast: gradients are those without a checkpoint, bit for bit
        where function repeats.
    args, kwargs: tensors are found inside tuples, lists and dictionaries too, also in what function returns. function
        must not write to its arguments.

    Unlike torch.utils.checkpoint it makes one node of the graph and no hooks on saved tensors, so that the host does less;
    gradients are first-order. torch's checkpoint (use_reentrant=False) runs instead, with nothing kept, under
    torch.compile and for functions that compute with other tensors than the parameters that they have when called: a
    module that FSDP or ZeRO-3 shards inside the call, DTensors, FSDP1's flat parameters and views of them, other tensor
    subclasses. Attention is kept where hooks around the call have gathered the weights, as DeepSpeed's in this trainer and
    FSDP2's do. In torch.nn.utils.parametrize.cached() function is called without a checkpoint.

    Raises TypeError for a function that is not callable, or is no module and comes without parameters; ValueError for one
    that writes to an argument. The backward pass raises RuntimeError where function depends on a tensor that requires a
    gradient and is not in args, kwargs or parameters. (Checked at each pass of a function, and for a module at the first
    with these parameters and every 32nd: 0.1 ms for a block of 230 operations.)
    """
    if not callable(function):
        raise TypeError(f"function is a {type(function).__name__}; it needs to be an nn.Module or another callable")
    if parameters is None and not isinstance(function, nn.Module):
        raise TypeError(
            f"function is a {type(function).__name__}, not an nn.Module; it needs to come with parameters=: "
            f"those that it reads, which would get no gradient otherwise"
        )
    # A plain call: inside an outer checkpoint, which runs function again too; where computed weights are cached, as the
    # second run would take what the first one cached without a graph; in a transform of torch.func, without a second run.
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
    """The module's parameters and its buffers that require a gradient, and whether hooks of a wrapper inside it swap them
    while it runs. (Module.parameters() alone takes longer.)"""
    found: dict[int, Tensor] = {}
    swapped = hooked = False
    seen, modules = {module}, [module]
    for each in modules:  # the list grows in the loop
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
    # ZeRO-3's hooks release weights after each module: weights that are whole now may not be whole in the replay.
    return parameters, swapped or (hooked and any("ds_id" in parameter.__dict__ for parameter in parameters))


@functools.cache
def _swaps(kind: type) -> bool:
    """Whether modules of this class have FSDP's hooks. By name: importing it takes seconds."""
    return any(base.__module__.startswith("torch.distributed.fsdp") for base in kind.__mro__)


_PLAIN = (nn.Parameter, Tensor)


def _replaced(parameters: Iterable[Tensor]) -> bool:
    """Whether a function that is called now may compute with other tensors in the place of some parameters."""
    for parameter in parameters:
        if type(parameter) not in _PLAIN or not parameter.is_leaf:  # FSDP2's; FSDP1's inside its hooks
            return True
        marks = parameter.__dict__
        if marks and ("_fsdp_flattened" in marks or "_is_flat_param" in marks):
            return True
        if marks and marks.get("ds_numel", 0) > 0 and parameter.numel() == 0:  # ZeRO-3's between gatherings
            return True
    return False


@dataclass
class _Run:
    """A function, its arguments that are no tensors, and the structure of arguments and outputs."""

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
        inputs = [next(saved).detach().requires_grad_(wanted) for wanted in ctx.differentiable]
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


PERIOD = 32  # a module's graph is searched in the first of so many passes: 3 us a pass on average
_passes: WeakKeyDictionary[nn.Module, dict[int, int]] = WeakKeyDictionary()


def _refuse_others(ctx, outputs: Iterable[Tensor], known: list[Tensor]) -> None:
    """Raise RuntimeError where the outputs' graph ends in an unknown tensor, whose gradient would be lost."""
    module = _module_of(ctx.run.function)
    if module is None:  # a function may read other tensors each time
        _look_through(outputs, known)
        return
    passes = _passes.setdefault(module, {})
    key = hash((ctx.differentiable, *map(id, ctx.parameters)))
    count = passes.get(key, 0)
    if count % PERIOD == 0:
        _look_through(outputs, known)
        if len(passes) > PERIOD:  # parameters that come and go
            passes.clear()
    passes[key] = count + 1


def _module_of(function: Callable) -> nn.Module | None:
    """The module that is called, or whose method is called, wrapped or not."""
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


class _Surroundings:
    """Autocast and the states of the random generators, at the time of its creation."""

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
        """Forget the generators' states where no number was drawn since."""
        if all(torch.equal(then, now) for then, now in zip(self._random_states, self._states(), strict=True)):
            self._random_states = []

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Restore them inside the block."""
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
