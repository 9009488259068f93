"""A pipeline's files, damaged one at a time: each is refused in one line that names the file, before or as it is loaded."""

from __future__ import annotations

import json
import os
import re
import shutil
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from dpdmd.backbones import files, load_backbone
from dpdmd.config import ConfigError, ModelConfig

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 9523\n"
FAMILIES = {"sd3": "tiny_pipeline", "flux": "tiny_flux"}
ENCODERS = {"sd3": ("text_encoder", "text_encoder_2", "text_encoder_3"), "flux": ("text_encoder", "text_encoder_2")}


def config(folder, family="sd3", **values) -> ModelConfig:
    return ModelConfig(
        **{"pipeline": str(folder), "family": family, "resolution": 32, "max_sequence_length": 8, **values}
    )


def load_all(folder, family="sd3"):
    """Everything that a run loads, in the run's order."""
    backbone = load_backbone(config(folder, family))
    backbone.check_weights()
    text = backbone.load_text("cpu", torch.float32).encode(["a red ring"])
    transformer = backbone.load_transformer("teacher", torch.float32)
    decoder = backbone.load_decoder("cpu")
    return text, transformer, decoder


def refusal(folder, family="sd3", load=load_all) -> str:
    with pytest.raises(ConfigError) as error:
        load(folder, family)
    message = str(error.value)
    assert "\n" not in message and message.startswith("model.pipeline = "), message
    return message


def ahead(folder, family):
    """What a run does before it encodes the first prompt."""
    load_backbone(config(folder, family)).check_weights()


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def folder(family, request, tmp_path):
    """A copy that may be changed."""
    return shutil.copytree(request.getfixturevalue(FAMILIES[family]), tmp_path / "pipeline")


def components(family):
    return ["transformer", "vae", *ENCODERS[family]]


def weights_of(folder, component) -> Path:
    (path,) = (folder / component).glob("*.safetensors")
    return path


def edit(path, change):
    """change: tensors to tensors."""
    tensors = change(load_file(path))
    path.unlink()
    save_file(tensors, path, metadata={"format": "pt"})


def cut(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def replaced_by_folder(path):
    path.unlink()
    path.mkdir()


def replaced_by_link(path):
    path.unlink()
    path.symlink_to("/no/such/place")


def replaced_by_pipe(path):
    path.unlink()
    os.mkfifo(path)


BROKEN_FILES = {
    "pointer": (lambda path: path.write_text(POINTER), "is a git-lfs pointer, .*: run `git lfs pull`"),
    "empty": (lambda path: path.write_bytes(b""), "it is empty"),
    "no header": (lambda path: cut(path, 0.0005), "cannot be read"),
    "half": (lambda path: cut(path, 0.5), "cannot be read"),
    "a byte short": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "cannot be read"),
    "a page": (lambda path: path.write_text("<!DOCTYPE html>\n<html>Not found</html>\n" * 9), "cannot be read"),
    "folder": (replaced_by_folder, "it is a folder"),
    "dead link": (replaced_by_link, "it is a link to /no/such/place, which is not there"),
    "pipe": (replaced_by_pipe, "a pipe, where a file is needed"),
}


@pytest.mark.parametrize("damage", BROKEN_FILES)
def test_broken_files_of_weights(folder, family, damage):
    """Of every component, and before anything is encoded."""
    apply, expected = BROKEN_FILES[damage]
    for component in components(family):
        path = weights_of(folder, component)
        kept = path.read_bytes()
        apply(path)
        message = refusal(folder, family, ahead)
        assert str(path) in message and re.search(expected, message), message
        if not path.is_symlink() and path.is_dir():
            path.rmdir()
        else:
            path.unlink()
        path.write_bytes(kept)
    load_all(folder, family)


def first_matrix(tensors):
    return next(name for name in sorted(tensors) if tensors[name].ndim == 2)


def with_value(value):
    def change(tensors):
        tensors[first_matrix(tensors)].view(-1)[-1] = value
        return tensors

    return change


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (torch.nan, torch.float32),
        (torch.inf, torch.float32),
        (torch.nan, torch.bfloat16),
        (-torch.inf, torch.bfloat16),
        (torch.inf, torch.float16),
    ],
    ids=str,
)
def test_numbers_that_are_not_finite(folder, family, value, dtype):
    for component in components(family):
        path = weights_of(folder, component)
        kept = path.read_bytes()
        edit(path, lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()})
        edit(path, with_value(value))
        name, count = first_matrix(load_file(path)), len(load_file(path))
        message = refusal(folder, family)
        assert f"{component}'s weights in {path.parent}: NaN or infinity in 1 of {count} tensors" in message
        assert f"such as {name} (1 of " in message
        path.write_bytes(kept)


def test_a_number_too_large_for_the_networks_dtype(folder, family):
    path = weights_of(folder, "transformer")
    edit(path, with_value(torch.finfo(torch.float32).max))
    backbone = load_backbone(config(folder, family))
    backbone.load_transformer("student", torch.float32)
    with pytest.raises(ConfigError, match="NaN or infinity in 1 of"):
        backbone.load_transformer("student", torch.bfloat16)


def test_the_check_copies_nothing():
    """No more than a few numbers of its own, whatever the tensor's size."""
    tensor = torch.zeros(1 << 22, dtype=torch.bfloat16)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        files.check_finite({"a": tensor, "none": torch.zeros(0), "counts": torch.arange(3)}, "here")
    assert max(event.self_cpu_memory_usage for event in profile.events()) < 1 << 16


def test_how_many_tensors_are_not_finite():
    tensors = {"a": torch.zeros(3), "b": torch.tensor([1.0, torch.nan, torch.inf]), "c": torch.tensor([-torch.inf])}
    with pytest.raises(ConfigError, match=r"^here: NaN or infinity in 2 of 3 tensors, such as b \(2 of 3 values\)"):
        files.check_finite(tensors, "here")


CHANGES = {
    "lacks": (lambda tensors, name: tensors.pop(name), "lacks 1 tensor"),
    "besides": (lambda tensors, name: tensors.update({f"{name}.more": torch.zeros(2)}), "has besides 1 tensor"),
    "shape": (lambda tensors, name: tensors.update({name: torch.zeros(3, 5)}), "shape|size"),
    "int8": (lambda tensors, name: tensors.update({name: tensors[name].to(torch.int8)}), "as I8; one of F64, F32"),
    "int64": (lambda tensors, name: tensors.update({name: tensors[name].long()}), "as I64; one of F64, F32"),
    "float8": (
        lambda tensors, name: tensors.update({name: tensors[name].to(torch.float8_e4m3fn)}),
        "as F8_E4M3; one of F64, F32",
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_tensors_that_do_not_fit_the_configuration(folder, family, what):
    apply, expected = CHANGES[what]
    for component in components(family):
        path = weights_of(folder, component)
        kept = path.read_bytes()
        name = first_matrix(load_file(path))

        def change(tensors, name=name):
            apply(tensors, name)
            return tensors

        edit(path, change)
        # Dtypes are in the headers of all; the transformers' names and shapes are compared ahead of time too.
        early = component == "transformer" or "one of F64" in expected
        message = refusal(folder, family, ahead if early else load_all)
        assert re.search(expected, message) and name.split(".", 2)[-1] in message, message
        path.write_bytes(kept)


def test_parts_of_a_larger_model_are_passed_over(folder, family):
    """A text encoder's file may be a whole model's: its other modules, and the places that old CLIP models keep."""
    path = weights_of(folder, "text_encoder")
    edit(
        path,
        lambda tensors: (
            tensors
            | {"logit_scale": torch.ones(()), "vision_model.pre_layrnorm.weight": torch.ones(3)}
            | {"text_model.embeddings.position_ids": torch.arange(16)[None]}
        ),
    )
    load_all(folder, family)


# Settings

BROKEN_JSON = {
    "pointer": POINTER,
    "empty": "",
    "cut off": "{",
    "list": "[1]",
    "null": "null",
    "text": '"text"',
    "not UTF-8": b"\xff\xfe{}",
    "deep": "[" * 100_000,
}


def settings_files(family):
    return [
        "model_index.json",
        "transformer/config.json",
        "vae/config.json",
        "scheduler/scheduler_config.json",
        "tokenizer/tokenizer_config.json",
        *(f"{encoder}/config.json" for encoder in ENCODERS[family]),
    ]


@pytest.mark.parametrize("damage", [*BROKEN_JSON, "folder", "dead link", "pipe"])
def test_broken_json(folder, family, damage):
    for name in settings_files(family):
        path = folder / name
        kept = path.read_bytes()
        if damage == "folder":
            replaced_by_folder(path)
        elif damage == "dead link":
            replaced_by_link(path)
        elif damage == "pipe":
            replaced_by_pipe(path)
        else:
            content = BROKEN_JSON[damage]
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        message = refusal(folder, family, ahead)
        assert str(path) in message or (damage == "dead link" and str(path.parent) in message), message
        assert ("git lfs pull" in message) == (damage == "pointer")
        if damage == "folder":
            path.rmdir()
        else:
            path.unlink()
        path.write_bytes(kept)


VALUES = ["two", None, [2], {"a": 1}, 1.5, True, -1, 0, float("nan")]
NUMBERS = {
    "transformer/config.json": ("num_layers", "num_attention_heads", "attention_head_dim", "in_channels", "patch_size"),
    "vae/config.json": ("latent_channels", "block_out_channels", "scaling_factor"),
    "scheduler/scheduler_config.json": ("num_train_timesteps", "shift"),
    "text_encoder/config.json": ("hidden_size", "max_position_embeddings", "vocab_size", "num_hidden_layers"),
    "tokenizer/tokenizer_config.json": ("model_max_length",),
}
POSSIBLE = {("shift", 1.5), ("scaling_factor", 1.5)}


@pytest.mark.parametrize("file", NUMBERS)
def test_settings_of_a_wrong_kind(folder, family, file):
    path = folder / file
    kept = path.read_text()
    for name in NUMBERS[file]:
        for value in VALUES:
            if not isinstance(value, list | dict) and (name, value) in POSSIBLE:
                continue
            if family == "flux" and name == "shift":
                continue  # its scheduler shifts by resolution
            path.write_text(json.dumps(json.loads(kept) | {name: value}))
            try:
                message = refusal(folder, family)
            except pytest.fail.Exception:
                pytest.fail(f"{file} with {name} = {value!r} was taken")
            assert file.split("/")[0] in message, message
    path.write_text(kept)


def test_settings_that_are_possible_and_make_no_sense(folder, family):
    for file, name, value, words in (
        ("scheduler/scheduler_config.json", "num_train_timesteps", 1, "greater than or equal to 2"),
        ("scheduler/scheduler_config.json", "stochastic_sampling", True, "set it to false"),
        ("scheduler/scheduler_config.json", "invert_sigmas", 1, "valid boolean"),
        ("scheduler/scheduler_config.json", "time_shift_type", "other", "'exponential' or 'linear'"),
        ("transformer/config.json", "num_layers", 10**9, "at most 1024 makes sense"),
        ("transformer/config.json", "attention_head_dim", 10**9, "at most 1048576 makes sense"),
        ("text_encoder/config.json", "num_hidden_layers", 10**9, "less than or equal to 1024"),
        (f"{ENCODERS[family][-1]}/config.json", "num_layers", 10**9, "less than or equal to 1024"),
    ):
        path = folder / file
        kept = path.read_text()
        path.write_text(json.dumps(json.loads(kept) | {name: value}))
        message = refusal(folder, family)
        assert file.split("/")[0] in message and name in message and words in message, message
        path.write_text(kept)


@pytest.mark.parametrize("random_init", [False, True])
def test_a_transformer_that_cannot_be_built(folder, family, random_init):
    """Numbers that are right each by itself are refused before anything is loaded, by a plan and a benchmark too."""
    path = folder / "transformer/config.json"
    content = json.loads(path.read_text())
    cases = {
        "sd3": [("qk_norm", "group_norm", "config.json cannot be read")],
        "flux": [("axes_dims_rope", axes, "even numbers are needed") for axes in ([4, 6, 8], [3, 5, 8], [-4, 10, 10])],
    }
    for name, value, words in cases[family]:
        path.write_text(json.dumps(content | {name: value}))
        with pytest.raises(ConfigError, match=f"transformer/.*{words}"):
            load_backbone(config(folder, family, random_init=random_init))


def test_settings_that_show_when_a_prompt_is_encoded(folder, family):
    for file, name, value in (
        ("text_encoder/config.json", "eos_token_id", [2]),
        ("text_encoder/config.json", "layer_norm_eps", None),
        (f"{ENCODERS[family][-1]}/config.json", "relative_attention_max_distance", -1),
        ("tokenizer/tokenizer_config.json", "pad_token", None),
    ):
        path = folder / file
        kept = path.read_text()
        path.write_text(json.dumps(json.loads(kept) | {name: value}))
        assert "a prompt cannot be read by its tokenizers and text encoders" in refusal(folder, family), name
        path.write_text(kept)


@pytest.mark.parametrize("entry", ["text", 5, [], ["diffusers"], ["diffusers", 5], ["a", "b", "c"], {"a": "b"}, True])
def test_entries_of_the_index_of_a_wrong_kind(folder, family, entry):
    path = folder / "model_index.json"
    content = json.loads(path.read_text())
    for component in ("transformer", "vae", "scheduler", "tokenizer", "text_encoder"):
        path.write_text(json.dumps(content | {component: entry}))
        assert component in refusal(folder, family)
    for class_name in (5, None, ["StableDiffusion3Pipeline"]):
        path.write_text(json.dumps(content | {"_class_name": class_name}))
        assert "is needed (model.family)" in refusal(folder, family)


def test_a_schedule_that_does_not_fall(folder, family):
    path = folder / "scheduler/scheduler_config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"invert_sigmas": True}))
    assert "times that fall from 1 towards 0 are needed" in refusal(folder, family)


# Tokenizers


def test_tokenizers_that_do_not_load(folder, family):
    tokenizers = [encoder.replace("text_encoder", "tokenizer") for encoder in ENCODERS[family]]
    for tokenizer in tokenizers:
        for path in sorted((folder / tokenizer).iterdir()):
            kept = path.read_bytes()
            path.write_text(POINTER)
            message = refusal(folder, family, ahead)
            assert str(path) in message and "git lfs pull" in message
            if path.name == "tokenizer.json":
                for content in (b"", b"{", b"[]", b'{"model": 5}', b"\xff"):
                    path.write_bytes(content)
                    assert str(folder / tokenizer) in refusal(folder, family)
            replaced_by_pipe(path)
            assert f"{path} cannot be read (a pipe" in refusal(folder, family, ahead)
            path.unlink()
            path.write_bytes(kept)
    index = folder / "model_index.json"
    content = json.loads(index.read_text())
    index.write_text(json.dumps(content | {"tokenizer": ["transformers", "NoSuchTokenizer"]}))
    assert "NoSuchTokenizer" in refusal(folder, family)


def test_a_tokenizer_with_more_tokens_than_the_encoder_knows(folder, family):
    path = folder / "text_encoder"
    settings = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(settings | {"vocab_size": 10}))
    edit(
        weights_of(folder, "text_encoder"),
        lambda tensors: {n: t[:10].clone() if "token_embedding" in n else t for n, t in tensors.items()},
    )
    message = refusal(folder, family)
    assert "its tokenizer makes" in message and "text_encoder knows 10" in message


# Shards


def shard(folder, component):
    """Two files in the place of the one, and the index that names them."""
    path = weights_of(folder, component)
    tensors = load_file(path)
    names, stem = sorted(tensors), path.name.removesuffix(".safetensors")
    parts = {
        f"{stem}-00001-of-00002.safetensors": names[: len(names) // 2],
        f"{stem}-00002-of-00002.safetensors": names[len(names) // 2 :],
    }
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, path.parent / file, metadata={"format": "pt"})
    size = sum(tensor.nbytes for tensor in tensors.values())
    places = {name: file for file, part in parts.items() for name in part}
    index = path.parent / f"{path.name}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": places}))
    path.unlink()
    return index


def test_shards_load_as_one_file_does(folder, family):
    expected = load_all(folder, family)
    for component in components(family):
        shard(folder, component)
    text, transformer, decoder = load_all(folder, family)
    assert all(torch.equal(text[name], value) for name, value in expected[0].items())
    pairs = [(transformer, expected[1]), (decoder._vae, expected[2]._vae)]
    for ours, theirs in pairs:
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_an_index_that_names_no_files_of_the_folder(folder, family, tmp_path):
    shutil.copy(weights_of(folder, "transformer"), tmp_path / "elsewhere.safetensors")
    for component in components(family):
        index = shard(folder, component)
        kept = json.loads(index.read_text())
        places = kept["weight_map"]
        name, file = next(iter(places.items()))
        for place in (
            "../../elsewhere.safetensors",
            str(tmp_path / "elsewhere.safetensors"),
            "sub/x.safetensors",
            "..",
        ):
            index.write_text(json.dumps(kept | {"weight_map": places | {name: place}}))
            message = refusal(folder, family, ahead)
            assert repr(place) in message and "in the same folder" in message
        for broken in ({}, None, [], "x", {name: 5}, {name: [file]}, {name: None}):
            index.write_text(json.dumps(kept | {"weight_map": broken}))
            assert "no weight_map that names a file for each tensor" in refusal(folder, family, ahead)
        index.write_text(json.dumps(kept | {"weight_map": places | {name: "gone.safetensors"}}))
        assert f"gone.safetensors of its {component} missing" in refusal(folder, family, ahead)
        for content in (POINTER, "{", "[]"):
            index.write_text(content)
            assert str(index) in refusal(folder, family, ahead)
        index.write_text(json.dumps(kept))
        shard_path = index.parent / file
        whole = shard_path.read_bytes()
        shard_path.write_text(POINTER)
        assert str(shard_path) in refusal(folder, family, ahead)
        cut_off = whole[:-1]
        shard_path.write_bytes(cut_off)
        assert str(shard_path) in refusal(folder, family, ahead)
        shard_path.write_bytes(whole)
    load_all(folder, family)


def test_a_shard_without_a_tensor_that_the_index_promises(folder, family):
    index = shard(folder, "transformer")
    name, file = next(iter(json.loads(index.read_text())["weight_map"].items()))
    edit(index.parent / file, lambda tensors: {key: value for key, value in tensors.items() if key != name})
    assert f"lacks 1 tensor, such as {name}" in refusal(folder, family, ahead)
    other = next(path for path in index.parent.glob("*.safetensors") if path.name != file)
    edit(index.parent / file, lambda tensors: tensors | {name: torch.zeros(1)})
    edit(other, lambda tensors: tensors | {name: torch.zeros(1)})
    assert f"{name} is in both" in refusal(folder, family, ahead)


# Variants


def as_variant(folder, family, variant, sharded):
    for component in components(family):
        if sharded:
            index = shard(folder, component)
            content = json.loads(index.read_text())
            content["weight_map"] = {
                name: file.replace("-0000", f".{variant}-0000") for name, file in content["weight_map"].items()
            }
            for path in list(index.parent.glob("*.safetensors")):
                path.rename(path.with_name(path.name.replace("-0000", f".{variant}-0000")))
            index.unlink()
            (index.parent / index.name.replace(".index", f".index.{variant}")).write_text(json.dumps(content))
        else:
            path = weights_of(folder, component)
            path.rename(path.with_suffix(f".{variant}.safetensors"))


@pytest.mark.parametrize("sharded", [False, True], ids=["single", "shards"])
@pytest.mark.parametrize("variant", files.VARIANTS)
def test_weights_in_a_variant_alone(folder, family, variant, sharded):
    expected = load_all(folder, family)
    as_variant(folder, family, variant, sharded)
    text, transformer, decoder = load_all(folder, family)
    assert all(torch.equal(text[name], value) for name, value in expected[0].items())
    for ours, theirs in ((transformer, expected[1]), (decoder._vae, expected[2]._vae)):
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_a_variant_that_the_libraries_write(folder, family):
    """As their own save_pretrained names the files."""
    import diffusers

    name = "StableDiffusion3Pipeline" if family == "sd3" else "FluxPipeline"
    pipeline = getattr(diffusers, name).from_pretrained(folder)
    shutil.rmtree(folder)
    pipeline.save_pretrained(folder, variant="fp16")
    for component in components(family):
        assert ".fp16." in weights_of(folder, component).name
    load_all(folder, family)


def test_a_copy_beside_the_weights_is_not_read(folder, family):
    for component in components(family):
        path = weights_of(folder, component)
        path.with_suffix(".fp16.safetensors").write_text(POINTER)
    load_all(folder, family)


def test_weights_of_another_name_are_told(folder, family):
    path = weights_of(folder, "transformer")
    path.rename(path.with_name("sd3.5_medium.safetensors"))
    message = refusal(folder, family)
    assert "no weights of its transformer" in message and "there is sd3.5_medium.safetensors" in message


@pytest.mark.parametrize("variant", ["bf16", "fp16"])
def test_the_hub_is_asked_for_variants_where_there_is_nothing_else(folder, family, variant, tmp_path, monkeypatch):
    snapshot, fetched = tmp_path / "0123abcd", []

    def download(repository, revision, allow_patterns, ignore_patterns):
        for path in folder.rglob("*"):
            name = path.relative_to(folder).as_posix()
            asked = any(fnmatch(name, each) for each in allow_patterns)
            if path.is_file() and asked and not any(fnmatch(name, each) for each in ignore_patterns or []):
                (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, snapshot / name)
                fetched.append(name)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    expected = load_backbone(config(folder, family)).load_transformer("teacher", torch.float32)
    # Of the transformer both, of the others the variant alone.
    kept = (folder / "transformer").glob("*.safetensors")
    (kept,) = kept
    content = kept.read_bytes()
    as_variant(folder, family, variant, sharded=False)
    kept.write_bytes(content)
    _, transformer, _ = load_all("somebody/some-model", family)
    assert all(torch.equal(a, b) for a, b in zip(transformer.parameters(), expected.parameters(), strict=True))
    names = [name for name in fetched if name.endswith(".safetensors")]
    assert [name for name in names if name.startswith("transformer/")] == [
        "transformer/diffusion_pytorch_model.safetensors"
    ]
    assert f"text_encoder/model.{variant}.safetensors" in names
    (snapshot / "transformer/diffusion_pytorch_model.safetensors").write_text(POINTER)
    backbone = load_backbone(config("somebody/some-model", family))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: str(snapshot))
    with pytest.raises(ConfigError, match="git lfs pull"):
        backbone.load_transformer("teacher", torch.float32)


# What is no pipeline folder


@pytest.mark.parametrize("exists", [True, False], ids=["there", "absent"])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sd3.5_medium.safetensors", "a single-file checkpoint has to be converted"),
        ("models/sd3.5_medium.safetensors", "a single-file checkpoint has to be converted"),
        ("models/SD3.SAFETENSORS", "a single-file checkpoint has to be converted"),
        ("models/old.ckpt", "a single-file checkpoint has to be converted"),
        ("models/small.gguf", "a single-file checkpoint has to be converted"),
        ("models/pipeline.zip", "unpack the archive"),
        ("models/pipeline.tar.gz", "unpack the archive"),
    ],
)
def test_files_that_are_no_folder(name, words, exists, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    if exists:
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(b"x")
    message = refusal(name)
    assert words in message and "a diffusers pipeline folder" in message
    assert ("there is no such file" in message) == (not exists)
    if "converted" in words:
        assert "StableDiffusion3Pipeline.from_single_file(file).save_pretrained(folder)" in message


def test_other_names_that_are_no_pipeline(tiny_pipeline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    Path("notes.txt").write_text("x")
    assert "is a file; a diffusers pipeline folder is needed" in refusal("notes.txt")
    assert "name the folder that contains it" in refusal(tiny_pipeline / "model_index.json")
    for name in ("./x/y", "/no/such/place/", "a/b/c", "x" * 5000, "runs", "~/no/such/place"):
        assert "neither a folder nor the id of a repository on the hub (owner/name)" in refusal(name)
    assert "use only the last two parts of an address on the hub, owner/name" in refusal(
        "https://huggingface.co/stabilityai/stable-diffusion-3.5-medium"
    )
    assert "a hub id has no slash at its end" in refusal("stabilityai/stable-diffusion-3.5-medium/")
    load_backbone(config(f"{tiny_pipeline}/"))


def test_a_name_that_could_be_either(monkeypatch, tmp_path):
    def unknown(*args, **kwargs):
        raise huggingface_hub.errors.HFValidationError("404\nRepository Not Found")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", unknown)
    message = refusal("runs/x")
    assert "there is no such folder here, and the hub could not deliver it" in message


# The context manager


def test_what_a_library_raises_becomes_one_line():
    class PanicException(BaseException):  # as Rust's panics come to Python
        pass

    for error, reason in (
        (ValueError("first\nsecond"), "ValueError: first"),
        (
            RuntimeError("Error(s) in loading:\n\tsize mismatch\n\tmore"),
            "RuntimeError: Error(s) in loading: size mismatch",
        ),
        (KeyError("x"), "KeyError: 'x'"),
        (AssertionError(), "AssertionError: no reason given"),
        (PanicException("called unwrap"), "PanicException: called unwrap"),
    ):
        with pytest.raises(ConfigError) as caught, files.reading("this file"):
            raise error
        assert str(caught.value) == f"this file cannot be read ({reason})"
    for error in (ConfigError("as it is"), MemoryError(), torch.OutOfMemoryError("full"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught, files.reading("this file"):
            raise error
        assert caught.value is error
