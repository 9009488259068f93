"""What the losses have in common: upstream gradients, reductions, who gets a gradient, no elements, torch.compile."""

import pytest
import torch

from dpdmd.kernels import dmd_loss, flow_matching_loss, use_backend, v_prediction_loss, x_prediction_loss
from dpdmd.kernels.runtime import tile

pytestmark = pytest.mark.usefixtures("implementation")


def times(x):
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.linspace(0.1, 0.8, x.shape[0], dtype=dtype, device=x.device)


def dmd_flow(x, other, another, **options):
    return dmd_loss(x, other, another, teacher_uncond=x.detach() + 1, guidance_scale=3.5, **options)


def dmd_converted(x, other, another, **options):
    return dmd_loss(x, other, another, x_t=other, to_x0=(times(x), -times(x)), normalizer="sample", **options)


def v_prediction(x, other, another, **options):
    return v_prediction_loss(x, other, another, times(x), **options)


def x_prediction(x, other, another, **options):
    return x_prediction_loss(x, other, (1.0, -times(x)), another, **options)


LOSSES = [dmd_flow, dmd_converted, v_prediction, flow_matching_loss, x_prediction]
every_loss = pytest.mark.parametrize("loss", LOSSES)


@pytest.fixture
def inputs(randn):
    return [randn(3, 4, 10, seed=seed) for seed in range(3)]


def gradient(loss, x, *others, upstream=None, **options):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(loss(x, *others, **options), x, upstream)[0]


@every_loss
def test_mean_of_none_is_mean_and_sum_is_that_times_the_elements(loss, inputs):
    mean, none, total = (loss(*inputs, reduction=reduction) for reduction in ("mean", "none", "sum"))
    assert none.shape == (3,)
    torch.testing.assert_close(none.mean(), mean)
    torch.testing.assert_close(total, mean * inputs[0].numel())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@every_loss
def test_upstream_gradient_scales(loss, inputs, reduction):
    one = torch.ones(3) if reduction == "none" else torch.ones(())
    factor = torch.tensor([2.0, 0.0, -8.0]) if reduction == "none" else torch.tensor(-8.0)
    plain = gradient(loss, *inputs, upstream=one, reduction=reduction)
    scaled = gradient(loss, *inputs, upstream=factor, reduction=reduction)
    assert plain.abs().min() > 0
    assert torch.equal(scaled, plain * factor.reshape(-1, 1, 1))  # powers of two: exact


@every_loss
def test_upstream_gradient_is_not_rounded(loss, randn):
    """It is float32 whatever the gradient's dtype: the product is rounded, not its factor."""
    tensors = [randn(3, 113, seed=seed, dtype=torch.bfloat16) for seed in range(3)]
    plain = gradient(loss, *tensors, reduction="sum")
    scaled = gradient(loss, *tensors, upstream=torch.tensor(0.3), reduction="sum")
    assert torch.equal(scaled, (plain.float() * torch.tensor([0.3])).bfloat16())


@every_loss
def test_large_loss_scale_keeps_small_float16_gradients(loss, randn, relative_error):
    """1e5 elements, residuals of 0.03: float16 gradients of the mean have few digits. Scaled by 65536 they keep all."""
    x, other, change = (randn(2, 50_000, seed=seed) for seed in range(3))
    tensors = [tensor.half() for tensor in (0.02 * x, other, other + 0.02 * change)]
    with use_backend("reference"):
        exact = gradient(loss, *(tensor.double() for tensor in tensors))
    scaled = gradient(loss, *tensors, upstream=torch.tensor(65536.0))
    assert relative_error(scaled.double() / 65536, exact) < 2 * 2**-10


@every_loss
def test_only_the_first_input_receives_a_gradient(loss, inputs):
    leaves = [tensor.requires_grad_() for tensor in inputs]
    loss(*leaves).backward()
    assert leaves[0].grad is not None
    assert leaves[1].grad is None and leaves[2].grad is None


@every_loss
def test_without_grad(loss, inputs):
    expected = loss(*inputs)
    assert not expected.requires_grad
    inputs[0].requires_grad_()
    assert loss(*inputs).requires_grad
    with torch.no_grad():
        assert not loss(*inputs).requires_grad
    assert torch.equal(loss(*inputs), expected)


@every_loss
def test_saves_no_more_than_the_gradient(loss, randn):
    tensors = [randn(3, 100, seed=seed, dtype=torch.bfloat16) for seed in range(3)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss(tensors[0].requires_grad_(), *tensors[1:])
    assert [(tensor.shape, tensor.dtype) for tensor in saved] == [((3, 100), torch.bfloat16)]


@every_loss
def test_loss_can_be_added_to_in_place(loss, inputs):
    x = inputs[0].requires_grad_()
    total = loss(*inputs)
    total += 1.0
    total.backward()
    assert torch.equal(x.grad, gradient(loss, *inputs))


@every_loss
def test_second_backward_over_a_retained_graph(loss, inputs):
    x = inputs[0].requires_grad_()
    value = loss(*inputs)
    upstream = torch.full_like(value, 2.0)
    first = torch.autograd.grad(value, x, upstream, retain_graph=True)[0]
    kept = first.clone()
    second = torch.autograd.grad(value, x, upstream, retain_graph=True)[0]
    third = torch.autograd.grad(value, x, upstream)[0]  # which may work in place, as the graph ends here
    assert torch.equal(first, kept) and torch.equal(second, kept) and torch.equal(third, kept)
    assert len({gradient.data_ptr() for gradient in (first, second, third)}) == 3


@every_loss
def test_gradient_is_the_callers_own(loss, inputs):
    """Writing to the gradient of a retained graph changes neither the next one nor an input."""
    x = inputs[0].requires_grad_()
    value = loss(*inputs)
    before = [tensor.detach().clone() for tensor in inputs]
    first = torch.autograd.grad(value, x, retain_graph=True)[0]
    expected = first.clone()
    first.fill_(7.0)
    assert torch.equal(torch.autograd.grad(value, x, retain_graph=True)[0], expected)
    assert all(torch.equal(tensor, kept) for tensor, kept in zip(inputs, before, strict=True))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@every_loss
def test_in_place_and_out_of_place_backward_agree(loss, randn, relative_error, dtype, reduction):
    x, *others = (randn(3, 4097, seed=seed, dtype=dtype) for seed in range(3))
    value = loss(x.requires_grad_(), *others, reduction=reduction)
    upstream = torch.linspace(0.5, 3, 3) if reduction == "none" else torch.tensor(3.0)
    apart = torch.autograd.grad(value, x, upstream, retain_graph=True)[0]
    assert relative_error(torch.autograd.grad(value, x, upstream)[0], apart) < torch.finfo(dtype).eps


# A block of the kernels less one, as it is and one more; several samples.
@pytest.mark.parametrize("shape", [(2, 4095), (2, 4096), (1, 4097), (12, 3)])
@every_loss
def test_sizes_around_a_block_and_many_samples(loss, randn, relative_error, shape):
    tensors = [randn(*shape, seed=seed) for seed in range(3)]
    for reduction in ("mean", "none"):
        upstream = randn(*shape[:1], seed=9) if reduction == "none" else torch.tensor(3.0)
        with use_backend("reference"):
            wide = [tensor.double() for tensor in tensors]
            expected = (
                loss(*wide, reduction=reduction),
                gradient(loss, *wide, upstream=upstream.double(), reduction=reduction),
            )
        assert relative_error(loss(*tensors, reduction=reduction), expected[0]) < 2e-6
        assert relative_error(gradient(loss, *tensors, upstream=upstream, reduction=reduction), expected[1]) < 2e-6


@every_loss
def test_several_blocks_a_program(loss, randn, relative_error, monkeypatch):
    """As for a sample of more than 1024 blocks: 3 blocks a program, the last of which is short of one and a half."""
    monkeypatch.setattr(tile, "MAX_TILES", 4)
    tensors = [randn(2, 9 * 4096 + 2000, seed=seed) for seed in range(3)]
    assert tile.tiles_and_blocks(tensors[0].shape[1]) == (4, 3)
    with use_backend("reference"):
        expected = loss(*(tensor.double() for tensor in tensors))
        expected_gradient = gradient(loss, *(tensor.double() for tensor in tensors))
    assert relative_error(loss(*tensors), expected) < 2e-6
    assert relative_error(gradient(loss, *tensors), expected_gradient) < 2e-6


@every_loss
def test_second_derivative_is_an_error_not_a_wrong_number(loss, inputs):
    x = inputs[0].requires_grad_()
    scale = torch.ones((), requires_grad=True)
    (first,) = torch.autograd.grad(scale * loss(*inputs), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("loss", [v_prediction, flow_matching_loss, x_prediction])
@pytest.mark.float64
def test_gradcheck(loss, randn, reduction):
    """Not for the DMD loss, whose gradient is by definition not its derivative."""
    tensors = [randn(3, 5, seed=seed, dtype=torch.float64) for seed in range(3)]
    assert torch.autograd.gradcheck(lambda x: loss(x, *tensors[1:], reduction=reduction), tensors[0].requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(0, 4, 10), (0,), (2, 0, 3)])
@every_loss
def test_nothing_in_zero_out(loss, shape, dtype):
    x = torch.empty(shape, dtype=dtype, requires_grad=True)
    others = torch.empty(shape), torch.empty(shape)
    for reduction in ("mean", "sum"):
        value = loss(x, *others, reduction=reduction)
        assert value.item() == 0
        (g,) = torch.autograd.grad(value, x)
        assert g.shape == x.shape and g.dtype == x.dtype
    none = loss(x, *others, reduction="none")
    assert none.shape == shape[:1] and (none == 0).all()
    torch.autograd.grad(none.sum(), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_loss
def test_repeats_bit_for_bit(loss, randn, dtype):
    tensors = [randn(3, 4097, seed=seed, dtype=dtype) for seed in range(3)]
    first = [loss(*tensors), loss(*tensors, reduction="none"), gradient(loss, *tensors)]
    for _ in range(100 if tensors[0].is_cuda else 3):
        again = [loss(*tensors), loss(*tensors, reduction="none"), gradient(loss, *tensors)]
        assert all(map(torch.equal, again, first))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_loss
def test_compiles_to_one_graph(loss, inputs, dtype, reduction):
    inputs = [tensor.to(dtype) for tensor in inputs]
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    one = torch.ones(3) if reduction == "none" else torch.ones(())
    torch.testing.assert_close(compiled(*inputs, reduction=reduction), loss(*inputs, reduction=reduction))
    torch.testing.assert_close(
        gradient(compiled, *inputs, upstream=one, reduction=reduction),
        gradient(loss, *inputs, upstream=one, reduction=reduction),
    )


@every_loss
def test_compiles_for_any_batch(loss, randn):
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="eager", dynamic=True)
    for batch in (2, 3, 5):
        tensors = [randn(batch, 113, seed=seed) for seed in range(3)]
        torch.testing.assert_close(gradient(compiled, *tensors), gradient(loss, *tensors))
