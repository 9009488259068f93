"""Check the fused operations, then time them beside plain PyTorch and torch.compile.

    python benchmarks/run.py                                      every operation: about ten minutes on a GPU
    python benchmarks/run.py --op losses --json benchmarks/results/kernels.json       at most three minutes
    python benchmarks/run.py --op blocks attention                a transformer's operations: about seven minutes
    python benchmarks/run.py --op adamw_step                      the optimizer's step
    python benchmarks/run.py --op dmd_loss --size video --json mine.json
    python benchmarks/run.py --op transformer --part forward      a whole transformer: minutes for each part
    python benchmarks/run.py --baseline benchmarks/results/kernels.json
    python benchmarks/run.py --plot                               docs/roofline.png, from benchmarks/results/kernels.json
    python benchmarks/run.py --op transformer --plot              docs/transformer.png, from .../results/transformer.json
    python benchmarks/run.py --op cycle --help                    whole distillation cycles, beside their peers
    python benchmarks/run.py --markdown benchmarks/results/transformer.json

Every implementation is compared with float64 (attention with float32, whole transformers with the stock module) before any
is timed. If one fails, that operation is not timed at that size, and the exit status is 1. The file of --json is written
after every row, so that an interrupted run keeps its results. DPDMD_KERNELS=triton (cuda, reference) selects one of our
implementations. Without a GPU the references run on small sizes.
"""

from __future__ import annotations

from dpdmd import command  # isort: skip  first: the others take seconds, in which a user may interrupt

import argparse
import functools
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cases
import torch
from cases import blocks, losses, networks, transformer
from harness import accuracy, plots, report, timing
from harness.operation import DTYPE, Run, measure

from dpdmd.kernels.runtime import backend
from dpdmd.run.provenance import provenance

ROOT = Path(__file__).parents[1]
STORED = ROOT / "benchmarks" / "results" / "kernels.json"
PICTURE = ROOT / "docs" / "roofline.png"
STORED_TRANSFORMER = ROOT / "benchmarks" / "results" / "transformer.json"
PICTURE_TRANSFORMER = ROOT / "docs" / "transformer.png"
PEERS = ("eager", "compile", "none")


def groups() -> dict[str, list[str]]:
    """Names of --op that stand for several operations. The sampler's steps are among the losses."""
    tables = {"losses": losses.Elementwise.table, "blocks": blocks.BlockOperation.table}
    operations = cases.OPERATIONS.items()
    return {name: [op for op, each in operations if each.table == table] for name, table in tables.items()}


def choices() -> list[str]:
    grouped = [name for names in groups().values() for name in names]
    return [*grouped, *groups(), *(name for name in cases.OPERATIONS if name not in grouped), "transformer"]


def known_sizes() -> list[str]:
    sizes = [size for each in cases.OPERATIONS.values() for size in each.sizes]
    return list(dict.fromkeys([*sizes, *networks.NETWORKS]))


def our_implementations(device: torch.device) -> tuple[tuple[str, ...], list[str]]:
    """Our implementations that DPDMD_KERNELS allows and that run here, and the reasons of those that do not run. Raises
    UsageError if DPDMD_KERNELS names one that does not run here."""
    try:
        asked = backend.requested()
    except ValueError as error:
        raise report.UsageError(error) from None
    if asked == "reference" or (asked == "auto" and device.type == "cpu"):
        return ("reference",), []
    candidates = backend.FASTEST_FIRST if asked == "auto" else (asked,)
    reasons = {name: backend.why_not(name, device.type, device.index) for name in candidates}
    found = tuple(name for name in candidates if not reasons[name])
    if asked != "auto" and not found:
        raise report.UsageError(f"{backend.ENVIRONMENT_VARIABLE}={asked} does not run here: {reasons[asked]}")
    return found or ("reference",), [f"{name}: {reason}" for name, reason in reasons.items() if reason]


Step = tuple[str, Callable[[], None]]  # its name in the log, and the function


def plan(run: Run, args: argparse.Namespace) -> list[Step]:
    """The steps that the options ask for. Raises UsageError for a size that an operation does not have."""
    cpu = run.device.type == "cpu"
    named = [each for name in args.op or () for each in groups().get(name, (name,))]
    names = list(dict.fromkeys(named)) or list(cases.OPERATIONS)
    steps: list[Step] = []

    def sizes_of(name: str, known: list[str], default: list[str]) -> list[str]:
        sizes = [size for size in args.size or default if size in known]
        if not sizes and named:
            raise report.UsageError(f"--size {' '.join(args.size)}: {name} has {', '.join(known)}")
        return sizes

    for name in names:
        if name == "transformer":
            (size,) = sizes_of(name, list(networks.NETWORKS), ["small" if cpu else "full"])[:1]
            state = transformer.State(run, size, args.batch, args.variant)
            steps += [(f"{name} {part}", functools.partial(transformer.run_part, state, part)) for part in args.part]
        else:
            operation = cases.OPERATIONS[name]
            steps += [
                (operation.title(size), functools.partial(measure, run, operation, size))
                for size in sizes_of(name, list(operation.sizes), operation.default_sizes(cpu))
            ]
    if "dmd_loss" in names:
        steps.append(("cancellation", lambda: run.cancellation.extend(losses.cancellation(run.device))))
    if set(names) & set(groups()["losses"]):
        steps.append(("the engine's floor", lambda: run.engine_floor.update(timing.engine_floor(run.device))))
    return steps


def measure_all(args: argparse.Namespace) -> int:
    begin = time.perf_counter()
    console = report.make_console()
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    source = provenance(shlex.join(["python", "benchmarks/run.py", *args.argv]))
    baseline = None
    if args.baseline:  # an unusable file is refused before measuring
        baseline = report.read_run(args.baseline)
        report.refuse_other_machine(baseline, source["machine"]["gpu"], args.baseline)
    ours, missing = our_implementations(device)

    def collect() -> dict[str, Any]:
        found = {
            **source,
            "device": device.type,
            "dtype": str(DTYPE).removeprefix("torch."),
            "copy_tb_s": run.copy_tb_s,
            "cache_bytes": timing.cache_bytes(device),
            "engine_floor": run.engine_floor,
            "limits": {"result": accuracy.RESULT_LIMIT, "loss": accuracy.LOSS_LIMIT},
            **run.tables,
            "cancellation": run.cancellation,
            "failures": run.failures,
            "left_out": run.left_out,
            "seconds": time.perf_counter() - begin,
        }
        if args.json:
            report.write_run(args.json, found)
        return found

    def note(row: dict[str, Any]) -> None:
        if row.get("group") in (None, "output", "all gradients"):  # the accuracy part has fifty more groups
            print(f"  {report.line(row)}", file=sys.stderr, flush=True)
        collect()

    run = Run(device, ours, args.peers, left_out=missing, note=note)
    steps = plan(run, args)
    run.copy_tb_s = timing.copy_bandwidth(device)
    if device.type == "cpu":
        console.print(report.CPU_NOTE)
    for name, step in steps:
        print(f"{time.perf_counter() - begin:6.1f} s  {name}", file=sys.stderr, flush=True)
        step()
        collect()
    tell(console, collect(), baseline, args.baseline)
    return 1 if run.failures else 0


def tell(console, result: dict[str, Any], baseline: dict[str, Any] | None, path: Path | None) -> None:
    report.print_tables(console, result)
    machine = result["machine"]["gpu"] or "CPU"
    console.print(f"{machine}: a large copy moves {result['copy_tb_s']:.3f} TB/s. {result['seconds']:.0f} s in all.")
    floor = {way: taken["median_us"] for way, taken in result["engine_floor"].items()}
    if floor:
        console.print(
            f"Forward and backward of an empty autograd function: {floor['forward_backward']:.0f} us, "
            f"{floor['forward_backward_one_thread']:.0f} us in one thread. No loss can be faster."
        )
    noise = report.noise(report.timed_rows(result))
    if noise is not None:
        console.print(f"Two rounds of one measurement differ by {noise:.1%} (median).")
    for each in result["left_out"]:
        console.print(f"left out: {each}", markup=False)
    if baseline is not None:
        report.print_comparison(console, result, baseline, path)
    if result["device"] == "cpu":
        console.print(report.CPU_NOTE)
    for each in result["failures"]:
        console.print(f"FAILED, and not timed: {each}", markup=False, style="bold red")


def plot(files: list[Path], output: Path | None, of_transformer: bool) -> int:
    """Draw a roofline of the operations, or a transformer's time by kind of kernel."""
    stored, picture = (STORED_TRANSFORMER, PICTURE_TRANSFORMER) if of_transformer else (STORED, PICTURE)
    files, output = files or [stored], output or picture
    results = [report.read_run(path) for path in files]
    for path, result in zip(files, results, strict=True):
        if not result["machine"]["gpu"]:
            raise report.UsageError(f"{path} was measured on a CPU; --plot draws runs on a GPU")
    if of_transformer and not plots.broken_down(results):
        names = " ".join(map(str, files))
        raise report.UsageError(f"{names}: no breakdown to draw; run.py --op transformer --part breakdown measures one")
    try:
        (plots.breakdown if of_transformer else plots.roofline)(results, output)
    except ImportError as error:
        raise report.UsageError(f"--plot needs matplotlib (pip install -e '.[eval]'): {error}") from None
    print(f"{output}: drawn")
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/run.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def add(option: str, description: str, metavar: str = "FILE", **settings: Any) -> None:
        parser.add_argument(option, help=description, metavar=metavar, **settings)

    def add_names(option: str, known: Sequence[str], rest: str = "") -> None:
        add(option, f"one or more of {', '.join(known)}{rest}", "NAME", nargs="+", choices=known)

    add_names("--op", choices())
    add_names("--size", known_sizes(), "; an operation takes those that it has (default without a GPU: the small ones)")
    add_names("--part", (*transformer.PARTS, "all"), " (with --op transformer)")
    default = ", ".join(f"{part} {' '.join(map(str, sizes))}" for part, sizes in transformer.BATCHES.items())
    batches = f"batch sizes (with --op transformer; default: {default})"
    add("--batch", batches, "N", nargs="+", type=command.count)
    add_names("--variant", networks.VARIANTS, " (with --op transformer; default without a GPU: all but compiled)")
    loss, block = losses.Elementwise, blocks.BlockOperation
    limits = f"losses at {', '.join(loss.compiled_sizes)} until {loss.compile_seconds:.0f} s have gone into compiling, "
    limits += f"blocks until {block.compile_seconds:.0f} s"
    add_names("--peers", PEERS, f" (default: eager; on a GPU also compile: {limits})")
    add("--json", "write all numbers, with machine, versions and commit", type=command.new_file)
    slower = (
        "print what got slower than in this file of --json from the same GPU, by more than the larger spread of both"
    )
    add("--baseline", f"{slower}; the exit status does not change", type=command.path)
    add("--plot", "measure nothing; draw files that --json wrote", nargs="*", type=command.path)
    picture = "the picture of --plot (default: docs/roofline.png or docs/transformer.png)"
    add("--output", picture, "PNG", type=command.new_file)
    add("--markdown", "measure nothing; print the tables of files that --json wrote", nargs="+", type=command.path)
    args = parser.parse_args(argv)
    if args.peers and "none" in args.peers and len(args.peers) > 1:
        parser.error(f"--peers got {' '.join(args.peers)}: none cannot be combined with others")
    of_transformer = [name for name in ("part", "batch", "variant") if getattr(args, name)]
    if of_transformer and "transformer" not in (args.op or ()):
        parser.error(f"--{of_transformer[0]} needs --op transformer")
    args.part = [part for part in transformer.PARTS if not args.part or part in args.part or "all" in args.part]
    args.argv = argv
    return args


def main(argv: list[str] | None = None) -> int:
    return command.run(_main, sys.argv[1:] if argv is None else argv)


def _main(argv: list[str]) -> int:
    if argv[:2] == ["--op", "cycle"]:  # with other options, and the trainer's imports
        from cases import cycle

        return cycle.compare_main(argv[2:])
    args = parse(argv)
    if args.markdown:
        print("\n\n".join(report.markdown(report.read_run(path)) for path in args.markdown))
        return 0
    if args.plot is not None:
        return plot(args.plot, args.output, "transformer" in (args.op or ()))
    return measure_all(args)


if __name__ == "__main__":
    sys.exit(main())
