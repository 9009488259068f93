"""Operations as torch sees them: in a profile, to modes and FakeTensorMode, inside torch.func; and unseen, without the
dispatcher."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dpdmd.kernels import (
    Philox,
    TokenStream,
    adaln_modulate,
    adamw_step,
    attention,
    dmd_loss,
    flow_matching_loss,
    fp8_linear,
    gated_residual,
    gated_residual_adaln,
    gelu_mlp,
    gelu_tanh,
    guided_euler_step,
    linear_gelu,
    packed_linear,
    qk_norm,
    qk_norm_rope,
    quantize_rows,
    renoise,
    swiglu,
    use_backend,
    v_prediction_loss,
    x_prediction_loss,
)
from dpdmd.kernels.runtime import backend, layout, registration

LOSSES = ("dmd_loss", "dmd_loss, converted", "v_prediction_loss", "flow_matching_loss", "x_prediction_loss")
# The registered operations of a call with the Triton kernels, and of its backward pass.
SEEN = {
    "dmd_loss": {"dmd_loss_triton", "scale_in_place_triton"},
    "dmd_loss, converted": {"dmd_loss_triton", "scale_in_place_triton"},
    "v_prediction_loss": {"v_prediction_loss_triton", "scale_in_place_triton"},
    "flow_matching_loss": {"flow_matching_loss_triton", "scale_in_place_triton"},
    "x_prediction_loss": {"x_prediction_loss_triton", "scale_in_place_triton"},
    "renoise": {"renoise_triton", "multiply_triton"},
    "renoise, Philox": {"renoise_philox_triton", "multiply_triton"},
    "guided_euler_step": {"guided_euler_step_triton"},
    "adaln_modulate": {"adaln_triton", "adaln_backward_triton"},
    "gated_residual": {"adaln_triton", "adaln_backward_triton"},
    "gated_residual_adaln": {"adaln_triton", "adaln_backward_triton"},
    "gelu_tanh": {"activation_triton", "activation_backward_triton"},
    "gelu_tanh, quantised": {"activation_triton"},
    "swiglu": {"activation_triton", "activation_backward_triton"},
    "linear_gelu": {"activation_triton", "activation_backward_triton"},
    "gelu_mlp": {"activation_triton", "activation_backward_triton"},
    "packed_linear": set(),
    "qk_norm": {"qk_norm_triton", "qk_norm_backward_triton"},
    "qk_norm_rope": {"qk_norm_triton", "qk_norm_backward_triton"},
    "attention": {"attention_forward_triton", "attention_backward_triton"},
    "quantize_rows": {"quantize_rows_triton"},
    "fp8_linear": {"quantize_rows_triton"},
    "adamw_step": {"adamw_step_triton"},
}


def operations(draw, attention_backend="triton"):
    """Each public operation by name: the tensor that gets a gradient, and a function of it. draw(*shape) -> tensor."""
    x, y, z = (draw(2, 3, 4, 8) for _ in range(3))
    tokens, rows, channels = draw(2, 5, 32), draw(2, 32), draw(32)
    wide, bias, narrow = draw(60, 32), draw(60), draw(32, 60)  # not for cuBLASLt's epilogues, which want multiples of 8
    multiple = draw(64, 32)  # as FP8 products want them
    qkv, head, q = draw(2, 5, 3, 2, 16), draw(16), draw(2, 5, 2, 16)
    t, angles = (draw(*shape).float().sigmoid() for shape in ((2,), (5, 16)))
    master, moments, gradient = draw(300).float(), draw(2, 300).float().abs(), draw(300)
    one, rope = TokenStream(qkv, head, head, None), {"cos": angles, "sin": angles}

    def update(gradient):
        adamw_step(master, *moments, gradient, lr=0.1, betas=(0.9, 0.9), eps=1e-8, weight_decay=0.0, step=1)
        return master

    def quantised(tokens):
        return quantize_rows(tokens.detach())

    return {
        "dmd_loss": (x, lambda x: dmd_loss(x, y, z, teacher_uncond=z, guidance_scale=3.5)),
        "dmd_loss, converted": (x, lambda x: dmd_loss(x, y, z, x_t=y, to_x0=(1.0, -t), normalizer="sample")),
        "v_prediction_loss": (x, lambda x: v_prediction_loss(x, y, z, t)),
        "flow_matching_loss": (x, lambda x: flow_matching_loss(x, y, z)),
        "x_prediction_loss": (x, lambda x: x_prediction_loss(x, y, (1.0, t), z)),
        "renoise": (x, lambda x: renoise(x, y, t)),
        "renoise, Philox": (x, lambda x: renoise(x, Philox(3), t)),
        "guided_euler_step": (x, lambda x: guided_euler_step(x, y, t, 0.0, v_uncond=z, guidance_scale=2.0)),
        "adaln_modulate": (tokens, lambda tokens: adaln_modulate(tokens, (rows, rows), (rows, rows), fork=True)),
        "gated_residual": (tokens, lambda tokens: gated_residual(tokens, rows, tokens.sin(), bias=channels)),
        "gated_residual_adaln": (
            tokens,
            lambda tokens: gated_residual_adaln(tokens, rows, tokens.sin(), rows, rows, bias=channels),
        ),
        "gelu_tanh": (tokens, lambda tokens: gelu_tanh(tokens, channels)),
        "gelu_tanh, quantised": (tokens, lambda tokens: gelu_tanh(tokens.detach(), channels, quantize=True)),
        "swiglu": (tokens, lambda tokens: swiglu(tokens, channels)),
        "linear_gelu": (tokens, lambda tokens: linear_gelu(tokens, wide, bias)),
        "gelu_mlp": (tokens, lambda tokens: gelu_mlp(tokens, wide, bias, narrow)),
        "packed_linear": (tokens, lambda tokens: packed_linear(tokens, (wide, wide), (bias, bias))),
        "qk_norm": (qkv, lambda qkv: qk_norm(one._replace(qkv=qkv))),
        "qk_norm_rope": (qkv, lambda qkv: qk_norm_rope(one._replace(qkv=qkv), **rope)),
        "attention": (q, lambda q: attention(q, q.sin(), q.cos(), backend=attention_backend)),
        "quantize_rows": (tokens, quantised),
        "fp8_linear": (tokens, lambda tokens: fp8_linear(quantised(tokens), quantised(multiple))),
        "adamw_step": (gradient, update),
    }


def run(x, function):
    """The results, and the gradient of their squares' sum in x where they have one."""
    results = tree_leaves(function(x))
    differentiable = [each for each in results if each.requires_grad]
    total = sum(each.float().square().sum() for each in differentiable)
    return [*results, *(torch.autograd.grad(total, x) if differentiable else ())]


def drawing(seed=0, **options):
    generator = torch.Generator("cpu").manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator, device="cpu").to(**options)


@pytest.fixture
def given(request):
    """x that wants a gradient, and the function of the operation whose name the test is parametrised with."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if backend.why_not("triton", device, 0 if device == "cuda" else None):
        pytest.skip("the Triton kernels do not run here")
    x, function = operations(drawing(device=device, dtype=torch.bfloat16))[request.getfixturevalue("name")]
    with use_backend("triton"):
        yield x.requires_grad_(), function


each = pytest.mark.parametrize("name", SEEN)


@pytest.fixture
def dispatched(monkeypatch):
    """Names of the registered operations that are called through the dispatcher."""
    found = []

    def counted(self, *args, original=torch._ops.OpOverload.__call__, **kwargs):
        if self.namespace == "dpdmd":
            found.append(self._schema.name.removeprefix("dpdmd::"))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch._ops.OpOverload, "__call__", counted)
    return found


@each
def test_no_dispatcher_where_nobody_looks(name, given, dispatched):
    run(*given)
    assert not [each for each in dispatched if each.endswith("_triton")]


@each
def test_a_profile_shows_the_operations(name, given):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run(*given)
    found = {event.name.removeprefix("dpdmd::") for event in profile.events() if event.name.startswith("dpdmd::")}
    assert found == SEEN[name]


class Dispatch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function.namespace == "dpdmd":
            self.seen.add(function._schema.name.removeprefix("dpdmd::"))
        return function(*arguments, **(keywords or {}))


class Functions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        if getattr(function, "namespace", "") == "dpdmd":
            self.seen.add(function._schema.name.removeprefix("dpdmd::"))
        return function(*arguments, **(keywords or {}))


@each
def test_a_dispatch_mode_sees_the_operations_and_changes_nothing(name, given):
    expected = run(*given) if name != "adamw_step" else None
    with Dispatch() as mode:
        got = run(*given)
    assert mode.seen == SEEN[name]
    for one, other in zip(got, expected or got, strict=True):
        assert torch.equal(one.float(), other.float())


BACKWARD = {"scale_in_place_triton", "multiply_triton"}


@each
def test_a_function_mode_sees_the_operations(name, given):
    """Those of the forward pass: torch runs a backward pass without the mode."""
    x, function = given
    with Functions() as mode:
        function(x)
    assert mode.seen == {each for each in SEEN[name] - BACKWARD if "backward" not in each}


@pytest.mark.parametrize("name", ["flow_matching_loss", "adaln_modulate", "qk_norm", "attention", "renoise"])
def test_a_subclass_of_tensor_takes_the_dispatcher(name, given, dispatched):
    """Also within a list of tensors, as qk_norm's. A subclass may leave torch functions alone, as FakeTensor does."""
    x, function = given

    class Other(torch.Tensor):
        __torch_function__ = torch._C._disabled_torch_function_impl

    function(x.detach().as_subclass(Other))
    assert dispatched[0] in SEEN[name]


def described(tensors):
    return [(x.shape, x.stride(), x.dtype) for x in tensors]


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.filterwarnings("error:Accessing the data pointer")
def test_fake_tensors(name, dtype, device):
    """Shapes, strides and dtypes are those of real tensors, of the gradient too. A CPU build of torch makes fake tensors
    on CUDA devices, and no graph of them."""
    if device == "cuda" and name == "attention" and dtype == torch.float32:
        pytest.skip("torch's own kernel decides about its strides")
    real = "cuda" if torch.cuda.is_available() else "cpu"
    graph = device == real
    attention_backend = "triton" if device == real == "cuda" else "auto"
    with torch.set_grad_enabled(graph):
        x, function = operations(drawing(device=device if graph else "cpu", dtype=dtype), attention_backend)[name]
        expected = described(run(x.requires_grad_(graph), function))
        with FakeTensorMode():
            x, function = operations(lambda *shape: torch.empty(shape, device=device, dtype=dtype), attention_backend)[
                name
            ]
            got = run(x.requires_grad_(graph), function)
    assert all(isinstance(each, torch._subclasses.FakeTensor) and each.device.type == device for each in got)
    assert described(got) == expected


def test_fake_tensors_reach_the_fakes_of_the_kernels(dispatched):
    """On a CUDA device, also where there is none."""
    with FakeTensorMode(), torch.no_grad():
        x, function = operations(lambda *shape: torch.empty(shape, device="cuda"))["qk_norm"]
        function(x)
        x, function = operations(lambda *shape: torch.empty(shape, device="cuda"))["renoise"]
        function(x)
    assert dispatched[0] == "qk_norm_triton" and dispatched[1].startswith("renoise")


def test_address_of_a_fake_tensor():
    x = torch.zeros(3, 8)
    assert layout.address(x) == x.data_ptr()
    with FakeTensorMode():
        assert layout.address(torch.empty(3, 8)[1:]) == 32


differentiable = pytest.mark.parametrize(
    "name", [name for name in SEEN if "quant" not in name and name[:3] != "fp8"][:-1]
)


@differentiable
@pytest.mark.parametrize("asked", ["auto", "triton"])
def test_gradients_by_torch_func(name, asked, monkeypatch):
    """Whatever is asked for: grad, grad of vmap and vmap of grad, against autograd with the reference."""
    x, function = operations(drawing(dtype=torch.float64), "auto")[name]

    def total(x):
        return sum(each.square().sum() for each in tree_leaves(function(x)))

    leaf = x.detach().requires_grad_()
    with use_backend("reference"):
        (expected,) = torch.autograd.grad(total(leaf), leaf)
    with use_backend(asked):
        assert torch.allclose(torch.func.grad(total)(x), expected, rtol=1e-9)
        both = torch.stack([x, x])
        assert torch.allclose(torch.vmap(torch.func.grad(total))(both), expected.expand_as(both), rtol=1e-9)
        summed = torch.func.grad(lambda both: torch.vmap(total)(both).sum())
        assert torch.allclose(summed(both), expected.expand_as(both), rtol=1e-9)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_by_torch_func(name, randn):
    """The loss and its gradient to the bit, Jacobians of losses by sample, and no second derivative that would be wrong."""
    x, function = operations(drawing())[name]
    leaf = x.detach().requires_grad_()
    loss = function(leaf)
    loss.backward()
    gradient, value = torch.func.grad_and_value(function)(x)
    assert torch.equal(value, loss.detach()) and torch.equal(gradient, leaf.grad)
    with pytest.raises(RuntimeError, match="the losses have no second derivatives"):
        torch.func.grad(lambda x: torch.func.grad(function)(x).square().sum())(x)
    with torch.no_grad():
        assert torch.equal(torch.func.grad(function)(x), leaf.grad)
    y, z = randn(2, 3, 4, 8, seed=1), randn(2, 3, 4, 8, seed=2)
    jacobian = torch.func.jacrev(lambda x: flow_matching_loss(x, y, z, reduction="none"))(x)
    assert torch.allclose(jacobian.sum(0), 2 * torch.func.grad(lambda x: flow_matching_loss(x, y, z))(x))


def test_the_fast_path_is_back_afterwards(dispatched):
    x = torch.ones(2, 8)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]), FakeTensorMode():
        pass
    torch.func.grad(lambda x: flow_matching_loss(x, x, x))(x)
    arguments = x, None, 1.0, "mean", torch.float32, [x], 3
    assert not registration.observed(arguments)
    with x.device:  # as torch.set_default_device
        assert not registration.observed(arguments)
        with Functions():
            assert registration.observed(arguments)
