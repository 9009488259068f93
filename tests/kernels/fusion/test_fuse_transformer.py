"""Fused diffusers transformers against the stock ones: tiny SD3, SD3.5 and FLUX models, forward and backward."""

import copy
import pickle
import sys
import types
import weakref

import pytest
import torch
import torch.utils.checkpoint
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.attention_processor import JointAttnProcessor2_0
from diffusers.models.normalization import AdaLayerNormContinuous, FP32LayerNorm
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from peft import LoraConfig
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from dpdmd.engine.lora import adapter_parameters, add_adapters, use
from dpdmd.kernels import selective_checkpoint, use_backend
from dpdmd.kernels.blocks.fp8 import quantize_rows
from dpdmd.kernels.fusion import flux as flux_blocks
from dpdmd.kernels.fusion import fp8_weights, joint_attention, linear
from dpdmd.kernels.fusion import sd3 as sd3_blocks
from dpdmd.kernels.fusion.conditions import Fused
from dpdmd.kernels.fusion.fuse_transformer import FAMILIES, fuse_transformer, requantize, unfuse_transformer
from dpdmd.kernels.runtime.backend import why_not

TOLERANCE = 1e-5  # of relative error, in float32
TEXT = 5  # tokens
LORA_LAYERS = ["to_q", "to_v", "add_k_proj", "to_out.0", "to_add_out", "net.0.proj", "net.2", "proj_mlp", "proj_out"]


def sd3(num_layers=2, **config):
    """SD3.5: norms of q and k, a first block of dual attention, a last one whose text ends there."""
    config = {"qk_norm": "rms_norm", "dual_attention_layers": (0,), "num_attention_heads": 2} | config
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=num_layers,
        attention_head_dim=16,
        joint_attention_dim=24,
        caption_projection_dim=16 * config["num_attention_heads"],
        pooled_projection_dim=20,
        pos_embed_max_size=8,
        **config,
    )
    return randomized(model)


def sd3_0():
    return sd3(qk_norm=None, dual_attention_layers=())


def flux(num_layers=1, num_single_layers=2):
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=8,
        num_layers=num_layers,
        num_single_layers=num_single_layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        axes_dims_rope=(4, 6, 6),
    )
    return randomized(model)


def randomized(model):
    """Every parameter drawn, so that none is a one or a zero that would hide what is done with it."""
    generator = torch.Generator("cpu").manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            draw = torch.randn(parameter.shape, generator=generator, device="cpu")
            parameter.copy_(draw * parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.5 + 0.3 * draw)
    return model


def inputs_of(model, batch=2, dtype=torch.float32, seed=1):
    """Differentiable inputs, and the others. A sample has 12 tokens of image, 3 x 4 of them."""
    generator = torch.Generator("cpu").manual_seed(seed)
    device = next(model.parameters()).device

    def draw(*shape):
        return torch.randn(shape, generator=generator, device="cpu").to(device, dtype).requires_grad_()

    tensors = {"encoder_hidden_states": draw(batch, TEXT, 24), "pooled_projections": draw(batch, 20)}
    # Times that bfloat16 holds as they are.
    t = torch.tensor([0.5, 0.25], device=device)[:batch]
    if isinstance(model, SD3Transformer2DModel):
        return {"hidden_states": draw(batch, 4, 6, 8)} | tensors, {"timestep": 1000 * t, "return_dict": False}
    ids = torch.zeros(TEXT + 12, 3, device=device)
    ids[TEXT:, 1:] = torch.cartesian_prod(torch.arange(3.0, device=device), torch.arange(4.0, device=device))
    others = {"timestep": t, "img_ids": ids[TEXT:], "txt_ids": ids[:TEXT], "return_dict": False}
    return {"hidden_states": draw(batch, 12, 8)} | tensors, others


def output_and_gradients(model, batch=2, dtype=torch.float32, call=None, **further):
    """The output, and the gradients of a random loss in every parameter and input that requires one, by name."""
    tensors, others = inputs_of(model, batch, dtype)
    model.zero_grad()
    output = (model if call is None else call)(**tensors, **others, **further)[0]
    generator = torch.Generator("cpu").manual_seed(2)
    upstream = torch.randn(output.shape, generator=generator, device="cpu").to(output)
    output.backward(upstream)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    return output.detach(), gradients | {name: tensor.grad for name, tensor in tensors.items()}


def errors(got, expected):
    """Relative errors of output and gradients, by name; of a gradient that is zero throughout, its norm."""
    (output, gradients), (expected_output, expected_gradients) = got, expected
    assert gradients.keys() == expected_gradients.keys()
    pairs = {"output": (output, expected_output)}
    for name, gradient in expected_gradients.items():
        assert gradient is not None and gradients[name] is not None, name
        assert gradients[name].dtype == gradient.dtype, name
        pairs[name] = gradients[name], gradient
    found = {}
    for name, (x, y) in pairs.items():
        x, y = x.double(), y.double()
        size = y.norm()
        # The biases of keys shift all scores of a query alike; and a last block drops its text.
        found[name] = float((x - y).norm() / size if size > 1e-4 else x.norm())
    return found


def check_equal(got, expected, tolerance=TOLERANCE):
    wrong = {name: error for name, error in errors(got, expected).items() if not error < tolerance}
    assert not wrong


def check_bits(got, expected):
    assert torch.equal(got[0], expected[0])
    assert got[1].keys() == expected[1].keys()
    assert all(torch.equal(gradient, expected[1][name]) for name, gradient in got[1].items())


def check_selective_checkpoint(model):
    """Of a model in bfloat16: the same with it as without."""
    expected = output_and_gradients(model, dtype=torch.bfloat16)
    model.enable_gradient_checkpointing(selective_checkpoint)
    check_bits(output_and_gradients(model, dtype=torch.bfloat16), expected)


def fused(model, **settings):
    model = copy.deepcopy(model)
    report = fuse_transformer(model, verbose=False, **settings)
    assert not report.left
    return model


def reentrant_checkpoint(module, *args):
    return torch.utils.checkpoint.checkpoint(module.__call__, *args, use_reentrant=True)


@pytest.fixture
def stock_calls(monkeypatch):
    """Counts the stock forwards that run, by class."""
    calls = {}
    for cls in (JointTransformerBlock, FluxTransformerBlock, FluxSingleTransformerBlock, AdaLayerNormContinuous):

        def counted(self, *args, cls=cls, forward=cls.forward, **kwargs):
            calls[cls.__name__] = calls.get(cls.__name__, 0) + 1
            return forward(self, *args, **kwargs)

        monkeypatch.setattr(cls, "forward", counted)
    return calls


both = pytest.mark.parametrize("implementation", ["reference", "triton"], indirect=True)
models = pytest.mark.parametrize("make", [sd3, sd3_0, flux])
one_of_each = pytest.mark.parametrize("make", [sd3, flux])


@both
@models
def test_output_and_every_gradient(implementation, make, stock_calls):
    model = make()
    expected = output_and_gradients(model)
    stock_calls.clear()
    check_equal(output_and_gradients(fused(model)), expected)
    assert not stock_calls, "it must be the fused forward that was compared"


@one_of_each
def test_one_sample(make):
    """Its rows of a joint tensor are dense."""
    model = make()
    check_equal(output_and_gradients(fused(model), batch=1), output_and_gradients(model, batch=1))


@one_of_each
def test_repeats_to_the_bit(make):
    model = fused(make())
    check_bits(output_and_gradients(model), output_and_gradients(model))


@one_of_each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_less_accurate_than_eager(make, dtype):
    """In half precision: output and gradients as a whole no further from float32 than 1.25 times the stock module's."""
    model = make()
    exact = output_and_gradients(model)
    eager = output_and_gradients(copy.deepcopy(model).to(dtype), dtype=dtype)
    ours = output_and_gradients(fused(model).to(dtype), dtype=dtype)
    assert ours[0].dtype == dtype

    def error(got):
        squares = [(got[1][name].double() - gradient.double()).square().sum() for name, gradient in exact[1].items()]
        return (got[0].double() - exact[0].double()).norm(), torch.stack(squares).sum().sqrt()

    for our_error, eager_error in zip(error(ours), error(eager), strict=True):
        assert our_error < 1.25 * eager_error


@one_of_each
def test_autocast(make):
    """Under autocast parameters and their gradients stay float32, and the products run in bfloat16."""
    model = make()
    exact = output_and_gradients(model)
    with torch.autocast("cpu", torch.bfloat16):
        eager, ours = output_and_gradients(model), output_and_gradients(fused(model))
    assert ours[0].dtype == eager[0].dtype
    eager, ours = errors(eager, exact), errors(ours, exact)
    assert ours["output"] > 1e-4, "nothing ran in bfloat16"
    assert sum(ours.values()) < 1.25 * sum(eager.values())


def test_float16_is_clipped_as_in_stock():
    """FLUX's residuals can pass float16's range; diffusers clips them, in double blocks the text's alone."""
    model = flux().half()
    double, single = model.transformer_blocks[0], model.single_transformer_blocks[0]
    with torch.no_grad():
        double.norm1_context.linear.bias[-32:] = 1e4  # the gates of what is added last
        single.norm.linear.bias[-32:] = 1e4
    ours = fused(model)
    generator = torch.Generator().manual_seed(3)
    image, text, temb = (torch.randn(shape, generator=generator).half() for shape in ((2, 12, 32), (2, 5, 32), (2, 32)))
    text, image = 6e4 * text.sign(), 6e4 * image.sign()
    with torch.no_grad():
        for mine, theirs in ((ours.transformer_blocks[0], double), (ours.single_transformer_blocks[0], single)):
            got, expected = mine(image, text, temb), theirs(image, text, temb)
            assert (expected[0].abs() == 65504).any() and expected[0].isfinite().all()
            for x, y in zip(got, expected, strict=True):
                torch.testing.assert_close(x.float(), y.float(), rtol=0.01, atol=100)


# What stays as it was


@models
def test_model_stays_what_it_is(make, capsys):
    model = make()
    before = {name: (type(module), list(module._modules)) for name, module in model.named_modules()}
    state = model.state_dict(keep_vars=True)
    expected = output_and_gradients(model)

    report = fuse_transformer(model)

    assert capsys.readouterr().out == f"{report}\n"
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(state) and all(after[name] is state[name] for name in state)
    assert {name: (type(module), list(module._modules)) for name, module in model.named_modules()} == before
    check_equal(output_and_gradients(model), expected)

    unfuse_transformer(model)
    assert not any(vars(module).keys() & {"forward", "_fp8_weights"} for module in model.modules())
    assert torch.equal(output_and_gradients(model)[0], expected[0])
    unfuse_transformer(model)  # harmless


def test_report():
    report = fuse_transformer(sd3(num_layers=3), verbose=False)
    assert report.replaced == {"JointTransformerBlock": 3, "AdaLayerNormContinuous": 1}
    assert not report.left and not report.num_fp8
    assert str(report) == "SD3Transformer2DModel: fused 3 JointTransformerBlock, 1 AdaLayerNormContinuous"

    model = flux(num_layers=2, num_single_layers=3)
    model.transformer_blocks[1].norm2 = nn.Identity()
    report = fuse_transformer(model, fp8="no_grad", verbose=False)
    assert report.replaced == {
        "FluxTransformerBlock": 1,
        "FluxSingleTransformerBlock": 3,
        "AdaLayerNormContinuous": 1,
    }
    assert report.left == [("transformer_blocks.1", "norm2 is a Identity, not a LayerNorm")]
    assert str(report).splitlines() == [
        "FluxTransformer2DModel: fused 1 FluxTransformerBlock, 3 FluxSingleTransformerBlock, 1 AdaLayerNormContinuous; "
        "2 of them with FP8 where there is no gradient",
        "  transformer_blocks.1 left as it was: norm2 is a Identity, not a LayerNorm",
    ]


def test_fused_twice():
    model = fused(sd3(num_layers=3))
    expected = output_and_gradients(model)
    forwards = [block.forward for block in model.transformer_blocks]
    assert fuse_transformer(model, fp8="no_grad", verbose=False).num_fp8 == 1
    assert [block.forward for block in model.transformer_blocks] == forwards
    assert torch.equal(output_and_gradients(model)[0], expected[0])
    assert fuse_transformer(model, verbose=False).replaced == {"JointTransformerBlock": 3, "AdaLayerNormContinuous": 1}
    assert model.transformer_blocks[1]._fp8_weights is None


@one_of_each
def test_copies_are_fused_and_their_own(make, tmp_path):
    model = fused(make(), fp8="no_grad")
    expected = output_and_gradients(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        check_equal(output_and_gradients(other), expected, 1e-7)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(0.5)
        assert not torch.allclose(output_and_gradients(other)[0], expected[0])
        assert torch.equal(output_and_gradients(model)[0], expected[0])
        for block in other.transformer_blocks:
            assert block.forward.args[0] is block
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert "forward" not in vars(loaded.transformer_blocks[0])
    check_equal(output_and_gradients(loaded), expected)
    model.load_state_dict(other.state_dict())
    assert torch.equal(output_and_gradients(model)[0], output_and_gradients(other)[0])


def test_wrapped_forwards():
    """What wraps a fused forward (a recomputing engine, an offloading hook) is neither lost nor passed over."""
    model = fused(sd3())
    block = model.transformer_blocks[1]
    inner = block.forward
    block.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    with pytest.raises(RuntimeError, match=r"transformer_blocks\.1 has had its fused forward wrapped or removed"):
        unfuse_transformer(model)
    wrapper = block.forward
    assert not fuse_transformer(model, verbose=False).left and block.forward is wrapper
    block.forward = inner
    unfuse_transformer(model)
    block.forward = wrapper
    report = fuse_transformer(model, verbose=False)
    assert report.left == [("transformer_blocks.1", "it has a forward of its own already")]
    assert block.forward is wrapper


def test_a_family_is_a_file_and_a_line(monkeypatch):
    """Its file names lists of blocks and single modules, with what fuses each; a subclass of its class is fused, too."""

    class ToyTransformer2DModel(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks, self.out = nn.ModuleList([nn.Linear(2, 2) for _ in range(2)]), nn.Tanh()
            self.none = nn.ModuleList()

    ToyTransformer2DModel.__module__ = "diffusers.models.toy"
    double = Fused(lambda module: "", lambda module, x: 2 * type(module).forward(module, x))
    unlike = Fused(lambda module: "it is a Tanh", double.forward)
    toy = types.SimpleNamespace(MODULES={"blocks": double, "none": double, "out": unlike})
    monkeypatch.setitem(sys.modules, "dpdmd.kernels.fusion.toy", toy)
    monkeypatch.setitem(FAMILIES, "ToyTransformer2DModel", "toy")
    model = type("Derived", (ToyTransformer2DModel,), {})()
    x = torch.ones(2)
    expected = 2 * model.blocks[1](x)
    report = fuse_transformer(model, verbose=False)
    assert report.replaced == {"Linear": 2} and report.left == [("out", "it is a Tanh")]
    assert torch.equal(model.blocks[1](x), expected)
    unfuse_transformer(model)
    assert torch.equal(2 * model.blocks[1](x), expected)


def test_other_arguments():
    with pytest.raises(TypeError, match=r"model is a torch\.nn.*\.Linear; it needs to be diffusers' SD3Transformer2DM"):
        fuse_transformer(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="itself and not in a wrapper"):
        unfuse_transformer(nn.DataParallel(sd3()))
    with pytest.raises(ValueError, match="fp8 is 'always'; it needs to be one of None, 'no_grad'"):
        fuse_transformer(sd3(), fp8="always")
    model = sd3(num_attention_heads=3, num_layers=3)
    odd = nn.Linear(48, 40)
    model.transformer_blocks[1].attn.to_out[0] = odd
    with pytest.raises(ValueError, match=r"multiples of 16; transformer_blocks\.1\.attn\.to_out\.0 is 48 x 40"):
        fuse_transformer(model, fp8="no_grad")
    assert "forward" not in vars(model.transformer_blocks[0]), "an error must leave nothing half done"


# What is not understood


class OtherProcessor(JointAttnProcessor2_0):
    pass


class OtherBlock(JointTransformerBlock):
    def forward(self, *args, **kwargs):
        text, image = super().forward(*args, **kwargs)
        return text, 2 * image


def replace(path, module):
    def change(model):
        *parents, name = path.split(".")
        setattr(model.get_submodule(".".join(parents)), name, module())

    return change


def dropout(path):
    def change(model):
        model.get_submodule(path).p = 0.5
        model.train()

    return change


def set_attribute(path, name, value):
    return lambda model: setattr(model.get_submodule(path), name, value)


def other_block(model):
    model.transformer_blocks[0].__class__ = OtherBlock


def affine():
    return randomized(nn.LayerNorm(32, eps=1e-6))


def hooked(path):
    return lambda model: model.get_submodule(path).register_forward_hook(lambda module, args, output: 2 * output)


def negated_forward(model):
    module = model.get_submodule("transformer_blocks.0.attn.norm_k")
    forward = module.forward
    module.forward = lambda x: -forward(x) * x.abs()


SD3_BLOCK = "transformer_blocks.0"
UNLIKE = [  # model, change, name of what is left as it was, reason
    (sd3, lambda model: model.enable_forward_chunking(1, 0), SD3_BLOCK, "runs in chunks"),
    (sd3, other_block, SD3_BLOCK, "it is a OtherBlock, which has another forward than JointTransformerBlock"),
    (
        sd3,
        lambda model: model.set_attn_processor(OtherProcessor()),
        SD3_BLOCK,
        "attn.processor is a OtherProcessor, not a JointAttnProcessor2_0",
    ),
    (sd3_0, lambda model: model.fuse_qkv_projections(), SD3_BLOCK, "attn.processor is a FusedJointAttnProcessor2_0"),
    (sd3, dropout("transformer_blocks.0.attn2.to_out.1"), SD3_BLOCK, "attn2.to_out.1 drops out (p = 0.5, in training)"),
    (sd3, dropout("transformer_blocks.0.ff_context.net.1"), SD3_BLOCK, "ff_context.net.1 drops out"),
    (sd3, replace("transformer_blocks.0.norm1.norm", affine), SD3_BLOCK, "norm1.norm has weights"),
    (
        sd3,
        replace("transformer_blocks.0.norm2", lambda: FP32LayerNorm(32, elementwise_affine=False)),
        SD3_BLOCK,
        "norm2 is a FP32LayerNorm, not a LayerNorm",
    ),
    (
        sd3,
        set_attribute("transformer_blocks.0.ff.net.0", "approximate", "none"),
        SD3_BLOCK,
        "ff.net.0 has approximate = 'none', not 'tanh'",
    ),
    (sd3, set_attribute("transformer_blocks.0.attn.norm_added_k", "eps", 0.5), SD3_BLOCK, "norm_added_k has eps = 0.5"),
    (sd3, hooked("transformer_blocks.0.norm2_context"), SD3_BLOCK, "norm2_context has hooks or a forward of its own"),
    (sd3, negated_forward, SD3_BLOCK, "attn.norm_k has hooks or a forward of its own"),
    (sd3, replace("norm_out.silu", nn.Tanh), "norm_out", "silu is a Tanh, not a SiLU"),
    (flux, lambda model: model.fuse_qkv_projections(), "transformer_blocks.0", "attn has its projections fused"),
    (flux, lambda model: model.set_attention_backend("_native_math"), "transformer_blocks.0", "an attention backend"),
    (
        flux,
        set_attribute("single_transformer_blocks.0.attn.norm_q", "eps", None),
        "single_transformer_blocks.0",
        "attn.norm_q has eps = None",
    ),
    (
        flux,
        set_attribute("single_transformer_blocks.0.act_mlp", "approximate", "none"),
        "single_transformer_blocks.0",
        "act_mlp has approximate = 'none', not 'tanh'",
    ),
    (flux, dropout("transformer_blocks.0.attn.to_out.1"), "transformer_blocks.0", "attn.to_out.1 drops out"),
]


@pytest.mark.parametrize("make, change, name, reason", UNLIKE)
def test_left_as_it_was_and_named(make, change, name, reason):
    """And where the change comes after fusing, the stock forward runs from then on."""
    early, late, stock = make(), make(), make()
    fuse_transformer(late, verbose=False)
    for model in (early, late, stock):
        change(model)
    report = fuse_transformer(early, verbose=False)
    (found,) = [why for which, why in report.left if which == name]
    assert reason in found
    assert f"  {name} left as it was: {found}" in str(report).splitlines()
    assert "forward" not in vars(early.get_submodule(name))
    outputs = []
    for model in (stock, early, late):
        tensors, others = inputs_of(model)
        torch.manual_seed(0)  # of the dropouts
        outputs.append(model(**tensors, **others)[0].detach())
    unchanged = make()
    tensors, others = inputs_of(unchanged)
    if "projections" not in reason and "Fused" not in reason and "Other" not in reason and "backend" not in reason:
        different = (unchanged(**tensors, **others)[0] - outputs[0]).norm()
        assert different > 1e-3 or "chunks" in reason or "FP32" in reason or "eps = None" in reason
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=1e-5, atol=1e-5)


@one_of_each
def test_attention_arguments_run_the_stock_forward(make, stock_calls):
    model = fused(make())
    tensors, others = inputs_of(model)
    model(**tensors, **others, joint_attention_kwargs={"scale": 1.0})  # LoRA's, which diffusers takes out
    assert not stock_calls
    mask = {"attention_mask": None}
    output = model(**tensors, **others, joint_attention_kwargs=mask)[0]
    # A stock block of SD3's has its norm of that class called.
    stock_calls.pop("AdaLayerNormContinuous", None)
    assert sum(stock_calls.values()) == (2 if make is sd3 else 3)
    torch.testing.assert_close(output, model(**tensors, **others)[0], rtol=1e-5, atol=1e-5)


def test_hooks_on_linear_layers_fire():
    """A hooked linear layer is called, inside the fused forward."""
    model, stock = fused(sd3()), sd3()
    for each in (model, stock):
        for path in ("attn.to_q", "attn.to_out.0", "ff.net.2", "attn.to_add_out", "norm1.linear"):
            layer = each.transformer_blocks[0].get_submodule(path)
            layer.register_forward_hook(lambda module, args, output: output * 1.5)
    check_equal(output_and_gradients(model), output_and_gradients(stock))


def test_quantised_weights_are_their_own_business():
    """torchao leaves a linear layer its class, and changes its weight's."""

    class Quantised(torch.Tensor):
        pass

    layer = nn.Linear(4, 4)
    assert linear.plain(layer)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Quantised))
    assert not linear.plain(layer)


# What people do with models


@one_of_each
@pytest.mark.parametrize("checkpoint", [None, reentrant_checkpoint, selective_checkpoint])
def test_gradient_checkpointing(make, checkpoint):
    model = make()
    expected = output_and_gradients(model)
    model = fused(model)
    model.enable_gradient_checkpointing(checkpoint)
    check_equal(output_and_gradients(model), expected)


@one_of_each
def test_selective_checkpoint_to_the_bit(make, monkeypatch):
    """Also where kernels differ by whether gradients are wanted."""
    if not why_not("triton", "cpu", None):
        monkeypatch.setenv("DPDMD_ATTENTION", "triton")
    check_selective_checkpoint(fused(make()).bfloat16())


def with_lora(model, layers=LORA_LAYERS):
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=4, target_modules=layers))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@one_of_each
@pytest.mark.parametrize("layers", [LORA_LAYERS, ["to_k", "ff.net.2"]], ids=["many", "few"])
def test_lora(make, layers):
    model = make()
    expected = output_and_gradients(with_lora(copy.deepcopy(model), layers))
    before = with_lora(fused(model), layers)
    check_equal(output_and_gradients(before), expected)
    after = with_lora(copy.deepcopy(model), layers)
    assert not fuse_transformer(after, verbose=False).left
    check_equal(output_and_gradients(after), expected)
    after.disable_adapters()
    tensors, others = inputs_of(model)
    torch.testing.assert_close(after(**tensors, **others)[0], model(**tensors, **others)[0], rtol=1e-5, atol=1e-5)


@pytest.fixture
def peft_calls(monkeypatch):
    """Counts the LoRA layers that are called."""
    calls = []

    def counted(self, *args, original=linear.LoraLinear.forward, **kwargs):
        calls.append(self)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(linear.LoraLinear, "forward", counted)
    return calls


def with_roles(model, rank=3, alpha=5.0, **settings):
    """Two adapters, of which no part is zero."""
    add_adapters(model, rank=rank, alpha=alpha, seed=1, **settings)
    generator = torch.Generator("cpu").manual_seed(4)
    with torch.no_grad():
        for role in ("student", "critic"):
            for parameter in adapter_parameters(model, role).values():
                parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator, device="cpu"))
    return model


def of_role(model, role, **further):
    """Output and gradients in the role, of the inputs and of what has one."""
    use(model, role)
    output, gradients = output_and_gradients(model, **further)
    return output, {name: gradient for name, gradient in gradients.items() if gradient is not None}


@both
@models
def test_roles(implementation, make, stock_calls, peft_calls):
    """Teacher, student and critic against the stock modules with peft's own layers; nothing is called."""
    model = with_roles(make())
    ours = fused(model)
    for role, trained in (("teacher", 0), ("student", 1), ("critic", 1)):
        expected = of_role(model, role)
        stock_calls.clear()
        peft_calls.clear()
        got = of_role(ours, role)
        check_equal(got, expected)
        assert not stock_calls and not peft_calls, "it must be the fused forward that was compared"
        assert len(got[1]) == 3 + trained * len(adapter_parameters(model, "student"))


@one_of_each
def test_projections_are_freed_after_attention(make, monkeypatch):
    """They are as large as all that a block reads after them: no name may keep them until its end."""
    blocks, projections, freed = sd3_blocks if make is sd3 else flux_blocks, [], []

    def attend(attn, *streams, **options):
        for each in streams:
            projections.extend(map(weakref.ref, each.qkv if isinstance(each.qkv, tuple) else [each.qkv]))
        return joint_attention.attend(attn, *streams, **options)

    def split_products(*arguments):
        freed.append(all(each() is None for each in projections))
        return linear.split_products(*arguments)

    monkeypatch.setattr(blocks, "attend", attend)
    monkeypatch.setattr(blocks, "split_products", split_products)
    with use_backend("reference"):
        run(fused(make()))
    assert projections and freed and all(freed)


@both
@one_of_each
def test_teacher_to_the_bit(implementation, make):
    """Adapters that are not at work change nothing: forward, backward, in FP8, added before fusing or after."""
    bare = fused(make())
    later = with_roles(fused(make()))
    expected = output_and_gradients(bare.requires_grad_(False))
    for model in (later, fused(with_roles(make()))):
        check_bits(of_role(model, "teacher"), (expected[0], {n: g for n, g in expected[1].items() if g is not None}))
        assert torch.equal(run(model), run(bare))
    bare, model = fused(deep(make), fp8="no_grad"), fused(with_roles(deep(make)), fp8="no_grad")
    assert torch.equal(run(model), run(bare))


@one_of_each
@pytest.mark.parametrize(
    "targets", [["to_q"], ["to_k", "net.2"], ["net.0.proj"], ["to_out.0"], ["to_add_out"], ["norm1.linear", "to_v"]]
)
def test_roles_with_few_adapters(make, targets):
    """Some of q, k and v, one half of a feed-forward, one of two streams."""
    model = with_roles(make(), targets=targets)
    check_equal(of_role(fused(model), "student"), of_role(model, "student"))


def test_roles_of_a_projection_of_two():
    for targets in (["proj_out"], ["proj_mlp"]):
        model = with_roles(flux(), targets=targets)
        check_equal(of_role(fused(model), "student"), of_role(model, "student"))


@one_of_each
def test_roles_no_less_accurate_than_eager(make):
    """In bfloat16: adapters' gradients as a whole no further from float32 than 1.25 times those of peft's layers."""
    model = with_roles(make().bfloat16())
    exact = of_role(copy.deepcopy(model).float(), "student")
    distances = []
    for each in (fused(model), model):
        output, gradients = of_role(each, "student", dtype=torch.bfloat16)
        names = [name for name in gradients if "lora" in name]
        assert len(names) == len(adapter_parameters(model, "student")) and output.dtype == torch.bfloat16
        squares = [(gradients[name].double() - exact[1][name].double()).square().sum() for name in names]
        distances.append(((output.double() - exact[0].double()).norm(), torch.stack(squares).sum().sqrt()))
    assert all(ours < 1.25 * eager for ours, eager in zip(*distances, strict=True))


class Products(TorchDispatchMode):
    """The shapes of the matrix products made meanwhile."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        out = function(*arguments, **(keywords or {}))
        if function.overloadpacket.__name__.rstrip("_") in ("mm", "addmm", "bmm", "baddbmm"):
            self.shapes.append(tuple(out.shape[-2:]))
        return out


@one_of_each
@pytest.mark.parametrize("role", ["teacher", "student"])
def test_frozen_weights_get_no_gradients(make, role):
    """No product of the backward pass has the shape of a weight of the base, and none is there afterwards."""
    model = fused(with_roles(make()))
    use(model, role)
    tensors, others = inputs_of(model)
    output = model(**tensors, **others)[0]
    weights = {tuple(p.shape) for p in model.parameters() if not p.requires_grad and p.ndim == 2}
    with Products() as products:
        output.sum().backward()
    assert products.shapes and not weights & set(products.shapes)
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)


@one_of_each
def test_first_block_needs_no_gradient_of_its_input(make):
    """Where nothing before the adapters is trained, the pass does not make the gradient of what comes in."""
    model = fused(with_roles(make(), targets=["to_q", "to_k", "to_v"]))
    stock = with_roles(make(), targets=["to_q", "to_k", "to_v"])
    gradients, counts = [], []
    for each in (model, stock):
        use(each, "student")
        tensors, others = inputs_of(each)
        output = each(**{name: tensor.detach() for name, tensor in tensors.items()}, **others)[0]
        with Products() as products:
            output.sum().backward()
        gradients.append({name: p.grad for name, p in adapter_parameters(each, "student").items()})
        counts.append(sum(shape in ((24, 32), (10, 32)) for shape in products.shapes))
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], gradient, rtol=1e-4, atol=1e-5)
    assert counts[0] <= counts[1]


@one_of_each
@pytest.mark.parametrize("checkpoint", [None, reentrant_checkpoint, selective_checkpoint])
def test_roles_under_checkpoints(make, checkpoint):
    model = with_roles(make())
    expected = of_role(model, "critic")
    model = fused(model)
    model.enable_gradient_checkpointing(checkpoint)
    check_equal(of_role(model, "critic"), expected)


@one_of_each
def test_roles_under_a_selective_checkpoint_to_the_bit(make):
    model = fused(with_roles(make().bfloat16()))
    use(model, "student")
    expected = of_role(model, "student", dtype=torch.bfloat16)
    model.enable_gradient_checkpointing(selective_checkpoint)
    check_bits(of_role(model, "student", dtype=torch.bfloat16), expected)


@one_of_each
def test_roles_under_autocast(make):
    model = with_roles(make())
    exact = of_role(model, "student")
    with torch.autocast("cpu", torch.bfloat16):
        eager, ours = of_role(model, "student"), of_role(fused(model), "student")
    assert ours[0].dtype == eager[0].dtype
    eager, ours = errors(eager, exact), errors(ours, exact)
    assert ours["output"] > 1e-4, "nothing ran in bfloat16"
    assert sum(ours.values()) < 1.25 * sum(eager.values())


def two_at_once(model):
    for module in model.modules():
        if isinstance(module, linear.LoraLinear):
            module._active_adapter = ["student", "critic"]


def in_float64(model):
    for module in model.modules():
        if isinstance(module, linear.LoraLinear):
            module.lora_A.double(), module.lora_B.double()


def hooked_lora(model):
    for module in model.modules():
        if isinstance(module, linear.LoraLinear):
            module.register_forward_hook(lambda module, args, output: 1.5 * output)


def dropping_out(model):
    for module in model.modules():
        if isinstance(module, linear.LoraLinear):
            module.lora_dropout["student"] = nn.Dropout(0.5)
    model.eval()


def hooked_down(model):
    for module in model.modules():
        if isinstance(module, linear.LoraLinear):
            module.lora_A["student"].register_forward_hook(lambda module, args, output: 1.5 * output)


def scaled(model):
    for module in model.modules():
        if isinstance(module, linear.LoraLinear):
            module.set_scale("student", 0.5)


@one_of_each
@pytest.mark.parametrize(
    "change, called",
    [
        (two_at_once, True),
        (in_float64, True),
        (hooked_lora, True),
        (dropping_out, True),
        (hooked_down, True),
        (scaled, False),
    ],
)
def test_lora_that_does_more(make, change, called, peft_calls):
    """What is not one adapter's product and nothing else is peft's to compute; a strength is read at each call."""
    model = with_roles(make())
    use(model, "student")
    plain = output_and_gradients(model)[0]
    ours = fused(model)
    for each in (model, ours):
        change(each)
    expected = output_and_gradients(model)
    assert change is dropping_out or not torch.allclose(expected[0], plain, rtol=1e-6, atol=1e-7)
    peft_calls.clear()
    got = output_and_gradients(ours)
    present = [{name: g for name, g in gradients.items() if g is not None} for _, gradients in (got, expected)]
    check_equal((got[0], present[0]), (expected[0], present[1]))
    assert bool(peft_calls) == called


def test_merged_adapters():
    model = with_roles(sd3())
    use(model, "student")
    ours = fused(model)
    for each in (model, ours):
        each.fuse_lora()
    torch.testing.assert_close(run(ours), run(model), rtol=1e-4, atol=1e-5)


@one_of_each
def test_roles_compiled_by_blocks(make):
    model = with_roles(make())
    expected = {role: of_role(model, role) for role in ("teacher", "student")}
    model = fused(model)
    torch._dynamo.reset()
    for block in [*model.transformer_blocks, *getattr(model, "single_transformer_blocks", [])]:
        block.compile(backend="aot_eager", fullgraph=True)
    for role in ("student", "teacher", "student"):
        check_equal(of_role(model, role), expected[role])


def test_compiled_as_a_whole():
    model = sd3(num_layers=1)
    expected = output_and_gradients(model)
    model = fused(model)
    torch._dynamo.reset()
    check_equal(output_and_gradients(model, call=torch.compile(model, backend="aot_eager", fullgraph=True)), expected)


@pytest.mark.parametrize("make", [lambda: sd3(3, dual_attention_layers=()), lambda: flux(1, 3)], ids=["sd3", "flux"])
def test_compiled_by_blocks(make):
    """Equal blocks share a graph, as stock ones do, and each reads its own weights."""
    model = make()
    expected = output_and_gradients(model)
    model = fused(model)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    blocks = [*model.transformer_blocks, *getattr(model, "single_transformer_blocks", [])]
    for block in blocks:
        block.compile(backend=counter, fullgraph=True)
    check_equal(output_and_gradients(model), expected)
    assert counter.frame_count < len(blocks)


def test_eval_and_frozen():
    """Only what is asked for has a gradient."""
    stock, model = sd3(), fused(sd3())
    for each in (stock, model):
        each.eval().requires_grad_(False)
        each.transformer_blocks[0].attn.to_k.weight.requires_grad_()
        each.transformer_blocks[1].ff.net[2].bias.requires_grad_()
        each.transformer_blocks[0].attn.norm_added_q.weight.requires_grad_()
    expected = output_and_gradients(stock)
    assert len(expected[1]) == 6
    check_equal(output_and_gradients(model), expected)
    with torch.no_grad():
        tensors, others = inputs_of(model)
        torch.testing.assert_close(model(**tensors, **others)[0], expected[0], rtol=1e-5, atol=1e-5)


@one_of_each
@pytest.mark.parametrize("checkpoint", [None, selective_checkpoint])
def test_inside_torch_func(make, checkpoint, stock_calls):
    """The stock forward runs, whose gradients torch.func takes: with LoRA's adapters, FP8 and checkpoints too."""
    model = fused(with_roles(make()), fp8="no_grad")
    use(model, "student")
    if checkpoint is not None:
        model.enable_gradient_checkpointing(checkpoint)
    tensors, others = inputs_of(model)
    expected = torch.autograd.grad(model(**tensors, **others)[0].square().sum(), tensors["hidden_states"])[0]
    plain = {name: tensor.detach() for name, tensor in tensors.items()}

    def loss(x):
        return model(**plain | {"hidden_states": x}, **others)[0].square().sum()

    stock_calls.clear()
    torch.testing.assert_close(torch.func.grad(loss)(plain["hidden_states"]), expected, rtol=1e-4, atol=1e-5)
    assert stock_calls


# FLUX's joint tensor


@pytest.fixture
def joins(monkeypatch):
    """For each single block that runs fused, whether it was spared the copy of text and image."""
    spared = []

    def join(text, image, original=flux_blocks.join):
        joint = original(text, image)
        spared.append(joint.data_ptr() == text.data_ptr())
        return joint

    monkeypatch.setattr(flux_blocks, "join", join)
    return spared


def change_in_place(module, args, output):
    with torch.no_grad():
        output[1].mul_(1.5)


def add_in_place(module, args, output):
    output[1].add_(0.5 * output[1].tanh().mean(dim=1, keepdim=True))


def add_to_image(module, args, output):
    return output[0], output[1] + 1


def replace_text(module, args, output):
    output[0].data = 2 * output[0].data


def replace_image(module, args, output):
    output[1].data = 2 * output[1].data


@pytest.mark.parametrize(
    "hook, spared",
    [
        (None, True),
        (change_in_place, True),  # the parts are views, so the joint tensor has changed with them
        (add_in_place, True),  # and its gradient
        (add_to_image, False),  # as ControlNet does
        (replace_text, False),
        (replace_image, False),
    ],
)
def test_joint_tensor_is_kept(joins, hook, spared):
    model = flux(num_single_layers=3)
    if hook is not None:
        model.single_transformer_blocks[1].register_forward_hook(hook)
    expected = output_and_gradients(model)
    check_equal(output_and_gradients(fused(model)), expected)
    assert joins == [False, True, spared]


@pytest.mark.parametrize("which", [0, 1], ids=["text", "image"])
@pytest.mark.parametrize("how", ["retain_grad", "register_hook"])
def test_joint_tensor_with_hooks_on_a_part(joins, which, how):
    """Whoever asks for the gradient of a part gets it, so the next block takes the parts."""
    found = []
    for model in (flux(), fused(flux())):
        kept = []

        def keep(module, args, output, kept=kept):
            if how == "register_hook":
                output[which].register_hook(kept.append)
            else:
                output[which].retain_grad()
                kept.append(output[which])

        model.single_transformer_blocks[0].register_forward_hook(keep)
        output_and_gradients(model)
        found.append(kept[0].grad if how == "retain_grad" else kept[0])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    assert joins == [False, False]


def test_joint_tensor_when_recomputing(joins):
    """A reentrant checkpoint makes the joint tensor without a graph: its parts have one, so they are taken."""
    model = fused(flux())
    model.enable_gradient_checkpointing(reentrant_checkpoint)
    output_and_gradients(model)
    assert not any(joins)
    joins.clear()
    model.enable_gradient_checkpointing()
    output_and_gradients(model)
    assert joins[:2] == [False, True]
    joins.clear()
    with torch.no_grad():
        tensors, others = inputs_of(model)
        model(**tensors, **others)
    assert joins == [False, True]


@pytest.mark.parametrize("graph", [True, False])
def test_joint_tensor_of_other_parts(graph):
    def made():
        return torch.randn(2, 7, 4, requires_grad=graph) * 2

    joint = made()
    text, image = flux_blocks.part(joint, 3)
    joined = flux_blocks.join(text, image)
    assert joined is joint or (not graph and joined.data_ptr() == joint.data_ptr() and torch.equal(joined, joint))
    other_text, other_image = flux_blocks.part(made(), 3)
    # The views of a hook's identity function have the memory of the parts, and another gradient.
    views = [(text, image.view_as(image)), (text.view_as(text), image)] if graph else []
    apart = made()[:, :3], made()[:, 3:]
    less, swapped = (text, image[:, 1:]), (joint[:, 4:], joint[:, :4])
    narrow, strided = (text[..., :2], image[..., 2:]), (text, joint.transpose(0, 1)[3:].transpose(0, 1).flip(1))
    others = [(text, other_image), (other_text, image), (image, text), (text, image.clone()), (text.clone(), image)]
    for parts in (*others, *views, apart, less, swapped, strided, (text[:1], image[:1].clone())):
        joined = flux_blocks.join(*parts)
        assert joined.data_ptr() not in (joint.data_ptr(), parts[0].data_ptr())
        assert torch.equal(joined, torch.cat(parts, dim=1))
    assert torch.equal(flux_blocks.join(*narrow), torch.cat(narrow, dim=1))
    image.data = image.data[:, :-1]
    assert flux_blocks.join(text, image).shape == (2, 6, 4)


def test_joint_tensor_leaves_no_trace_and_needs_no_base():
    """Nothing is noted in the parts; under inference_mode, where views know no base, the copy is spared too."""
    with torch.inference_mode():
        joint = torch.randn(2, 7, 4)
        parts = flux_blocks.part(joint, 3)
        joined = flux_blocks.join(*parts)
    assert joined.data_ptr() == joint.data_ptr() and torch.equal(joined, joint)
    assert not any(vars(part) for part in parts)


# On a GPU


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@gpu
@one_of_each
def test_bfloat16_on_a_gpu(make):
    """With everything that serves half precision there: against float32, beside the stock module in bfloat16."""
    model = make().to("cuda", torch.bfloat16)
    exact_model = copy.deepcopy(model).float()

    def in_float32(**inputs):
        return exact_model(**{name: x.float() if isinstance(x, torch.Tensor) else x for name, x in inputs.items()})

    exact = output_and_gradients(exact_model, dtype=torch.bfloat16, call=in_float32)

    def distances(got):
        squares = [(got[1][name].double() - exact[1][name].double()).square().sum() for name in exact[1]]
        return (got[0].double() - exact[0].double()).norm().item(), sum(squares).sqrt().item()

    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):  # torch 2.11's cuDNN reads out of bounds for FLUX
        stock = distances(output_and_gradients(model, dtype=torch.bfloat16))
    ours = distances(output_and_gradients(fused(model), dtype=torch.bfloat16))
    assert all(0 < one <= 1.25 * other for one, other in zip(ours, stock, strict=True)), (ours, stock)


@pytest.mark.gpu
@gpu
@one_of_each
def test_selective_checkpoint_on_a_gpu(make):
    """To the bit, with the products whose epilogues differ by whether gradients are wanted."""
    check_selective_checkpoint(fused(make().to("cuda", torch.bfloat16)))


@pytest.mark.gpu
@gpu
@one_of_each
@pytest.mark.parametrize("fp8", [None, "no_grad"])
def test_in_a_cuda_graph(make, fp8):
    """Captured once, replayed on other inputs."""
    model = fused(deep(make).to("cuda", torch.bfloat16), fp8=fp8)
    given, others = inputs_of(model, dtype=torch.bfloat16)
    given = {name: tensor.detach() for name, tensor in given.items()}

    def call():
        with torch.no_grad():
            return model(**given, **others)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for seed in (3, 4):
        for name, tensor in inputs_of(model, dtype=torch.bfloat16, seed=seed)[0].items():
            given[name].copy_(tensor.detach())
        graph.replay()
        assert torch.equal(captured.clone(), call())


# The matrix products


def test_gradients_of_the_products():
    torch.manual_seed(0)
    joint = torch.randn(2, 7, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    wide = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: linear.split_rows(x, 3), joint)
    assert torch.autograd.gradcheck(lambda x, w: linear._rows_linear(x[:, 3:], w), (joint, weight))
    assert torch.autograd.gradcheck(lambda x, w: linear._LinearOfTwo.apply(x, x.sin(), w), (joint, wide))
    for needed in ((0,), (1,), (2,), (0, 1, 2)):
        tensors = [t.detach().requires_grad_(i in needed) for i, t in enumerate((joint, weight, weight.cos()))]
        assert torch.autograd.gradcheck(lambda *t: linear._SplitProducts.apply(*t, 3), tensors)
    for needed in range(3):
        a, b, w = (tensor.detach().requires_grad_(i == needed) for i, tensor in enumerate((joint, joint.cos(), wide)))
        assert torch.autograd.gradcheck(linear._LinearOfTwo.apply, (a, b, w))


def test_products_of_frozen_weights_keep_no_inputs():
    joint, weight, wide = (torch.randn(shape, requires_grad=True) for shape in ((2, 7, 4), (3, 4), (3, 8)))
    functions = [
        lambda x, w, wide: linear._rows_linear(x[:, 3:], w),
        lambda x, w, wide: linear._SplitProducts.apply(x, w, w, 3)[0],
        lambda x, w, wide: linear._LinearOfTwo.apply(x, x, wide),
    ]
    for function in functions:
        for trained in (True, False):
            kept = []
            hooks = torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t)
            with hooks:
                function(joint, *(each.detach().requires_grad_(trained) for each in (weight, wide)))
            assert any(tensor.shape[0] == 2 for tensor in kept) == trained


# FP8


class FakeQuantized(nn.Module):
    """A linear layer in FP8, spelled out."""

    def __init__(self, layer, parts=None):
        super().__init__()
        self.layer, self.parts = layer, parts or [layer.in_features]

    def forward(self, x):
        outs = []
        for x_part, weight in zip(x.split(self.parts, dim=-1), self.layer.weight.split(self.parts, dim=1), strict=True):
            x_part, weight = (each.values.float() * each.scale for each in map(quantize_rows, (x_part, weight)))
            outs.append(x_part @ weight.t())
        return sum(outs) + self.layer.bias


def fake_quantized(model):
    """The stock model with the layers replaced that fp8="no_grad" should run in FP8."""
    model = copy.deepcopy(model)
    blocks = [*model.transformer_blocks, *getattr(model, "single_transformer_blocks", [])]
    layers = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_mlp", "proj_out"]
    for block in blocks[1:-1]:
        for name, layer in list(block.named_modules()):
            if any(name == end or name.endswith("." + end) for end in layers):
                *parents, last = name.split(".")
                parts = [32, 128] if last == "proj_out" else None
                setattr(block.get_submodule(".".join(parents)), last, FakeQuantized(layer, parts))
    return model


def run(model):
    tensors, others = inputs_of(model)
    with torch.no_grad():
        return model(**{name: tensor.detach() for name, tensor in tensors.items()}, **others)[0]


def deep(make):
    return sd3(num_layers=4, dual_attention_layers=(0, 1)) if make is sd3 else flux(2, 3)


@both
@one_of_each
def test_fp8_without_gradient(implementation, make, relative_error):
    model = deep(make)
    ours = fused(model, fp8="no_grad")
    with use_backend("reference"):
        exact, emulated = run(model), run(fake_quantized(model))
    got = run(ours)
    error = relative_error(emulated, exact)
    assert 0.005 < error < 0.2
    # The same layers, and no others. The rest are values that float32 rounds to the other side of a tie; a GPU's
    # products of FP8 add up in some 14 bits besides.
    assert relative_error(got, emulated) < (0.1 if got.is_cuda else 0.03) * error


@one_of_each
def test_fp8_and_gradients_of_some_things(make):
    """Whatever has a gradient, be it an input or a parameter, keeps the pass out of FP8, also under checkpoints."""
    model = deep(make)
    ours = fused(model, fp8="no_grad")
    exact, in_fp8 = run(model), run(ours)
    check_equal(output_and_gradients(ours), output_and_gradients(model))
    assert torch.equal(run(ours), in_fp8)
    ours.requires_grad_(False)
    tensors, others = inputs_of(model)
    plain = {name: tensor.detach() for name, tensor in tensors.items()}
    assert not torch.allclose(ours(**plain, **others)[0], exact, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(ours(**tensors, **others)[0], exact, rtol=1e-4, atol=1e-4)
    # Of the first block in FP8: what it gets has none, what those after it get has.
    ours.transformer_blocks[1].norm1.linear.bias.requires_grad_()
    torch.testing.assert_close(ours(**plain, **others)[0], exact, rtol=1e-4, atol=1e-4)
    ours.enable_gradient_checkpointing(selective_checkpoint)
    torch.testing.assert_close(ours(**plain, **others)[0], exact, rtol=1e-4, atol=1e-4)

    ours.requires_grad_(True)
    for checkpoint in (reentrant_checkpoint, selective_checkpoint):
        ours.enable_gradient_checkpointing(checkpoint)
        check_equal(output_and_gradients(ours), output_and_gradients(model))


def test_fp8_beside_lora(relative_error):
    model = with_lora(deep(sd3), ["attn2.to_k", "ff.net.2"])
    ours = fused(model, fp8="no_grad")
    exact, got = run(model), run(ours)
    assert 1e-3 < relative_error(got, exact) < 0.2


def fake_quantized_bases(model):
    """The same of a model with LoRA layers: the base products in FP8, the adapters as they are."""
    model = copy.deepcopy(model)
    blocks = [*model.transformer_blocks, *getattr(model, "single_transformer_blocks", [])]
    layers = ("to_q", "to_k", "to_v", "to_out.0", ".ff.net.0.proj", ".ff.net.2", "proj_mlp", "proj_out")
    for block in blocks[1:-1]:
        for name, layer in block.named_modules():
            if isinstance(layer, linear.LoraLinear) and f".{name}".endswith(layers):
                layer.base_layer = FakeQuantized(layer.base_layer, [32, 128] if name == "proj_out" else None)
    return model


@both
@one_of_each
def test_fp8_of_the_base_beside_adapters(implementation, make, relative_error, quantisations):
    """Every role reads the same copies of the weights, which an update of the adapters leaves as they are."""
    model = with_roles(deep(make))
    ours = fused(model, fp8="no_grad")
    optimizer = PastVersions(list(adapter_parameters(ours, "student").values()))
    made = []
    for role in ("student", "teacher", "critic"):
        use(model, role)
        with use_backend("reference"):
            exact, emulated = run(model), run(fake_quantized_bases(model))
        use(ours, role)
        before = len(quantisations)
        got = run(ours)
        made.append(len(quantisations) - before)
        error = relative_error(emulated, exact)
        assert 0.005 < error < 0.2
        assert relative_error(got, emulated) < (0.15 if got.is_cuda else 0.03) * error  # an H100: 0.116
    assert made == [4 + 2 + 4 if make is sd3 else 4 + 2 * 4, 0, 0]
    use(ours, "student")
    output_and_gradients(ours)
    before = run(ours)
    quantisations.clear()
    optimizer.step()
    assert not torch.equal(run(ours), before) and not quantisations


class PastVersions(torch.optim.Optimizer):
    """Writes past torch's version counters, as optimizers with kernels of their own do (apex, DeepSpeed)."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.mul_(0.9)


@pytest.fixture
def quantisations(monkeypatch):
    """The matrices that are quantised, of any model."""
    found = []

    def counted(x, original=fp8_weights.quantize_rows):
        if x.ndim == 2:
            found.append(x.shape)
        return original(x)

    monkeypatch.setattr(fp8_weights, "quantize_rows", counted)
    return found


@one_of_each
def test_fp8_weights_are_made_once_an_update(make, quantisations):
    model = fused(deep(make), fp8="no_grad")
    frozen = copy.deepcopy(model).requires_grad_(False)
    run(frozen)
    each = len(quantisations)
    assert each == (4 + 2 + 4 if make is sd3 else 4 + 2 * 4)  # dual block, plain block; double, two single blocks
    for optimizer in (
        torch.optim.SGD(model.parameters(), lr=0.1),
        torch.optim.AdamW(model.parameters(), lr=0.01),
        PastVersions(model.parameters()),
    ):
        quantisations.clear()
        before = run(model)
        assert torch.equal(run(model), before) and len(quantisations) in (0, each)
        output_and_gradients(model)
        run(model)  # between backward and step
        quantisations.clear()
        optimizer.step()
        after = run(model)
        assert len(quantisations) == each
        assert torch.equal(run(copy.deepcopy(model)), after) and not torch.equal(after, before)
    # Parameters that require gradients only now and then are watched all the same.
    model.requires_grad_(False)
    run(model)
    quantisations.clear()
    optimizer.step()
    run(model)
    assert len(quantisations) == each
    quantisations.clear()
    run(frozen)
    assert not quantisations


@one_of_each
@pytest.mark.parametrize("pass_with_gradients", ["fused", "stock", "checkpointed"])
def test_fp8_weights_follow_optimizers_that_move_no_counters(make, pass_with_gradients, quantisations):
    """Whatever runs when: a pass always has the weights of now. Told of the step, they are made once an update."""
    model = fused(deep(make), fp8="no_grad")
    if pass_with_gradients == "checkpointed":
        model.enable_gradient_checkpointing(selective_checkpoint)
    stock = {"joint_attention_kwargs": {"attention_mask": None}} if pass_with_gradients == "stock" else {}
    optimizer = PastVersions(model.parameters())

    def check():
        assert torch.equal(run(model), run(copy.deepcopy(model)))

    for update in range(3):
        if update != 1:  # the copies of the first pass are there, or made between two updates
            check()
        for _ in range(2):  # of two micro-batches
            output_and_gradients(model, **stock)
            check()
        optimizer.step()
        check()
        optimizer.step()  # without a gradient of its own
        check()
    quantisations.clear()
    optimizer.register_step_post_hook(lambda *_: requantize(model))
    for _ in range(2):
        output_and_gradients(model, **stock)
        optimizer.step()
        check()
        run(model)
    assert len(quantisations) == 4 * (10 if make is sd3 else 12)  # the model's and a fresh copy's, in two updates


def test_fp8_watches_no_other_optimizers():
    hooks = dict(_global_optimizer_pre_hooks), dict(_global_optimizer_post_hooks)
    model = fused(deep(sd3), fp8="no_grad")
    output_and_gradients(model)
    run(model)
    assert hooks == (dict(_global_optimizer_pre_hooks), dict(_global_optimizer_post_hooks))


def test_fp8_keeps_no_fake_copies():
    model = fused(deep(sd3), fp8="no_grad")
    expected = run(copy.deepcopy(model))
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = run(model)
    assert isinstance(fake, torch._subclasses.FakeTensor) and fake.shape == expected.shape
    assert torch.equal(run(model), expected)


def test_fp8_weights_follow_other_changes():
    model = fused(deep(sd3).requires_grad_(False), fp8="no_grad")
    before = run(model)
    weight = model.transformer_blocks[1].ff.net[2].weight
    weight.data.mul_(2)  # past its version counter: not seen until asked to
    assert torch.equal(run(model), before)
    requantize(model)
    after = run(model)
    assert not torch.allclose(after, before, rtol=1e-3, atol=1e-3)
    weight.mul_(0.5)
    assert torch.equal(run(model), before)
    weight.data = 2 * weight.data
    assert torch.equal(run(model), after)
    state = model.state_dict()
    model.load_state_dict(state | {"transformer_blocks.1.ff.net.2.weight": 0.5 * weight})
    assert torch.equal(run(model), before)
    model.load_state_dict(state | {"transformer_blocks.1.ff.net.2.weight": 2 * weight}, assign=True)
    assert torch.equal(run(model), after)


def test_fp8_weights_are_in_no_state(tmp_path):
    model = fused(deep(sd3), fp8="no_grad")
    keys = list(model.state_dict())
    run(model)
    assert list(model.state_dict()) == keys
    size = len(pickle.dumps(model))
    requantize(model)
    assert len(pickle.dumps(model)) == size
    unfuse_transformer(model)
    assert torch.equal(run(model), run(deep(sd3)))


def test_fp8_is_left_out_where_torch_compile_traces():
    model = sd3(3, dual_attention_layers=())
    ours = fused(model, fp8="no_grad")
    torch._dynamo.reset()
    ours.transformer_blocks[1].compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(run(ours), run(model), rtol=1e-4, atol=1e-4)
