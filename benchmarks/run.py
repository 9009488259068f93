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
import contextlib
import functools
import importlib
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import accuracy
import adamw_rates
import attention_rates
import block_operations
import block_rates
import gpu_time
import grids
import networks
import report
import roofline
import timing
import torch
import transformer
from block_operations import BLOCK_OPERATIONS
from operations import DTYPE, OPERATIONS, SIZES, Inputs, Operation, make_inputs, sets_needed

from dpdmd.kernels import use_backend
from dpdmd.kernels.runtime import backend
from dpdmd.run.provenance import provenance

ROOT = Path(__file__).parents[1]
STORED = ROOT / "benchmarks" / "results" / "kernels.json"
PICTURE = ROOT / "docs" / "roofline.png"
STORED_TRANSFORMER = ROOT / "benchmarks" / "results" / "transformer.json"
PICTURE_TRANSFORMER = ROOT / "docs" / "transformer.png"
PEERS = ("eager", "compile", "none")
GROUPS = {"losses": tuple(OPERATIONS), "blocks": tuple(BLOCK_OPERATIONS)}  # losses: with the sampler's steps
CHOICES = (*OPERATIONS, *BLOCK_OPERATIONS, *GROUPS, "attention", "adamw_step", "transformer")
KNOWN_SIZES = tuple(
    dict.fromkeys([*SIZES, *block_operations.SIZES, *attention_rates.SIZES, *adamw_rates.SIZES, *networks.NETWORKS])
)
CPU_SIZES = ("sd35-b1", "awkward")
# Unless --peers asks for it, torch.compile runs on one size bound by launches and one bound by memory, and no longer
# than this: each compilation takes seconds, and the whole run has three minutes.
COMPILED_SIZES = ("sd35-b4", "video")
COMPILE_SECONDS = 60.0


@dataclass(frozen=True)
class Case:
    name: str
    size: str

    @property
    def operation(self) -> Operation:
        return OPERATIONS[self.name]

    @property
    def shape(self) -> tuple[int, ...]:
        return SIZES[self.size]

    def __str__(self) -> str:
        return f"{self.name} {self.size}"


@dataclass(frozen=True)
class Implementation:
    name: str
    peer: bool
    function: Callable[..., torch.Tensor]
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext


@dataclass
class Run:
    """What to run, and what was found out."""

    device: torch.device
    ours: tuple[str, ...]
    peers: tuple[str, ...] | None = None  # None: eager everywhere, torch.compile on COMPILED_SIZES
    copy_tb_s: float = math.nan
    rows: list[dict[str, Any]] = field(default_factory=list)  # losses and sampler steps
    blocks: list[dict[str, Any]] = field(default_factory=list)
    attention: list[dict[str, Any]] = field(default_factory=list)
    optimizer: list[dict[str, Any]] = field(default_factory=list)
    transformer: list[dict[str, Any]] = field(default_factory=list)
    cancellation: list[dict[str, Any]] = field(default_factory=list)
    engine_floor: dict[str, dict[str, Any]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    compile_seconds: float = 0.0
    block_compile_seconds: float = 0.0


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


def implementations(run: Run, case: Case) -> list[Implementation]:
    """Ours first, then the peers."""
    existing = importlib.import_module(f"dpdmd.kernels.{case.operation.module}").IMPLEMENTATIONS
    ours = [name for name in run.ours if name in existing] or ["reference"]
    found = [Implementation(name, False, case.operation.ours, lambda name=name: use_backend(name)) for name in ours]
    if run.peers is None or "eager" in run.peers:
        found.append(Implementation("eager", True, case.operation.peer))
    if _compile_wanted(run, case):
        torch._dynamo.reset()  # what was compiled for another size would count towards the limit of recompilations
        found.append(Implementation("compile", True, torch.compile(case.operation.peer, dynamic=False)))
    return found


def _compile_wanted(run: Run, case: Case) -> bool:
    if run.peers is not None:
        return "compile" in run.peers
    if run.device.type == "cpu" or case.size not in COMPILED_SIZES:
        return False
    if run.compile_seconds > COMPILE_SECONDS:
        run.left_out.append(
            f"{case}, compile: compiling has had its {COMPILE_SECONDS:.0f} s; --peers compile runs it all the same"
        )
        return False
    return True


def run_case(run: Run, case: Case) -> None:
    """One operation at one size: checked, then timed."""
    count = sets_needed(case.operation, case.shape, timing.cache_bytes(run.device))
    sets = [make_inputs(case.operation, case.shape, run.device, seed) for seed in range(count)]
    found = implementations(run, case)
    checks, problems = check_all(run, case, found, sets[0])
    if problems:
        run.failures += [f"{case}, {name}: {problem}" for name, problem in problems.items()]
        return
    found = [each for each in found if each.name in checks]
    run.rows += make_rows(run, case, found, checks, time_all(run, case, found, sets))


def check_all(
    run: Run, case: Case, found: list[Implementation], inputs: Inputs
) -> tuple[dict[str, accuracy.Check], dict[str, str]]:
    """Each one's check, and the problem of each that has one. A peer that cannot run here is in neither."""
    outcomes, problems = {}, {}
    for each in found:
        begin = time.perf_counter()
        try:
            # Ours get memory full of NaN. The peers' memory is torch's affair, and the switch would compile them twice.
            with each.context(), contextlib.nullcontext() if each.peer else accuracy.poisoned_memory():
                outcomes[each.name] = accuracy.run_once(case.operation, each.function, inputs)
        except Exception as error:  # whatever it is, the other figures should not go with it
            problem = f"{type(error).__name__}: {str(error).partition(os.linesep)[0]}"
            if each.peer:
                run.left_out.append(f"{case}, {each.name}: {problem}")
            else:
                problems[each.name] = problem
        if each.name == "compile":
            run.compile_seconds += time.perf_counter() - begin
    drawn = {each.name for each in found if each.peer} & set(outcomes) if case.operation.random_peer else set()
    fixed = {name: outcome for name, outcome in outcomes.items() if name not in drawn}
    checks = accuracy.check(case.operation, inputs, fixed)
    checks |= {name: accuracy.check_moments(inputs, outcomes[name][1]) for name in drawn}
    problems |= {name: each.problem for name, each in checks.items() if each.problem}
    return checks, problems


def time_all(
    run: Run, case: Case, found: list[Implementation], sets: list[Inputs]
) -> dict[str, dict[str, timing.Time]]:
    """Every way of calling, every implementation: times[way][implementation]."""
    cuda = run.device.type == "cuda"
    ways = ["forward"]
    if case.operation.loss:
        ways += ["forward_backward", *(["forward_backward_one_thread"] if cuda else [])]
    times = {}
    for way in ways:
        subjects = {each.name: _subject(each, way) for each in found}
        times[way] = timing.in_turns(subjects, sets)
    for way in ways if cuda else []:
        if not way.endswith("one_thread"):  # a graph's replay has no thread to hand anything to
            times[f"gpu_{way}"] = _time_graphs(run, case, found, way, sets)
    return times


def _subject(implementation: Implementation, way: str) -> timing.Subject:
    function = implementation.function

    def forward(inputs: Inputs) -> None:
        function(*inputs)

    def forward_backward(inputs: Inputs) -> None:
        inputs[0].grad = None
        function(*inputs).backward()

    @contextlib.contextmanager
    def one_thread():
        with implementation.context(), torch.autograd.set_multithreading_enabled(False):
            yield

    if way == "forward":
        return timing.Subject(forward, implementation.context)
    around = one_thread if way.endswith("one_thread") else implementation.context
    return timing.Subject(forward_backward, around)


def _time_graphs(
    run: Run, case: Case, found: list[Implementation], way: str, sets: list[Inputs]
) -> dict[str, timing.Time]:
    times = {}
    for each in found:
        try:
            times[each.name] = timing.on_gpu_alone(_subject(each, way), sets)
        except RuntimeError as error:
            run.left_out.append(f"{case}, {each.name}, GPU time alone: {str(error).partition(os.linesep)[0]}")
        for inputs in sets:  # a gradient made by a graph lives in the graph's memory
            inputs[0].grad = None
    return times


def make_rows(
    run: Run,
    case: Case,
    found: list[Implementation],
    checks: dict[str, accuracy.Check],
    times: dict[str, dict[str, timing.Time]],
) -> list[dict[str, Any]]:
    elements = math.prod(case.shape)
    moved = case.operation.bytes(elements)
    peers = [each.name for each in found if each.peer]
    rows = []
    for each in found:
        rows.append(
            {
                "operation": case.name,
                "size": case.size,
                "implementation": each.name,
                "peer": each.peer,
                "shape": list(case.shape),
                "elements": elements,
                "bytes": moved,
                "bytes_counted": case.operation.bytes_counted(),
                "error": checks[each.name].json(),
                **timing.rates(each.name, times, moved, run.copy_tb_s, peers),
            }
        )
    return rows


Step = tuple[str, Callable[[], None]]  # what a log calls it, and what it does


def plan(run: Run, args: argparse.Namespace, note: Callable[[dict[str, Any]], None]) -> list[Step]:
    """Everything that was asked for, in order. UsageError for a size that an operation does not have."""
    cpu = run.device.type == "cpu"
    named = [each for name in args.op or () for each in GROUPS.get(name, (name,))]
    names = list(dict.fromkeys(named)) or [*OPERATIONS, *BLOCK_OPERATIONS, "attention", "adamw_step"]
    steps: list[Step] = []

    def sizes_of(name: str, known: Sequence[str], default: Sequence[str]) -> list[str]:
        sizes = [size for size in args.size or default if size in known]
        if not sizes and named:
            raise report.UsageError(f"--size {' '.join(args.size)}: {name} has {', '.join(known)}")
        return sizes

    for name in names:
        if name in OPERATIONS:
            cases = [Case(name, size) for size in sizes_of(name, tuple(SIZES), CPU_SIZES if cpu else tuple(SIZES))]
            steps += [(str(case), functools.partial(run_case, run, case)) for case in cases]
        elif name in BLOCK_OPERATIONS:
            known = BLOCK_OPERATIONS[name].sizes
            default = [size for size in known if (size == "awkward") == cpu]
            cases = [block_rates.Case(name, size) for size in sizes_of(name, known, default)]
            steps += [(str(case), functools.partial(block_rates.run_case, run, case)) for case in cases]
        elif name == "attention":
            known = tuple(attention_rates.SIZES)
            default = attention_rates.CPU_SIZES if cpu else [size for size in known if size != "awkward"]
            steps += [
                (f"attention {size}", functools.partial(attention_rates.run_size, run, size))
                for size in sizes_of(name, known, default)
            ]
        elif name == "adamw_step":
            known = tuple(adamw_rates.SIZES)
            default = adamw_rates.CPU_SIZES if cpu else [size for size in known if size != "awkward"]
            steps += [
                (f"adamw_step {size}", functools.partial(adamw_rates.run_size, run, size))
                for size in sizes_of(name, known, default)
            ]
        else:
            (size,) = sizes_of(name, tuple(networks.NETWORKS), ("small" if cpu else "full",))[:1]
            state = transformer.State(run, size, args.batch, args.variant, note)
            steps += [
                (f"transformer {part}", functools.partial(transformer.run_part, state, part)) for part in args.part
            ]
    if "dmd_loss" in names:
        steps.append(("cancellation", lambda: run.cancellation.extend(accuracy.cancellation(run.device))))
    if set(names) & set(OPERATIONS):
        steps.append(("the engine's floor", lambda: run.engine_floor.update(_engine_floor(run.device))))
    return steps


def _engine_floor(device: torch.device) -> dict[str, dict[str, Any]]:
    return {way: taken.json() for way, taken in timing.engine_floor(device).items()}


def measure(args: argparse.Namespace) -> int:
    begin = time.perf_counter()
    console = report.make_console()
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    source = provenance(shlex.join(["python", "benchmarks/run.py", *args.argv]))
    baseline = None
    if args.baseline:  # refused now rather than after three minutes
        baseline = report.read_run(args.baseline)
        report.refuse_other_machine(baseline, source["machine"]["gpu"], args.baseline)
    ours, missing = our_implementations(device)
    run = Run(device, ours, args.peers, left_out=missing)

    def collect() -> dict[str, Any]:
        return {
            **source,
            "device": device.type,
            "dtype": str(DTYPE).removeprefix("torch."),
            "copy_tb_s": run.copy_tb_s,
            "cache_bytes": timing.cache_bytes(device),
            "engine_floor": run.engine_floor,
            "limits": {"result": accuracy.RESULT_LIMIT, "loss": accuracy.LOSS_LIMIT},
            "rows": run.rows,
            "blocks": run.blocks,
            "attention": run.attention,
            "optimizer": run.optimizer,
            "transformer": run.transformer,
            "cancellation": run.cancellation,
            "failures": run.failures,
            "left_out": run.left_out,
            "seconds": time.perf_counter() - begin,
        }

    def note(row: dict[str, Any]) -> None:
        if row.get("group") in (None, "output", "all gradients"):  # of the others there are fifty
            print(f"  {grids.line(row)}", file=sys.stderr, flush=True)
        if args.json:
            report.write_run(args.json, collect())

    steps = plan(run, args, note)
    run.copy_tb_s = timing.copy_bandwidth(device)
    if device.type == "cpu":
        console.print(report.CPU_NOTE)
    for name, step in steps:
        print(f"{time.perf_counter() - begin:6.1f} s  {name}", file=sys.stderr, flush=True)
        known = len(run.blocks), len(run.attention), len(run.optimizer)
        step()
        for row in (*run.blocks[known[0] :], *run.attention[known[1] :], *run.optimizer[known[2] :]):
            print(f"  {grids.line(row)}", file=sys.stderr, flush=True)
        if args.json:
            report.write_run(args.json, collect())
    result = collect()
    tell(console, result, baseline, args.baseline)
    if args.json:
        report.write_run(args.json, result)
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
    if of_transformer and not gpu_time.broken_down(results):
        raise report.UsageError(
            f"{' '.join(map(str, files or [stored]))}: nothing there is broken down; --op transformer --part breakdown does it"
        )
    try:
        (gpu_time if of_transformer else roofline).draw(results, output)
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
    parser.add_argument("--op", nargs="+", metavar="NAME", choices=CHOICES, help=f"of {', '.join(CHOICES)}")
    parser.add_argument(
        "--size",
        nargs="+",
        metavar="NAME",
        choices=KNOWN_SIZES,
        help=f"of {', '.join(KNOWN_SIZES)}, as far as an operation has them; without a GPU the small ones unless named",
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
        f"{', '.join(COMPILED_SIZES)} for as long as {COMPILE_SECONDS:.0f} s of compiling last, of blocks "
        f"{block_rates.COMPILE_SECONDS:.0f} s",
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
        import cycle

        return cycle.compare_main(argv[2:])
    args = parse(argv)
    if args.markdown:
        print("\n\n".join(report.markdown(report.read_run(path)) for path in args.markdown))
        return 0
    if args.plot is not None:
        return plot(args.plot, args.output, "transformer" in (args.op or ()))
    return measure(args)


if __name__ == "__main__":
    sys.exit(main())
