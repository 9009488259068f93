"""Prompts: from a file to the conditions that a network takes.

read_prompts      a .txt, .jsonl or .csv file -> list of prompts
PromptOrder       which prompts an iteration takes on a shard; counted, so there is no state to save
EmbeddingCache    text embeddings on disk, each prompt encoded once in the life of the folder
Conditioner       prompts -> {"prompt_embeds": (B, L, D), ...}, from the cache or from the text encoders

Text encoders are the largest thing that a distillation holds without training it (T5-XXL: 9.5 GB in bfloat16), so by
default every prompt is encoded before the first iteration and the encoders are gone by then.
"""

from __future__ import annotations

import csv
import gc
import hashlib
import io
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dpdmd.config import ConfigError, PromptsConfig

logger = logging.getLogger(__name__)

Encode = Callable[[list[str]], dict[str, Tensor]]
Progress = Callable[[int, int, int], None]


def read_prompts(path: str | Path, field: str = "prompt") -> list[str]:
    """The prompts of a UTF-8 file (a byte order mark is tolerated), in its order, repeats kept, surrounding space cut.

    .txt    one a line. Where every line has the form `12 --- a red ring`, number and dashes are cut; where one line has
            not, the dashes are taken to be text and all lines stay as they are.
    .jsonl  a line holds a string, or an object whose `field` is one.
    .csv    a header, one column of which is `field`.
    Blank lines and blank prompts are skipped.

    Raises ConfigError for a file that is missing, empty, of another kind or not UTF-8 (with line and byte offset), for
    a malformed line, and for a missing field (with the ones that are there).
    """
    path = Path(path)
    readers = {".txt": _read_txt, ".jsonl": _read_jsonl, ".csv": _read_csv}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ConfigError(f"prompts.file {path}: the name ends in {path.suffix!r}; {', '.join(readers)} can be read")
    prompts = [prompt for prompt in (text.strip() for text in reader(path, _read_text(path), field)) if prompt]
    if not prompts:
        raise ConfigError(f"prompts.file {path}: holds no prompt")
    return prompts


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"prompts.file {path}: cannot be read ({error.strerror})") from error
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"prompts.file {path}: line {line}, byte offset {error.start}: byte 0x{data[error.start]:02x} is not UTF-8 "
            f"({error.reason}); convert the file to UTF-8"
        ) from error


def _lines(text: str) -> list[str]:
    # str.splitlines would also break a prompt at U+2028, U+0085 and form feeds.
    return [line.removesuffix("\r") for line in text.split("\n")]


_NUMBERED = re.compile(r"\s*\d+\s*---(.*)")


def _read_txt(path: Path, text: str, field: str) -> list[str]:
    lines = [line for line in _lines(text) if line.strip()]
    numbered = [_NUMBERED.fullmatch(line) for line in lines]
    return [match.group(1) for match in numbered] if all(numbered) else lines


def _read_jsonl(path: Path, text: str, field: str) -> Iterable[str]:
    for number, line in enumerate(_lines(text), start=1):
        if not line.strip():
            continue
        where = f"prompts.file {path}: line {number}"
        try:
            prompt = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{where}: not JSON ({error.msg} at column {error.colno})") from error
        if isinstance(prompt, dict):
            if field not in prompt:
                raise ConfigError(f"{where}: no field {field!r}; there are {', '.join(map(repr, prompt)) or 'none'}")
            prompt = prompt[field]
        if not isinstance(prompt, str):
            raise ConfigError(f"{where}: found {type(prompt).__name__} where a string is needed")
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError as error:  # JSON can escape half of a surrogate pair, which no tokenizer takes
            raise ConfigError(f"{where}: holds an unpaired surrogate, which is no character") from error
        yield prompt


def _read_csv(path: Path, text: str, field: str) -> Iterable[str]:
    # strict: otherwise a quote that is never closed swallows the rest of the file without a word.
    rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        header = rows.fieldnames or []
        if header and field not in header:
            raise ConfigError(
                f"prompts.file {path}: no column {field!r} (prompts.field); there are {', '.join(map(repr, header))}"
            )
        for row in rows:
            if row[field] is None:
                raise ConfigError(f"prompts.file {path}: line {rows.line_num}: too short to have a {field!r}")
            yield row[field]
    except csv.Error as error:
        raise ConfigError(f"prompts.file {path}: line {rows.line_num}: not CSV ({error})") from error


class PromptOrder:
    """Which prompts the batch of an iteration takes on a shard; a function of its arguments alone.

    Sample j of a batch is the g-th of the run, g = (iteration * num_shards + shard) * batch_size + j. It lies in epoch
    g // num_prompts, and each epoch is a permutation of all prompts drawn from (seed, epoch). So an epoch shows every
    prompt once, no two shards show the same sample, and a resumed run goes on with the prompts it would have taken.
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
                "iteration and batch_size cannot be negative, and shard counts from 0 below num_shards"
            )
        first = (iteration * num_shards + shard) * batch_size
        places = (divmod(sample, self.num_prompts) for sample in range(first, first + batch_size))
        return [int(self._permutation(epoch)[position]) for epoch, position in places]

    def _draw_permutation(self, epoch: int) -> np.ndarray:
        # NumPy promises the raw stream of a bit generator across versions, but not Generator.permutation's.
        raw = np.random.PCG64(np.random.SeedSequence([self.seed, epoch])).random_raw(self.num_prompts)
        return np.argsort(raw, kind="stable")


_SHARD_BYTES = 256 << 20  # also what a killed build loses at most; SD3's embedding of a prompt is 2.7 MB in bfloat16
_STALE_SECONDS = 3600.0
_KEYS = "sha256"


def estimate_bytes(num_prompts: int, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> int:
    """What the embeddings of num_prompts prompts take on disk; shapes are those of one prompt, without the batch."""
    numbers = sum(int(np.prod(shape)) for shape in shapes.values())
    return num_prompts * (numbers * dtype.itemsize + hashlib.sha256().digest_size)


class EmbeddingCache:
    """Text embeddings in safetensors shards under folder/text_key, one row a prompt, keyed by the SHA-256 of its text.

    text_key names everything else that an embedding depends on (encoders, length, dtype), so others never mix with
    these. A shard holds what `encode` returned, (n, ...) in the encoder's dtype, and the keys of its rows, (n, 32)
    uint8; the index is rebuilt from the keys alone. A shard appears under its name only when it is complete.

    Raises ConfigError on a shard that cannot be read.
    """

    def __init__(self, folder: str | Path, text_key: str):
        self.folder = Path(folder) / text_key
        self._place: dict[bytes, tuple[Path, int]] = {}
        self._handles: dict = {}
        self.refresh()

    def refresh(self) -> None:
        """Takes in the shards that other processes have written since."""
        for path in sorted(self.folder.glob("*.safetensors")):
            if path not in self._handles:
                handle = _open_shard(path)
                for row, key in enumerate(handle.get_tensor(_KEYS).numpy()):
                    self._place.setdefault(key.tobytes(), (path, row))
                self._handles[path] = handle

    def missing(self, prompts: Iterable[str], rank: int = 0, world_size: int = 1) -> list[str]:
        """The different prompts of this rank's share that have no embedding yet.

        The share depends on `prompts` alone and not on what others have written meanwhile: ranks that look at different
        moments still leave no prompt to nobody.
        """
        return [prompt for prompt in list(dict.fromkeys(prompts))[rank::world_size] if _key(prompt) not in self._place]

    def check_space(self, num_bytes: int) -> None:
        """Raises ConfigError when the disk has no room for num_bytes more."""
        folder = next(folder for folder in (self.folder, *self.folder.absolute().parents) if folder.exists())
        free = shutil.disk_usage(folder).free
        if num_bytes > free:
            raise ConfigError(
                f"prompts.cache_dir: the embeddings need {_readable(num_bytes)} in {self.folder}, but "
                f"{_readable(free)} are free there: take another folder or fewer prompts, or prompts.encoding=stream"
            )

    def build(
        self,
        prompts: Sequence[str],
        encode: Encode,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        progress: Progress | None = None,
    ) -> int:
        """Encodes this rank's share of the prompts that are missing and returns how many those were.

        encode: list of b prompts -> {name: (b, ...)}, on any device.
        progress: called with (prompts done, prompts to do, bytes they take in all), first when the size is known.
        Raises ConfigError where the disk is too small, before anything is written; ValueError for an embedding that is
        not finite; OSError when a shard cannot be written.
        """
        everybody, mine = self.missing(prompts), self.missing(prompts, rank, world_size)
        if not mine:
            return 0
        self.folder.mkdir(parents=True, exist_ok=True)
        self._remove_leftovers()
        pending: list[tuple[list[str], dict[str, Tensor]]] = []
        pending_bytes = 0
        for start in range(0, len(mine), batch_size):
            batch = mine[start : start + batch_size]
            encoded = _checked(batch, encode(batch))
            num_bytes = sum(tensor.nbytes for tensor in encoded.values())
            if start == 0:
                each = num_bytes // len(batch)
                self.check_space(len(everybody) * each)
                logger.info(
                    "encoding %d prompts, %s, into %s", len(everybody), _readable(len(everybody) * each), self.folder
                )
                if progress:
                    progress(0, len(mine), len(mine) * each)
            pending.append((batch, encoded))
            pending_bytes += num_bytes
            if pending_bytes >= _SHARD_BYTES or start + batch_size >= len(mine):
                self._write(pending)
                pending, pending_bytes = [], 0
            if progress:
                progress(min(start + batch_size, len(mine)), len(mine), len(mine) * each)
        self.refresh()
        return len(mine)

    def get(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """{name: (B, ...)} on the CPU, row i that of prompts[i]; only those rows are read. Raises LookupError."""
        absent = [prompt for prompt in prompts if _key(prompt) not in self._place]
        if absent:
            raise LookupError(
                f"no embedding of {absent[0]!r} in {self.folder} ({len(absent)} of {len(prompts)} prompts have none)"
            )
        places = [self._place[_key(prompt)] for prompt in prompts]
        names = [name for name in self._handles[places[0][0]].keys() if name != _KEYS]  # noqa: SIM118 - not a dict
        return {
            name: torch.cat([self._handles[path].get_slice(name)[row : row + 1] for path, row in places])
            for name in names
        }

    def _write(self, batches: list[tuple[list[str], dict[str, Tensor]]]) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        keys = [_key(prompt) for batch, _ in batches for prompt in batch]
        shard = {name: torch.cat([encoded[name] for _, encoded in batches]) for name in batches[0][1]}
        shard[_KEYS] = torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).reshape(len(keys), -1)
        # Named by what it holds: ranks, whose shares are disjoint, never meet under one name.
        path = self.folder / f"{hashlib.sha256(b''.join(keys)).hexdigest()[:24]}.safetensors"
        descriptor, temporary = tempfile.mkstemp(suffix=".tmp", dir=self.folder)
        os.close(descriptor)
        try:
            save_file(shard, temporary)
            os.replace(temporary, path)
        except (OSError, SafetensorError) as error:
            raise OSError(f"{path}: the embeddings could not be written: {error}") from error
        finally:
            Path(temporary).unlink(missing_ok=True)

    def _remove_leftovers(self) -> None:
        # A killed process cannot clean up behind itself (.tmp*: safetensors' own); the age keeps off those that another
        # process is writing just now.
        for path in [*self.folder.glob("*.tmp"), *self.folder.glob(".tmp*")]:
            try:
                if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                    path.unlink()
            except FileNotFoundError:
                pass


def _key(prompt: str) -> bytes:
    return hashlib.sha256(prompt.encode("utf-8")).digest()


def _open_shard(path: Path):
    from safetensors import SafetensorError, safe_open

    try:
        handle = safe_open(path, framework="pt")
        if _KEYS not in handle.keys():  # noqa: SIM118 - not a dict
            raise ConfigError(f"{path}: is not a shard of an embedding cache; move it out of prompts.cache_dir")
        return handle
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"{path}: this shard of the embedding cache is damaged ({error}); delete the file, and its prompts are "
            "encoded anew"
        ) from error


def _checked(batch: list[str], encoded: dict[str, Tensor]) -> dict[str, Tensor]:
    encoded = {name: tensor.detach().cpu().contiguous() for name, tensor in encoded.items()}
    for name, tensor in encoded.items():
        assert len(tensor) == len(batch) and name != _KEYS, (name, tensor.shape, len(batch))
        bad = (~torch.isfinite(tensor).flatten(1).all(dim=1)).nonzero()
        if len(bad):
            raise ValueError(
                f"{name} of {batch[int(bad[0])]!r} is not finite in {tensor.dtype}; a wider dtype may help"
            )
    return encoded


def _readable(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


class Conditioner:
    """Prompts in, conditions of the network out, on `device`, wherever the embeddings come from.

    lookup: list of B prompts -> {name: (B, ...)} (`EmbeddingCache.get`, or `encode` of the text encoders).
    ahead: whether lookup may run in a thread of its own, for `prefetch`.
    negative_prompt: prompt of the unconditional branch, None for none.
    """

    def __init__(self, lookup: Encode, negative_prompt: str | None, device: torch.device | str, *, ahead: bool = False):
        self._lookup = lookup
        self._device = torch.device(device)
        self._reader = ThreadPoolExecutor(1) if ahead else None
        self._coming: tuple[list[str], Future] | None = None
        self._negative = None if negative_prompt is None else self.cond([negative_prompt])

    def cond(self, prompts: list[str]) -> dict[str, Tensor]:
        """{name: (B, ...)} of B prompts. Raises LookupError for one that a cache does not hold."""
        coming, self._coming = self._coming, None
        found = coming[1].result() if coming is not None and coming[0] == prompts else self._read(prompts)
        return {name: tensor.to(self._device, non_blocking=True) for name, tensor in found.items()}

    def prefetch(self, prompts: list[str]) -> None:
        """Has the next `cond(prompts)` read from disk meanwhile, where embeddings come from there."""
        if self._reader is not None:
            self._coming = (prompts, self._reader.submit(self._read, prompts))

    def _read(self, prompts: list[str]) -> dict[str, Tensor]:
        found = self._lookup(prompts)
        if self._device.type == "cuda":  # from pinned memory the copy to the device takes no time of the host's
            found = {name: x if x.is_cuda else x.pin_memory() for name, x in found.items()}
        return found

    def uncond(self, batch_size: int) -> dict[str, Tensor] | None:
        """{name: (batch_size, ...)} of the negative prompt, every row the same memory: not to be written to."""
        if self._negative is None:
            return None
        return {name: tensor.expand(batch_size, *tensor.shape[1:]) for name, tensor in self._negative.items()}


def make_conditioner(
    backbone,
    config: PromptsConfig,
    prompts: Sequence[str],
    device: torch.device | str,
    rank: int,
    world_size: int,
    barrier: Callable[[], None],
    extra_prompts: Sequence[str] = (),
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> Conditioner:
    """The conditions of `prompts`, `extra_prompts` (those of sample grids) and config.negative_prompt.

    encoding = stream keeps the text encoders on `device`. encoding = cache brings the cache up to date first, each rank
    its share, then frees the encoders; where nothing is missing they are not loaded at all. `barrier` is called once,
    by every rank, in cache mode. config.cache_dir must be set then, and be a folder that all ranks see.

    dtype: of the text encoders; None: bfloat16 on CUDA, else float32.
    backbone: has `load_text(device, dtype).encode(prompts)`, and for the cache `text_key` and `text_shapes`.

    Both give the same bits for the same batch. (A matrix product may round a row otherwise when the batch has another
    size, so an encoder asked for batches of another size than the cache was built with can differ in the last bit.)
    """
    if dtype is None:
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    if config.encoding == "stream":
        return Conditioner(backbone.load_text(device, dtype).encode, config.negative_prompt, device)

    if config.cache_dir is None:
        raise ConfigError(
            "prompts.cache_dir is not set, and prompts.encoding = cache needs a folder for the embeddings"
        )
    negative = () if config.negative_prompt is None else (config.negative_prompt,)
    needed = [*prompts, *extra_prompts, *negative]
    cache = EmbeddingCache(config.cache_dir, f"{backbone.text_key}-{str(dtype).removeprefix('torch.')}")
    if cache.missing(needed, rank, world_size):
        # Asked before the encoders are loaded, which takes minutes; build asks again with the sizes that it gets.
        cache.check_space(estimate_bytes(len(cache.missing(needed)), backbone.text_shapes, dtype))
        text = backbone.load_text(device, dtype)
        cache.build(needed, text.encode, config.encode_batch_size, rank, world_size, progress)
        del text
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
    barrier()
    cache.refresh()
    absent = cache.missing(needed)
    if absent:
        raise ConfigError(
            f"prompts.cache_dir {config.cache_dir}: {len(absent)} prompts have no embedding here though every process "
            "has written its share: all processes must see the same folder"
        )
    return Conditioner(cache.get, config.negative_prompt, device, ahead=True)
