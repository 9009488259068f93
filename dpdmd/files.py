"""How files are written and checked: whole or not at all, readable by whom the umask says, and one line for what fails.

save_tensors, write_text, write_json   a file appears under its name in one step, when it has reached the disk
writing, publish                       the same for any other file, and for a folder
open_tensors, load_tensors, read_json  what they wrote; DamagedFile for what it cannot have been
remove                                 what stands in the way, as far as that can be deleted
sha256, sync_folder, follow_umask      a file's digest; a folder onto the disk; permissions of files that others wrote
disk_errors                            what a full or failing disk leads to, as one line with the bytes needed and free

Tensors are stored in the safetensors format (https://github.com/huggingface/safetensors), which its own library reads.
They are written and read here, as that library's files belong to their owner alone (0600), stay behind under names of
their own when a process is killed, and end a process without a word (SIGBUS) where a mapped file has become shorter.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
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
_REPLACED = ".replaced-"

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
    """A regular file's bytes. Raises OSError for any other: a pipe or a device can keep its reader waiting for ever."""
    with open(path, "rb", buffering, opener=_at_once) as file:
        mode = os.fstat(file.fileno()).st_mode
        if not stat.S_ISREG(mode):
            kind = "pipe" if stat.S_ISFIFO(mode) else "device"
            raise OSError(errno.EINVAL, f"a {kind}, where a file is needed", str(path))
        yield file


def _at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # else opening a pipe waits for somebody who writes to it


_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_METADATA = "__metadata__"
_LONGEST_HEADER = 100_000_000  # bytes; the format's own limit
_CHUNK = 4 << 20


class DamagedFile(OSError):
    """A file that does not hold what was written to it; the message names it and says what is wrong, in one line."""


class WriteError(OSError):
    """A file that could not be written; the message names it and says why, in one line."""


# Tensors


class TensorFile:
    """An opened file of tensors, of which single rows can be read. Holds no file descriptor.

    path. metadata: {key: text}. layout: {name: (dtype, shape)}.
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
        """Rows start .. stop (None: to the end) of a tensor, on the CPU; a tensor without dimensions is read whole.

        Raises KeyError and IndexError for what the layout does not have, DamagedFile where the file has become shorter
        since it was opened, OSError where it cannot be read.
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
    """Writes tensors (any shapes, strides and dtypes that the format has) and metadata to a safetensors file, as
    `writing` says. Raises TypeError for a dtype that the format lacks, OSError where the file cannot be written.
    """
    # As the library orders them: wide dtypes first, so that every tensor is aligned to its own dtype.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in _DTYPE_NAMES or name == _METADATA:
            raise TypeError(f"{path}: {name!r} of {tensor.dtype} has no place in a safetensors file")
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with writing(path, 8 + len(text) + end) as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in names:
            file.write(tensor_bytes(tensors[name]))


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor's elements in order, as a file holds them; a copy where they do not lie so on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def open_tensors(path: str | Path) -> TensorFile:
    """Opens a safetensors file, of which only the header is read.

    Raises DamagedFile for a file that is not of the format, or is shorter or longer than its header says; OSError for
    one that cannot be read.
    """
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
    """All tensors of a safetensors file, on the CPU, and its metadata. Raises what `open_tensors` does."""
    file = open_tensors(path)
    return {name: file.read(name) for name in file.layout}, file.metadata


def _parse_header(text: bytes, first: int, size: int) -> tuple[dict, dict, dict]:
    """(metadata, layout, places) of a file of `size` bytes whose tensors begin at byte `first`. Raises ValueError."""
    header = json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates)
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
        num_bytes = dtype.itemsize
        for length in shape:
            num_bytes *= length
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


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name stands twice in its header")
    return values


# Text


def write_text(path: str | Path, text: str) -> None:
    """Writes text in UTF-8, as `writing` says. Raises OSError where the file cannot be written."""
    data = text.encode("utf-8")
    with writing(path, len(data)) as file:
        file.write(data)


def write_json(path: str | Path, value: Any) -> None:
    """Writes a value as JSON, as `writing` says. Raises ValueError for a number that is not finite, which JSON lacks;
    OSError where the file cannot be written."""
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
    """Gives an OSError the name of the file that was read, which that of a failing disk lacks."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def is_finite(tensor: Tensor) -> bool:
    """Whether there is no NaN and no infinity in it. Reads every number once and copies none."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    return all(bool(each.isfinite()) for each in torch.aminmax(tensor.detach()))  # which pass NaN on


# In one step


@contextlib.contextmanager
def writing(path: str | Path, needed: int | None = None) -> Iterator[IO[bytes]]:
    """A file opened for bytes that appears as `path` when the block ends and all of it has reached the disk.

    Until then it is `.unfinished-<name>` beside `path`, which goes on any error; one that a killed process left is
    written over. One process at a time can write a path. Folders that are missing are made. Permissions are those that
    the umask gives to new files, whatever those of an older `path` were.

    needed: bytes that will be written, for the message. Raises OSError as `disk_errors` does.
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
    """The moment at which a folder becomes the real one, when all of it has reached the disk; an older `final` goes.

    A process killed within leaves the older folder whole: as `final`, or as `.replaced-<name>` beside it. Raises OSError
    as `disk_errors` does.
    """
    unfinished, final = Path(unfinished), Path(final)
    replaced = final.with_name(_REPLACED + final.name)
    with disk_errors(final):
        sync_folder(unfinished)
        if os.path.lexists(final):
            remove(replaced)
            if os.path.lexists(replaced):
                raise OSError(f"{replaced}, which is left of an earlier one, cannot be deleted")
            os.rename(final, replaced)
        os.rename(unfinished, final)
        _sync(final.parent)
    remove(replaced)


def remove(path: Path) -> None:
    """Deletes a folder with all that is in it, a file or a link, whose target stays. What cannot be deleted is left."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            os.unlink(path)


def sync_folder(path: str | Path) -> None:
    """Returns when all files and folders below have reached the disk, so that no rename outlives what it names."""
    for folder, _, files in os.walk(path):
        for name in files:
            _sync(Path(folder, name))
        _sync(Path(folder))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network filesystems have none for folders
            raise
    finally:
        os.close(descriptor)


def follow_umask(folder: str | Path) -> None:
    """Gives all files below a folder the permissions that a new file there has: safetensors' own, which save_pretrained
    writes, belong to their owner alone. Raises OSError where that cannot be done."""
    folder = Path(folder)
    probe = folder / f"{UNFINISHED}mode"
    # Asked of a file: reading the umask itself means setting it, which other threads would notice.
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal. Raises OSError for one that cannot be read."""
    path, digest, buffer = Path(path), hashlib.sha256(), bytearray(_CHUNK)
    with _reading(path), open_file(path, buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def digests(folder: str | Path, names: str = "*") -> dict[str, str]:
    """The SHA-256 of each file below a folder that has such a name, by its path in the folder."""
    found = sorted(path for path in Path(folder).rglob(names) if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256(path) for path in found}


# Disks


def readable_bytes(num_bytes: float) -> str:
    """A number of bytes with three digits and a unit: 512 B, 2.1 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 999.5:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


def free_bytes(path: str | Path) -> int:
    """Bytes that are free on the disk on which `path` lies or would lie."""
    path = Path(path).absolute()
    return shutil.disk_usage(next(folder for folder in (path, *path.parents) if folder.exists())).free


_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
# torch.save says neither why nor where: "unexpected pos 2112 vs 2006", "basic_ios::clear: iostream error".
_TORCH_WRITES = ("inline_container", "PytorchStreamWriter", "unexpected pos", "iostream error")
_LIBRARY_WRITES = ("os error", "I/O error", "No space left", "Disk quota exceeded")


@contextlib.contextmanager
def disk_errors(path: str | Path, needed: int | None = None) -> Iterator[None]:
    """Turns what a full or failing disk leads to inside the block into one line of OSError that names `path`.

    needed: bytes that writing takes in all. With a full disk the line is "<path> could not be written: 2.1 GB were
    needed and 0.3 GB are free on that disk"; else it says the reason. An OSError, torch's RuntimeErrors about writing
    and safetensors' about the disk are turned so; DamagedFile, what has been turned already and all else pass through.
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
    """(what the disk said, whether it was for want of space: None where that is not known); (None, None) for an error
    that is not a disk's."""
    if isinstance(error, OSError):
        return error.strerror or str(error), error.errno in _NO_SPACE
    text = str(error).split("\n")[0]
    if isinstance(error, SafetensorError) and any(words in text for words in _LIBRARY_WRITES):
        return text, any(words in text for words in _LIBRARY_WRITES[2:])
    if type(error) is RuntimeError and any(words in text for words in _TORCH_WRITES):
        cause = error.__cause__ or error.__context__
        return _disk_reason(cause) if isinstance(cause, OSError) else ("only a part of it was taken", None)
    return None, None
