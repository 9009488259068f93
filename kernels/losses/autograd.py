"""A loss whose gradient was computed along with it.

Every implementation of a loss takes `reduction` last and returns three things: the reduced loss; a tensor of the
input's shape and dtype; and `rest`, a float, so that the tensor times `rest` is the loss's gradient. One that folds
the reduction's factor into its kernel returns 1, so that a backward pass whose upstream gradient is 1 has nothing to
do; float16 keeps the factor for later, as 1 / numel would push its gradients below its smallest number.
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
    """What the sum of the elements' losses is multiplied by. An empty batch's mean is 0."""
    if reduction == "mean":
        return 1 / max(x.numel(), 1)
    return 1 / sample_size(x) if reduction == "none" else 1.0


def factor_now(x: Tensor, reduction: str) -> tuple[float, float]:
    """The part of `factor` that a fused kernel applies to the gradient it writes, and the rest."""
    whole = factor(x, reduction)
    return (1.0, whole) if x.dtype == torch.float16 else (whole, 1.0)


def empty_results(x: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    """Uninitialised: the reduced loss, float32, () or (B,) for "none", and the gradient, as `layout.empty_like` of x."""
    loss = torch.empty(x.shape[:1] if reduction == "none" else (), dtype=torch.float32, device=x.device)
    return loss, layout.empty_like(x, x.dtype)


def fake(x: Tensor, *arguments) -> tuple[Tensor, Tensor]:
    """What a registered operation of a loss returns, by shape, dtype and strides. Its last argument is the reduction."""
    return empty_results(x, arguments[-1])


def run_triton(operation: Callable, x: Tensor, *arguments, reduction: str) -> Loss:
    return *operation(x, *arguments, reduction), factor_now(x, reduction)[1]


def run_cuda(operation: Callable, x: Tensor, *arguments, reduction: str) -> Loss:
    """An operation of csrc/, which takes its factors and whether the loss is one for each sample, last."""
    now, rest = factor_now(x, reduction)
    return *operation(x, *arguments, factor(x, reduction), now, reduction == "none"), rest


def from_reference(reference: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Loss]:
    """Makes an implementation of a definition, which returns `sums` (B,), each sample's sum of the elements' losses,
    and `direction` (B, ...), the gradient of `sums.sum()`, both in the arithmetic's dtype."""

    @functools.wraps(reference)
    def implementation(x: Tensor, *arguments, reduction: str) -> Loss:
        with torch.no_grad():
            sums, direction = reference(x, *arguments)
            whole = factor(x, reduction)
            loss = (sums if reduction == "none" else sums.sum()) * whole
            return loss, direction.to(x.dtype), whole

    return implementation


def attach(x: Tensor, computed: Loss) -> Tensor:
    """The loss, (), or (B,) for "none", whose gradient goes to `x`."""
    if transformed():
        return _AttachTransformed.apply(x, *computed)[0]
    if not (x.requires_grad and torch.is_grad_enabled()):
        return computed[0]
    return _Attach.apply(x, computed)


class _Attach(Function):
    # `computed` is a tuple so that autograd sees no input but x. The older form of forward, with ctx: the newer one
    # binds its arguments by inspection, 20 us a call.
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
        if torch.compiler.is_compiling() or not _graph_ends_here():
            return scaled(gradient, upstream, ctx.rest), None
        return scaled_in_place(gradient, upstream, ctx.rest), None


@once_differentiable  # the gradient is a constant: a second derivative would be silently wrong
def _constant_gradient(ctx, upstream: Tensor) -> Tensor:
    (gradient,) = ctx.saved_tensors
    return scaled(gradient, upstream, ctx.rest)


class _AttachTransformed(Function):
    """`_Attach` in the form that torch.func takes. It returns the gradient too, so that a derivative of it is refused:
    the gradient is a constant."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, loss, gradient, rest):
        # Made of x, so that vmap has a loss for each of its batch where the values do not depend on x, as dmd_loss's.
        return x.new_empty(loss.shape, dtype=loss.dtype).copy_(loss), torch.empty_like(x).copy_(gradient)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.rest = inputs[3]
        ctx.save_for_backward(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, upstream, of_gradient):
        if of_gradient is not None:
            raise RuntimeError(
                "the losses have no second derivatives: torch.func can take one gradient of them, no more"
            )
        (gradient,) = ctx.saved_tensors
        return None if upstream is None else scaled(gradient, upstream, ctx.rest), None, None, None


def _graph_ends_here() -> bool:
    """Whether this backward pass frees the graph, so that what it saved is nobody's afterwards."""
    return not _get_current_graph_task_keep_graph()
