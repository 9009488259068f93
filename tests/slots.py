"""What processes of one user share on a machine, by number: a byte of a file is locked while a process has the number.

The kernel unlocks what a process had when it ends, however it ends; a fork has nothing of its parent's. The files, which
stay empty, are in the folder for temporary files.
"""

from __future__ import annotations

import fcntl
import functools
import os
import tempfile


class Slots:
    """Of one name. A process opens each file once: closing a second opening would unlock what the first locked."""

    def __init__(self, name: str):
        path = os.path.join(tempfile.gettempdir(), f"dpdmd-tests-{os.getuid()}-{name}.lock")
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._mine: set[int] = set()

    def take(self, number: int) -> bool:
        """False where another process has the number, or this one already."""
        if number in self._mine:
            return False
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
        except OSError:
            return False
        self._mine.add(number)
        return True

    def give_back(self, number: int) -> None:
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, number)
        self._mine.remove(number)


@functools.cache
def slots(name: str) -> Slots:
    return Slots(name)
