"""DeepSpeed's libraries that are compiled at their first use: report what happens, and remove the lock of a dead process.

torch keeps two processes from compiling into one folder by a file `lock` there. A process that was killed leaves it, and all
later ones would wait for ever, silently.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

LOOK = 0.5  # seconds between two looks at the lock
UNHELD = 3.0  # seconds without a holder before the lock is removed: torch creates the file before it opens it for good
_NETWORKED = ("nfs", "lustre", "gpfs", "ceph", "fuse", "cifs", "smb", "beegfs", "9p")


@contextlib.contextmanager
def compiling(library: str, what: str) -> Iterator[None]:
    """Wrap what may compile `library` (torch's name for it) or wait for another process that does. what: for messages.

    On a disk that other machines share, a lock that nobody here holds is named, not removed.
    """
    over = threading.Event()
    watcher = threading.Thread(target=_watch, args=(build_folder(library) / "lock", what, over), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def build_folder(library: str) -> Path:
    """Where torch compiles a library of this name."""
    from torch.utils.cpp_extension import _get_build_directory

    return Path(_get_build_directory(library, verbose=False))


def holder(lock: Path) -> int | None:
    """The process on this machine that has the file open, or None."""
    try:
        wanted = lock.stat()
    except OSError:
        return None
    for process in Path("/proc").glob("[0-9]*"):
        try:
            for descriptor in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    found = descriptor.stat()
                    if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
                        return int(process.name)
        except OSError:  # another user's, or it has ended
            continue
    return None


def _watch(lock: Path, what: str, over: threading.Event) -> None:
    told: set[object] = set()

    def say(key: object, text: str) -> None:
        if key not in told:
            told.add(key)
            print(text, file=sys.stderr, flush=True)

    unheld_since = None
    while not over.wait(LOOK):
        process = holder(lock)
        if process is not None or not lock.exists():
            unheld_since = None
            if process == os.getpid():
                say(process, f"compiling {what} into {lock.parent}, once (about a minute)")
            elif process is not None:
                say(process, f"waiting for process {process}, which is compiling {what} into {lock.parent}")
            continue
        now = time.monotonic()
        unheld_since = now if unheld_since is None else unheld_since
        if now - unheld_since < UNHELD:
            continue
        if _shared_with_other_machines(lock.parent):
            say(lock, f"waiting for {lock}: if no other machine is compiling {what}, delete that file to continue")
            continue
        with contextlib.suppress(OSError):
            lock.unlink()
        say(("removed", now), f"{lock} was left by a process that has ended: removed")
        unheld_since = None


def _shared_with_other_machines(folder: Path) -> bool:
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return True  # not Linux: holders cannot be seen either
    folder = folder.resolve()
    under = [(len(point), kind) for point, kind in mounts if folder.is_relative_to(point.replace("\\040", " "))]
    return bool(under) and max(under)[1].startswith(_NETWORKED)
