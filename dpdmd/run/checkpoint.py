"""Checkpoints: the state from which a run resumes.

checkpoints/step_000600/   student/ and critic/, each with a file of tensors for each process (shards.py), and index.json:
                           the files with size and SHA-256, what they hold, and the state of the run. The folder appears
                           when all of it is on the disk; nothing in it is pickled.
    confirmed, suspect     marks: the next update of each role after it was finite, or was not

No generator state is saved: every draw is a function of (seed, iteration, role, shard).
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
    REPLACED,
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

_NAME = re.compile(r"step_\d+")
_DELETED = ".deleted-"
_FORMAT, _VERSION = "dpdmd checkpoint", 1
_INDEX, _CONFIRMED, _SUSPECT = "index.json", "confirmed", "suspect"
_READERS = 4  # files that a process reads at a time: SHA-256 runs at about 1 GB/s on one core
_HOST_SHARE = 0.8  # largest share of the free host memory for copies of the state


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose index has been read, but whose files have not been verified."""

    path: Path
    index: dict[str, Any]

    @property
    def iteration(self) -> int:
        """Number of updates of both roles before it."""
        return self.index["iteration"]

    @property
    def state(self) -> dict[str, Any]:
        return self.index["state"]

    def layout(self, role: str) -> Layout:
        return Layout.from_json(self.index["processes"], self.index["parameters"][role])


# (path in the checkpoint, tensors, its entry in the index) of each file that a process writes.
_Files = list[tuple[str, dict[str, Tensor], dict[str, Any]]]


class Checkpoints:
    """The checkpoints of one run, in `folder`. The newest `keep` and the last good one are kept.

    identity: what must be the same when the run resumes (architectures, precision). config: stored in the index.
    background: `save` may copy the state to host memory and let a thread write it.
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
        self._host: dict[tuple[str, str], Tensor] = {}  # copies of the state, whose memory the next save uses again
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future | None = None
        # For each checkpoint of this run: roles whose next update is not known yet. Empty: it is good; None: it is not.
        self._awaited: dict[Path, set[str] | None] = {}
        self._spared: set[Path] = set()  # the run went on from it with other settings
        self._left_out: set[Path] = set()  # checkpoints that `find` could not use
        self.pauses: list[float] = []  # seconds that training waited for each save
        self.write_seconds: list[float] = []  # seconds that writing it took

    def use(self, config: Config) -> None:
        """Sets the configuration, without `auto`, for the checkpoints to come."""
        self._config = config.model_dump(mode="json")
        self._global_batch = global_batch(config, self._world.size)

    # Which exist

    def complete(self) -> list[Path]:
        """Checkpoints that have an index and were not left out, oldest first."""
        return [path for path in self._folders() if os.path.isfile(path / _INDEX) and path not in self._left_out]

    def _folders(self) -> list[Path]:
        """Everything that has a checkpoint's name, oldest first."""
        if not self._folder.is_dir():
            return []
        found = sorted(path for path in self._folder.iterdir() if _NAME.fullmatch(path.name))
        return sorted(found, key=_iteration)

    def last_good(self) -> Path | None:
        """The newest checkpoint after which the next update of each role was finite."""
        return next((path for path in reversed(self.complete()) if self._is_good(path)), None)

    def _is_good(self, path: Path) -> bool:
        return self._awaited.get(path) == set() or (path not in self._awaited and os.path.exists(path / _CONFIRMED))

    # Saving

    @property
    def failed(self) -> bool:
        """Whether writing in the background has failed: `wait` raises the error."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    def wait(self) -> None:
        """Waits until nothing is being written. Raises OSError on every process if writing failed."""
        writing, self._writing = self._writing, None
        if writing is not None:
            self.write_seconds.append(writing.result())
        self._mark()

    def close(self) -> None:
        """Waits until nothing is being written, raises nothing if that failed, and frees the copies."""
        self._writer.shutdown()
        for buffer in self._host.values():
            _unpin(buffer)
        self._host.clear()

    def save(self, iteration: int, networks: dict[str, Trained], state: dict[str, Any], *, last: bool = False) -> Path:
        """Saves the state after `iteration` updates; all processes call.

        Training waits until the previous checkpoint is written and the state is copied to host memory. last: no training
        follows, so the call returns when everything is written. Raises OSError and leaves older checkpoints as they are;
        the next `wait` or `save` raises errors of writing in the background.
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
                if networks[role].swaps:  # a group's tensors exist only during its turn of this loop
                    self._together(partial(self._write_file, final, name, tensors, iteration), main_only=False)
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
        self._awaited[final] = set(TRAINED)
        if copied:
            self._writing = self._writer.submit(self._write, final, files, contents)
        else:
            self.write_seconds.append(self._write(final, files, contents))
        self.pauses.append(time.perf_counter() - began)
        return final

    def summary(self) -> dict[str, list[float]]:
        """Seconds that training waited for each save, and that writing it took."""
        if not self.pauses:
            return {}
        return {"checkpoint_pause_seconds": self.pauses, "checkpoint_write_seconds": self.write_seconds}

    def _together(self, function: Callable[[], None], *, main_only: bool) -> None:
        """Calls a function on all processes or the main one. If it raises OSError on one, all raise it."""
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
        complete = self.complete()
        raise OSError(f"{problem}; the newest complete checkpoint is {complete[-1] if complete else 'none'}")

    def _prepare(self, final: Path) -> None:
        self.remove_unfinished()
        suspect = os.path.exists(final / _SUSPECT)
        left_out = not suspect and (final in self._left_out or not os.path.isfile(final / _INDEX))
        foreign = [] if left_out else _foreign(final)  # another user's may have been left out as unreadable
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
        """Whether host memory can hold a copy of the state of all processes of this machine; the same on every process."""
        if any(networks[role].swaps for role in TRAINED):
            return False
        if self._host:
            return True
        groups = (tensors for role in TRAINED for _, tensors in networks[role].state_groups())  # one at a time
        needed = sum(tensor.nbytes for tensors in groups for tensor in tensors.values())
        needed *= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        room = min(self._world.gather(_HOST_SHARE * available_memory() - needed)) > 0
        if not room:
            self._background = False
            if self._world.main:
                copy = f"a copy of the state ({readable_bytes(needed)} on this machine)"
                print(
                    f"checkpoints: the training waits while they are written, as host memory has no room for {copy}",
                    flush=True,
                )
        return room

    def _copy(self, file: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies of the tensors in host memory, complete after the device is synchronised."""
        copies = {}
        for name, tensor in tensors.items():
            key = file, name
            buffer = self._host.get(key)
            if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                buffer = self._host[key] = _host_memory(tensor)
            copies[name] = buffer.copy_(tensor, non_blocking=True)
        return copies

    def _write(self, final: Path, files: _Files, contents: dict[str, Any]) -> float:
        """Writes this process's files, then the index (`contents` and the files of all processes). Returns the seconds."""
        began = time.perf_counter()
        entries, problem = [], None
        try:
            for name, tensors, entry in files:
                if tensors:
                    self._write_file(final, name, tensors, contents["iteration"])
                path = self._unfinished(final) / name
                entries.append({**entry, "bytes": path.stat().st_size, "sha256": sha256(path)})
        except OSError as error:
            problem = str(error)
        found = self._world.gather_in_background((entries, problem))
        problem = next((each for _, each in found if each is not None), None)
        if problem is None:
            if self._world.main:
                try:
                    self._complete(final, {**contents, "files": [entry for entries, _ in found for entry in entries]})
                except OSError as error:
                    problem = str(error)
            problem = self._world.gather_in_background(problem)[0]
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
        """Deletes a checkpoint. Files in it that no run wrote stay, in a folder of another name."""
        self._awaited.pop(path, None)
        if foreign := _foreign(path):
            kept = _leave_out(path)
            for each in _own(kept):
                if each.is_symlink() or not each.is_dir():
                    remove(each)
            print(f"{path} is deleted but for {', '.join(foreign[:3])}: see {kept}", file=sys.stderr, flush=True)
            return
        # Renamed first, so that a half-deleted folder does not count as a checkpoint.
        deleted = path.with_name(_DELETED + path.name)
        remove(deleted, must=True)
        os.rename(path, deleted)
        remove(deleted)

    def remove_unfinished(self) -> None:
        """Deletes what a killed run left half-written or half-deleted."""
        for replaced in self._folder.glob(f"{REPLACED}step_*"):
            original = replaced.with_name(replaced.name.removeprefix(REPLACED))
            if not os.path.lexists(original):
                os.rename(replaced, original)
        for beginning in (UNFINISHED, _DELETED, REPLACED):
            for leftover in self._folder.glob(f"{beginning}step_*"):
                remove(leftover)

    # Which are good

    def judge(self, role: str, iteration: int, applied: bool) -> None:
        """Takes note of whether update number `iteration` (from 0) was applied."""
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
        """Writes the marks of checkpoints whose writing is complete."""
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
        """Never marks this checkpoint suspect: the run goes on from it with other settings, which may be the reason for
        updates that are not finite."""
        self._spared.add(path)

    def give_up(self) -> Path | None:
        """The last good checkpoint, after too many updates that were not finite. Marks later ones that this run saved or
        went on from as suspect, so that `--resume` leaves them out."""
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
        """The newest good checkpoint whose files all match its index; all processes call.

        Others are named on stderr and left where they are. Raises ConfigError if a run with another identity saved it.
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
        """(checkpoint, None), or (None, what is wrong with its index)."""
        try:
            index = read_json(path / _INDEX)
        except DamagedFile as error:
            return None, str(error)
        except OSError as error:
            return None, f"{path} is no checkpoint ({_INDEX}: {error.strerror or error})"
        if not isinstance(index, dict) or index.get("format") != _FORMAT:
            return None, f"{path / _INDEX} is not a checkpoint's"
        if index.get("version") != _VERSION:
            return None, f"{path} is a checkpoint of version {index.get('version')!r}, and this program's is {_VERSION}"
        digest = index.pop("sha256", None)
        if digest != _digest(index):
            return None, f"{path / _INDEX} is damaged: its content is not what was written"
        if problem := problem_of_index(index):
            return None, f"{path / _INDEX} is not a checkpoint's: {problem}"
        if index["iteration"] != _iteration(path):
            return None, f"{path} is the checkpoint of iteration {index['iteration']} under another name"
        if os.path.exists(path / _SUSPECT):
            return (
                None,
                f"{path} is not a good one: the updates after it were not finite (to use it, delete its {_SUSPECT})",
            )
        return Checkpoint(path, index), None

    def _verify(self, checkpoint: Checkpoint) -> str | None:
        """What is wrong with the files, or None; each process reads its share of them."""
        mine = checkpoint.index["files"][self._world.rank :: self._world.size]
        with ThreadPoolExecutor(_READERS) as readers:
            problems = list(readers.map(partial(_damage, checkpoint.path), mine))
        return next((each for share in self._world.gather(problems) for each in share if each is not None), None)

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
        """Restores weights and optimizer state, bit for bit on as many processes as saved them; all processes call.

        Raises ConfigError for other parameters and for NaN or infinity, OSError for a file that cannot be read.
        """
        for role in TRAINED:
            network = networks[role]
            layout, saved = network.layout(), checkpoint.layout(role)
            if layout.sizes != saved.sizes:
                name, _ = next(iter(layout.sizes.items() ^ saved.sizes.items()))
                raise ConfigError(f"--resume: {checkpoint.path} has other parameters of the {role}, such as {name}")
            source = SavedRole(checkpoint.path / role, saved)
            broken: list[str] = []  # names of tensors
            network.load(checkpoint.state["updates"][role], partial(self._group, source, layout, broken))
            if found := next((names[0] for names in self._world.gather(broken) if names), None):
                raise ConfigError(
                    f"--resume: {checkpoint.path} holds NaN or infinity in {found} of the {role}: move that folder away, and "
                    "--resume takes the checkpoint before it"
                )

    def _group(self, source: SavedRole, layout: Layout, broken: list[str], group: int) -> dict[str, Tensor]:
        """This process's part of a group; adds the names of tensors that are not finite to `broken`."""
        tensors = source.group(layout, self._world.rank, group)
        broken.extend(name for name, tensor in tensors.items() if not is_finite(tensor))
        return tensors


def _damage(folder: Path, entry: dict[str, Any]) -> str | None:
    """What is wrong with the file of an entry in the index, or None."""
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
    """Files in a checkpoint's folder with names that a run writes, the index first."""
    return [path for pattern in OF_A_CHECKPOINT for path in matching(folder, pattern)]


def _foreign(folder: Path) -> list[str]:
    """Paths in a checkpoint's folder that no run wrote."""
    if not folder.is_dir() or folder.is_symlink():
        return []
    ours = {*_own(folder), *(folder / role for role in TRAINED)}
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path not in ours)


def _leave_out(path: Path) -> Path:
    """Renames a folder or file with a checkpoint's name so that no run uses or deletes it."""
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
    """Adds the checkpoint to the message of an OSError."""
    try:
        yield
    except OSError as error:
        raise OSError(f"checkpoint {final} could not be written: {error}") from error


def available_memory(groups: Path = Path("/sys/fs/cgroup"), place: str | None = None) -> float:
    """Bytes of host memory that are free for this process: the machine's, or those below its job's limit.

    place: path of the process's control group below `groups`; None: read from /proc.
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
    """Host memory of a tensor's shape and dtype, pinned if the tensor is on a GPU, so that copies run at PCIe's rate."""
    buffer = torch.empty(tensor.shape, dtype=tensor.dtype)
    if tensor.is_cuda and tensor.numel() > 0:
        # Not pin_memory, whose allocator rounds up to a power of two.
        buffer.view(-1).view(torch.uint8).fill_(0)  # touches the pages with all threads before they are pinned
        with contextlib.suppress(RuntimeError):  # unpinned copies are slower, and right
            cudart: Any = torch.cuda.cudart()
            torch.cuda.check_error(int(cudart.cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0)))
    return buffer


def _unpin(buffer: Tensor) -> None:
    """Unpins a tensor of `_host_memory`."""
    with contextlib.suppress(RuntimeError):  # the GPU may have failed
        if buffer.is_pinned():
            torch.cuda.synchronize()  # a copy to it may be running
            cudart: Any = torch.cuda.cudart()
            cudart.cudaHostUnregister(buffer.data_ptr())


def _difference(key: str, saved: Any, now: Any) -> str:
    if isinstance(saved, dict) and isinstance(now, dict):
        for inner in sorted({*saved, *now}):
            if saved.get(inner) != now.get(inner):
                return _difference(f"{key}.{inner}", saved.get(inner), now.get(inner))
    return f"{key} = {saved!r}, and this run has {now!r}"


def global_batch(config: Config, num_processes: int) -> int:
    """Samples of one update on all processes together."""
    return config.engine.batch_size * config.engine.accumulation * num_processes


def checkpoint_bytes(config: Config, num_parameters: int) -> int:
    """Size of one checkpoint: float32 masters and two moments of student and critic, and the student's average."""
    states = [config.student_optimizer.state, config.critic_optimizer.state]
    each = sum(4 + STATE_BYTES[state] for state in states) + 4 * (config.ema is not None)
    return math.ceil(num_parameters * each)


def space_needed(config: Config, num_parameters: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """(bytes of a checkpoint, largest number of them at once, bytes of the exported student) for a student of that many
    parameters in dtype."""
    run = config.run
    made = 1 + (run.iterations // run.checkpoint_every if run.checkpoint_every else 0)
    # The kept ones, the one that is being written, and an older last good one.
    at_once = min(made, run.keep_checkpoints + 2)
    weight_bytes = 4 if config.lora else dtype.itemsize  # adapters are exported in float32
    return checkpoint_bytes(config, num_parameters), at_once, num_parameters * weight_bytes
