"""Ending a run from outside: SIGTERM, SIGINT (Ctrl-C) and SIGHUP.

While it trains a run does not end at once: it finishes the update, saves a checkpoint and says how to go on. Before and after
that it ends at once, as there is nothing to save. A second SIGINT always ends it at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from dpdmd.command import RunEnded
from dpdmd.world import Launcher

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))


class Stop:
    """Takes the signals of this process while the block of `with` runs."""

    def __init__(self):
        self._received: int | None = None
        self._interrupts = 0
        self._deferring = False
        self._launcher = Launcher()

    def __enter__(self) -> Stop:
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                # nohup has SIGHUP ignored, and a shell SIGINT for what it starts in the background: that stays so.
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if kind is RunEnded and signal.SIGTERM in self._before:
            # The launcher ends the others as soon as the first process has ended, which would hide their status.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside the block a signal is only noted: `requested` says so, and who runs the block ends it."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    @property
    def requested(self) -> bool:
        """A signal was received inside `deferred`, or the launcher of this process has ended."""
        return self._received is not None or self._launcher.gone

    @property
    def reason(self) -> str:
        """What to tell the user; another process may have received the signal."""
        if self._received is not None:
            return signal.Signals(self._received).name
        return "the launcher has ended" if self._launcher.gone else "a signal to another process"

    def _take(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            _say(f"second {name}: ended at once; --resume goes on from the newest checkpoint")
            os._exit(128 + number)  # threads that write, and GPUs that compute, are not waited for
        if not self._deferring:
            raise RunEnded(f"{name}: ended; --resume goes on from the newest checkpoint, if there is one")
        first = self._received is None
        self._received = self._received or number  # before anything else: the next signal may interrupt this
        if first and os.environ.get("RANK", "0") == "0":
            _say(f"{name}: finishing the update, then saving a checkpoint (a second Ctrl-C ends at once)")


def _say(text: str) -> None:
    # Straight to the file: the interrupted code may be in the middle of a print.
    with contextlib.suppress(OSError):
        os.write(sys.stderr.fileno(), f"\n{text}\n".encode())
