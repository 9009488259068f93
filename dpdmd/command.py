"""How a command of dpdmd ends: with a line for what its user can put right, with a traceback for a bug of ours.

    status   on stderr
    0        nothing
    1        `error:` a line: the run stopped, or the machine refused something (a file, a full disk, memory)
    2        `error:` a line for each thing that is wrong with a setting, an option or a file; nothing was started
    75       a line: it was asked to end (SIGTERM, SIGHUP; a run that trains also by SIGINT), and how to go on
    70       a traceback and a line that asks for a report: a bug of dpdmd
    130      `error: interrupted`, from the keyboard
    141      nothing: whoever read the output has gone (`... --dry-run | head -1`)

`run` holds this for every `main`. Of several processes that fail alike one speaks, and none that fails alone is silent:
see `_say`. This module imports nothing of dpdmd, and nothing but Python's own library, so that everybody may use it.
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

# A file of this folder that is run as a script has the folder first on sys.path, where its modules would hide installed
# ones of their names (kernels). Every command imports this module first.
_HERE = str(Path(__file__).parent)
sys.path[:] = [path for path in sys.path if os.path.abspath(path) != _HERE]

BUG, ENDED = 70, 75  # EX_SOFTWARE and EX_TEMPFAIL of sysexits.h


class ConfigError(ValueError):
    """A configuration that cannot be run; a line for each problem says which key, what it got and what is allowed."""


class RunStopped(RuntimeError):
    """A run that cannot go on; the message says why and what is left of it."""


class RunEnded(BaseException):
    """A run that was asked to end; the message says how to go on. A signal raises it wherever the program is: like
    KeyboardInterrupt it passes what others catch.

    agreed: all processes end with it, of which the main one speaks.
    """

    def __init__(self, message: str, agreed: bool = False):
        super().__init__(message)
        self.agreed = agreed


def run(function: Callable[..., int | None], *arguments: object) -> int:
    """The status to exit with after function(*arguments), which returns its own or None for 0. SystemExit passes."""
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
        elif _number() == "0":
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
        except OSError:  # Python would try again at its end, and complain
            discard(sys.stdout)


def explain(error: BaseException) -> tuple[int, str]:
    """The status that an exception ends with, and what is said of it: one line, of a ConfigError one a problem."""
    if isinstance(error, ConfigError):
        return 2, str(error)
    if isinstance(error, RunStopped):
        return 1, _line(error)
    if isinstance(error, OSError):
        return 1, _of_system(error)
    if _of_memory(error):
        found = _line(error)[:300] or "Python's own"
        return 1, f"out of memory ({found}): a smaller batch needs less, and python -m dpdmd.plan says what fits"
    if isinstance(error, ModuleNotFoundError) and _not_installed(error):
        return 1, (
            f"the package {error.name!r} is not installed for {sys.executable}: activate the environment that has it "
            "(`. .venv/bin/activate` after make), or pip install -e '.[train,eval]', which brings all that is used"
        )
    if isinstance(error, UnicodeEncodeError) and error.encoding == getattr(sys.stdout, "encoding", None) != "utf-8":
        return (
            1,
            f"stdout takes {error.encoding} alone, which lacks a character of the output: set PYTHONIOENCODING=utf-8",
        )
    if _publish is not None and _of_a_peer(error):
        return 1, (
            "another process of this run has ended: what it said is the reason; where it said nothing it was killed, as for "
            f"want of memory ({_line(error)[:300]})"
        )
    return BUG, (
        f"{type(error).__name__}: {_line(error)[:300]}: this is a bug of dpdmd; please report it, with the lines above, in "
        "the issue tracker of the repository that dpdmd came from"
    )


def _line(error: object) -> str:
    return " ".join(str(error).split())


def _of_system(error: OSError) -> str:
    if error.filename is not None:
        names = [name for name in (error.filename, error.filename2) if name is not None]
        paths = [os.fsdecode(name) if isinstance(name, str | bytes | os.PathLike) else f"file {name}" for name in names]
        return _line(f"{' -> '.join(paths)}: {error.strerror or type(error).__name__}")
    if not error.strerror:  # its message is a sentence of ours, or of a library
        return _line(error) or type(error).__name__
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    ours = [frame for frame in frames if _OURS & {*Path(frame.filename).parents}]
    doing = f" (in {ours[-1].name}, line {ours[-1].lineno} of {ours[-1].filename})" if ours else ""
    return _line(f"{error.strerror}{doing}")


_OURS = {Path(__file__).parent, Path(__file__).parents[1] / "benchmarks"}


def _of_memory(error: BaseException) -> bool:
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    # Torch's allocator on the CPU, and CUDA outside torch's allocator, raise a RuntimeError.
    return isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("DefaultCPUAllocator", "CUDA error: out of memory", "CUDA out of memory")
    )


def _not_installed(error: ModuleNotFoundError) -> bool:
    package = (error.name or "dpdmd").partition(".")[0]
    return package != "dpdmd" and importlib.util.find_spec(package) is None


def _of_a_peer(error: BaseException) -> bool:
    words = ("Connection closed by peer", "Connection reset by peer", "remote process exited")
    return isinstance(error, RuntimeError) and any(each in str(error) for each in words)


def quieten() -> None:
    """Keeps what is nobody's concern here out of the output: other libraries' progress bars and deprecations."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # it warns of image processors that nobody asked for
    deepspeeds = logging.getLogger("DeepSpeed")
    deepspeeds.setLevel(logging.WARNING)
    deepspeeds.addFilter(_concerns_us)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    # Embeddings have no differentiable inputs; their weights' gradients are right (tests/test_role.py).
    warnings.filterwarnings("ignore", message="Full backward hook is firing")


def _concerns_us(record: logging.LogRecord) -> bool:
    return "untested optimizer" not in record.getMessage()  # ours, whose update DeepSpeed has no part in


# Which of several processes speaks

_PATIENCE = 10.0
_publish: Callable[[str], bool] | None = None


def met(publish: Callable[[str], bool] | None) -> None:
    """From here on `publish` decides who speaks: True where no process has said this text yet. It must neither wait for
    other processes nor need them alive. None: processes have not met."""
    global _publish
    _publish = publish


def _say(message: str, details: str = "", start: str = "error") -> None:
    """Prints an error, or what else begins with `start`, unless another process provably prints the same.

    Once the processes have met they ask `publish`. Before, what is wrong is as a rule wrong for all: the first process of
    each machine speaks at once and ends, upon which the launcher ends the others while they wait. One that fails alone
    outlives its wait and speaks.
    """
    if _publish is not None:
        with contextlib.suppress(Exception):  # whoever cannot ask speaks
            if not _publish(details + message):
                return
    elif start and not _leads():
        with contextlib.suppress(KeyboardInterrupt):
            time.sleep(_PATIENCE)
    number = _number()
    words = [each for each in (start, f"(process {number})" if number != "0" else "") if each]
    start = f"{' '.join(words)}: " if words else ""
    # The main process may have left a bar without its end of line.
    begin = "" if number == "0" else "\n"
    _write(begin + details + "".join(f"{start}{line}\n" for line in message.splitlines() or [""]))


def _number() -> str:
    """Of this process among those of the run."""
    return os.environ.get("RANK") or "0"


def _leads() -> bool:
    """Whether this is the first process of this machine, or the only one: without RANK there is no launcher."""
    return not os.environ.get("RANK") or (os.environ.get("LOCAL_RANK") or os.environ["RANK"]) == "0"


# Streams that may be closed at their other end


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
    """Whether a stream is a pipe that nobody reads any more."""
    try:
        watch = select.poll()
        watch.register(stream.fileno(), 0)
        return any(event & select.POLLERR for _, event in watch.poll(0))
    except (AttributeError, OSError, ValueError):  # no stream, or one without a file
        return False


def discard(stream) -> None:
    """What is written to it from now on, and what waits to be, goes nowhere."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


# Interrupted, ended or failed before a command has these things in hand


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
    sys.excepthook = _failed  # Python's own status is 130, too, or 1
    for each in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(each) == signal.SIG_DFL:
            signal.signal(each, _end)


if _OURS & {*Path(getattr(sys.modules["__main__"], "__file__", None) or "/").resolve().parents}:
    answer_signals()  # a command of dpdmd runs, and its other imports follow


# What command lines hold


def expand(path: str) -> str:
    """`path` with `~` or `~user` at its start replaced by that home folder; $VARIABLES stay as they are.

    The shell leaves `~` alone after `key=`. Raises ValueError for a name that no file or folder has, and for a user without
    a home folder.
    """
    if not path.strip():
        raise ValueError("it is empty, and names no file or folder")
    if any(character < " " or character == "\x7f" for character in path):
        raise ValueError("it holds a control character, which no file or folder here has in its name")
    expanded = os.path.expanduser(path)
    if path.startswith("~") and expanded == path:
        name = path.split("/")[0]
        raise ValueError(f"there is no home folder for {name}; a folder of that name itself is ./{name}")
    return expanded


def location(text: str) -> str:
    """argparse's type of a path that may also be something else, as a hub id."""
    try:
        return expand(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from error


def path(text: str) -> Path:
    """argparse's type of a path."""
    return Path(location(text))


def new_file(text: str) -> Path:
    """argparse's type of a file to write: known to be possible before what is to be written takes its time."""
    file = path(text)
    if file.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r}: it is a folder, and a file is to be written")
    if file.exists() and not file.is_file():
        raise argparse.ArgumentTypeError(f"{text!r}: it is a device or a pipe, and a file is to be written")
    if not file.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r}: there is no folder {file.parent}")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r}: it cannot be written to")
    return file


def new_folder(text: str) -> Path:
    """argparse's type of a folder to write to, which is made if need be."""
    folder = path(text)
    if problem := problem_of_place(folder):
        raise argparse.ArgumentTypeError(f"{text!r}: {problem}")
    return folder


def problem_of_place(folder: Path) -> str | None:
    """Why nothing can be written to a folder, or it cannot be made, as far as that shows without making it; or None."""
    there = next(each for each in (folder, *folder.absolute().parents) if os.path.lexists(each))
    if not there.is_dir():
        return f"{there} is no folder"
    return None if os.access(there, os.W_OK | os.X_OK) else f"{there} cannot be written to"


def whole(low: int, end: int = 2**31) -> Callable[[str], int]:
    """argparse's type of a whole number of [low, end)."""

    def read(text: str) -> int:
        with contextlib.suppress(ValueError):
            if low <= (value := int(text)) < end:
                return value
        raise argparse.ArgumentTypeError(f"{text[:120]!r}: a whole number from {low} to {end - 1} is needed")

    return read


def finite(text: str) -> float:
    """argparse's type of a finite number that is not negative."""
    with contextlib.suppress(ValueError):
        if 0 <= (value := float(text)) < float("inf"):
            return value
    raise argparse.ArgumentTypeError(f"{text[:120]!r}: a finite number from 0 on is needed")


def above_0(text: str) -> float:
    """argparse's type of a finite number above 0."""
    if (value := finite(text)) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: a number above 0 is needed")
    return value


def within(low: float, high: float) -> Callable[[str], float]:
    """argparse's type of a number of [low, high]."""

    def read(text: str) -> float:
        with contextlib.suppress(ValueError):
            if low <= (value := float(text)) <= high:
                return value
        raise argparse.ArgumentTypeError(f"{text[:120]!r}: a number from {low:g} to {high:g} is needed")

    return read


count = whole(1)
seed = whole(0, 2**63)  # as run.seed


class Parser(argparse.ArgumentParser):
    """For commands that run in several processes, which all get the same arguments: the first of each machine says what is
    wrong with them."""

    def error(self, message: str):
        if not _leads():
            raise SystemExit(2)
        super().error(message)
