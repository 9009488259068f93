"""Timing, the same way for ours and for the peers.

`in_turns` puts a clock around a batch of calls, each on the next set of inputs, and synchronises the device before and after;
batches take 10 ms, so that synchronising is under 1 %. Implementations take turns in two rounds, and median and spread are of
both, so that the spread contains changes of the machine. `on_gpu_in_turns` replays a CUDA graph of the same calls with events
around the replays. `call_by_call` times each call of a whole network, which is longer than a batch.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

SECONDS = 0.08  # for an implementation and way of calling, both rounds together
GPU_SECONDS = 0.02
BATCH_SECONDS = 0.01
ROUNDS = 2
FEWEST_BATCHES = 3  # in a round
COPY_BYTES = 2**30  # far above any cache: 20 times H100's
CPU_COPY_BYTES = 2**26

Call = Callable[[Any], Any]


@dataclass(frozen=True)
class Time:
    """Microseconds a call. spread: the interquartile range over batches."""

    median_us: float
    spread_us: float
    batches: int
    calls_a_batch: int
    rounds_us: list[float]  # the median of each round


@dataclass(frozen=True)
class Subject:
    """Something to time: `call` takes the result of `prepare` on one set of inputs, inside the context of `around`.

    prepare runs once for each set, untimed, in the same context and stream: for a backward pass it is the forward pass.
    """

    call: Call
    around: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    prepare: Call = lambda inputs: inputs


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _batch(call: Call, sets: Iterator[Any], calls: int) -> float:
    """Seconds for `calls` calls."""
    synchronize()
    begin = time.perf_counter()
    for _ in range(calls):
        call(next(sets))
    synchronize()
    return time.perf_counter() - begin


def _calls_a_batch(call: Call, sets: Iterator[Any]) -> int:
    """Double the batch until its time can be measured; this is also the warm-up."""
    calls = 1
    _batch(call, sets, 2)
    while True:
        seconds = _batch(call, sets, calls)
        if seconds > BATCH_SECONDS / 2:
            return max(1, round(calls * BATCH_SECONDS / seconds))
        calls *= 2


def in_turns(
    subjects: dict[str, Subject], sets: Sequence[Any], seconds: float = SECONDS
) -> tuple[dict[str, Time], dict[str, Exception]]:
    """Times of the subjects as called from Python, on rotating sets of inputs; and the errors of those that failed."""
    calls, rotations = {}, {}

    def take(name: str) -> list[float]:
        subject = subjects[name]
        with subject.around(), _no_collection():
            if name not in calls:
                rotations[name] = itertools.cycle([subject.prepare(each) for each in sets])
                calls[name] = _calls_a_batch(subject.call, rotations[name])
            return repeat(lambda: _batch(subject.call, rotations[name], calls[name]), seconds / ROUNDS)

    rounds, reasons = _rounds(list(subjects), take)
    return {name: summary(rounds[name], calls[name]) for name in rounds}, reasons


def call_by_call(
    subjects: dict[str, Subject], inputs: Any, seconds: float
) -> tuple[dict[str, dict[str, Time]], dict[str, Exception]]:
    """times[part][subject] of calls that return their own seconds, by part; and the errors. Each round prepares anew and
    takes `seconds`."""

    def take(name: str) -> list[dict[str, float]]:
        subject = subjects[name]
        with subject.around():
            prepared = subject.prepare(inputs)
            return repeat(lambda: subject.call(prepared), seconds)

    rounds, reasons = _rounds(list(subjects), take)
    parts = dict.fromkeys(part for by_round in rounds.values() for part in by_round[0][0])
    return {
        part: {name: summary([[call[part] for call in calls] for calls in rounds[name]]) for name in rounds}
        for part in parts
    }, reasons


def on_gpu_in_turns(
    subjects: dict[str, Subject], sets: Sequence[Any], seconds: float = GPU_SECONDS
) -> tuple[dict[str, Time], dict[str, Exception]]:
    """Times of the GPU alone: of a CUDA graph of one call on each set; and the errors of those that cannot be captured. In
    turns, because a GPU at its power limit slows later subjects down."""
    graphs, reasons = {}, {}
    for name, subject in subjects.items():
        try:
            graphs[name] = _capture(subject, sets)
        except RuntimeError as error:
            reasons[name] = error.with_traceback(None)  # its frames would keep tensors
    replays = {name: _replays_a_batch(graph) for name, graph in graphs.items()}
    rounds, failed = _rounds(
        list(graphs), lambda name: repeat(lambda: _replay(graphs[name], replays[name]), seconds / ROUNDS)
    )
    return {name: summary(rounds[name], replays[name] * len(sets)) for name in rounds}, reasons | failed


def _rounds(
    names: list[str], take: Callable[[str], list[Any]]
) -> tuple[dict[str, list[list[Any]]], dict[str, Exception]]:
    """Each name's results of `take` in ROUNDS rounds, without those that raised; and their errors."""
    rounds, reasons = {name: [] for name in names}, {}
    for name in ROUNDS * names:
        if name in reasons:
            continue
        try:
            rounds[name].append(take(name))
        except Exception as error:  # memory, a compiler: the others go on
            reasons[name] = error.with_traceback(None)
    return {name: taken for name, taken in rounds.items() if name not in reasons}, reasons


def repeat(measurement: Callable[[], Any], seconds: float) -> list[Any]:
    taken, end = [], time.perf_counter() + seconds
    while len(taken) < FEWEST_BATCHES or time.perf_counter() < end:
        taken.append(measurement())
    return taken


def summary(rounds: list[list[float]], calls: int = 1) -> Time:
    """rounds: seconds of each batch of `calls` calls, by round."""
    rounds = [[seconds / calls * 1e6 for seconds in batches] for batches in rounds]
    together = [us for batches in rounds for us in batches]
    lower, _, upper = statistics.quantiles(together, n=4)
    medians = [statistics.median(batches) for batches in rounds]
    return Time(statistics.median(together), upper - lower, len(together), calls, medians)


@dataclass(frozen=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    prepared: list[Any]  # kept alive, because the graph reads them


def _capture(subject: Subject, sets: Sequence[Any]) -> _Graph:
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    # The outer stream context restores the stream if a capture fails, which torch.cuda.graph does not. One thread, because
    # the engine's device thread would run the backward pass outside this thread's capture.
    outer = torch.cuda.stream(torch.cuda.current_stream())
    with outer, subject.around(), torch.autograd.set_multithreading_enabled(False):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # excludes what is set up once for a stream
            prepared = [subject.prepare(each) for each in sets]
            for each in prepared[:2]:
                subject.call(each)
        results = []
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            for each in prepared:
                # Results live until the capture ends, so that no call reuses the last one's memory, which is in the cache.
                results.append(subject.call(each))
    return _Graph(graph, prepared)


def _replay(captured: _Graph, replays: int) -> float:
    """Seconds for `replays` replays."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(replays):
        captured.graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def _replays_a_batch(captured: _Graph) -> int:
    """The number of replays in a batch; the first replay is the warm-up."""
    _replay(captured, 1)
    return max(1, round(BATCH_SECONDS / _replay(captured, 1)))


def ratios(own: dict[str, Time], others: dict[str, dict[str, Time]]) -> dict[str, dict[str, float]]:
    """Times of the others over one's own, by way of calling."""
    return {
        name: {way: theirs[way].median_us / taken.median_us for way, taken in own.items() if way in theirs}
        for name, theirs in others.items()
    }


class _Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, loss, gradient):
        ctx.save_for_backward(gradient)
        return loss.clone()

    @staticmethod
    def backward(ctx, upstream):
        return ctx.saved_tensors[0], None, None


def engine_floor(device: torch.device) -> dict[str, dict[str, Any]]:
    """The overhead of a loss's forward and backward pass, by way of calling: an autograd function with one kernel (forward)
    on 64 elements."""
    x = torch.randn(64, device=device, requires_grad=True)
    loss, gradient = torch.zeros((), device=device), torch.randn(64, device=device)

    def call(_) -> None:
        x.grad = None
        _Nothing.apply(x, loss, gradient).backward()

    one_thread = functools.partial(torch.autograd.set_multithreading_enabled, False)
    times: dict[str, Time] = {}
    for way, around in (("forward_backward", contextlib.nullcontext), ("forward_backward_one_thread", one_thread)):
        times |= in_turns({way: Subject(call, around)}, [None])[0]
    return {way: asdict(taken) for way, taken in times.items()}


def copy_bandwidth(device: torch.device) -> float:
    """The machine's bandwidth in TB/s: a large copy in memory, counting bytes read and written."""
    size = COPY_BYTES if device.type == "cuda" else CPU_COPY_BYTES
    source = torch.randn(size // 4, device=device)  # zeros can be faster to copy than data
    target = torch.empty_like(source)
    batch = functools.partial(_batch, lambda _: target.copy_(source), itertools.repeat(None), 10)
    batch()
    seconds = statistics.median(batch() for _ in range(7)) / 10
    return 2 * size / seconds / 1e12


def cache_bytes(device: torch.device) -> int:
    """The size of the last-level cache, which rotating inputs have to exceed."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    return 2**20  # times on a CPU do not matter, so small input sets suffice
