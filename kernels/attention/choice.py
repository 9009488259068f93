"""Which attention kernel is the fastest for a shape on this GPU: measured, not guessed.

Times for the H100 and the H200 are in attention_times.json, which `python benchmarks/attention_times.py` writes on such
a machine. Another GPU is measured at first use of a head dimension and length; the times go into the user's cache. They
are of one forward pass ("forward"), or of a forward and a backward pass ("training").

When two kernels are nearly equal, two measurements may choose differently, and kernels differ in their last bits. So the
processes of a run `agree_on` one table of `known_times`, and choose by nothing else from then on.
"""

import contextlib
import functools
import itertools
import json
import math
import os
import re
import statistics
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from dpdmd.kernels.runtime.csrc import cache_folder

ENVIRONMENT_VARIABLE = "DPDMD_ATTENTION"
SHIPPED = Path(__file__).with_name("attention_times.json")
CANDIDATES = ("triton", "triton+cudnn", "cudnn", "flash")
REPEATABLE = ("triton", "flash")  # flash: under deterministic algorithms torch uses its deterministic backward pass
TORCHS = ("cudnn", "flash")
# A kernel whose gradients repeat may take REPEATING times as long as the fastest, and TIE times as long as torch's own.
REPEATING = 1.05
TIE = 1.03
HEAD_DIMS = (16, 32, 64, 96, 128)
LENGTHS = (64, 256, 1024, 4096, 4429, 4608, 8192, 16384)

Times = dict[str, dict[str, float]]  # "forward" or "training" -> backend -> us
NOTHING_KNOWN: Times = {"forward": {}, "training": {}}
WITHOUT_GPU: Times = {"forward": {"triton": 1.0}, "training": {"triton": 1.0}}  # for fake tensors


def overridden(allowed: tuple[str, ...]) -> str:
    """The backend that DPDMD_ATTENTION names, or "auto"."""
    name = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
    if name not in allowed:
        raise ValueError(f"{ENVIRONMENT_VARIABLE}={name!r} in the environment; it takes one of {', '.join(allowed)}")
    return name


_chosen: dict[tuple, str] = {}
_agreed: dict[str, Times] | None = None


def fastest(attention: Callable, index: int, head_dim: int, num_queries: int, num_keys: int, training: bool) -> str:
    """The backend for `attention` on CUDA device `index`: one of CANDIDATES, or "auto" (torch's kernels in the usual
    order) if no times are known and none can be measured now."""
    key = index, head_dim, num_queries, num_keys, training, torch.are_deterministic_algorithms_enabled()
    if key not in _chosen:
        times = times_for(attention, index, head_dim, math.sqrt(num_queries * num_keys))
        if times is NOTHING_KNOWN:  # yet
            return "auto"
        _chosen[key] = pick(times["training" if training else "forward"], key[-1])
    return _chosen[key]


fastest.__dict__["_dynamo_marked_constant"] = True  # torch.compile runs it while tracing


def pick(times: dict[str, float], deterministic: bool) -> str:
    """The fastest backend; the fastest that repeats bit for bit, where that is required or costs little."""
    winner = min(times, key=times.__getitem__, default="auto")
    repeatable = [backend for backend in times if backend in REPEATABLE]
    if not repeatable:
        return winner
    best = min(repeatable, key=times.__getitem__)
    limits = [REPEATING * times[winner], *(TIE * times[backend] for backend in TORCHS if backend in times)]
    return best if deterministic or times[best] <= min(limits) else winner


def known_times(attention: Callable, index: int, shapes: Iterable[tuple[int, int]]) -> dict[str, Any]:
    """A table for `agree_on`, in JSON's types: {"gpu": name of CUDA device `index`, "times": {"head dimension,length":
    Times}}. The shipped table of this GPU; else the entries for `shapes`, from the user's cache or measured now.

    shapes: (head dimension, sqrt(queries * keys)) of each attention.
    """
    times = dict(_shipped(gpu_name(index)))
    if not times:
        for head_dim, length in shapes:
            head_dim, length = _head_dim(head_dim), _length(length)
            times[f"{head_dim},{length}"] = _measured(attention, index, head_dim, length)
    return {"gpu": gpu_name(index), "times": times}


def agree_on(table: dict[str, Any] | None) -> None:
    """Make every choice of this process, on any CUDA device, by this table of `known_times`: by its nearest entry, and in
    torch's usual order for a head dimension that it lacks. None: by this process's own times again.

    Raises ValueError for any other table.
    """
    global _agreed
    if table is not None and not is_table(table):
        raise ValueError('table is not one of known_times; it needs to be {"gpu": name, "times": {"D,S": times}}')
    _agreed = None if table is None else table["times"]
    _chosen.clear()


def is_table(table: object) -> bool:
    """Whether `table` has the keys and types of `known_times`."""
    if not isinstance(table, dict) or table.keys() != {"gpu", "times"} or not isinstance(table["gpu"], str):
        return False
    return isinstance(table["times"], dict) and all(_is_entry(*entry) for entry in table["times"].items())


def _is_entry(key: object, times: object) -> bool:
    if not isinstance(key, str) or not re.fullmatch(r"[1-9]\d{0,8},[1-9]\d{0,8}", key, re.ASCII):
        return False
    if not isinstance(times, dict) or times.keys() != NOTHING_KNOWN.keys():
        return False
    return all(isinstance(each, dict) and all(_is_time(*one) for one in each.items()) for each in times.values())


def _is_time(backend: str, us: Any) -> bool:
    return backend in CANDIDATES and type(us) in (int, float) and 0 < us < math.inf


def times_for(attention: Callable, index: int, head_dim: int, length: float) -> Times:
    """The times for this head dimension, rounded up, and the nearest length: known, or measured now."""
    if _agreed is not None:
        return nearest(_agreed, head_dim, length)
    gpu = gpu_name(index)
    if not gpu:
        return WITHOUT_GPU
    if shipped := _shipped(gpu):
        return nearest(shipped, head_dim, length)
    if torch.cuda.is_current_stream_capturing():
        return NOTHING_KNOWN
    return _measured(attention, index, _head_dim(head_dim), _length(length))


def nearest(table: dict[str, Times], head_dim: int, length: float) -> Times:
    """The entry of the table ("D,S" -> times) for this head dimension, rounded up, and the nearest length."""
    prefix = f"{_head_dim(head_dim)},"
    lengths = [int(key.removeprefix(prefix)) for key in table if key.startswith(prefix)]
    return table[f"{prefix}{_length(length, lengths)}"] if lengths else NOTHING_KNOWN


def _head_dim(head_dim: int) -> int:
    return next((known for known in HEAD_DIMS if known >= head_dim), HEAD_DIMS[-1])


def _length(length: float, lengths: Iterable[int] = LENGTHS) -> int:
    return min(lengths, key=lambda known: abs(math.log(known / length)))


@functools.cache
def gpu_name(index: int) -> str:
    """The GPU's name in the shipped table ("H100"), else the device's full name; "" on a machine without a GPU."""
    name = torch.cuda.get_device_name(index) if torch.cuda.is_available() else ""
    return next((known for known in json.loads(SHIPPED.read_text()) if known in name), name)


@functools.cache
def _shipped(gpu: str) -> dict[str, Times]:
    return json.loads(SHIPPED.read_text()).get(gpu, {})


@functools.cache
def _measured(attention: Callable, index: int, head_dim: int, length: int) -> Times:
    """Times from the user's cache, or measured now and stored there."""
    name = re.sub(r"[^\w.+-]", "_", f"{gpu_name(index)}-torch{torch.__version__}")
    file = cache_folder() / "attention" / f"{name}.json"
    key = f"{head_dim},{length}"
    times = _read(file).get(key)
    if times is None:
        times = measure(attention, index, head_dim, length)
        with contextlib.suppress(OSError):  # the folder cannot be written: the next process measures again
            _write(file, _read(file) | {key: times})  # read again: another process may have written since
    return times


def _read(file: Path) -> dict[str, Times]:
    """The valid entries of the file. Damaged ones are left out, and so measured anew."""
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return {key: times for key, times in table.items() if _is_entry(key, times)} if isinstance(table, dict) else {}


def _write(file: Path, table: dict[str, Times]) -> None:
    """Write under another name first, so that no process reads half a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    whole = file.with_name(f"{uuid.uuid4().hex}.tmp")
    try:
        whole.write_text(json.dumps(table, indent=1), encoding="utf-8")
        os.replace(whole, file)
    finally:
        whole.unlink(missing_ok=True)


def measure(attention: Callable, index: int, head_dim: int, length: int) -> Times:
    """Microseconds of each candidate that runs here, in bfloat16, with about as many tokens as a training batch."""
    with torch.cuda.device(index), torch.enable_grad(), _disable_current_modes():  # such as FakeTensorMode
        shape = (max(1, min(16, 16384 // length)), length, 24, head_dim)
        q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        upstream = torch.randn_like(q)
        times = {"forward": {}, "training": {}}
        for backend, name in itertools.product(CANDIDATES, times):
            if (backend, name) == ("triton+cudnn", "forward"):  # the forward pass is "triton"
                continue

            def run(backend=backend, training=name == "training"):
                with torch.set_grad_enabled(training):
                    o = attention(q, k, v, backend=backend)
                if training:
                    torch.autograd.grad(o, (q, k, v), upstream)

            try:
                times[name][backend] = _time(run)
            except Exception:  # it cannot run on this GPU: too little shared memory, for instance
                torch.cuda.synchronize()
        return times


def _time(run, repeats: int = 7) -> float:
    for _ in range(2):
        run()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    return round(1e3 * statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events)), 1)
