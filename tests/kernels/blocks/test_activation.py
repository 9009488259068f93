import math

import pytest
import torch

from dpdmd.kernels.blocks.activation import _chunk, gelu_tanh, swiglu
from dpdmd.kernels.blocks.fp8 import Quantized, quantize_rows
from dpdmd.kernels.runtime.rows import column_sums

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
FORMS = ["gelu_tanh", "swiglu", "swiglu_gate_first"]
# One element; odd widths; more rows than a chunk of 32, its last one beginning the next; several tiles, the last one
# not full; a width of SD3.5; no dimension but the channels.
SHAPES = [(1, 1), (3, 113), (33, 24), (2, 40, 96), (2, 3, 1200), (2, 1536), (40,)]


def implementations(test):
    """Runs a test on those there are."""
    test = pytest.mark.usefixtures("implementation")(test)
    return pytest.mark.parametrize("implementation", ["reference", "triton"], indirect=True)(test)


def run(form, x, bias=None, **options):
    if form == "gelu_tanh":
        return gelu_tanh(x, bias, **options)
    return swiglu(x, bias, gate_first=form == "swiglu_gate_first", **options)


def truth(form, x, bias=None):
    """In float64, by the book."""
    u = x.double() if bias is None else x.double() + bias.double()
    if form == "gelu_tanh":
        return 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
    half = u.shape[-1] // 2
    first, second = u[..., :half], u[..., half:]
    gate, factor = (first, second) if form == "swiglu_gate_first" else (second, first)
    return factor * gate / (1 + torch.exp(-gate))


def width(form, size):
    return size if form == "gelu_tanh" else 2 * size


@pytest.fixture
def inputs(randn):
    """x (..., N) or (..., 2 N), bias and an upstream gradient (..., N)."""

    def make(form, *shape, dtype=torch.float32, bias_dtype=None):
        *batch, size = shape
        x = randn(*batch, width(form, size), dtype=dtype)
        return x, randn(width(form, size), seed=1, dtype=bias_dtype or dtype), randn(*shape, seed=2, dtype=dtype)

    return make


@pytest.fixture
def check(check_rounded_once):
    """The result and the gradients of x and bias against float64 autograd, each one rounding from it."""

    def against_truth(form, x, bias, upstream):
        leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in (x, bias)]
        exact_leaves = [None if tensor is None else tensor.detach().double().requires_grad_() for tensor in (x, bias)]
        out, exact = run(form, *leaves), truth(form, *exact_leaves)
        assert out.dtype == x.dtype
        check_rounded_once(out, exact)
        got = torch.autograd.grad(out, [leaf for leaf in leaves if leaf is not None], upstream)
        right = torch.autograd.grad(exact, [leaf for leaf in exact_leaves if leaf is not None], upstream.double())
        for gradient, leaf, exact_gradient in zip(got, (x, bias), right, strict=False):
            assert gradient.dtype == leaf.dtype
            check_rounded_once(gradient, exact_gradient)

    return against_truth


@implementations
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMS)
def test_shapes(inputs, check, form, shape):
    check(form, *inputs(form, *shape))


@implementations
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_dtypes(inputs, check, form, dtype):
    check(form, *inputs(form, 3, 7, 113, dtype=dtype))


@implementations
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)])
@pytest.mark.parametrize("form", FORMS)
def test_bias_of_another_dtype(inputs, check, form, dtypes):
    dtype, bias_dtype = dtypes
    check(form, *inputs(form, 3, 7, 48, dtype=dtype, bias_dtype=bias_dtype))


@pytest.mark.float64
@implementations
def test_float64_bias_makes_the_arithmetic_float64(inputs):
    x, bias, _ = inputs("gelu_tanh", 3, 40, bias_dtype=torch.float64)
    assert torch.equal(gelu_tanh(x, bias), truth("gelu_tanh", x, bias).float())


@implementations
@pytest.mark.parametrize("size", [24, 512])  # one step of a program's chunk of rows, and several
@pytest.mark.parametrize("form", FORMS)
def test_without_bias(inputs, check, form, size):
    x, _, upstream = inputs(form, 3, 7, size)
    check(form, x, None, upstream)


@implementations
@pytest.mark.parametrize("needed", [(True, False), (False, True), (True, True), (False, False)])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_go_where_they_are_needed(inputs, check_rounded_once, form, needed):
    x, bias, upstream = inputs(form, 3, 11, 48, dtype=torch.bfloat16)
    exact = [tensor.double().requires_grad_() for tensor in (x, bias)]
    right = torch.autograd.grad(truth(form, *exact), exact, upstream.double())
    x.requires_grad_(needed[0]), bias.requires_grad_(needed[1])
    out = run(form, x, bias)
    assert out.requires_grad == any(needed)
    if any(needed):
        out.backward(upstream)
    for tensor, wanted, gradient in zip((x, bias), needed, right, strict=True):
        assert (tensor.grad is not None) == wanted
        if wanted:
            check_rounded_once(tensor.grad, gradient)


@implementations
@pytest.mark.parametrize("which", ["x", "upstream"])
@pytest.mark.parametrize("form", FORMS)
def test_strides(inputs, check, relaid, form, which):
    x, bias, upstream = inputs(form, 2, 7, 16)
    if which == "x":
        x = relaid(x)
    else:
        upstream = relaid(upstream)
    check(form, x, bias, upstream)


@implementations
@pytest.mark.parametrize("form", FORMS)
def test_strided_bias_and_upstream_of_a_sum(inputs, check, form):
    x, bias, _ = inputs(form, 2, 7, 24)
    strided = torch.stack([bias, torch.full_like(bias, float("nan"))], dim=1)[:, 0]
    check(form, x, strided, torch.ones(()).expand(2, 7, 24))


@implementations
@pytest.mark.parametrize("form", FORMS)
def test_large_values_saturate(implementation, form):
    """Past every overflow on the way to the result: of an exponential, a cube and a square, from which the gradient of
    PyTorch's GELU is NaN."""
    large = torch.tensor([20.0, 100.0, 1e4, 1e15] if implementation == "reference" else [20.0, 100.0, 1e4, 1e20, 3e38])
    gates = torch.cat([large, -large]).requires_grad_()
    factors = torch.full_like(gates, 0.5)
    x = {
        "gelu_tanh": lambda: gates,
        "swiglu": lambda: torch.cat([factors, gates]),
        "swiglu_gate_first": lambda: torch.cat([gates, factors]),
    }[form]()
    scale = 1.0 if form == "gelu_tanh" else 0.5
    out = run(form, x)
    (gradient,) = torch.autograd.grad(out, gates, torch.ones_like(out))
    torch.testing.assert_close(out, scale * gates.detach().relu(), rtol=1e-6, atol=5e-8)
    torch.testing.assert_close(gradient, scale * (gates.detach() > 0).float(), rtol=1e-6, atol=5e-8)


@implementations
def test_each_value_to_float32s_rounding(implementation):
    """Small ones, where the result is u / 2; and negative ones, whose result the formula with 1 + tanh cancels away."""
    u = torch.cat([torch.logspace(-30, 0, 200), -torch.logspace(-30, 0.3, 200)])
    if implementation != "reference":
        u = torch.cat([u, torch.linspace(-9, 9, 400)])
    exponent = -2 * math.sqrt(2 / math.pi) * (u.double() + 0.044715 * u.double() ** 3)
    torch.testing.assert_close(gelu_tanh(u).double(), u.double() / (1 + exponent.exp()), rtol=1e-5, atol=0)
    silu = swiglu(torch.cat([torch.ones_like(u), u]))
    torch.testing.assert_close(silu.double(), u.double() / (1 + (-u.double()).exp()), rtol=2e-6, atol=0)


@implementations
@pytest.mark.parametrize("form", FORMS)
def test_not_a_number_stays_where_it_is(inputs, form):
    x, bias, upstream = inputs(form, 3, 24)
    x[1, 5] = float("nan")
    x.requires_grad_()
    out = run(form, x, bias)
    (gradient,) = torch.autograd.grad(out, x, upstream)
    in_gradient = {"gelu_tanh": [5], "swiglu": [29], "swiglu_gate_first": [5, 29]}[form]
    for tensor, columns in ((out, [5]), (gradient, in_gradient)):
        expected = torch.zeros_like(tensor, dtype=torch.bool)
        expected[1, columns] = True
        assert torch.equal(tensor.isnan(), expected)


@implementations
@pytest.mark.parametrize("shape", [(0, 4, 24), (2, 0, 24), (0,), (3, 0)])
@pytest.mark.parametrize("form", FORMS)
def test_empty(inputs, form, shape):
    x, bias, upstream = inputs(form, *shape)
    out = run(form, x.requires_grad_(), bias.requires_grad_())
    assert out.shape == shape
    dx, dbias = torch.autograd.grad(out, (x, bias), upstream)
    assert dx.shape == x.shape and torch.equal(dbias, torch.zeros_like(bias))
    with torch.no_grad():
        quantised = run(form, x, bias, quantize=True)
    assert quantised.values.shape == shape and quantised.scale.shape == (*shape[:-1], 1)


@implementations
@pytest.mark.parametrize("form", FORMS)
def test_repeats_bit_for_bit(inputs, form):
    x, bias, upstream = inputs(form, 70, 600)

    def everything():
        leaves = x.detach().requires_grad_(), bias.detach().requires_grad_()
        out = run(form, *leaves)
        return out, *torch.autograd.grad(out, leaves, upstream)

    assert all(map(torch.equal, everything(), everything()))


@pytest.mark.parametrize("implementation", ["triton"], indirect=True)
def test_written_to_before_the_backward_pass_is_an_error(inputs, implementation):
    x, bias, _ = inputs("gelu_tanh", 3, 8)
    out = gelu_tanh(x.requires_grad_(), bias)
    bias += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("implementation", ["triton"], indirect=True)
def test_second_derivative_is_an_error(inputs, implementation):
    x, bias, _ = inputs("gelu_tanh", 3, 8)
    (gradient,) = torch.autograd.grad((gelu_tanh(x.requires_grad_(), bias) ** 2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.float64
@implementations
@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(inputs, form):
    x, bias, _ = inputs(form, 3, 5, dtype=torch.float64)
    run_form = lambda x, bias: run(form, x, bias)  # noqa: E731
    assert torch.autograd.gradcheck(run_form, (x.requires_grad_(), bias.requires_grad_()))


@implementations
@pytest.mark.parametrize("form", FORMS)
def test_compiles_to_one_graph(inputs, form):
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    x, bias, upstream = inputs(form, 3, 5, 24, dtype=torch.bfloat16)
    for needed in ((True, True), (True, False), (False, True)):
        x, bias = x.detach().requires_grad_(needed[0]), bias.detach().requires_grad_(needed[1])
        leaves = [tensor for tensor in (x, bias) if tensor.requires_grad]
        results = [
            (out, *torch.autograd.grad(out, leaves, upstream)) for out in (compiled(form, x, bias), run(form, x, bias))
        ]
        assert all(map(torch.equal, *results))
    with torch.no_grad():
        results = compiled(form, x, bias, quantize=True), run(form, x, bias, quantize=True)
    assert torch.equal(*(result.values.view(torch.uint8) for result in results))
    assert torch.equal(*(result.scale for result in results))


@pytest.mark.parametrize("form", FORMS)
def test_opcheck(inputs, form):
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, bias, upstream = (tensor.to(device) for tensor in inputs(form, 2, 5, 24))
    for bias_or_none in (bias, None):
        for quantize in (False, True):
            torch.library.opcheck(torch.ops.dpdmd.activation_triton.default, (x, bias_or_none, form, quantize))
    backward = torch.ops.dpdmd.activation_backward_triton.default
    for wanted in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(backward, (x, bias, upstream, form, *wanted))


# Sums over rows.


def test_rows_of_a_chunk():
    """At the sizes of SD3.5-M and FLUX, image and text tokens: some eight programs for each of an H100's 132
    multiprocessors where there are rows enough, partial sums that are 1 % of the bytes where there are many."""
    assert [_chunk(count, columns // 512) for count, columns in ((4 * 4096, 6144), (4096, 12288), (4 * 333, 6144))] == [
        128,
        64,
        32,
    ]


@implementations
@pytest.mark.parametrize("form", FORMS)
def test_long_chunks(inputs, check, monkeypatch, form):
    monkeypatch.setattr("dpdmd.kernels.blocks.activation._chunk", lambda count, tiles: 128)
    check(form, *inputs(form, 131, 48))


@pytest.mark.parametrize("implementation", ["triton"], indirect=True)
@pytest.mark.parametrize("shape", [(1, 1), (128, 32), (129, 33), (300, 70)])
def test_column_sums(randn, check_rounded_once, implementation, shape):
    partial = randn(*shape)
    check_rounded_once(column_sums(partial, torch.float32), partial.double().sum(0))
    check_rounded_once(column_sums(partial, torch.bfloat16), partial.double().sum(0))


# Quantised results.


@implementations
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMS)
def test_quantised(inputs, form, shape, dtype):
    """The float32 result's rows, not those of a result rounded to bfloat16."""
    x, bias, _ = inputs(form, *shape, dtype=dtype)
    for bias_or_none in (bias, None):
        got = run(form, x, bias_or_none, quantize=True)
        expected = quantize_rows(truth(form, x, bias_or_none).float())
        assert isinstance(got, Quantized) and got.values.shape == shape and got.scale.shape == (*shape[:-1], 1)
        assert got.values.is_contiguous() and got.scale.is_contiguous()
        torch.testing.assert_close(got.scale, expected.scale, rtol=2e-6, atol=0)
        different = got.values.view(torch.uint8) != expected.values.view(torch.uint8)
        assert different.double().mean() < 1e-3  # next to a tie
        torch.testing.assert_close(got.values.float(), expected.values.float(), rtol=2**-3, atol=2**-9)


@implementations
def test_quantised_strides(inputs, relaid):
    x, bias, _ = inputs("swiglu", 2, 7, 16)
    got = swiglu(relaid(x), bias, quantize=True)
    expected = swiglu(relaid(x).contiguous(), bias, quantize=True)
    assert torch.equal(got.values.view(torch.uint8), expected.values.view(torch.uint8))
    assert torch.equal(got.scale, expected.scale)


@implementations
def test_quantised_zeros():
    quantised = gelu_tanh(torch.zeros(3, 40), quantize=True)
    assert (quantised.values.float() == 0).all() and (quantised.scale == 1).all()


@implementations
@pytest.mark.parametrize("needed", ["x", "bias"])
def test_quantised_gradient_is_refused(inputs, needed):
    x, bias, _ = inputs("gelu_tanh", 3, 16)
    {"x": x, "bias": bias}[needed].requires_grad_()
    with pytest.raises(ValueError, match=f"{needed} requires a gradient, which FP8 values do not pass on"):
        gelu_tanh(x, bias, quantize=True)
    with torch.no_grad():
        assert not gelu_tanh(x, bias, quantize=True).scale.requires_grad


# Errors.


@pytest.mark.parametrize(
    "x, bias, error, message",
    [
        ([1.0], None, TypeError, "x is a list; it needs to be a torch.Tensor"),
        (torch.zeros(3, dtype=torch.int64), None, TypeError, "x has dtype torch.int64; it needs float32"),
        (torch.zeros(()), None, ValueError, r"x has shape \(\); it needs a dimension of channels"),
        (torch.zeros(2, 4), 0.0, TypeError, "bias is a float; it needs to be a torch.Tensor"),
        (torch.zeros(2, 4), torch.zeros(2), ValueError, r"bias has shape \(2,\); with x \(2, 4\) it needs \(4,\)"),
        (torch.zeros(2, 4), torch.zeros(1, 4), ValueError, r"bias has shape \(1, 4\); with x \(2, 4\) it needs \(4,\)"),
        (torch.zeros(2, 4), torch.zeros(4, device="meta"), ValueError, "bias is on meta; it needs to be on x's device"),
    ],
)
@pytest.mark.parametrize("operation", [gelu_tanh, swiglu])
def test_errors(operation, x, bias, error, message):
    with pytest.raises(error, match=message):
        operation(x, bias)


def test_swiglu_needs_two_halves():
    with pytest.raises(ValueError, match=r"x has shape \(2, 5\); it needs two halves: \(..., 2 N\)"):
        swiglu(torch.zeros(2, 5))
