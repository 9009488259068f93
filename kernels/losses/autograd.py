"""Losses whose gradient is computed in the forward pass.

An implementation of a loss takes `reduction` last and returns the reduced loss, a tensor of the input's shape and dtype,
and a float `rest`; tensor times `rest` is the gradient. Fused kernels apply the reduction's factor themselves and return
rest = 1, so that a backward pass with upstream gradient 1 does nothing. In float16 the factor, 1 / numel, would push
gradients below the smallest number, and stays in `rest`.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch._C._autograd import _get_current_graph_task_keep_graph
from torch.autograd.function import once_differentiable

from dpdmd.kernels.losses.scale import scaled, scaled_in_place
from dpdmd.kernels.runtime import layout
from dpdmd.kernels.runtime.formula import sample_size
from dpdmd.kernels.runtime.registration import transformed
from dpdmd.kernels.runtime.saved import Function

Loss = tuple[Tensor, Tensor, float]


def factor(x: Tensor, reduction: str) -> float:
    """The factor from the sum of the elements' losses to the reduced loss. An empty batch's mean is 0."""
    if reduction == "mean":
        return 1 / max(x.numel(), 1)
    return 1 / sample_size(x) if reduction == "none" else 1.0


def factor_now(x: Tensor, reduction: str) -> tuple[float, float]:
    """The part of `factor` that a fused kernel applies to the gradient it writes, and the rest."""
    whole = factor(x, reduction)
    return (1.0, whole) if x.dtype == torch.float16 else (whole, 1.0)


def empty_results(x: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    """Uninitialised loss, float32, () or (B,) for "none", and gradient, `layout.empty_like` x."""
    loss = torch.empty(x.shape[:1] if reduction == "none" else (), dtype=torch.float32, device=x.device)
    return loss, layout.empty_like(x, x.dtype)


def fake(x: Tensor, *arguments) -> tuple[Tensor, Tensor]:
    """The fake of a loss's registered operation, whose last argument is the reduction."""
    return empty_results(x, arguments[-1])


def run_triton(operation: Callable, x: Tensor, *arguments, reduction: str) -> Loss:
    return *operation(x, *arguments, reduction), factor_now(x, reduction)[1]


def run_cuda(operation: Callable, x: Tensor, *arguments, reduction: str) -> Loss:
    """Run an operation of csrc/. Its last arguments are both factors and whether the loss is one per sample."""
    now, rest = factor_now(x, reduction)
    return *operation(x, *arguments, factor(x, reduction), now, reduction == "none"), rest


def from_reference(reference: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Loss]:
    """Make an implementation of a reference. It returns `sums` (B,), each sample's sum of the elements' losses, and
    `direction` (B, ...), the gradient of `sums.sum()`, both in the arithmetic's dtype."""

    @functools.wraps(reference)
    def implementation(x: Tensor, *arguments, reduction: str) -> Loss:
        with torch.no_grad():
            sums, direction = reference(x, *arguments)
            whole = factor(x, reduction)
            loss = (sums if reduction == "none" else sums.sum()) * whole
            return loss, direction.to(x.dtype), whole

    return implementation


def attach(x: Tensor, computed: Loss) -> Tensor:
    """The loss, () or (B,) for "none", with its gradient attached to `x`."""
    if transformed():
        return _AttachTransformed.apply(x, *computed)[0]
    if not (x.requires_grad and torch.is_grad_enabled()):
        return computed[0]
    return _Attach.apply(x, computed)


class _Attach(Function):
    # `computed` is a tuple so that autograd sees x as the only input. forward takes ctx: the newer form with
    # setup_context binds its arguments by inspection, 20 us a call.
    @staticmethod
    def forward(ctx, x, computed):
        loss, gradient, ctx.rest = computed
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx, upstream):
        if torch.is_grad_enabled():  # create_graph=True
            return _constant_gradient(ctx, upstream), None
        (gradient,) = ctx.saved_tensors
        # A backward pass that keeps the graph may read the saved gradient again.
        if torch.compiler.is_compiling() or _get_current_graph_task_keep_graph():
            return scaled(gradient, upstream, ctx.rest), None
        return scaled_in_place(gradient, upstream, ctx.rest), None


@once_differentiable  # the gradient is a constant: a second derivative would be wrong without an error
def _constant_gradient(ctx, upstream: Tensor) -> Tensor:
    (gradient,) = ctx.saved_tensors
    return scaled(gradient, upstream, ctx.rest)


class _AttachTransformed(Function):
    """`_Attach` in the form that torch.func takes. It returns the gradient, a constant, too: its derivative is refused."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, loss, gradient, rest):
        # From x, so that vmap gives each entry of its batch a loss even where the values do not depend on x (dmd_loss).
        return x.new_empty(loss.shape, dtype=loss.dtype).copy_(loss), torch.empty_like(x).copy_(gradient)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.rest = inputs[3]
        ctx.save_for_backward(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, upstream, of_gradient):
        if of_gradient is not None:
            raise RuntimeError("the losses have no second derivatives: torch.func can take one gradient of them only")
        (gradient,) = ctx.saved_tensors
        return None if upstream is None else scaled(gradient, upstream, ctx.rest), None, None, None
