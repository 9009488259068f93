"""The tables of a run, for the terminal and as Markdown for docs/; its file; and the comparison with a stored run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dpdmd.command import ConfigError
from harness.operation import TABLES

GB = 1e9
STEPS_SHOWN = (1, 2, 5, 10, 15, 20)
GROUPS_SHOWN = 8
CPU_NOTE = "No GPU here: these are CPU figures. They say nothing about a GPU."
WAYS = {  # headings of the ways of calling
    "forward": "forward us",
    "forward_backward": "fwd + bwd us",
    "forward_backward_one_thread": "one thread us",
    "gpu_forward": "gpu us forward",
    "gpu_forward_backward": "gpu us fwd + bwd",
    "backward": "backward us",
    "gpu_backward": "gpu us backward",
    "step": "step us",
    "gpu_step": "gpu us step",
    "training": "training us",
    "training_forward": "training, forward us",
    "training_backward": "training, backward us",
}
EXPLANATION = """\
us: microseconds a call from Python, median ± interquartile range; "one thread": without autograd's device thread
(torch.autograd.set_multithreading_enabled(False)); "gpu us": in a replayed CUDA graph of the same calls. TB/s: the title's
bytes over the time of fwd + bwd of a loss, of forward otherwise; "of copy": the share of this machine's copy bandwidth.
"takes": the peer's time over this row's, called from Python. error: relative to float64 on the same inputs."""
TRANSFORMER_EXPLANATION = """\
TB/s and peers' times of a block's operations are the GPU's alone, if there is one. saved: bytes that autograd keeps for the
backward pass beside the inputs. peak, kept: memory beside parameters and inputs, at its highest and between forward and
backward. differs by: relative difference of output and gradients from the stock module's in bfloat16."""
CANCELLATION = {
    "ours_x_float32": "ours, x float32",
    "ours_x_bfloat16": "ours, x bfloat16",
    "x0_float32": "x0 form, float32",
    "x0_bfloat16": "x0 form, bfloat16",
    "x0_bfloat16_pseudo_target": "... and bfloat16 target",
}


class UsageError(ConfigError):
    """Options that cannot be followed; the message says why, and what to write instead."""


def make_console() -> Console:
    """A console of the tables' width if the output is no terminal: lines of a log should not wrap at 80."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=200)


def headline(row: dict[str, Any]) -> str:
    """The way of calling of the table's ratios and TB/s of a loss or sampler step."""
    return "forward_backward" if "forward_backward" in row["times"] else "forward"


def print_tables(console: Console, result: dict[str, Any]) -> None:
    for operation in dict.fromkeys(row["operation"] for row in result["rows"]):
        console.print(_operation(operation, [row for row in result["rows"] if row["operation"] == operation]).rich())
    if result["cancellation"]:
        console.print(_cancellation(result["cancellation"]).rich())
    if result["rows"]:
        console.print(EXPLANATION)
    found = grids(result)
    for grid in found:
        console.print(grid.rich())
    if found:
        console.print(TRANSFORMER_EXPLANATION)


@dataclass(frozen=True)
class Grid:
    title: str
    text: tuple[str, ...]  # headings of the text columns, which come first
    numbers: tuple[str, ...]
    rows: list[list[str]]
    dim: tuple[int, ...] = ()  # indices of rows that are shown dim
    once: bool = False  # shows the first cell only where it changes

    def rich(self) -> Table:
        table = Table(title=self.title, title_justify="left", title_style="bold")
        for name in self.text:
            table.add_column(name, no_wrap=True)
        for name in self.numbers:
            table.add_column(name, justify="right")
        for index, (row, before) in enumerate(zip(self.rows, [None, *self.rows], strict=False)):
            if before and row[0] != before[0] and len(self.text) > 1:
                table.add_section()
            again = self.once and before is not None and row[0] == before[0]
            table.add_row("" if again else row[0], *row[1:], style="dim" if index in self.dim else None)
        return table

    def markdown(self) -> str:
        headings = [*self.text, *self.numbers]
        rule = [*["---"] * len(self.text), *["---:"] * len(self.numbers)]
        lines = [f"| {' | '.join(cells)} |" for cells in (headings, rule, *self.rows)]
        return "\n".join([f"**{self.title}**", "", *lines])


def grids(result: dict[str, Any]) -> list[Grid]:
    """The tables that the run has rows for."""
    blocks, attention = result.get("blocks") or [], result.get("attention") or []
    optimizer, transformer = result.get("optimizer") or [], result.get("transformer") or []
    parts: dict[str, list[dict[str, Any]]] = {}
    for row in transformer:
        parts.setdefault(row["part"], []).append(row)
    timed = [row for row in transformer if row.get("times")]
    made = [blocks and _blocks(blocks)]
    made += attention and [_attention(attention), _attention_errors(attention)]
    made += [optimizer and _optimizer(optimizer)]
    made += [timed and _networks(timed), "breakdown" in parts and _breakdown(parts["breakdown"])]
    for summary in parts.get("accuracy of single parameters", []):
        made.append(_accuracy([row for row in parts["accuracy"] if row["batch"] == summary["batch"]], summary))
    made += [_steps(row) for row in parts.get("steps", [])]
    made += ["fp8" in parts and _fp8(parts["fp8"])]
    return [grid for grid in made if grid]


def _operation(operation: str, rows: list[dict[str, Any]]) -> Grid:
    """A table for each loss and sampler step."""
    ways = [way for way in WAYS if any(way in row["times"] for row in rows)]
    peers = list(dict.fromkeys(row["implementation"] for row in rows if row["peer"]))
    named = headline(rows[0])
    bandwidths = {named: "TB/s (of copy)", f"gpu_{named}": "gpu TB/s (of copy)"}
    bandwidths = {way: title for way, title in bandwidths.items() if way in ways}
    errors = ["error", *(["loss error"] if "forward_backward" in ways else [])]
    numbers = ["MB", *errors, *(WAYS[way] for way in ways), *bandwidths.values(), *(f"{peer} takes" for peer in peers)]
    cells = []
    for row in rows:
        shown = [_error(row["error"]), number(row["error"]["loss"], ".1e")]
        cells.append(
            [
                row["size"],
                row["implementation"],
                f"{row['bytes'] / 1e6:.1f}",
                *shown[: len(errors)],
                *(time_us(row["times"].get(way)) for way in ways),
                *(bandwidth(row, way) for way in bandwidths),
                *(times(row["ratios"].get(peer, {}).get(named)) for peer in peers),
            ]
        )
    dim = tuple(index for index, row in enumerate(rows) if row["peer"])
    title = f"{operation}: {rows[0]['bytes_counted']}"
    return Grid(title, ("size", "implementation"), tuple(numbers), cells, dim, once=True)


def _error(error: dict[str, float | None]) -> str:
    moments = error["moments"]
    return number(error["result"], ".1e") if moments is None else f"(moments) {moments:.0e}"


def _cancellation(rows: list[dict[str, Any]]) -> Grid:
    cells = []
    for row in rows:
        errors = [f"{row[name]:.1e}" if row[name] < 1e-3 else f"{row[name]:.1%}" for name in CANCELLATION]
        cells.append([f"{row['difference']:.1%}", f"{row['t']}", *errors])
    title = (
        "dmd_loss: relative error of the gradient where teacher and critic nearly agree, on the same bfloat16 tensors"
    )
    return Grid(title, (), ("teacher and critic differ by", "t", *CANCELLATION.values()), cells)


def _blocks(rows: list[dict[str, Any]]) -> Grid:
    """A row for each of ours; TB/s and the peers' times are the GPU's alone, if there is one."""
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
                bandwidth(row, way),
                *(times(row["ratios"].get(peer, {}).get(way)) for peer in ("eager", "compile")),
                *("" if each is None or row["pass"] == "backward" else f"{each / 1e6:.1f}" for each in saved),
            ]
        )
    numbers = ("MB", "error", "us", "gpu us", "TB/s (of copy)")
    numbers += ("eager takes", "compile takes", "saved MB", "eager saves")
    return Grid("Memory-bound operations of a block", ("operation", "size", "pass"), numbers, cells)


def _attention(rows: list[dict[str, Any]]) -> Grid:
    backends = tuple(dict.fromkeys(row["implementation"] for row in rows))
    cells = []
    for size, way in dict.fromkeys((row["size"], way) for row in rows for way in row["times"]):
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
                bandwidth(row, way),
                *(times(row["ratios"].get(peer, {}).get(way)) for peer in ("eager", "compile")),
            ]
        )
    numbers = ("bytes a parameter", "error of change", "of exp_avg", "of exp_avg_sq", "us", "gpu us", "TB/s (of copy)")
    title = "AdamW's step on a flat shard (eager: torch's fused AdamW)"
    return Grid(title, ("parameters", "implementation"), (*numbers, "eager takes", "compile takes"), cells)


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
    """Output, all gradients together, and the groups of parameters with the largest ratio of fused's error to eager's."""
    first, groups = rows[:2], sorted(rows[2:], key=lambda row: -row["ratio"])
    cells = [
        [row["group"], *(f"{error:.2e}" for error in row["errors"].values()), times(row["ratio"])]
        for row in (*first, *groups[:GROUPS_SHOWN])
    ]
    title = (
        f"Relative error in bfloat16 against float32. Fused to eager over {single['parameters']} parameters: median "
        f"{single['median_ratio']:.2f}x, worst {single['worst_ratio']:.2f}x ({single['worst_parameter']}), "
        f"{len(single['above_limit'])} above {single['limit']}x"
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
    title = "Relative error of the velocity, and of the difference of a critic's velocity from a teacher's"
    return Grid(title, ("critic and teacher differ by",), numbers, cells)


ERRORS = {"velocity_errors": "velocity", "difference_errors": "difference"}


def line(row: dict[str, Any]) -> str:
    """One row, for a log."""
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


def bandwidth(row: dict[str, Any], way: str) -> str:
    return f"{row['tb_s'][way]:.3f} ({row['share_of_copy'][way]:.0%})" if way in row["tb_s"] else ""


def times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def number(value: float | None, form: str, unit: float = 1.0) -> str:
    return "" if value is None else f"{value / unit:{form}}"


def _quotient(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None


def timed_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The timed rows of all tables; older files lack some tables."""
    rows = [row for table in TABLES for row in result.get(table) or []]
    return [row for row in rows if "times" in row]


def noise(rows: list[dict[str, Any]]) -> float | None:
    """The relative difference of the first and last round of a measurement from Python: the median over all."""
    apart = sorted(
        abs(time["rounds_us"][0] - time["rounds_us"][-1]) / time["median_us"]
        for row in rows
        for way, time in row["times"].items()
        if not way.startswith("gpu")
    )
    return apart[len(apart) // 2] if apart else None


def markdown(result: dict[str, Any]) -> str:
    """The transformer's tables, for docs/."""
    source = f"{result['machine']['gpu'] or 'CPU'}, torch {result['packages']['torch']}, `{result['command']}`"
    return "\n\n".join([source, *(grid.markdown() for grid in grids(result))])


def write_run(path: Path, result: dict[str, Any]) -> None:
    """Write one line for each key and each row, so that two files can be compared by eye."""
    lines = []
    for key, value in _rounded(result).items():
        if isinstance(value, list):
            value = "[" + ",".join(f"\n  {json.dumps(each)}" for each in value) + "]"
        else:
            value = json.dumps(value)
        lines.append(f" {json.dumps(key)}: {value}")
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _rounded(value: Any) -> Any:
    """Round floats to five digits: no time is more exact."""
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def read_run(path: Path) -> dict[str, Any]:
    """Read a file that --json wrote."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path}: there is no such file; python benchmarks/run.py --json {path} writes one") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: {error}") from None
    if not isinstance(result, dict) or not {"rows", "machine"} <= set(result):
        raise UsageError(f"{path} is not a file that benchmarks/run.py --json wrote: it has no rows and machine")
    return result


def refuse_other_machine(baseline: dict[str, Any], gpu: str | None, path: Path) -> None:
    theirs = baseline["machine"]["gpu"]
    if theirs != gpu:
        machines = f"was measured on {theirs or 'a CPU'} and this machine has {gpu or 'no GPU'}"
        raise UsageError(f"{path} {machines}; compare times of one GPU only: measure a baseline here with --json FILE")


def _pairs(result: dict[str, Any], baseline: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """The name, stored time and new time of each measurement of both runs."""
    stored = {(*_key(row), way): time for row in timed_rows(baseline) for way, time in row["times"].items()}
    for row in timed_rows(result):
        for way, now in row["times"].items():
            before = stored.get((*_key(row), way))
            if before:
                yield f"{' '.join(_key(row))}, {WAYS[way].replace(' us', '')}", before, now


def _key(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["operation"], row["size"], row["implementation"]


def compared(result: dict[str, Any], baseline: dict[str, Any]) -> int:
    return sum(1 for _ in _pairs(result, baseline))


def slower(result: dict[str, Any], baseline: dict[str, Any]) -> list[str]:
    """A sentence for every time that exceeds the stored one by more than the larger spread of the two runs."""
    sentences = []
    for name, before, now in _pairs(result, baseline):
        lost, spread = now["median_us"] - before["median_us"], max(now["spread_us"], before["spread_us"])
        if lost > spread:
            sentences.append(
                f"{name}: {before['median_us']:.1f} to {now['median_us']:.1f} us "
                f"(+{lost / before['median_us']:.0%}; the spread is {spread:.1f} us)"
            )
    return sentences


def print_comparison(console: Console, result: dict[str, Any], baseline: dict[str, Any], path: Path) -> None:
    sentences = slower(result, baseline)
    console.print(
        f"\nAgainst {path} (commit {baseline.get('commit')}, {baseline.get('date')}): {len(sentences)} of "
        f"{compared(result, baseline)} times are slower by more than their spread.",
        markup=False,
    )
    if baseline.get("packages") != result["packages"]:
        console.print(f"The packages differ: {baseline.get('packages')}, now {result['packages']}", markup=False)
    for sentence in sentences:
        console.print(f"slower: {sentence}", markup=False, style="bold yellow")
