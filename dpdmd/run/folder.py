"""The output folder of a run: whose it is, who may write there now, and what may be deleted.

A run marks its folder with MARK, a file that it keeps locked as long as it lives: one run at a time. Only a marked folder is
resumed or overwritten, and of its files only those that a run writes (OWN) are ever deleted.
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
# What it writes in a checkpoint's folder; see OWN.
OF_A_CHECKPOINT = (
    *("index.json", "confirmed", "suspect"),
    *(
        f"{role}/{unfinished}{file}.safetensors"
        for role in TRAINED
        for unfinished in ("", ".unfinished-")
        for file in (_RANK, f"{_RANK}_####")
    ),
)
# What a run writes in its folder, # for a digit (the last of several for one or more), in the order in which it is deleted:
# a process that is ended meanwhile leaves no checkpoint to go on from, and what says that a run was here last. Embeddings
# are not among them: they are keyed by content, and stay.
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
    """What in the folder has such a name."""
    form = _form(pattern)
    found = folder.glob(re.sub("#+", "*", pattern))
    return [path for path in found if form.fullmatch(path.relative_to(folder).as_posix())]


def _form(pattern: str) -> re.Pattern:
    digits = re.sub(r"(\\#)+", lambda match: f"[0-9]{{{len(match[0]) // 2},}}", fnmatch.translate(pattern))
    return re.compile(digits)


def check_place(folder: Path, embeddings: Path | str | None = None) -> None:
    """Raises ConfigError where a run cannot have its folder, or its embeddings theirs, as far as that shows without making
    them."""
    if problem := problem_of_place(folder) or _within_a_run(folder):
        raise ConfigError(f"run.output_dir = {str(folder)!r}: {problem}")
    if embeddings is not None and (problem := _within_a_run(Path(embeddings), folder)):
        raise ConfigError(f"prompts.cache_dir = {str(Path(embeddings))!r}: {problem}")


def _within_a_run(place: Path, *runs: Path) -> str | None:
    """That a folder would lie among what some run deletes in time, or None. runs: that have no mark yet."""
    place = place.resolve()
    marked = [above for above in place.parents if (above / MARK).is_file()]
    for run in (*(each.resolve() for each in runs), *marked):
        if place.is_relative_to(run) and place != run:
            name = place.relative_to(run).parts[0]
            if any(_form(top).fullmatch(name) for top in _TOP):
                return f"it lies in {name} of the run {run}, where runs write and delete: take another place"
    return None


class RunFolder:
    """The folder of one run, taken for this process as long as it lives.

    Raises ConfigError where taking it would lose something, where another run is at work in it, and where it cannot be
    written to.
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
                raise ConfigError(f"{name}: {each} in it cannot be read and written to, as a run does")
        holds = sorted({path.name for pattern in _TOP for path in matching(folder, pattern)}) if folder.is_dir() else []
        if holds and not marked:
            raise ConfigError(
                f"{name} holds {_list(holds)}, which a run would write over, and no {MARK}, by which a run marks what is its "
                "own: take another folder, or move them away; a copy of a run's folder needs that file too"
            )
        if holds and not (resume or overwrite):
            kind = "a finished run" if (folder / "finished.json").exists() else "an unfinished run"
            raise ConfigError(
                f"{name} holds {kind} ({_list(holds)}): give --resume to go on with it, --overwrite to delete it, or another "
                "run.output_dir"
            )
        if overwrite and (links := _links(folder)):
            raise ConfigError(
                f"{name}: {_list(links)} in it is a link, and --overwrite deletes nothing that lies elsewhere: remove the link, "
                "or take another folder"
            )
        self.fresh = not holds  # no run has written anything here yet
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
        """Deletes the run that is to be overwritten. To be called when nothing that can be known beforehand keeps the new one
        from running."""
        if self._overwrite:
            delete_own(self.path)

    @classmethod
    def held_elsewhere(cls, folder: Path) -> RunFolder:
        """For the processes beside the main one, which holds it for all."""
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
                f"{name}: another run is at work in it ({_describe(holder)}); wait until that has ended, or take another folder"
            ) from error
        self._lock = lock
        holder = {"process": os.getpid(), "machine": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.ftruncate(lock, 0)
        os.write(lock, (json.dumps(holder) + "\n").encode())

    def close(self) -> None:
        """Lets others take it."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _links(folder: Path) -> list[str]:
    """Links among the names and folders of a run, by way of which `delete_own` would come to what lies elsewhere."""
    tops = {path for name in _TOP for path in matching(folder, name)}
    folders = {parent for pattern in OWN for path in matching(folder, pattern) for parent in path.parents}
    found = (path for path in tops | folders if path != folder and path.is_relative_to(folder) and path.is_symlink())
    return sorted(str(path.relative_to(folder)) for path in found)


def _describe(holder: bytes) -> str:
    try:
        found = json.loads(holder)
        return f"process {found['process']} on {found['machine']}, since {found['since']}"
    except (ValueError, TypeError, KeyError, RecursionError):  # it is just about to write
        return "just started"


def _list(names: list[str]) -> str:
    return ", ".join(names[:6]) + ", ..." * (len(names) > 6)


def delete_own(folder: Path) -> None:
    """Deletes what runs have written in a marked folder, and folders that are empty then; everything else stays."""
    for pattern in OWN:
        for path in matching(folder, pattern):
            if path.is_file() or path.is_symlink():
                path.unlink(missing_ok=True)
    for name in _TOP:
        for top in matching(folder, name):
            if top.is_dir() and not top.is_symlink():
                for below in sorted((path for path in top.rglob("*") if path.is_dir()), reverse=True):
                    _remove_empty(below)
                _remove_empty(top)


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def check_space(folder: Path, checkpoint: int, at_once: int, student: int) -> None:
    """Raises ConfigError where the disk of an existing folder has no room for so many checkpoints at once, of so many bytes
    each, and for the exported student. What lies in the folder's checkpoints/ makes way for them."""
    there = sum(path.stat().st_size for path in (folder / "checkpoints").rglob("*") if path.is_file())
    needed = max(0, checkpoint * at_once - there) + student
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ConfigError(
            f"run.output_dir = {str(folder)!r}: {readable_bytes(free)} are free on its disk, and {readable_bytes(needed)} more "
            f"are needed, for {at_once} checkpoint{'s' * (at_once > 1)} of {readable_bytes(checkpoint)} at once "
            "(run.keep_checkpoints, the one that is being written and the last good one) and the exported student of "
            f"{readable_bytes(student)}"
        )


def free_name(path: Path) -> Path:
    """The path, or the first of path_2, path_3, ... that nobody has."""
    names = (path if number == 1 else path.with_name(f"{path.name}_{number}") for number in itertools.count(1))
    return next(each for each in names if not os.path.lexists(each))
