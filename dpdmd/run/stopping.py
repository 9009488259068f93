"""Ending a run from outside: SIGTERM, SIGINT (Ctrl-C) and SIGHUP.

During training a signal lets the update finish, a checkpoint is saved, and a line says how to go on. Before and after
training, and at a second SIGINT, the run ends at once. Output that cannot be written (`... | head -1`, a closed terminal)
counts as a signal.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TextIO

from dpdmd import command
from dpdmd.command import RunEnded
from dpdmd.engine.world import Launcher

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stop:
    """Handles the signals of this process inside a `with` block."""

    def __init__(self):
        self._received: int | None = None
        self._unwritten = ""
        self._interrupts = 0
        self._deferring = False
        self._alone = "RANK" not in os.environ  # read now: later every process has it
        self._launcher = Launcher()

    def __enter__(self) -> Stop:
        self._before, self._watch, self._streams = {}, None, (sys.stdout, sys.stderr)
        if threading.current_thread() is threading.main_thread():
            # Ignored signals stay ignored: SIGHUP under nohup, SIGINT in a shell's background jobs.
            taken = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
            if signal.SIGINT in taken:
                self._watch = _Interrupts()  # before the handler is set, so that it counts every SIGINT
            for number in taken:
                self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        sys.stdout, sys.stderr = self._streams
        if self._watch is not None:
            self._watch.close()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if kind is RunEnded and signal.SIGTERM in self._before:
            # When the first process ends, the launcher sends SIGTERM to the others, which would hide their status.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """In this block a signal only sets `requested`, and the caller ends the block. From here on, output that cannot be
        written also sets it, and is lost."""
        sys.stdout, sys.stderr = (stream and _Lasting(stream, self._note) for stream in self._streams)
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    @property
    def requested(self) -> bool:
        """Whether a signal arrived inside `deferred`, output could not be written, or the launcher has ended."""
        return self._received is not None or bool(self._unwritten) or self._launcher.gone

    @property
    def reason(self) -> str:
        """The reason to print; another process may have received the signal."""
        if self._received is not None:
            return signal.Signals(self._received).name
        if self._unwritten:
            return self._unwritten
        return "the launcher has ended" if self._launcher.gone else "a signal to another process"

    def _take(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1 and self._watch is not None:
            self._watch.thread.join()  # it ends the process
        if not self._deferring:
            raise RunEnded(f"{name}: ended; --resume goes on from the newest checkpoint, if there is one")
        first = self._received is None
        self._received = self._received or number  # first, as the next signal may interrupt this
        if first and os.environ.get("RANK", "0") == "0":
            # A launcher ends at the first Ctrl-C and does not forward a second one.
            more = " (a second Ctrl-C ends at once)" if number == signal.SIGINT and self._alone else ""
            _say(f"{name}: finishing the update, then saving a checkpoint{more}")

    def _note(self, problem: str) -> None:
        self._unwritten = self._unwritten or problem


class _Interrupts:
    """Ends the process at the second SIGINT, from a thread: Python's handlers never run while the main thread waits in a
    library, for example for a process that has gone."""

    def __init__(self):
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self.thread = threading.Thread(target=self._count, daemon=True, name="second interrupt")
        self.thread.start()

    def _count(self) -> None:
        seen = 0
        while numbers := os.read(self._read, 64):  # empty when closed
            seen += numbers.count(signal.SIGINT)
            if seen > 1:
                _say("second SIGINT: ended at once; --resume goes on from the newest checkpoint, if there is one")
                os._exit(128 + signal.SIGINT)  # does not wait for threads that write or GPUs that compute
        os.close(self._read)

    def close(self) -> None:
        signal.set_wakeup_fd(self._before)
        os.close(self._write)


class _Lasting:
    """A stream that drops output that cannot be written, and calls `note` with the reason."""

    def __init__(self, stream: TextIO, note: Callable[[str], None]):
        self._stream, self._note = stream, note

    def write(self, text: str) -> int:
        return self._trying(self._stream.write, text) or 0

    def flush(self) -> None:
        self._trying(self._stream.flush)

    def _trying(self, function: Callable[..., Any], *arguments: object) -> Any:
        try:
            return function(*arguments)
        except OSError as error:
            command.discard(self._stream)
            self._note(f"{self._stream.name.strip('<>')} takes no more ({error.strerror})")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _say(text: str) -> None:
    # Not print: the interrupted code may be in the middle of one.
    with contextlib.suppress(OSError):
        os.write(sys.stderr.fileno(), f"\n{text}\n".encode())
