"""Shared by the tests of the operations: seeded tensors, awkward strides, relative errors, a loss against float64."""

import pytest
import torch

# The gradient of a loss is rounded twice to its dtype, each time by eps / 2 at most.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fresh tensors hold NaN until written, so an element that an operation forgets shows up."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def randn():
    """randn(*shape, seed=0, dtype=torch.float32), the same values each time."""

    def make(*shape, seed=0, dtype=torch.float32):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return make


@pytest.fixture
def relative_error():
    def error(got, truth):
        assert got.shape == truth.shape
        got, truth = got.detach().double(), truth.detach().double()
        assert truth.norm() > 0, "nothing to compare with"
        return ((got - truth).norm() / truth.norm()).item()

    return error


@pytest.fixture
def check_rounded_once(relative_error):
    """`got` is the float64 `truth`, rounded to got's dtype and nowhere before: to the bit, but for values next to a tie."""

    def check(got, truth):
        if got.dtype in (torch.float16, torch.bfloat16):
            assert (got != truth.to(got.dtype)).double().mean() < 0.01
        assert relative_error(got, truth) < TOLERANCE[got.dtype]

    return check


@pytest.fixture
def restride():
    """The same values (B, C, H, W) with other strides."""

    def apply(x, layout):
        if layout == "channels_last":
            return x.contiguous(memory_format=torch.channels_last)
        if layout == "transposed":
            return x.transpose(1, 3).contiguous().transpose(1, 3)
        if layout == "sliced":  # every other element of a larger tensor whose rest is NaN
            larger = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"))
            larger[..., ::2] = x
            return larger[..., ::2]
        if layout == "expanded":  # one sample for the whole batch, stride 0
            return x[:1].expand_as(x)
        return x

    return apply


@pytest.fixture
def check_loss(randn, relative_error):
    """Compare a loss and its gradient in `inputs[0]` with float64 autograd of `truth`, the loss of each element.

    `loss` and `truth` take the tensors of `inputs` in order. The upstream gradient is random, so it cannot be ignored.
    """

    def check(loss, truth, inputs, reduction="mean", tolerance=None):
        first = inputs[0].detach().requires_grad_()
        value = loss(first, *inputs[1:], reduction=reduction)

        exact_first = first.detach().double().requires_grad_()
        elements = truth(exact_first, *(tensor.double() for tensor in inputs[1:]))
        exact = {
            "mean": elements.mean(),
            "sum": elements.sum(),
            "none": elements.reshape(len(elements), -1).mean(1),
        }[reduction]

        all_double = all(tensor.dtype == torch.float64 for tensor in inputs)
        assert value.dtype == (torch.float64 if any(i.dtype == torch.float64 for i in inputs) else torch.float32)
        assert relative_error(value, exact) < (1e-13 if all_double else 1e-6)

        upstream = randn(*value.shape, seed=99, dtype=value.dtype)
        (gradient,) = torch.autograd.grad(value, first, upstream)
        (exact_gradient,) = torch.autograd.grad(exact, exact_first, upstream.double())
        assert gradient.dtype == first.dtype
        assert relative_error(gradient, exact_gradient) < (tolerance or TOLERANCE[first.dtype])

    return check
