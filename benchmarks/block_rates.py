"""The memory-bound operations of a transformer block, timed: the forward pass and the backward pass, each alone.

A backward pass is torch.autograd.grad on a retained graph, for all inputs that have a gradient. The figures that count
are those of the GPU alone, in a CUDA graph: at these sizes a call takes the host about as long.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import accuracy
import block_operations
import timing
import torch
from block_operations import BLOCK_OPERATIONS, BlockOperation, Tensors
from torch import Tensor

from dpdmd.kernels import use_backend
from dpdmd.kernels.blocks.fp8 import Quantized

# Ours round once, and gradients besides once where the rounded h is what is normalised. Peers in bfloat16 round after
# every operation: of them it is only asked whether they compute the same.
LIMIT = accuracy.RESULT_LIMIT
PEER_LIMIT = 2**-5
QUANTIZED_LIMIT = 2**-5  # e4m3 has three bits: 2.6 % of error in norm
COMPILE_SECONDS = 240.0  # all operations together, unless --peers asks for more
PASSES = ("forward", "backward")


@dataclass(frozen=True)
class Case:
    name: str
    size: str

    @property
    def operation(self) -> BlockOperation:
        return BLOCK_OPERATIONS[self.name]

    @property
    def passes(self) -> tuple[str, ...]:
        return PASSES if self.operation.backward else PASSES[:1]

    def __str__(self) -> str:
        return f"{self.name} {self.size}"


@dataclass(frozen=True)
class Implementation:
    name: str
    peer: bool
    function: Callable[..., tuple[Tensor | Quantized, ...]]
    inputs: Callable[[BlockOperation, Tensors], Tensors]
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext


@dataclass
class Outcome:
    """What an implementation made of one set: outputs and gradients by name, and what autograd kept."""

    outputs: Tensors
    gradients: Tensors
    saved_bytes: int


def run_case(run, case: Case) -> None:
    """One operation at one size: checked, then timed. run: what run.py keeps."""
    operation = case.operation
    inputs = block_operations.make_inputs(operation, case.size, run.device, 0)
    found = implementations(run, case)
    outcomes = run_all(run, case, found, inputs)
    ours = next((each.name for each in found if not each.peer and each.name in outcomes), None)
    if ours is None:
        return  # run.failures says why
    upstream_bytes = outcomes[ours].outputs
    moved = {name: traffic_bytes(operation, name, inputs, upstream_bytes) for name in case.passes}
    errors = check_all(run, case, found, inputs, outcomes)
    if errors is None:
        return
    saved = {name: outcome.saved_bytes for name, outcome in outcomes.items()}
    del outcomes, upstream_bytes
    count = block_operations.sets_needed(operation, inputs, timing.cache_bytes(run.device))
    sets = [inputs, *(block_operations.make_inputs(operation, case.size, run.device, seed) for seed in range(1, count))]
    found = [each for each in found if each.name in errors]
    for name in case.passes:
        times = time_pass(run, case, found, name, sets)
        run.blocks += make_rows(run, case, name, found, errors, times, moved[name], saved)


def implementations(run, case: Case) -> list[Implementation]:
    """Ours first, then the peers."""
    own = [name for name in run.ours if name != "cuda"] or ["reference"]
    found = [
        Implementation(name, False, case.operation.ours, lambda _, inputs: inputs, lambda name=name: use_backend(name))
        for name in own
    ]
    peer = case.operation.peer
    if run.peers is None or "eager" in run.peers:
        found.append(Implementation("eager", True, peer, block_operations.peer_inputs))
    if _compile_wanted(run, case):
        torch._dynamo.reset()
        compiled = torch.compile(peer, dynamic=False)
        found.append(Implementation("compile", True, compiled, block_operations.peer_inputs, _no_donated_buffers))
    return found


@contextlib.contextmanager
def _no_donated_buffers() -> Iterator[None]:
    """A compiled backward pass may write over what autograd keeps for it; here the graph is retained."""
    with torch._functorch.config.patch(donated_buffer=False):
        yield


def _compile_wanted(run, case: Case) -> bool:
    if run.peers is not None:
        return "compile" in run.peers
    if run.device.type == "cpu":
        return False
    if run.block_compile_seconds > COMPILE_SECONDS:
        run.left_out.append(
            f"{case}, compile: compiling has had its {COMPILE_SECONDS:.0f} s; --peers compile runs it all the same"
        )
        return False
    return True


def run_all(run, case: Case, found: list[Implementation], inputs: Tensors) -> dict[str, Outcome]:
    """What each makes of one set. A peer that cannot run here is left out; one of ours is a failure."""
    outcomes = {}
    for each in found:
        begin = time.perf_counter()
        try:
            # Ours get memory full of NaN. The peers' memory is torch's affair, and the switch would compile them twice.
            with each.context(), contextlib.nullcontext() if each.peer else accuracy.poisoned_memory():
                outcomes[each.name] = run_once(case.operation, each, inputs)
        except Exception as error:  # whatever it is, the other figures should not go with it
            problem = f"{case}, {each.name}: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            (run.left_out if each.peer else run.failures).append(problem)
        if each.name == "compile":
            run.block_compile_seconds += time.perf_counter() - begin
    return outcomes


def run_once(operation: BlockOperation, implementation: Implementation, inputs: Tensors) -> Outcome:
    named = block_operations.leaves(operation, implementation.inputs(operation, inputs))
    saved_bytes = 0
    if operation.backward and implementation.name != "compile":  # the hooks would compile it another time
        saved_bytes = saved_for_backward(implementation.function, named)
    outputs = dict(zip(operation.outputs, implementation.function(**named), strict=True))
    gradients = {}
    if operation.backward:
        wanted = {name: leaf for name, leaf in named.items() if leaf.requires_grad}
        found = torch.autograd.grad(list(outputs.values()), list(wanted.values()), upstream(outputs))
        gradients = operation.separate(dict(zip(wanted, found, strict=True)))
    return Outcome({name: _detached(output) for name, output in outputs.items()}, gradients, saved_bytes)


def _detached(output: Tensor | Quantized) -> Tensor | Quantized:
    return output if isinstance(output, Quantized) else output.detach()


def upstream(outputs: dict[str, Tensor]) -> list[Tensor]:
    """Gradients of the outputs, the same for each implementation, laid out as its outputs are: as an attention's
    backward pass would hand them on."""
    gradients = []
    for index, output in enumerate(outputs.values()):
        generator = torch.Generator(output.device).manual_seed(1000 + index)
        shape = {"generator": generator, "device": output.device, "dtype": block_operations.DTYPE}
        gradients.append(torch.empty_like(output).copy_(torch.randn(output.shape, **shape)))
    return gradients


def saved_for_backward(function: Callable, inputs: Tensors) -> int:
    """Bytes that autograd keeps of a forward pass beside the inputs: whole storages, each once."""
    given = {tensor.untyped_storage().data_ptr() for tensor in inputs.values()}
    kept = []  # alive until the end, so that no address is used twice

    def keep(tensor: Tensor) -> None:
        kept.append(tensor.detach())

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda _: None):
        function(**inputs)
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in kept}
    return sum(nbytes for address, nbytes in storages.items() if address not in given)


def traffic_bytes(operation: BlockOperation, name: str, inputs: Tensors, outputs: Tensors) -> int:
    parts = {each: out.values if isinstance(out, Quantized) else out for each, out in outputs.items()}
    return getattr(operation, name).bytes({**inputs, **parts})


def check_all(
    run, case: Case, found: list[Implementation], inputs: Tensors, outcomes: dict[str, Outcome]
) -> dict[str, dict[str, float]] | None:
    """The relative error of each output and gradient against float64, by implementation; None where one of ours or of
    the peers is wrong, and then run.failures says what."""
    operation = case.operation
    exact = _truth(operation, inputs)
    errors, wrong = {}, list[str]()
    for each in (each for each in found if each.name in outcomes):
        outcome = outcomes[each.name]
        errors[each.name] = {}
        got = {**outcome.outputs, **{f"d {name}": gradient for name, gradient in outcome.gradients.items()}}
        for name, value in got.items():
            limit = PEER_LIMIT if each.peer else LIMIT
            if isinstance(value, Quantized):
                value, limit = value.values.double() * value.scale.double(), QUANTIZED_LIMIT
            error = (value.double() - exact[name]).norm().item() / exact[name].norm().item()
            errors[each.name][name] = error
            if not error <= limit:  # NaN must not pass
                wrong.append(f"{case}, {each.name}: relative error of {name} {error:.1e}, allowed {limit:.1e}")
    run.failures += wrong
    return None if wrong or any(not each.peer and each.name not in outcomes for each in found) else errors


def _truth(operation: BlockOperation, inputs: Tensors) -> Tensors:
    named = block_operations.leaves(operation, block_operations.truth_inputs(operation, inputs))
    outputs = dict(zip(operation.outputs, operation.peer(**named), strict=True))
    exact = {name: output.detach() for name, output in outputs.items()}
    if operation.backward:
        wanted = {name: leaf for name, leaf in named.items() if leaf.requires_grad}
        found = torch.autograd.grad(list(outputs.values()), list(wanted.values()), upstream(outputs))
        exact |= {f"d {name}": gradient for name, gradient in zip(wanted, found, strict=True)}
    return exact


def time_pass(
    run, case: Case, found: list[Implementation], name: str, sets: list[Tensors]
) -> dict[str, dict[str, timing.Time]]:
    """Both ways of calling, every implementation: times[way][implementation]."""
    subjects = {each.name: _subject(case.operation, each, name) for each in found}
    times = {name: timing.in_turns(subjects, sets)}
    if run.device.type == "cuda":
        times[f"gpu_{name}"], reasons = timing.on_gpu_in_turns(subjects, sets)
        run.left_out += [f"{case}, {which}, GPU time alone, {name}: {why}" for which, why in reasons.items()]
    return times


def _subject(operation: BlockOperation, implementation: Implementation, name: str) -> timing.Subject:
    function = implementation.function

    def prepare(inputs: Tensors) -> Any:
        # New leaves: autograd adds up a leaf's gradient on the stream where the leaf was first used.
        named = block_operations.leaves(operation, implementation.inputs(operation, inputs))
        if name == "forward":
            return named
        outputs = dict(zip(operation.outputs, function(**named), strict=True))
        wanted = [leaf for leaf in named.values() if leaf.requires_grad]
        return list(outputs.values()), wanted, upstream(outputs)

    def forward(named: Tensors) -> Any:
        return function(**named)

    def backward(prepared: Any) -> Any:
        outputs, wanted, gradients = prepared
        return torch.autograd.grad(outputs, wanted, gradients, retain_graph=True)

    return timing.Subject(forward if name == "forward" else backward, implementation.context, prepare)


def make_rows(
    run,
    case: Case,
    name: str,
    found: list[Implementation],
    errors: dict[str, dict[str, float]],
    times: dict[str, dict[str, timing.Time]],
    moved: int,
    saved: dict[str, int],
) -> list[dict[str, Any]]:
    peers = [each.name for each in found if each.peer]
    dimensions = block_operations.SIZES[case.size]
    rows = []
    for each in found:
        rows.append(
            {
                "operation": case.name,
                "size": case.size,
                "pass": name,
                "implementation": each.name,
                "peer": each.peer,
                "dimensions": vars(dimensions),
                "bytes": moved,
                "bytes_counted": str(getattr(case.operation, name)),
                "errors": {
                    which: error
                    for which, error in errors[each.name].items()
                    if which.startswith("d ") == (name == "backward")
                },
                # What torch.compile keeps is not counted.
                "saved_bytes": saved[each.name] if case.operation.backward and each.name != "compile" else None,
                **timing.rates(each.name, times, moved, run.copy_tb_s, peers),
            }
        )
    return rows
