import pytest
import torch

from dpdmd.kernels import renoise

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
# One element; sizes that fill no vector, warp or block; one dimension only; a latent.
SHAPES = [(1, 1), (1, 113), (3, 1023), (2, 4097), (5,), (3, 4, 6, 10)]


def coefficient(shape, dtype, seed):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.rand(shape[0], generator=torch.Generator().manual_seed(seed), dtype=wide)


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


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "sliced", "expanded"])
def test_strides(randn, restride, check_rounded_once, layout):
    x, noise = (restride(randn(3, 4, 6, 10, seed=seed), layout) for seed in (0, 1))
    t = coefficient((3,), torch.float32, 2)
    check_rounded_once(renoise(x, noise, t), truth(x, noise, 1 - t, t))


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
