import pytest
import torch
import torch.nn.functional as F

from dpdmd.kernels import gelu_mlp, use_backend
from dpdmd.kernels.blocks.gelu_mlp import _GeluMlp
from dpdmd.kernels.runtime import csrc
from dpdmd.kernels.runtime.rows import sum_rows

ON_GPU = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@pytest.fixture
def make(randn):
    """x, both weights and the bias, as leaves; results of about 1."""

    def tensors(*batch, K=24, N=40, K2=16, dtype=torch.float32):
        shapes = (*batch, K), (N, K), (N,), (K2, N)
        scales = 1, K**-0.5, 1, N**-0.5
        made = [s * randn(*shape, seed=i) for i, (s, shape) in enumerate(zip(scales, shapes, strict=True))]
        return [tensor.to("cuda" if ON_GPU else "cpu", dtype).requires_grad_() for tensor in made]

    return tensors


def truth(x, weight1, bias1, weight2):
    return F.gelu(x @ weight1.T + bias1, approximate="tanh") @ weight2.T


@pytest.fixture
def check(relative_error):
    """The result and the gradients of the tensors that require one, against float64."""

    def compare(tensors):
        exact = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in tensors]
        out, expected = gelu_mlp(*tensors), truth(*exact)
        assert out.shape == expected.shape and out.dtype == tensors[0].dtype
        if out.numel() == 0:
            return
        eps = torch.finfo(out.dtype).eps if out.dtype != torch.float64 else 1e-14
        assert relative_error(out, expected) < 2 * eps
        needed = [i for i, tensor in enumerate(tensors) if tensor.requires_grad]
        if needed:
            upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
            gradients = torch.autograd.grad(out, [tensors[i] for i in needed], upstream)
            right = torch.autograd.grad(expected, [exact[i] for i in needed], upstream.double())
            for i, got, one in zip(needed, gradients, right, strict=True):
                assert got.dtype == tensors[i].dtype
                assert relative_error(got, one) < 4 * eps

    return compare


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [(), (1,), (3, 7), (2, 0), (130,)])
def test_against_float64(make, check, batch, dtype):
    check(make(*batch, dtype=dtype))
    check([tensor.detach() for tensor in make(*batch, dtype=dtype)])


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (3,), (0, 3), (1, 2)])
def test_gradients_where_needed(make, check, needed):
    check([t.detach().requires_grad_(i in needed) for i, t in enumerate(make(3, 5, dtype=torch.bfloat16))])


@pytest.mark.parametrize("size", [{"K": 20}, {"N": 36}, {"K2": 12}])
def test_sizes_that_no_epilogue_takes(make, check, size):
    check(make(5, dtype=torch.bfloat16, **size))


def test_strides(make, check):
    x, *parameters = make(6, 5, dtype=torch.bfloat16)
    check([x.detach()[::2].requires_grad_(), *parameters])
    check([x.detach().transpose(0, 1).requires_grad_(), *parameters])
    check([x, *(p.detach().t().contiguous().t().requires_grad_() if p.ndim == 2 else p for p in parameters)])


@pytest.fixture
def epilogues(implementation):
    """The products with epilogues, by the book, where the tensors are on a CPU."""
    if implementation == "reference":
        pytest.skip("it has no epilogues")
    if csrc.find() is None or csrc.load():
        pytest.skip("csrc/ is not compiled: python kernels/build.py, with nvcc")

    def linear_gelu_aux(x, weight, bias):
        pre = x @ weight.T + bias
        return F.gelu(pre, approximate="tanh"), pre

    def matmul_dgelu(dy, weight, pre):
        return torch.ops.aten.gelu_backward(dy @ weight, pre, approximate="tanh")

    with torch.library._scoped_library("dpdmd", "IMPL") as library:
        library.impl("linear_gelu_aux", linear_gelu_aux, "CPU")
        library.impl("matmul_dgelu", matmul_dgelu, "CPU")
        yield


@pytest.mark.skipif(ON_GPU, reason="the tests that follow show as much")
@pytest.mark.parametrize("implementation", ["triton"], indirect=True)
@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (3,), (0, 3), (0, 1, 2, 3)])
def test_backward_through_epilogues(epilogues, make, relative_error, needed):
    tensors = [t.detach().requires_grad_(i in needed) for i, t in enumerate(make(3, 5, dtype=torch.float32))]
    exact = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in tensors]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda t: t):
        out = _GeluMlp.apply(*tensors)
    expected = truth(*exact)
    # What GELU is taken of; x and what GELU makes only for the weights that they multiply.
    assert kept.count((15, 40)) == 1 + (3 in needed) and kept.count((3, 5, 24)) == (1 in needed)
    assert relative_error(out, expected) < 1e-6
    gradients = torch.autograd.grad(out.square().sum(), [tensors[i] for i in needed])
    right = torch.autograd.grad(expected.square().sum(), [exact[i] for i in needed])
    for got, one in zip(gradients, right, strict=True):
        assert relative_error(got, one) < 1e-6


@pytest.mark.gpu
@needs_gpu
def test_epilogues_are_used_and_repeat(make, check):
    from torch.profiler import ProfilerActivity, profile

    tensors = make(2, 300, K=256, N=1024, K2=264, dtype=torch.bfloat16)
    check(tensors)
    upstream = torch.ones(2, 300, 264, dtype=torch.bfloat16, device="cuda")

    def results():
        out = gelu_mlp(*tensors)
        return [out, *torch.autograd.grad(out, tensors, upstream)]

    first = results()
    for _ in range(5):
        assert all(map(torch.equal, results(), first))
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        results()
        torch.cuda.synchronize()
    names = [event.key for event in seen.key_averages() if event.device_time_total]
    assert not any("_activation" in name for name in names), names
    with use_backend("reference"):
        for ours, plain in zip(first, results(), strict=True):
            torch.testing.assert_close(ours, plain, rtol=0.05, atol=0.05 * plain.abs().max().item())


def test_compiles_to_one_graph(make):
    torch._dynamo.reset()
    tensors = make(3, 7)
    compiled = torch.compile(gelu_mlp, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), gelu_mlp(*tensors))


def test_autocast(make):
    x, *parameters = make(3, 7)
    device = "cuda" if ON_GPU else "cpu"
    with torch.autocast(device, torch.bfloat16):
        out = gelu_mlp(x, *parameters)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out, truth(x, *parameters), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("implementation", ["reference", "triton"], indirect=True)
@pytest.mark.parametrize("shape", [(1, 8), (300, 24), (129, 300), (0, 5), (5, 0)])
def test_sum_rows(implementation, randn, relative_error, shape):
    if implementation == "reference":
        pytest.skip("the definition is Tensor.sum")
    for dtype in (torch.float32, torch.bfloat16):
        x = randn(*shape, dtype=dtype)
        sums = sum_rows(x)
        assert sums.shape == shape[1:] and sums.dtype == dtype
        if x.numel():
            assert relative_error(sums, x.double().sum(0)) < 2 * torch.finfo(dtype).eps


def test_errors(make):
    x, weight1, bias1, weight2 = make(3)
    message = r"weight1 has shape \(40, 23\); with x \(3, 24\) it needs \(N, K\), x \(..., K\)"
    with pytest.raises(ValueError, match=message):
        gelu_mlp(x, weight1[:, 1:], bias1, weight2)
    with pytest.raises(ValueError, match=r"bias1 has shape \(39,\); with weight1 \(40, 24\) it needs \(40,\)"):
        gelu_mlp(x, weight1, bias1[1:], weight2)
    with pytest.raises(ValueError, match=r"weight2 has shape \(16, 39\); with weight1 \(40, 24\) it needs \(K_2, 40\)"):
        gelu_mlp(x, weight1, bias1, weight2[:, 1:])
    with pytest.raises(TypeError, match="bias1 is a NoneType"):
        gelu_mlp(x, weight1, None, weight2)
    with pytest.raises(ValueError, match="weight2 is on meta; it needs to be on x's device"):
        gelu_mlp(x, weight1, bias1, weight2.to("meta"))
