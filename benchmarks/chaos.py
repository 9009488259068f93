"""Interrupt and damage runs of the demo and count the lost ones: signals at random moments, damaged checkpoints, full disks.

    python benchmarks/chaos.py [--signals 50] [--damages 30] [--full 10] [--jobs N] [--json benchmarks/results/reliability.json]

Each case starts a short run of the shipped teacher on the CPU, in one process or two, does one thing to it, and resumes it
until it finishes. The run survived if the final student has the bits of an undisturbed run, and if every error on the way
gave an exit status other than 0 and a line on stderr. A traceback counts as lost. --full mounts a small tmpfs (needs root).
"""

from __future__ import annotations

from dpdmd import command  # isort: skip  first: the others take seconds, in which a user may interrupt

import argparse
import dataclasses
import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from dpdmd.files import load_tensors, sha256, write_json
from dpdmd.run.provenance import provenance

ITERATIONS = 18
SETTINGS = (
    *("engine.device=cpu", "engine.batch_size=2", "evaluation.enabled=false", "distill.critic_updates=2"),
    *("distill.teacher_steps=6", "distill.anchor=2", f"run.iterations={ITERATIONS}", "run.checkpoint_every=2"),
    *("run.sample_every=3", "run.keep_checkpoints=2", "student_optimizer.lr=1e-3", "critic_optimizer.lr=1e-3"),
)
PATIENCE = 900.0  # seconds after which a run counts as stuck


@dataclass
class Case:
    kind: str  # signal, damage or full disk
    what: str
    processes: int
    survived: bool = False
    problem: str = ""  # why it did not survive
    said: list[str] = field(default_factory=list)  # messages that the user saw


_context = multiprocessing.get_context("forkserver")  # imports once for all runs
_context.set_forkserver_preload(["deepspeed", "dpdmd.backbones.sd3", "dpdmd.train"])


def _train(arguments: list[str], world: dict[str, str], log: Path) -> None:
    """One process of a run, with the environment that a launcher sets."""
    for stream in (sys.stdout, sys.stderr):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream.fileno())
    os.environ.update(world)
    os.chdir("/")
    from dpdmd import train

    sys.exit(train.main(arguments))


class Run:
    """A run of `number` processes, which print to log_of(folder)."""

    def __init__(self, shared: Path, folder: Path, number: int, *more: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        settings = (*SETTINGS, f"prompts.file={shared / 'prompts.txt'}", f"prompts.cache_dir={shared / 'embeddings'}")
        arguments = [*settings, f"run.output_dir={folder}", *more]
        self.processes = []
        for rank in range(number):
            world = {"OMP_NUM_THREADS": "1"}
            if number > 1:
                world |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(number)}
                world |= {"LOCAL_WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            self.processes.append(_context.Process(target=_train, args=(arguments, world, log_of(folder))))
            self.processes[-1].start()

    @property
    def at_work(self) -> list[multiprocessing.Process]:
        return [each for each in self.processes if each.exitcode is None]

    def wait(self) -> int:
        """Exit status: 0, or that of the first process that failed; the others are then ended, as a launcher does."""
        deadline = time.monotonic() + PATIENCE
        while self.at_work:
            failed = [each.exitcode for each in self.processes if each.exitcode]
            if failed or time.monotonic() > deadline:
                return self.end(failed[0] if failed else None)
            time.sleep(0.05)
        return next((each.exitcode for each in self.processes if each.exitcode), 0)

    def end(self, status: int | None) -> int:
        for each in self.processes:
            each.terminate()
        for each in self.processes:
            each.join(30)
            each.kill()
            each.join()
        if status is None:
            raise TimeoutError(f"a run did not end within {PATIENCE:.0f} s")
        return status


def log_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.log")


def finish(shared: Path, folder: Path, number: int, case: Case) -> None:
    """Resume until the run finishes, then compare its student with the undisturbed run's."""
    for _ in range(3):
        if Run(shared, folder, number, "--resume").wait() == 0:
            break
    else:
        case.problem = "failed when it was resumed"
    case.said = said(folder)
    text = log_of(folder).read_text(errors="replace")
    if "Traceback" in text:
        case.problem = case.problem or "a traceback"
    if not case.problem and weights_of(folder) != json.loads((shared / f"weights-{number}.json").read_text()):
        case.problem = "the student's bits differ from the undisturbed run's"
    case.survived = not case.problem


def said(folder: Path) -> list[str]:
    words = ("error", "ended after", "left out", "going on", "starting at", "finished:")
    lines = log_of(folder).read_text(errors="replace").splitlines()
    return [line.replace(str(folder), "RUN")[:300] for line in lines if line.startswith(words) or "left out" in line]


def weights_of(folder: Path) -> dict[str, str]:
    (file,) = (folder / "student").glob("*.safetensors")
    tensors, _ = load_tensors(file)
    return {name: tensor.double().sum().item().hex() for name, tensor in tensors.items()} | {"file": sha256(file)}


# Cases


def by_signal(shared: Path, folder: Path, number: int, rng: random.Random, whole: float) -> Case:
    name = rng.choice(["SIGKILL", "SIGKILL", "SIGTERM", "SIGSTOP"])
    delay, victims = rng.uniform(0.05, 1.0) * whole, rng.choice(["one", "all"])
    case = Case("signal", f"{name} to {victims} after {delay:.1f} s", number)
    run = Run(shared, folder, number)
    time.sleep(delay)
    chosen = run.processes if victims == "all" else [rng.choice(run.processes)]
    chosen = [process for process in chosen if process.exitcode is None]
    for process in chosen:
        os.kill(process.pid, getattr(signal, name))
    if name == "SIGSTOP":
        time.sleep(3)
        for process in chosen:
            os.kill(process.pid, signal.SIGCONT)
    status = run.wait()
    allowed = {"SIGKILL": (0, -9), "SIGTERM": (0, command.ENDED, -15), "SIGSTOP": (0,)}[name]
    if status not in (*allowed, *((1,) if victims == "one" and number > 1 and name == "SIGKILL" else ())):
        case.problem = f"ended with status {status}"
    if log_of(folder).exists():
        if "Traceback" in log_of(folder).read_text(errors="replace"):
            case.problem = case.problem or "a traceback"
        log_of(folder).rename(folder.with_name(f"{folder.name}.first.log"))
    finish(shared, folder, number, case)
    return case


def flip_a_bit(file: Path, rng: random.Random) -> None:
    with file.open("r+b") as opened:
        place = rng.randrange(file.stat().st_size)
        opened.seek(place)
        byte = opened.read(1)[0]
        opened.seek(place)
        opened.write(bytes([byte ^ 1 << rng.randrange(8)]))


def truncate(file: Path, rng: random.Random) -> None:
    os.truncate(file, rng.randrange(file.stat().st_size))


def zero_a_page(file: Path, rng: random.Random) -> None:
    before = file.read_bytes()
    place = rng.randrange(max(1, len(before) - 4096))
    file.write_bytes(before[:place] + bytes(min(4096, len(before) - place)) + before[place + 4096 :] + b"\0")


def delete(file: Path, rng: random.Random) -> None:
    file.unlink()


def take_that_of_the_checkpoint_before(file: Path, rng: random.Random) -> None:
    newest = next(parent for parent in file.parents if parent.name.startswith("step_"))
    before = sorted(newest.parent.glob("step_*"))[-2]
    shutil.copy(before / file.relative_to(newest), file)


def swap_with_the_other_role(file: Path, rng: random.Random) -> None:
    if file.parent.name not in ("student", "critic"):
        file.write_text("{}")
        return
    other = file.parent.with_name("critic" if file.parent.name == "student" else "student") / file.name
    one, two = file.read_bytes(), other.read_bytes()
    file.write_bytes(two), other.write_bytes(one)


_DAMAGES = (flip_a_bit, truncate, zero_a_page, delete, take_that_of_the_checkpoint_before, swap_with_the_other_role)
DAMAGES = {each.__name__.replace("_", " "): each for each in _DAMAGES}


def by_damage(shared: Path, folder: Path, number: int, rng: random.Random, name: str) -> Case:
    """Damage a file of the newest checkpoint of a killed run that has several."""
    shutil.copytree(shared / f"killed-{number}", folder)
    newest = sorted((folder / "checkpoints").glob("step_*"))[-1]
    files = [path for path in sorted(newest.rglob("*")) if path.is_file() and path.suffix in (".json", ".safetensors")]
    file = rng.choice(files)
    DAMAGES[name](file, rng)
    case = Case("damage", f"{name}: {file.relative_to(newest)}", number)
    finish(shared, folder, number, case)
    if not any("left out" in line and newest.name in line for line in case.said):
        case.survived, case.problem = False, case.problem or "the log does not name the damaged checkpoint"
    return case


def by_full_disk(shared: Path, folder: Path, number: int, rng: random.Random, needed: int) -> Case:
    """Another program fills the disk (a tmpfs) during the run, and leaves room again before the run is resumed."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={2 * needed}", "tmpfs", str(folder)], check=True)
    try:
        run_folder = folder / "run"
        share = rng.uniform(0.02, 0.95)
        case = Case("full disk", f"room for {share:.0%} of what a run writes, after its first line of metrics", number)
        run = Run(shared, run_folder, number)
        while not (run_folder / "metrics.jsonl").exists() and run.at_work:
            time.sleep(0.02)
        filler = folder / "filler"
        fill(filler, shutil.disk_usage(folder).free - int(share * needed))
        status = run.wait()
        first = said(run_folder)
        if status == 0 and not (run_folder / "finished.json").exists():
            case.problem = "ended with status 0 but did not finish"
        if status not in (0, 1, 2) or (status and not any(line.startswith("error") for line in first)):
            case.problem = f"ended with status {status} and said {first}"
        filler.unlink()
        finish(shared, run_folder, number, case)
        return case
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def fill(filler: Path, size: int) -> None:
    """Write `size` bytes, or fewer if the disk is full before: the run writes too."""
    try:
        filler.write_bytes(bytes(max(0, size)))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise


# The command


def prepare(shared: Path) -> tuple[float, int]:
    """Make an undisturbed run and a killed one, with 1 and with 2 processes. Returns the longest run's seconds and the bytes
    that the largest one writes."""
    (shared / "prompts.txt").write_text("a red ring\na blue square\na big green cross\na yellow circle\n")
    seconds, written = 0.0, 0
    for number in (1, 2):
        began = time.monotonic()
        folder = shared / f"straight-{number}"
        if status := Run(shared, folder, number).wait():
            log = log_of(folder).read_text()[-2000:]
            raise RuntimeError(f"an undisturbed run ended with status {status}: {log}")
        seconds = max(seconds, time.monotonic() - began)
        written = max(written, sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))
        write_json(shared / f"weights-{number}.json", weights_of(folder))
        run = Run(shared, shared / f"killed-{number}", number)
        while len(list((shared / f"killed-{number}" / "checkpoints").glob("step_*"))) < 2:
            time.sleep(0.02)
        run.end(1)
    return seconds, written


def main(argv: list[str] | None = None) -> int:
    return command.run(_main, argv)


def _main(argv: list[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="python benchmarks/chaos.py", description=__doc__.split("\n")[0])
    parser.add_argument("--signals", type=command.whole(0), default=50, metavar="N", help="runs that get a signal")
    parser.add_argument("--damages", type=command.whole(0), default=30, metavar="N", help="damaged checkpoints")
    parser.add_argument("--full", type=command.whole(0), default=10, metavar="N", help="full disks (needs root)")
    parser.add_argument("--jobs", type=command.count, default=1, metavar="N", help="cases that run at a time")
    parser.add_argument("--seed", type=command.seed, default=0)
    parser.add_argument("--json", type=command.new_file, metavar="FILE", help="write the results and all messages")
    args = parser.parse_args(argv)
    if args.full and os.geteuid() != 0:
        raise command.ConfigError("--full mounts a tmpfs, which needs root; --full 0 leaves these cases out")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before the fork server starts: every run inherits it
    with tempfile.TemporaryDirectory(prefix="dpdmd-chaos-") as root:
        shared = Path(root)
        seconds, written = prepare(shared)
        print(f"a run takes {seconds:.0f} s and leaves {written / 1e6:.0f} MB; {args.jobs} cases at a time", flush=True)
        names = list(DAMAGES)
        jobs = [
            *(("signal", by_signal, seconds) for _ in range(args.signals)),
            *(("damage", by_damage, names[index % len(names)]) for index in range(args.damages)),
            *(("full disk", by_full_disk, written) for _ in range(args.full)),
        ]

        def attack(index: int) -> Case:
            kind, attacked, argument = jobs[index]
            folder = shared / f"case-{index:03d}"
            number = 1 + index % 2
            try:
                case = attacked(shared, folder, number, random.Random(f"{args.seed}-{index}"), argument)
            except Exception as error:  # a case that could not be carried out counts as lost
                case = Case(kind, "could not be carried out", number, problem=f"{error}")
            outcome = "survived" if case.survived else f"LOST: {case.problem}"
            print(f"{outcome}: {case.what}, {number} processes", flush=True)
            shutil.rmtree(folder, ignore_errors=True)
            return case

        with ThreadPoolExecutor(args.jobs) as pool:
            cases = list(pool.map(attack, range(len(jobs))))
    left = [path.name for path in Path("/dev/shm").glob("*deepspeed*")] if Path("/dev/shm").is_dir() else []
    table = {}
    for kind in dict.fromkeys(case.kind for case in cases):
        survived = [case.survived for case in cases if case.kind == kind]
        table[kind] = {"tried": len(survived), "survived": sum(survived)}
        print(f"{kind}: {sum(survived)} of {len(survived)} survived")
    if args.json is not None:
        typed = f"python benchmarks/chaos.py --signals {args.signals} --damages {args.damages} --full {args.full}"
        found = {**provenance(f"{typed} --seed {args.seed}"), "table": table, "left_in_shared_memory": left}
        write_json(args.json, {**found, "cases": [dataclasses.asdict(case) for case in cases]})
    return 0 if all(case.survived for case in cases) and not left else 1


if __name__ == "__main__":
    sys.exit(main())
