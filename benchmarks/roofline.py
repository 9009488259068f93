"""The roofline picture: bytes moved against the bandwidth achieved, from files that benchmarks/run.py --json wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from report import headline

MARKERS = "osD^v<>P*X"
COLORS = {"cuda": "tab:green", "triton": "tab:blue", "eager": "tab:gray", "compile": "tab:orange"}
PANELS = {"called the ordinary way": "", "GPU time alone": "gpu_"}


def draw(results: list[dict[str, Any]], output: Path) -> None:
    """One row of panels for each run: as called, and without launches. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = len(results)
    figure, axes = pyplot.subplots(rows, 2, figsize=(13, 5.5 * rows), layout="constrained", sharey=True, squeeze=False)
    operations = list(dict.fromkeys(row["operation"] for result in results for row in result["rows"]))
    implementations = list(dict.fromkeys(row["implementation"] for result in results for row in result["rows"]))
    colors = {name: COLORS.get(name, f"C{index}") for index, name in enumerate(implementations)}
    markers = {name: MARKERS[index % len(MARKERS)] for index, name in enumerate(operations)}
    for result, pair in zip(results, axes, strict=True):
        for axis, (panel, prefix) in zip(pair, PANELS.items(), strict=True):
            for row in result["rows"]:
                achieved = row["tb_s"].get(prefix + headline(row["operation"]))
                if achieved is not None:
                    style = {"color": colors[row["implementation"]], "marker": markers[row["operation"]]}
                    axis.plot(row["bytes"], achieved, linestyle="none", markersize=6, alpha=0.8, **style)
            axis.axhline(result["copy_tb_s"], color="black", linestyle="--", linewidth=1)
            axis.set(
                xscale="log", yscale="log", xlabel="bytes moved (counted)", title=f"{result['machine']['gpu']}, {panel}"
            )
            axis.grid(alpha=0.3, which="both")
        pair[0].set_ylabel("TB/s achieved")
    handles = [pyplot.Line2D([], [], color="black", linestyle="--", label="copy bandwidth of the machine")]
    handles += [pyplot.Line2D([], [], color=colors[each], linewidth=5, label=each) for each in implementations]
    handles += [
        pyplot.Line2D([], [], color="black", marker=markers[each], linestyle="none", label=each) for each in operations
    ]
    figure.legend(handles=handles, loc="outside right upper", fontsize="small")
    figure.savefig(output, dpi=110)
    pyplot.close(figure)
