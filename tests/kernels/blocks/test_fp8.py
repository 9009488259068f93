import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dpdmd.kernels import use_backend
from dpdmd.kernels.blocks.fp8 import Quantized, _scaled_product, fp8_linear, fp8_linear_reference, quantize_rows
from dpdmd.kernels.runtime.rows import rows

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
# One element; odd sizes; several rows a program and one; more than a block of 4096; a width of SD3.5.
SHAPES = [(1,), (3, 1), (3, 113), (2, 5, 24), (2, 40, 96), (1, 4097), (2, 2, 1536)]


def implementations(test):
    """Runs a test on those there are."""
    test = pytest.mark.usefixtures("implementation")(test)
    return pytest.mark.parametrize("implementation", ["reference", "triton"], indirect=True)(test)


def codes(quantised):
    return quantised.values.view(torch.uint8)


def numbers():
    """All e4m3 numbers, by their code."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()


def check_nearest(quantised, x):
    """Each value is the e4m3 number nearest to x / scale, the even one of two; the scale is the row's largest / 448."""
    assert quantised.values.dtype == torch.float8_e4m3fn and quantised.scale.dtype == torch.float32
    assert quantised.values.shape == x.shape and quantised.scale.shape == (*x.shape[:-1], 1)
    assert quantised.values.is_contiguous() and quantised.scale.is_contiguous()
    largest = x.double().abs().amax(-1, keepdim=True)
    torch.testing.assert_close(quantised.scale.double(), largest / 448, rtol=2**-22, atol=0)
    quotient = (x.float() * (1 / quantised.scale)).double().unsqueeze(-1)  # rounded as all implementations do
    distances = (quotient - numbers()).abs().nan_to_num(torch.inf)
    got = codes(quantised).long()
    distance = distances.gather(-1, got.unsqueeze(-1)).squeeze(-1)
    assert torch.equal(distance, distances.amin(-1))
    tied = (distances == distances.amin(-1, keepdim=True)).sum(-1) > 1
    assert (got[tied & (got % 128 > 0)] % 2 == 0).all()  # 0 and -0 tie, too


@implementations
@pytest.mark.parametrize("shape", SHAPES)
def test_nearest(randn, shape):
    x = randn(*shape)
    check_nearest(quantize_rows(x), x)


@implementations
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(randn, dtype):
    x = randn(3, 113, dtype=dtype)
    check_nearest(quantize_rows(x), x)


@implementations
def test_ties_go_to_the_even_number(randn):
    """At scale 1 every half-way point of two neighbours, and its neighbours in float32."""
    positive = numbers()[:127].float()
    halfway = (positive[1:] + positive[:-1]) / 2
    zero, infinity = torch.zeros(()), torch.tensor(torch.inf)
    x = torch.cat([halfway, torch.nextafter(halfway, zero), torch.nextafter(halfway, infinity)])
    x = torch.stack([torch.cat([x, positive]), -torch.cat([x, positive])])
    quantised = quantize_rows(x)
    assert (quantised.scale == 1).all()
    check_nearest(quantised, x)
    assert (codes(quantised)[:, : len(halfway)] % 2 == 0).all()


@implementations
def test_rows_of_all_magnitudes(randn):
    """From float32's smallest numbers, whose reciprocal is infinite, to its largest."""
    magnitudes = torch.tensor([0.0, 1e-45, 1e-38, 8e-36, 2e-35, 1e-20, 1.0, 1e30, 1e37])
    x = magnitudes[:, None] * randn(9, 40).clamp(-3, 3)
    quantised = quantize_rows(x)
    assert (quantised.scale[:3] == 1).all() and (codes(quantised)[:3] % 128 == 0).all()
    check_nearest(Quantized(*(part[4:] for part in quantised)), x[4:])
    with use_backend("reference"):
        assert torch.equal(codes(quantize_rows(x)), codes(quantised))


@implementations
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows(randn, bad):
    x = randn(3, 40)
    x[1, 7] = bad
    values = quantize_rows(x).values.float()
    assert values[1].isnan().any() and values[[0, 2]].isfinite().all()


@implementations
@pytest.mark.parametrize("size", [16, 24])  # vectors of 16 bytes, or not
def test_strides(randn, relaid, size):
    x = relaid(randn(2, 7, size))
    quantised = quantize_rows(x)
    check_nearest(quantised, x)
    four = quantize_rows(x.unflatten(-1, (2, -1)).transpose(1, 2))  # a third stride
    check_nearest(four, x.unflatten(-1, (2, -1)).transpose(1, 2))


@implementations
@pytest.mark.parametrize("shape", [(0, 4, 40), (3, 0, 8), (0,), (3, 0)])
def test_empty(shape):
    quantised = quantize_rows(torch.empty(shape))
    assert quantised.values.shape == shape and quantised.scale.shape == (*shape[:-1], 1)
    assert (quantised.scale == 1).all()


@implementations
def test_gradient_is_refused(randn):
    x = randn(3, 8).requires_grad_()
    with pytest.raises(ValueError, match="x requires a gradient, which FP8 values do not pass on"):
        quantize_rows(x)
    with torch.no_grad():
        check_nearest(quantize_rows(x), x)


@implementations
def test_compiles_to_one_graph_and_repeats(randn):
    torch._dynamo.reset()
    x, weight = randn(3, 5, 48, dtype=torch.bfloat16), quantize_rows(randn(16, 48, seed=1))

    def run(x):
        quantised = quantize_rows(x)
        return quantised, fp8_linear(quantised, weight)

    quantised, out = torch.compile(run, fullgraph=True, backend="aot_eager")(x)
    again, out_again = run(x)
    assert isinstance(quantised, Quantized)
    assert torch.equal(codes(quantised), codes(again)) and torch.equal(quantised.scale, again.scale)
    assert torch.equal(out, out_again)


@pytest.mark.parametrize("shape", [(2, 5, 24), (3, 48)])
def test_opcheck(randn, shape):
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.library.opcheck(torch.ops.dpdmd.quantize_rows_triton.default, (randn(*shape).to(device),))


def test_rows_with_two_strides_are_not_copied(randn, relaid, row_layout):
    x = randn(2, 7, 16)
    walked = relaid(x)
    assert (rows(walked).tensor is walked) == (row_layout not in ("every other", "columns first"))
    heads_first = x.view(2, 7, 2, 8).transpose(1, 2)  # three strides
    assert rows(heads_first).tensor.is_contiguous()


# The product.


@pytest.fixture
def operands(randn):
    def make(*shape, size=48):
        x, weight = randn(*shape), randn(size, shape[-1], seed=1)
        return quantize_rows(x), quantize_rows(weight), randn(size, seed=2)

    return make


def product(x, weight, bias=None):
    out = (x.values.double() * x.scale.double()) @ (weight.values.double() * weight.scale.double()).T
    return out if bias is None else out + bias.double()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("with_bias", [False, True])
def test_product(operands, check_rounded_once, with_bias, dtype):
    x, weight, bias = operands(2, 5, 32)
    bias = bias if with_bias else None
    out = fp8_linear(x, weight, bias, dtype=dtype)
    assert out.dtype == dtype
    check_rounded_once(out, product(x, weight, bias))


@pytest.mark.parametrize("shape", [(16,), (0, 4, 32), (1, 2, 3, 64)])
def test_product_of_any_shape(operands, relative_error, shape):
    x, weight, bias = operands(*shape)
    out = fp8_linear(x, weight, bias)
    assert out.dtype == torch.bfloat16 and out.shape == (*shape[:-1], 48)
    if out.numel():
        assert relative_error(out, product(x, weight, bias)) < 2**-8


def test_product_stands_for_the_linear_layer(randn, relative_error):
    x, weight = randn(64, 256), randn(32, 256, seed=1)
    exact = x.double() @ weight.double().T
    assert relative_error(fp8_linear(quantize_rows(x), quantize_rows(weight), dtype=torch.float32), exact) < 0.04


def test_autocast_leaves_the_product_alone(operands):
    x, weight, bias = operands(3, 32)
    expected = fp8_linear(x, weight, bias, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fp8_linear(x, weight, bias, dtype=torch.float32), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("with_bias", [False, True])
def test_call_of_the_gpu_product(operands, relative_error, monkeypatch, with_bias, dtype):
    """Stands in for torch._scaled_mm, and is as particular as it: operands, scales and bias as cuBLAS wants them."""

    def scaled_mm(a, b, *, scale_a, scale_b, bias, out_dtype, use_fast_accum):
        M, K, N = *a.shape, b.shape[1]
        assert a.shape == (M, K) and a.is_contiguous() and b.t().is_contiguous() and K % 16 == N % 16 == 0
        assert scale_a.shape == (M, 1) and scale_a.is_contiguous() and scale_b.shape == (1, N)
        assert scale_b.t().is_contiguous() and scale_a.dtype == scale_b.dtype == torch.float32
        assert bias is None or (bias.dtype == out_dtype != torch.float32 and bias.is_contiguous())
        assert use_fast_accum is fast_accum
        out = (a.float() * scale_a) @ (b.float() * scale_b)
        return (out if bias is None else out + bias.float()).to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    x, weight, bias = operands(2, 5, 32)
    bias = bias if with_bias else None
    strided = Quantized(*(part.transpose(0, 1) for part in x))
    for fast_accum in (True, False):
        for one in (x, strided):
            out = _scaled_product(one, weight, bias, dtype, fast_accum)
            assert out.dtype == dtype and out.shape == (*one.values.shape[:-1], 48)
            assert relative_error(out, product(one, weight, bias)) < (1e-6 if dtype == torch.float32 else 2**-7)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnGpu:
    @pytest.fixture(autouse=True)
    def on_the_gpu(self):
        torch.set_default_device("cuda")
        yield
        torch.set_default_device(None)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    @pytest.mark.parametrize("with_bias", [False, True])
    def test_product(self, operands, relative_error, with_bias, dtype):
        x, weight, bias = operands(4, 333, 1536, size=4608)
        bias = bias if with_bias else None
        expected = fp8_linear_reference(x, weight, bias, torch.float32)
        assert relative_error(fp8_linear(x, weight, bias, dtype=dtype), expected) < 2**-7
        exact = fp8_linear(x, weight, bias, dtype=dtype, fast_accum=False)
        assert relative_error(exact, expected) < (1e-3 if dtype == torch.float32 else 2**-8)

    def test_quantised_as_on_the_cpu(self, randn):
        x = randn(2, 4429, 1536, dtype=torch.bfloat16)[:, :4096]
        got = quantize_rows(x)
        expected = quantize_rows(x.cpu())
        assert torch.equal(codes(got).cpu(), codes(expected)) and torch.equal(got.scale.cpu(), expected.scale)

    def test_no_copy_on_the_way_to_the_product(self, operands):
        x, weight, bias = operands(4, 333, 64)
        seen = []

        class Calls(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
                seen.append(function.overloadpacket.__name__)
                return function(*arguments, **(keywords or {}))

        bias = bias.bfloat16()
        with Calls():
            fp8_linear(x, weight, bias)
        assert "_scaled_mm" in seen and not {"copy_", "clone", "_to_copy"} & set(seen)


# Errors.


@pytest.mark.parametrize(
    "x, error, message",
    [
        ([1.0], TypeError, "x is a list; it needs to be a torch.Tensor"),
        (torch.zeros(3, dtype=torch.int64), TypeError, "x has dtype torch.int64; it needs float32"),
        (torch.zeros(()), ValueError, r"x has shape \(\); it needs rows"),
    ],
)
def test_errors_of_quantize_rows(x, error, message):
    with pytest.raises(error, match=message):
        quantize_rows(x)


def test_errors_of_fp8_linear(operands):
    x, weight, bias = operands(3, 32)

    def fails(error, message, *arguments, **options):
        with pytest.raises(error, match=message):
            fp8_linear(*arguments, **options)

    fails(TypeError, "x is a Tensor; it needs to be a Quantized", torch.zeros(3, 32), weight)
    fails(TypeError, "weight is a tuple; it needs to be a Quantized", x, tuple(weight))
    fails(TypeError, "x has values in torch.float32 and", Quantized(x.values.float(), x.scale), weight)
    fails(TypeError, "and scale in torch.float64", x, Quantized(weight.values, weight.scale.double()))
    fails(ValueError, r"x has values \(3, 32\) and scale \(3,\)", Quantized(x.values, x.scale[:, 0]), weight)
    fails(ValueError, "weight has values on cpu and scale on meta", x, Quantized(weight[0], weight[1].to("meta")))
    fails(
        ValueError, "weight is on meta; it needs to be on x's device cpu", x, Quantized(*(p.to("meta") for p in weight))
    )
    fails(ValueError, r"weight has shape \(32,\); it needs two dimensions", x, Quantized(weight[0][0], weight[1][0]))
    fails(ValueError, r"x has shape \(3, 16\); with weight \(48, 32\) it needs \(..., 32\)", operands(3, 16)[0], weight)
    fails(ValueError, r"weight has shape \(40, 32\); .* multiples of 16", *operands(3, 32, size=40)[:2])
    fails(ValueError, r"weight has shape \(48, 24\); .* multiples of 16", *operands(3, 24)[:2])
    fails(TypeError, "dtype is torch.float64; it needs", x, weight, dtype=torch.float64)
    fails(TypeError, "bias is a float", x, weight, 1.0)
    fails(ValueError, r"bias has shape \(32,\); with weight \(48, 32\) it needs \(48,\)", x, weight, bias[:32])
    fails(ValueError, "bias is on meta; it needs to be on x's device cpu", x, weight, bias.to("meta"))
    fails(ValueError, "bias requires a gradient", x, weight, bias.requires_grad_())
