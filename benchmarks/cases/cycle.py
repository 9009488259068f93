"""Time one distillation cycle (critic updates and a student update) by phase, and beside its peers.

    python benchmarks/run.py --op cycle                               this engine, then each peer, in new processes
    deepspeed benchmarks/cycle.py --config FILE [section.key=value]   this engine alone

Times are the device's (CUDA events; the CPU's clock without a GPU). A phase's time is its sum over a cycle, and the median of
the cycles is shown. The rest of a cycle (losses, sampler steps, waiting for the host) is the row "between the phases".
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from functools import partial
from pathlib import Path

import torch
from harness import profile

from cases.contenders import CONTENDERS, Peer
from dpdmd import command
from dpdmd import trainer as train
from dpdmd.backbones import load_backbone
from dpdmd.config import load_config
from dpdmd.engine.residency import Traffic
from dpdmd.engine.start import start
from dpdmd.run.provenance import provenance

BENCHMARKS = Path(__file__).parents[1]
PROMPTS = BENCHMARKS / "prompts.txt"
FIXED = (f"prompts.file={PROMPTS}", "prompts.encoding=stream", "run.sample_every=0", "evaluation.enabled=false")


class Clock:
    """Times named phases; they are read at the end of a cycle, so that the device does not wait."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, object, object]] = []
        self.update = ""  # role of the current update: part of a phase's name

    def mark(self):
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, begin, end) -> float:
        if self._cuda:
            end.synchronize()
            return begin.elapsed_time(end) / 1e3
        return end - begin

    def run(self, phase, function, *args):
        begin = self.mark()
        result = function(*args)
        self._marks.append((f"{self.update}: {phase}", begin, self.mark()))
        return result

    def read(self) -> dict[str, float]:
        """Seconds of each phase since the last call."""
        totals = defaultdict(float)
        for phase, begin, end in self._marks:
            totals[phase] += self.seconds(begin, end)
        self._marks.clear()
        return dict(totals)


class TimedNetwork:
    """A role whose forward pass, backward pass and step are timed."""

    def __init__(self, network, clock: Clock):
        self._network, self._clock = network, clock

    def __getattr__(self, name):
        return getattr(self._network, name)

    def __call__(self, x, t, cond):
        kind = "forward" if torch.is_grad_enabled() and self._network.trained else "forward without gradient"
        return self._clock.run(f"{self._network.name} {kind}", self._network, x, t, cond)

    def backward(self, loss, **options):
        self._clock.run("backward", partial(self._network.backward, **options), loss)

    def step(self):
        return self._clock.run("optimizer", self._network.step)


def run_cycle(trainer: train.Trainer, cycle: int, clock: Clock | None = None) -> None:
    length = trainer.config.distill.critic_updates + 1
    for iteration in range(cycle * length, (cycle + 1) * length):
        role = train.role_of(iteration, length - 1)
        if clock is not None:
            clock.update = role
        trainer.update(role, iteration)


def measure(trainer: train.Trainer, cycles: int, warmup: int) -> dict:
    """Medians over `cycles` cycles, after `warmup` others."""
    clock = Clock(trainer.world.device)
    networks = trainer.networks
    trainer.networks = {role: TimedNetwork(network, clock) for role, network in networks.items()}
    traffics = [network.traffic for network in networks.values() if network.traffic is not None]
    cuda = trainer.world.device.type == "cuda"
    seconds, phases = [], []
    for cycle in range(warmup + cycles):
        if cycle == warmup and cuda:
            torch.cuda.reset_peak_memory_stats()
        for traffic in traffics:
            traffic.reset()
        trainer.world.barrier()
        begin = clock.mark()
        run_cycle(trainer, cycle, clock)
        total = clock.seconds(begin, clock.mark())
        trainer.settle()
        if trainer.num_skipped:
            raise RuntimeError(f"non-finite updates, by role: {trainer.skipped}; a cycle with them is not timed")
        parts = clock.read()
        if trainer.world.main:
            print(f"cycle {cycle}{' (warm-up)' if cycle < warmup else ''}: {total:.3f} s", flush=True)
        if cycle >= warmup:
            seconds.append(total)
            phases.append({**parts, "between the phases": total - sum(parts.values())})
    samples = trainer.config.engine.batch_size * trainer.world.size * (trainer.config.distill.critic_updates + 1)
    result = {
        "seconds_a_cycle": statistics.median(seconds),
        "seconds_of_each_cycle": seconds,
        "images_a_second": samples / statistics.median(seconds),  # each update makes a batch of the student's images
        "seconds_by_phase": {phase: statistics.median(each[phase] for each in phases) for phase in phases[0]},
        "communication": None,
    }
    if traffics:
        result["communication"] = {key: sum(vars(each)[key] for each in traffics) for key in vars(Traffic())}
    trainer.networks = networks
    if cuda:
        result["peak_allocated_gib"] = torch.cuda.max_memory_allocated() / 2**30
        result["peak_reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
        free, total = torch.cuda.mem_get_info()
        # CUDA's context, the kernels' code, NCCL, and other programs on the GPU.
        result["outside_torch_gib"] = (total - free - torch.cuda.memory_reserved()) / 2**30
        result["allocations_repeated"] = torch.cuda.memory_stats()["num_alloc_retries"]
    return result


# Kinds of kernels by name, before harness/profile.py's.
SPECIAL = {"communication": "nccl", "optimizer": "adamw|adam_|multi_tensor_apply.*Adam"}
LARGEST = 25  # kernels listed
LOWER_BOUND = "lower bound: matmuls, attention, optimizers"


def by_kind(trainer: train.Trainer, cycle: int) -> dict[str, dict[str, float]]:
    """Milliseconds of a cycle's GPU time by kind of kernel and idle, and of the largest kernels."""
    kernels = profile.traced(lambda: run_cycle(trainer, cycle))
    kinds, names = defaultdict(float), defaultdict(float)
    for name, _, duration in kernels:
        special = [kind for kind, pattern in SPECIAL.items() if re.search(pattern, name, re.IGNORECASE)]
        kinds[special[0] if special else profile.kind(name)] += duration / 1e3
        names[name[:120]] += duration / 1e3
    begin = min(kernel[1] for kernel in kernels)
    end = max(kernel[1] + kernel[2] for kernel in kernels)
    kinds[profile.IDLE] = (end - begin - profile.busy(kernels)) / 1e3
    largest = sorted(names.items(), key=lambda item: -item[1])[:LARGEST]
    if trainer.world.main:
        rows = [*largest, *(("all " + kind, milliseconds) for kind, milliseconds in kinds.items())]
        print("\n".join(f"{milliseconds:10.1f} ms  {name}" for name, milliseconds in rows), flush=True)
    return {"kinds": dict(kinds), "largest": dict(largest), "num_kernels": len(kernels)}


def build(name: str, config, world, backbone) -> train.Trainer:
    """The trainer; for a peer with the peer's networks."""
    kind = CONTENDERS[name].peer
    if kind is None:
        return train.build(config, world, backbone, train.load_prompts(config))

    def make(role, module, backbone, config, world, *_):
        return Peer(kind, role, module, backbone, config, world)

    ours, train.make = train.make, make
    try:
        return train.build(config, world, backbone, train.load_prompts(config))
    finally:
        train.make = ours


def start_run(file: str | None, settings: list[str]):
    """Configuration, backbone and world of a benchmark run."""
    command.quieten()
    config = load_config(file, [*FIXED, *settings])
    backbone = load_backbone(config.model)
    config = backbone.resolved(config)
    train.check(config, backbone)
    return config, backbone, start(config.engine)


def run_one(args) -> int:
    """Measure one contender, in the processes that the launcher started."""
    config, backbone, world = start_run(args.config, [*args.settings, *CONTENDERS[args.contender].settings])
    if args.profile and world.device.type != "cuda":
        raise command.ConfigError("--profile reads a GPU's kernels, and this run is on the CPU: leave it out")
    plan = None
    if CONTENDERS[args.contender].peer is None:
        config, plan = train.plan_run(config, backbone, world)
    begin = time.perf_counter()
    trainer = build(args.contender, config, world, backbone)
    build_seconds = time.perf_counter() - begin
    result = {
        "contender": args.contender,
        "title": CONTENDERS[args.contender].title,
        **provenance(" ".join(["deepspeed", *(each for each in sys.argv if not each.startswith("--local_rank"))])),
        "processes": world.size,
        "build_seconds": round(build_seconds, 1),
        "config": config.model_dump(mode="json"),
        "cycles": args.cycles,
        **measure(trainer, args.cycles, args.warmup),
    }
    if plan is not None and plan.phases:
        result |= {"predicted_peak_gib": plan.peak / 2**30, "floor_seconds": plan.floor}
    if args.profile:
        result["gpu_milliseconds"] = by_kind(trainer, args.warmup + args.cycles)
    if world.main:
        for phase, seconds in result["seconds_by_phase"].items():
            print(f"{phase:45} {seconds:8.3f} s")
        print(f"{'a cycle':45} {result['seconds_a_cycle']:8.3f} s")
        for key in ("peak_allocated_gib", "peak_reserved_gib", "outside_torch_gib"):
            if key in result:
                print(f"{key:45} {result[key]:8.1f} GiB")
        print(f"{'communication a cycle':45} {result['communication']}", flush=True)
        if "floor_seconds" in result:
            print(f"{LOWER_BOUND:45} {sum(result['floor_seconds'].values()):8.3f} s", flush=True)
        if args.json:
            write(args.json, result)
    return 0


def compare(args) -> int:
    """Run each contender in new processes, and print a table."""
    results, problems = {}, {}
    for name in args.contenders:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "result.json"
            command = [sys.executable, "-m", "deepspeed.launcher.runner", *args.launcher, str(BENCHMARKS / "cycle.py")]
            command += ["--contender", name, "--json", str(file), "--cycles", str(args.cycles)]
            command += ["--warmup", str(args.warmup), *(["--profile"] if args.profile else [])]
            command += ["--config", args.config] if args.config else []
            print(f"== {CONTENDERS[name].title}", flush=True)
            environment = {**os.environ, **CONTENDERS[name].environment}
            done = subprocess.run([*command, *args.settings], env=environment, capture_output=True, text=True)
            said = [line for line in done.stdout.splitlines() if not line.startswith("[")]
            print("\n".join(said[-40:]), flush=True)
            if done.returncode != 0 or not file.exists():
                reasons = [line for line in done.stderr.splitlines() if "Error" in line or "error" in line]
                problems[name] = (reasons or done.stderr.splitlines() or ["no message"])[-1][:500]
                print(f"failed: {problems[name]}", flush=True)
            else:
                results[name] = json.loads(file.read_text(encoding="utf-8"))
        if args.json and results:  # after each contender, in case the next is interrupted
            write(args.json, together(results, problems))
    print(table(results, problems))
    return 0 if results and not problems else 1


def together(results: dict[str, dict], problems: dict[str, str]) -> dict:
    """The file of --json: what all contenders share, once; the rest by contender."""
    keys = ("date", "commit", "machine", "python", "cuda", "packages", "processes")
    shared = {key: next(iter(results.values()))[key] for key in keys}
    contenders = {name: {key: result[key] for key in result if key not in keys} for name, result in results.items()}
    return {"command": " ".join(["python", *sys.argv]), **shared, "contenders": contenders, "failed": problems}


def write(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def table(results: dict[str, dict], problems: dict[str, str]) -> str:
    """A Markdown table with a row for each contender."""
    lines = ["| | seconds a cycle | images a second | time beside dpdmd's | peak GiB | received GB a cycle |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    ours = results.get("ours", {}).get("seconds_a_cycle")
    for result in results.values():
        seconds = result["seconds_a_cycle"]
        ratio = f"{seconds / ours:.2f}" if ours else ""
        peak = f"{result['peak_allocated_gib']:.1f}" if "peak_allocated_gib" in result else ""
        traffic = result["communication"]
        received = f"{(traffic['gathered_bytes'] + traffic['reduced_bytes']) / 1e9:.2f}" if traffic else ""
        lines.append(
            f"| {result['title']} | {seconds:.2f} | {result['images_a_second']:.2f} | {ratio} | {peak} | {received} |"
        )
    floors = [result["floor_seconds"] for result in results.values() if "floor_seconds" in result]
    if floors and ours:
        floor = sum(floors[0].values())
        lines.append(f"| {LOWER_BOUND} | {floor:.2f} | | {floor / ours:.2f} | | |")
    lines += [f"| {CONTENDERS[name].title} | failed: {reason} | | | | |" for name, reason in problems.items()]
    return "\n".join(lines)


def make_parser() -> argparse.ArgumentParser:
    parser = command.Parser(prog="benchmarks/cycle.py", description=__doc__.split("\n")[0])
    parser.add_argument("settings", nargs="*", metavar="section.key=value")
    parser.add_argument("--config", default=None)
    parser.add_argument("--cycles", type=command.count, default=2)
    warmup = "untimed cycles before: the second records a pass that occurs once a cycle (dpdmd/engine/replay.py)"
    parser.add_argument("--warmup", type=command.whole(0), default=2, help=warmup)
    parser.add_argument("--profile", action="store_true", help="run one more cycle for its GPU time by kind of kernel")
    parser.add_argument("--json", type=command.new_file)
    return parser


def main(argv: list[str] | None = None) -> int:
    return command.run(_main, argv)


def _main(argv: list[str] | None) -> int:
    parser = make_parser()
    parser.add_argument("--contender", choices=CONTENDERS, default="ours")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args(argv)
    return run_one(args)


def compare_main(argv: list[str] | None = None) -> int:
    """`run.py --op cycle`."""
    parser = make_parser()
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--gpus", type=command.count, default=1, help="processes, one a GPU (without GPUs: on the CPU)")
    parser.add_argument("--port", type=command.whole(1, 2**16), default=29531)
    args = parser.parse_intermixed_args(argv)
    processes = "--num_gpus" if torch.cuda.is_available() else "--num_accelerators"
    args.launcher = [processes, str(args.gpus), "--master_port", str(args.port)]
    return compare(args)
