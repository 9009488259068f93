import pytest
import torch
import torch.nn.functional as F

from dpdmd.kernels import linear_gelu, use_backend

ON_GPU = torch.cuda.is_available()
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@pytest.fixture
def make(randn):
    def tensors(*batch, K=24, N=40, dtype=torch.float32):
        made = randn(*batch, K, dtype=dtype), randn(N, K, seed=1, dtype=dtype), randn(N, seed=2, dtype=dtype)
        return [tensor.cuda() if ON_GPU else tensor for tensor in made]

    return tensors


def truth(x, weight, bias):
    return F.gelu(x.double() @ weight.double().T + bias.double(), approximate="tanh")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [(), (1,), (3, 7), (2, 0), (130,)])
def test_against_float64(make, relative_error, batch, dtype):
    """With gradients, where the product is rounded once more, and without."""
    tensors = make(*batch, dtype=dtype)
    with torch.no_grad():
        plain = linear_gelu(*tensors)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    out = linear_gelu(*leaves)
    exact_leaves = [tensor.detach().double().requires_grad_() for tensor in tensors]
    exact = truth(*exact_leaves)
    assert plain.shape == out.shape == exact.shape and plain.dtype == out.dtype == dtype
    if out.numel() == 0:
        return
    eps = torch.finfo(dtype).eps if dtype != torch.float64 else 1e-14
    assert relative_error(plain, exact) < 2 * eps and relative_error(out, exact) < 2 * eps
    upstream = torch.ones_like(out)
    gradients = torch.autograd.grad(out, leaves, upstream)
    for got, right in zip(gradients, torch.autograd.grad(exact, exact_leaves, upstream.double()), strict=True):
        assert relative_error(got, right) < 4 * eps


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
def test_one_kernel_without_gradients(make):
    from torch.profiler import ProfilerActivity, profile

    x, weight, bias = make(256, K=64, N=128, dtype=torch.bfloat16)

    def kernels():
        linear_gelu(x, weight, bias)
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            linear_gelu(x, weight, bias)
            torch.cuda.synchronize()
        names = [event.key for event in seen.key_averages() if event.device_time_total]
        return [name for name in names if "Mem" not in name and "Fill" not in name]  # which poison the tests' memory

    assert len(kernels()) == 1
    with use_backend("reference"):
        assert len(kernels()) > 1
    weight.requires_grad_()
    assert len(kernels()) == 2


def test_compiles_to_one_graph(make):
    torch._dynamo.reset()
    tensors = make(3, 7)
    torch.testing.assert_close(
        torch.compile(linear_gelu, fullgraph=True, backend="aot_eager")(*tensors), linear_gelu(*tensors)
    )


def test_errors(make):
    x, weight, bias = make(3)
    with pytest.raises(
        ValueError, match=r"weight has shape \(40, 23\); with x \(3, 24\) it needs \(N, K\), x \(..., K\)"
    ):
        linear_gelu(x, weight[:, 1:], bias)
    with pytest.raises(ValueError, match=r"bias has shape \(39,\); with weight \(40, 24\) it needs \(40,\)"):
        linear_gelu(x, weight, bias[1:])
    with pytest.raises(TypeError, match="bias is a NoneType"):
        linear_gelu(x, weight, None)
    with pytest.raises(ValueError, match="weight is on meta; it needs to be on x's device"):
        linear_gelu(x, weight.to("meta"), bias)
