"""The SD3 backbone against stock diffusers, on pipelines made on the spot; and what it refuses to start with."""

from __future__ import annotations

import copy
import itertools
import json
import shutil

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from dpdmd.backbones import load_backbone
from dpdmd.backbones import pipeline as pipeline_module
from dpdmd.backbones.sd3 import KNOWN, SD3
from dpdmd.config import ConfigError, ModelConfig
from dpdmd.diffusion import Flow

LENGTH = 12
PROMPTS = ["a red ring at left", "", "zebra, 7 " * 20]  # ordinary, empty, longer than either tokenizer's limit


def config(pipeline, **values) -> ModelConfig:
    return ModelConfig(**{"pipeline": str(pipeline), "resolution": 32, "max_sequence_length": LENGTH, **values})


def stock(folder):
    from diffusers import StableDiffusion3Pipeline

    # Without T5 the stock loader wants to be told so, though model_index.json says it.
    absent = {} if (folder / "text_encoder_3").exists() else {"text_encoder_3": None, "tokenizer_3": None}
    return StableDiffusion3Pipeline.from_pretrained(folder, **absent)


@pytest.fixture
def skeleton(tiny_pipeline, tmp_path):
    """A copy that may be changed, its weight files empty: whoever reads them fails otherwise than expected."""
    folder = shutil.copytree(tiny_pipeline, tmp_path / "skeleton")
    for path in folder.rglob("*.safetensors"):
        path.write_bytes(b"")
    return folder


def edit(folder, file, **values):
    path = folder / file
    content = json.loads(path.read_text())
    content.update(values)
    path.write_text(json.dumps(content))


def refusal(*args, **kwargs) -> str:
    with pytest.raises(ConfigError) as error:
        SD3(config(*args, **kwargs))
    return str(error.value)


# What it says about a pipeline


def test_configuration_alone_is_read_at_construction(skeleton):
    backbone = load_backbone(config(skeleton))
    assert backbone.latent_shape == (16, 8, 8)
    assert backbone.folder == skeleton
    assert backbone.text_shapes == {"prompt_embeds": (16 + LENGTH, 40), "pooled_prompt_embeds": (28,)}
    assert isinstance(backbone.diffusion, Flow)
    assert backbone.diffusion.times(4)[1].item() == pytest.approx(0.858, abs=1e-3)  # the shift of 3 has arrived


def test_transformer_config_builds_the_same_architecture(tiny_pipeline):
    from diffusers import SD3Transformer2DModel

    architecture = SD3(config(tiny_pipeline)).transformer_config("student")
    built = SD3Transformer2DModel.from_config(architecture)
    loaded = SD3Transformer2DModel.from_pretrained(tiny_pipeline / "transformer")
    shapes = {name: value.shape for name, value in loaded.state_dict().items()}
    assert {name: value.shape for name, value in built.state_dict().items()} == shapes
    assert architecture["dual_attention_layers"] == (0,) and architecture["qk_norm"] == "rms_norm"


def test_what_a_student_learns_from_is_told_apart(tiny_pipeline, tmp_path):
    before = SD3(config(tiny_pipeline)).teacher_fingerprint()
    folder = shutil.copytree(tiny_pipeline, tmp_path / "copy")
    assert SD3(config(folder)).teacher_fingerprint() == before  # wherever it lies
    for part in ("text_encoder", "transformer"):
        (file,) = (folder / part).glob("*.safetensors")
        save_file({name: 1.1 * value for name, value in load_file(file).items()}, file, {"format": "pt"})
        after = SD3(config(folder)).teacher_fingerprint()
        assert {name for name in before if before[name] != after[name]} == {part}
        before = after


def test_settings_absent_from_an_older_folder_take_their_defaults(skeleton):
    path = skeleton / "transformer/config.json"
    content = json.loads(path.read_text())
    del content["qk_norm"], content["dual_attention_layers"]
    path.write_text(json.dumps(content))
    architecture = SD3(config(skeleton)).transformer_config("teacher")
    assert architecture["qk_norm"] is None and architecture["dual_attention_layers"] == ()


def test_block_classes_are_the_transformer_blocks(tiny_pipeline):
    backbone = SD3(config(tiny_pipeline))
    transformer = backbone.load_transformer("teacher", torch.float32)
    blocks = [module for module in transformer.modules() if isinstance(module, backbone.block_classes)]
    assert blocks == list(transformer.transformer_blocks)


# Network


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_load_transformer_is_the_stock_one(tiny_pipeline, dtype):
    from diffusers import SD3Transformer2DModel

    ours = SD3(config(tiny_pipeline)).load_transformer("student", dtype)
    expected = SD3Transformer2DModel.from_pretrained(tiny_pipeline / "transformer", torch_dtype=dtype).state_dict()
    assert ours.state_dict().keys() == expected.keys()
    assert all(value.dtype == dtype and torch.equal(value, expected[name]) for name, value in ours.state_dict().items())
    assert not ours.training and all(parameter.requires_grad for parameter in ours.parameters())


def test_incomplete_weights_are_refused(tiny_pipeline, tmp_path):
    folder = shutil.copytree(tiny_pipeline, tmp_path / "copy")
    path = folder / "transformer/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    del weights["proj_out.weight"]
    save_file(weights, path)
    with pytest.raises((ConfigError, ValueError), match=r"proj_out\.weight"):
        SD3(config(folder)).load_transformer("teacher", torch.float32)


def test_predict_is_what_the_stock_pipeline_asks_the_network(tiny_pipeline):
    """Two Euler steps by hand equal the pipeline's latents, so timestep, conditions and velocity are its own."""
    backbone = SD3(config(tiny_pipeline))
    transformer = backbone.load_transformer("teacher", torch.float32)
    cond = backbone.load_text("cpu", torch.float32).encode(["a red ring"])
    noise = torch.randn(1, *backbone.latent_shape, generator=torch.Generator().manual_seed(1))
    expected = stock(tiny_pipeline)(
        "a red ring",
        height=32,
        width=32,
        num_inference_steps=2,
        guidance_scale=1.0,
        max_sequence_length=LENGTH,
        latents=noise.clone(),
        output_type="latent",
    ).images
    x, times = noise, backbone.diffusion.times(2)
    with torch.no_grad():
        for t, t_next in itertools.pairwise(times):
            x = x + (t_next - t) * backbone.predict(transformer, x, t.expand(1), cond)
    assert torch.equal(x, expected)


def test_predict_casts_to_the_networks_dtype_and_keeps_time_in_float32(tiny_pipeline):
    backbone = SD3(config(tiny_pipeline))
    seen = {}

    class Wrapper(torch.nn.Module):  # called as a DeepSpeedEngine is: parameters() and keyword arguments
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, **arguments):
            seen.update(arguments)
            return self.module(**arguments)

    for dtype in (torch.bfloat16, torch.float64):
        transformer = backbone.load_transformer("teacher", dtype)
        x, t = torch.randn(3, *backbone.latent_shape), torch.tensor([0.9, 0.5, 0.123456789])
        cond = {"prompt_embeds": torch.randn(3, 28, 40), "pooled_prompt_embeds": torch.randn(3, 28)}
        output = backbone.predict(Wrapper(transformer), x, t, cond)
        assert output.dtype == dtype and output.shape == x.shape
        assert seen["timestep"].dtype == torch.float32
        assert torch.equal(seen["timestep"], t * 1000)  # a bfloat16 timestep would be off by up to 2
        assert {seen[name].dtype for name in ("hidden_states", "encoder_hidden_states", "pooled_projections")} == {
            dtype
        }
        assert torch.equal(output, backbone.predict(lambda _t=transformer, **a: _t(**a), x, t, cond, dtype=dtype))


def test_float64_is_computed_in_float64(tiny_pipeline):
    """float64 input that float32 could not tell apart must still make a difference."""
    backbone = SD3(config(tiny_pipeline))
    transformer = backbone.load_transformer("teacher", torch.float64)
    x = torch.randn(1, *backbone.latent_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.5])
    cond = {"prompt_embeds": torch.randn(1, 28, 40), "pooled_prompt_embeds": torch.randn(1, 28)}
    with torch.no_grad():
        a, b = (backbone.predict(transformer, x + shift, t, cond) for shift in (0.0, 1e-13))
    assert 1e-14 < (a - b).abs().max() < 1e-10


# Text


@pytest.mark.parametrize("fixture", ["tiny_pipeline", "tiny_pipeline_no_t5"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encode_equals_the_stock_pipeline(request, fixture, dtype):
    folder = request.getfixturevalue(fixture)
    backbone = SD3(config(folder))
    ours = backbone.load_text("cpu", dtype).encode(PROMPTS)
    with torch.no_grad():
        embeds, _, pooled, _ = (
            stock(folder)
            .to(dtype)
            .encode_prompt(PROMPTS, None, None, do_classifier_free_guidance=False, max_sequence_length=LENGTH)
        )
    assert torch.equal(ours["prompt_embeds"], embeds) and torch.equal(ours["pooled_prompt_embeds"], pooled)
    assert ours["prompt_embeds"].dtype == dtype and not ours["prompt_embeds"].requires_grad
    assert {name: tuple(value.shape[1:]) for name, value in ours.items()} == backbone.text_shapes
    assert (ours["prompt_embeds"][:, 16:].abs().max() > 0) == (fixture == "tiny_pipeline")  # zeros stand for T5


def test_text_key_follows_content(tiny_pipeline, tiny_pipeline_no_t5, tmp_path):
    key = SD3(config(tiny_pipeline)).text_key
    copied = shutil.copytree(tiny_pipeline, tmp_path / "copy")
    assert SD3(config(copied)).text_key == key  # where it lies does not matter

    keys = {key, SD3(config(tiny_pipeline_no_t5)).text_key, SD3(config(tiny_pipeline, max_sequence_length=13)).text_key}
    for file in ("text_encoder/model.safetensors", "tokenizer_2/tokenizer.json", "text_encoder_3/config.json"):
        original = (copied / file).read_bytes()
        (copied / file).write_bytes(original + b" ")
        keys.add(SD3(config(copied)).text_key)
        (copied / file).write_bytes(original)
    assert len(keys) == 6
    (copied / "transformer/diffusion_pytorch_model.safetensors").write_bytes(b"")
    assert SD3(config(copied)).text_key == key


def test_text_key_of_a_large_file_is_sampled(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline_module, "_WHOLE_BYTES", 1 << 20)
    path = tmp_path / "large"
    content = bytearray(12 << 20)
    digests = set()
    sampled = (len(content) - (64 << 10)) * 32 // 63
    # Untouched, the beginning, within the first 4 MB but in no sampled block, a sampled block, the end.
    for place in (None, 0, 100_000, sampled, len(content) - 1):
        changed = bytearray(content)
        if place is not None:
            changed[place] = 1
        path.write_bytes(changed)
        digests.add(pipeline_module._digest_file(path))
    path.write_bytes(content + b"\0")
    digests.add(pipeline_module._digest_file(path))
    assert len(digests) == 6


# Images and export


def test_decode_equals_the_stock_pipeline(tiny_pipeline):
    backbone = SD3(config(tiny_pipeline))
    latents = 3 * torch.randn(2, *backbone.latent_shape)
    images = backbone.load_decoder("cpu").decode(latents)
    pipe = stock(tiny_pipeline)
    with torch.no_grad():
        raw = pipe.vae.decode(latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor).sample
    assert torch.equal(images, pipe.image_processor.postprocess(raw, output_type="pt"))
    assert images.shape == (2, 3, 32, 32) and images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1 and images.std() > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_export_is_a_stock_transformer_folder(tiny_pipeline, tmp_path, dtype):
    from diffusers import SD3Transformer2DModel

    backbone = SD3(config(tiny_pipeline))
    transformer = backbone.load_transformer("student", dtype)
    for parameter in transformer.parameters():
        parameter.data.add_(torch.randn_like(parameter))
    state = copy.deepcopy(transformer.state_dict())
    backbone.export(state, tmp_path / "out")
    loaded = SD3Transformer2DModel.from_pretrained(tmp_path / "out", torch_dtype=dtype)
    assert loaded.config.dual_attention_layers in ([0], (0,)) and loaded.config.qk_norm == "rms_norm"
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    assert not list((tmp_path / "out").glob("*.bin"))


def test_export_has_the_roles_own_architecture(tiny_pipeline, skeleton, tmp_path):
    from diffusers import SD3Transformer2DModel

    edit(skeleton, "transformer/config.json", num_layers=1)
    backbone = SD3(config(tiny_pipeline, student=str(skeleton), random_init=True))
    state = backbone.load_transformer("student", torch.float32).state_dict()
    backbone.export(state, tmp_path / "out", "student")
    loaded = SD3Transformer2DModel.from_pretrained(tmp_path / "out")
    assert loaded.config.num_layers == 1
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())


def test_export_refuses_another_state(tiny_pipeline, tmp_path):
    backbone = SD3(config(tiny_pipeline))
    state = backbone.load_transformer("student", torch.float32).state_dict()
    del state["proj_out.bias"]
    with pytest.raises(ValueError, match=r"(?s)student.*proj_out\.bias"):
        backbone.export(state, tmp_path / "out")


# Random weights


def test_random_init_from_a_folder_reads_no_weights(skeleton):
    for component in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        shutil.rmtree(skeleton / component)
    backbone = SD3(config(skeleton, random_init=True))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    teacher, student = (backbone.load_transformer(role, torch.float32) for role in ("teacher", "student"))
    assert torch.equal(before, torch.get_rng_state())  # the caller's draws stay the caller's
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), student.parameters(), strict=True))
    assert all(parameter.requires_grad for parameter in teacher.parameters()) and not teacher.training
    half = backbone.load_transformer("critic", torch.bfloat16)
    for (name, a), b in zip(teacher.state_dict().items(), half.state_dict().values(), strict=True):
        assert torch.equal(a.bfloat16(), b), name


def test_random_init_output_lives(skeleton):
    backbone = SD3(config(skeleton, random_init=True))
    transformer = backbone.load_transformer("teacher", torch.float32)
    text = backbone.load_text("cpu", torch.float32)
    x = torch.randn(1, *backbone.latent_shape)
    with torch.no_grad():
        base = backbone.predict(transformer, x, torch.tensor([0.5]), text.encode(["a"]))
        others = [
            backbone.predict(transformer, -x, torch.tensor([0.5]), text.encode(["a"])),
            backbone.predict(transformer, x, torch.tensor([0.1]), text.encode(["a"])),
            backbone.predict(transformer, x, torch.tensor([0.5]), text.encode(["b"])),
        ]
    assert torch.isfinite(base).all() and base.std() > 0.05
    for other in others:
        assert (other - base).norm() / base.norm() > 1e-3


def test_random_init_draws_as_torch_does(skeleton):
    """Weights spread as those that the stock constructor draws, and the position table is the stock one."""
    from diffusers import SD3Transformer2DModel

    backbone = SD3(config(skeleton, random_init=True))
    ours = backbone.load_transformer("teacher", torch.float32).state_dict()
    theirs = SD3Transformer2DModel.from_config(backbone.transformer_config("teacher")).state_dict()
    assert ours.keys() == theirs.keys()
    assert torch.equal(ours["pos_embed.pos_embed"], theirs["pos_embed.pos_embed"])
    for name, value in theirs.items():
        if "norm_q" in name or "norm_k" in name or "norm_added" in name:
            assert torch.equal(ours[name], value), name
        elif value.numel() >= 1000:
            assert ours[name].std() == pytest.approx(value.std().item(), rel=0.1), name


@pytest.mark.parametrize("name", KNOWN)
def test_known_architectures_need_no_file(name, monkeypatch):
    from diffusers import SD3Transformer2DModel

    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    backbone = SD3(ModelConfig(pipeline=name, random_init=True))
    assert backbone.folder is None and backbone.latent_shape == (16, 128, 128)
    assert backbone.diffusion.times(4)[1].item() == pytest.approx(0.858, abs=1e-3)
    architecture = backbone.transformer_config("critic")
    with torch.device("meta"):
        transformer = SD3Transformer2DModel.from_config({**architecture, "pos_embed_max_size": 8})
    # Parameters without the table of positions, which is a buffer; as the models are published.
    billions = sum(parameter.numel() for parameter in transformer.parameters()) / 1e9
    published = {"3.5-medium": (2.24, "rms_norm"), "3.5-large": (8.06, "rms_norm"), "3-medium": (2.03, None)}
    expected, qk_norm = next(value for key, value in published.items() if f"diffusion-{key}" in name)
    assert billions == pytest.approx(expected, abs=0.01) and architecture["qk_norm"] == qk_norm

    text = backbone.load_text("cpu", torch.bfloat16)
    encoded = text.encode(["a red ring", "a cross"])
    assert encoded["prompt_embeds"].shape == (2, 77 + 256, 4096) and encoded["pooled_prompt_embeds"].shape == (2, 2048)
    again = text.encode(["a cross"])
    assert all(torch.equal(encoded[key][1:], again[key]) for key in again)
    assert not torch.equal(encoded["prompt_embeds"][0], encoded["prompt_embeds"][1])
    assert backbone.text_key == "random-333x4096-2048"
    with pytest.raises(ConfigError, match=r"model\.random_init.*no VAE"):
        backbone.load_decoder("cpu")


# What it refuses


def test_a_component_folder_is_no_pipeline(tiny_pipeline, tmp_path):
    message = refusal(tiny_pipeline / "transformer")
    assert "model.pipeline" in message and "is a transformer folder (SD3Transformer2DModel)" in message
    assert "one component's folder (CLIPTextModelWithProjection)" in refusal(tiny_pipeline / "text_encoder")
    assert "holds nothing" in refusal(tmp_path)
    (tmp_path / "picture.png").touch()
    assert "holds picture.png" in refusal(tmp_path) and "model_index.json" in refusal(tmp_path)
    assert "model.student" in refusal(tiny_pipeline, student=str(tiny_pipeline / "transformer"))


def test_a_pipeline_of_another_class(skeleton):
    edit(skeleton, "model_index.json", _class_name="FluxPipeline")
    assert "is a FluxPipeline" in refusal(skeleton)


def test_damaged_configuration(skeleton):
    (skeleton / "vae/config.json").write_text("{")
    assert "vae/config.json is not JSON" in refusal(skeleton)
    (skeleton / "vae/config.json").unlink()
    assert "vae/config.json cannot be read" in refusal(skeleton)


@pytest.mark.parametrize(
    "component", ["transformer", "vae", "scheduler", "text_encoder", "text_encoder_2", "tokenizer"]
)
def test_a_missing_component(skeleton, component):
    shutil.rmtree(skeleton / component)
    message = refusal(skeleton)
    assert f"{component} is missing" in message and str(skeleton / component) in message
    edit(skeleton, "model_index.json", **{component: [None, None]})
    assert f"{component} is missing" in refusal(skeleton)


@pytest.mark.parametrize(
    ("component", "found"),
    [("scheduler", "DDIMScheduler"), ("transformer", "FluxTransformer2DModel"), ("vae", "AutoencoderTiny")],
)
def test_a_component_of_another_class(skeleton, component, found):
    edit(skeleton, "model_index.json", **{component: ["diffusers", found]})
    assert f"its {component} is a {found}" in refusal(skeleton)


@pytest.mark.parametrize(
    ("role", "name", "value"),
    [
        ("student", "in_channels", 4),
        ("critic", "pooled_projection_dim", 24),
        ("student", "joint_attention_dim", 64),
        ("critic", "out_channels", 8),
    ],
)
def test_roles_that_do_not_fit_each_other(tiny_pipeline, skeleton, role, name, value):
    edit(skeleton, "transformer/config.json", **{name: value})
    message = refusal(tiny_pipeline, **{role: str(skeleton)})
    assert f"the {role}'s transformer ({skeleton})" in message and f"{name} = {value}" in message


def test_a_student_of_another_depth_is_welcome(tiny_pipeline, skeleton):
    edit(skeleton, "transformer/config.json", num_layers=1)
    backbone = SD3(config(tiny_pipeline, student=str(skeleton)))
    depths = {role: backbone.transformer_config(role)["num_layers"] for role in ("teacher", "student", "critic")}
    assert depths == {"teacher": 2, "student": 1, "critic": 2}


@pytest.mark.parametrize(
    ("file", "name", "value", "words"),
    [
        ("text_encoder/config.json", "projection_dim", 13, ("pooled_projection_dim = 28", "project to 29")),
        ("text_encoder_2/config.json", "hidden_size", 32, ("joint_attention_dim = 40", "48 wide together")),
        ("text_encoder_3/config.json", "d_model", 48, ("joint_attention_dim = 40", "48 wide")),
        ("tokenizer/tokenizer_config.json", "model_max_length", 77, ("model_max_length = 77", "16 tokens")),
        ("vae/config.json", "latent_channels", 4, ("latent_channels = 4", "in_channels = 16")),
        ("vae/config.json", "shift_factor", None, ("shift_factor",)),
        ("scheduler/scheduler_config.json", "use_dynamic_shifting", True, ("use_dynamic_shifting",)),
        ("transformer/config.json", "out_channels", 32, ("out_channels = 32", "in_channels = 16")),
    ],
)
def test_parts_that_do_not_fit_each_other(skeleton, file, name, value, words):
    edit(skeleton, file, **{name: value})
    message = refusal(skeleton)
    assert all(word in message for word in words), message


def test_resolution(skeleton):
    message = refusal(skeleton, resolution=36)
    assert "model.resolution = 36" in message and "multiple of 8" in message and "32 and 40" in message
    assert "; 8 would do" in refusal(skeleton, resolution=5)
    message = refusal(skeleton, resolution=72)
    assert "64 pixels a side at most" in message and "pos_embed_max_size = 8" in message
    assert SD3(config(skeleton, resolution=64)).latent_shape == (16, 16, 16)
    edit(skeleton, "transformer/config.json", patch_size=4)
    assert "multiple of 16" in refusal(skeleton, resolution=40)


def test_max_sequence_length(skeleton):
    assert "model.max_sequence_length = 513" in refusal(skeleton, max_sequence_length=513)


@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder", "text_encoder_3"])
def test_pickled_or_missing_weights(skeleton, component):
    (weights,) = (skeleton / component).glob("*.safetensors")
    weights.unlink()
    assert f"no weights of its {component}" in refusal(skeleton)
    (skeleton / component / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    message = refusal(skeleton)
    assert f"the weights of its {component} are pickled (pytorch_model.bin" in message and "safetensors" in message


def test_a_missing_shard(skeleton):
    folder = skeleton / "transformer"
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "a.safetensors")
    shards = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(shards))
    assert "b.safetensors of its transformer missing" in refusal(skeleton)
    (folder / "b.safetensors").touch()
    SD3(config(skeleton))


# The hub


def test_neither_folder_nor_hub_id(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # where none of these is
    for name in ("/no/such/folder", "runs/student/export", "sd3", "../x"):
        assert f"model.pipeline = '{name}': neither a folder nor" in refusal(name)


def test_hub_out_of_reach(monkeypatch):
    def unreachable(*args, **kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection\nand a long story")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    message = refusal("somebody/some-model")
    assert "model.pipeline = 'somebody/some-model'" in message and "no connection" in message
    assert "Set model.pipeline to the path of a local diffusers pipeline folder" in message


def test_hub_downloads_weights_only_when_they_are_wanted(tiny_pipeline, tmp_path, monkeypatch):
    """A stand-in hub that copies what the patterns ask for."""
    from fnmatch import fnmatch

    snapshot, calls = tmp_path / "0123abcd", []

    def download(repository, revision, allow_patterns, ignore_patterns):
        calls.append((repository, revision))
        for path in tiny_pipeline.rglob("*"):
            name = path.relative_to(tiny_pipeline).as_posix()
            if path.is_file() and any(fnmatch(name, pattern) for pattern in allow_patterns):
                (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, snapshot / name)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    backbone = SD3(config("somebody/some-model", revision="main"))
    assert calls == [("somebody/some-model", "main")]
    assert not list(snapshot.rglob("*.safetensors"))
    transformer = backbone.load_transformer("teacher", torch.float32)
    assert [path.parent.name for path in snapshot.rglob("*.safetensors")] == ["transformer"]
    assert calls[1] == ("somebody/some-model", "0123abcd")  # the commit, not the branch
    expected = SD3(config(tiny_pipeline)).load_transformer("teacher", torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(transformer.parameters(), expected.parameters(), strict=True))
    assert backbone.text_key == SD3(config(tiny_pipeline)).text_key
    ours, theirs = (each.load_text("cpu", torch.float32) for each in (backbone, SD3(config(tiny_pipeline))))
    assert torch.equal(ours.encode(PROMPTS)["prompt_embeds"], theirs.encode(PROMPTS)["prompt_embeds"])


def test_the_demo_is_the_teacher_that_ships(tmp_path, tiny_pipeline, monkeypatch):
    from dpdmd.backbones import pipeline

    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "teacher").symlink_to(tiny_pipeline)
    monkeypatch.setattr(pipeline, "WORLDS", tmp_path)
    assert SD3(config("demo")).folder == tmp_path / "demo" / "teacher"
