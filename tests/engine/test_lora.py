"""Adapters of student and critic on one frozen base: what each role computes, what is trained, and the file on disk."""

import copy
import json
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
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from dpdmd.config import ROLES, ConfigError
from dpdmd.engine.lora import (
    adapter_parameters,
    add_adapters,
    check_adapter,
    load_adapter,
    remember_role,
    save_adapter,
    use,
)
from dpdmd.kernels import fuse_transformer, selective_checkpoint

RANK, ALPHA = 3, 5.0  # odd and unequal, so that neither can stand for the other or for a size
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
        ({"alpha": float("nan")}, "alpha = nan: a number above 0 is needed"),
        ({"alpha": float("inf")}, "alpha = inf: a number above 0 is needed"),
        ({"alpha": "8"}, "alpha = '8': a number above 0 is needed"),
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
    with pytest.raises(ConfigError, match="none is known for a Linear, only for FluxTransformer2DModel and SD3"):
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
        ValueError, match=r"the SD3Transformer2DModel has no adapters; dpdmd\.engine\.lora\.add_adapters makes them"
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


ALPHAS = [ALPHA, float(RANK), 1, 2.0 * RANK]


@both
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loader_that_knows_tensors_alone(make, alpha, dtype, tmp_path):
    """W + B A from the file's tensors, by hand in float64, whatever alpha was: nothing else has to be known."""
    model = adapted(make, alpha=alpha).to(dtype)
    path = save_adapter(model, "student", tmp_path)
    tensors, own = load_file(path), adapter_parameters(model, "student")
    merged, wrong = make(), 0.0
    for name in sorted({name.rsplit(".lora_", 1)[0] for name in tensors}):
        a, b = (tensors[f"{name}.lora_{matrix}.weight"].double() for matrix in "AB")
        layer = name.removeprefix("transformer.")
        trained = own[f"{layer}.lora_B.weight"].double() @ own[f"{layer}.lora_A.weight"].double() * (alpha / RANK)
        wrong = max(wrong, distance(b @ a, trained))
        with torch.no_grad():
            weight = merged.get_submodule(layer).weight
            weight.copy_(weight.double() + b @ a)
    assert wrong < 2**-23, "in bfloat16 it would be 2**-9"
    if dtype == torch.float32:
        use(model, "student")
        assert distance(run(merged), run(model)) < 1e-5
        use(model, "teacher")
        assert distance(run(merged), run(model)) > 0.01
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    with safe_open(path, framework="pt") as file:
        settings = json.loads(file.metadata()["lora_adapter_metadata"])
    assert settings["transformer.r"] == settings["transformer.lora_alpha"] == RANK


@pytest.mark.parametrize("make, pipeline", [(sd3, sd3_pipeline), (flux, flux_pipeline)])
def test_every_loader_gives_it_the_same_strength(make, pipeline, tmp_path):
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    model = adapted(make)
    path = save_adapter(model, "student", tmp_path)
    use(model, "student")
    with torch.no_grad():
        expected = run(model)

    def by_peft(stock):
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
        layers = sorted({name.rsplit(".lora_", 1)[0] for name in tensors})
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=layers)  # as whoever sees the tensors has to guess
        inject_adapter_in_model(config, stock.transformer, "default")
        set_peft_model_state_dict(stock.transformer, tensors, "default")

    for load in (
        lambda stock: stock.load_lora_weights(tmp_path),
        lambda stock: stock.load_lora_weights(str(path)),
        lambda stock: stock.load_lora_weights(load_file(path)),
        lambda stock: stock.transformer.load_lora_adapter(str(path)),
        lambda stock: stock.transformer.load_lora_adapter(load_file(path)),
        by_peft,
    ):
        stock = pipeline(make())
        load(stock)
        with torch.no_grad():
            assert distance(run(stock.transformer), expected) < 1e-6


@both
@pytest.mark.parametrize("alpha", ALPHAS)
def test_read_back(make, alpha, tmp_path):
    """At its own alpha, to the bit where alpha / rank is a power of two; and at any other the same function."""
    model, other = adapted(make, alpha=alpha), adapted(make, alpha=alpha)
    save_adapter(model, "student", tmp_path)
    with torch.no_grad():
        for parameter in adapter_parameters(other, "student").values():
            parameter.zero_()
    load_adapter(other, "critic", tmp_path)  # of another role: whoever wrote it
    load_adapter(other, "student", tmp_path)
    expected, got = outputs(model), outputs(other)
    assert torch.equal(got["critic"], got["student"]) and distance(got["student"], expected["student"]) < 1e-6
    if alpha in (RANK, 2 * RANK):
        assert torch.equal(got["student"], expected["student"])
    other = adapted(make, alpha=7.0)
    load_adapter(other, "student", tmp_path)
    assert distance(outputs(other)["student"], expected["student"]) < 1e-6


def test_an_adapter_of_the_earlier_form_is_read_with_its_strength(tmp_path):
    """B was written as it is, and alpha beside it."""
    model, other = adapted(sd3), adapted(sd3, alpha=2.0)
    path = save_adapter(model, "student", tmp_path)
    tensors = {f"transformer.{name}": p.detach().clone() for name, p in adapter_parameters(model, "student").items()}
    settings = {"transformer.r": RANK, "transformer.lora_alpha": ALPHA}
    save_file(tensors, path, metadata={"format": "pt", "lora_adapter_metadata": json.dumps(settings)})
    load_adapter(other, "student", tmp_path)
    assert distance(outputs(other)["student"], outputs(model)["student"]) < 1e-6


def test_a_state_gathered_elsewhere(tmp_path):
    """Float32 masters of a model in bfloat16 are kept as they are."""
    model = adapted(sd3, alpha=2.0 * RANK).bfloat16()
    masters = {name: p.detach().float() + 1e-6 for name, p in adapter_parameters(model, "student").items()}
    save_adapter(model, "student", tmp_path, masters)
    whole = adapted(sd3, alpha=2.0 * RANK)
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
        (adapted(sd3, rank=2), "has rank 3; the student's adapter needs 2"),
        (adapted(sd3, targets=["to_q"]), "has besides .* tensors, such as transformer_blocks"),
        (adapted(flux), "lacks .* tensors, such as single_transformer_blocks"),
    ):
        before = {name: p.clone() for name, p in adapter_parameters(other, "student").items()}
        with pytest.raises(ConfigError, match=message):
            load_adapter(other, "student", tmp_path)
        assert all(torch.equal(p, before[name]) for name, p in adapter_parameters(other, "student").items())


def without(tensors, *parts):
    return {name: tensor for name, tensor in tensors.items() if not all(part in name for part in parts)}


def changed(tensors, change):
    name = "transformer.transformer_blocks.0.attn.to_q.lora_B.weight"
    return tensors | {name: change(tensors[name].clone())}


def poisoned(value):
    return lambda tensors, path: save_file(
        changed(tensors, lambda b: b.fill_(0).index_fill_(0, torch.tensor(3), value)), path
    )


DAMAGE = {
    "text": (lambda tensors, path: path.write_bytes(b"not a file of tensors"), "cannot be read as an adapter"),
    "empty": (lambda tensors, path: path.write_bytes(b""), "cannot be read as an adapter"),
    "cut off": (lambda tensors, path: path.write_bytes(path.read_bytes()[:-1]), "cannot be read as an adapter"),
    "pointer": (
        lambda tensors, path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        "git-lfs pointer.*git lfs pull",
    ),
    "folder": (lambda tensors, path: (path.unlink(), path.mkdir()), "it is a folder"),
    "no tensors": (lambda tensors, path: save_file({}, path), "holds no tensor"),
    "nan": (poisoned(torch.nan), r": NaN or infinity in 1 of 50 tensors, such as \S+to_q.lora_B.weight \(3 of 48"),
    "infinity": (poisoned(-torch.inf), "NaN or infinity in 1 of 50 tensors"),
    "integers": (lambda tensors, path: save_file(changed(tensors, lambda b: b.int()), path), "torch.int32"),
    "float8": (lambda tensors, path: save_file(changed(tensors, lambda b: b.to(torch.float8_e4m3fn)), path), "float8"),
    "vector": (lambda tensors, path: save_file(changed(tensors, lambda b: b.flatten()), path), "a matrix of floats"),
    "other size": (
        lambda tensors, path: save_file(changed(tensors, lambda b: b[1:].contiguous()), path),
        r"has in another shape 1 tensor, such as \S+to_q.lora_B.weight of shape \(15, 3\), where \(16, 3\)",
    ),
    "half a pair": (
        lambda tensors, path: save_file(without(tensors, "0.attn.to_q", "lora_B"), path),
        "lacks 1 tensors",
    ),
    "a layer more": (
        lambda tensors, path: save_file(
            tensors | {f"transformer.norm_out.{name}": torch.ones(3, 3) for name in ("lora_A.weight", "lora_B.weight")},
            path,
        ),
        "has besides 2 tensors, such as norm_out.lora_A.weight",
    ),
    "another tool's keys": (
        lambda tensors, path: save_file(tensors | {"transformer.x.alpha": torch.tensor(4.0)}, path),
        "has besides 1 tensors, such as x.alpha",
    ),
    "metadata that is no JSON": (
        lambda tensors, path: save_file(tensors, path, metadata={"lora_adapter_metadata": "{"}),
        "cannot be read as an adapter",
    ),
    "metadata that is no object": (
        lambda tensors, path: save_file(tensors, path, metadata={"lora_adapter_metadata": "[1]"}),
        "cannot be read as an adapter",
    ),
    "another rank told": (
        lambda tensors, path: save_file(tensors, path, metadata={"lora_adapter_metadata": '{"transformer.r": 5}'}),
        "its tensors have rank 3, its own description is r = 5",
    ),
    "alphas by layer": (
        lambda tensors, path: save_file(
            tensors, path, metadata={"lora_adapter_metadata": '{"transformer.alpha_pattern": {"to_q": 2}}'}
        ),
        "alpha_pattern",
    ),
    "no number for alpha": (
        lambda tensors, path: save_file(
            tensors, path, metadata={"lora_adapter_metadata": '{"transformer.lora_alpha": "five"}'}
        ),
        "lora_alpha = 'five'",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_adapters(damage, tmp_path):
    """Of a role and of a stock transformer; in one line, and nothing is half read."""
    model = adapted(sd3)
    path = save_adapter(model, "student", tmp_path)
    check_adapter(sd3(), tmp_path)
    apply, message = DAMAGE[damage]
    apply(load_file(path), path)
    before = outputs(model)["student"]
    for read in (lambda: load_adapter(model, "student", tmp_path), lambda: check_adapter(sd3(), tmp_path)):
        with pytest.raises(ConfigError, match=message) as error:
            read()
        assert "\n" not in str(error.value) and str(path) in str(error.value)
    assert torch.equal(outputs(model)["student"], before)
