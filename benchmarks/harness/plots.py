"""Pictures of files that benchmarks/run.py --json wrote: the roofline (achieved bandwidth over bytes moved), and a
transformer's GPU time by kind of kernel. Both raise ImportError without matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness.profile import IDLE
from harness.report import headline

MARKERS = "osD^v<>P*X"
IMPLEMENTATIONS = {"cuda": "tab:green", "triton": "tab:blue", "eager": "tab:gray", "compile": "tab:orange"}
KINDS = {"GEMM": "tab:blue", "attention": "tab:orange", "memory-bound": "tab:red", IDLE: "lightgray"}
VARIANTS = ("eager", "compiled", "fused", "fused_fp8")  # the order of the bars
PANELS = {"called from Python": "", "GPU time alone": "gpu_"}


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def roofline(results: list[dict[str, Any]], output: Path) -> None:
    """A row of panels for each run: as called from Python, and the GPU alone."""
    pyplot = _pyplot()
    rows = len(results)
    figure, axes = pyplot.subplots(rows, 2, figsize=(13, 5.5 * rows), layout="constrained", sharey=True, squeeze=False)
    operations = list(dict.fromkeys(row["operation"] for result in results for row in result["rows"]))
    implementations = list(dict.fromkeys(row["implementation"] for result in results for row in result["rows"]))
    colors = {name: IMPLEMENTATIONS.get(name, f"C{index}") for index, name in enumerate(implementations)}
    markers = {name: MARKERS[index % len(MARKERS)] for index, name in enumerate(operations)}
    for result, pair in zip(results, axes, strict=True):
        for axis, (panel, prefix) in zip(pair, PANELS.items(), strict=True):
            for row in result["rows"]:
                achieved = row["tb_s"].get(prefix + headline(row))
                if achieved is not None:
                    style = {"color": colors[row["implementation"]], "marker": markers[row["operation"]]}
                    axis.plot(row["bytes"], achieved, linestyle="none", markersize=6, alpha=0.8, **style)
            axis.axhline(result["copy_tb_s"], color="black", linestyle="--", linewidth=1)
            axis.set(xscale="log", yscale="log", xlabel="bytes moved (counted)")
            axis.set_title(f"{result['machine']['gpu']}, {panel}")
            axis.grid(alpha=0.3, which="both")
        pair[0].set_ylabel("TB/s achieved")
    handles = [pyplot.Line2D([], [], color="black", linestyle="--", label="copy bandwidth of the machine")]
    handles += [pyplot.Line2D([], [], color=colors[each], linewidth=5, label=each) for each in implementations]
    style = {"color": "black", "linestyle": "none"}
    handles += [pyplot.Line2D([], [], marker=markers[each], label=each, **style) for each in operations]
    figure.legend(handles=handles, loc="outside right upper", fontsize="small")
    figure.savefig(output, dpi=110)
    pyplot.close(figure)


def broken_down(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for result in results for row in result.get("transformer", []) if row["part"] == "breakdown"]


def breakdown(results: list[dict[str, Any]], output: Path) -> None:
    """A panel for each pass with a bar for each variant; all runs are from one machine."""
    pyplot = _pyplot()
    rows = broken_down(results)
    passes = list(dict.fromkeys(row["size"] for row in rows))
    lines = -(-len(passes) // 2)
    figure, axes = pyplot.subplots(lines, 2, figsize=(12, 4.8 * lines), layout="constrained", squeeze=False)
    for axis in axes.flat[len(passes) :]:
        axis.remove()
    for axis, name in zip(axes.flat, passes, strict=False):
        bars = [row for row in rows if row["size"] == name]
        bars.sort(key=lambda row: VARIANTS.index(row["implementation"]))
        for position, row in enumerate(bars):
            bottom = 0.0
            for each, milliseconds in row["milliseconds"].items():
                axis.bar(position, milliseconds, bottom=bottom, color=KINDS[each], width=0.7)
                if milliseconds > 0.03 * sum(row["milliseconds"].values()):
                    axis.text(position, bottom + milliseconds / 2, f"{milliseconds:.0f}", ha="center", va="center")
                bottom += milliseconds
            axis.text(position, bottom, f"{bottom:.0f} ms", ha="center", va="bottom", weight="bold")
        axis.set_xticks(range(len(bars)), [row["implementation"] for row in bars])
        axis.set(title=f"{name}, {results[0]['machine']['gpu']}", ylabel="ms")
        axis.margins(y=0.1)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=KINDS[each], label=each) for each in reversed(KINDS)]
    figure.legend(handles=handles, loc="outside right upper")
    figure.savefig(output, dpi=110)
    pyplot.close(figure)
