"""GPU time by kind of kernel: the profiler's kernels, sorted by their names, and the picture of it.

Durations are the GPU's own. Idle is what is left of the time that the pass takes without a profiler, which slows the
host down.
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

# The first pattern that is found in a kernel's name decides.
RULES = (
    ("memory-bound", r"^triton_(poi|red|per)_"),  # torch.compile names them after all that they fuse, attention too
    ("attention", r"attention|attn|sdpa|fmha|flash|^_(forward|dq|dkv)_kernel$|compute_dot_do_o|convert_dq_to_16bits"),
    ("GEMM", r"gemm|gemv|nvjet|cutlass|cublas|splitK|xmma|scaled_mm|convolve|dgrad|wgrad|^triton_tem_"),
    ("memory-bound", r""),
)
KINDS = ("GEMM", "attention", "memory-bound")
IDLE = "idle"
COLORS = {"GEMM": "tab:blue", "attention": "tab:orange", "memory-bound": "tab:red", IDLE: "lightgray"}
ORDER = ("eager", "compiled", "fused", "fused_fp8")  # of the bars
CALLS = 4
LARGEST = 12  # kernels listed of each kind

Kernel = tuple[str, float, float]  # name, begin and duration in us


def kind(name: str) -> str:
    return next(each for each, pattern in RULES if re.search(pattern, name, re.IGNORECASE))


def record(call: Callable[[], Any]) -> list[Kernel]:
    """What the GPU ran for the last of CALLS calls, by its own clock: it lowers that under load, so that the first pass
    after a rest is up to a tenth faster than what a loop of passes takes."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(CALLS):
            call()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        kernels = sorted(kernels_of(json.loads(file.read_text(encoding="utf-8"))), key=lambda kernel: kernel[1])
    return kernels[-(len(kernels) // CALLS) :]


def kernels_of(trace: dict[str, Any]) -> list[Kernel]:
    """From the trace's events, those of the GPU; copies and fills are kernels here."""
    return [
        (event["name"], float(event["ts"]), float(event["dur"]))
        for event in trace["traceEvents"]
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    ]


def by_kind(kernels: list[Kernel], wall_us: float) -> dict[str, Any]:
    """Milliseconds of each kind and idle ones, and the largest kernels of each kind: [kind, ms, calls, name]."""
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


def broken_down(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for result in results for row in result.get("transformer", []) if row["part"] == "breakdown"]


def draw(results: list[dict[str, Any]], output: Path) -> None:
    """A bar for each variant, a panel for each pass, from files that run.py --json wrote on one machine. Raises
    ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = broken_down(results)
    passes = list(dict.fromkeys(row["size"] for row in rows))
    lines = -(-len(passes) // 2)
    figure, axes = pyplot.subplots(lines, 2, figsize=(12, 4.8 * lines), layout="constrained", squeeze=False)
    for axis in axes.flat[len(passes) :]:
        axis.remove()
    for axis, name in zip(axes.flat, passes, strict=False):
        bars = sorted((row for row in rows if row["size"] == name), key=lambda row: ORDER.index(row["implementation"]))
        for position, row in enumerate(bars):
            bottom = 0.0
            for each, milliseconds in row["milliseconds"].items():
                axis.bar(position, milliseconds, bottom=bottom, color=COLORS[each], width=0.7)
                if milliseconds > 0.03 * sum(row["milliseconds"].values()):
                    axis.text(position, bottom + milliseconds / 2, f"{milliseconds:.0f}", ha="center", va="center")
                bottom += milliseconds
            axis.text(position, bottom, f"{bottom:.0f} ms", ha="center", va="bottom", weight="bold")
        axis.set_xticks(range(len(bars)), [row["implementation"] for row in bars])
        axis.set(title=f"{name}, {results[0]['machine']['gpu']}", ylabel="ms")
        axis.margins(y=0.1)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=COLORS[each], label=each) for each in reversed(COLORS)]
    figure.legend(handles=handles, loc="outside right upper")
    figure.savefig(output, dpi=110)
    pyplot.close(figure)
