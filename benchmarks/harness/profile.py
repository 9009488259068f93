"""GPU time by kind of kernel: the profiler's kernels, classified by their names.

Durations are the GPU's own. Idle is the rest of the time that the pass takes without the profiler, which slows the host down.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# The first pattern that matches a kernel's name decides.
RULES = (
    ("memory-bound", r"^triton_(poi|red|per)_"),  # torch.compile names them after what they fuse, even attention
    ("attention", r"attention|attn|sdpa|fmha|flash|^_(forward|dq|dkv)_kernel$|compute_dot_do_o|convert_dq_to_16bits"),
    ("GEMM", r"gemm|gemv|nvjet|cutlass|cublas|splitK|xmma|scaled_mm|convolve|dgrad|wgrad|^triton_tem_"),
    ("memory-bound", r""),
)
KINDS = ("GEMM", "attention", "memory-bound")
IDLE = "idle"
CALLS = 4
LARGEST = 12  # kernels listed for each kind

Kernel = tuple[str, float, float]  # name, begin and duration in us


def kind(name: str) -> str:
    return next(each for each, pattern in RULES if re.search(pattern, name, re.IGNORECASE))


def record(call: Callable[[], Any]) -> list[Kernel]:
    """The kernels of the last of CALLS calls. The GPU lowers its clock under load: the first pass after a rest is up to a
    tenth faster than passes in a loop."""
    torch.cuda.synchronize()
    kernels = traced(lambda: [call() for _ in range(CALLS)])
    return kernels[-(len(kernels) // CALLS) :]


def traced(call: Callable[[], Any]) -> list[Kernel]:
    """The kernels of a call, ordered by their begin."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        return sorted(kernels_of(json.loads(file.read_text(encoding="utf-8"))), key=lambda kernel: kernel[1])


def kernels_of(trace: dict[str, Any]) -> list[Kernel]:
    """The GPU's events of a trace; copies and fills count as kernels."""
    return [
        (event["name"], float(event["ts"]), float(event["dur"]))
        for event in trace["traceEvents"]
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    ]


def by_kind(kernels: list[Kernel], wall_us: float) -> dict[str, Any]:
    """Milliseconds of each kind and idle, and each kind's largest kernels as [kind, ms, calls, name]."""
    totals, calls = defaultdict(float), defaultdict(int)
    for name, _, duration in kernels:
        totals[name] += duration / 1e3
        calls[name] += 1
    milliseconds = dict.fromkeys(KINDS, 0.0)
    for name, total in totals.items():
        milliseconds[kind(name)] += total
    milliseconds[IDLE] = max(0.0, (wall_us - busy(kernels)) / 1e3)
    largest = []
    for each in KINDS:
        names = sorted((name for name in totals if kind(name) == each), key=totals.get, reverse=True)
        largest += [[each, totals[name], calls[name], name[:160]] for name in names[:LARGEST]]
    return {"milliseconds": milliseconds, "num_kernels": len(kernels), "kernels": largest}


def busy(kernels: list[Kernel]) -> float:
    """Microseconds in which at least one kernel ran."""
    total, last = 0.0, float("-inf")
    for _, begin, duration in sorted(kernels, key=lambda kernel: kernel[1]):
        end = begin + duration
        total += max(0.0, end - max(begin, last))
        last = max(last, end)
    return total
