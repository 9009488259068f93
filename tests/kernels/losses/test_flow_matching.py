import pytest
import torch

from dpdmd.kernels import flow_matching_loss

pytestmark = pytest.mark.usefixtures("implementation")

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
# One element; sizes that fill no vector, warp or block; one dimension only; a latent.
SHAPES = [(1, 1), (1, 113), (3, 1023), (2, 4097), (5,), (3, 4, 6, 10)]


def truth(v, noise, x):
    return (v + x - noise) ** 2


def make(randn, shape, dtype=torch.float32):
    return [randn(*shape, seed=seed, dtype=dtype) for seed in range(3)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(check_loss, randn, shape, dtype):
    check_loss(flow_matching_loss, truth, make(randn, shape, dtype))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions(check_loss, randn, reduction):
    check_loss(flow_matching_loss, truth, make(randn, (3, 4, 6, 10)), reduction)


@pytest.mark.parametrize(
    "layout", ["channels_last", "transposed", "sliced", "batch_sliced", "padded", "chunked", "expanded"]
)
@pytest.mark.parametrize("which", range(3))
def test_strides(check_loss, randn, restride, which, layout):
    inputs = make(randn, (3, 4, 6, 10))
    inputs[which] = restride(inputs[which], layout)
    check_loss(flow_matching_loss, truth, inputs)


def test_mixed_dtypes(check_loss, randn):
    v, noise, x = make(randn, (3, 1023))
    check_loss(flow_matching_loss, truth, [v.bfloat16(), noise, x.half()])


@pytest.mark.float64
def test_mixed_with_float64(check_loss, randn):
    v, noise, x = make(randn, (3, 1023))
    check_loss(flow_matching_loss, truth, [v, noise.double(), x.half()])
