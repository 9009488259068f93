"""The FLUX backbone against stock diffusers, on pipelines made on the spot; and what it refuses to start with."""

from __future__ import annotations

import copy
import itertools
import json
import math
import shutil
import weakref

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dpdmd.backbones import load_backbone
from dpdmd.backbones.flux import KNOWN, Flux, pack, unpack
from dpdmd.backbones.sd3 import SD3
from dpdmd.config import ConfigError, DistillConfig, ModelConfig
from dpdmd.diffusion import Flow
from dpdmd.distill import Distillation, Draws

LENGTH = 12
GUIDANCE = 2.5  # not the default
PROMPTS = ["a red ring at left", "", "zebra, 7 " * 20]  # ordinary, empty, longer than either tokenizer's limit
KINDS = ["tiny_flux", "tiny_schnell"]
GRIDS = ["scheduler", "uniform", [1.0, 0.77, 0.4, 0.1]]


def config(pipeline, **values) -> ModelConfig:
    defaults = {"family": "flux", "resolution": 32, "max_sequence_length": LENGTH, "embedded_guidance": GUIDANCE}
    return ModelConfig(**{"pipeline": str(pipeline), **defaults, **values})


def stock(folder, **parts):
    from diffusers import FluxPipeline

    pipeline = FluxPipeline.from_pretrained(folder, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(params=KINDS)
def folder(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def skeleton(tiny_flux, tmp_path):
    """A copy that may be changed, its weight files empty: whoever reads them fails otherwise than expected."""
    copied = shutil.copytree(tiny_flux, tmp_path / "skeleton")
    for path in copied.rglob("*.safetensors"):
        path.write_bytes(b"")
    return copied


def edit(folder, file, **values):
    path = folder / file
    content = json.loads(path.read_text())
    content.update(values)
    path.write_text(json.dumps(content))


def refusal(*args, **kwargs) -> str:
    with pytest.raises(ConfigError) as error:
        Flux(config(*args, **kwargs))
    return str(error.value)


def noise_for(backbone, count=1):
    return torch.randn(count, *backbone.latent_shape, generator=torch.Generator().manual_seed(1))


def random_cond(backbone, count):
    generator = torch.Generator().manual_seed(2)
    return {name: torch.randn(count, *shape, generator=generator) for name, shape in backbone.text_shapes.items()}


# What it says about a pipeline


def test_configuration_alone_is_read_at_construction(skeleton):
    backbone = load_backbone(config(skeleton))
    assert isinstance(backbone, Flux)
    assert backbone.latent_shape == (16, 8, 8)
    assert backbone.folder == skeleton
    assert backbone.text_shapes == {"prompt_embeds": (LENGTH, 40), "pooled_prompt_embeds": (20,)}
    assert isinstance(backbone.diffusion, Flow)
    assert backbone.pipeline_guidance_scale == GUIDANCE


def test_without_guidance_distillation_there_is_no_guidance_value(tiny_schnell):
    assert Flux(config(tiny_schnell)).pipeline_guidance_scale == 1.0


def test_transformer_config_builds_the_same_architecture(folder):
    from diffusers import FluxTransformer2DModel

    architecture = Flux(config(folder)).transformer_config("student")
    built = FluxTransformer2DModel.from_config(architecture)
    loaded = FluxTransformer2DModel.from_pretrained(folder / "transformer")
    shapes = {name: value.shape for name, value in loaded.state_dict().items()}
    assert {name: value.shape for name, value in built.state_dict().items()} == shapes
    assert architecture["axes_dims_rope"] == (4, 6, 6) and architecture["out_channels"] == 64


def test_settings_absent_from_the_published_folder_take_their_defaults(skeleton):
    path = skeleton / "transformer/config.json"
    content = json.loads(path.read_text())
    del content["axes_dims_rope"], content["out_channels"]
    path.write_text(json.dumps(content))
    architecture = Flux(config(skeleton)).transformer_config("teacher")
    assert architecture["axes_dims_rope"] == (16, 56, 56) and architecture["out_channels"] == 64


def test_block_classes_are_the_transformer_blocks(tiny_flux):
    backbone = Flux(config(tiny_flux))
    transformer = backbone.load_transformer("teacher", torch.float32)
    blocks = [module for module in transformer.modules() if isinstance(module, backbone.block_classes)]
    assert blocks == [*transformer.transformer_blocks, *transformer.single_transformer_blocks] and len(blocks) == 4


# Time grids


@pytest.mark.parametrize("resolution", [32, 64])
@pytest.mark.parametrize("num_steps", [1, 4, 7])
def test_teachers_grid_is_the_one_that_the_pipeline_walks(folder, resolution, num_steps):
    pipeline = stock(folder)
    pipeline("a", height=resolution, width=resolution, num_inference_steps=num_steps, output_type="latent")
    diffusion = Flux(config(folder, resolution=resolution)).diffusion
    times = diffusion.times(num_steps)
    assert times.dtype == torch.float32 and torch.equal(times, pipeline.scheduler.sigmas)
    assert torch.equal(diffusion.timestep(times[:-1]), pipeline.scheduler.timesteps)
    assert torch.equal(diffusion.student_times(num_steps, "scheduler"), times)


@pytest.mark.parametrize("resolution", [32, 64])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_pipeline_given_the_sigmas_walks_the_students_grid(folder, grid, resolution):
    diffusion = Flux(config(folder, resolution=resolution)).diffusion
    sigmas = json.loads(json.dumps(diffusion.pipeline_sigmas(4, grid)))  # as they come from dpdmd.json
    pipeline = stock(folder)
    pipeline("a", height=resolution, width=resolution, sigmas=sigmas, output_type="latent")
    assert torch.equal(pipeline.scheduler.sigmas, diffusion.student_times(4, grid))
    if isinstance(grid, list):
        assert diffusion.student_times(4, grid)[:-1].tolist() == pytest.approx(grid, abs=1e-6)


def test_the_shift_follows_the_resolution(tiny_flux, tiny_schnell):
    """FLUX.1-dev's times are e^mu / (e^mu + 1 / s - 1), mu linear in the number of image tokens."""
    second = []
    for resolution, tokens in ((32, 16), (64, 64)):
        mu = 0.5 + (1.15 - 0.5) * (tokens - 9) / (100 - 9)
        diffusion = Flux(config(tiny_flux, resolution=resolution)).diffusion
        for times, count in ((diffusion.times(4), 4), (diffusion.train_times, 1000)):
            s = np.linspace(1, 1 / count, count)
            expected = torch.from_numpy(math.exp(mu) / (math.exp(mu) + 1 / s - 1))
            difference = times[:count].double() - expected
            assert float(difference.norm() / expected.norm()) < 1e-6
        assert len(diffusion.train_times) == 1000 and diffusion.train_times.dtype == torch.float32
        assert diffusion.train_times[0] == 1 and diffusion.train_times.diff().max() < 0
        second.append(diffusion.times(4)[1].item())
    assert second[1] - second[0] > 0.03
    schnell = [Flux(config(tiny_schnell, resolution=resolution)).diffusion for resolution in (32, 64)]
    assert all(each.times(4).tolist() == [1, 0.75, 0.5, 0.25, 0] for each in schnell)
    assert schnell[0].train_times[250].item() == pytest.approx(0.75)


def test_a_linear_shift_is_undone_for_explicit_grids_too(skeleton):
    edit(skeleton, "scheduler/scheduler_config.json", time_shift_type="linear")
    times = Flux(config(skeleton)).diffusion.student_times(3, [1.0, 0.8, 0.3])
    assert times.tolist() == pytest.approx([1.0, 0.8, 0.3, 0.0], abs=1e-6)


# Network


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_load_transformer_is_the_stock_one(tiny_flux, dtype):
    from diffusers import FluxTransformer2DModel

    ours = Flux(config(tiny_flux)).load_transformer("student", dtype)
    expected = FluxTransformer2DModel.from_pretrained(tiny_flux / "transformer", torch_dtype=dtype).state_dict()
    assert ours.state_dict().keys() == expected.keys()
    assert all(value.dtype == dtype and torch.equal(value, expected[name]) for name, value in ours.state_dict().items())
    assert not ours.training and all(parameter.requires_grad for parameter in ours.parameters())


def test_incomplete_weights_are_refused(tiny_flux, tmp_path):
    copied = shutil.copytree(tiny_flux, tmp_path / "copy")
    path = copied / "transformer/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    del weights["proj_out.weight"]
    save_file(weights, path)
    with pytest.raises((ConfigError, ValueError), match=r"proj_out\.weight"):
        Flux(config(copied)).load_transformer("teacher", torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_are_packed_as_the_pipeline_packs_them(dtype):
    from diffusers import FluxPipeline

    height, width = 6, 10  # neither equal nor powers of two: rows and columns cannot be mistaken
    x = torch.randn(3, 5, height, width).to(dtype)
    tokens = pack(x)
    assert torch.equal(tokens, FluxPipeline._pack_latents(x, 3, 5, height, width))
    assert tokens.is_contiguous() and unpack(tokens, height, width).is_contiguous()
    assert torch.equal(FluxPipeline._unpack_latents(tokens, height * 8, width * 8, 8), x)
    assert torch.equal(unpack(tokens, height, width), x)
    transposed = x.transpose(2, 3)  # a view in another order
    assert torch.equal(pack(transposed), pack(transposed.contiguous()))


class Spy(torch.nn.Module):
    """Called as a DeepSpeedEngine is: parameters() and keyword arguments, which it writes down."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        self.calls = []

    def forward(self, **arguments):
        self.calls.append(arguments)
        return self.module(**arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_predict_asks_the_network_what_the_stock_pipeline_asks(folder, dtype):
    """Every argument of every call of the pipeline, and its result, bit for bit."""
    backbone = Flux(config(folder))
    transformer = backbone.load_transformer("teacher", dtype)
    cond = backbone.load_text("cpu", dtype).encode(PROMPTS)
    times = backbone.diffusion.times(5)
    pipeline = stock(folder, torch_dtype=dtype)
    calls, forward = [], pipeline.transformer.forward

    def watched(**arguments):
        result = forward(**arguments)
        calls.append((arguments, result[0]))
        return result

    pipeline.transformer.forward = watched
    pipeline(
        PROMPTS,
        height=32,
        width=32,
        num_inference_steps=5,
        guidance_scale=GUIDANCE,
        max_sequence_length=LENGTH,
        latents=pack(noise_for(backbone, 3)),
        output_type="latent",
    )
    assert len(calls) == 5
    for (theirs, result), t in zip(calls, times[:-1], strict=True):
        spy = Spy(transformer)
        with torch.no_grad():
            velocity = backbone.predict(spy, unpack(theirs["hidden_states"], 8, 8), t.expand(3), cond)
        assert velocity.dtype == dtype and torch.equal(velocity, unpack(result, 8, 8))
        (ours,) = spy.calls
        for name in ("hidden_states", "timestep", "encoder_hidden_states", "pooled_projections"):
            assert ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]), name
        for name in ("img_ids", "txt_ids"):
            assert torch.equal(ours[name], theirs[name].float()), name
        if theirs["guidance"] is None:
            assert ours["guidance"] is None
        else:
            assert ours["guidance"].dtype == torch.float32 and torch.equal(ours["guidance"], theirs["guidance"])


def test_steps_by_hand_are_the_pipelines_latents(folder):
    backbone = Flux(config(folder, resolution=64))
    transformer = backbone.load_transformer("teacher", torch.float32)
    cond = backbone.load_text("cpu", torch.float32).encode(["a red ring"])
    noise = noise_for(backbone)
    expected = stock(folder)(
        "a red ring",
        height=64,
        width=64,
        num_inference_steps=3,
        guidance_scale=GUIDANCE,
        max_sequence_length=LENGTH,
        latents=pack(noise),
        output_type="latent",
    ).images
    x, times = noise, backbone.diffusion.times(3)
    with torch.no_grad():
        for t, t_next in itertools.pairwise(times):
            x = x + (t_next - t) * backbone.predict(transformer, x, t.expand(1), cond)
    assert torch.equal(x, unpack(expected, 16, 16))


def test_predict_casts_to_the_networks_dtype(tiny_flux):
    backbone = Flux(config(tiny_flux))
    x, t = noise_for(backbone, 3), torch.tensor([0.9, 0.5, 0.123456789])
    cond = random_cond(backbone, 3)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        transformer = backbone.load_transformer("teacher", dtype)
        spy = Spy(transformer)
        output = backbone.predict(spy, x, t, cond)
        assert output.dtype == dtype and output.shape == x.shape and output.is_contiguous()
        (seen,) = spy.calls
        names = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")
        assert {seen[name].dtype for name in names} == {dtype}
        assert torch.equal(output, backbone.predict(lambda _t=transformer, **a: _t(**a), x, t, cond, dtype=dtype))


def test_time_in_bfloat16_is_rounded_once(tiny_flux):
    """The network multiplies its own bfloat16 timestep by 1000. Most products are the bfloat16 number nearest to 1000 t
    and none is more than one away from it; timesteps rounded before the factor of 1000 miss a quarter of them."""
    backbone = Flux(config(tiny_flux))
    transformer = backbone.load_transformer("teacher", torch.bfloat16)
    t = backbone.diffusion.train_times
    seen = []
    transformer.time_text_embed.time_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x = torch.zeros(1, 16, 2, 2).expand(len(t), -1, -1, -1)
    cond = {name: value.expand(len(t), *value.shape[1:]) for name, value in random_cond(backbone, 1).items()}
    with torch.no_grad():
        backbone.predict(transformer, x, t, cond)
    times, guidance = (each.double() for each in seen)
    nearest = (t * 1000).bfloat16().double()
    assert (times != nearest).double().mean() < 0.05
    assert ((times - nearest).abs() / nearest).max() <= torch.finfo(torch.bfloat16).eps
    assert torch.equal(guidance, torch.full_like(guidance, GUIDANCE * 1000).bfloat16().double())


def test_float64_is_computed_in_float64(tiny_flux):
    """float64 input that float32 could not tell apart must still make a difference."""
    backbone = Flux(config(tiny_flux))
    transformer = backbone.load_transformer("teacher", torch.float64)
    x = noise_for(backbone).double()
    t, cond = torch.tensor([0.5]), random_cond(backbone, 1)
    with torch.no_grad():
        a, b = (backbone.predict(transformer, x + shift, t, cond) for shift in (0.0, 1e-13))
    assert 1e-14 < (a - b).abs().max() < 1e-10


def test_each_sample_of_a_batch_is_its_own(tiny_flux):
    """A batch of two is the two alone: times, conditions and tokens do not mix."""
    backbone = Flux(config(tiny_flux))
    transformer = backbone.load_transformer("teacher", torch.float64)
    x, t, cond = noise_for(backbone, 2).double(), torch.tensor([0.9, 0.2]), random_cond(backbone, 2)
    with torch.no_grad():
        both = backbone.predict(transformer, x, t, cond)
        for row in range(2):
            one = {name: value[row : row + 1] for name, value in cond.items()}
            alone = backbone.predict(transformer, x[row : row + 1], t[row : row + 1], one)
            # Rotary embeddings are float32 in diffusers, whatever the network is.
            assert float((both[row] - alone[0]).norm() / alone.norm()) < 1e-6
    assert float((both[0] - both[1]).norm() / both[1].norm()) > 0.1


def test_places_of_the_tokens_are_made_once(tiny_flux):
    backbone = Flux(config(tiny_flux))
    spy = Spy(backbone.load_transformer("teacher", torch.float32))
    t = torch.tensor([0.5])
    short = {
        name: value[:, :5] if name == "prompt_embeds" else value for name, value in random_cond(backbone, 1).items()
    }
    x = torch.randn(1, 16, 4, 6)
    with torch.no_grad():
        for latents, cond in ((x, short), (x, short), (x.transpose(2, 3), short), (x, random_cond(backbone, 1))):
            backbone.predict(spy, latents, t, cond)
    first, again, turned, longer = spy.calls
    assert first["img_ids"] is again["img_ids"] and first["txt_ids"] is again["txt_ids"]
    assert first["img_ids"].tolist() == [[0, row, column] for row in range(2) for column in range(3)]
    assert turned["img_ids"].tolist() == [[0, row, column] for row in range(3) for column in range(2)]
    assert torch.equal(first["txt_ids"], torch.zeros(5, 3)) and longer["txt_ids"].shape == (LENGTH, 3)


def test_without_guidance_scale_the_teacher_is_asked_once(tiny_flux):
    """distill.guidance_scale = 1, as guidance-distilled teachers want it: no unconditional pass, none needed."""
    backbone = Flux(config(tiny_flux))
    generator = torch.Generator().manual_seed(0)
    settings = DistillConfig(teacher_steps=3, anchor=1, student_steps=2, guidance_scale=1.0)
    distillation = Distillation(backbone.diffusion, settings)
    spies = [Spy(backbone.load_transformer(role, torch.float32)) for role in ("student", "teacher", "critic")]
    for spy in spies[::2]:  # all three come from the same weights
        for parameter in spy.parameters():
            parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    networks = [lambda x, t, cond, _spy=spy: backbone.predict(_spy, x, t, cond) for spy in spies]
    losses = distillation.student_loss(
        *networks, noise_for(backbone, 2), random_cond(backbone, 2), None, Draws(0, 0, "student", 0)
    )
    losses.remaining.backward()
    assert [len(call["hidden_states"]) for call in spies[1].calls] == [2, 2]  # one step to the anchor, one for DMD
    gradients = [parameter.grad for parameter in spies[0].parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert losses.dmd > 0 and losses.diversity > 0


# Text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encode_equals_the_stock_pipeline(tiny_flux, dtype):
    backbone = Flux(config(tiny_flux))
    ours = backbone.load_text("cpu", dtype).encode(PROMPTS)
    with torch.no_grad():
        embeds, pooled, _ = stock(tiny_flux).to(dtype).encode_prompt(PROMPTS, max_sequence_length=LENGTH)
    assert torch.equal(ours["prompt_embeds"], embeds) and torch.equal(ours["pooled_prompt_embeds"], pooled)
    assert ours["prompt_embeds"].dtype == dtype and not ours["prompt_embeds"].requires_grad
    assert {name: tuple(value.shape[1:]) for name, value in ours.items()} == backbone.text_shapes
    assert len({tuple(row.flatten().tolist()) for row in ours["prompt_embeds"]}) == 3
    assert len({tuple(row.tolist()) for row in ours["pooled_prompt_embeds"]}) == 3


def test_text_key_follows_content(tiny_flux, tmp_path):
    key = Flux(config(tiny_flux)).text_key
    copied = shutil.copytree(tiny_flux, tmp_path / "copy")
    assert Flux(config(copied)).text_key == key  # where it lies does not matter

    keys = {key, Flux(config(tiny_flux, max_sequence_length=13)).text_key}
    for file in ("text_encoder/model.safetensors", "tokenizer_2/tokenizer.json", "text_encoder_2/config.json"):
        original = (copied / file).read_bytes()
        (copied / file).write_bytes(original + b" ")
        keys.add(Flux(config(copied)).text_key)
        (copied / file).write_bytes(original)
    assert len(keys) == 5
    (copied / "transformer/diffusion_pytorch_model.safetensors").write_bytes(b"")
    assert Flux(config(copied)).text_key == key


# Images and export


def test_decode_equals_the_stock_pipeline(tiny_flux):
    backbone = Flux(config(tiny_flux))
    latents = 3 * torch.randn(2, *backbone.latent_shape)
    images = backbone.load_decoder("cpu").decode(latents)
    pipe = stock(tiny_flux)
    with torch.no_grad():
        raw = pipe.vae.decode(latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor).sample
    assert torch.equal(images, pipe.image_processor.postprocess(raw, output_type="pt"))
    assert images.shape == (2, 3, 32, 32) and images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1 and images.std() > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_export_is_a_stock_transformer_folder(folder, tmp_path, dtype):
    from diffusers import FluxTransformer2DModel

    backbone = Flux(config(folder))
    transformer = backbone.load_transformer("student", dtype)
    for parameter in transformer.parameters():
        parameter.data.add_(torch.randn_like(parameter))
    state = copy.deepcopy(transformer.state_dict())
    backbone.export(state, tmp_path / "out")
    loaded = FluxTransformer2DModel.from_pretrained(tmp_path / "out", torch_dtype=dtype)
    assert tuple(loaded.config.axes_dims_rope) == (4, 6, 6)
    assert loaded.config.guidance_embeds == (backbone.pipeline_guidance_scale == GUIDANCE)
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    assert not list((tmp_path / "out").glob("*.bin"))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_exported_student_makes_the_stock_pipelines_pictures(folder, tmp_path, grid):
    from diffusers import FluxTransformer2DModel

    backbone = Flux(config(folder))
    student = backbone.load_transformer("student", torch.float32)
    generator = torch.Generator().manual_seed(3)
    for parameter in student.parameters():  # no longer the teacher
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    backbone.export(student.state_dict(), tmp_path / "student")
    loaded = backbone.load_exported(tmp_path / "student", torch.float32)

    prompts, noise = PROMPTS[:2], noise_for(backbone, 2)
    cond = backbone.load_text("cpu", torch.float32).encode(prompts)
    distillation = Distillation(backbone.diffusion, DistillConfig(student_grid=grid))
    with torch.no_grad():
        latents = distillation.sample(lambda x, t, cond: backbone.predict(loaded, x, t, cond), noise, cond)
    ours = backbone.load_decoder("cpu").decode(latents)

    pipeline = stock(folder, transformer=FluxTransformer2DModel.from_pretrained(tmp_path / "student"))
    theirs = pipeline(
        prompts,
        sigmas=backbone.diffusion.pipeline_sigmas(4, grid),
        guidance_scale=backbone.pipeline_guidance_scale,
        latents=pack(noise),
        height=32,
        width=32,
        max_sequence_length=LENGTH,
        output_type="pt",
    ).images
    assert theirs.std() > 0.01
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_export_has_the_roles_own_architecture(tiny_flux, skeleton, tmp_path):
    from diffusers import FluxTransformer2DModel

    edit(skeleton, "transformer/config.json", num_layers=1, num_single_layers=3)
    backbone = Flux(config(tiny_flux, student=str(skeleton), random_init=True))
    state = backbone.load_transformer("student", torch.float32).state_dict()
    backbone.export(state, tmp_path / "out", "student")
    loaded = FluxTransformer2DModel.from_pretrained(tmp_path / "out")
    assert (loaded.config.num_layers, loaded.config.num_single_layers) == (1, 3)
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())


def test_export_refuses_another_state(tiny_flux, tmp_path):
    backbone = Flux(config(tiny_flux))
    state = backbone.load_transformer("student", torch.float32).state_dict()
    del state["proj_out.bias"]
    with pytest.raises(ValueError, match=r"(?s)student.*proj_out\.bias"):
        backbone.export(state, tmp_path / "out")


def test_a_student_of_another_kind_is_not_loaded(tiny_flux, tiny_schnell, tmp_path):
    schnell = Flux(config(tiny_schnell))
    schnell.export(schnell.load_transformer("student", torch.float32).state_dict(), tmp_path / "student")
    with pytest.raises(ConfigError, match=r"guidance_embeds = False, but the pipeline .* has True"):
        Flux(config(tiny_flux)).load_exported(tmp_path / "student", torch.float32)


# Random weights


def test_random_init_from_a_folder_reads_no_weights(skeleton):
    for component in ("text_encoder", "text_encoder_2"):
        shutil.rmtree(skeleton / component)
    backbone = Flux(config(skeleton, random_init=True))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    teacher, student = (backbone.load_transformer(role, torch.float32) for role in ("teacher", "student"))
    assert torch.equal(before, torch.get_rng_state())  # the caller's draws stay the caller's
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), student.parameters(), strict=True))
    assert all(parameter.requires_grad for parameter in teacher.parameters()) and not teacher.training
    half = backbone.load_transformer("critic", torch.bfloat16)
    for (name, a), b in zip(teacher.state_dict().items(), half.state_dict().values(), strict=True):
        assert torch.equal(a.bfloat16(), b), name


def test_random_init_never_holds_a_float32_copy(tiny_flux):
    """12 billion parameters fit a GPU in bfloat16 alone: while they are drawn, one of them at a time is float32."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Alive(TorchDispatchMode):
        now = most = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.empty.memory_format and result.device.type != "meta":
                assert result.dtype == torch.float32
                self.now += result.nbytes
                self.most = max(self.most, self.now)
                storage = result.untyped_storage()
                weakref.finalize(storage, self.gone, result.nbytes)
            return result

        def gone(self, nbytes):
            self.now -= nbytes

    backbone = Flux(config(tiny_flux, random_init=True))
    with Alive() as alive:
        transformer = backbone.load_transformer("teacher", torch.bfloat16)
    largest = max(parameter.numel() for parameter in transformer.parameters())
    total = sum(parameter.numel() for parameter in transformer.parameters())
    assert 4 * largest <= alive.most <= 8 * largest < 4 * total / 2


def test_random_init_output_lives(skeleton):
    backbone = Flux(config(skeleton, random_init=True))
    transformer = backbone.load_transformer("teacher", torch.float32)
    text = backbone.load_text("cpu", torch.float32)
    x, half = noise_for(backbone), torch.tensor([0.5])
    stronger = Flux(config(skeleton, random_init=True, embedded_guidance=7.0))
    with torch.no_grad():
        base = backbone.predict(transformer, x, half, text.encode(["a"]))
        others = [
            backbone.predict(transformer, -x, half, text.encode(["a"])),
            backbone.predict(transformer, x.transpose(2, 3), half, text.encode(["a"])).transpose(2, 3),
            backbone.predict(transformer, x, torch.tensor([0.1]), text.encode(["a"])),
            backbone.predict(transformer, x, half, text.encode(["b"])),
            stronger.predict(transformer, x, half, text.encode(["a"])),
        ]
    assert torch.isfinite(base).all() and base.std() > 0.05
    for other in others:
        assert (other - base).norm() / base.norm() > 1e-3


def test_random_init_draws_as_torch_does(skeleton):
    """Weights spread as those that the stock constructor draws."""
    from diffusers import FluxTransformer2DModel

    backbone = Flux(config(skeleton, random_init=True))
    ours = backbone.load_transformer("teacher", torch.float32).state_dict()
    theirs = FluxTransformer2DModel.from_config(backbone.transformer_config("teacher")).state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if "norm_q" in name or "norm_k" in name or "norm_added" in name:
            assert torch.equal(ours[name], value), name
        elif value.numel() >= 1000:
            assert ours[name].std() == pytest.approx(value.std().item(), rel=0.1), name


@pytest.mark.parametrize("name", KNOWN)
def test_known_architectures_need_no_file(name, monkeypatch):
    from diffusers import FluxTransformer2DModel

    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    backbone = load_backbone(ModelConfig(pipeline=name, family="flux", random_init=True, max_sequence_length=512))
    assert backbone.folder is None and backbone.latent_shape == (16, 128, 128)
    architecture = backbone.transformer_config("critic")
    with torch.device("meta"):
        transformer = FluxTransformer2DModel.from_config(architecture)
    billions = sum(parameter.numel() for parameter in transformer.parameters()) / 1e9
    blocks = len(transformer.transformer_blocks), len(transformer.single_transformer_blocks)
    assert blocks == (19, 38)
    if name.endswith("dev"):
        assert billions == pytest.approx(11.901, abs=1e-3)
        assert (architecture["guidance_embeds"], backbone.pipeline_guidance_scale) == (True, 3.5)
        # mu = 1.15 at 1024 x 1024: e^1.15 / (e^1.15 + 1 / 0.75 - 1)
        assert backbone.diffusion.times(4)[1].item() == pytest.approx(0.90453, abs=1e-5)
    else:
        assert billions == pytest.approx(11.891, abs=1e-3) and not architecture["guidance_embeds"]
        assert backbone.diffusion.times(4).tolist() == [1, 0.75, 0.5, 0.25, 0]

    text = backbone.load_text("cpu", torch.bfloat16)
    encoded = text.encode(["a red ring", "a cross"])
    assert encoded["prompt_embeds"].shape == (2, 512, 4096) and encoded["pooled_prompt_embeds"].shape == (2, 768)
    assert backbone.text_key == "random-512x4096-768"
    with pytest.raises(ConfigError, match=r"model\.random_init.*no VAE"):
        backbone.load_decoder("cpu")


# What it refuses


def test_a_pipeline_of_another_family(tiny_pipeline, tiny_flux, skeleton):
    message = refusal(tiny_pipeline)
    assert "is a StableDiffusion3Pipeline; a FluxPipeline is needed" in message and "model.family=sd3" in message
    with pytest.raises(ConfigError, match=r"is a FluxPipeline; a StableDiffusion3Pipeline.*model\.family=flux"):
        SD3(config(tiny_flux))
    edit(skeleton, "model_index.json", _class_name="FluxFillPipeline")
    assert refusal(skeleton).endswith("is a FluxFillPipeline; a FluxPipeline is needed (model.family)")
    assert "is a transformer folder (FluxTransformer2DModel)" in refusal(tiny_flux / "transformer")


@pytest.mark.parametrize(
    "component",
    ["transformer", "vae", "scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"],
)
def test_a_missing_component(skeleton, component):
    shutil.rmtree(skeleton / component)
    message = refusal(skeleton)
    assert f"{component} is missing" in message and str(skeleton / component) in message
    edit(skeleton, "model_index.json", **{component: [None, None]})
    assert f"{component} is missing" in refusal(skeleton)


@pytest.mark.parametrize(
    ("component", "found"),
    [
        ("scheduler", "DDIMScheduler"),
        ("transformer", "SD3Transformer2DModel"),
        ("text_encoder", "CLIPTextModelWithProjection"),
        ("text_encoder_2", "CLIPTextModel"),
    ],
)
def test_a_component_of_another_class(skeleton, component, found):
    edit(skeleton, "model_index.json", **{component: ["somewhere", found]})
    assert f"its {component} is a {found}" in refusal(skeleton)


@pytest.mark.parametrize(
    ("role", "name", "value"),
    [
        ("student", "in_channels", 16),
        ("critic", "pooled_projection_dim", 24),
        ("student", "joint_attention_dim", 64),
        ("critic", "out_channels", 8),
        ("student", "guidance_embeds", False),
    ],
)
def test_roles_that_do_not_fit_each_other(tiny_flux, skeleton, role, name, value):
    edit(skeleton, "transformer/config.json", **{name: value})
    message = refusal(tiny_flux, **{role: str(skeleton)})
    assert f"the {role}'s transformer ({skeleton})" in message and f"{name} = {value}" in message


def test_a_student_of_another_depth_is_welcome(tiny_flux, skeleton):
    edit(skeleton, "transformer/config.json", num_single_layers=1)
    backbone = Flux(config(tiny_flux, student=str(skeleton)))
    depths = {role: backbone.transformer_config(role)["num_single_layers"] for role in ("teacher", "student", "critic")}
    assert depths == {"teacher": 2, "student": 1, "critic": 2}


@pytest.mark.parametrize(
    ("file", "name", "value", "words"),
    [
        ("text_encoder/config.json", "hidden_size", 32, ("pooled_projection_dim = 20", "text_encoder is 32 wide")),
        ("text_encoder_2/config.json", "d_model", 48, ("joint_attention_dim = 40", "text_encoder_2 is 48 wide")),
        ("tokenizer/tokenizer_config.json", "model_max_length", 77, ("model_max_length = 77", "16 tokens")),
        ("vae/config.json", "latent_channels", 4, ("latent_channels = 4", "in_channels = 64; 16 would fit")),
        ("vae/config.json", "shift_factor", None, ("shift_factor",)),
        ("transformer/config.json", "out_channels", 32, ("out_channels = 32", "in_channels = 64")),
        ("transformer/config.json", "patch_size", 2, ("patch_size = 2; 1 is needed",)),
    ],
)
def test_parts_that_do_not_fit_each_other(skeleton, file, name, value, words):
    edit(skeleton, file, **{name: value})
    message = refusal(skeleton)
    assert all(word in message for word in words), message


def test_resolution(skeleton):
    message = refusal(skeleton, resolution=36)
    assert "model.resolution = 36" in message and "multiple of 8" in message and "32 and 40" in message
    assert Flux(config(skeleton, resolution=72)).latent_shape == (16, 18, 18)


def test_max_sequence_length(skeleton):
    assert Flux(config(skeleton, max_sequence_length=512)).text_shapes["prompt_embeds"] == (512, 40)
    assert "model.max_sequence_length = 513" in refusal(skeleton, max_sequence_length=513)


@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder", "text_encoder_2"])
def test_pickled_or_missing_weights(skeleton, component):
    (weights,) = (skeleton / component).glob("*.safetensors")
    weights.unlink()
    assert f"no weights of its {component}" in refusal(skeleton)
    (skeleton / component / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    message = refusal(skeleton)
    assert f"the weights of its {component} are pickled (pytorch_model.bin" in message and "safetensors" in message
