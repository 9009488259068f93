"""Runs dpdmd.train with one thing arranged to go wrong, or one thing watched: train_with.py WHAT FOLDER [arguments ...]"""

import os
import signal
import sys
from pathlib import Path

from deepspeed.runtime.swap_tensor import optimizer_utils

from dpdmd import distill, train
from dpdmd.run import checkpoint

arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
what, folder, *arguments = arguments
rank = os.environ.get("RANK", "0")

if "engine.offload=nvme" in arguments:
    optimizer_utils.MIN_AIO_BYTES = 1  # what is smaller stays in memory

if what == "nothing":
    pass
elif what == "recorded":
    # Every process writes down the noise that it draws.
    draw = distill.Draws.noise

    def noise(self, shape, dtype=None):
        numbers = draw(self, shape)
        with open(Path(folder) / f"noise-{rank}.txt", "a") as file:
            file.write(f"{numbers.flatten()[:4].tolist()}\n")
        return numbers

    distill.Draws.noise = noise
elif what in ("killed", "full"):
    # Once the second checkpoint is written, before it has its name: the process dies, or the disk is full.
    publish, count = checkpoint.publish, 0

    def publish_once(unfinished, final):
        global count
        count += 1
        if count == 2 and what == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if count == 2:
            raise OSError(28, "No space left on device")
        publish(unfinished, final)

    checkpoint.publish = publish_once
elif what == "broken":
    # Losses are not a number from the fifth update on.
    loss, seen = train.Trainer.loss, 0

    def broken(self, role, iteration, shard):
        total, numbers = loss(self, role, iteration, shard)
        return (total * float("nan"), numbers) if iteration >= 4 else (total, numbers)

    train.Trainer.loss = broken
elif what == "no-uncond":
    # The teacher's unconditional prediction is not a number.
    guided = distill.guided

    def without_uncond(*arguments):
        real, real_uncond = guided(*arguments)
        return real, None if real_uncond is None else real_uncond * float("nan")

    distill.guided = without_uncond
elif what.startswith("SIG"):
    # As SIGTERM-1-4: in the middle of update number 4 (from 0) process 1 receives SIGTERM; -2 behind it: twice.
    name, of_rank, at, *times = what.split("-")
    loss = train.Trainer.loss

    def signalled(self, role, iteration, shard):
        if rank == of_rank and iteration == int(at):
            for _ in range(int(times[0]) if times else 1):
                os.kill(os.getpid(), getattr(signal, name))
        return loss(self, role, iteration, shard)

    train.Trainer.loss = signalled
elif what.startswith("last-"):
    # As last-SIGTERM-1: while the last checkpoint is saved process 1 receives SIGTERM.
    _, name, of_rank = what.split("-")
    save = checkpoint.Checkpoints.save

    def signalled_last(self, *arguments, last=False):
        if last and rank == of_rank:
            os.kill(os.getpid(), getattr(signal, name))
        return save(self, *arguments, last=last)

    checkpoint.Checkpoints.save = signalled_last
else:
    sys.exit(f"unknown: {what}")

sys.exit(train.main(arguments))
