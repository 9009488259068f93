import pytest
import torch

from dpdmd.kernels import renoise

pytestmark = pytest.mark.usefixtures("implementation")

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
# One element; sizes that fill no vector, warp or block; one dimension only; a latent.
SHAPES = [(1, 1), (1, 113), (3, 1023), (2, 4097), (5,), (3, 4, 6, 10)]


def coefficient(shape, dtype, seed):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    values = torch.rand(shape[0], generator=torch.Generator("cpu").manual_seed(seed), dtype=wide, device="cpu")
    return values.to(torch.get_default_device())


def truth(x, noise, alpha, sigma):
    """Each sample apart, in float64."""
    rows = zip(x.double(), noise.double(), alpha.double(), sigma.double(), strict=True)
    return torch.stack([a * one + s * other for one, other, a, s in rows])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_flow(randn, check_rounded_once, shape, dtype):
    x, noise, t = randn(*shape, dtype=dtype), randn(*shape, seed=1, dtype=dtype), coefficient(shape, dtype, 2)
    got = renoise(x, noise, t)
    assert got.dtype == dtype
    check_rounded_once(got, truth(x, noise, 1 - t.double(), t))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_alpha_sigma(randn, check_rounded_once, shape, dtype):
    x, noise = randn(*shape, dtype=dtype), randn(*shape, seed=1, dtype=dtype)
    alpha, sigma = coefficient(shape, dtype, 2), coefficient(shape, dtype, 3)
    check_rounded_once(renoise(x, noise, (alpha, sigma)), truth(x, noise, alpha, sigma))


@pytest.mark.parametrize(
    "layout", ["channels_last", "transposed", "sliced", "batch_sliced", "padded", "chunked", "expanded"]
)
@pytest.mark.parametrize("which", ["x", "noise", "both"])
def test_strides(randn, restride, check_rounded_once, which, layout):
    x, noise, upstream = (randn(3, 4, 6, 10, seed=seed) for seed in range(3))
    x = (restride(x, layout) if which != "noise" else x).requires_grad_()
    noise = (restride(noise, layout) if which != "x" else noise).requires_grad_()
    t = coefficient((3,), torch.float32, 2)
    out = renoise(x, noise, t)
    check_rounded_once(out, truth(x, noise, 1 - t, t))
    for got, scale in zip(torch.autograd.grad(out, (x, noise), restride(upstream, layout)), (1 - t, t), strict=True):
        check_rounded_once(got, truth(restride(upstream, layout), upstream, scale, 0 * t))


def test_result_keeps_the_memory_order_of_dense_samples(randn):
    x = randn(2, 4, 6, 10).contiguous(memory_format=torch.channels_last)
    assert renoise(x, randn(2, 4, 6, 10), 0.5).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("stride", [0, 3])
def test_strided_times(randn, check_rounded_once, stride):
    """An expanded scalar and a column of a table."""
    x, noise = randn(3, 113), randn(3, 113, seed=1)
    t = torch.tensor(0.3).expand(3) if stride == 0 else torch.linspace(0.1, 0.9, 9).view(3, 3)[:, 1]
    assert t.stride() == (stride,)
    check_rounded_once(renoise(x, noise, t), truth(x, noise, 1 - t, t))
    check_rounded_once(renoise(x, noise, (t, 0.5)), truth(x, noise, t, torch.full((3,), 0.5)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("needed", [(True, False), (False, True), (True, True)])
def test_gradients_go_where_they_are_needed(randn, check_rounded_once, needed, dtype):
    x, noise, upstream = randn(3, 1023, dtype=dtype), randn(3, 1023, seed=1), randn(3, 1023, seed=2, dtype=dtype)
    x.requires_grad_(needed[0]), noise.requires_grad_(needed[1])
    t = coefficient((3,), torch.float32, 2)
    renoise(x, noise, t).backward(upstream)
    for tensor, scale, expected in zip((x, noise), (1 - t, t), needed, strict=True):
        assert (tensor.grad is not None) == expected
        if expected:
            assert tensor.grad.dtype == tensor.dtype
            check_rounded_once(tensor.grad, scale.double()[:, None] * upstream.double())


def test_times_written_to_before_the_backward_pass_are_an_error(randn):
    t = torch.full((3,), 0.5)
    out = renoise(randn(3, 5), randn(3, 5).requires_grad_(), t)
    t += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_second_derivative(randn):
    x, t = randn(3, 5).requires_grad_(), torch.linspace(0.1, 0.9, 3)
    (gradient,) = torch.autograd.grad((renoise(x, x, t) ** 2).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), x)  # of x^2, as alpha + sigma = 1
    torch.testing.assert_close(second, torch.full_like(x, 2.0))


def test_result_has_the_samples_dtype(randn, check_rounded_once):
    x, noise = randn(3, 113, dtype=torch.bfloat16), randn(3, 113, seed=1)
    t = coefficient((3,), torch.float32, 2)
    assert renoise(x, noise, t).dtype == torch.bfloat16
    assert renoise(noise, x, t).dtype == torch.float32
    check_rounded_once(renoise(noise, x, t), truth(noise, x, 1 - t, t))


def test_time_stays_float32_beside_bfloat16(randn, check_rounded_once):
    """t = 0.9964 is 0.9961 in bfloat16, 8 % off in 1 - t: seen where the noise is zero."""
    x = randn(1, 113, dtype=torch.bfloat16)
    t = torch.tensor([0.9964])
    check_rounded_once(renoise(x, torch.zeros_like(x), t), x.double() * (1 - t.double()))


def test_ends(randn):
    x, noise = randn(2, 113), randn(2, 113, seed=1)
    assert torch.equal(renoise(x, noise, torch.zeros(2)), x)
    assert torch.equal(renoise(x, noise, 1.0), noise)
    torch.testing.assert_close(renoise(x, noise, 0.25), renoise(x, noise, torch.full((2,), 0.25)))
    torch.testing.assert_close(renoise(x, noise, (0.75, 0.25)), renoise(x, noise, 0.25))


@pytest.mark.float64
def test_gradcheck(randn):
    x, noise, t = (randn(*shape, seed=i, dtype=torch.float64) for i, shape in enumerate([(3, 5), (3, 5), (3,)]))
    assert torch.autograd.gradcheck(lambda x, noise: renoise(x, noise, t), (x.requires_grad_(), noise.requires_grad_()))


def test_time_receives_no_gradient(randn):
    t = torch.rand(3, requires_grad=True)
    assert not renoise(randn(3, 5), randn(3, 5), t).requires_grad


@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_batch(dtype):
    empty = torch.empty(0, 4, 3, dtype=dtype)
    assert renoise(empty, empty, torch.empty(0)).shape == (0, 4, 3)


def test_compiles_to_one_graph_and_repeats(randn):
    torch._dynamo.reset()
    compiled = torch.compile(renoise, fullgraph=True, backend="aot_eager")
    x, noise = randn(3, 113, dtype=torch.bfloat16), randn(3, 113, seed=1, dtype=torch.bfloat16)
    for t in (coefficient((3,), torch.float32, 2), 0.25, (coefficient((3,), torch.float32, 2), 0.5)):
        assert torch.equal(compiled(x, noise, t), renoise(x, noise, t))
        assert torch.equal(renoise(x, noise, t), renoise(x, noise, t))
