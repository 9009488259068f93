"""What a run leaves on disk so that it can go on.

checkpoints/step_000600/   student/ and critic/, each with a file of tensors for each process (shards.py), and index.json: which
                           files there must be, each one's size and SHA-256, what they hold, and the state of the run. It
                           appears under its name when all of it has reached the disk; nothing in it is pickled.
    confirmed, suspect     what the updates after it showed: the next one of each role was finite, or not

No generator state is kept: every draw is a function of (seed, iteration, role, shard).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from dpdmd.config import TRAINED, Config, ConfigError
from dpdmd.engine.optimizer import STATE_BYTES
from dpdmd.engine.role import Trained
from dpdmd.engine.shards import Layout, SavedRole
from dpdmd.engine.world import World
from dpdmd.files import (
    UNFINISHED,
    DamagedFile,
    disk_errors,
    is_finite,
    publish,
    read_json,
    readable_bytes,
    remove,
    save_tensors,
    sha256,
    write_json,
)
from dpdmd.run.folder import OF_A_CHECKPOINT, free_name, matching
from dpdmd.run.index import problem_of_index

_NAME = re.compile(r"step_(\d+)")
_DELETED = ".deleted-"
_FORMAT, _VERSION = "dpdmd checkpoint", 1
_INDEX, _CONFIRMED, _SUSPECT = "index.json", "confirmed", "suspect"
_READERS = 4  # files of a process that are read at a time: SHA-256 takes a core at some 1 GB/s
_HOST_SHARE = 0.8  # of the memory that is free, what copies of the state may take


@dataclass(frozen=True)
class Checkpoint:
    """An index that has been read: what there is, not yet whether it is whole."""

    path: Path
    index: dict[str, Any]

    @property
    def iteration(self) -> int:
        """Updates of both roles that had been made."""
        return self.index["iteration"]

    @property
    def state(self) -> dict[str, Any]:
        return self.index["state"]

    def layout(self, role: str) -> Layout:
        return Layout.from_json(self.index["processes"], self.index["parameters"][role])


@dataclass
class _Job:
    """What one process writes of a checkpoint. files: path in the checkpoint, tensors, what the index says of it."""

    iteration: int
    files: list[tuple[str, dict[str, Tensor], dict[str, Any]]]
    contents: dict[str, Any]  # of the index, without the files


class Checkpoints:
    """The checkpoints of one run, in `folder`; the newest `keep` stay, and the last good one.

    identity: what must not change between saving and resuming (architectures, stages, precision). config: goes into the
    index. background: whether `save` may leave the writing to a thread, from a copy of the state in host memory.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        world: World,
        identity: dict[str, Any],
        config: Config,
        *,
        background: bool = True,
    ):
        self._folder = folder
        self._keep = keep
        self._world = world
        self._identity = json.loads(json.dumps(identity))
        self.use(config)
        self._background = background
        self._host: dict[tuple[str, str], Tensor] = {}  # what copies of the state are made in, kept for the next one
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future | None = None
        # Of each checkpoint since the start of the run: roles whose next update is to come. Empty: it is a good one; None: not.
        self._awaited: dict[Path, set[str] | None] = {}
        self._spared: set[Path] = set()  # the run went on from it with other settings
        self._left_out: set[Path] = set()  # of those that are there, what `find` could not take
        self.pauses: list[float] = []  # seconds that each save kept the training waiting
        self.write_seconds: list[float] = []  # and how long its writing took

    def use(self, config: Config) -> None:
        """The configuration of the checkpoints to come, all of it decided."""
        self._config = config.model_dump(mode="json")
        self._global_batch = global_batch(config, self._world.size)

    # What there is

    def complete(self) -> list[Path]:
        """Those that have an index and were not left out, oldest first."""
        return [path for path in self._folders() if os.path.isfile(path / _INDEX) and path not in self._left_out]

    def _folders(self) -> list[Path]:
        """All that bear a checkpoint's name."""
        if not self._folder.is_dir():
            return []
        found = [(int(match[1]), path) for path in self._folder.iterdir() if (match := _NAME.fullmatch(path.name))]
        return [path for _, path in sorted(found)]

    def newest(self) -> Path | None:
        return next(reversed(self.complete()), None)

    def last_good(self) -> Path | None:
        """The newest after which the next update of each role was finite."""
        return next((path for path in reversed(self.complete()) if self._is_good(path)), None)

    def _is_good(self, path: Path) -> bool:
        return self._awaited.get(path) == set() or (path not in self._awaited and os.path.exists(path / _CONFIRMED))

    # Saving

    @property
    def failed(self) -> bool:
        """Writing in the background has ended badly: `wait` raises the error."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    def wait(self) -> None:
        """Returns when nothing is being written any more. Raises OSError where that failed, on every process."""
        writing, self._writing = self._writing, None
        if writing is not None:
            self.write_seconds.append(writing.result())
        self._mark()

    def close(self) -> None:
        """Returns when nothing is being written any more, however that ended, and gives back the memory of the copies."""
        self._writer.shutdown()
        for buffer in self._host.values():
            _unpin(buffer)
        self._host.clear()

    def save(self, iteration: int, networks: dict[str, Trained], state: dict[str, Any], *, last: bool = False) -> Path:
        """Saves the state after `iteration` updates; all processes call.

        The training waits while the state is copied to host memory, and for the checkpoint before where that is still being
        written. last: nothing is to be trained meanwhile, so that all of it waits.
        Raises OSError, leaving older ones whole; of what goes wrong in the background, at the next `wait` or `save`.
        """
        began = time.perf_counter()
        self.wait()
        final = self._folder / f"step_{iteration:06d}"
        self._together(lambda: self._prepare(final), main_only=True)
        copied = self._background and not last and self._has_room(networks)
        files, parameters = [], {}
        for role in TRAINED:
            layout = networks[role].layout()
            parameters[role] = layout.groups
            for group, tensors in networks[role].state_groups():
                name = f"{role}/{layout.name(self._world.rank, group)}"
                tensors = self._copy(name, tensors) if copied else {key: x.cpu() for key, x in tensors.items()}
                entry = {"path": name, "role": role, "rank": self._world.rank, "group": group}
                if networks[role].swaps:  # a group's tensors are there while it has its turn
                    self._together(
                        lambda n=name, t=tensors, i=iteration: self._write_file(final, n, t, i), main_only=False
                    )
                    tensors = {}
                files.append((name, tensors, entry))
        if copied and self._world.device.type == "cuda":
            torch.cuda.synchronize()
        contents = {
            "format": _FORMAT,
            "version": _VERSION,
            "iteration": iteration,
            "processes": self._world.size,
            "global_batch": self._global_batch,
            "identity": self._identity,
            "parameters": parameters,
            "state": state,
            "config": self._config,
        }
        job = _Job(iteration, files, contents)
        self._awaited[final] = set(TRAINED)
        if copied:
            self._writing = self._writer.submit(self._write, final, job)
        else:
            self.write_seconds.append(self._write(final, job))
        self.pauses.append(time.perf_counter() - began)
        return final

    def summary(self) -> dict[str, list[float]]:
        """Seconds that each save kept the training waiting, and that its writing took."""
        return (
            {"checkpoint_pause_seconds": self.pauses, "checkpoint_write_seconds": self.write_seconds}
            if self.pauses
            else {}
        )

    def _together(self, function: Callable[[], None], *, main_only: bool) -> None:
        """Calls a function that may raise OSError, on all processes or the main one; the error is raised on all."""
        problem = None
        if self._world.main or not main_only:
            try:
                function()
            except OSError as error:
                problem = str(error)
        problem = next((each for each in self._world.gather(problem) if each is not None), None)
        if problem is not None:
            self._fail(problem)

    def _fail(self, problem: str) -> None:
        newest = self.newest()
        raise OSError(f"{problem}; the newest complete checkpoint is {newest or 'none'}")

    def _prepare(self, final: Path) -> None:
        self.remove_unfinished()
        suspect = os.path.exists(final / _SUSPECT)
        left_out = not suspect and (final in self._left_out or not os.path.isfile(final / _INDEX))
        foreign = [] if left_out else _foreign(final)  # what was left out may be another user's, and closed
        if os.path.lexists(final) and (left_out or foreign):
            kept = _leave_out(final)
            why = "was left out," if left_out else f"holds {foreign[0]}, which no run wrote,"
            print(f"{final} {why} and stays as {kept.name}", file=sys.stderr, flush=True)
        unfinished = self._unfinished(final)
        with disk_errors(final):
            for role in TRAINED:
                (unfinished / role).mkdir(parents=True)

    @staticmethod
    def _unfinished(final: Path) -> Path:
        return final.with_name(UNFINISHED + final.name)

    def _has_room(self, networks: dict[str, Trained]) -> bool:
        """Whether host memory holds a copy of the state of all processes of this machine; the same on every process."""
        if any(networks[role].swaps for role in TRAINED):
            return False
        if self._host:
            return True
        needed = sum(
            x.nbytes for role in TRAINED for _, tensors in networks[role].state_groups() for x in tensors.values()
        )
        needed *= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        room = min(self._world.gather(_HOST_SHARE * available_memory() - needed)) > 0
        if not room:
            self._background = False
            if self._world.main:
                print(
                    f"checkpoints: the training waits while they are written, as host memory has no room for a copy of "
                    f"the state ({readable_bytes(needed)} on this machine)",
                    flush=True,
                )
        return room

    def _copy(self, file: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors in host memory, complete when the device has been waited for."""
        copies = {}
        for name, tensor in tensors.items():
            key = file, name
            buffer = self._host.get(key)
            if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                buffer = self._host[key] = _host_memory(tensor)
            copies[name] = buffer.copy_(tensor, non_blocking=True)
        return copies

    def _write(self, final: Path, job: _Job) -> float:
        """Writes this process's files and, on the main process when all have, the index. Returns the seconds that it took."""
        began = time.perf_counter()
        entries, problem = [], None
        try:
            for name, tensors, entry in job.files:
                if tensors:
                    self._write_file(final, name, tensors, job.iteration)
                path = self._unfinished(final) / name
                entries.append({**entry, "bytes": path.stat().st_size, "sha256": sha256(path)})
        except OSError as error:
            problem = str(error)
        found = self._world.gather_in_background((entries, problem))
        problem = next((each for _, each in found if each is not None), None)
        if problem is None and self._world.main:
            try:
                self._complete(final, {**job.contents, "files": [entry for entries, _ in found for entry in entries]})
            except OSError as error:
                problem = str(error)
        problem = self._world.gather_in_background(problem)[0] if problem is None or self._world.size == 1 else problem
        return self._end(final, problem, began)

    def _end(self, final: Path, problem: str | None, began: float) -> float:
        if problem is not None:
            if self._world.main:
                remove(self._unfinished(final))
            self._fail(problem)
        return time.perf_counter() - began

    def _write_file(self, final: Path, name: str, tensors: dict[str, Tensor], iteration: int) -> None:
        role = name.partition("/")[0]
        with _named(final):
            save_tensors(
                self._unfinished(final) / name,
                tensors,
                {"format": _FORMAT, "role": role, "rank": str(self._world.rank), "iteration": str(iteration)},
            )

    def _complete(self, final: Path, contents: dict[str, Any]) -> None:
        unfinished = self._unfinished(final)
        with _named(final):
            write_json(unfinished / _INDEX, {**contents, "sha256": _digest(contents)})
            publish(unfinished, final)
        self._left_out.discard(final)
        good = self.last_good()
        for old in self.complete()[: -self._keep]:
            if old != good:
                self._delete(old)

    def _delete(self, path: Path) -> None:
        """What else lies in it stays, in a folder of another name."""
        if foreign := _foreign(path):
            kept = _leave_out(path)
            for each in _own(kept):
                if each.is_symlink() or not each.is_dir():
                    remove(each)
            print(f"{path} is deleted but for {', '.join(foreign[:3])}: see {kept}", file=sys.stderr, flush=True)
            self._awaited.pop(path, None)
            return
        # Under another name first: what is half deleted is no checkpoint any more.
        deleted = path.with_name(_DELETED + path.name)
        remove(deleted)
        if os.path.lexists(deleted):
            raise OSError(f"{deleted}, which is left of an earlier one, cannot be deleted")
        os.rename(path, deleted)
        remove(deleted)
        self._awaited.pop(path, None)

    def remove_unfinished(self) -> None:
        """Deletes what a killed run left half-written or half-deleted."""
        for replaced in self._folder.glob(".replaced-step_*"):
            original = replaced.with_name(replaced.name.removeprefix(".replaced-"))
            if not os.path.lexists(original):
                os.rename(replaced, original)
        for beginning in (UNFINISHED, _DELETED, ".replaced-"):
            for leftover in self._folder.glob(beginning + "step_*"):
                remove(leftover)

    # Which are good

    def judge(self, role: str, iteration: int, applied: bool) -> None:
        """Learns what became of the update number `iteration` (from 0)."""
        for path, awaited in list(self._awaited.items()):  # the writer's thread deletes
            if awaited and role in awaited and _iteration(path) <= iteration:
                if applied:
                    awaited.discard(role)
                elif path in self._spared:
                    self._awaited.pop(path, None)
                else:
                    self._awaited[path] = None
        self._mark()

    def _mark(self) -> None:
        """Writes down what is known, of those that have their name already."""
        if not self._world.main:
            return
        for path, awaited in list(self._awaited.items()):  # the writer's thread deletes
            name = _SUSPECT if awaited is None else _CONFIRMED
            if not awaited and path.is_dir() and not os.path.exists(path / name):
                with contextlib.suppress(OSError):  # the next one tries again
                    (path / name).touch()
                    other = _CONFIRMED if awaited is None else _SUSPECT
                    (path / other).unlink(missing_ok=True)

    def spare(self, path: Path) -> None:
        """The run goes on from this one with other settings than those it was saved with: updates that are not finite then
        say nothing against it."""
        self._spared.add(path)

    def give_up(self) -> Path | None:
        """After too many updates that were not finite: the last good checkpoint. `--resume` will leave out those that this
        run saved, or went on from, after it."""
        self.wait()
        good = self.last_good()
        for path in self.complete():
            judged = path in self._awaited and path not in self._spared
            if judged and (good is None or _iteration(path) > _iteration(good)):
                self._awaited[path] = None
        self._mark()
        self._world.barrier()
        return good

    # Loading

    def find(self) -> Checkpoint | None:
        """The newest checkpoint that is whole, every file of it read and compared with the index; all processes call.

        One that is damaged, no checkpoint of this program's, or not a good one is named on stderr and left where it is.
        Raises ConfigError where it was saved by a run of another architecture or precision.
        """
        if self._world.main and self._folder.is_dir():
            self.remove_unfinished()
        self._world.barrier()
        for path in reversed(self._world.on_main(self._folders)):
            checkpoint, problem = self._world.on_main(self._read, path)
            if problem is None:
                problem = self._verify(checkpoint)
            if problem is None:
                self._check_identity(checkpoint)
                confirmed = self._world.on_main(os.path.exists, path / _CONFIRMED)
                self._awaited[path] = set() if confirmed else set(TRAINED)
                return checkpoint
            self._left_out.add(path)
            if self._world.main:
                print(f"--resume: {problem}; {path.name} is left out", file=sys.stderr, flush=True)
        return None

    def _read(self, path: Path) -> tuple[Checkpoint | None, str | None]:
        """The index, or what is wrong with it."""
        try:
            index = read_json(path / _INDEX)
        except DamagedFile as error:
            return None, str(error)
        except OSError as error:
            return None, f"{path} is no checkpoint ({_INDEX}: {error.strerror or error})"
        if not isinstance(index, dict) or index.get("format") != _FORMAT:
            return None, f"{path / _INDEX} is not that of a checkpoint"
        if index.get("version") != _VERSION:
            return None, f"{path} is a checkpoint of version {index.get('version')!r}, and this program's is {_VERSION}"
        digest = index.pop("sha256", None)
        if digest != _digest(index):
            return None, f"{path / _INDEX} is damaged: its content is not what was written"
        if problem := problem_of_index(index):
            return None, f"{path / _INDEX} is not that of a checkpoint: {problem}"
        if index["iteration"] != _iteration(path):
            return None, f"{path} is the checkpoint of iteration {index['iteration']} under another name"
        if os.path.exists(path / _SUSPECT):
            return None, (
                f"{path} is not a good one: the updates after it were not finite (without its file {_SUSPECT} it would be taken "
                "all the same)"
            )
        return Checkpoint(path, index), None

    def _verify(self, checkpoint: Checkpoint) -> str | None:
        """What is wrong with the files, None where nothing is; each process reads its part of them."""
        mine = checkpoint.index["files"][self._world.rank :: self._world.size]
        with ThreadPoolExecutor(_READERS) as readers:
            problems = list(readers.map(partial(_damage, checkpoint.path), mine))
        found = [each for of_process in self._world.gather(problems) for each in of_process if each is not None]
        return next(iter(found), None)

    def _check_identity(self, checkpoint: Checkpoint) -> None:
        identity = checkpoint.index["identity"]
        for key in {**identity, **self._identity}:
            saved, now = identity.get(key), self._identity.get(key)
            if saved != now:
                raise ConfigError(
                    f"--resume: {checkpoint.path} was saved with {_difference(key, saved, now)}. "
                    "Resume with what it was saved with, or start a new run (another run.output_dir)"
                )

    def load(self, checkpoint: Checkpoint, networks: dict[str, Trained]) -> None:
        """Restores weights and optimizer state, bit for bit on the number of processes that saved them; all processes call.

        Raises ConfigError where the parameters are others or hold NaN or infinity, OSError for a file that cannot be read.
        """
        for role in TRAINED:
            network = networks[role]
            layout, saved = network.layout(), checkpoint.layout(role)
            if layout.sizes != saved.sizes:
                different = next(iter(layout.sizes.items() ^ saved.sizes.items()))[0]
                raise ConfigError(
                    f"--resume: {checkpoint.path} has other parameters of the {role} than this run, such as {different}"
                )
            source = SavedRole(checkpoint.path / role, saved)
            broken: list[str] = []  # names of tensors
            network.load(checkpoint.state["updates"][role], partial(self._group, source, layout, broken))
            if found := next((names[0] for names in self._world.gather(broken) if names), None):
                raise ConfigError(
                    f"--resume: {checkpoint.path} holds NaN or infinity in {found} of the {role}: move that folder away, and "
                    "--resume goes on from the one before"
                )

    def _group(self, source: SavedRole, layout: Layout, broken: list[str], group: int) -> dict[str, Tensor]:
        """This process's part; `broken` receives the names of tensors that are not finite."""
        tensors = source.group(layout, self._world.rank, group)
        broken.extend(name for name, tensor in tensors.items() if not is_finite(tensor))
        return tensors


def _damage(folder: Path, entry: dict[str, Any]) -> str | None:
    """What is wrong with one file of a checkpoint, by its entry in the index."""
    file = folder / entry["path"]
    try:
        size = file.stat().st_size
        if size != entry["bytes"]:
            return f"{file} is damaged: it has {size} bytes, and {entry['bytes']} were written"
        if sha256(file) != entry["sha256"]:
            return f"{file} is damaged: its content is not what was written (SHA-256)"
    except OSError as error:
        return f"{file} is damaged: it cannot be read ({error.strerror or error})"
    return None


def _own(folder: Path) -> list[Path]:
    """What has a name that a run gives in a checkpoint's folder, the index first; not the folders of the roles."""
    return [path for pattern in OF_A_CHECKPOINT for path in matching(folder, pattern)]


def _foreign(folder: Path) -> list[str]:
    """What lies in a checkpoint's folder that no run wrote."""
    if not folder.is_dir() or folder.is_symlink():
        return []
    ours = {*_own(folder), *(folder / role for role in TRAINED)}
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path not in ours)


def _leave_out(path: Path) -> Path:
    """Gives what lies under a checkpoint's name another one, under which no run takes it or deletes it."""
    kept = free_name(path.with_name(f"{path.name}.left_out"))
    with disk_errors(path):
        os.rename(path, kept)
    return kept


def _iteration(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _digest(contents: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def _named(final: Path):
    """An error of the disk that names the checkpoint beside the file."""
    try:
        yield
    except OSError as error:
        raise OSError(f"checkpoint {final} could not be written: {error}") from error


def available_memory(groups: Path = Path("/sys/fs/cgroup"), place: str | None = None) -> float:
    """Bytes of host memory that are free for this process: the machine's, or what the limit of its job leaves.

    place: of the process's control group below `groups`; None: as the kernel says.
    """
    free = float(psutil.virtual_memory().available)
    with contextlib.suppress(OSError):
        if place is None:
            place = Path("/proc/self/cgroup").read_text().splitlines()[-1].rpartition(":")[2]
        group = groups / place.strip("/")
        while group != groups and groups in group.parents:
            with contextlib.suppress(OSError, ValueError):  # "max": no limit here
                free = min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
            group = group.parent
    return free


def _host_memory(tensor: Tensor) -> Tensor:
    """Host memory of a tensor's shape and dtype, pinned where the tensor is on a GPU: copies run at PCIe's rate."""
    buffer = torch.empty(tensor.shape, dtype=tensor.dtype)
    if tensor.is_cuda and tensor.numel() > 0:
        # Not torch's own allocator, which takes the next power of two.
        buffer.view(-1).view(torch.uint8).fill_(0)  # all threads together: the pages are there before they are pinned
        with contextlib.suppress(RuntimeError):  # without it copies are slower, and right
            cudart: Any = torch.cuda.cudart()
            torch.cuda.check_error(int(cudart.cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0)))
    return buffer


def _unpin(buffer: Tensor) -> None:
    """What a tensor of `_host_memory` needs before its memory is free again."""
    with contextlib.suppress(RuntimeError):  # of a GPU that has failed
        if buffer.is_pinned():
            torch.cuda.synchronize()  # a copy to it may be under way
            cudart: Any = torch.cuda.cudart()
            cudart.cudaHostUnregister(buffer.data_ptr())


def _difference(key: str, saved: Any, now: Any) -> str:
    if isinstance(saved, dict) and isinstance(now, dict):
        for inner in sorted({*saved, *now}):
            if saved.get(inner) != now.get(inner):
                return _difference(f"{key}.{inner}", saved.get(inner), now.get(inner))
    return f"{key} = {saved!r}, and this run has {now!r}"


def global_batch(config: Config, num_processes: int) -> int:
    """Samples of one update, of all processes together."""
    return config.engine.batch_size * config.engine.accumulation * num_processes


def checkpoint_bytes(config: Config, num_parameters: int) -> int:
    """Size of one checkpoint: float32 masters and two moments of student and critic; the student's average."""
    states = [config.student_optimizer.state, config.critic_optimizer.state]
    each = sum(4 + STATE_BYTES[state] for state in states) + 4 * (config.ema is not None)
    return math.ceil(num_parameters * each)


def space_needed(config: Config, num_parameters: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Bytes of a checkpoint, how many there are at once at most, bytes of the exported student. num_parameters: the
    student's, which computes in dtype."""
    run = config.run
    made = 1 + (run.iterations // run.checkpoint_every if run.checkpoint_every else 0)
    # Those that are kept, the one that is being written, and the last good one where it is older than those.
    at_once = min(made, run.keep_checkpoints + 2)
    weight_bytes = 4 if config.lora else dtype.itemsize  # adapters are exported as their masters are
    return checkpoint_bytes(config, num_parameters), at_once, num_parameters * weight_bytes
