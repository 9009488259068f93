import pytest
import torch

from dpdmd.kernels import v_prediction_loss

pytestmark = pytest.mark.usefixtures("implementation")

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
# One element; sizes that fill no vector, warp or block; one dimension only; a latent.
SHAPES = [(1, 1), (1, 113), (3, 1023), (2, 4097), (5,), (3, 4, 6, 10)]


def loss(v, noise, z, t, **options):
    return v_prediction_loss(v, noise, z, t, **options)


def truth(v, noise, z, t):
    """Each sample apart: the squares of its elements."""
    return torch.stack([(v[i] - (noise[i] - z[i]) / (1 - t[i])) ** 2 for i in range(len(v))])


def make(randn, shape, dtype):
    t = torch.linspace(0, 0.9, shape[0], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return [*(randn(*shape, seed=seed, dtype=dtype) for seed in range(3)), t]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(check_loss, randn, shape, dtype):
    check_loss(loss, truth, make(randn, shape, dtype))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions(check_loss, randn, reduction):
    check_loss(loss, truth, make(randn, (3, 4, 6, 10), torch.float32), reduction)


@pytest.mark.parametrize(
    "layout", ["channels_last", "transposed", "sliced", "batch_sliced", "padded", "chunked", "expanded"]
)
@pytest.mark.parametrize("which", range(3))
def test_strides(check_loss, randn, restride, which, layout):
    inputs = make(randn, (3, 4, 6, 10), torch.float32)
    inputs[which] = restride(inputs[which], layout)
    check_loss(loss, truth, inputs)


def test_mixed_dtypes(check_loss, randn):
    v, noise, z, t = make(randn, (3, 1023), torch.float32)
    check_loss(loss, truth, [v.bfloat16(), noise, z.half(), t])


@pytest.mark.float64
def test_mixed_with_float64(check_loss, randn):
    v, noise, z, t = make(randn, (3, 1023), torch.float32)
    check_loss(loss, truth, [v, noise.double(), z.half(), t])


@pytest.mark.parametrize("t", [0, 0.0, 0.858, 0.991])
def test_time_as_a_float_is_that_time_for_every_sample(randn, t):
    v, noise, z = (randn(3, 113, seed=seed) for seed in range(3))
    torch.testing.assert_close(v_prediction_loss(v, noise, z, t), loss(v, noise, z, torch.full((3,), float(t))))


def test_the_straight_line_is_the_minimum(randn):
    """v = (noise - z) / (1 - t) takes noise to z: noise + (t - 1) v = z."""
    noise, z, t = randn(2, 113), randn(2, 113, seed=1), 0.4
    v = ((noise - z) / (1 - t)).requires_grad_()
    torch.testing.assert_close(noise + (t - 1) * v, z)
    assert v_prediction_loss(v, noise, z, t) < 1e-12


@pytest.mark.parametrize("t", [1, 1.0, -0.1, 1.5, float("nan")])
def test_time_outside_its_range(randn, t):
    with pytest.raises(ValueError, match=rf"t is {t}; it needs to be in \[0, 1\), as the target divides by 1 - t"):
        v_prediction_loss(randn(2, 5), randn(2, 5), randn(2, 5), t)


@pytest.mark.parametrize("t", [1.0, -0.1, float("nan")])
def test_time_that_a_cpu_tensor_shows_to_be_impossible(randn, t):
    with pytest.raises(
        ValueError, match=r"^t is tensor\(.*; it needs to be in \[0, 1\), as the target divides by 1 - t"
    ):
        v_prediction_loss(*[randn(2, 5).cpu()] * 3, torch.tensor([0.5, t], device="cpu"))
