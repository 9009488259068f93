import pytest
import torch

from dpdmd.kernels import x_prediction_loss

pytestmark = pytest.mark.usefixtures("implementation")

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
# One element; sizes that fill no vector, warp or block; one dimension only; a latent.
SHAPES = [(1, 1), (1, 113), (3, 1023), (2, 4097), (5,), (3, 4, 6, 10)]


def loss(prediction, x_t, x0_target, alphabar, **options):
    return x_prediction_loss(prediction, x_t, coefficients(alphabar), x0_target, **options)


def coefficients(alphabar):
    return 1 / alphabar.sqrt(), -(1 - alphabar).sqrt() / alphabar.sqrt()


def truth(prediction, x_t, x0_target, alphabar):
    """Each sample apart. A noise-predicting model has x_t = sqrt(alphabar) x0 + sqrt(1 - alphabar) noise."""
    x0 = [(x_t[i] - (1 - s).sqrt() * prediction[i]) / s.sqrt() for i, s in enumerate(alphabar)]
    return (torch.stack(x0) - x0_target) ** 2


def make(randn, shape, dtype=torch.float32):
    # From SDXL's last time, 0.0047, to a middle one.
    alphabar = torch.linspace(0.0047, 0.5, shape[0], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return [*(randn(*shape, seed=seed, dtype=dtype) for seed in range(3)), alphabar]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(check_loss, randn, shape, dtype):
    check_loss(loss, truth, make(randn, shape, dtype))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions(check_loss, randn, reduction):
    check_loss(loss, truth, make(randn, (3, 4, 6, 10)), reduction)


@pytest.mark.parametrize(
    "layout", ["channels_last", "transposed", "sliced", "batch_sliced", "padded", "chunked", "expanded"]
)
@pytest.mark.parametrize("which", range(3))
def test_strides(check_loss, randn, restride, which, layout):
    inputs = make(randn, (3, 4, 6, 10))
    inputs[which] = restride(inputs[which], layout)
    check_loss(loss, truth, inputs)


def test_mixed_dtypes(check_loss, randn):
    prediction, x_t, x0_target, alphabar = make(randn, (3, 1023))
    check_loss(loss, truth, [prediction.bfloat16(), x_t, x0_target.half(), alphabar])


@pytest.mark.float64
def test_mixed_with_float64(check_loss, randn):
    prediction, x_t, x0_target, alphabar = make(randn, (3, 1023))
    check_loss(loss, truth, [prediction, x_t.double(), x0_target.half(), alphabar])


def test_coefficients_as_floats_are_those_for_every_sample(randn):
    prediction, x_t, x0_target = (randn(3, 113, seed=seed) for seed in range(3))
    a, b = torch.full((3,), 1.5), torch.full((3,), -2.25)
    by_float = x_prediction_loss(prediction, x_t, (1.5, -2.25), x0_target)
    assert torch.equal(by_float, x_prediction_loss(prediction, x_t, (a, b), x0_target))
