"""The fused operations beside plain PyTorch and torch.compile: right first, then how fast.

    python benchmarks/run.py                                      every operation: some ten minutes on a GPU
    python benchmarks/run.py --op losses --json benchmarks/results/kernels.json       at most three
    python benchmarks/run.py --op blocks attention                the operations of a transformer: some seven
    python benchmarks/run.py --op adamw_step                      the optimizer's step
    python benchmarks/run.py --op dmd_loss --size video --json mine.json
    python benchmarks/run.py --op transformer --part forward      a whole transformer, part by part: each some minutes
    python benchmarks/run.py --baseline benchmarks/results/kernels.json
    python benchmarks/run.py --plot                               docs/roofline.png, from benchmarks/results/kernels.json
    python benchmarks/run.py --op cycle --help                    whole distillation cycles, beside eager, torch.compile and
                                                                  DeepSpeed's ZeRO-3 (cycle.py)
    python benchmarks/run.py --op transformer --plot              docs/transformer.png, from .../results/transformer.json
    python benchmarks/run.py --markdown benchmarks/results/transformer.json

Every implementation is compared with float64 (attention with float32, whole transformers with the stock module) before
any is timed; where one fails, no time of that operation and size is shown, and the exit status is 1. The file of --json
is written after every operation, so that a run that is cut off has what it found. DPDMD_KERNELS=triton (cuda,
reference) restricts ours to one implementation. Without a GPU the references run on small sizes.
"""

from __future__ import annotations

from dpdmd import command  # isort: skip  first: the others take seconds, in which a user may interrupt

import argparse
import functools
import shlex
import sys
import time
from collections.abc import Callable
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
    """Names of --op that stand for several; losses: with the sampler's steps."""
    tables = {"losses": losses.Elementwise.table, "blocks": blocks.BlockOperation.table}
    return {
        name: [op for op, each in cases.OPERATIONS.items() if each.table == table] for name, table in tables.items()
    }


def choices() -> list[str]:
    grouped = [name for names in groups().values() for name in names]
    return [*grouped, *groups(), *(name for name in cases.OPERATIONS if name not in grouped), "transformer"]


def known_sizes() -> list[str]:
    return list(
        dict.fromkeys([*(size for each in cases.OPERATIONS.values() for size in each.sizes), *networks.NETWORKS])
    )


def our_implementations(device: torch.device) -> tuple[tuple[str, ...], list[str]]:
    """Those of ours that DPDMD_KERNELS allows and that run here, and why the others do not. UsageError where the one
    that it asks for does not."""
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
        raise report.UsageError(f"{backend.ENVIRONMENT_VARIABLE}={asked} cannot be had: {reasons[asked]}")
    return found or ("reference",), [f"{name}: {reason}" for name, reason in reasons.items() if reason]


Step = tuple[str, Callable[[], None]]  # what a log calls it, and what it does


def plan(run: Run, args: argparse.Namespace) -> list[Step]:
    """Everything that was asked for, in order. UsageError for a size that an operation does not have."""
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
    if args.baseline:  # refused now rather than after three minutes
        baseline = report.read_run(args.baseline)
        report.refuse_other_machine(baseline, source["machine"]["gpu"], args.baseline)
    ours, missing = our_implementations(device)

    def collect() -> dict[str, Any]:
        return {
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

    def write() -> None:
        if args.json:
            report.write_run(args.json, collect())

    def note(row: dict[str, Any]) -> None:
        if row.get("group") in (None, "output", "all gradients"):  # of the others there are fifty
            print(f"  {report.line(row)}", file=sys.stderr, flush=True)
        write()

    run = Run(device, ours, args.peers, left_out=missing, note=note)
    steps = plan(run, args)
    run.copy_tb_s = timing.copy_bandwidth(device)
    if device.type == "cpu":
        console.print(report.CPU_NOTE)
    for name, step in steps:
        print(f"{time.perf_counter() - begin:6.1f} s  {name}", file=sys.stderr, flush=True)
        step()
        write()
    result = collect()
    tell(console, result, baseline, args.baseline)
    return 1 if run.failures else 0


def tell(console, result: dict[str, Any], baseline: dict[str, Any] | None, path: Path | None) -> None:
    report.print_tables(console, result)
    machine = result["machine"]["gpu"] or "CPU"
    console.print(f"{machine}: a large copy moves {result['copy_tb_s']:.3f} TB/s. {result['seconds']:.0f} s in all.")
    floor = {way: taken["median_us"] for way, taken in result["engine_floor"].items()}
    if floor:
        console.print(
            f"Forward and backward of an autograd function with nothing in it: {floor['forward_backward']:.0f} us, "
            f"{floor['forward_backward_one_thread']:.0f} us in one thread. No loss can be faster."
        )
    noise = report.noise(report.timed_rows(result))
    if noise is not None:
        console.print(f"The same measurement made twice differs by {noise:.1%} (median).")
    for each in result["left_out"]:
        console.print(f"left out: {each}", markup=False)
    if baseline is not None:
        report.print_comparison(console, result, baseline, path)
    if result["device"] == "cpu":
        console.print(report.CPU_NOTE)
    for each in result["failures"]:
        console.print(f"FAILED, and not timed: {each}", markup=False, style="bold red")


def plot(files: list[Path], output: Path | None, of_transformer: bool) -> int:
    """A roofline of the operations, or a transformer's time by kind of kernel."""
    stored, picture = (STORED_TRANSFORMER, PICTURE_TRANSFORMER) if of_transformer else (STORED, PICTURE)
    output = output or picture
    results = _read(files or [stored])
    if of_transformer and not plots.broken_down(results):
        raise report.UsageError(
            f"{' '.join(map(str, files or [stored]))}: nothing there is broken down; --op transformer --part breakdown does it"
        )
    try:
        (plots.breakdown if of_transformer else plots.roofline)(results, output)
    except ImportError as error:
        raise report.UsageError(f"--plot needs matplotlib (pip install -e '.[eval]'): {error}") from None
    print(f"{output}: drawn")
    return 0


def _read(files: list[Path]) -> list[dict[str, Any]]:
    results = [report.read_run(path) for path in files]
    for path, result in zip(files, results, strict=True):
        if not result["machine"]["gpu"]:
            raise report.UsageError(
                f"{path} was measured on a CPU, which says nothing of a GPU: there is nothing to draw"
            )
    return results


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/run.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op", nargs="+", metavar="NAME", choices=choices(), help=f"of {', '.join(choices())}")
    parser.add_argument(
        "--size",
        nargs="+",
        metavar="NAME",
        choices=known_sizes(),
        help=f"of {', '.join(known_sizes())}, as far as an operation has them; without a GPU the small ones unless named",
    )
    parser.add_argument(
        "--part",
        nargs="+",
        metavar="NAME",
        choices=(*transformer.PARTS, "all"),
        help=f"of the transformer: of {', '.join(transformer.PARTS)}, all",
    )
    parser.add_argument(
        "--batch",
        nargs="+",
        type=command.count,
        metavar="N",
        help=f"of the transformer, instead of {transformer.BATCHES}",
    )
    parser.add_argument(
        "--variant",
        nargs="+",
        metavar="NAME",
        choices=networks.VARIANTS,
        help=f"of the transformer: of {', '.join(networks.VARIANTS)}; without a GPU nothing is compiled unless named",
    )
    parser.add_argument(
        "--peers",
        nargs="+",
        metavar="NAME",
        choices=PEERS,
        help=f"of {', '.join(PEERS)}; by default eager on every size and, on a GPU, compile: of losses on "
        f"{', '.join(losses.Elementwise.compiled_sizes)} for as long as {losses.Elementwise.compile_seconds:.0f} s of "
        f"compiling last, of blocks {blocks.BlockOperation.compile_seconds:.0f} s",
    )
    parser.add_argument(
        "--json", type=command.new_file, metavar="FILE", help="write all numbers, with machine, versions and commit"
    )
    parser.add_argument(
        "--baseline",
        type=command.path,
        metavar="FILE",
        help="a file that --json wrote on the same GPU: print what got slower than it by more than the spread (the larger "
        "of both runs'). For reading, not for a gate: the exit status stays what it is",
    )
    parser.add_argument(
        "--plot", nargs="*", type=command.path, metavar="FILE", help="measure nothing; draw files that --json wrote"
    )
    parser.add_argument(
        "--output",
        type=command.new_file,
        metavar="PNG",
        help="where --plot draws (docs/roofline.png, docs/transformer.png)",
    )
    parser.add_argument(
        "--markdown",
        nargs="+",
        type=command.path,
        metavar="FILE",
        help="measure nothing; print the transformer's tables of files that --json wrote",
    )
    args = parser.parse_args(argv)
    if args.peers and "none" in args.peers and len(args.peers) > 1:
        parser.error(f"--peers got {' '.join(args.peers)}: none stands alone")
    args.peers = tuple(args.peers) if args.peers else None
    of_transformer = [name for name in ("part", "batch", "variant") if getattr(args, name)]
    if of_transformer and "transformer" not in (args.op or ()):
        parser.error(f"--{of_transformer[0]} is of --op transformer")
    args.part = [part for part in transformer.PARTS if not args.part or part in args.part or "all" in args.part]
    args.batch = tuple(args.batch) if args.batch else None
    args.variant = tuple(args.variant) if args.variant else None
    args.argv = argv
    return args


def main(argv: list[str] | None = None) -> int:
    return command.run(_main, sys.argv[1:] if argv is None else argv)


def _main(argv: list[str]) -> int:
    if argv[:2] == ["--op", "cycle"]:  # has options of its own, and needs what the trainer needs
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
