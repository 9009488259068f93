import sys
import types

import pytest
import torch

from dpdmd.kernels import attention, use_backend
from dpdmd.kernels.attention.attention import attention_reference
from dpdmd.kernels.runtime import backend as backends

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
CPU_BACKENDS = ["auto", "reference", "sdpa", "math", "flash"]
# (B, S, T, H, D): one token; odd lengths; more keys than queries and the reverse; a head of 64.
SHAPES = [(1, 1, 1, 1, 8), (2, 7, 7, 3, 16), (1, 5, 113, 2, 32), (2, 113, 5, 2, 32), (1, 129, 129, 2, 64)]


def truth(q, k, v, scale=None):
    """Each sample and head apart: weights by exp and a sum, float64."""
    q, k, v = (tensor.double() for tensor in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    samples = []
    for i in range(q.shape[0]):
        heads = []
        for h in range(q.shape[2]):
            logits = scale * (q[i, :, h] @ k[i, :, h].T)
            weights = torch.exp(logits - logits.max(dim=1, keepdim=True).values.detach())
            heads.append(weights @ v[i, :, h] / weights.sum(dim=1, keepdim=True))
        samples.append(torch.stack(heads, dim=1))
    return torch.stack(samples)


def eager(q, k, v, scale=None):
    """Same-dtype PyTorch, the error of which is the yardstick."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return ((q * scale) @ k.transpose(2, 3)).softmax(dim=-1).matmul(v).transpose(1, 2)


@pytest.fixture
def make(randn):
    def qkv(shape, dtype=torch.float32):
        B, S, T, H, D = shape
        return [randn(B, length, H, D, seed=seed, dtype=dtype) for seed, length in enumerate((S, T, T))]

    return qkv


@pytest.fixture
def check(randn, relative_error):
    """Output and the three gradients: at most twice the error of same-dtype eager, or eps where eager is exact."""

    def against_truth(run, inputs, scale=None):
        inputs = [tensor.detach().requires_grad_() for tensor in inputs]
        upstream = randn(*inputs[0].shape, seed=9, dtype=inputs[0].dtype)

        def everything(function, inputs):
            out = function(*inputs, scale=scale)
            return [out, *torch.autograd.grad(out, inputs, upstream.to(out))]

        got, yardstick = everything(run, inputs), everything(eager, inputs)
        exact = everything(truth, [tensor.detach().double().requires_grad_() for tensor in inputs])
        for one, peer, right in zip(got, yardstick, exact, strict=True):
            assert one.dtype == inputs[0].dtype
            if right.norm() < 1e-9:  # one key: its weight is 1, so q and k receive nothing
                assert one.norm() < 1e-2
                continue
            floor = torch.finfo(one.dtype).eps * (4 if one.dtype == torch.float64 else 1)  # there the truth rounds, too
            assert relative_error(one, right) < max(2 * relative_error(peer, right), floor)

    return against_truth


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(check, make, shape, dtype, backend):
    check(lambda *qkv, scale: attention(*qkv, scale=scale, backend=backend), make(shape, dtype))


@pytest.mark.parametrize("scale", [0.5, 1, 0.01])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_scale(check, make, scale, backend):
    check(lambda *qkv, scale: attention(*qkv, scale=scale, backend=backend), make((1, 9, 17, 2, 16)), scale)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_strides(check, randn, backend):
    """q, k, v as slices of one projection (B, S, 3, H, D), and heads before tokens in memory."""
    run = lambda *qkv, scale: attention(*qkv, scale=scale, backend=backend)  # noqa: E731
    packed = randn(2, 33, 3, 2, 16)
    check(run, packed.unbind(dim=2))
    check(run, [randn(2, 2, 33, 16, seed=seed).transpose(1, 2) for seed in range(3)])
    if backend != "flash":  # which refuses strides in D
        check(run, [randn(2, 33, 2, 32, seed=seed)[..., ::2] for seed in range(3)])


def test_reference_gradcheck(make):
    inputs = [tensor.requires_grad_() for tensor in make((1, 3, 4, 2, 5), torch.float64)]
    assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, backend="reference"), inputs)


@pytest.mark.parametrize("backend", ["auto", "reference", "sdpa", "cudnn", "xformers"])
@pytest.mark.parametrize("shape", [(0, 5, 5, 2, 8), (2, 0, 5, 2, 8), (2, 5, 5, 0, 8)])
def test_nothing_in_nothing_out(make, shape, backend):
    q, k, v = (tensor.requires_grad_() for tensor in make(shape))
    out = attention(q, k, v, backend=backend)
    assert out.shape == q.shape
    assert [g.shape for g in torch.autograd.grad(out.sum(), (q, k, v))] == [q.shape, k.shape, v.shape]


def test_reference_keeps_float32_under_autocast(make, relative_error):
    q, k, v = make((1, 33, 33, 2, 16))
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(attention(q, k, v, backend="reference"), truth(q, k, v)) < 1e-6


@pytest.mark.parametrize("backend", ["auto", "reference", "sdpa", "math"])
def test_compiles_to_one_graph(make, backend):
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    inputs = [tensor.requires_grad_() for tensor in make((2, 9, 17, 2, 16))]
    plain, out = attention(*inputs, backend=backend), compiled(*inputs, backend=backend)
    torch.testing.assert_close(out, plain)
    expected = torch.autograd.grad(plain.sum(), inputs)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), inputs), expected)


def test_repeats_bit_for_bit(make):
    inputs = make((2, 113, 129, 2, 32), torch.bfloat16)
    assert torch.equal(attention(*inputs), attention(*inputs))


def test_kernels_reference_makes_auto_the_reference(make, monkeypatch):
    q, k, v = make((2, 33, 33, 2, 16), torch.bfloat16)
    expected = attention_reference(q, k, v, 16**-0.5)
    assert not torch.equal(attention(q, k, v), expected), "this test sees nothing"
    with use_backend("reference"):
        assert torch.equal(attention(q, k, v), expected)
        assert not torch.equal(attention(q, k, v, backend="sdpa"), expected)  # asked for by name
    monkeypatch.setenv("DPDMD_KERNELS", "reference")
    assert torch.equal(attention(q, k, v), expected)
    monkeypatch.setenv("DPDMD_KERNELS", "triton")  # concerns operations with such kernels only
    assert not torch.equal(attention(q, k, v), expected)


def test_xformers_gets_the_tensors_as_they_are(make, monkeypatch):
    """xformers takes (B, S, H, D) and a scale."""
    seen = []

    def memory_efficient_attention(q, k, v, scale):
        seen.extend([q, k, v, scale])
        return truth(q, k, v, scale).float()

    ops = types.ModuleType("xformers.ops")
    ops.memory_efficient_attention = memory_efficient_attention
    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    q, k, v = make((2, 5, 7, 2, 16))
    torch.testing.assert_close(attention(q, k, v, backend="xformers"), attention(q, k, v))
    assert seen[0] is q and seen[1] is k and seen[2] is v and seen[3] == 0.25


def test_xformers_missing(make, monkeypatch):
    monkeypatch.setitem(sys.modules, "xformers", None)
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    with pytest.raises(RuntimeError, match=r"needs the xformers package.*pip install 'dpdmd\[xformers\]'"):
        attention(*make((1, 2, 2, 1, 8)), backend="xformers")


@pytest.mark.parametrize("backend", ["cudnn", "efficient"])
def test_cuda_backend_on_cpu(make, backend):
    with pytest.raises(RuntimeError, match=f"backend='{backend}' needs CUDA tensors and q is on cpu; use 'auto'"):
        attention(*make((1, 2, 2, 1, 8)), backend=backend)


@pytest.mark.filterwarnings("ignore:.*kernel")
def test_kernel_that_does_not_serve_the_tensors(randn):
    q = randn(1, 2, 1, 16)[..., ::2]
    with pytest.raises(RuntimeError, match=r"backend='flash' cannot run q \(1, 2, 1, 8\).*float32 on cpu.*'auto'"):
        attention(q, q, q, backend="flash")


@pytest.mark.parametrize(
    ("q", "k", "v", "message"),
    [
        ((2, 3, 8), (2, 3, 1, 8), (2, 3, 1, 8), r"q has shape \(2, 3, 8\); it needs four dimensions: \(B, S, H, D\)"),
        ((2, 3, 1, 8), (1, 3, 1, 8), (1, 3, 1, 8), r"k has shape \(1, 3, 1, 8\); .* it needs \(2, T, 1, 8\)"),
        ((2, 3, 1, 8), (2, 3, 2, 8), (2, 3, 2, 8), r"k has shape \(2, 3, 2, 8\); .* it needs \(2, T, 1, 8\)"),
        ((2, 3, 1, 8), (2, 3, 1, 4), (2, 3, 1, 4), r"k has shape \(2, 3, 1, 4\); .* it needs \(2, T, 1, 8\)"),
        ((2, 3, 1, 8), (2, 5, 1, 8), (2, 3, 1, 8), r"v has shape .*; it needs k's shape \(2, 5, 1, 8\)"),
        (
            (2, 3, 1, 8),
            (2, 0, 1, 8),
            (2, 0, 1, 8),
            r"k has shape \(2, 0, .* it needs at least one position to attend to",
        ),
    ],
)
def test_shape_errors(q, k, v, message):
    with pytest.raises(ValueError, match=message):
        attention(torch.zeros(q), torch.zeros(k), torch.zeros(v))


def test_option_errors():
    q = torch.zeros(1, 2, 1, 8)
    with pytest.raises(
        ValueError, match="backend is 'fast'; it needs to be one of 'auto', 'reference', 'triton', 'triton\\+cudnn'"
    ):
        attention(q, q, q, backend="fast")
    with pytest.raises(TypeError, match="scale is a str; it needs to be a float"):
        attention(q, q, q, scale="1")
    with pytest.raises(ValueError, match="k is on meta; it needs to be on q's device cpu"):
        attention(q, q.to("meta"), q)


def test_dtype_errors():
    q = torch.zeros(1, 2, 1, 8)
    with pytest.raises(TypeError, match=r"v has dtype torch.bfloat16; it needs q's dtype torch.float32"):
        attention(q, q, q.bfloat16())
    with pytest.raises(TypeError, match=r"q has dtype torch.int64; it needs float32, float16, bfloat16 or float64"):
        attention(q.long(), q, q)
    with pytest.raises(TypeError, match=r"k is a list; it needs to be a torch.Tensor"):
        attention(q, [1.0], q)


ON_GPU = torch.cuda.is_available()
REASON = backends.why_not("triton", "cuda" if ON_GPU else "cpu", 0 if ON_GPU else None)
INTERPRETED_OR_GPU = pytest.mark.skipif(bool(REASON), reason=REASON)


@pytest.fixture
def check_triton(check):
    def against_truth(inputs, scale=None, backend="triton"):
        inputs = [tensor.cuda() if ON_GPU else tensor for tensor in inputs]
        check(lambda *qkv, scale: attention(*qkv, scale=scale, backend=backend), inputs, scale)

    return against_truth


@INTERPRETED_OR_GPU
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1, 8),  # one token; a head narrower than a block
        (2, 63, 65, 3, 16),  # around a tile, S and T differ
        (1, 64, 128, 2, 64),  # whole tiles only
        (2, 130, 70, 1, 96),  # a head dimension that is no power of two; a row of lse with a whole tile of padding
        (1, 129, 257, 1, 128),  # the tiles of a large head
    ],
)
def test_triton(check_triton, make, shape, dtype):
    check_triton(make(shape, dtype))


@INTERPRETED_OR_GPU
def test_triton_strides(check_triton, randn):
    """Slices of one projection; heads first in memory; rows that are not dense, not aligned, or all the same are copied."""
    dtype = torch.float16
    check_triton(randn(2, 33, 3, 2, 16, dtype=dtype).unbind(dim=2))
    check_triton([randn(2, 2, 33, 16, seed=seed, dtype=dtype).transpose(1, 2) for seed in range(3)])
    check_triton([randn(2, 33, 2, 32, seed=seed, dtype=dtype)[..., ::2] for seed in range(3)])
    check_triton([randn(2, 33, 2, 17, seed=seed, dtype=dtype)[..., 1:] for seed in range(3)])
    check_triton([randn(1, 33, 2, 16, seed=seed, dtype=dtype).expand(2, 33, 2, 16) for seed in range(3)])


@INTERPRETED_OR_GPU
@pytest.mark.parametrize("scale", [0.01, 3.0])
def test_triton_scale(check_triton, make, scale):
    check_triton(make((1, 9, 70, 2, 16), torch.float16), scale)


@INTERPRETED_OR_GPU
def test_triton_weights_that_pass_the_range_of_exp(make, relative_error):
    """Logits of -400 to 400: the keys beyond the end, with logits of 0, must not matter even where they would be infinite."""
    ones, k, v = (tensor.cuda() if ON_GPU else tensor for tensor in make((1, 9, 70, 1, 16), torch.float16))
    ones = torch.ones_like(ones)
    for q in (20 * ones, -20 * ones):
        inputs = [q.requires_grad_(), (1 + 0.01 * k).requires_grad_(), v.requires_grad_()]
        out = attention(*inputs, scale=1.0, backend="triton")
        expected = attention_reference(*inputs, scale=1.0)
        torch.testing.assert_close(out, expected, rtol=1e-2, atol=1e-2)
        upstream = v[:, :9].detach()
        got, right = (torch.autograd.grad(o, inputs, upstream) for o in (out, expected))
        assert all(gradient.isfinite().all() for gradient in got)
        assert relative_error(got[1], right[1]) < 1e-2 and relative_error(got[2], right[2]) < 1e-2


@INTERPRETED_OR_GPU
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("at", [0, 100, 149])
def test_triton_late_maximum(check_triton, make, dtype, at):
    """A key among the first tile's, in a later one, or in the last that is not full, whose logits pass all others' by
    far more than a float32 can tell apart, for every other query."""
    q, k, v = make((1, 70, 150, 1, 16), dtype)
    k[:, at] = 60 * q[:, 1]
    q[:, ::2] = q[:, 1:2]
    check_triton([q, k, v], scale=1.0)


@INTERPRETED_OR_GPU
def test_triton_repeats_and_compiles(make):
    inputs = [tensor.cuda() if ON_GPU else tensor for tensor in make((2, 113, 70, 2, 16), torch.bfloat16)]
    for tensor in inputs:
        tensor.requires_grad_()

    def everything(function):
        out = function(*inputs, backend="triton")
        return [out, *torch.autograd.grad(out.square().sum(), inputs)]

    torch._dynamo.reset()
    first = everything(attention)
    for run in (attention, torch.compile(attention, fullgraph=True, backend="aot_eager")):
        for got, expected in zip(everything(run), first, strict=True):
            assert torch.equal(got, expected)


@INTERPRETED_OR_GPU
def test_triton_operations(make):
    """As torch.library wants them: schema, fake, no hidden aliasing."""
    q, k, v = (tensor.cuda() if ON_GPU else tensor for tensor in make((1, 5, 7, 2, 16), torch.float16))
    forward, backward = (getattr(torch.ops.dpdmd, f"attention_{way}_triton").default for way in ("forward", "backward"))
    o, lse = forward(q, k, v, 0.25)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(forward, (q, k, v, 0.25), test_utils=tests)
    torch.library.opcheck(backward, (o, q, k, v, o, lse, 0.25), test_utils=tests)


@INTERPRETED_OR_GPU
@pytest.mark.parametrize(
    ("shape", "dtype", "scale", "message"),
    [
        ((1, 2, 2, 1, 8), torch.float32, None, "needs float16 or bfloat16, and q has torch.float32"),
        ((1, 2, 2, 1, 256), torch.float16, None, "needs heads of up to 128, in multiples of 8, and q's have 256"),
        ((1, 2, 2, 1, 12), torch.float16, None, "needs heads of up to 128, in multiples of 8, and q's have 12"),
        ((1, 2, 2, 1, 8), torch.float16, -1.0, "needs a scale above 0, and got -1.0"),
    ],
)
def test_triton_errors(make, shape, dtype, scale, message):
    inputs = [tensor.cuda() if ON_GPU else tensor for tensor in make(shape, dtype)]
    with pytest.raises(RuntimeError, match=f"backend='triton' cannot run these tensors: .*{message}.*'auto'"):
        attention(*inputs, scale=scale, backend="triton")


@pytest.mark.gpu
@pytest.mark.gpu_memory(8)  # logits in float64
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["triton", "triton+cudnn", "cudnn"])
@pytest.mark.parametrize("shape", [(2, 4429, 4429, 4, 64), (1, 4608, 4608, 3, 128), (1, 1000, 777, 3, 96)])
def test_large_on_cuda(check, make, shape, backend):
    inputs = [tensor.cuda() for tensor in make(shape, torch.bfloat16)]
    check(lambda *qkv, scale: attention(*qkv, scale=scale, backend=backend), inputs)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["auto", "reference", "sdpa", "cudnn", "flash", "efficient", "math"])
@pytest.mark.parametrize("shape", [(1, 129, 129, 2, 64), (2, 333, 1024, 3, 128)])
def test_on_cuda(check, make, shape, backend):
    inputs = [tensor.cuda() for tensor in make(shape, torch.bfloat16)]
    check(lambda *qkv, scale: attention(*qkv, scale=scale, backend=backend), inputs)
