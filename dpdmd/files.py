"""Files that are written completely or not at all, with the umask's permissions, and checked when they are read.

save_tensors, write_text, write_json   a file appears under its name in one step, when all of it is on the disk
writing, publish                       the same for any other file, and for a folder
open_tensors, load_tensors, read_json  read them; raise DamagedFile for a damaged one
sha256, sync_folder, follow_umask      a file's digest; a folder onto the disk; permissions of files that others wrote
disk_errors                            one line for a full or failing disk, with the bytes needed and free

Tensors are stored in the safetensors format (https://github.com/huggingface/safetensors). Its library is not used: it
creates files with mode 0600, leaves temporary files when a process is killed, and maps files, so that a process dies of
SIGBUS if one becomes shorter.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from torch import Tensor

UNFINISHED = ".unfinished-"
REPLACED = ".replaced-"

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}


@contextlib.contextmanager
def open_file(path: str | Path, buffering: int = -1) -> Iterator[Any]:
    """A regular file, opened for bytes. Raises OSError for a pipe or a device, which could block its reader for ever."""

    def at_once(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NONBLOCK)  # else opening a pipe waits for a writer

    with open(path, "rb", buffering, opener=at_once) as file:
        mode = os.fstat(file.fileno()).st_mode
        if not stat.S_ISREG(mode):
            kind = "pipe" if stat.S_ISFIFO(mode) else "device"
            raise OSError(errno.EINVAL, f"a {kind}, where a file is needed", str(path))
        yield file


_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_METADATA = "__metadata__"
_LONGEST_HEADER = 100_000_000  # bytes; the format's own limit
_CHUNK = 4 << 20


class DamagedFile(OSError):
    """A file whose content is not what was written; the message names it and says what is wrong, in one line."""


class WriteError(OSError):
    """A file that could not be written; the message names it and says why, in one line."""


# Tensors


class TensorFile:
    """A file of tensors whose rows can be read one by one. It holds no file descriptor.

    metadata: {key: text}. layout: {name: (dtype, shape)}.
    """

    def __init__(
        self,
        path: Path,
        metadata: dict[str, str],
        layout: dict[str, tuple[torch.dtype, tuple[int, ...]]],
        places: dict[str, tuple[int, int]],
    ):
        self.path = path
        self.metadata = metadata
        self.layout = layout
        self._places = places  # (first byte, one past the last) in the file

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start .. stop (None: to the end) of a tensor, on the CPU; a 0-dimensional tensor is read whole.

        Raises KeyError and IndexError for what is not in the layout, DamagedFile if the file has become shorter since it
        was opened, OSError if it cannot be read.
        """
        dtype, shape = self.layout[name]
        first, last = self._places[name]
        if shape:
            stop = shape[0] if stop is None else stop
            if not 0 <= start <= stop <= shape[0]:
                raise IndexError(f"{self.path}: rows {start} to {stop} of {name}, which has {shape[0]}")
            row = (last - first) // shape[0] if shape[0] else 0
            first, last, shape = first + start * row, first + stop * row, (stop - start, *shape[1:])
        data = torch.empty(last - first, dtype=torch.uint8)
        with _reading(self.path), open_file(self.path) as file:
            file.seek(first)
            if file.readinto(data.numpy().data) != len(data):
                raise DamagedFile(f"{self.path} is damaged: it ends within {name!r}")
        return data.view(dtype).reshape(shape)


def save_tensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes tensors of any shape and stride, and metadata, to a safetensors file, as `writing` does. Raises TypeError for
    a dtype that the format lacks, OSError if the file cannot be written."""
    # The library's order: wide dtypes first, so that every tensor is aligned to its own dtype.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in _DTYPE_NAMES or name == _METADATA:
            raise TypeError(f"{path}: a safetensors file cannot hold {name!r} of {tensor.dtype}")
        start, end = end, end + tensor.nbytes
        dtype, shape = _DTYPE_NAMES[tensor.dtype], list(tensor.shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with writing(path, 8 + len(text) + end) as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in names:
            file.write(tensor_bytes(tensors[name]))


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor's elements in order, as a file holds them; a copy unless it is contiguous on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def open_tensors(path: str | Path) -> TensorFile:
    """Reads the header of a safetensors file. Raises DamagedFile for a file of another format or another length than its
    header says, OSError for one that cannot be read."""
    path = Path(path)
    with _reading(path), open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise DamagedFile(f"{path} is damaged: its {size} bytes do not hold the header of a safetensors file")
        header = file.read(length)
    try:
        return TensorFile(path, *_parse_header(header, 8 + length, size))
    except (ValueError, RecursionError) as error:
        reason = error if type(error) is ValueError else "its header is not JSON"
        raise DamagedFile(f"{path} is damaged: {reason}") from error


def load_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a safetensors file, on the CPU. Raises the errors of `open_tensors`."""
    file = open_tensors(path)
    return {name: file.read(name) for name in file.layout}, file.metadata


def _parse_header(text: bytes, first: int, size: int) -> tuple[dict, dict, dict]:
    """(metadata, layout, places) of a file of `size` bytes whose tensors begin at byte `first`. Raises ValueError."""
    header = json.loads(text.decode("utf-8"), object_pairs_hook=unique_keys)
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata is not text")
    layout, places = {}, {}
    for name, entry in header.items():
        known = isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"}
        if not known or not _counts(entry["shape"]) or not _counts(entry["data_offsets"], 2):
            raise ValueError(f"its header does not describe {name!r}")
        dtype = _DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
        if dtype is None:
            raise ValueError(f"{name!r} is of the unknown dtype {entry['dtype']!r}")
        shape, (start, end) = tuple(entry["shape"]), entry["data_offsets"]
        num_bytes = dtype.itemsize * math.prod(shape)
        if end - start != num_bytes:
            raise ValueError(f"{name!r} has {end - start} bytes, and its shape {shape} needs {num_bytes}")
        layout[name], places[name] = (dtype, shape), (first + start, first + end)
    expected = first
    for name, (start, end) in sorted(places.items(), key=lambda item: item[1]):
        if start != expected:
            raise ValueError(f"{name!r} begins at byte {start} instead of {expected}")
        expected = end
    if expected != size:
        raise ValueError(f"it has {size} bytes, and its header needs {expected}")
    return metadata, layout, places


def _counts(values: Any, number: int | None = None) -> bool:
    """Whether values is a list of whole numbers from 0 on, `number` of them."""
    right = isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)
    return right and number in (None, len(values))


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object_pairs_hook for json.loads that raises ValueError for a key that stands twice in an object."""
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"the key {key[:120]!r} stands twice")
        values[key] = value
    return values


# Text


def write_text(path: str | Path, text: str) -> None:
    """Writes text in UTF-8, as `writing` does. Raises OSError if the file cannot be written."""
    data = text.encode("utf-8")
    with writing(path, len(data)) as file:
        file.write(data)


def write_json(path: str | Path, value: Any) -> None:
    """Writes a value as JSON, as `writing` does. Raises ValueError for a number that is not finite, and OSError."""
    try:
        text = json.dumps(value, indent=2, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    write_text(path, text + "\n")


def read_json(path: str | Path) -> Any:
    """The value of a JSON file. Raises DamagedFile for one that is not JSON, OSError for one that cannot be read."""
    path = Path(path)
    with _reading(path), open_file(path) as file:
        data = file.read()
    try:
        return json.loads(data.decode("utf-8"), parse_constant=_not_json)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise DamagedFile(f"{path} is damaged: not JSON ({error.msg} at {place})") from error
    except UnicodeDecodeError as error:
        raise DamagedFile(f"{path} is damaged: byte {error.start} is not UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"{path} is damaged: not JSON ({error})") from error


def _not_json(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON number")


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Adds the file's name to an OSError without one, such as a failing disk's."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds no NaN and no infinity. Reads every element once and copies none."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    return all(bool(each.isfinite()) for each in torch.aminmax(tensor.detach()))  # both are NaN if any element is


# In one step


@contextlib.contextmanager
def writing(path: str | Path, needed: int | None = None) -> Iterator[IO[bytes]]:
    """A file opened for bytes that appears as `path` when the block has ended and all of it is on the disk.

    Until then it is `.unfinished-<name>` beside `path`; an error deletes it, and one left by a killed process is
    overwritten. Only one process may write a path at a time. Missing folders are created. The umask sets the
    permissions, also where `path` exists. needed: number of bytes, for the message. Raises the errors of `disk_errors`.
    """
    path = Path(path)
    unfinished = path.with_name(UNFINISHED + path.name)
    with disk_errors(path, needed):
        if path.exists() and not path.is_file():
            raise OSError(f"it is a {'folder' if path.is_dir() else 'device'}, not a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with unfinished.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        except BaseException:
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)
            raise
        _sync(path.parent)


def publish(unfinished: str | Path, final: str | Path) -> None:
    """Renames a folder to `final` when all of it is on the disk, and deletes an older `final`.

    A process killed meanwhile leaves the older folder complete, as `final` or as `.replaced-<name>` beside it. Raises the
    errors of `disk_errors`.
    """
    unfinished, final = Path(unfinished), Path(final)
    replaced = final.with_name(REPLACED + final.name)
    with disk_errors(final):
        sync_folder(unfinished)
        if os.path.lexists(final):
            remove(replaced, must=True)
            os.rename(final, replaced)
        os.rename(unfinished, final)
        _sync(final.parent)
    remove(replaced)


def remove(path: Path, *, must: bool = False) -> None:
    """Deletes a folder, a file or a link (not its target), as far as possible. must: raises OSError if anything is left."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            os.unlink(path)
    if must and os.path.lexists(path):
        raise OSError(f"{path}, left by an earlier process, cannot be deleted")


def sync_folder(path: str | Path) -> None:
    """Returns when all files and folders below are on the disk."""
    for folder, _, files in os.walk(path):
        for name in files:
            _sync(Path(folder, name))
        _sync(Path(folder))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network filesystems cannot sync folders
            raise
    finally:
        os.close(descriptor)


def follow_umask(folder: str | Path) -> None:
    """Gives all files below a folder the permissions of a new file; save_pretrained's safetensors files have mode 0600.
    Raises OSError if that fails."""
    folder = Path(folder)
    probe = folder / f"{UNFINISHED}mode"
    probe.touch()  # reading the umask would mean setting it, for other threads too
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal. Raises OSError if it cannot be read."""
    path, digest, buffer = Path(path), hashlib.sha256(), bytearray(_CHUNK)
    with _reading(path), open_file(path, buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def digests(folder: str | Path, names: str = "*") -> dict[str, str]:
    """{path in the folder: SHA-256} of all files below a folder whose names match the glob pattern."""
    found = sorted(path for path in Path(folder).rglob(names) if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256(path) for path in found}


# Disks


def readable_bytes(num_bytes: float) -> str:
    """Three digits and a unit: 512 B, 2.1 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 999.5:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


def free_bytes(path: str | Path) -> int:
    """Free bytes on the disk of `path`, which need not exist."""
    path = Path(path).absolute()
    return shutil.disk_usage(next(folder for folder in (path, *path.parents) if folder.exists())).free


_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
# torch.save's messages give neither reason nor file: "unexpected pos 2112 vs 2006", "basic_ios::clear: iostream error".
_TORCH_WRITES = ("inline_container", "PytorchStreamWriter", "unexpected pos", "iostream error")
_LIBRARY_WRITES = ("os error", "I/O error", "No space left", "Disk quota exceeded")


@contextlib.contextmanager
def disk_errors(path: str | Path, needed: int | None = None) -> Iterator[None]:
    """Turns errors of a full or failing disk in the block into a WriteError of one line that names `path`.

    needed: number of bytes to write. The line is "<path> could not be written: 2.1 GB were needed and 0.3 GB are free on
    that disk", or the reason if the disk is not full. Turned are OSError, torch's RuntimeErrors about writing and
    safetensors' errors about the disk; all others, DamagedFile and WriteError pass.
    """
    try:
        yield
    except (DamagedFile, WriteError):
        raise
    except Exception as error:
        reason, full = _disk_reason(error)
        if reason is None:
            raise
        with contextlib.suppress(OSError):
            free = free_bytes(path)
            if needed is not None and free < needed:
                space = f"{readable_bytes(needed)} were needed and {readable_bytes(free)} are free on that disk"
                reason = space if full is not False else reason
            elif full is not False:
                reason = f"{reason}; {readable_bytes(free)} are free on that disk"
        raise WriteError(f"{path} could not be written: {reason}") from error


def _disk_reason(error: Exception) -> tuple[str | None, bool | None]:
    """(reason, whether the disk is full: None if unknown) of an error; (None, None) if it is not a disk's."""
    if isinstance(error, OSError):
        return error.strerror or str(error), error.errno in _NO_SPACE
    text = str(error).split("\n")[0]
    if isinstance(error, SafetensorError) and any(words in text for words in _LIBRARY_WRITES):
        return text, any(words in text for words in _LIBRARY_WRITES[2:])
    if type(error) is RuntimeError and any(words in text for words in _TORCH_WRITES):
        cause = error.__cause__ or error.__context__
        return _disk_reason(cause) if isinstance(cause, OSError) else ("only part of it was written", None)
    return None, None
