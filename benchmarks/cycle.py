"""One distillation cycle (critic updates and a student update) by phase, on the trainer's own code.

    deepspeed benchmarks/cycle.py --config configs/sd35_medium.yaml --json benchmarks/results/cycle.json model.random_init=true

Seconds are those of the device (CUDA events; the CPU's clock without a GPU): each phase's are summed over one cycle and the
median over cycles is shown. What is left between the phases' sum and the cycle (losses, steps, waiting for the host) is a
row of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch

from dpdmd import train
from dpdmd.backbones import load_backbone
from dpdmd.config import ConfigError, load_config
from dpdmd.engine import start
from dpdmd.provenance import provenance

PROMPTS = Path(__file__).with_name("prompts.txt")


class Clock:
    """Times named pieces of work; the times are read at the end, so that measuring does not hold the device up."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, object, object]] = []
        self.update = ""  # which update is under way: part of a phase's name

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
        """Seconds of each phase since the last reading."""
        totals = defaultdict(float)
        for phase, begin, end in self._marks:
            totals[phase] += self.seconds(begin, end)
        self._marks.clear()
        return dict(totals)


class TimedNetwork:
    """A Network whose forward, backward and step passes are timed."""

    def __init__(self, network, clock: Clock):
        self._network, self._clock = network, clock

    def __getattr__(self, name):
        return getattr(self._network, name)

    def __call__(self, x, t, cond):
        kind = "forward" if torch.is_grad_enabled() and self._network.trained else "forward without gradient"
        return self._clock.run(f"{self._network.role} {kind}", self._network, x, t, cond)

    def backward(self, loss):
        self._clock.run("backward", self._network.backward, loss)

    def step(self):
        return self._clock.run("optimizer", self._network.step)


def measure(trainer: train.Trainer, cycles: int, warmup: int) -> dict:
    """Medians over `cycles` whole cycles, after `warmup` cycles that are not counted."""
    clock = Clock(trainer.world.device)
    trainer.networks = {role: TimedNetwork(network, clock) for role, network in trainer.networks.items()}
    length = trainer.config.distill.critic_updates + 1
    seconds, phases = [], []
    for cycle in range(warmup + cycles):
        if cycle == warmup and trainer.world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        trainer.world.barrier()
        begin = clock.mark()
        for iteration in range(cycle * length, (cycle + 1) * length):
            clock.update = train.role_of(iteration, length - 1)
            numbers = trainer.update(clock.update, iteration)
            if trainer.skipped:
                raise RuntimeError(f"update {iteration} was not finite: {numbers}; no time is worth reporting")
        total = clock.seconds(begin, clock.mark())
        parts = clock.read()
        if trainer.world.main:
            print(f"cycle {cycle}{' (warm-up)' if cycle < warmup else ''}: {total:.2f} s", flush=True)
        if cycle >= warmup:
            seconds.append(total)
            phases.append({**parts, "between the phases": total - sum(parts.values())})
    result = {
        "seconds_a_cycle": statistics.median(seconds),
        "seconds_of_each_cycle": seconds,
        "seconds_by_phase": {phase: statistics.median(each[phase] for each in phases) for phase in phases[0]},
    }
    if trainer.world.device.type == "cuda":
        result["peak_allocated_gib"] = torch.cuda.max_memory_allocated() / 2**30
        result["peak_reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="deepspeed benchmarks/cycle.py", description=__doc__.split("\n")[0])
    parser.add_argument("settings", nargs="*", metavar="section.key=value")
    parser.add_argument("--config", default=None)
    parser.add_argument("--cycles", type=int, default=2)
    parser.add_argument("--warmup", type=int, default=1, help="cycles before those that count")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args(argv)
    fixed = [f"prompts.file={PROMPTS}", "prompts.encoding=stream", "run.sample_every=0", "evaluation.enabled=false"]
    train.quieten()
    try:
        config = load_config(args.config, [*fixed, *args.settings])
        backbone = load_backbone(config.model)
        world = start(config.engine)
        begin = time.perf_counter()
        trainer = train.build(config, world, backbone, train.load_prompts(config))
        build_seconds = time.perf_counter() - begin
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    result = {
        **provenance(" ".join(["deepspeed", *sys.argv])),
        "processes": world.size,
        "build_seconds": round(build_seconds, 1),
        "config": config.model_dump(mode="json"),
        "cycles": args.cycles,
        **measure(trainer, args.cycles, args.warmup),
    }
    if world.main:
        for phase, seconds in result["seconds_by_phase"].items():
            print(f"{phase:45} {seconds:8.3f} s")
        print(f"{'a cycle':45} {result['seconds_a_cycle']:8.3f} s")
        for key in ("peak_allocated_gib", "peak_reserved_gib"):
            if key in result:
                print(f"{key:45} {result[key]:8.1f} GiB")
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(result, indent=1) + os.linesep, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
