"""Started by run/test_closing.py: runs that fail after each thing that they open, and what is still open then.

ended_badly.py FOLDER settings ...: prints a line RESULT with {failure: {what: ...}} as JSON. The processes of a run meet once, so
all runs are of one process that has met.
"""

import fcntl
import json
import os
import sys
import threading
from functools import partial
from pathlib import Path
from unittest import mock

import tqdm

from dpdmd import train, trainer
from dpdmd.run import checkpoint, embeddings, folder, journal


def fail(*_, **__):
    raise OSError("as arranged")


def after(count: int, function):
    """The function, which fails at its call number `count` (from 0) and all later ones."""
    calls = []

    def counted(*arguments, **options):
        calls.append(1)
        return fail() if len(calls) > count else function(*arguments, **options)

    return counted


def reading_ahead(make, *arguments, **options):
    """A conditioner whose thread has been started."""
    made = make(*arguments, **options)
    made.prefetch(arguments[2][:1])
    return made


# What is opened -> (module or class, name, what takes its place): it fails once that is open.
FAILURES = {
    "the folder's lock": [(os, "ftruncate", fail)],
    "folder": [(train, "identity", fail)],
    "checkpoints": [(train, "starts", fail)],
    "embeddings": [(embeddings, "save_tensors", fail)],
    "conditioner": [
        (trainer, "make_conditioner", partial(reading_ahead, trainer.make_conditioner)),
        (trainer, "Distillation", after(1, trainer.Distillation)),
    ],
    "trainer": [
        (train, "check_space", fail),
        (trainer, "make_conditioner", partial(reading_ahead, trainer.make_conditioner)),
    ],
    "the journal's file": [(journal, "_tensorboard", fail)],
    "journal": [(train, "Progress", fail)],
    "an update, and a checkpoint that is being written": [(trainer.Trainer, "loss", after(5, trainer.Trainer.loss))],
    "a checkpoint that cannot be written": [(checkpoint, "save_tensors", fail)],
    "export": [(train, "export_student", fail)],
    "report": [(train, "report", fail)],
}


def left_open(place: Path, before: set) -> dict:
    found = {}
    files = [os.readlink(file) for file in Path("/proc/self/fd").iterdir() if os.path.lexists(file)]
    found["files"] = [file for file in files if file.startswith(str(place))]
    for thread in set(threading.enumerate()) - before:
        thread.join(5.0)  # the one that counts interrupts has been told, and is not waited for
    found["threads"] = [thread.name for thread in threading.enumerate() if thread not in before]
    found["bars"] = [str(bar) for bar in tqdm.tqdm._instances]
    found["copies"] = sum(len(each._host) for each in made)
    if (place / folder.MARK).exists():
        with (place / folder.MARK).open() as mark:
            try:
                fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                found["lock"] = True
    return {what: each for what, each in found.items() if each}


made = []  # all Checkpoints


def main():
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    place, settings = Path(arguments[0]), arguments[1:]
    world, results = [], {}
    start, init = train.start, checkpoint.Checkpoints.__init__
    tqdm.tqdm.monitor_interval = 0  # a thread that all bars share, and that stays

    def start_once(*given, **options):
        world[:] = world or [start(*given, **options)]
        return world[0]

    def noted(self, *given, **options):
        init(self, *given, **options)
        made.append(self)

    train.start, checkpoint.Checkpoints.__init__ = start_once, noted
    start_once(train.load_config(None, settings).engine)
    before = set(threading.enumerate())
    for number, (what, patches) in enumerate(FAILURES.items()):
        output = place / str(number)
        with mock.patch.multiple(sys, stdout=open(os.devnull, "w"), stderr=open(os.devnull, "w")):
            patched = [mock.patch.object(*each) for each in patches]
            for each in patched:
                each.start()
            status = train.main(
                [*settings, f"run.output_dir={output}", f"prompts.cache_dir={place}/embeddings-{number}"]
            )
            for each in patched:
                each.stop()
        results[what] = {"status": status, **left_open(place, before)}
        before |= {*threading.enumerate()}
    print("RESULT " + json.dumps(results), flush=True)


main()
