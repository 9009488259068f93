"""The output folder of a run: who may write to it, and which files may be deleted.

A run writes MARK into its folder and keeps that file locked, so that one run at a time uses the folder. Only a marked
folder is resumed or overwritten, and only files that a run writes (OWN) are ever deleted.
"""

from __future__ import annotations

import contextlib
import fcntl
import fnmatch
import itertools
import json
import os
import re
import shutil
import socket
import tempfile
import time
from pathlib import Path

from dpdmd.command import problem_of_place
from dpdmd.config import TRAINED, ConfigError
from dpdmd.files import readable_bytes

MARK = ".dpdmd-run.json"
_STEP, _RANK = "step_######", "rank_#####"
_STEPS = (_STEP, *(f".{kind}-{_STEP}" for kind in ("unfinished", "replaced", "deleted")))
_STEPS += (f"{_STEP}.left_out", f"{_STEP}.left_out_#")
_STUDENTS = ("student", f"student_{_STEP}", f"student_{_STEP}_#", ".unfinished-student", ".replaced-student")
# Files that a run writes in a checkpoint's folder; see OWN.
OF_A_CHECKPOINT = (
    *("index.json", "confirmed", "suspect"),
    *(
        f"{role}/{unfinished}{file}.safetensors"
        for role in TRAINED
        for unfinished in ("", ".unfinished-")
        for file in (_RANK, f"{_RANK}_####")
    ),
)
# Files that a run writes in its folder, # for a digit (the last # for one or more), in the order of their deletion: the
# indices of checkpoints first, so that an interrupted deletion leaves no checkpoint, and finished.json last, which shows that
# a run was here. Embeddings are keyed by content, and stay.
OWN = (
    *(f"checkpoints/{folder}/{name}" for name in OF_A_CHECKPOINT for folder in _STEPS),
    f"samples/{_STEP}.png",
    "evaluation/table.json",
    "evaluation/grid.png",
    "tensorboard/events.out.tfevents.#.*.#.#",
    *(
        f"{folder}/{name}"
        for folder in _STUDENTS
        for name in (
            *("config.json", "config.yaml", "dpdmd.json", "pytorch_lora_weights.safetensors"),
            *("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json"),
            "diffusion_pytorch_model-#####-of-#####.safetensors",
        )
    ),
    "metrics.jsonl",
    "config.yaml",
    "finished.json",
)
_FILES = ("metrics.jsonl", "config.yaml", "finished.json")
_FOLDERS = ("checkpoints", "samples", "evaluation", "tensorboard", "embeddings")
_TOP = tuple(dict.fromkeys(pattern.split("/")[0] for pattern in OWN))


def matching(folder: Path, pattern: str) -> list[Path]:
    """Paths in the folder that match a pattern of OWN."""
    form = _form(pattern)
    found = folder.glob(re.sub("#+", "*", pattern))
    return [path for path in found if form.fullmatch(path.relative_to(folder).as_posix())]


def _form(pattern: str) -> re.Pattern:
    return re.compile(re.sub(r"(\\#)+", lambda match: f"[0-9]{{{len(match[0]) // 2},}}", fnmatch.translate(pattern)))


def check_place(folder: Path, embeddings: Path | str | None = None) -> None:
    """Raises ConfigError if a run cannot use these folders, as far as can be told without creating them."""
    if problem := problem_of_place(folder) or _within_a_run(folder):
        raise ConfigError(f"run.output_dir = {str(folder)!r}: {problem}")
    if embeddings is not None and (problem := _within_a_run(Path(embeddings), folder)):
        raise ConfigError(f"prompts.cache_dir = {str(Path(embeddings))!r}: {problem}")


def _within_a_run(place: Path, *runs: Path) -> str | None:
    """A message if a folder lies where a run deletes files, or None. runs: folders of runs that have no mark yet."""
    place = place.resolve()
    marked = [above for above in place.parents if (above / MARK).is_file()]
    for run in (*(each.resolve() for each in runs), *marked):
        if place.is_relative_to(run) and place != run:
            name = place.relative_to(run).parts[0]
            if any(_form(top).fullmatch(name) for top in _TOP):
                return f"it lies in {name} of the run {run}, where runs write and delete: take another place"
    return None


class RunFolder:
    """The folder of one run, locked for this process until `close`.

    Raises ConfigError if files would be lost, if another run uses the folder, or if it cannot be written to.
    """

    def __init__(self, folder: Path, *, resume: bool = False, overwrite: bool = False):
        self.path = folder
        self._lock: int | None = None
        name = f"run.output_dir = {str(folder)!r}"
        check_place(folder)
        marked = (folder / MARK).is_file()
        if (folder / MARK).is_symlink():
            raise ConfigError(f"{name}: {MARK} in it is a link, and a run writes that file: remove the link")
        for each in _FILES:
            if os.path.lexists(folder / each) and not (folder / each).is_file():
                raise ConfigError(f"{name}: {each} in it is no file, and a run writes one: move it away")
        for each in _FOLDERS:
            if os.path.lexists(folder / each) and not (folder / each).is_dir():
                raise ConfigError(f"{name}: {each} in it is no folder, and a run makes one: move it away")
            if (folder / each).is_dir() and not os.access(folder / each, os.R_OK | os.W_OK | os.X_OK):
                raise ConfigError(f"{name}: {each} in it cannot be read and written to")
        holds = sorted({path.name for pattern in _TOP for path in matching(folder, pattern)}) if folder.is_dir() else []
        if holds and not marked:
            raise ConfigError(
                f"{name} holds {_list(holds)}, which a run would write over, and no {MARK}, so no run wrote them: take another "
                f"folder, or move them away (a copy of a run's folder needs its {MARK} too)"
            )
        if holds and not (resume or overwrite):
            kind = "a finished run" if (folder / "finished.json").exists() else "an unfinished run"
            raise ConfigError(
                f"{name} holds {kind} ({_list(holds)}): give --resume to go on with it, --overwrite to delete it, or another "
                "run.output_dir"
            )
        if overwrite and (links := _links(folder)):
            raise ConfigError(
                f"{name}: {_list(links)} in it is a link, and --overwrite deletes nothing outside the folder: remove the link, "
                "or take another folder"
            )
        self.fresh = not holds  # no run has written here yet
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=folder):
                pass
            self._take(name)
        except OSError as error:
            self.close()
            raise ConfigError(f"{name}: cannot be written to ({error.strerror or error})") from error
        self._overwrite = overwrite and marked

    def clear(self) -> None:
        """Deletes the run that is to be overwritten. Call it after all checks of the new one."""
        if self._overwrite:
            delete_own(self.path)

    @classmethod
    def held_elsewhere(cls, folder: Path) -> RunFolder:
        """The folder as processes other than the main one have it: without the lock."""
        taken = cls.__new__(cls)
        taken.path, taken.fresh, taken._lock, taken._overwrite = folder, False, None, False
        return taken

    def _take(self, name: str) -> None:
        lock = os.open(self.path / MARK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(lock, 4096)
            os.close(lock)
            raise ConfigError(
                f"{name}: another run is at work in it ({_describe(holder)}); wait until it has ended, or take another folder"
            ) from error
        self._lock = lock
        holder = {"process": os.getpid(), "machine": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.ftruncate(lock, 0)
        os.write(lock, (json.dumps(holder) + "\n").encode())

    def close(self) -> None:
        """Releases the lock."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _links(folder: Path) -> list[str]:
    """Links among a run's files and folders, through which `delete_own` would delete files elsewhere."""
    tops = {path for name in _TOP for path in matching(folder, name)}
    folders = {parent for pattern in OWN for path in matching(folder, pattern) for parent in path.parents}
    found = (path for path in tops | folders if path != folder and path.is_relative_to(folder) and path.is_symlink())
    return sorted(str(path.relative_to(folder)) for path in found)


def _describe(holder: bytes) -> str:
    try:
        found = json.loads(holder)
        return f"process {found['process']} on {found['machine']}, since {found['since']}"
    except (ValueError, TypeError, KeyError, RecursionError):  # it has not written the file yet
        return "just started"


def _list(names: list[str]) -> str:
    return ", ".join(names[:6]) + ", ..." * (len(names) > 6)


def delete_own(folder: Path) -> None:
    """Deletes the files that runs write in a marked folder, and folders that are then empty; everything else stays."""
    for pattern in OWN:
        for path in matching(folder, pattern):
            if path.is_file() or path.is_symlink():
                path.unlink(missing_ok=True)
    for name in _TOP:
        for top in matching(folder, name):
            if top.is_dir() and not top.is_symlink():
                folders = sorted((path for path in top.rglob("*") if path.is_dir()), reverse=True)
                for each in (*folders, top):
                    with contextlib.suppress(OSError):  # not empty
                        each.rmdir()


def check_space(folder: Path, checkpoint: int, at_once: int, student: int) -> None:
    """Raises ConfigError if the disk of an existing folder has no room for `at_once` checkpoints and the exported student,
    both in bytes. Files in the folder's checkpoints/ count as free: they will be deleted."""
    there = sum(path.stat().st_size for path in (folder / "checkpoints").rglob("*") if path.is_file())
    needed = max(0, checkpoint * at_once - there) + student
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ConfigError(
            f"run.output_dir = {str(folder)!r}: {readable_bytes(free)} are free on its disk, and {readable_bytes(needed)} more "
            f"are needed, for {at_once} checkpoint{'s' * (at_once > 1)} of {readable_bytes(checkpoint)} at once "
            "(run.keep_checkpoints, the one being written and the last good one) and the exported student of "
            f"{readable_bytes(student)}"
        )


def free_name(path: Path) -> Path:
    """The path, or the first of path_2, path_3, ... that does not exist."""
    names = (path if number == 1 else path.with_name(f"{path.name}_{number}") for number in itertools.count(1))
    return next(each for each in names if not os.path.lexists(each))
