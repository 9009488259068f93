"""Accuracy and variety of the demo over updates, several seeds each: dpdmd beside dmd, or smaller optimizer state beside float32.

    python benchmarks/demo_curves.py train                                    trains, writes benchmarks/results/demo_curves.json
    python benchmarks/demo_curves.py draw benchmarks/results/demo_curves.json   draws it to docs/demo-curves.png
    python benchmarks/demo_curves.py train --compare moments --output FILE    trains with other optimizer states

A single checkpoint says little, because DMD hops between modes. Every run is therefore measured every `--every` student
updates, and the summary is the mean over the last `--last` measurements of each run.
"""

from __future__ import annotations

from dpdmd import command  # isort: skip  first: the others take seconds, in which a user may interrupt

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pydantic

from dpdmd.backbones.files import read_json
from dpdmd.files import write_json

# Of each --compare: the settings of its variants.
VARIANTS = {
    "methods": {method: (f"distill.method={method}",) for method in ("dpdmd", "dmd")},
    "moments": {
        state: (f"student_optimizer.state={state}", f"critic_optimizer.state={state}")
        for state in ("float32", "bfloat16", "float8")
    },
}
METRICS = ("accuracy", "validity", "background_entropy", "position_spread")


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Train every (variant, seed) that is not finished under args.runs, args.parallel at a time; return all numbers."""
    from dpdmd.config import load_config
    from dpdmd.run.provenance import provenance

    config = load_config()
    iterations = args.updates * (config.distill.critic_updates + 1)
    variants = VARIANTS[args.compare]
    waiting = [(variant, seed) for seed in range(args.seeds) for variant in variants]
    folders = {key: args.runs / f"{key[0]}-{key[1]}" for key in waiting}
    running: list[tuple[tuple[str, int], subprocess.Popen, Any]] = []
    waiting = [key for key in waiting if not (folders[key] / "finished.json").exists()]
    args.runs.mkdir(parents=True, exist_ok=True)
    while waiting or running:
        while waiting and len(running) < args.parallel:
            key = waiting.pop(0)
            log = (args.runs / f"{folders[key].name}.log").open("w")
            started = [sys.executable, "-m", "dpdmd.train", "--overwrite", *variants[key[0]], f"run.seed={key[1]}"]
            started += [f"run.output_dir={folders[key]}", f"run.iterations={iterations}"]
            started += [
                f"evaluation.every={args.every}",
                "run.sample_every=0",
                "run.checkpoint_every=0",
                *args.settings,
            ]
            # Each run has one process, even if a launcher started this script.
            environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
            running.append((key, subprocess.Popen(started, stdout=log, stderr=subprocess.STDOUT, env=environment), log))
        key, process, log = running.pop(0)
        if process.wait() != 0:
            raise command.RunStopped(f"{key[0]}, seed {key[1]} failed; see {log.name}")
        log.close()
        print(f"{key[0]}, seed {key[1]}: done", flush=True)
    arguments = f"--compare {args.compare} --seeds {args.seeds} --updates {args.updates} --every {args.every} --last {args.last}"
    typed = " ".join(["python benchmarks/demo_curves.py train", arguments, *args.settings])
    return {**provenance(typed), "last": args.last, "runs": [_read(folder, key) for key, folder in folders.items()]}


def _read(folder: Path, key: tuple[str, int]) -> dict[str, Any]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    finished = json.loads((folder / "finished.json").read_text(encoding="utf-8"))
    measured = [line for line in lines if line["kind"] == "evaluation"]
    students = {
        line["iteration"]: number for number, line in enumerate((x for x in lines if x["kind"] == "student"), 1)
    }
    return {
        "variant": key[0],
        "seed": key[1],
        "updates": [students[line["iteration"]] for line in measured],
        **{
            metric: [None if line[metric] is None else round(line[metric], 4) for line in measured]
            for metric in METRICS
        },
        "skipped": finished["skipped"],
        "seconds": {name: value for name, value in finished.items() if name.endswith("seconds")},
        "table": finished["evaluation"],
    }


def _numbers(values: Iterable[float | None]) -> list[float]:
    """Replace JSON's null by NaN; it stands for an entropy when no prompt leaves the attribute free."""
    return [math.nan if value is None else value for value in values]


def _mean(values: Iterable[float | None]) -> float:
    return float(np.mean(_numbers(values)))


def summarise(results: dict[str, Any]) -> dict[str, dict[str, tuple[float, float]]]:
    """{variant: {metric: (mean, standard deviation)}} over seeds of a run's mean over its last measurements."""
    summary = {}
    for variant in dict.fromkeys(run["variant"] for run in results["runs"]):
        runs = [run for run in results["runs"] if run["variant"] == variant]
        summary[variant] = {}
        for metric in METRICS:
            means = [_mean(run[metric][-results["last"] :]) for run in runs]
            summary[variant][metric] = (_mean(means), float(np.std(means, ddof=1)) if len(means) > 1 else 0.0)
    return summary


def teacher(results: dict[str, Any]) -> dict[str, float]:
    """Metrics of the guided teacher with all its steps (the first row of a run's table), mean over the runs."""
    rows = [next(iter(run["table"].values())) for run in results["runs"]]
    return {metric: _mean([row[metric] for row in rows]) for metric in METRICS}


def draw(results: dict[str, Any], output: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = {"accuracy": "accuracy, all named attributes", "background_entropy": "background entropy"}
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    reference = teacher(results)
    for axis, (metric, title) in zip(axes, shown.items(), strict=True):
        axis.axhline(reference[metric], color="black", linestyle="--", linewidth=1, label="teacher, 30 guided steps")
        for variant, color in zip(summarise(results), ("tab:blue", "tab:orange", "tab:green"), strict=False):
            runs = [run for run in results["runs"] if run["variant"] == variant]
            for run in runs:
                axis.plot(run["updates"], _numbers(run[metric]), color=color, alpha=0.25, linewidth=1)
            means = [_mean(values) for values in zip(*(run[metric] for run in runs), strict=True)]
            axis.plot(runs[0]["updates"], means, color=color, linewidth=2, label=f"{variant}, {len(runs)} seeds")
        axis.set(xlabel="student updates", title=title)
        axis.grid(alpha=0.3)
    axes[0].legend(loc="lower right")
    figure.savefig(output, dpi=110)
    pyplot.close(figure)


def print_summary(results: dict[str, Any]) -> None:
    reference = teacher(results)
    print(
        f"mean over the last {results['last']} measurements of each run, and the spread (standard deviation) of the seeds"
    )
    print(f"{'':12}" + "".join(f"{metric:>24}" for metric in METRICS))
    print(f"{'teacher':12}" + "".join(f"{reference[metric]:>24.3f}" for metric in METRICS))
    for variant, metrics in summarise(results).items():
        print(f"{variant:12}" + "".join(f"{mean:>16.3f} ± {spread:.3f}" for mean, spread in metrics.values()))


_Metric = Annotated[float, pydantic.Field(ge=-1e6, le=1e6)] | None
_Metrics = Annotated[list[_Metric], pydantic.Field(min_length=1)]


class _Row(pydantic.BaseModel):
    accuracy: _Metric
    validity: _Metric
    background_entropy: _Metric
    position_spread: _Metric


class _Run(pydantic.BaseModel):
    """What `draw` reads of a run: METRICS of each measurement and of the table's rows."""

    variant: str = pydantic.Field(pattern=r"^[\w .-]{1,40}$")
    updates: list[Annotated[int, pydantic.Field(ge=0, lt=2**31)]]
    accuracy: _Metrics
    validity: _Metrics
    background_entropy: _Metrics
    position_spread: _Metrics
    table: dict[str, _Row] = pydantic.Field(min_length=1)


class _Results(pydantic.BaseModel):
    last: int = pydantic.Field(ge=1)
    runs: list[_Run] = pydantic.Field(min_length=1)

    @pydantic.model_validator(mode="after")
    def _fits(self) -> _Results:
        updates = {run.variant: run.updates for run in self.runs}
        for run in self.runs:
            if run.updates != updates[run.variant]:
                raise ValueError(f"the runs of {run.variant} were measured after different numbers of updates")
            if any(len(getattr(run, metric)) != len(run.updates) for metric in METRICS):
                raise ValueError(f"a run of {run.variant} needs one number of each metric for each of its updates")
        return self


def _read_results(file: Path) -> dict[str, Any]:
    results = read_json(file, "demo_curves.py draw")
    try:
        _Results.model_validate(results)
    except pydantic.ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(map(str, problem["loc"]))
        found = f"{where}: {problem['msg'].lower()}" if where else problem["msg"].lower()
        raise command.ConfigError(f"{file}: a file that `demo_curves.py train` wrote is needed ({found})") from error
    return results


def _check_format(output: Path) -> None:
    from matplotlib.backend_bases import FigureCanvasBase

    formats = FigureCanvasBase.filetypes
    if output.suffix.lstrip(".").lower() not in formats:
        raise command.ConfigError(
            f"--output {output}: a file name that ends in one of .{', .'.join(sorted(formats))} is needed"
        )


def main(argv: list[str] | None = None) -> int:
    return command.run(_main, argv)


def _main(argv: list[str] | None) -> None:
    from dpdmd.config import load_config

    parser = argparse.ArgumentParser(prog="python benchmarks/demo_curves.py", description=str(__doc__).split("\n")[0])
    commands = parser.add_subparsers(dest="what", required=True)
    training = commands.add_parser("train", help="train every variant and seed, write their numbers")
    training.add_argument("--compare", choices=VARIANTS, default="methods", help="the methods, or optimizer.state")
    training.add_argument("--output", type=command.new_file, default="benchmarks/results/demo_curves.json")
    training.add_argument(
        "--runs", type=command.new_folder, default=f"{tempfile.gettempdir()}/dpdmd-curves", help="folder of the runs"
    )
    count = command.count
    training.add_argument("--seeds", type=count, default=3)
    training.add_argument("--updates", type=count, default=100, help="student updates of each run")
    training.add_argument("--every", type=count, default=10, help="student updates between measurements")
    training.add_argument("--last", type=count, default=5, help="measurements that the summary averages")
    training.add_argument(
        "--parallel", type=count, default=6, help="runs at a time; they are small and share a GPU well"
    )
    training.add_argument("settings", nargs="*", metavar="section.key=value", help="further settings of every run")
    drawing = commands.add_parser("draw", help="draw the numbers")
    drawing.add_argument("results", type=command.path)
    drawing.add_argument("--output", type=command.new_file, default="docs/demo-curves.png")
    args = parser.parse_args(argv)
    if args.what == "train":
        load_config(None, args.settings)  # refuses a wrong setting before the first run
        results = train(args)
        write_json(args.output, results)
    else:
        results = _read_results(args.results)
        _check_format(args.output)
        draw(results, args.output)
    print(args.output)
    print_summary(results)


if __name__ == "__main__":
    sys.exit(main())
