"""A file opened for reading without waiting."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def open_file(path: str | Path, buffering: int = -1) -> Iterator[IO[bytes]]:
    """A regular file's bytes. Raises OSError for any other: a pipe or a device can keep its reader waiting for ever."""
    with open(path, "rb", buffering, opener=_at_once) as file:
        mode = os.fstat(file.fileno()).st_mode
        if not stat.S_ISREG(mode):
            kind = "pipe" if stat.S_ISFIFO(mode) else "device"
            raise OSError(errno.EINVAL, f"a {kind}, where a file is needed", str(path))
        yield file


def _at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # else opening a pipe waits for somebody who writes to it
