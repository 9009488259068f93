"""Measure what a checkpoint costs: how long the training waits, and how long writing, verifying and loading take.

    deepspeed --num_gpus 1 benchmarks/checkpoint.py --config configs/sd35_medium.yaml model.random_init=true [--json FILE]

Trains three cycles and saves twice, with a cycle during the second write; then verifies and loads. On the same networks and
disk, DeepSpeed's own save_checkpoint of student and critic is the peer: there the training waits for the whole write.
"""

from __future__ import annotations

from dpdmd import command  # isort: skip  first: the others take seconds, in which a user may interrupt

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
from cases.cycle import PROMPTS, run_cycle, start_run

from dpdmd import trainer as train
from dpdmd.config import TRAINED
from dpdmd.files import readable_bytes, write_json
from dpdmd.run.checkpoint import Checkpoints, checkpoint_bytes
from dpdmd.run.provenance import provenance
from dpdmd.run.resume import identity


class Clock:
    """Seconds of named parts, including the device's work and the other processes'."""

    def __init__(self, world):
        self.seconds: dict[str, float] = {}
        self._world = world

    def __call__(self, name: str, function, *arguments, **options):
        self._wait()
        began = time.perf_counter()
        result = function(*arguments, **options)
        self._wait()
        self.seconds[name] = round(time.perf_counter() - began, 3)
        if self._world.main:
            print(f"{name:60} {self.seconds[name]:9.3f} s", flush=True)
        return result

    def _wait(self) -> None:
        if self._world.device.type == "cuda":
            torch.cuda.synchronize()
        self._world.barrier()


def cycle(trainer, number: int) -> None:
    run_cycle(trainer, number)
    trainer.settle()


def deepspeeds(trainer, folder: Path) -> None:
    """Each engine pickles its own state."""
    for role in TRAINED:
        network = trainer.networks[role]
        network.release()
        network._partition.engine.save_checkpoint(str(folder), tag=role, save_latest=False)


def measure(trainer, folder: Path, peer: bool) -> dict[str, float]:
    world, networks = trainer.world, trainer.networks
    clock = Clock(world)
    for number in range(3):  # the second cycle records graphs
        clock(f"a cycle, number {number + 1}", cycle, trainer, number)
    if peer:
        clock("DeepSpeed's save_checkpoint: the training waits", deepspeeds, trainer, folder / "deepspeed")
        if world.main:
            shutil.rmtree(folder / "deepspeed")
        world.barrier()
    checkpoints = Checkpoints(
        folder / "checkpoints", 1, world, identity(trainer.config, trainer.backbone, world), trainer.config
    )
    for number, which in enumerate(("first", "second")):
        if number and world.main:  # makes room
            shutil.rmtree(folder / "checkpoints")
        clock(f"{which} save: the training waits", checkpoints.save, number + 1, networks, trainer.state())
        if which == "second":
            clock("a cycle while it is written", cycle, trainer, 3)
        clock(f"{which} save: waiting for the writing", checkpoints.wait)
        clock.seconds[f"{which} save: writing, in the background"] = round(checkpoints.write_seconds[-1], 3)
    found = clock("find: every file read and compared", checkpoints.find)
    clock("load", checkpoints.load, found, networks)
    return clock.seconds


def main(argv: list[str] | None = None) -> int:
    return command.run(_main, argv)


def folder_in(parent: Path) -> Path:
    """A new folder inside `parent`, which is made if need be."""
    parent.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix="dpdmd-checkpoint-", dir=parent))


def _main(argv: list[str] | None) -> int:
    parser = command.Parser(prog="benchmarks/checkpoint.py", description=__doc__.split("\n")[0])
    parser.add_argument("settings", nargs="*", metavar="section.key=value")
    parser.add_argument("--config", default=None)
    default = tempfile.gettempdir()
    parser.add_argument("--folder", type=command.new_folder, default=default, help="a folder on the disk to measure")
    parser.add_argument("--no-peer", action="store_true", help="leave out DeepSpeed's save_checkpoint")
    parser.add_argument("--json", type=command.new_file)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args(argv)
    config, backbone, world = start_run(args.config, args.settings)
    config, _ = train.plan_run(config, backbone, world)
    trainer = train.build(config, world, backbone, train.load_prompts(config))
    size = checkpoint_bytes(config, trainer.networks["student"].num_parameters)
    folder = world.on_main(folder_in, args.folder)
    try:
        seconds = measure(trainer, folder, not args.no_peer)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if world.main:
        rate = size / seconds["first save: writing, in the background"]
        print(f"a checkpoint: {readable_bytes(size)}, written at {readable_bytes(rate)} a second")
        if args.json:
            given = (each for each in sys.argv if not each.startswith("--local_rank"))
            typed = " ".join(["deepspeed", "--num_gpus", str(world.size), *given])
            settings = config.model_dump(mode="json")
            settings["prompts"]["file"] = f"benchmarks/{PROMPTS.name}"  # the same for every checkout
            found = {"processes": world.size, "bytes": size, "seconds": seconds, "config": settings}
            write_json(args.json, {**provenance(typed), **found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
