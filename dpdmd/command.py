"""How a command of dpdmd ends: with one line for an error that the user can fix, with a traceback for a bug.

    status   on stderr
    0        nothing
    1        `error:` a line: the run stopped, or the machine refused something (a file, a full disk, memory)
    2        `error:` a line for each wrong setting, option or file; nothing was started
    75       a line that says how to go on, after SIGTERM or SIGHUP (in training also SIGINT)
    70       a traceback and a line that asks for a report: a bug of dpdmd
    130      `error: interrupted`, from the keyboard
    141      nothing: the reader of the output has gone (`... --dry-run | head -1`)

Every `main` calls `run`. If several processes fail alike, one prints the error; see `_say`. This module imports only the
standard library.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import logging
import os
import select
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import TypeVar

# A script of this folder has the folder first on sys.path, where it would hide an installed module named `kernels`. Every
# command imports this module first.
_HERE = str(Path(__file__).parent)
sys.path[:] = [path for path in sys.path if os.path.abspath(path) != _HERE]

BUG, ENDED = 70, 75  # EX_SOFTWARE and EX_TEMPFAIL of sysexits.h


class ConfigError(ValueError):
    """A configuration that cannot run; one line for each problem: the key, its value and what is allowed."""


class RunStopped(RuntimeError):
    """A run that cannot go on; the message says why and what was saved."""


class RunEnded(BaseException):
    """A run that was asked to end; the message says how to go on. A signal raises it at any line, so that it is no
    Exception: libraries do not catch it.

    agreed: all processes end with it, and the main one prints the message.
    """

    def __init__(self, message: str, agreed: bool = False):
        super().__init__(message)
        self.agreed = agreed


def run(function: Callable[..., int | None], *arguments: object) -> int:
    """Calls function(*arguments) and returns the exit status: the function's own, None for 0. SystemExit passes."""
    try:
        try:
            status = function(*arguments) or 0
        except SystemExit:
            _flush()  # what --help printed
            raise
        _flush()
        return status
    except KeyboardInterrupt:
        if _leads():  # the keyboard interrupts all processes
            _write("error: interrupted\n")
        return 130
    except RunEnded as error:
        if not error.agreed:
            _say(str(error), start="")
        elif _rank() == "0":
            _write(f"{error}\n")
        return ENDED
    except Exception as error:
        if isinstance(error, BrokenPipeError) and (_unread(sys.stdout) or _unread(sys.stderr)):
            return 141
        status, message = explain(error)
        _say(message, "".join(traceback.format_exception(error)) if status == BUG else "")
        return status
    finally:
        met(None)
        try:
            _flush()
        except OSError:  # else Python tries again at exit, and complains
            discard(sys.stdout)


def explain(error: BaseException) -> tuple[int, str]:
    """(exit status, message) of an exception; the message is one line, or one line a problem of a ConfigError."""
    if isinstance(error, ConfigError):
        return 2, str(error)
    if isinstance(error, RunStopped):
        return 1, one_line(error)
    if isinstance(error, OSError):
        return 1, _of_system(error)
    if _of_memory(error):
        found = one_line(error)[:300] or "Python's own"
        return 1, f"out of memory ({found}): a smaller batch needs less, and dpdmd plan says what fits"
    if isinstance(error, ModuleNotFoundError) and _not_installed(error):
        return 1, (
            f"the package {error.name!r} is not installed for {sys.executable}: activate the environment that has it "
            "(`. .venv/bin/activate` after make), or run pip install -e '.[train,eval]'"
        )
    encoding = getattr(sys.stdout, "encoding", None)
    if isinstance(error, UnicodeEncodeError) and error.encoding == encoding != "utf-8":
        return 1, f"stdout takes only {encoding}, which lacks a character of the output: set PYTHONIOENCODING=utf-8"
    # Gloo's and TCPStore's words for a process that has gone.
    lost = ("Connection closed by peer", "Connection reset by peer", "remote process exited")
    if _publish is not None and isinstance(error, RuntimeError) and any(words in str(error) for words in lost):
        return 1, (
            "another process of this run has ended: its error is the reason; if it printed none it was killed, for example "
            f"because memory ran out ({one_line(error)[:300]})"
        )
    return BUG, (
        f"{type(error).__name__}: {one_line(error)[:300]}: this is a bug of dpdmd; please report it, with the lines above, in "
        "the issue tracker of the repository that dpdmd came from"
    )


def one_line(text: object) -> str:
    return " ".join(str(text).split())


def _of_system(error: OSError) -> str:
    if error.filename is not None:
        names = [name for name in (error.filename, error.filename2) if name is not None]
        paths = [os.fsdecode(name) if isinstance(name, str | bytes | os.PathLike) else f"file {name}" for name in names]
        return one_line(f"{' -> '.join(paths)}: {error.strerror or type(error).__name__}")
    if not error.strerror:  # raised with a sentence, by dpdmd or a library
        return one_line(error) or type(error).__name__
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    ours = [frame for frame in frames if _OURS & {*Path(frame.filename).parents}]
    doing = f" (in {ours[-1].name}, line {ours[-1].lineno} of {ours[-1].filename})" if ours else ""
    return one_line(f"{error.strerror}{doing}")


_OURS = {Path(__file__).parent, Path(__file__).parents[1] / "benchmarks"}


def _of_memory(error: BaseException) -> bool:
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    # Torch's CPU allocator, and CUDA outside torch's allocator, raise a RuntimeError.
    return isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("DefaultCPUAllocator", "CUDA error: out of memory", "CUDA out of memory")
    )


def _not_installed(error: ModuleNotFoundError) -> bool:
    package = (error.name or "dpdmd").partition(".")[0]
    return package != "dpdmd" and importlib.util.find_spec(package) is None


def quieten() -> None:
    """Silences other libraries' progress bars and deprecation warnings."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # it warns of image processors
    deepspeeds = logging.getLogger("DeepSpeed")
    deepspeeds.setLevel(logging.WARNING)
    # "Untested" is our optimizer, whose update DeepSpeed does not run.
    deepspeeds.addFilter(lambda record: "untested optimizer" not in record.getMessage())
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    # Embeddings have no differentiable inputs; their weights' gradients are right (tests/engine/test_role.py).
    warnings.filterwarnings("ignore", message="Full backward hook is firing")


# Which of several processes prints an error

_PATIENCE = 10.0  # seconds
_publish: Callable[[str], bool] | None = None


def met(publish: Callable[[str], bool] | None) -> None:
    """Sets how a process learns whether to print: publish(text) is True if no process has printed this text yet. It must
    not need the other processes. None: the processes are not connected."""
    global _publish
    _publish = publish


def _say(message: str, details: str = "", start: str = "error") -> None:
    """Prints an error, or a message with another `start`, unless another process prints the same.

    Connected processes ask `publish`. Before they are connected, most errors concern all of them: the first process of
    each machine prints at once and ends, and the launcher ends the others while they wait. A process that fails alone
    outlives the wait and prints.
    """
    if _publish is not None:
        with contextlib.suppress(Exception):  # a process that cannot ask prints
            if not _publish(details + message):
                return
    elif start and not _leads():
        with contextlib.suppress(KeyboardInterrupt):
            time.sleep(_PATIENCE)
    rank = _rank()
    words = [each for each in (start, f"(process {rank})" if rank != "0" else "") if each]
    start = f"{' '.join(words)}: " if words else ""
    # The main process may have left a progress bar without a line end.
    begin = "" if rank == "0" else "\n"
    _write(begin + details + "".join(f"{start}{line}\n" for line in message.splitlines() or [""]))


def _rank() -> str:
    return os.environ.get("RANK") or "0"


def _leads() -> bool:
    """Whether this is the first process of this machine, or the only one: without RANK there is no launcher."""
    return not os.environ.get("RANK") or (os.environ.get("LOCAL_RANK") or os.environ["RANK"]) == "0"


# Streams whose reader may be gone


def _write(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        if sys.stderr is not None:
            encoding = sys.stderr.encoding or "utf-8"
            sys.stderr.write(text.encode(encoding, "backslashreplace").decode(encoding))
            sys.stderr.flush()


def _flush() -> None:
    if sys.stdout is not None and not sys.stdout.closed:
        sys.stdout.flush()


def _unread(stream) -> bool:
    """Whether a stream is a pipe without a reader."""
    try:
        watch = select.poll()
        watch.register(stream.fileno(), 0)
        return any(event & select.POLLERR for _, event in watch.poll(0))
    except (AttributeError, OSError, ValueError):  # no stream, or one without a file
        return False


def discard(stream) -> None:
    """Drops what the stream has buffered and all later output."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


# Signals and errors during the imports, before `run` is called


def _failed(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    absent = isinstance(error, ModuleNotFoundError) and _not_installed(error)
    if not absent and not isinstance(error, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
    elif _leads():
        _write(f"error: {explain(error)[1] if absent else 'interrupted'}\n")


def _end(number: int, frame: FrameType | None) -> None:
    if _leads():
        _write(f"{signal.Signals(number).name}: ended\n")
    os._exit(ENDED)


def answer_signals() -> None:
    """Installs handlers that end the process with the same lines and statuses as `run`."""
    sys.excepthook = _failed  # Python's own exit status is 130 or 1 as well
    for each in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(each) == signal.SIG_DFL:
            signal.signal(each, _end)


if _OURS & {*Path(getattr(sys.modules["__main__"], "__file__", None) or "/").resolve().parents}:
    answer_signals()  # a command of dpdmd runs; its other imports follow


# Types of command-line arguments, for argparse


def expand(path: str) -> str:
    """`path` with `~` or `~user` at its start replaced by the home folder, as the shell does not after `key=`; $VARIABLES
    stay. Raises ValueError for a name that no file can have, and for a user without a home folder."""
    if not path.strip():
        raise ValueError("it is empty, and names no file or folder")
    if any(character < " " or character == "\x7f" for character in path):
        raise ValueError("it holds a control character, which no file or folder here has in its name")
    expanded = os.path.expanduser(path)
    if path.startswith("~") and expanded == path:
        name = path.split("/")[0]
        raise ValueError(f"there is no home folder for {name}; for a folder of that name write ./{name}")
    return expanded


def location(text: str) -> str:
    """A path or a hub id."""
    try:
        return expand(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from error


def path(text: str) -> Path:
    return Path(location(text))


def new_file(text: str) -> Path:
    """A file to write, checked before the work whose result it is to hold."""
    file, problem = path(text), None
    if file.is_dir():
        problem = "it is a folder, and a file is needed"
    elif file.exists() and not file.is_file():
        problem = "it is a device or a pipe, and a file is needed"
    elif not file.parent.is_dir():
        problem = f"there is no folder {file.parent}"
    elif not os.access(file if file.exists() else file.parent, os.W_OK):
        problem = "it cannot be written to"
    if problem:
        raise argparse.ArgumentTypeError(f"{text!r}: {problem}")
    return file


def new_folder(text: str) -> Path:
    """A folder to write to, which need not exist."""
    folder = path(text)
    if problem := problem_of_place(folder):
        raise argparse.ArgumentTypeError(f"{text!r}: {problem}")
    return folder


def problem_of_place(folder: Path) -> str | None:
    """Why a folder cannot be written to or created, as far as can be told without creating it; else None."""
    there = next(each for each in (folder, *folder.absolute().parents) if os.path.lexists(each))
    if not there.is_dir():
        return f"{there} is no folder"
    return None if os.access(there, os.W_OK | os.X_OK) else f"{there} cannot be written to"


_Number = TypeVar("_Number", int, float)


def _number(kind: type[_Number], allowed: Callable[[_Number], bool], needed: str) -> Callable[[str], _Number]:
    def read(text: str) -> _Number:
        with contextlib.suppress(ValueError):
            if allowed(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"{text[:120]!r}: {needed} is needed")

    return read


def whole(low: int, end: int = 2**31) -> Callable[[str], int]:
    """A whole number in [low, end)."""
    return _number(int, lambda value: low <= value < end, f"a whole number from {low} to {end - 1}")


def within(low: float, high: float) -> Callable[[str], float]:
    """A number in [low, high]."""
    return _number(float, lambda value: low <= value <= high, f"a number from {low:g} to {high:g}")


above_0 = _number(float, lambda value: 0 < value < float("inf"), "a finite number above 0")
count = whole(1)
seed = whole(0, 2**63)  # as run.seed


class Parser(argparse.ArgumentParser):
    """For commands that run in several processes with the same arguments: the first of each machine prints what is wrong."""

    def error(self, message: str):
        if not _leads():
            raise SystemExit(2)
        super().error(message)
