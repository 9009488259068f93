"""The tables of what transformers are measured by: the same cells for the terminal and, as Markdown, for docs/."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rich.table import Table

GB = 1e9
STEPS_SHOWN = (1, 2, 5, 10, 15, 20)
GROUPS_SHOWN = 8


@dataclass(frozen=True)
class Grid:
    title: str
    text: tuple[str, ...]  # headings of the columns of words, which come first
    numbers: tuple[str, ...]
    rows: list[list[str]]

    def rich(self) -> Table:
        table = Table(title=self.title, title_justify="left", title_style="bold")
        for name in self.text:
            table.add_column(name, no_wrap=True)
        for name in self.numbers:
            table.add_column(name, justify="right")
        for row, before in zip(self.rows, [None, *self.rows], strict=False):
            if before and row[0] != before[0] and len(self.text) > 1:
                table.add_section()
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        headings = [*self.text, *self.numbers]
        rule = [*["---"] * len(self.text), *["---:"] * len(self.numbers)]
        lines = [f"| {' | '.join(cells)} |" for cells in (headings, rule, *self.rows)]
        return "\n".join([f"**{self.title}**", "", *lines])


def grids(result: dict[str, Any]) -> list[Grid]:
    """Those that the run has rows for."""
    blocks, attention = result.get("blocks") or [], result.get("attention") or []
    optimizer, transformer = result.get("optimizer") or [], result.get("transformer") or []
    parts = {
        part: [row for row in transformer if row["part"] == part]
        for part in dict.fromkeys(r["part"] for r in transformer)
    }
    timed = [row for row in transformer if "times" in row]
    made = [blocks and _blocks(blocks)]
    made += attention and [_attention(attention), _attention_errors(attention)]
    made += [optimizer and _optimizer(optimizer)]
    made += [timed and _networks(timed), "breakdown" in parts and _breakdown(parts["breakdown"])]
    for summary in parts.get("accuracy of single parameters", []):
        made.append(_accuracy([row for row in parts["accuracy"] if row["batch"] == summary["batch"]], summary))
    made += [_steps(row) for row in parts.get("steps", [])]
    made += ["fp8" in parts and _fp8(parts["fp8"])]
    return [grid for grid in made if grid]


def _blocks(rows: list[dict[str, Any]]) -> Grid:
    """A row for each of ours; the time that TB/s and the peers' times are for is that of the GPU alone, where there is
    one."""
    cells = []
    for row in (row for row in rows if not row["peer"]):
        gpu = f"gpu_{row['pass']}"
        way = gpu if gpu in row["times"] else row["pass"]
        peers = {
            each["implementation"]: each
            for each in rows
            if each["peer"] and all(each[key] == row[key] for key in ("operation", "size", "pass"))
        }
        saved = [row["saved_bytes"], peers.get("eager", {}).get("saved_bytes")]
        cells.append(
            [
                row["operation"],
                row["size"],
                row["pass"],
                f"{row['bytes'] / 1e6:.1f}",
                f"{max(row['errors'].values()):.1e}",
                time_us(row["times"].get(row["pass"])),
                time_us(row["times"].get(gpu)),
                f"{row['tb_s'][way]:.3f} ({row['share_of_copy'][way]:.0%})",
                *(times(row["ratios"].get(peer, {}).get(way)) for peer in ("eager", "compile")),
                *("" if each is None or row["pass"] == "backward" else f"{each / 1e6:.1f}" for each in saved),
            ]
        )
    numbers = (
        "MB",
        "error",
        "us",
        "gpu us",
        "TB/s (of copy)",
        "eager takes",
        "compile takes",
        "saved MB",
        "eager saves",
    )
    return Grid("Memory-bound operations of a block", ("operation", "size", "pass"), numbers, cells)


def _attention(rows: list[dict[str, Any]]) -> Grid:
    backends = tuple(dict.fromkeys(row["implementation"] for row in rows))
    cells = []
    for size, way in _sizes_and_ways(rows):
        rates = {row["implementation"]: row["tflop_s"].get(way) for row in rows if row["size"] == size}
        auto = rates.get("auto")
        fixed = [rate for backend, rate in rates.items() if rate and backend != "auto"]
        cells.append(
            [
                size,
                way.removeprefix("gpu_"),
                *(number(rates.get(backend), ".0f") for backend in backends),
                times(_quotient(rates.get("triton"), rates.get("cudnn"))),
                times(_quotient(auto, rates.get("sdpa"))),
                times(_quotient(auto, max(fixed, default=None))),
            ]
        )
    numbers = (*backends, "triton to cudnn", "auto to sdpa", "auto to the best")
    return Grid("Attention, TFLOP/s", ("B x S x H x D", "pass"), numbers, cells)


def _attention_errors(rows: list[dict[str, Any]]) -> Grid:
    backends = tuple(dict.fromkeys(row["implementation"] for row in rows))
    cells = []
    for size in dict.fromkeys(row["size"] for row in rows):
        by_backend = {row["implementation"]: row for row in rows if row["size"] == size}
        plain = next(iter(by_backend.values()))["errors_plain"]
        for name in plain:
            errors = [by_backend[each]["errors"][name] if each in by_backend else None for each in backends]
            cells.append([size, name, *(number(error, ".2e") for error in (*errors, plain[name]))])
    title = "Attention, relative error against float32 (one sample, two heads)"
    return Grid(title, ("B x S x H x D", "of"), (*backends, "plain PyTorch"), cells)


def _optimizer(rows: list[dict[str, Any]]) -> Grid:
    cells = []
    for row in rows:
        way = "gpu_step" if "gpu_step" in row["times"] else "step"
        cells.append(
            [
                row["size"],
                row["implementation"],
                f"{row['bytes_a_parameter']:.2f}",
                *(f"{row['errors'][name]:.1e}" for name in ("change", "exp_avg", "exp_avg_sq")),
                time_us(row["times"].get("step")),
                time_us(row["times"].get("gpu_step")),
                f"{row['tb_s'][way]:.3f} ({row['share_of_copy'][way]:.0%})",
                *(times(row["ratios"].get(peer, {}).get(way)) for peer in ("eager", "compile")),
            ]
        )
    numbers = ("bytes a parameter", "error of change", "of exp_avg", "of exp_avg_sq", "us", "gpu us", "TB/s (of copy)")
    title = "AdamW's step on a flat shard (eager: torch's fused AdamW)"
    return Grid(title, ("parameters", "implementation"), (*numbers, "eager takes", "compile takes"), cells)


def _sizes_and_ways(rows: list[dict[str, Any]]) -> Iterable[tuple[str, str]]:
    return dict.fromkeys((row["size"], way) for row in rows for way in row["times"])


def _networks(rows: list[dict[str, Any]]) -> Grid:
    cells = []
    for row in rows:
        whole, *parts = row["times"].values()
        way = next(iter(row["times"]))
        cells.append(
            [
                row["size"],
                row["implementation"],
                f"{whole['median_us'] / 1e3:.1f} ± {whole['spread_us'] / 1e3:.1f}",
                " + ".join(f"{part['median_us'] / 1e3:.1f}" for part in parts),
                *(times(row["ratios"].get(peer, {}).get(way)) for peer in ("eager", "compiled")),
                *(number(row.get(key), ".1f", GB) for key in ("peak_bytes", "kept_bytes", "weights_bytes")),
                f"{row['difference']:.1e}",
            ]
        )
    numbers = ("ms", "forward + backward", "eager takes", "compiled takes")
    numbers += ("peak GB", "kept GB", "FP8 weights GB", "differs by")
    return Grid("Whole transformers", ("network, pass, batch", "variant"), numbers, cells)


def _breakdown(rows: list[dict[str, Any]]) -> Grid:
    kinds = tuple(rows[0]["milliseconds"])
    cells = [
        [
            row["size"],
            row["implementation"],
            *(f"{row['milliseconds'][kind]:.1f}" for kind in kinds),
            f"{row['wall_ms']:.1f}",
            str(row["num_kernels"]),
        ]
        for row in rows
    ]
    return Grid("GPU time by kind, ms", ("network, pass, batch", "variant"), (*kinds, "all", "kernels"), cells)


def _accuracy(rows: list[dict[str, Any]], single: dict[str, Any]) -> Grid:
    """Output, all gradients together, and the groups of parameters that the fused blocks do worst on."""
    first, groups = rows[:2], sorted(rows[2:], key=lambda row: -row["ratio"])
    cells = [
        [row["group"], *(f"{error:.2e}" for error in row["errors"].values()), times(row["ratio"])]
        for row in (*first, *groups[:GROUPS_SHOWN])
    ]
    title = (
        f"Relative error in bfloat16 against float32. Of {single['parameters']} parameters the median of fused to eager "
        f"is {single['median_ratio']:.2f}x, the worst {single['worst_ratio']:.2f}x ({single['worst_parameter']}); "
        f"{len(single['above_limit'])} are above {single['limit']}x"
    )
    return Grid(title, ("of",), (*rows[0]["errors"], "fused to eager"), cells)


def _steps(row: dict[str, Any]) -> Grid:
    losses = row["losses"]
    shown = [step for step in STEPS_SHOWN if step <= len(losses["float32"])]
    cells = [
        [name, *(f"{by_step[step - 1]:.5f}" for step in shown), number(row["deviation"].get(name), ".1e")]
        for name, by_step in losses.items()
    ]
    numbers = (*(f"step {step}" for step in shown), "deviation from float32")
    return Grid(f"Losses of AdamW, learning rate {row['learning_rate']:g}", ("variant",), numbers, cells)


def _fp8(rows: list[dict[str, Any]]) -> Grid:
    variants = tuple(rows[0]["velocity_errors"])
    cells = [
        [f"{row['difference']:.1%}", *(f"{row[which][variant]:.1%}" for which in ERRORS for variant in variants)]
        for row in rows
    ]
    numbers = tuple(f"{which}, {variant}" for which in ERRORS.values() for variant in variants)
    title = "Relative error of the velocity, and of the difference of a critic's and a teacher's"
    return Grid(title, ("critic and teacher differ by",), numbers, cells)


ERRORS = {"velocity_errors": "velocity", "difference_errors": "difference"}


def line(row: dict[str, Any]) -> str:
    """What one row says, for a log."""
    parts = [row.get("operation", ""), row.get("size", row.get("part", "")), row.get("implementation", "")]
    parts += [f"{way} {time_us(taken)} us" for way, taken in row.get("times", {}).items()]
    parts += [f"{way} {share:.0%} of copy" for way, share in row.get("share_of_copy", {}).items()]
    parts += [f"{way} {rate:.0f} TFLOP/s" for way, rate in row.get("tflop_s", {}).items()]
    facts = ("group", "milliseconds", "errors", "ratio", "median_ratio", "worst_ratio", "worst_parameter", "deviation")
    facts += ("difference", "velocity_errors", "difference_errors", "peak_bytes")
    parts += [f"{key} {_short(row[key])}" for key in facts if key in row]
    return ", ".join(part for part in parts if part)


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key} {_short(each)}" for key, each in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def time_us(time: dict[str, Any] | None) -> str:
    if time is None:
        return ""
    digits = 0 if time["median_us"] >= 1000 else 1
    return f"{time['median_us']:.{digits}f} ± {time['spread_us']:.{digits}f}"


def times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def number(value: float | None, form: str, unit: float = 1.0) -> str:
    return "" if value is None else f"{value / unit:{form}}"


def _quotient(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None
