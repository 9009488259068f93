"""Adapters of student and critic on one frozen base: what each role computes, what is trained, and the file on disk."""

import copy
import pickle
import re

import pytest
import torch
import torch.utils.checkpoint
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import nn

from dpdmd.config import ConfigError
from dpdmd.kernels import fuse_transformer, selective_checkpoint
from dpdmd.lora import adapter_parameters, add_adapters, load_adapter, remember_role, save_adapter, use

RANK, ALPHA = 3, 5.0  # odd and unequal, so that neither can stand for the other or for a size
ROLES = ("teacher", "student", "critic")
DUAL, PLAIN_LAST = 16, 9  # adapted layers of SD3.5's first block here, with a second attention, and of its last


def sd3():
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=16,
        pooled_projection_dim=20,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )


def flux():
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        axes_dims_rope=(2, 2, 4),
    )


both = pytest.mark.parametrize("make", [sd3, flux])


def adapted(make, **settings):
    """With adapters of which no part is zero."""
    model = make()
    add_adapters(model, **({"rank": RANK, "alpha": ALPHA, "seed": 7} | settings))
    randomize(model)
    return model


def randomize(model):
    for i, role in enumerate(model.peft_config):
        generator = torch.Generator().manual_seed(100 + i)
        with torch.no_grad():
            for parameter in adapter_parameters(model, role).values():
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))


def run(model):
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(model.dtype)

    tensors = {"encoder_hidden_states": draw(2, 5, 24), "pooled_projections": draw(2, 20)}
    if isinstance(model, SD3Transformer2DModel):
        return model(hidden_states=draw(2, 4, 6, 8), timestep=torch.tensor([500.0, 250.0]), **tensors).sample
    ids = torch.zeros(12, 3)
    ids[:, 1:] = torch.cartesian_prod(torch.arange(3.0), torch.arange(4.0))
    tensors |= {"timestep": torch.tensor([0.5, 0.25]), "img_ids": ids, "txt_ids": torch.zeros(5, 3)}
    return model(hidden_states=draw(2, 12, 16), **tensors).sample


@torch.no_grad()
def outputs(model):
    results = {}
    for role in ROLES:
        use(model, role)
        results[role] = run(model)
    return results


def distance(x, y):
    x, y = x.detach().double(), y.detach().double()
    return float((x - y).norm() / y.norm())


@both
def test_all_roles_begin_as_the_base(make):
    model = make()
    expected = run(model)
    weights = dict(model.named_parameters())
    add_adapters(model, rank=RANK, alpha=ALPHA, seed=7)
    for output in outputs(model).values():
        assert torch.equal(output, expected)
    kept = {id(parameter) for parameter in model.parameters()}
    assert all(id(weight) in kept for weight in weights.values()), "the base must be the very same tensors"


@both
@pytest.mark.parametrize("fused", [False, True], ids=["stock", "fused"])
def test_each_role_is_the_base_with_its_own_product_added(make, fused):
    """Against a model whose weights have alpha / rank B A added, in float64."""
    model = adapted(make)
    if fused:
        fuse_transformer(model, verbose=False)
    got = outputs(model)
    for role in ROLES:
        merged = make()
        if role != "teacher":
            state = adapter_parameters(model, role)
            with torch.no_grad():
                for name in {name.rsplit(".lora_", 1)[0] for name in state}:
                    product = state[f"{name}.lora_B.weight"].double() @ state[f"{name}.lora_A.weight"].double()
                    weight = merged.get_submodule(name).weight
                    weight.copy_(weight.double() + ALPHA / RANK * product)
        assert distance(got[role], run(merged)) < 1e-5
    assert distance(got["student"], got["teacher"]) > 0.01 and distance(got["critic"], got["student"]) > 0.01


@both
def test_roles_leave_one_another_alone(make):
    model = adapted(make)
    expected = outputs(model)
    for role in ("critic", "teacher", "student", "teacher", "critic"):
        use(model, role)
        with torch.no_grad():
            assert torch.equal(run(model), expected[role])


@both
def test_what_is_trained(make):
    """Both adapters, always; and of them only that of the role gets gradients."""
    model = adapted(make)
    trained = {
        id(parameter) for role in ("student", "critic") for parameter in adapter_parameters(model, role).values()
    }
    for role in ROLES:
        use(model, role)
        assert {id(parameter) for parameter in model.parameters() if parameter.requires_grad} == trained
        model.zero_grad()
        output = run(model)
        if role != "teacher":
            output.square().sum().backward()
        of_role = set() if role == "teacher" else {id(p) for p in adapter_parameters(model, role).values()}
        assert {id(parameter) for parameter in model.parameters() if parameter.grad is not None} == of_role


def test_parameters_have_a_stable_order_and_the_names_of_the_file():
    model = adapted(sd3)
    student, critic = adapter_parameters(model, "student"), adapter_parameters(model, "critic")
    assert list(student) == list(critic) == list(adapter_parameters(adapted(sd3), "student"))
    assert list(student)[:2] == [
        "transformer_blocks.0.attn.to_q.lora_A.weight",
        "transformer_blocks.0.attn.to_q.lora_B.weight",
    ]
    assert len(student) == 2 * (DUAL + PLAIN_LAST)
    assert student["transformer_blocks.0.attn.to_q.lora_A.weight"].shape == (RANK, 16)
    assert not {id(p) for p in student.values()} & {id(p) for p in critic.values()}
    with pytest.raises(ValueError, match="role is 'teacher'; the transformer's adapters are student, critic"):
        adapter_parameters(model, "teacher")


def test_default_targets_of_flux():
    names = {name.rsplit(".lora_", 1)[0] for name in adapter_parameters(adapted(flux), "student")}
    linear = {
        name
        for name, module in flux().named_modules()
        if isinstance(module, nn.Linear)
        and "transformer_blocks" in name
        and not re.search(r"norm\d?(_context)?\.", name)
    }
    assert names == linear, "every linear layer in the blocks but the modulations; not the last projection"


@both
def test_own_targets(make):
    model = adapted(make, targets=["to_k", "ff.net.2"])
    names = {name.rsplit(".lora_", 1)[0] for name in adapter_parameters(model, "critic")}
    assert names == {
        name
        for name, _ in make().named_modules()
        if name.endswith((".to_k", ".ff.net.2")) and "transformer_blocks" in name
    }


def test_drawn_from_the_seed_alone():
    torch.manual_seed(123)
    models = [sd3(), sd3(), sd3()]
    before = torch.get_rng_state()
    for model, seed in zip(models, (7, 7, 8), strict=True):
        add_adapters(model, rank=RANK, alpha=ALPHA, seed=seed)
        torch.rand(3) if seed == 7 else None
        torch.set_rng_state(before)
    first, same, other = (adapter_parameters(model, "student") for model in models)
    for name, parameter in first.items():
        assert torch.equal(parameter, same[name])
        if ".lora_B." in name:
            assert not parameter.any()
            continue
        assert not torch.equal(parameter, other[name])
        assert not torch.equal(parameter, adapter_parameters(models[0], "critic")[name])
        bound = parameter.shape[1] ** -0.5
        assert 0.5 * bound < parameter.abs().max() <= bound
    model = sd3()
    before = torch.get_rng_state()
    add_adapters(model, rank=RANK, alpha=ALPHA, seed=7)
    assert torch.equal(torch.get_rng_state(), before), "torch's own generator must not be drawn from"


def test_dtype_and_device_of_the_base():
    model = sd3().bfloat16().to("meta")
    add_adapters(model, rank=RANK, alpha=ALPHA, seed=7)
    for parameter in adapter_parameters(model, "student").values():
        assert parameter.dtype == torch.bfloat16 and parameter.device.type == "meta"


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"rank": 0}, "rank = 0: a whole number from 1 on is needed"),
        ({"rank": 1.5}, "rank = 1.5: a whole number"),
        ({"alpha": 0}, "alpha = 0: a number above 0 is needed"),
        ({"targets": ["to_q", "to_out"]}, r"target 'to_out' is no linear layer .* SD3.*; the nearest are to_out\.0"),
        ({"targets": ["proj_out"]}, r"target 'proj_out' is no linear layer in the blocks"),
        ({"targets": []}, r"targets is empty; a SD3Transformer2DModel has .*attn\.to_q"),
        ({"roles": ("teacher", "critic")}, "none of them 'teacher'"),
        ({"roles": ("a.b",)}, "names without dots"),
        ({"roles": ("critic", "critic")}, "different names"),
    ],
)
def test_what_cannot_be_added(settings, message):
    model = sd3()
    with pytest.raises(ConfigError, match=message):
        add_adapters(model, **({"rank": RANK, "alpha": ALPHA, "seed": 7} | settings))
    assert all(parameter.requires_grad for parameter in model.parameters()), "an error must leave nothing half done"


def test_other_models_and_adapters_twice():
    with pytest.raises(ConfigError, match="none is known for a Linear, only for SD3Transformer2DModel and Flux"):
        add_adapters(nn.Linear(2, 2), rank=1, alpha=1, seed=0)
    with pytest.raises(ConfigError, match="has adapters already: student, critic"):
        add_adapters(adapted(sd3), rank=1, alpha=1, seed=0)


# Switching


def test_switching_walks_over_nothing(monkeypatch):
    model = adapted(sd3)

    def walk(*args, **kwargs):
        raise AssertionError("walked over the modules")

    for name in ("modules", "named_modules", "children", "named_children", "parameters", "named_parameters"):
        monkeypatch.setattr(nn.Module, name, walk)
    for role in ROLES:
        use(model, role)


def test_switching_what_cannot_be():
    with pytest.raises(
        ValueError, match=r"the SD3Transformer2DModel has no adapters; dpdmd\.lora\.add_adapters makes them"
    ):
        use(sd3(), "teacher")
    model = adapted(sd3)
    with pytest.raises(ValueError, match="role is 'pupil'; it needs to be one of teacher, student, critic"):
        use(model, "pupil")
    for change in (
        lambda model: model.set_adapter("critic"),
        lambda model: model.disable_adapters(),
        lambda model: model.fuse_lora(),
    ):
        model = adapted(sd3)
        use(model, "student")
        change(model)
        with pytest.raises(RuntimeError, match=r"switched or merged by something else"):
            use(model, "student")


def test_copies_switch_by_themselves():
    model = adapted(sd3)
    expected = outputs(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        use(model, "student")
        use(other, "critic")
        with torch.no_grad():
            assert torch.equal(run(model), expected["student"])
            assert torch.equal(run(other), expected["critic"])


def checkpointed(model, checkpoint):
    """With the checkpoint around each block's forward, as the trainer has it; the role is remembered."""
    for block in [*model.transformer_blocks, *getattr(model, "single_transformer_blocks", [])]:
        forward, parameters = block.forward, list(block.parameters())

        def again(*args, forward=forward, parameters=parameters, **kwargs):
            return checkpoint(remember_role(model, forward), parameters, *args, **kwargs)

        block.forward = again
    return model


def by_torch(function, parameters, *args, **kwargs):
    return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False, **kwargs)


def by_selection(function, parameters, *args, **kwargs):
    return selective_checkpoint(function, *args, parameters=parameters, **kwargs)


@both
@pytest.mark.parametrize("fused", [False, True], ids=["stock", "fused"])
@pytest.mark.parametrize("checkpoint", [by_torch, by_selection])
def test_recomputed_in_the_role_of_the_forward_pass(make, checkpoint, fused):
    """Teacher and critic are at work between the student's forward pass and its backward pass."""
    plain, model = adapted(make), adapted(make)
    if fused:
        fuse_transformer(plain, verbose=False)
        fuse_transformer(model, verbose=False)
    checkpointed(model, checkpoint)
    gradients = []
    for each in (plain, model):
        use(each, "student")
        loss = run(each).square().sum()
        if each is model:
            for role in ("critic", "teacher"):
                use(model, role)
                with torch.no_grad():
                    run(model)
        loss.backward()
        gradients.append({name: p.grad for name, p in adapter_parameters(each, "student").items()})
        assert all(p.grad is None for p in adapter_parameters(each, "critic").values())
    for name, gradient in gradients[0].items():
        assert torch.equal(gradients[1][name], gradient), name
    with torch.no_grad():
        use(plain, "teacher")
        assert torch.equal(run(model), run(plain)), "the role that was on must be on again"


# On disk


def flux_pipeline(transformer):
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return FluxPipeline(transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), **parts)


def sd3_pipeline(transformer):
    parts = {name: None for i in ("", "_2", "_3") for name in (f"text_encoder{i}", f"tokenizer{i}")}
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return StableDiffusion3Pipeline(transformer=transformer, scheduler=scheduler, vae=None, **parts)


def sample(pipeline):
    generator = torch.Generator().manual_seed(5)
    embeddings = {
        "prompt_embeds": torch.randn(1, 5, 24, generator=generator),
        "pooled_prompt_embeds": torch.randn(1, 20, generator=generator),
    }
    pipeline.set_progress_bar_config(disable=True)
    settings = {"height": 64, "width": 64, "num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "latent"}
    return pipeline(**embeddings, **settings, generator=torch.Generator().manual_seed(6)).images


@pytest.mark.parametrize("make, pipeline", [(sd3, sd3_pipeline), (flux, flux_pipeline)])
@pytest.mark.parametrize("alpha", [ALPHA, float(RANK), 1])
def test_stock_pipelines_load_it(make, pipeline, alpha, tmp_path, recwarn):
    model = adapted(make, alpha=alpha)
    for role in ("student", "critic"):
        save_adapter(model, role, tmp_path / role)
        use(model, role)
        expected = sample(pipeline(model))
        stock = pipeline(make())
        without = sample(stock)
        stock.load_lora_weights(tmp_path / role)
        assert distance(sample(stock), expected) < 1e-6
        assert distance(without, expected) > 0.01
    assert not [str(each.message) for each in recwarn if "PEFT" in str(each.message) or "LoRA" in str(each.message)]


def test_full_pipeline_loads_it(tiny_pipeline, tmp_path):
    """With text encoders, as a user has it."""
    made = [StableDiffusion3Pipeline.from_pretrained(tiny_pipeline) for _ in range(2)]
    add_adapters(made[0].transformer, rank=RANK, alpha=ALPHA, seed=7)
    randomize(made[0].transformer)
    use(made[0].transformer, "student")
    made[1].load_lora_weights(save_adapter(made[0].transformer, "student", tmp_path).parent)
    images = []
    for each in made:
        each.set_progress_bar_config(disable=True)
        settings = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "latent"}
        images.append(each("a red ring", generator=torch.Generator().manual_seed(6), **settings).images)
    assert distance(images[1], images[0]) < 1e-6


@both
def test_read_back(make, tmp_path):
    model, other = adapted(make), adapted(make)
    save_adapter(model, "student", tmp_path)
    with torch.no_grad():
        for parameter in adapter_parameters(other, "student").values():
            parameter.zero_()
    load_adapter(other, "critic", tmp_path)  # of another role: whoever wrote it
    load_adapter(other, "student", tmp_path)
    expected, got = outputs(model), outputs(other)
    assert torch.equal(got["student"], expected["student"]) and torch.equal(got["critic"], expected["student"])


def test_a_state_gathered_elsewhere(tmp_path):
    """Float32 masters of a model in bfloat16 are kept as they are."""
    model = adapted(sd3).bfloat16()
    masters = {name: p.detach().float() + 1e-6 for name, p in adapter_parameters(model, "student").items()}
    save_adapter(model, "student", tmp_path, masters)
    whole = adapted(sd3)
    load_adapter(whole, "student", tmp_path)
    for name, parameter in adapter_parameters(whole, "student").items():
        assert torch.equal(parameter, masters[name])
    load_adapter(model, "student", tmp_path)
    assert all(parameter.dtype == torch.bfloat16 for parameter in adapter_parameters(model, "student").values())
    name = "transformer_blocks.0.attn.to_q.lora_A.weight"
    with pytest.raises(ValueError, match=r"state lacks 1 tensors, such as transformer_blocks\.0\.attn\.to_q\.lora_A"):
        save_adapter(model, "student", tmp_path, {key: value for key, value in masters.items() if key != name})
    with pytest.raises(ValueError, match="state has besides 1 tensors, such as more"):
        save_adapter(model, "student", tmp_path, masters | {"more": masters[name]})
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]


def test_what_cannot_be_loaded(tmp_path):
    model = adapted(sd3)
    with pytest.raises(ConfigError, match=r"pytorch_lora_weights\.safetensors cannot be read as an adapter"):
        load_adapter(model, "student", tmp_path)
    save_adapter(model, "student", tmp_path)
    for other, message in (
        (adapted(sd3, alpha=2.0), "is of lora_alpha = 5.0; the student's is 2.0"),
        (adapted(sd3, rank=2), "is of r = 3; the student's is 2"),
        (adapted(sd3, targets=["to_q"]), "has besides .* tensors, such as transformer_blocks"),
        (adapted(flux), "lacks .* tensors, such as single_transformer_blocks"),
    ):
        before = {name: p.clone() for name, p in adapter_parameters(other, "student").items()}
        with pytest.raises(ConfigError, match=message):
            load_adapter(other, "student", tmp_path)
        assert all(torch.equal(p, before[name]) for name, p in adapter_parameters(other, "student").items())
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"not a file of tensors")
    with pytest.raises(ConfigError, match="cannot be read as an adapter"):
        load_adapter(model, "student", tmp_path)
