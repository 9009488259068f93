from pathlib import Path

import pytest
import torch

from dpdmd.kernels import dmd_loss

pytestmark = pytest.mark.usefixtures("implementation")

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
# One element; sizes that fill no vector, warp or block; one dimension only; a latent.
SHAPES = [(1, 1), (1, 113), (3, 1023), (2, 4097), (5,), (3, 4, 6, 10)]


def mean_of_sample(y):
    return torch.stack([sample.mean() for sample in y]).reshape(-1, *[1] * (y.ndim - 1))


def truth(x, teacher, critic, uncond, x_t, a, b, guidance_scale=1.0, normalizer="teacher"):
    """The paper, literally, in the space of clean samples: the loss of each element. a and b are (B,)."""
    a, b = (c.reshape(-1, *[1] * (x.ndim - 1)) for c in (a, b))
    x_real = a * x_t + b * (uncond + guidance_scale * (teacher - uncond))
    x_fake = a * x_t + b * critic
    w = 1.0
    if normalizer == "teacher":
        w = mean_of_sample(abs(x_t - x_real))
    elif normalizer == "sample":
        w = mean_of_sample(abs(x.detach() - x_real))
    gradient = torch.nan_to_num((x_fake - x_real) / w, nan=0.0)
    return 0.5 * (x - (x - gradient).detach()) ** 2


@pytest.fixture
def inputs(randn):
    """x, teacher, critic, uncond, x_t (B, ...) and a, b (B,). Each sample has its own scale, so its own normaliser."""

    def make(shape, dtype=torch.float32):
        scale = torch.arange(1, shape[0] + 1, dtype=torch.float64).reshape(-1, *[1] * (len(shape) - 1))
        tensors = [(randn(*shape, seed=seed, dtype=torch.float64) * scale).to(dtype) for seed in range(5)]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        a = 1 + 0.3 * randn(shape[0], seed=5).abs()
        b = -0.2 - randn(shape[0], seed=6).abs()
        return [*tensors, a.to(wide), b.to(wide)]

    return make


def flow(x, teacher, critic, uncond, x_t, a, b, **options):
    return dmd_loss(x, teacher, critic, teacher_uncond=uncond, **options)


def converted(x, teacher, critic, uncond, x_t, a, b, **options):
    return dmd_loss(x, teacher, critic, teacher_uncond=uncond, x_t=x_t, to_x0=(a, b), **options)


def as_flow(inputs):
    """The same tensors with the coefficients of a flow: a = 1, b = -t, whatever t."""
    *tensors, a, b = inputs
    return [*tensors, torch.ones_like(a), b]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_flow_form_is_the_papers_formula_at_any_time(check_loss, inputs, shape, dtype):
    check_loss(
        lambda *args, **options: flow(*args, guidance_scale=3.5, **options),
        lambda *args: truth(*args, guidance_scale=3.5),
        as_flow(inputs(shape, dtype)),
    )


@pytest.mark.parametrize("normalizer", ["teacher", "sample", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_converted_form(check_loss, inputs, shape, dtype, normalizer):
    check_loss(
        lambda *args, **options: converted(*args, guidance_scale=8.0, normalizer=normalizer, **options),
        lambda *args: truth(*args, guidance_scale=8.0, normalizer=normalizer),
        inputs(shape, dtype),
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("form", [flow, converted])
def test_reductions(check_loss, inputs, form, reduction):
    check_loss(form, truth, as_flow(inputs((3, 4, 6, 10))), reduction)


@pytest.mark.parametrize(
    "layout", ["channels_last", "transposed", "sliced", "batch_sliced", "padded", "chunked", "expanded"]
)
@pytest.mark.parametrize("which", range(5))
@pytest.mark.parametrize("form", [flow, converted])
def test_strides(check_loss, inputs, restride, form, which, layout):
    tensors = as_flow(inputs((3, 4, 6, 10)))
    tensors[which] = restride(tensors[which], layout)
    check_loss(
        lambda *args, **options: form(*args, guidance_scale=3.5, **options),
        lambda *args: truth(*args, guidance_scale=3.5),
        tensors,
    )


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.float32),  # the trainer's
        (torch.bfloat16, torch.float32, torch.float16, torch.float32, torch.bfloat16),
        pytest.param(  # one float64 makes it float64
            (torch.float32, torch.float64, torch.float32, torch.bfloat16, torch.float32), marks=pytest.mark.float64
        ),
    ],
)
@pytest.mark.parametrize("form", [flow, converted])
def test_mixed_dtypes(check_loss, inputs, form, dtypes):
    *tensors, a, b = as_flow(inputs((3, 1023)))
    tensors = [tensor.to(dtype) for tensor, dtype in zip(tensors, dtypes, strict=True)]
    check_loss(
        lambda *args, **options: form(*args, guidance_scale=3.5, **options),
        lambda *args: truth(*args, guidance_scale=3.5),
        [*tensors, a, b],
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("difference", [0.05, 0.001])
def test_small_time_costs_no_digits(randn, relative_error, difference, dtype):
    """Teacher and critic alike, t = 0.03, bfloat16 outputs: x_fake - x_real cancels, the velocities do not."""
    teacher = randn(2, 16, 32, 32)
    critic = (teacher * (1 + difference * randn(2, 16, 32, 32, seed=1))).bfloat16()
    teacher, x_t = teacher.bfloat16(), randn(2, 16, 32, 32, seed=2).bfloat16()
    x, t = randn(2, 16, 32, 32, seed=3).to(dtype).requires_grad_(), 0.03

    exact_x = x.detach().double().requires_grad_()
    a, b = torch.ones(2).double(), torch.full((2,), -t).double()
    exact = truth(exact_x, teacher.double(), critic.double(), teacher.double(), x_t.double(), a, b).sum()
    (exact_gradient,) = torch.autograd.grad(exact, exact_x)

    rounding = max(torch.finfo(dtype).eps, 1e-6)  # two roundings to x's dtype, each eps / 2
    (gradient,) = torch.autograd.grad(dmd_loss(x, teacher, critic, reduction="sum"), x)
    assert relative_error(gradient, exact_gradient) < rounding
    to_x0 = (1.0, -t)
    (gradient,) = torch.autograd.grad(dmd_loss(x, teacher, critic, x_t=x_t, to_x0=to_x0, reduction="sum"), x)
    assert relative_error(gradient, exact_gradient) < rounding

    x_real, x_fake = x_t - t * teacher, x_t - t * critic  # what the released code does, in bfloat16
    released = (x_fake - x_real) / mean_of_sample((x_t - x_real).abs())
    assert relative_error(released, exact_gradient) > 0.5, "the inputs of this test do not cancel"


def test_gradient_step_moves_the_sample_to_the_teacher(randn):
    """The sign, from the meaning: x - g is nearer to x_real than x_fake by the difference of the two, over w."""
    x_t, teacher, critic = (randn(1, 50, seed=seed) for seed in range(3))
    x = randn(1, 50, seed=3).requires_grad_()
    t = 0.7
    dmd_loss(x, teacher, critic, reduction="sum").backward()
    x_real, x_fake = x_t - t * teacher, x_t - t * critic
    torch.testing.assert_close(-x.grad * (x_t - x_real).abs().mean(), x_real - x_fake)


def test_equal_scores_give_zero(randn):
    x, teacher = randn(2, 113).requires_grad_(), randn(2, 113, seed=1)
    loss = dmd_loss(x, teacher, teacher.clone())
    loss.backward()
    assert loss.item() == 0
    assert (x.grad == 0).all()


def test_guidance_of_one_does_not_read_the_unconditional_output(randn):
    x, teacher, critic = (randn(2, 113, seed=seed) for seed in range(3))
    uncond = torch.full_like(x, float("nan"))
    assert torch.equal(dmd_loss(x, teacher, critic, teacher_uncond=uncond), dmd_loss(x, teacher, critic))


def test_x_t_is_not_read_in_the_flow_form(randn):
    x, teacher, critic = (randn(2, 113, seed=seed) for seed in range(3))
    x_t = torch.full_like(x, float("nan"))
    assert torch.equal(dmd_loss(x, teacher, critic, x_t=x_t), dmd_loss(x, teacher, critic))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("form", [flow, converted])
def test_entry_of_the_critic_that_is_not_finite_becomes_zero(inputs, form, bad):
    x, teacher, critic, *rest = as_flow(inputs((3, 1023)))
    whole, damaged = x.clone().requires_grad_(), x.clone().requires_grad_()
    form(whole, teacher, critic, *rest, reduction="sum").backward()
    critic[1, 7] = bad
    loss = form(damaged, teacher, critic, *rest, reduction="none")
    loss.sum().backward()
    assert loss.isfinite().all()

    expected = whole.grad.clone()
    expected[1, 7] = 0
    assert (whole.grad[1, 7] != 0).all()
    torch.testing.assert_close(damaged.grad * x[0].numel(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(loss, 0.5 * (expected**2).mean(1), rtol=1e-5, atol=0)


def test_an_infinite_entry_is_zero_here_and_not_in_the_papers_code(randn):
    """Which the docstring and docs/kernels.md say: there NaN alone becomes 0."""
    x, teacher, critic, x_t = (randn(2, 5, seed=seed) for seed in range(4))
    critic[0, 1], critic[1, 2] = float("inf"), float("nan")
    one = torch.ones(2)
    for loss, zeros in (
        (dmd_loss(x.requires_grad_(), teacher, critic, x_t=x_t, to_x0=(one, -one), reduction="sum"), (True, True)),
        (truth(x, teacher, critic, teacher, x_t, one, -one).sum(), (False, True)),
    ):
        (gradient,) = torch.autograd.grad(loss, x)
        assert (bool(gradient[0, 1] == 0), bool(gradient[1, 2] == 0)) == zeros
    assert "In the paper's code only NaN becomes 0" in dmd_loss.__doc__
    text = (Path(__file__).parents[3] / "docs" / "kernels.md").read_text(encoding="utf-8")
    assert "The authors' code does so with NaN alone" in text


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("form", [flow, converted])
def test_entry_of_the_teacher_that_is_not_finite_loses_its_sample_only(inputs, form, bad):
    x, teacher, *rest = as_flow(inputs((3, 1023)))
    whole, damaged = x.clone().requires_grad_(), x.clone().requires_grad_()
    form(whole, teacher, *rest, reduction="sum").backward()
    teacher[1, 7] = bad
    loss = form(damaged, teacher, *rest, reduction="sum")
    loss.backward()
    assert loss.isfinite()
    assert (damaged.grad[1] == 0).all()
    assert torch.equal(damaged.grad[[0, 2]], whole.grad[[0, 2]])


def test_teacher_of_zeros_gives_zero(randn):
    x, critic = randn(2, 113).requires_grad_(), randn(2, 113, seed=1)
    teacher = randn(2, 113, seed=2)
    teacher[0] = 0
    loss = dmd_loss(x, teacher, critic, reduction="none")
    loss.sum().backward()
    assert loss[0] == 0 and loss[1] > 0
    assert (x.grad[0] == 0).all() and (x.grad[1] != 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_scale": 3.5}, "guidance_scale=3.5 needs teacher_uncond, the unconditional output, and got None"),
        ({"guidance_scale": 0}, "guidance_scale=0 needs teacher_uncond"),
        ({"to_x0": (1.0, -0.5)}, "to_x0 needs x_t, the renoised sample that the networks saw, and got None"),
        ({"normalizer": "sample"}, r"normalizer='sample' needs to_x0 = \(a, b\) and got None"),
        ({"normalizer": "none"}, "normalizer='none' needs to_x0"),
        ({"normalizer": -1}, "normalizer is -1; it needs to be one of 'teacher', 'sample', 'none'"),
        ({"normalizer": "critic"}, "normalizer is 'critic'; it needs to be one of 'teacher', 'sample', 'none'"),
        ({"reduction": "max"}, "reduction is 'max'; it needs to be one of 'mean', 'sum', 'none'"),
    ],
)
def test_errors(randn, options, message):
    with pytest.raises(ValueError, match=message):
        dmd_loss(randn(2, 5), randn(2, 5), randn(2, 5), **options)
