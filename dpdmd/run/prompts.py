"""Prompts: reading them from a file, and which of them an update takes.

read_prompts   a .txt, .jsonl or .csv file -> list of prompts. A new format is a function and its line in FORMATS; the
               descriptions and messages of prompts.file in config.py, and the README, name the formats too
PromptOrder    which prompts an iteration takes on a shard; computed from their numbers, so there is no state to save
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path

import numpy as np

from dpdmd.config import ConfigError, printable, read_file, shown
from dpdmd.files import unique_keys

_NUMBERED = re.compile(r"\s*\d+\s*---(.*)")


def _read_txt(where: str, text: str, field: str) -> list[str]:
    """One prompt a line. If every line has the form `12 --- a red ring`, number and dashes are removed."""
    lines = [line for line in _lines(text) if line.strip()]
    numbered = [match[1] for line in lines if (match := _NUMBERED.fullmatch(line))]
    return numbered if len(numbered) == len(lines) else lines


def _read_jsonl(where: str, text: str, field: str) -> Iterable[str]:
    """Each line is a JSON string, or an object whose `field` is one."""
    for number, line in enumerate(_lines(text), start=1):
        if not line.strip():
            continue
        here = f"{where}: line {number}"
        try:
            prompt = json.loads(line, object_pairs_hook=unique_keys)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{here}: not JSON ({error.msg} at column {error.colno})") from error
        except ValueError as error:  # a key that stands twice, a number of thousands of digits
            raise ConfigError(f"{here}: not JSON ({error})") from error
        except RecursionError as error:
            raise ConfigError(f"{here}: not JSON of prompts (it is nested too deep)") from error
        if isinstance(prompt, dict):
            if field not in prompt:
                raise ConfigError(f"{here}: no field {shown(field)}; there are {_listed(prompt)}")
            prompt = prompt[field]
        if not isinstance(prompt, str):
            found = "null" if prompt is None else type(prompt).__name__
            raise ConfigError(f"{here}: found {found} where a string is needed")
        if "\0" in prompt:
            raise ConfigError(f"{here}: holds a NUL, which is no character of a text")
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError as error:  # JSON can escape half of a surrogate pair; tokenizers refuse it
            raise ConfigError(f"{here}: holds an unpaired surrogate, which is no character") from error
        yield prompt


def _listed(names: Iterable[str], most: int = 12) -> str:
    names = [*names]
    listed = ", ".join(shown(name) for name in names[:most]) or "none"
    return listed if len(names) <= most else f"{listed} and {len(names) - most} more"


def _read_csv(where: str, text: str, field: str) -> Iterable[str]:
    """A header line, then rows; `field` is the name of a column."""
    # strict: otherwise an unclosed quote silently swallows the rest of the file.
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(rows, None)
        if header is None:
            return
        if not header:
            raise ConfigError(f"{where}: line 1 is blank, where the names of the columns are needed")
        if header.count(field) != 1:
            found = f"{header.count(field)} columns" if field in header else "no column"
            raise ConfigError(f"{where}: {found} {shown(field)} (prompts.field); there are {_listed(header)}")
        column = header.index(field)
        for row in rows:
            if not row:
                continue
            if len(row) <= column:
                raise ConfigError(f"{where}: line {rows.line_num}: too short to have a {shown(field)}")
            if any(row[len(header) :]):
                raise ConfigError(
                    f"{where}: line {rows.line_num}: {len(row)} fields under {len(header)} columns; text with a comma needs "
                    "quotes around it"
                )
            yield row[column]
    except csv.Error as error:
        raise ConfigError(f"{where}: line {rows.line_num}: not CSV ({error})") from error


# File name suffix -> reader(beginning of error messages, the file's text, prompts.field) -> prompts.
FORMATS: dict[str, Callable[[str, str, str], Iterable[str]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
}


def read_prompts(path: str | Path, field: str = "prompt") -> list[str]:
    """The prompts of a UTF-8 file (also with a byte order mark) in one of the FORMATS, in its order and with repeats, but
    without surrounding space and blank prompts.

    Raises ConfigError for a file that is missing, a folder, pipe or device, without prompts, of another format or not
    UTF-8 (with line and byte offset), for a malformed line, and for a missing field (with those that exist).
    """
    path = Path(path)
    where = f"prompts.file {printable(str(path))}"
    reader = FORMATS.get(path.suffix.lower())
    if reader is None:
        kind = "it is a folder" if os.path.isdir(path) else f"the name ends in {path.suffix!r}"
        raise ConfigError(f"{where}: {kind}; {', '.join(FORMATS)} can be read")
    prompts = [prompt for prompt in (text.strip() for text in reader(where, _read_text(path, where), field)) if prompt]
    if not prompts:
        raise ConfigError(f"{where}: holds no prompt")
    return prompts


def _read_text(path: Path, where: str) -> str:
    data = read_file(path, f"{where}: ")
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{where}: line {line}, byte offset {error.start}: byte 0x{data[error.start]:02x} is not UTF-8 "
            f"({error.reason}); convert the file to UTF-8"
        ) from error
    if "\0" in text:  # UTF-16 and UTF-32 of plain English are valid UTF-8
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ConfigError(f"{where}: line {line} holds a NUL, as text in UTF-16 does; convert the file to UTF-8")
    return text


def _lines(text: str) -> list[str]:
    # str.splitlines would also break a prompt at U+2028, U+0085 and form feeds.
    return re.split("\r\n|\n|\r", text)


def digest_of(prompts: list[str]) -> str:
    """A short digest that tells lists of prompts apart."""
    return hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:12]


class PromptOrder:
    """Which prompts the batch of an iteration takes on a shard; a pure function.

    Sample j of a batch is number g = (iteration * num_shards + shard) * batch_size + j of the run. It lies in epoch
    g // num_prompts, and each epoch is a permutation of all prompts drawn from (seed, epoch). So each epoch takes every
    prompt once, shards take different samples, and a resumed run takes the same prompts as an uninterrupted one.
    """

    def __init__(self, num_prompts: int, seed: int):
        if num_prompts < 1:
            raise ValueError(f"num_prompts = {num_prompts}: 1 or more are needed")
        self.num_prompts = num_prompts
        self.seed = seed
        # A batch seldom straddles more than two epochs.
        self._permutation = lru_cache(maxsize=2)(self._draw_permutation)

    def indices(self, iteration: int, shard: int, num_shards: int, batch_size: int) -> list[int]:
        """batch_size prompt indices in [0, num_prompts)."""
        if iteration < 0 or batch_size < 0 or not 0 <= shard < num_shards:
            raise ValueError(
                f"iteration = {iteration}, shard = {shard}, num_shards = {num_shards}, batch_size = {batch_size}: "
                "iteration >= 0, batch_size >= 0 and 0 <= shard < num_shards are needed"
            )
        first = (iteration * num_shards + shard) * batch_size
        places = (divmod(sample, self.num_prompts) for sample in range(first, first + batch_size))
        return [int(self._permutation(epoch)[position]) for epoch, position in places]

    def _draw_permutation(self, epoch: int) -> np.ndarray:
        # NumPy keeps the raw stream of a bit generator the same across versions, but not Generator.permutation.
        raw = np.random.PCG64(np.random.SeedSequence([self.seed, epoch])).random_raw(self.num_prompts)
        return np.argsort(raw, kind="stable")
