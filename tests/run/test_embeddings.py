"""The embedding cache, and the conditions made of it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import stat
import sys
import tempfile
import weakref
from collections import namedtuple

import pytest
import safetensors.torch
import torch
from processes import run_command

from dpdmd.backbones.sd3 import SD3
from dpdmd.config import ConfigError, ModelConfig, PromptsConfig
from dpdmd.files import DamagedFile, load_tensors, open_tensors
from dpdmd.run import embeddings
from dpdmd.run.embeddings import EmbeddingCache, estimate_bytes, make_conditioner

# Cache


class Encoder:
    """Embeddings that any two prompts differ in, and a record of what was asked."""

    def __init__(self, dtype=torch.bfloat16, salt=b"", length=5):
        self.asked: list[list[str]] = []
        self.dtype, self.salt, self.length = dtype, salt, length

    def encode(self, prompts):
        self.asked.append(list(prompts))
        seeds = [hashlib.sha256(prompt.encode() + self.salt).digest()[0:4] for prompt in prompts]
        generators = [torch.Generator().manual_seed(int.from_bytes(seed, "big")) for seed in seeds]
        return {
            "prompt_embeds": torch.stack([torch.randn(self.length, 3, generator=g) for g in generators]).to(self.dtype),
            "pooled_prompt_embeds": torch.stack([torch.randn(4, generator=g) for g in generators]).to(self.dtype),
        }


MANY = [f"prompt {number}, é" for number in range(23)]


def assert_holds(cache, prompts, encoder):
    expected, found = encoder.encode(prompts), cache.get(prompts)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


def test_cache_returns_what_was_encoded(tmp_path):
    cache, encoder = EmbeddingCache(tmp_path, "key"), Encoder()
    assert cache.build(MANY + MANY[:5], encoder.encode, batch_size=4) == 23
    assert [len(batch) for batch in encoder.asked] == [4] * 5 + [3]  # repeats are encoded once
    for reader in (cache, EmbeddingCache(tmp_path, "key")):
        assert_holds(reader, [MANY[7], MANY[22], MANY[7], MANY[0]], Encoder())


def test_cache_encodes_only_what_is_new(tmp_path):
    EmbeddingCache(tmp_path, "key").build(MANY[:10], Encoder().encode, 4)
    encoder = Encoder()
    assert EmbeddingCache(tmp_path, "key").build(MANY, encoder.encode, 100) == 13
    assert encoder.asked == [MANY[10:]]
    assert EmbeddingCache(tmp_path, "key").build(MANY, encoder.encode, 100) == 0
    assert len(encoder.asked) == 1
    assert_holds(EmbeddingCache(tmp_path, "key"), MANY[::-1], Encoder())


def test_cache_in_several_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(embeddings, "_SHARD_BYTES", 100)  # every batch of 4 prompts is more
    cache = EmbeddingCache(tmp_path, "key")
    cache.build(MANY, Encoder().encode, 4)
    assert len(list(cache.folder.glob("*.safetensors"))) == 6
    assert_holds(EmbeddingCache(tmp_path, "key"), MANY[3:20], Encoder())


def test_cache_keeps_encoders_apart(tmp_path):
    for key in ("one", "two"):
        EmbeddingCache(tmp_path, key).build(MANY, Encoder(salt=key.encode()).encode, 8)
    for key in ("one", "two"):
        assert_holds(EmbeddingCache(tmp_path, key), MANY, Encoder(salt=key.encode()))
    assert EmbeddingCache(tmp_path, "three").missing(MANY) == MANY


def test_two_ranks_build_one_cache(tmp_path):
    """One rank after the other, the second with a view of the folder from before the first, and from after."""
    for late, folder in ((False, tmp_path / "early"), (True, tmp_path / "late")):
        encoders = [Encoder(), Encoder()]
        caches = [EmbeddingCache(folder, "key") for _ in range(2)]
        for rank in range(2):
            if late:
                caches[rank].refresh()
            caches[rank].build(MANY, encoders[rank].encode, 4, rank, 2)
        asked = [{prompt for batch in encoder.asked for prompt in batch} for encoder in encoders]
        assert not asked[0] & asked[1] and asked[0] | asked[1] == set(MANY)
        assert {len(prompts) for prompts in asked} == {11, 12}
        caches[0].refresh()
        for cache in caches:
            assert_holds(cache, MANY, Encoder())


def test_missing_prompt(tmp_path):
    cache = EmbeddingCache(tmp_path, "key")
    cache.build(MANY[:3], Encoder().encode, 4)
    with pytest.raises(LookupError, match=r"no embedding of 'other' in .*1 of 2 prompts"):
        cache.get([MANY[0], "other"])


def test_an_interrupted_build_leaves_nothing_half_written(tmp_path, monkeypatch):
    monkeypatch.setattr(embeddings, "_SHARD_BYTES", 100)
    cache, replace, written = EmbeddingCache(tmp_path, "key"), os.replace, []

    def dies_at_the_third(source, target):
        written.append(target)
        if len(written) == 3:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        cache.build(MANY, Encoder().encode, 4)
    assert len(list(cache.folder.iterdir())) == 2  # two whole shards, no temporary file
    encoder = Encoder()
    assert EmbeddingCache(tmp_path, "key").build(MANY, encoder.encode, 4) == 15
    assert_holds(EmbeddingCache(tmp_path, "key"), MANY, Encoder())


def test_a_killed_build(tmp_path, monkeypatch):
    """SIGKILL between writing a shard and naming it: the leftover is no shard, and goes when it is old."""
    code = (
        "import os, signal, sys\n"
        "from dpdmd.run import embeddings\n"
        "from test_embeddings import MANY, Encoder\n"
        "embeddings._SHARD_BYTES, replace, written = 100, os.replace, []\n"
        "def dies_at_the_third(*names):\n"
        "    written.append(names)\n"
        "    os.kill(os.getpid(), signal.SIGKILL) if len(written) == 3 else replace(*names)\n"
        "os.replace = dies_at_the_third\n"
        "embeddings.EmbeddingCache(sys.argv[1], 'key').build(MANY, Encoder().encode, 4)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    killed = run_command([sys.executable, "-c", code, tmp_path], env=environment)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = [path.name for path in (tmp_path / "key").iterdir() if path.name.startswith(".unfinished-")]
    assert len(left) == 1 and len(os.listdir(tmp_path / "key")) == 3

    cache, encoder = EmbeddingCache(tmp_path, "key"), Encoder()
    assert cache.build(MANY, encoder.encode, 4) == 15
    assert_holds(EmbeddingCache(tmp_path, "key"), MANY, Encoder())
    assert (cache.folder / left[0]).exists()  # may be another process's, at work
    (cache.folder / "left.tmp").touch()  # an earlier version's
    monkeypatch.setattr(embeddings, "_STALE_SECONDS", -1.0)
    EmbeddingCache(tmp_path, "key")
    assert {path.suffix for path in cache.folder.iterdir()} == {".safetensors"}


def test_two_runs_build_one_cache_at_once(tmp_path, monkeypatch):
    """Each encodes all, as neither can know of the other; whoever comes later finds everything."""
    monkeypatch.setattr(embeddings, "_SHARD_BYTES", 100)
    first, second = EmbeddingCache(tmp_path, "key"), EmbeddingCache(tmp_path, "key")
    encoder = Encoder()

    def encode(prompts):
        second.build(MANY, Encoder().encode, 3)
        return encoder.encode(prompts)

    assert first.build(MANY, encode, 4) == 23
    for cache in (first, second, EmbeddingCache(tmp_path, "key")):
        assert_holds(cache, MANY, Encoder())
    assert EmbeddingCache(tmp_path, "key").missing(MANY) == []


@pytest.mark.parametrize("mask", [0o022, 0o002])
def test_others_can_read_the_cache(tmp_path, mask):
    before = os.umask(mask)
    try:
        EmbeddingCache(tmp_path / "new", "key").build(MANY, Encoder().encode, 4)
    finally:
        os.umask(before)
    modes = [(path.is_dir(), stat.S_IMODE(path.stat().st_mode)) for path in [*(tmp_path / "new").rglob("*")]]
    assert sorted(modes) == [(False, 0o666 & ~mask), (True, 0o777 & ~mask)]


# A cache is not trusted


SHAPES = {"prompt_embeds": (5, 3), "pooled_prompt_embeds": (4,)}


def open_cache(folder) -> EmbeddingCache:
    return EmbeddingCache(folder, "key", SHAPES, torch.bfloat16)


def built(folder, prompts=MANY, encoder=None):
    """The one shard of a new cache."""
    cache = EmbeddingCache(folder, "key")
    cache.build(prompts, (encoder or Encoder()).encode, 4)
    (shard,) = cache.folder.glob("*.safetensors")
    return shard


def assert_healed(folder, prompts=MANY, most=None):
    """Opened anew, the cache encodes what is damaged and no more than `most` prompts, and then holds what is right."""
    cache = open_cache(folder)
    count = cache.build(prompts, Encoder().encode, 4)
    assert 0 < count <= (len(prompts) if most is None else most)
    assert_holds(cache, prompts, Encoder())
    again = open_cache(folder)
    assert again.build(prompts, Encoder().encode, 4) == 0
    assert_holds(again, prompts, Encoder())


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_shard_that_was_cut(tmp_path, keep, caplog):
    shard = built(tmp_path)
    shard.write_bytes(shard.read_bytes()[:keep])
    assert open_cache(tmp_path).missing(MANY) == MANY
    (record,) = caplog.records
    message = record.getMessage()
    assert message.startswith(f"{shard} is damaged: ") and "\n" not in message
    assert message.endswith(f"; set aside as {shard.name}.damaged, and its prompts are encoded anew")
    assert not shard.exists() and shard.with_name(f"{shard.name}.damaged").exists()
    assert_healed(tmp_path)
    assert len(caplog.records) == 1


def test_a_flipped_bit_anywhere(tmp_path):
    """Each byte of a shard in turn: never used, whether it is found at the start or not before it is read."""
    prompts = MANY[:2]
    shard = built(tmp_path / "whole", prompts)
    whole, expected = shard.read_bytes(), Encoder().encode(prompts)
    for lazily in (False, True):
        found_late = 0
        for position in range(len(whole)):
            folder = tmp_path / f"{position}-{lazily}"
            (folder / "key").mkdir(parents=True)
            flipped = bytearray(whole)
            flipped[position] ^= 1 << position % 8
            (folder / "key" / shard.name).write_bytes(flipped)
            for _ in range(2):
                cache = open_cache(folder)
                cache._left_to_verify *= not lazily
                cache.build(prompts, Encoder().encode, 4)
                try:
                    found = cache.get(prompts)
                except DamagedFile:
                    found_late += 1  # the next start encodes it anew
                else:
                    break
            assert all(torch.equal(found[name], value) for name, value in expected.items()), position
        assert found_late == (2 * 19 * 2 if lazily else 0)  # the embeddings' bytes


def test_one_damaged_row_costs_one_row(tmp_path, caplog):
    shard = built(tmp_path)
    data = bytearray(shard.read_bytes())
    data[open_tensors(shard)._places["prompt_embeds"][0] + 7 * 30] ^= 4  # in the embedding of MANY[7]
    shard.write_bytes(data)
    assert_healed(tmp_path, most=1)
    assert [record.getMessage() for record in caplog.records] == [
        f"{shard} is damaged: 1 of its embeddings must be encoded again"
    ]


def resaved(shard, change, metadata=None):
    """Writes the shard anew with its own metadata after `change(tensors)`."""
    tensors, own = load_tensors(shard)
    change(tensors)
    safetensors.torch.save_file({name: value.contiguous() for name, value in tensors.items()}, shard, metadata or own)


def nan(tensors):
    tensors["prompt_embeds"][3] = float("nan")


def swap(tensors):
    tensors["prompt_embeds"] = tensors["prompt_embeds"][[1, 0, *range(2, 23)]]


def swap_keys(tensors):
    tensors["keys"] = tensors["keys"][[1, 0, *range(2, 23)]]


def swap_digests_too(tensors):
    swap(tensors)
    tensors["digests"] = tensors["digests"][[1, 0, *range(2, 23)]]


def duplicate(tensors):
    tensors["keys"][1] = tensors["keys"][0]


def longer(tensors):
    tensors["prompt_embeds"] = torch.cat([tensors["prompt_embeds"]] * 2, dim=1)


def another_dtype(tensors):
    tensors["prompt_embeds"] = tensors["prompt_embeds"].half()


def same_bytes_of_another_dtype(tensors):
    tensors["prompt_embeds"] = tensors["prompt_embeds"].view(torch.float16)


def fewer_keys(tensors):
    tensors["keys"] = tensors["keys"][:-1]


def fewer_rows(tensors):
    tensors["prompt_embeds"] = tensors["prompt_embeds"][:-1]


def narrow_keys(tensors):
    tensors["keys"] = tensors["keys"][:, :16]


def keys_of_another_dtype(tensors):
    tensors["keys"] = tensors["keys"].view(torch.int8)


def flat_keys(tensors):
    tensors["keys"] = tensors["keys"].reshape(-1)


def scalar_keys(tensors):
    tensors["keys"] = torch.tensor(1, dtype=torch.uint8)


def without(name):
    return lambda tensors: tensors.pop(name)


def with_more(tensors):
    tensors["more"] = torch.zeros(23, 2)


def with_a_scalar(tensors):
    tensors["more"] = torch.tensor(0.0)


def empty(tensors):
    for name in tensors:
        tensors[name] = tensors[name][:0]


@pytest.mark.parametrize(
    "change",
    [
        nan,
        swap,
        swap_keys,
        swap_digests_too,
        duplicate,
        longer,
        another_dtype,
        same_bytes_of_another_dtype,
        fewer_keys,
        fewer_rows,
        narrow_keys,
        keys_of_another_dtype,
        flat_keys,
        scalar_keys,
        without("keys"),
        without("digests"),
        without("prompt_embeds"),
        with_more,
        with_a_scalar,
        empty,
    ],
)
def test_a_shard_that_was_changed(tmp_path, change, caplog):
    shard = built(tmp_path)
    resaved(shard, change)
    assert_healed(tmp_path)
    (record,) = caplog.records
    assert str(shard) in record.getMessage() and "\n" not in record.getMessage()


@pytest.mark.parametrize(
    ("encoder", "words"),
    [
        (Encoder(torch.float32), "pooled_prompt_embeds of a prompt is float32 (4,), and bfloat16 (4,) is needed"),
        (Encoder(length=6), "prompt_embeds of a prompt is bfloat16 (6, 3), and bfloat16 (5, 3) is needed"),
    ],
)
def test_a_sound_shard_of_another_model(tmp_path, encoder, words, caplog):
    """Its digests are right."""
    shard = built(tmp_path, encoder=encoder)
    assert open_cache(tmp_path).missing(MANY) == MANY
    assert f"{shard} does not fit: {words}; set aside" in caplog.text
    assert_healed(tmp_path)


def test_shards_of_two_shapes(tmp_path, caplog):
    """Without a model to ask the older decides."""
    built(tmp_path, MANY[:4])
    second = EmbeddingCache(tmp_path / "other", "key")
    second.build(MANY[4:], Encoder(length=6).encode, 4)
    (shard,) = second.folder.iterdir()
    shutil.copy(shard, tmp_path / "key")
    cache = EmbeddingCache(tmp_path, "key")
    assert cache.missing(MANY) == MANY[4:] and "does not fit" in caplog.text
    with pytest.raises(
        ConfigError, match=r"do not fit the model: prompt_embeds .* \(6, 3\), and .* \(5, 3\) is needed"
    ):
        cache.build(MANY, Encoder(length=6).encode, 4)


def earlier_format(path):
    tensors = {**Encoder().encode(MANY), "sha256": torch.zeros(23, 32, dtype=torch.uint8)}
    safetensors.torch.save_file(tensors, path)


def of_another_key(path):
    cache = EmbeddingCache(path.parent.parent / "elsewhere", "other")
    cache.build(MANY, Encoder(salt=b"x").encode, 4)
    (shard,) = cache.folder.iterdir()
    shutil.copy(shard, path)


def later_format(path):
    safetensors.torch.save_file({"keys": torch.zeros(1)}, path, {"embeddings": "3", "text_key": "key"})


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda path: safetensors.torch.save_file({"weight": torch.zeros(3)}, path),
            "not a shard of an embedding cache",
        ),
        (lambda path: path.mkdir(), "not a file"),
        (lambda path: path.symlink_to("nowhere"), "not a file"),
        (os.mkfifo, "not a file"),
        (earlier_format, "in an earlier format, whose prompts are encoded anew (they can be deleted)"),
        (later_format, "in format '3', and this version of dpdmd has '2'"),
        (of_another_key, "embeddings of 'other', which belong in another folder"),
    ],
)
def test_what_is_not_ours_is_named_and_left_alone(tmp_path, make, words, caplog):
    (tmp_path / "key").mkdir()
    names = ["a.safetensors", "b.safetensors"]
    for name in names:
        make(tmp_path / "key" / name)
    assert_healed(tmp_path)
    assert set(names) <= set(os.listdir(tmp_path / "key"))
    first, *_ = [record.getMessage() for record in caplog.records]
    assert first == f"{tmp_path / 'key'}: a.safetensors and 1 more: {words}; ignored" or words in first
    assert len(caplog.records) == 2  # a line each time that the cache is opened
    caplog.clear()
    EmbeddingCache(tmp_path, "key", quiet=True)
    assert not caplog.records


def test_a_shard_that_may_not_be_read(tmp_path, monkeypatch):
    """As root one can read everything."""
    shard = built(tmp_path)

    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(embeddings, "open_tensors", denied)
    with pytest.raises(ConfigError, match=r"prompts\.cache_dir: .*safetensors cannot be read \(Permission denied\)"):
        open_cache(tmp_path)
    assert shard.exists()


def test_a_shard_that_cannot_be_set_aside(tmp_path, monkeypatch, caplog):
    shard = built(tmp_path)
    shard.write_bytes(b"")

    def denied(source, target):
        raise PermissionError(13, "Permission denied", str(source))

    monkeypatch.setattr(os, "rename", denied)
    assert open_cache(tmp_path).missing(MANY) == MANY
    assert "it cannot be set aside (Permission denied): delete it" in caplog.text


def damage(shard, row=0):
    """Flips a bit in the embedding of a row."""
    with shard.open("r+b") as file:
        position = open_tensors(shard)._places["prompt_embeds"][0] + row * 30
        file.seek(position)
        value = file.read(1)[0]
        file.seek(position)
        file.write(bytes([value ^ 1]))


def test_damage_while_the_cache_is_in_use(tmp_path):
    shard = built(tmp_path)
    cache, other_run = open_cache(tmp_path), open_cache(tmp_path)
    cache.verify(MANY)
    damage(shard, 5)
    for _ in range(2):  # a second time too
        with pytest.raises(DamagedFile) as error:
            cache.get(MANY[4:7])
        assert str(error.value) == (
            f"{shard} is damaged: the embedding of 'prompt 5, é' is not what was written; set aside as "
            f"{shard.name}.damaged, and the next start (--resume) encodes its prompts anew"
        )
    # Rows that are whole stay in use, by this run and by others that had opened the shard.
    assert_holds(cache, MANY[6:], Encoder())
    assert_holds(other_run, MANY[:5], Encoder())
    with pytest.raises(DamagedFile, match="it has been set aside"):
        other_run.get([MANY[5]])
    assert_healed(tmp_path)
    assert_holds(other_run, MANY[:5], Encoder())


def test_damage_that_another_run_has_put_right(tmp_path):
    shard = built(tmp_path)
    cache = open_cache(tmp_path)
    damage(shard, 5)
    assert open_cache(tmp_path).build(MANY, Encoder().encode, 4) == 1
    assert_holds(cache, MANY, Encoder())


def test_a_shard_that_is_gone(tmp_path):
    shard = built(tmp_path)
    cache = open_cache(tmp_path)
    shard.unlink()
    with pytest.raises(DamagedFile, match=r"'prompt 2, é' cannot be read \(No such file or directory\).*next start"):
        cache.get([MANY[2]])
    assert_healed(tmp_path)


def test_what_is_verified_at_the_start_is_limited(tmp_path, monkeypatch):
    shard = built(tmp_path)
    read = []
    row = EmbeddingCache._row
    monkeypatch.setattr(EmbeddingCache, "_row", lambda self, key: (read.append(key), row(self, key))[1])
    monkeypatch.setattr(embeddings, "_VERIFY_BYTES", 38 * 4)
    cache = open_cache(tmp_path)
    for _ in range(2):  # nothing twice, and no more
        cache.verify(MANY)
        assert len(read) == 4
    damage(shard, 20)
    with pytest.raises(DamagedFile):
        cache.get([MANY[20]])
    read.clear()
    monkeypatch.setattr(embeddings, "_VERIFY_BYTES", 1 << 20)
    cache = open_cache(tmp_path)
    cache.build(MANY, Encoder().encode, 4)
    cache.verify(MANY, rank=1, world_size=3)
    assert len(read) == len(MANY[1::3])


def test_embeddings_that_are_not_finite(tmp_path):
    def encode(prompts):
        encoded = Encoder(torch.float16).encode(prompts)
        for row, prompt in enumerate(prompts):
            if prompt == MANY[9]:
                encoded["prompt_embeds"][row, 2, 0] = float("inf")
        return encoded

    cache = EmbeddingCache(tmp_path, "key")
    with pytest.raises(ConfigError, match=r"prompt_embeds of 'prompt 9, é' is not finite in float16"):
        cache.build(MANY, encode, 4)
    again = EmbeddingCache(tmp_path, "key")
    assert again.missing(MANY) == MANY[8:]  # what was encoded before stays
    assert_holds(again, MANY[:8], Encoder(torch.float16))


def test_an_encoder_that_fails(tmp_path):
    """What was encoded before stays."""
    encoder = Encoder()

    def encode(prompts):
        if len(encoder.asked) == 3:
            raise RuntimeError("CUDA error")
        return encoder.encode(prompts)

    with pytest.raises(RuntimeError, match="CUDA error"):
        EmbeddingCache(tmp_path, "key").build(MANY, encode, 4)
    assert EmbeddingCache(tmp_path, "key").missing(MANY) == MANY[12:]


def test_estimate_is_what_the_shard_takes(tmp_path):
    cache = EmbeddingCache(tmp_path, "key")
    seen = []
    cache.build(MANY, Encoder().encode, 4, progress=lambda *numbers: seen.append(numbers))
    estimate = estimate_bytes(23, {"prompt_embeds": (5, 3), "pooled_prompt_embeds": (4,)}, torch.bfloat16)
    (shard,) = cache.folder.glob("*.safetensors")
    header = int.from_bytes(shard.read_bytes()[:8], "little")
    assert estimate == shard.stat().st_size - 8 - header == 23 * (19 * 2 + 64)
    assert [done for done, _, _ in seen] == [0, 4, 8, 12, 16, 20, 23]
    assert {numbers[1:] for numbers in seen} == {(23, 23 * 19 * 2)}
    # Stable Diffusion 3.5: what ten thousand prompts take
    assert estimate_bytes(
        10_000, {"prompt_embeds": (333, 4096), "pooled_prompt_embeds": (2048,)}, torch.bfloat16
    ) == pytest.approx(27.3e9, rel=0.01)


def full_disk(free):
    return lambda path: namedtuple("Usage", "total used free")(10**12, 10**12 - free, free)


def test_disk_too_small(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", full_disk(2000))
    cache, encoder = EmbeddingCache(tmp_path, "key"), Encoder()
    with pytest.raises(ConfigError, match=r"prompts\.cache_dir.*2\.35 kB.*2 kB are free"):
        cache.build(MANY, encoder.encode, 4)
    assert len(encoder.asked) == 1 and not cache.folder.exists()
    cache.build(MANY[:10], encoder.encode, 4)


def test_disk_that_fills_up(small_disk, monkeypatch):
    """One line; what was complete stays, and is used once there is room."""
    monkeypatch.setattr(embeddings, "_SHARD_BYTES", 100)
    cache, encoder = EmbeddingCache(small_disk, "key"), Encoder()
    ballast = small_disk / "ballast"

    def encode(prompts):
        if len(encoder.asked) == 3:
            with contextlib.suppress(OSError), ballast.open("wb") as file:
                file.write(bytes(1 << 20))
        return encoder.encode(prompts)

    with pytest.raises(OSError) as error:
        cache.build(MANY, encode, 4)
    message = str(error.value)
    assert message.startswith(str(cache.folder)) and message.endswith(" were needed and 0 B are free on that disk")
    assert "could not be written" in message and "\n" not in message
    ballast.unlink()
    again = EmbeddingCache(small_disk, "key")
    assert again.missing(MANY) == MANY[12:] and len(os.listdir(again.folder)) == 3
    assert again.build(MANY, Encoder().encode, 4) == 11
    assert_holds(again, MANY, Encoder())


# Conditions


class Backbone:
    """As much of a backbone as the conditioner asks for; counts how often the encoders are loaded."""

    text_key = "toy"
    text_shapes = {"prompt_embeds": (5, 3), "pooled_prompt_embeds": (4,)}  # noqa: RUF012

    def __init__(self):
        self.loaded: list[Encoder] = []
        self.alive = weakref.WeakSet()

    def load_text(self, device, dtype):
        text = Encoder(dtype)
        self.loaded.append(text.asked)
        self.alive.add(text)
        return text


def conditioner(backbone, cache_dir, *, encoding="cache", negative="", rank=0, world_size=1, barrier=None, **others):
    config = PromptsConfig(
        encoding=encoding, cache_dir=None if cache_dir is None else str(cache_dir), negative_prompt=negative
    )
    return make_conditioner(
        backbone, config, MANY, "cpu", rank, world_size, barrier or (lambda: None), extra_prompts=("extra",), **others
    )


@pytest.mark.parametrize("encoding", ["cache", "stream"])
def test_conditions(tmp_path, encoding):
    backbone = Backbone()
    made = conditioner(backbone, tmp_path, encoding=encoding, negative="ugly")
    cond, uncond, expected = made.cond([MANY[3], "extra"]), made.uncond(3), Encoder(torch.float32)
    for name, value in expected.encode([MANY[3], "extra"]).items():
        assert torch.equal(cond[name], value)
    for name, value in expected.encode(["ugly"] * 3).items():
        assert torch.equal(uncond[name], value)
    # Encoders stay where they are needed and nowhere else.
    assert len(backbone.alive) == (1 if encoding == "stream" else 0)


def test_no_negative_prompt(tmp_path):
    assert conditioner(Backbone(), tmp_path, negative=None).uncond(2) is None


def test_encoders_are_not_loaded_when_nothing_is_missing(tmp_path):
    first, second = Backbone(), Backbone()
    conditioner(first, tmp_path)
    barriers = []
    made = conditioner(second, tmp_path, barrier=lambda: barriers.append(1))
    assert len(first.loaded) == 1 and not second.loaded and barriers == [1]
    assert torch.equal(made.cond(MANY)["prompt_embeds"], Encoder(torch.float32).encode(MANY)["prompt_embeds"])


def test_dtypes_do_not_mix(tmp_path):
    for dtype in (torch.bfloat16, torch.float32):
        backbone = Backbone()
        assert conditioner(backbone, tmp_path, dtype=dtype).cond(MANY)["prompt_embeds"].dtype == dtype
        assert len(backbone.loaded) == 1


def test_ranks_share_the_work(tmp_path):
    """Rank 1 works inside rank 0's barrier: what two processes do, one after the other."""
    backbones = [Backbone(), Backbone()]
    made = []

    def barrier():
        made.append(conditioner(backbones[1], tmp_path, rank=1, world_size=2))

    made.append(conditioner(backbones[0], tmp_path, rank=0, world_size=2, barrier=barrier))
    asked = [{prompt for batch in backbone.loaded[0] for prompt in batch} for backbone in backbones]
    assert not asked[0] & asked[1] and asked[0] | asked[1] == {*MANY, "extra", ""}
    for each in made:
        assert torch.equal(each.cond(MANY)["prompt_embeds"], Encoder(torch.float32).encode(MANY)["prompt_embeds"])


def test_damage_is_put_right_before_the_run(tmp_path, caplog):
    conditioner(Backbone(), tmp_path)
    (shard,) = tmp_path.rglob("*.safetensors")
    damage(shard, 6)
    backbone, whole = Backbone(), Encoder(torch.float32).encode(MANY)
    made = conditioner(backbone, tmp_path)
    assert backbone.loaded == [[[MANY[3]]]]  # a row of 60 bytes in float32
    assert str(shard) in caplog.text and len(caplog.records) == 1
    assert all(torch.equal(value, whole[name]) for name, value in made.cond(MANY).items())
    backbone = Backbone()
    conditioner(backbone, tmp_path)
    assert not backbone.loaded and len(caplog.records) == 1


@pytest.mark.parametrize("row", [2, 3])
def test_ranks_put_damage_right_together(tmp_path, row):
    """Each verifies its share; the other need not know of it."""
    conditioner(Backbone(), tmp_path)
    (shard,) = tmp_path.rglob("*.safetensors")
    damage(shard, 2 * row)
    backbones, made = [Backbone(), Backbone()], []

    def barrier():
        made.append(conditioner(backbones[1], tmp_path, rank=1, world_size=2))

    made.append(conditioner(backbones[0], tmp_path, rank=0, world_size=2, barrier=barrier))
    assert [backbone.loaded for backbone in backbones] == ([[[[MANY[2]]]], []] if row == 2 else [[], [[[MANY[3]]]]])
    for each in made:
        assert torch.equal(each.cond(MANY)["prompt_embeds"], Encoder(torch.float32).encode(MANY)["prompt_embeds"])


def test_another_length_is_encoded_anew(tmp_path, caplog):
    backbone = Backbone()
    backbone.load_text = lambda device, dtype: Encoder(dtype, length=6)
    backbone.text_shapes = {**Backbone.text_shapes, "prompt_embeds": (6, 3)}
    conditioner(backbone, tmp_path)
    made = conditioner(Backbone(), tmp_path)
    assert made.cond(MANY)["prompt_embeds"].shape == (23, 5, 3)
    assert "float32 (6, 3), and float32 (5, 3) is needed" in caplog.text


def test_errors_of_reading_ahead_reach_the_main_thread(tmp_path):
    made = conditioner(Backbone(), tmp_path)
    (shard,) = tmp_path.rglob("*.safetensors")
    damage(shard, 2 * 5)
    made.prefetch(MANY[5:7])
    with pytest.raises(DamagedFile, match=r"the embedding of 'prompt 5, é' is not what was written"):
        made.cond(MANY[5:7])
    # Met ahead, and then other prompts were asked for first.
    made.prefetch(MANY[5:7])
    assert len(made.cond(MANY[7:9])["prompt_embeds"]) == 2
    with pytest.raises(DamagedFile, match=r"the embedding of 'prompt 5, é' is not what was written"):
        made.cond(MANY[5:7])


@pytest.mark.parametrize("encoding", ["cache", "stream"])
def test_embeddings_are_checked_wherever_they_come_from(tmp_path, encoding):
    class Broken(Encoder):
        def encode(self, prompts):
            encoded = super().encode(prompts)
            encoded["pooled_prompt_embeds"][prompts.index(MANY[1]) if MANY[1] in prompts else 0, 0] = float("nan")
            return encoded

    backbone = Backbone()
    backbone.load_text = lambda device, dtype: Broken(dtype)
    with pytest.raises(ConfigError, match=r"prompts: pooled_prompt_embeds of 'prompt 1, é' is not finite in float32"):
        conditioner(backbone, tmp_path, encoding=encoding, negative=None).cond(MANY[:3])
    backbone.load_text = lambda device, dtype: Encoder(dtype, length=7)
    with pytest.raises(
        ConfigError, match=r"do not fit the model: prompt_embeds .* \(7, 3\), and .* \(5, 3\) is needed"
    ):
        conditioner(backbone, tmp_path, encoding=encoding, negative=None).cond(MANY[:3])


def test_a_folder_that_cannot_be_used_is_refused_before_the_encoders_are_loaded(tmp_path, monkeypatch):
    backbone = Backbone()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"prompts\.cache_dir: .*file.* cannot be read \(Not a directory\)"):
        conditioner(backbone, tmp_path / "file")

    def denied(**arguments):  # as root one can write everywhere
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", denied)
    with pytest.raises(
        ConfigError, match=r"prompts\.cache_dir: .*toy-float32 cannot be written to \(Permission denied"
    ):
        conditioner(backbone, tmp_path)
    with pytest.raises(ConfigError, match=r"prompt 'half \\ud83d' holds an unpaired surrogate"):
        conditioner(backbone, tmp_path, negative="half \ud83d")
    assert not backbone.loaded


def test_a_folder_of_ones_own(tmp_path):
    """Ranks that do not see each other's shards, as with a cache on a disk of each host."""
    with pytest.raises(ConfigError, match=r"prompts\.cache_dir.*12 prompts have no embedding.*same folder"):
        conditioner(Backbone(), tmp_path, rank=0, world_size=2)


def test_disk_is_asked_before_the_encoders_are_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", full_disk(500))
    backbone = Backbone()
    with pytest.raises(ConfigError, match=r"500 B are free"):
        conditioner(backbone, tmp_path / "not" / "there")
    assert not backbone.loaded


def test_cache_dir_is_needed():
    with pytest.raises(ConfigError, match=r"prompts\.cache_dir is not set"):
        conditioner(Backbone(), None)


def test_cached_and_streamed_are_the_same_bits(tiny_pipeline, tmp_path):
    backbone = SD3(ModelConfig(pipeline=str(tiny_pipeline), resolution=32, max_sequence_length=12))
    prompts = ["a red ring", "a big blue square at left", "zebra"]
    made = {
        encoding: make_conditioner(
            backbone,
            # One at a time, so that both ways multiply matrices of one size.
            PromptsConfig(encoding=encoding, cache_dir=str(tmp_path), encode_batch_size=1),
            prompts,
            "cpu",
            0,
            1,
            lambda: None,
            dtype=torch.bfloat16,
        )
        for encoding in ("cache", "stream")
    }
    for prompt in prompts:
        cached, streamed = made["cache"].cond([prompt]), made["stream"].cond([prompt])
        assert all(torch.equal(cached[name], streamed[name]) for name in streamed)
    cached, streamed = made["cache"].uncond(2), made["stream"].uncond(2)
    assert all(torch.equal(cached[name], streamed[name]) for name in streamed)
    assert cached["prompt_embeds"].dtype == torch.bfloat16


def test_import_is_light():
    code = (
        "import sys, dpdmd.run.prompts, dpdmd.run.embeddings\n"
        "print([m for m in ('diffusers', 'transformers', 'deepspeed') if m in sys.modules])"
    )
    assert run_command([sys.executable, "-c", code]).stdout.strip() == "[]"
