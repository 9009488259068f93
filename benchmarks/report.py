"""What a run says: a table for each loss and sampler step, the cancellation table, those of the transformer (grids.py),
and what got slower than a stored run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grids
from grids import time_us
from operations import OPERATIONS
from rich.console import Console
from rich.table import Table

from dpdmd.command import ConfigError

CPU_NOTE = "No GPU here: these are CPU figures. They say nothing of a GPU."
WAYS = {  # what the tables call them
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
us: microseconds a call, median ± interquartile range, called the ordinary way; "one thread": without handing the backward
pass to the engine's device thread (torch.autograd.set_multithreading_enabled(False)); "gpu us": in a replayed CUDA graph
of the same calls. TB/s: the title's bytes over fwd + bwd of a loss, over forward otherwise; "of copy": the share of this
machine's copy bandwidth. "takes": the peer's time over this row's, called the ordinary way. error: relative to float64
of the same inputs."""
TRANSFORMER_EXPLANATION = """\
Of a block's operations TB/s and the peers' times are those of the GPU alone, where there is one. saved: what autograd
keeps for the backward pass beside the inputs. peak, kept: memory beside parameters and inputs, at its highest and between
forward and backward. differs by: relative difference of output and gradients from the stock module's in bfloat16."""
CANCELLATION = {
    "ours_x_float32": "ours, x float32",
    "ours_x_bfloat16": "ours, x bfloat16",
    "x0_float32": "x0 form, float32",
    "x0_bfloat16": "x0 form, bfloat16",
    "x0_bfloat16_pseudo_target": "... and bfloat16 target",
}


class UsageError(ConfigError):
    """What the user asked for cannot be had; the message says why and what can."""


def make_console() -> Console:
    """As wide as the tables where the output is no terminal: a log's lines should not wrap at 80."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=200)


def headline(operation: str) -> str:
    """The way of calling that the ratios and TB/s in the table are for."""
    return "forward_backward" if OPERATIONS[operation].loss else "forward"


def print_tables(console: Console, result: dict[str, Any]) -> None:
    for operation in OPERATIONS:
        rows = [row for row in result["rows"] if row["operation"] == operation]
        if rows:
            console.print(_operation_table(operation, rows))
    if result["cancellation"]:
        console.print(_cancellation_table(result["cancellation"]))
    if result["rows"]:
        console.print(EXPLANATION)
    found = grids.grids(result)
    for grid in found:
        console.print(grid.rich())
    if found:
        console.print(TRANSFORMER_EXPLANATION)


def _operation_table(operation: str, rows: list[dict[str, Any]]) -> Table:
    ways = [way for way in WAYS if any(way in row["times"] for row in rows)]
    peers = list(dict.fromkeys(row["implementation"] for row in rows if row["peer"]))
    gpu = f"gpu_{headline(operation)}"
    bandwidths = {headline(operation): "TB/s (of copy)", gpu: "gpu TB/s (of copy)"}
    bandwidths = {way: title for way, title in bandwidths.items() if way in ways}
    errors = ["error", *(["loss error"] if OPERATIONS[operation].loss else [])]
    right = ["MB", *errors, *(WAYS[way] for way in ways), *bandwidths.values(), *(f"{peer} takes" for peer in peers)]
    table = Table(title=f"{operation}: {rows[0]['bytes_counted']}", title_justify="left", title_style="bold")
    for name in ("size", "implementation"):
        table.add_column(name, no_wrap=True)
    for name in right:
        table.add_column(name, justify="right")
    size = ""
    for row in rows:
        if row["size"] != size and size:
            table.add_section()
        first, size = ("" if row["size"] == size else row["size"]), row["size"]
        cells = [f"{row['bytes'] / 1e6:.1f}", _error(row["error"]), _scientific(row["error"]["loss"])][
            : 1 + len(errors)
        ]
        cells += [time_us(row["times"].get(way)) for way in ways]
        cells += [_bandwidth(row, way) for way in bandwidths]
        cells += [_ratio(row["ratios"].get(peer, {}).get(headline(operation))) for peer in peers]
        table.add_row(first, row["implementation"], *cells, style="dim" if row["peer"] else None)
    return table


def _error(error: dict[str, float | None]) -> str:
    return f"(moments) {error['moments']:.0e}" if error["moments"] is not None else _scientific(error["result"])


def _scientific(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _bandwidth(row: dict[str, Any], way: str) -> str:
    return f"{row['tb_s'][way]:.3f} ({row['share_of_copy'][way]:.0%})" if way in row["tb_s"] else ""


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def _cancellation_table(rows: list[dict[str, Any]]) -> Table:
    title = (
        "dmd_loss: relative error of the gradient where teacher and critic nearly agree, from the same bfloat16 tensors"
    )
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in ("teacher and critic differ by", "t", *CANCELLATION.values()):
        table.add_column(name, justify="right")
    for row in rows:
        errors = [f"{row[name]:.1e}" if row[name] < 1e-3 else f"{row[name]:.1%}" for name in CANCELLATION]
        table.add_row(f"{row['difference']:.1%}", f"{row['t']}", *errors)
    return table


def timed_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Of every kind of measurement; files from before there were blocks have but the first."""
    rows = [
        row for kind in ("rows", "blocks", "attention", "optimizer", "transformer") for row in result.get(kind) or []
    ]
    return [row for row in rows if "times" in row]


def noise(rows: list[dict[str, Any]]) -> float | None:
    """How far the two rounds of one measurement lie apart, the ordinary way: the median over all of them."""
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
    return "\n\n".join([source, *(grid.markdown() for grid in grids.grids(result))])


def write_run(path: Path, result: dict[str, Any]) -> None:
    """One line for each key and each row, so that two files can be compared by eye."""
    lines = []
    for key, value in _rounded(result).items():
        if isinstance(value, list):
            value = "[" + ",".join(f"\n  {json.dumps(each)}" for each in value) + "]"
        else:
            value = json.dumps(value)
        lines.append(f" {json.dumps(key)}: {value}")
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _rounded(value: Any) -> Any:
    """Floats to five digits: no time is known better."""
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def read_run(path: Path) -> dict[str, Any]:
    """A file that --json wrote."""
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
        raise UsageError(
            f"{path} was measured on {theirs or 'a CPU'} and this machine has {gpu or 'no GPU'}: times of different "
            f"machines do not compare. Measure a baseline here with --json"
        )


def _pairs(result: dict[str, Any], baseline: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """What was timed in both runs: its name, the time stored, the time now."""
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
    """A sentence for every time that exceeds the stored one by more than the spread, the larger of both runs'."""
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
        console.print(f"Its packages were others: {baseline.get('packages')}, now {result['packages']}", markup=False)
    for sentence in sentences:
        console.print(f"slower: {sentence}", markup=False, style="bold yellow")
