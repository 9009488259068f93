"""Shared by the tests of the operations: the implementations, seeded tensors, awkward strides, relative errors, a loss
against float64.

Tests of the fixture `implementation` run on the reference and on each fused implementation: on a CUDA device where
there is one, otherwise Triton's kernels in its interpreter, and CUDA's not at all.
"""

import pytest
import torch

from dpdmd.kernels import use_backend
from dpdmd.kernels.runtime import backend, launch

ON_GPU = torch.cuda.is_available()

# The gradient of a loss is rounded twice to its dtype, each time by eps / 2 at most.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def pytest_configure(config):
    config.addinivalue_line("markers", "float64: for the reference alone, the one implementation for float64")


def pytest_collection_modifyitems(items):
    """float64 goes to the reference."""

    def served(item):
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if parameters.get("implementation", "reference") == "reference":
            return True
        return not item.get_closest_marker("float64") and parameters.get("dtype") != torch.float64

    items[:] = filter(served, items)


@pytest.fixture(params=["reference", "triton", pytest.param("cuda", marks=pytest.mark.gpu)])
def implementation(request):
    """Its name. Tensors that the test makes are on the device it runs on."""
    device = torch.device("cuda" if request.param != "reference" and ON_GPU else "cpu")
    if request.param == "cuda" and not ON_GPU:
        pytest.skip("needs a CUDA device")
    reason = backend.why_not(request.param, device.type, device.index) if request.param != "reference" else ""
    if reason:
        pytest.skip(reason)
    if device.type == "cuda":
        torch.set_default_device(device)
    with use_backend(request.param):
        yield request.param
    torch.set_default_device(None)


@pytest.fixture(scope="package", autouse=True)
def triton_interprets():
    """What Triton reads besides, when it runs a kernel that tests/conftest.py had made for its interpreter."""
    with pytest.MonkeyPatch.context() as patch:
        if launch.INTERPRETED:
            patch.setenv("TRITON_INTERPRET", "1")
        yield


@pytest.fixture(scope="session", autouse=True)
def interpreter_does_as_a_gpu():
    """Triton's interpreter cuts the low bits off where it makes bfloat16 or e4m3 of float32, and cannot multiply
    matrices of bfloat16."""
    if not launch.INTERPRETED:
        yield
        return
    from triton import language
    from triton.runtime import interpreter

    original = interpreter._convert_float

    def convert(values, source, target, rounding_mode):
        if (source, target) == (language.float32, language.float8e4nv):
            saturated = torch.from_numpy(values.copy()).clamp(-448, 448)
            return saturated.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        if (source, target) != (language.float32, language.bfloat16):
            return original(values, source, target, rounding_mode)
        rounded = torch.from_numpy(values.copy()).to(torch.bfloat16)
        return rounded.view(torch.int16).numpy().view("uint16")

    def dot(self, a, b, d, *options):
        """Of bfloat16, which the interpreter keeps as the bits of integers and multiplies as such."""
        a, b = (self.cast_impl(x, language.float32) if x.dtype.scalar == language.bfloat16 else x for x in (a, b))
        return create_dot(self, a, b, d, *options)

    create_dot = interpreter.InterpreterBuilder.create_dot
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", convert)
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
        yield


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
        generator = torch.Generator("cpu").manual_seed(seed)
        values = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
        return values.to(torch.get_default_device(), dtype)

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
        if layout == "batch_sliced":  # dense samples with others between them
            larger = x.new_full((2 * x.shape[0], *x.shape[1:]), float("nan"))
            larger[::2] = x
            return larger[::2]
        if layout == "padded":  # dense samples with three elements between them, so that they start anywhere
            padded = x.new_full((x.shape[0], x[0].numel() + 3), float("nan"))
            padded[:, :-3] = x.flatten(1)
            return padded[:, :-3].unflatten(1, x.shape[1:])
        if layout == "chunked":  # some channels of a larger tensor: dense samples, too
            larger = x.new_full((x.shape[0], 2 * x.shape[1], *x.shape[2:]), float("nan"))
            larger[:, x.shape[1] :] = x
            return larger[:, x.shape[1] :]
        if layout == "expanded":  # one sample for the whole batch, stride 0
            return x[:1].expand_as(x)
        return x

    return apply


def _within(x, larger, part):
    """The same values in a part of a tensor of another shape, whose rest is NaN."""
    return x.new_full(larger, float("nan"))[part].copy_(x)


# Strides of tokens (B, S, C).
ROW_LAYOUTS = {
    # one stride from sample to sample, another from row to row
    "joint": lambda x, B, S, C: _within(x, (B, S + 3, C), (slice(None), slice(S))),
    "columns": lambda x, B, S, C: _within(x, (B, S, 3 * C), (..., slice(C, 2 * C))),
    "padded": lambda x, B, S, C: _within(x, (B, S, C + 3), (..., slice(C))),  # rows that start anywhere
    "every other": lambda x, B, S, C: _within(x, (B, S, 2 * C), (..., slice(None, None, 2))),
    "transposed": lambda x, B, S, C: x.transpose(0, 1).contiguous().transpose(0, 1),
    "columns first": lambda x, B, S, C: x.transpose(1, 2).contiguous().transpose(1, 2),
    "expanded": lambda x, B, S, C: x[:1, :1].expand_as(x),
}


@pytest.fixture(params=ROW_LAYOUTS)
def row_layout(request):
    return request.param


@pytest.fixture
def relaid(row_layout):
    """The same values (B, S, C) with other strides; those of "expanded" are the first row's."""
    return lambda x: ROW_LAYOUTS[row_layout](x, *x.shape)


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
