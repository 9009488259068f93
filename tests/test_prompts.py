"""Prompt files, their order over shards and epochs, the embedding cache, and the conditions made of it."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import weakref
from collections import namedtuple

import pytest
import safetensors.torch
import torch

from dpdmd import prompts as prompts_module
from dpdmd.backbones.sd3 import SD3
from dpdmd.config import ConfigError, ModelConfig, PromptsConfig
from dpdmd.prompts import EmbeddingCache, PromptOrder, estimate_bytes, make_conditioner, read_prompts

# Reading


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def refusal(path, field="prompt") -> str:
    with pytest.raises(ConfigError) as error:
        read_prompts(path, field)
    assert str(path) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "a ring\n\n  two rings \r\na ring", ["a ring", "two rings", "a ring"]),
        ("bom.txt", b"\xef\xbb\xbfa ring\n", ["a ring"]),
        ("CASE.TXT", "a ring", ["a ring"]),
        ("numbered.txt", "0 --- a ring\n12---two --- rings\n\n 3 --- \n", ["a ring", "two --- rings"]),
        ("partly.txt", "0 --- a ring\na cross", ["0 --- a ring", "a cross"]),  # one line without: it is text
        ("odd.txt", "line\u2028separator\x0cfeed\n日本", ["line\u2028separator\x0cfeed", "日本"]),
        ("a.jsonl", '{"prompt": "a ring", "n": 1}\n\n"a cross"\n{"prompt": " "}\n', ["a ring", "a cross"]),
        ("a.csv", 'id,prompt\r\n1,"a ring, red\nand ""big"""\r\n2,\r\n3,b\r\n', ['a ring, red\nand "big"', "b"]),
        ("bom.csv", b"\xef\xbb\xbfprompt\na ring\n", ["a ring"]),  # the mark must not become part of the column's name
    ],
)
def test_read_prompts(tmp_path, name, content, expected):
    assert read_prompts(write(tmp_path, name, content)) == expected


def test_read_prompts_from_another_field(tmp_path):
    assert read_prompts(write(tmp_path, "a.csv", "text,prompt\na,b\n"), "text") == ["a"]
    assert read_prompts(write(tmp_path, "a.jsonl", '{"text": "a", "prompt": "b"}'), "text") == ["a"]


def test_wrong_encoding_says_where(tmp_path):
    message = refusal(write(tmp_path, "a.txt", b"a ring\nf\xfcr\n"))  # latin-1
    assert "line 2, byte offset 8: byte 0xfc is not UTF-8" in message
    assert "line 1, byte offset 0" in refusal(write(tmp_path, "b.csv", "prompt\na".encode("utf-16")))
    assert "line 2, byte offset 10" in refusal(write(tmp_path, "c.jsonl", b'"a ring"\n"\xe3\x81"'))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", "", "holds no prompt"),
        ("a.txt", " \n\n", "holds no prompt"),
        ("a.jsonl", "\n", "holds no prompt"),
        ("a.csv", "", "holds no prompt"),
        ("a.csv", "prompt\n", "holds no prompt"),
        ("a.parquet", "x", "'.parquet'; .txt, .jsonl, .csv can be read"),
        ("prompts", "x", "''; .txt"),
        ("a.jsonl", '"a"\n{"text": 1, "id": 2}', "line 2: no field 'prompt'; there are 'text', 'id'"),
        ("a.jsonl", '"a"\n{"prompt": 1}', "line 2: found int where a string is needed"),
        ("a.jsonl", '"a"\n\n[1]', "line 3: found list where a string is needed"),
        ("a.jsonl", '"a"\n{"prompt": "b"', "line 2: not JSON"),
        ("a.jsonl", '"\\ud83d"', "line 1: holds an unpaired surrogate"),
        ("a.csv", "text,id\na,1\n", "no column 'prompt' (prompts.field); there are 'text', 'id'"),
        ("a.csv", "id,prompt\n1,a\n2\n", "line 3: too short"),
        ("a.csv", 'prompt\na\n"never closed\nb\n', "not CSV"),
    ],
)
def test_what_cannot_be_read(tmp_path, name, content, words):
    assert words in refusal(write(tmp_path, name, content))


def test_missing_file_and_folder(tmp_path):
    assert "No such file" in refusal(tmp_path / "none.txt")
    (tmp_path / "folder.txt").mkdir()
    assert "cannot be read" in refusal(tmp_path / "folder.txt")


# Order


@pytest.mark.parametrize(("num_prompts", "num_shards", "batch_size"), [(12, 2, 3), (7, 3, 2), (1, 2, 2), (5, 1, 8)])
def test_every_epoch_shows_every_prompt_once(num_prompts, num_shards, batch_size):
    order = PromptOrder(num_prompts, seed=3)
    stream = [
        index
        for iteration in range(5 * num_prompts)
        for shard in range(num_shards)
        for index in order.indices(iteration, shard, num_shards, batch_size)
    ]
    epochs = [stream[start : start + num_prompts] for start in range(0, len(stream), num_prompts)]
    assert all(sorted(epoch) == list(range(num_prompts)) for epoch in epochs if len(epoch) == num_prompts)
    if num_prompts >= 7:
        assert len({tuple(epoch) for epoch in epochs[:5]}) == 5
        assert list(range(num_prompts)) not in epochs[:5]


def test_a_batch_depends_on_its_place_alone():
    """Asked in any order, by any object: what makes a resumed run exact."""
    places = [(iteration, shard) for iteration in range(40) for shard in range(2)]
    once = {place: PromptOrder(9, seed=1).indices(*place, 2, 4) for place in places}
    order = PromptOrder(9, seed=1)
    assert all(order.indices(*place, 2, 4) == once[place] for place in reversed(places))
    assert any(PromptOrder(9, seed=2).indices(*place, 2, 4) != once[place] for place in places)


def test_the_order_is_that_of_every_version():
    """A literal, so that a change of library or code that would break resuming shows."""
    assert PromptOrder(8, seed=0).indices(0, 0, 1, 16) == [3, 2, 1, 6, 0, 7, 4, 5, 7, 4, 5, 1, 6, 2, 0, 3]


def test_the_split_into_shards_does_not_matter():
    order = PromptOrder(11, seed=0)
    for iteration in range(12):
        whole = order.indices(iteration, 0, 1, 4)
        assert order.indices(iteration, 0, 2, 2) + order.indices(iteration, 1, 2, 2) == whole
        assert [order.indices(iteration, shard, 4, 1)[0] for shard in range(4)] == whole


def test_shards_are_disjoint_within_an_epoch():
    order = PromptOrder(64, seed=0)
    shown = [{index for iteration in range(4) for index in order.indices(iteration, shard, 4, 4)} for shard in range(4)]
    assert sum(map(len, shown)) == 64 == len(set.union(*shown))


@pytest.mark.parametrize("arguments", [(-1, 0, 1, 1), (0, 1, 1, 1), (0, -1, 1, 1), (0, 0, 1, -1)])
def test_order_refuses_the_impossible(arguments):
    with pytest.raises(ValueError, match="shard"):
        PromptOrder(3, 0).indices(*arguments)
    with pytest.raises(ValueError, match="num_prompts = 0"):
        PromptOrder(0, 0)


# Cache


class Encoder:
    """Embeddings that any two prompts differ in, and a record of what was asked."""

    def __init__(self, dtype=torch.bfloat16, salt=b""):
        self.asked: list[list[str]] = []
        self.dtype, self.salt = dtype, salt

    def encode(self, prompts):
        self.asked.append(list(prompts))
        seeds = [hashlib.sha256(prompt.encode() + self.salt).digest()[0:4] for prompt in prompts]
        generators = [torch.Generator().manual_seed(int.from_bytes(seed, "big")) for seed in seeds]
        return {
            "prompt_embeds": torch.stack([torch.randn(5, 3, generator=g) for g in generators]).to(self.dtype),
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
    monkeypatch.setattr(prompts_module, "_SHARD_BYTES", 100)  # every batch of 4 prompts is more
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


def test_a_killed_build_leaves_nothing_half_written(tmp_path, monkeypatch):
    monkeypatch.setattr(prompts_module, "_SHARD_BYTES", 100)
    cache, save, written = EmbeddingCache(tmp_path, "key"), safetensors.torch.save_file, []

    def dies_at_the_third(tensors, path):
        save(tensors, path)
        written.append(path)
        if len(written) == 3:
            os.truncate(path, os.path.getsize(path) // 2)
            raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.torch, "save_file", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        cache.build(MANY, Encoder().encode, 4)
    assert len(list(cache.folder.iterdir())) == 2  # two whole shards, no temporary file

    monkeypatch.setattr(safetensors.torch, "save_file", save)
    (cache.folder / "left.tmp").write_bytes(b"half of a shard")  # what SIGKILL would leave
    encoder = Encoder()
    assert EmbeddingCache(tmp_path, "key").build(MANY, encoder.encode, 4) == 15
    assert_holds(EmbeddingCache(tmp_path, "key"), MANY, Encoder())


def test_a_shard_appears_in_one_step(tmp_path, monkeypatch):
    """Killed between writing and naming: nothing bears a shard's name yet."""

    def killed(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    cache = EmbeddingCache(tmp_path, "key")
    with pytest.raises(KeyboardInterrupt):
        cache.build(MANY, Encoder().encode, 4)
    assert not list(cache.folder.iterdir())


def test_leftovers_go_when_they_are_old(tmp_path, monkeypatch):
    cache = EmbeddingCache(tmp_path, "key")
    cache.build(MANY[:2], Encoder().encode, 4)
    left = cache.folder / "left.tmp"
    left.touch()
    cache.build(MANY[:3], Encoder().encode, 4)
    assert left.exists()  # may be another process's, at work
    monkeypatch.setattr(prompts_module, "_STALE_SECONDS", -1.0)
    cache.build(MANY[:4], Encoder().encode, 4)
    assert not left.exists()


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_damaged_shard(tmp_path, keep):
    cache = EmbeddingCache(tmp_path, "key")
    cache.build(MANY, Encoder().encode, 4)
    (shard,) = cache.folder.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(ConfigError, match=r"damaged.*delete the file") as error:
        EmbeddingCache(tmp_path, "key")
    assert str(shard) in str(error.value)
    shard.unlink()
    assert EmbeddingCache(tmp_path, "key").missing(MANY) == MANY


def test_a_foreign_file_among_the_shards(tmp_path):
    (tmp_path / "key").mkdir()
    safetensors.torch.save_file({"weight": torch.zeros(3)}, tmp_path / "key" / "model.safetensors")
    with pytest.raises(ConfigError, match=r"model\.safetensors: is not a shard"):
        EmbeddingCache(tmp_path, "key")


def test_embeddings_that_are_not_finite(tmp_path):
    def encode(prompts):
        encoded = Encoder(torch.float16).encode(prompts)
        encoded["prompt_embeds"][1, 2, 0] = float("inf")
        return encoded

    cache = EmbeddingCache(tmp_path, "key")
    with pytest.raises(ValueError, match=r"prompt_embeds of 'prompt 1, é' is not finite in torch\.float16"):
        cache.build(MANY, encode, 4)
    assert not list(cache.folder.iterdir())


def test_estimate_is_what_the_shard_takes(tmp_path):
    cache = EmbeddingCache(tmp_path, "key")
    seen = []
    cache.build(MANY, Encoder().encode, 4, progress=lambda *numbers: seen.append(numbers))
    estimate = estimate_bytes(23, {"prompt_embeds": (5, 3), "pooled_prompt_embeds": (4,)}, torch.bfloat16)
    (shard,) = cache.folder.glob("*.safetensors")
    header = int.from_bytes(shard.read_bytes()[:8], "little")
    assert estimate == shard.stat().st_size - 8 - header == 23 * (19 * 2 + 32)
    assert [done for done, _, _ in seen] == [0, 4, 8, 12, 16, 20, 23]
    assert {numbers[1:] for numbers in seen} == {(23, 23 * 19 * 2)}
    # Stable Diffusion 3.5: what ten thousand prompts take
    assert estimate_bytes(
        10_000, {"prompt_embeds": (333, 4096), "pooled_prompt_embeds": (2048,)}, torch.bfloat16
    ) == pytest.approx(27.3e9, rel=0.01)


def full_disk(free):
    return lambda path: namedtuple("Usage", "total used free")(10**12, 10**12 - free, free)


def test_disk_too_small(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", full_disk(500))
    cache, encoder = EmbeddingCache(tmp_path, "key"), Encoder()
    with pytest.raises(ConfigError, match=r"prompts\.cache_dir.*874 B.*500 B are free"):
        cache.build(MANY, encoder.encode, 4)
    assert len(encoder.asked) == 1 and not list(cache.folder.iterdir())
    cache.build(MANY[:10], encoder.encode, 4)


def test_a_shard_that_cannot_be_written(tmp_path, monkeypatch):
    def full(tensors, path):
        raise safetensors.SafetensorError("No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    cache = EmbeddingCache(tmp_path, "key")
    with pytest.raises(OSError, match=r"could not be written: No space left"):
        cache.build(MANY, Encoder().encode, 4)
    assert not list(cache.folder.iterdir())


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
        "import sys, dpdmd.prompts; print([m for m in ('diffusers', 'transformers', 'deepspeed') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
