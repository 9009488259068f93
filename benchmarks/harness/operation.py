"""An operation of the benchmark; `measure` checks it, times it, and adds a row for each implementation and pass.

An entry gives sizes, inputs, our function and a peer's, and the bytes that must be moved:

    Operation(
        name="gelu_tanh",
        sizes=SIZES,
        make=lambda size, draw: {"x": draw(size.batch, size.image, size.mlp), "bias": draw(size.mlp)},
        ours=gelu_tanh,
        peer=lambda x, bias: F.gelu(x + bias, approximate="tanh"),
        forward=Traffic(("x",), ("out",)),  # 2 tensors of the feed-forward layer's width
        backward=Traffic(("x", "d out"), ("d x",)),  # 3
    )

Inputs and outputs have names. The peer in float64 is the truth. Subclasses override the methods that call, check or count.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from dpdmd.kernels import Quantized, use_backend
from harness import accuracy, timing
from harness.accuracy import Error

DTYPE = torch.bfloat16
TABLES = (
    "rows",
    "blocks",
    "attention",
    "optimizer",
    "transformer",
)  # keys of the file of --json; rows: losses and samplers

Tensors = dict[str, Any]  # Tensor, or Quantized for an output
Times = dict[str, dict[str, timing.Time]]  # by way of calling, then by implementation name


@dataclass
class Run:
    """The options of a run, and its results."""

    device: torch.device
    ours: tuple[str, ...]
    peers: Sequence[str] | None = None  # None: eager everywhere, torch.compile within each table's limits
    copy_tb_s: float = math.nan
    note: Callable[[dict[str, Any]], None] = lambda row: None  # called after every row
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {each: [] for each in TABLES})
    cancellation: list[dict[str, Any]] = field(default_factory=list)
    engine_floor: dict[str, dict[str, Any]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    compile_seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # by table

    def add(self, table: str, row: dict[str, Any]) -> None:
        self.tables[table].append(row)
        self.note(row)

    def went_wrong(self, title: str, implementation: Implementation, error: Exception) -> None:
        """Add a failure; if a peer cannot run here or memory is too small, it is only left out."""
        optional = implementation.peer or implementation.may_be_missing
        no_fault = optional or isinstance(error, torch.OutOfMemoryError)
        (self.left_out if no_fault else self.failures).append(f"{title}: {accuracy.said(error)}")


@dataclass(frozen=True)
class Implementation:
    name: str
    peer: bool
    function: Callable[..., Any]
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    may_be_missing: bool = False  # one of ours that does not support every machine or shape


@dataclass(frozen=True)
class Checked:
    """The result of an implementation's check."""

    errors: dict[str, float]
    work: dict[str, float]  # bytes or operations, by way of calling
    facts: dict[str, Any]  # for its rows


class Draw:
    """Random tensors for one set of inputs; different seeds give different tensors."""

    def __init__(self, device: torch.device, seed: int):
        self.device, self.seed = device, seed

    @functools.cached_property
    def generator(self) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(self.seed)

    def __call__(self, *shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device, dtype=dtype)

    def times(self, count: int) -> Tensor:
        """Times (count,) in [0.2, 0.9), float32."""
        return 0.2 + 0.7 * torch.rand(count, generator=self.generator, device=self.device)


@dataclass(frozen=True)
class Traffic:
    """The tensors that a pass must read and write, by name: the fewest bytes that any implementation can move.

    "d x" is the gradient of x and counts x's bytes. Not counted are gates, scales, shifts, biases, weights and the scales of
    quantised rows: a thousandth of the tokens' bytes.
    """

    reads: tuple[str, ...]
    writes: tuple[str, ...]

    def bytes(self, tensors: Mapping[str, Tensor | Quantized]) -> int:
        moved = [tensors[name.removeprefix("d ")] for name in (*self.reads, *self.writes)]
        return sum((each.values if isinstance(each, Quantized) else each).nbytes for each in moved)

    def __str__(self) -> str:
        return f"reads {', '.join(self.reads)}; writes {', '.join(self.writes)}"


def wide(x: Tensor) -> Tensor:
    """In the dtype of a peer's arithmetic: float32, or float64 for the truth."""
    return x if x.dtype == torch.float64 else x.float()


@contextlib.contextmanager
def no_donated_buffers() -> Iterator[None]:
    """Keep a compiled backward pass from overwriting saved tensors: here the graph is retained."""
    with torch._functorch.config.patch(donated_buffer=False):
        yield


@dataclass(frozen=True, kw_only=True)
class Operation:
    """An entry. `ours` and `peer` take the inputs by name and return the output, or a tuple of the outputs in order."""

    name: str
    sizes: Mapping[str, Any]  # the first argument of `make`, by the name of the size
    make: Callable[[Any, Draw], Any]  # makes one set of random inputs
    ours: Callable[..., Any]
    peer: Callable[..., Any]
    compiled: Callable[..., Any] | None = None  # what torch.compile gets instead of the peer
    outputs: tuple[str, ...] = ("out",)
    forward: Traffic | None = None
    backward: Traffic | None = None  # None: the operation has no gradient
    constants: tuple[str, ...] = ()  # inputs without a gradient
    module: str = ""  # dpdmd.kernels.<module> lists the implementations; "": triton and reference

    table: ClassVar[str] = "blocks"  # of TABLES
    poisoned: ClassVar[bool] = True  # ours are checked on memory full of NaN
    each_alone: ClassVar[bool] = False  # a wrong implementation does not stop the others from being timed
    # Limits of torch.compile unless --peers asks for it: seconds for all operations of the table; sizes (None: all).
    compile_seconds: ClassVar[float] = math.inf
    compiled_sizes: ClassVar[tuple[str, ...] | None] = None
    compile_context: ClassVar[Callable] = staticmethod(no_donated_buffers)
    on_host: ClassVar[bool] = True  # on a GPU also timed as called from Python
    gpu_seconds: ClassVar[float] = timing.GPU_SECONDS

    # Inputs and implementations

    def title(self, size: str) -> str:
        return f"{self.name} {size}"

    def default_sizes(self, cpu: bool) -> list[str]:
        return [size for size in self.sizes if (size == "awkward") == cpu]

    def draw(self, size: str, device: torch.device, seed: int) -> Any:
        return self.make(self.sizes[size], Draw(device, seed))

    def num_sets(self, inputs: Any, cache_bytes: int) -> int:
        """The number of input sets that together exceed twice the cache, so that no call finds its inputs there."""
        return max(2, math.ceil((2 * cache_bytes + 1) / self.set_bytes(inputs)))

    def set_bytes(self, inputs: Any) -> int:
        return sum(inputs[name].nbytes for name in self.forward.reads)

    def implementations(self, run: Run, size: str) -> list[Implementation]:
        """Ours first, then the peers."""
        existing = ("triton", "reference")
        if self.module:
            existing = importlib.import_module(f"dpdmd.kernels.{self.module}").IMPLEMENTATIONS
        ours = [name for name in run.ours if name in existing] or ["reference"]
        found = [Implementation(name, False, self.ours, functools.partial(use_backend, name)) for name in ours]
        if run.peers is None or "eager" in run.peers:
            found.append(Implementation("eager", True, self.peer))
        if self.compile_wanted(run, size):
            torch._dynamo.reset()  # earlier sizes would count towards the recompilation limit
            compiled = torch.compile(self.compiled or self.peer, dynamic=False)
            found.append(Implementation("compile", True, compiled, self.compile_context))
        return found

    def compile_wanted(self, run: Run, size: str) -> bool:
        if run.peers is not None:
            return "compile" in run.peers
        if run.device.type == "cpu" or (self.compiled_sizes is not None and size not in self.compiled_sizes):
            return False
        if run.compile_seconds[self.table] > self.compile_seconds:
            reason = f"the {self.compile_seconds:.0f} s for compiling are used up; --peers compile has no limit"
            run.left_out.append(f"{self.title(size)}, compile: {reason}")
            return False
        return True

    def inputs_of(self, implementation: Implementation, inputs: Any) -> Any:
        """The inputs as the implementation takes them."""
        return inputs

    def truth_inputs(self, inputs: Tensors) -> Tensors:
        return inputs

    def leaves(self, inputs: Tensors) -> Tensors:
        """New tensors with the same memory that require gradients if the operation has any. They must be new: autograd
        accumulates a leaf's gradient on the stream where the leaf was first used."""
        constants = inputs if self.backward is None else self.constants
        return {name: tensor.detach().requires_grad_(name not in constants) for name, tensor in inputs.items()}

    def called(self, function: Callable[..., Any], named: Tensors) -> Tensors:
        """The outputs by name."""
        made = function(**named)
        return dict(zip(self.outputs, made if len(self.outputs) > 1 else (made,), strict=True))

    def upstream(self, inputs: Tensors, outputs: Tensors) -> list[Tensor]:
        """Gradients of the outputs: the same values for each implementation, with the strides of its outputs."""
        return [
            torch.empty_like(output).copy_(Draw(output.device, 1000 + index)(*output.shape))
            for index, output in enumerate(outputs.values())
        ]

    def separate(self, tensors: Tensors) -> Tensors:
        """Tensors named by our inputs, renamed by the peer's."""
        return tensors

    # The check

    def results(self, function: Callable[..., Any], inputs: Tensors) -> Tensors:
        """Outputs, and gradients as "d <input>"."""
        named = self.leaves(inputs)
        outputs = self.called(function, named)
        if self.backward is None:
            return outputs
        wanted = {name: leaf for name, leaf in named.items() if leaf.requires_grad}
        found = torch.autograd.grad(list(outputs.values()), list(wanted.values()), self.upstream(inputs, outputs))
        gradients = self.separate(dict(zip(wanted, found, strict=True)))
        outputs = {name: output.detach() for name, output in outputs.items()}
        return {**outputs, **{f"d {name}": gradient for name, gradient in gradients.items()}}

    def truth(self, inputs: Any) -> Any:
        """The exact results, for `errors`."""
        return self.results(self.peer, {name: each.double() for name, each in self.truth_inputs(inputs).items()})

    def once(self, implementation: Implementation, inputs: Any) -> Any:
        """The implementation's results, for `errors`."""
        return self.results(implementation.function, self.inputs_of(implementation, inputs))

    def errors(self, implementation: Implementation, inputs: Any, outcome: Any, truth: Any) -> dict[str, Error]:
        found = {}
        for name, got in outcome.items():
            limit = accuracy.PEER_LIMIT if implementation.peer else accuracy.RESULT_LIMIT
            if isinstance(got, Quantized):
                got, limit = got.values.double() * got.scale.double(), accuracy.QUANTIZED_LIMIT
            found[name] = Error(accuracy.relative(got, truth[name]), limit)
        return found

    def problem(self, name: str, error: Error) -> str:
        return f"relative error of {name} {error.value:.1e}, allowed {error.limit:.1e}"

    # Counts, times and rows

    def facts(self, implementation: Implementation, size: str, inputs: Any, outcome: Any, truth: Any) -> dict[str, Any]:
        if self.backward is None or implementation.name == "compile":  # the hooks would compile it again
            return {"saved_bytes": None}
        named = self.leaves(self.inputs_of(implementation, inputs))
        return {"saved_bytes": saved_for_backward(implementation.function, named)}

    def work(self, implementation: Implementation, inputs: Any, outcome: Any) -> dict[str, float]:
        """Bytes or operations, by way of calling; rates are computed from them."""
        passes = {"forward": self.forward, "backward": self.backward}
        return {way: moved.bytes({**inputs, **outcome}) for way, moved in passes.items() if moved is not None}

    def ways(self, device: torch.device) -> list[tuple[str, ...]]:
        """Ways of calling; those of one tuple share a row."""
        return [("forward",), ("backward",)] if self.backward else [("forward",)]

    def subject(self, implementation: Implementation, way: str) -> timing.Subject:
        function = implementation.function

        def prepare(inputs: Tensors) -> Any:
            given = self.inputs_of(implementation, inputs)
            named = self.leaves(given)
            if way == "forward":
                return named
            outputs = self.called(function, named)
            wanted = [leaf for leaf in named.values() if leaf.requires_grad]
            return list(outputs.values()), wanted, self.upstream(given, outputs)

        def forward(named: Tensors) -> Any:
            return function(**named)

        def backward(prepared: Any) -> Any:
            return torch.autograd.grad(*prepared, retain_graph=True)

        return timing.Subject(forward if way == "forward" else backward, implementation.context, prepare)

    def take(self, run: Run, title: str, found: list[Implementation], ways: tuple[str, ...], sets: list[Any]) -> Times:
        """Times of every way of calling and implementation; "gpu_<way>" is the time of the GPU alone."""
        times, cuda = {}, run.device.type == "cuda"
        subjects = {way: {each.name: self.subject(each, way) for each in found} for way in ways}
        for way in ways if self.on_host or not cuda else ():
            times[way], reasons = timing.in_turns(subjects[way], sets)
            for each in (each for each in found if each.name in reasons):
                run.went_wrong(f"{title}, {each.name}, {way}", each, reasons[each.name])
        for way in ways if cuda else ():
            if not way.endswith("one_thread"):  # a replayed graph uses no threads
                times[f"gpu_{way}"], reasons = timing.on_gpu_in_turns(subjects[way], sets, self.gpu_seconds)
                run.left_out += [
                    f"{title}, {name}, GPU time alone, {way}: {accuracy.first_line(reason)}"
                    for name, reason in reasons.items()
                ]
        return times

    def compared_with(self, implementation: Implementation, found: list[Implementation]) -> list[str]:
        """Implementations whose times a row gives relative to its own."""
        return [] if implementation.peer else [each.name for each in found if each.peer]

    def row(self, name: str, ways: tuple[str, ...], checked: dict[str, Checked]) -> dict[str, Any]:
        """A row's entries besides facts and times."""
        (way,), mine = ways, checked[name]
        errors = {name: error for name, error in mine.errors.items() if name.startswith("d ") == (way == "backward")}
        counted = {"bytes": mine.work[way], "bytes_counted": str(getattr(self, way))}
        return {"pass": way, **counted, "errors": errors}

    def rates(self, own: dict[str, timing.Time], work: dict[str, float], copy_tb_s: float) -> dict[str, Any]:
        """TB/s, and the share of the copy bandwidth."""
        tb_s = {way: work[way.removeprefix("gpu_")] / taken.median_us / 1e6 for way, taken in own.items()}
        return {"tb_s": tb_s, "share_of_copy": {way: achieved / copy_tb_s for way, achieved in tb_s.items()}}


def saved_for_backward(function: Callable, inputs: Tensors) -> int:
    """Bytes that autograd saves in a forward pass, beside the inputs: whole storages, each once."""
    given = {tensor.untyped_storage().data_ptr() for tensor in inputs.values()}
    kept = []  # alive until the end, so that no address is reused

    def keep(tensor: Tensor) -> None:
        kept.append(tensor.detach())

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda _: None):
        function(**inputs)
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in kept}
    return sum(nbytes for address, nbytes in storages.items() if address not in given)


def measure(run: Run, operation: Operation, size: str) -> None:
    """Check and time one operation at one size."""
    title = operation.title(size)
    try:
        inputs = operation.draw(size, run.device, 0)
        found = operation.implementations(run, size)
        checked = gate(run, operation, size, title, found, inputs)
        found = [each for each in found if each.name in checked]
        if not found:
            return
        count = operation.num_sets(inputs, timing.cache_bytes(run.device))
        sets = [inputs, *(operation.draw(size, run.device, seed) for seed in range(1, count))]
    except torch.OutOfMemoryError as error:
        run.left_out.append(f"{title}: {accuracy.first_line(error)}")
        return
    for ways in operation.ways(run.device):
        times = operation.take(run, title, found, ways, sets)
        for row in make_rows(run, operation, size, found, ways, checked, times):
            run.add(operation.table, row)


def gate(
    run: Run, operation: Operation, size: str, title: str, found: list[Implementation], inputs: Any
) -> dict[str, Checked]:
    """Check implementations and return those to time. Adds errors to run.failures, and peers that cannot run to run.left_out."""
    truth, before = operation.truth(inputs), len(run.failures)
    checked = {}
    for each in found:
        begin = time.perf_counter()
        # Peers use torch's kernels, and the switch would compile them twice.
        poisoned = operation.poisoned and not each.peer
        try:
            with each.context(), accuracy.poisoned_memory() if poisoned else contextlib.nullcontext():
                outcome = operation.once(each, inputs)
                facts = operation.facts(each, size, inputs, outcome, truth)
        except Exception as error:  # the other implementations go on
            run.went_wrong(f"{title}, {each.name}", each, error)
            continue
        finally:
            if each.name == "compile":
                run.compile_seconds[operation.table] += time.perf_counter() - begin
        errors = operation.errors(each, inputs, outcome, truth)
        wrong = {name: error for name, error in errors.items() if not error.allowed}
        run.failures += [f"{title}, {each.name}: {operation.problem(*one)}" for one in wrong.items()]
        if not wrong:
            work = operation.work(each, inputs, outcome)
            checked[each.name] = Checked({name: error.value for name, error in errors.items()}, work, facts)
    return checked if operation.each_alone or len(run.failures) == before else {}


def make_rows(
    run: Run,
    operation: Operation,
    size: str,
    found: list[Implementation],
    ways: tuple[str, ...],
    checked: dict[str, Checked],
    times: Times,
) -> Iterator[dict[str, Any]]:
    by_name = {
        each.name: {way: named[each.name] for way, named in times.items() if each.name in named} for each in found
    }
    for each in found:
        mine, own = checked[each.name], by_name[each.name]
        others = {name: by_name[name] for name in operation.compared_with(each, found)}
        yield {
            "operation": operation.name,
            "size": size,
            "implementation": each.name,
            "peer": each.peer,
            **mine.facts,
            **operation.row(each.name, ways, checked),
            "times": {way: asdict(taken) for way, taken in own.items()},
            **operation.rates(own, mine.work, run.copy_tb_s),
            "ratios": timing.ratios(own, others),
        }
