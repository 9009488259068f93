"""Text embeddings: from prompts to the conditions of the networks.

EmbeddingCache     text embeddings on disk; each prompt is encoded only once
Conditioner        prompts -> {"prompt_embeds": (B, L, D), ...}, from the cache or from the text encoders
make_conditioner   brings the cache up to date, then frees the text encoders

Text encoders are large (T5-XXL: 9.5 GB in bfloat16), so by default every prompt is encoded, and the encoders are freed,
before the first iteration.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import logging
import math
import os
import secrets
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from dpdmd.config import ConfigError, PromptsConfig
from dpdmd.files import (
    UNFINISHED,
    DamagedFile,
    free_bytes,
    open_tensors,
    readable_bytes,
    save_tensors,
    tensor_bytes,
)

logger = logging.getLogger(__name__)

Encode = Callable[[list[str]], dict[str, Tensor]]
Progress = Callable[[int, int, int], None]

_SHARD_BYTES = 256 << 20  # a killed build loses at most this; SD3's embedding of a prompt is 2.7 MB in bfloat16
_VERIFY_BYTES = 4 << 30  # 5 s: one core reads and hashes 0.8 GB/s (Xeon with SHA instructions, file in memory)
_STALE_SECONDS = 3600.0
_FORMAT = "2"
_KEYS, _DIGESTS = "keys", "digests"
_DIGEST_BYTES = hashlib.sha256().digest_size

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def estimate_bytes(num_prompts: int, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> int:
    """Size on disk of the embeddings of num_prompts prompts; shapes: of one prompt, without the batch."""
    numbers = sum(math.prod(shape) for shape in shapes.values())
    return num_prompts * (numbers * dtype.itemsize + 2 * _DIGEST_BYTES)


class EmbeddingCache:
    """Text embeddings in safetensors shards under folder/text_key, one row a prompt, keyed by the SHA-256 of its text.

    text_key names everything else that an embedding depends on (encoders, length, dtype). shapes, dtype: of one prompt's
    embeddings, without the batch; None: those of the first shard or encoding. quiet: do not name files that are ignored.

    A shard holds the tensors that `encode` returned, (n, ...), and `keys` and `digests` of its rows, (n, 32) uint8. A
    row's digest is the SHA-256 of text_key, key, names, dtypes, shapes and every byte. The metadata hold the format's
    number, text_key, and the SHA-256 of them, the layout, keys and digests. Each shard gets a new name when it is complete.

    What is verified, and what that costs:
      opening  header, layout, keys and digests of every shard; reads 64 bytes a prompt
      `get`    the digest of each row, every time it is read; 1.5 to 3.5 ms for SD3's 2.7 MB
      `verify` the same at the start of a run, for up to 4 GB a process; `get` verifies the rest
    A shard that fails on opening is renamed to <name>.damaged, and its prompts are encoded again. So is a row that
    `verify` finds damaged, into another shard. A damaged row that `get` finds, when the encoders are gone, stops the run
    with one line and its shard is renamed, so that the next start encodes it. Files that are not shards of this cache
    (another format or text_key, folders) are named and ignored.

    Raises ConfigError if the folder or a shard in it cannot be read.
    """

    def __init__(
        self,
        folder: str | Path,
        text_key: str,
        shapes: dict[str, tuple[int, ...]] | None = None,
        dtype: torch.dtype | None = None,
        *,
        quiet: bool = False,
    ):
        self.folder = Path(folder) / text_key
        self._text_key = text_key
        self._layout = None if shapes is None or dtype is None else _layout(shapes, dtype)
        self._quiet = quiet
        self._seen: set[Path] = set()
        self._places: dict[bytes, list[tuple[_Shard, int]]] = {}
        self._verified: set[bytes] = set()
        self._left_to_verify = _VERIFY_BYTES
        self._lost: dict[bytes, str] = {}
        self._lock = threading.RLock()  # two threads may call `get`
        self._remove_leftovers()
        self.refresh()

    def refresh(self) -> None:
        """Opens the shards that other processes have written since."""
        others: dict[str, list[str]] = {}
        with self._lock:
            for path in self._list():
                try:
                    if not path.is_file():
                        raise _NotOurs("not a file")
                    shard = _Shard(path, self._text_key)
                    if self._layout not in (None, shard.layout):
                        raise DamagedFile(f"{path} does not fit: {_difference(shard.layout, self._layout)}")
                    self._layout = shard.layout
                except FileNotFoundError:  # another process has just set it aside
                    continue
                except _NotOurs as error:
                    others.setdefault(str(error), []).append(path.name)
                except DamagedFile as error:
                    if (aside := _set_aside(path)) is not None:
                        logger.warning("%s; %s, and its prompts are encoded anew", error, aside)
                except OSError as error:
                    raise ConfigError(
                        f"prompts.cache_dir: {path} cannot be read ({error.strerror}): ask its owner for chmod g+r, or take "
                        "another folder"
                    ) from error
                else:
                    for row, key in enumerate(shard.keys):
                        self._places.setdefault(key, []).append((shard, row))
                self._seen.add(path)
        for reason, names in others.items():
            if not self._quiet:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                logger.warning("%s: %s%s: %s; ignored", self.folder, names[0], more, reason)

    def _list(self) -> list[Path]:
        """New files with a shard's name, oldest first."""
        try:
            found = sorted(path for path in self.folder.iterdir() if path.suffix == ".safetensors")
        except FileNotFoundError:
            return []
        except OSError as error:
            raise ConfigError(f"prompts.cache_dir: {self.folder} cannot be read ({error.strerror})") from error
        return [path for path in found if path not in self._seen and not path.name.startswith(".")]

    def missing(self, prompts: Iterable[str], rank: int = 0, world_size: int = 1) -> list[str]:
        """Prompts of this rank's share that have no embedding yet, without repeats. The share depends only on `prompts`, so
        that every prompt is in one, whenever the ranks look."""
        return [prompt for prompt in _share(prompts, rank, world_size) if _key(prompt) not in self._places]

    def verify(self, prompts: Iterable[str], rank: int = 0, world_size: int = 1) -> None:
        """Reads this rank's share of the embeddings, except those verified before, up to 4 GB in all. Damaged ones are
        missing from then on; one log line a shard names them."""
        damaged: Counter[Path] = Counter()
        for prompt in _share(prompts, rank, world_size):
            key = _key(prompt)
            if self._left_to_verify > 0 and key in self._places and key not in self._verified:
                try:
                    row = self._row(key)
                except _Unusable as error:
                    damaged[error.args[1]] += 1
                else:
                    self._verified.add(key)
                    self._left_to_verify -= sum(tensor.nbytes for tensor in row.values())
        for path, count in damaged.items():
            logger.warning("%s is damaged: %d of its embeddings must be encoded again", path, count)

    def check_space(self, num_bytes: int) -> None:
        """Raises ConfigError if the disk has no room for num_bytes more, or the folder cannot be written to."""
        free = free_bytes(self.folder)
        if num_bytes > free:
            raise ConfigError(
                f"prompts.cache_dir: the embeddings need {readable_bytes(num_bytes)} in {self.folder}, but "
                f"{readable_bytes(free)} are free there: take another folder or fewer prompts, or prompts.encoding=stream"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise ConfigError(f"prompts.cache_dir: {self.folder} cannot be written to ({error.strerror})") from error

    def build(
        self,
        prompts: Sequence[str],
        encode: Encode,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        progress: Progress | None = None,
    ) -> int:
        """Encodes this rank's share of the prompts that are missing or damaged, and returns their number.

        encode: list of b prompts -> {name: (b, ...)}, on any device.
        progress: called with (prompts done, prompts to do, their bytes in all), first when the size is known.
        Raises ConfigError if the disk is too small, before anything is written, and for an embedding that is not finite
        or of another shape or dtype; OSError if a shard cannot be written. What was encoded before stays.
        """
        self.refresh()
        self.verify(prompts, rank, world_size)
        everybody, mine = self.missing(prompts), self.missing(prompts, rank, world_size)
        if not mine:
            return 0
        pending: list[tuple[list[str], dict[str, Tensor]]] = []
        pending_bytes = 0
        try:
            for start in range(0, len(mine), batch_size):
                batch = mine[start : start + batch_size]
                encoded = {name: tensor.detach().cpu() for name, tensor in encode(batch).items()}
                self._layout = _check_embeddings(batch, encoded, self._layout)
                num_bytes = sum(tensor.nbytes for tensor in encoded.values())
                each = num_bytes // len(batch)
                if start == 0:
                    self.check_space(len(everybody) * (each + 2 * _DIGEST_BYTES))
                    size = readable_bytes(len(everybody) * each)
                    logger.info("encoding %d prompts, %s, into %s", len(everybody), size, self.folder)
                    if progress:
                        progress(0, len(mine), len(mine) * each)
                pending.append((batch, encoded))
                pending_bytes += num_bytes
                if pending_bytes >= _SHARD_BYTES:
                    done, pending, pending_bytes = pending, [], 0
                    self._write(done)
                if progress:
                    progress(min(start + batch_size, len(mine)), len(mine), len(mine) * each)
        finally:  # after an error too: encoding took long
            if pending:
                self._write(pending)
        self.refresh()
        return len(mine)

    def get(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """{name: (B, ...)} on the CPU; row i belongs to prompts[i]. Reads only those rows.

        Raises LookupError for a prompt without an embedding, DamagedFile for a damaged one.
        """
        with self._lock:
            absent = [prompt for prompt in prompts if _key(prompt) not in self._places]
            for prompt in absent:
                if _key(prompt) in self._lost:
                    raise DamagedFile(self._lost[_key(prompt)])
            if absent:
                share = f"{len(absent)} of {len(prompts)} prompts have none"
                raise LookupError(f"no embedding of {absent[0]!r} in {self.folder} ({share})")
            rows = {prompt: self._sound_row(prompt) for prompt in dict.fromkeys(prompts)}
        layout = self._layout or {}
        found = {name: torch.empty(len(prompts), *shape, dtype=dtype) for name, (dtype, shape) in layout.items()}
        for index, prompt in enumerate(prompts):
            for name, tensor in found.items():
                tensor[index : index + 1] = rows[prompt][name]
        return found

    def _sound_row(self, prompt: str) -> dict[str, Tensor]:
        key = _key(prompt)
        try:
            return self._row(key)
        except _Unusable as error:
            self.refresh()  # another run may have encoded it again
            with contextlib.suppress(_Unusable, KeyError):
                return self._row(key)
            problem, path = error.args
            aside = _set_aside(path) or "it has been set aside"
            message = (
                f"{path} is damaged: the embedding of {_short(prompt)} {problem}; {aside}, and the next start (--resume) "
                "encodes its prompts anew"
            )
            self._lost[key] = message
            raise DamagedFile(message) from error

    def _row(self, key: bytes) -> dict[str, Tensor]:
        """{name: (1, ...)} from the first shard whose row is undamaged; forgets those before it. Raises _Unusable if all
        are damaged, KeyError if no shard holds the key."""
        problem: Exception = KeyError(key)
        for place in self._places[key]:
            shard, row = place
            try:
                found = shard.read(row)
                if _row_digest(self._text_key, key, found) == shard.digests[row]:
                    return found
                problem = _Unusable("is not what was written", shard.path)
            except OSError as error:
                problem = _Unusable(f"cannot be read ({error.strerror or error})", shard.path)
            self._places[key] = [other for other in self._places[key] if other is not place]
        del self._places[key]
        raise problem

    def _write(self, batches: list[tuple[list[str], dict[str, Tensor]]]) -> None:
        keys = [_key(prompt) for batch, _ in batches for prompt in batch]
        tensors = {name: torch.cat([encoded[name] for _, encoded in batches]) for name in batches[0][1]}
        digests = [
            _row_digest(self._text_key, key, {name: tensor[row : row + 1] for name, tensor in tensors.items()})
            for row, key in enumerate(keys)
        ]
        tensors[_KEYS], tensors[_DIGESTS] = _as_tensor(keys), _as_tensor(digests)
        layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        metadata = {
            "embeddings": _FORMAT,
            "text_key": self._text_key,
            "sha256": _index_digest(self._text_key, layout, keys, digests),
        }
        # Names sort by age, and runs that build at the same time never use one name.
        save_tensors(self.folder / f"{time.time_ns():016x}-{secrets.token_hex(8)}.safetensors", tensors, metadata)

    def _remove_leftovers(self) -> None:
        # Of killed processes (*.tmp and .tmp*: of earlier versions). Younger files may be another process's, at work.
        for pattern in (f"{UNFINISHED}*", "*.tmp", ".tmp*"):
            for path in self.folder.glob(pattern):
                with contextlib.suppress(OSError):
                    if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                        path.unlink()


class _NotOurs(Exception):
    """A file that is not a shard of this cache; the message says what it is."""


class _Unusable(Exception):
    """An embedding that cannot be used. args: why, the path of its shard."""


class _Shard:
    """A shard. keys, digests: of its rows. layout: of a row's embeddings. Raises _NotOurs, DamagedFile, or OSError if it
    cannot be read."""

    def __init__(self, path: Path, text_key: str):
        self._file = file = open_tensors(path)
        form = file.metadata.get("embeddings")
        if form is None:
            raise _NotOurs(
                "embeddings in an earlier format, whose prompts are encoded anew (they can be deleted)"
                if "sha256" in file.layout
                else "not a shard of an embedding cache"
            )
        if form != _FORMAT:
            raise _NotOurs(f"embeddings in format {form!r}, and this version of dpdmd has {_FORMAT!r}")
        if file.metadata.get("text_key") != text_key:
            raise _NotOurs(f"embeddings of {file.metadata.get('text_key')!r}, which belong in another folder")
        count = file.layout.get(_KEYS, (None, (0,)))[1][:1]
        for name in (_KEYS, _DIGESTS):
            if file.layout.get(name) != (torch.uint8, (*count, _DIGEST_BYTES)):
                raise DamagedFile(f"{path} is damaged: it has no {name} of {_DIGEST_BYTES} bytes for each of its rows")
        for name, (_, shape) in file.layout.items():
            if shape[:1] != count:
                raise DamagedFile(f"{path} is damaged: {name!r} has the shape {shape}, and there are {count[0]} keys")
        self.keys, self.digests = _rows(file.read(_KEYS)), _rows(file.read(_DIGESTS))
        if _index_digest(text_key, file.layout, self.keys, self.digests) != file.metadata.get("sha256"):
            raise DamagedFile(f"{path} is damaged: its header, keys and digests are not what was written")
        embeddings = {name: each for name, each in file.layout.items() if name not in (_KEYS, _DIGESTS)}
        self.layout = {name: (dtype, shape[1:]) for name, (dtype, shape) in embeddings.items()}

    @property
    def path(self) -> Path:
        return self._file.path

    def read(self, row: int) -> dict[str, Tensor]:
        """{name: (1, ...)} of a row, unverified."""
        try:
            return self._read(row)
        except FileNotFoundError:
            # Another process found a damaged row and set the shard aside; this row may be undamaged.
            if self.path.suffix == _ASIDE:
                raise
            self._file.path = self.path.with_name(self.path.name + _ASIDE)
            return self._read(row)

    def _read(self, row: int) -> dict[str, Tensor]:
        return {name: self._file.read(name, row, row + 1) for name in self.layout}


_ASIDE = ".damaged"


def _set_aside(path: Path) -> str | None:
    """Renames a shard so that no run opens it again. Returns what was done, as text; None if another process was first."""
    if path.suffix == _ASIDE:
        return None
    try:
        os.rename(path, path.with_name(path.name + _ASIDE))
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"it cannot be set aside ({error.strerror}): delete it"
    return f"set aside as {path.name}{_ASIDE}"


def _row_digest(text_key: str, key: bytes, row: dict[str, Tensor]) -> bytes:
    digest = hashlib.sha256(text_key.encode("utf-8"))
    digest.update(key)
    for name in sorted(row):
        digest.update(f"\n{name} {row[name].dtype} {tuple(row[name].shape)}\n".encode())
        digest.update(tensor_bytes(row[name]))
    return digest.digest()


def _index_digest(text_key: str, layout: Layout, keys: list[bytes], digests: list[bytes]) -> str:
    """layout: of all tensors of a shard."""
    parts = [_FORMAT, text_key, *(f"{name} {dtype} {shape}" for name, (dtype, shape) in sorted(layout.items()))]
    return hashlib.sha256(b"".join(["\n".join(parts).encode("utf-8"), *keys, *digests])).hexdigest()


def _as_tensor(values: list[bytes]) -> Tensor:
    return torch.frombuffer(bytearray(b"".join(values)), dtype=torch.uint8).reshape(len(values), -1)


def _rows(tensor: Tensor) -> list[bytes]:
    return [row.tobytes() for row in tensor.numpy()]


def _share(prompts: Iterable[str], rank: int, world_size: int) -> list[str]:
    return list(dict.fromkeys(prompts))[rank::world_size]


def _key(prompt: str) -> bytes:
    try:
        return hashlib.sha256(prompt.encode("utf-8")).digest()
    except UnicodeEncodeError as error:
        raise ConfigError(f"prompt {_short(prompt)} holds an unpaired surrogate, which is no character") from error


def _short(prompt: str) -> str:
    return repr(prompt if len(prompt) <= 80 else prompt[:77] + "...")


def _layout(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> Layout:
    return {name: (dtype, tuple(shape)) for name, shape in shapes.items()}


def _difference(layout: Layout, expected: Layout) -> str:
    """The first difference between two layouts, as text."""
    name = min(name for name in {*layout, *expected} if layout.get(name) != expected.get(name))
    found, needed = (
        "none" if name not in each else f"{str(each[name][0]).removeprefix('torch.')} {each[name][1]}"
        for each in (layout, expected)
    )
    return f"{name} of a prompt is {found}, and {needed} is needed"


def _check_embeddings(prompts: list[str], encoded: dict[str, Tensor], expected: Layout | None) -> Layout:
    """The layout of a prompt's embeddings. encoded: {name: (b, ...)} of b prompts, from the text encoders.

    Raises ConfigError if the layout is not `expected`, or an embedding is not finite.
    """
    layout = {name: (tensor.dtype, tuple(tensor.shape[1:])) for name, tensor in encoded.items()}
    assert all(len(tensor) == len(prompts) for tensor in encoded.values()), (len(prompts), layout)
    assert not {_KEYS, _DIGESTS} & layout.keys(), layout
    if expected is not None and layout != expected:
        raise ConfigError(f"prompts: the text encoders do not fit the model: {_difference(layout, expected)}")
    for name, tensor in encoded.items():
        bad = (~torch.isfinite(tensor).flatten(1).all(dim=1)).nonzero()
        if len(bad):
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise ConfigError(
                f"prompts: {name} of {_short(prompts[int(bad[0])])} is not finite in {dtype}; a wider model.dtype "
                "(bfloat16) may help, or leave the prompt out"
            )
    return layout


class Conditioner:
    """Maps prompts to the networks' conditions on `device`.

    lookup: list of B prompts -> {name: (B, ...)} (`EmbeddingCache.get`, or `encode` of the text encoders).
    ahead: lookup may run in a thread, for `prefetch`. negative_prompt: of the unconditional pass; None for none.
    """

    def __init__(self, lookup: Encode, negative_prompt: str | None, device: torch.device | str, *, ahead: bool = False):
        self._lookup = lookup
        self._device = torch.device(device)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="prefetch") if ahead else None
        self._coming: tuple[list[str], Future] | None = None
        self._negative = None if negative_prompt is None else self.cond([negative_prompt])

    def cond(self, prompts: list[str]) -> dict[str, Tensor]:
        """{name: (B, ...)} of B prompts. Raises errors of lookup, also those that occurred in `prefetch`."""
        coming, self._coming = self._coming, None
        found = coming[1].result() if coming is not None and coming[0] == prompts else self._read(prompts)
        return {name: tensor.to(self._device, non_blocking=True) for name, tensor in found.items()}

    def close(self) -> None:
        """Ends the thread that reads ahead."""
        self._coming = None
        if self._reader is not None:
            self._reader.shutdown(cancel_futures=True)

    def prefetch(self, prompts: list[str]) -> None:
        """Starts to read the embeddings for the next `cond(prompts)`, if lookup may run in a thread."""
        if self._reader is not None:
            self._coming = (prompts, self._reader.submit(self._read, prompts))

    def _read(self, prompts: list[str]) -> dict[str, Tensor]:
        found = self._lookup(prompts)
        if self._device.type == "cuda":  # copies from pinned memory do not block the host
            found = {name: x if x.is_cuda else x.pin_memory() for name, x in found.items()}
        return found

    def uncond(self, batch_size: int) -> dict[str, Tensor] | None:
        """{name: (batch_size, ...)} of the negative prompt, as an expanded view: do not write to it."""
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
    """The Conditioner of `prompts`, `extra_prompts` (for sample grids) and config.negative_prompt.

    encoding = stream keeps the text encoders on `device`. encoding = cache brings the cache up to date, each rank its
    share, then frees the encoders; if nothing is missing or damaged they are not loaded. It needs config.cache_dir, a
    folder that all ranks see, and every rank calls `barrier` once. Both give the same bits for batches of the same size;
    with another size the encoders' matmuls may round differently.

    dtype: of the text encoders; None: bfloat16 on CUDA, else float32.
    backbone: has `load_text(device, dtype).encode(prompts)`, and for the cache `text_key` and `text_shapes`.

    Raises ConfigError for a folder that cannot be used, and for embeddings that are not finite or do not fit the model;
    OSError if one cannot be written. `Conditioner.cond` raises the same, and DamagedFile for a damaged embedding.
    """
    if dtype is None:
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    if config.encoding == "stream":
        text, layout = backbone.load_text(device, dtype), _layout(backbone.text_shapes, dtype)

        def encode(prompts: list[str]) -> dict[str, Tensor]:
            encoded = text.encode(prompts)
            _check_embeddings(prompts, encoded, layout)
            return encoded

        return Conditioner(encode, config.negative_prompt, device)

    if config.cache_dir is None:
        raise ConfigError("prompts.cache_dir is not set, but prompts.encoding = cache needs it")
    negative = () if config.negative_prompt is None else (config.negative_prompt,)
    needed = [*prompts, *extra_prompts, *negative]
    text_key = f"{backbone.text_key}-{str(dtype).removeprefix('torch.')}"
    cache = EmbeddingCache(config.cache_dir, text_key, backbone.text_shapes, dtype, quiet=rank > 0)
    cache.verify(needed, rank, world_size)
    if cache.missing(needed, rank, world_size):
        # Before the encoders are loaded, which takes minutes; build checks again with the real sizes.
        cache.check_space(estimate_bytes(len(cache.missing(needed)), backbone.text_shapes, dtype))
        text = backbone.load_text(device, dtype)
        cache.build(needed, text.encode, config.encode_batch_size, rank, world_size, progress)
        del text
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
    barrier()
    cache.refresh()
    if absent := cache.missing(needed):
        raise ConfigError(
            f"prompts.cache_dir {config.cache_dir}: {len(absent)} prompts have no embedding here, although every process "
            "has written its share: all processes must see the same folder"
        )
    return Conditioner(cache.get, config.negative_prompt, device, ahead=True)
