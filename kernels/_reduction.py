"""A loss whose gradient was computed along with it.

An implementation of a loss returns `sums` (B,), each sample's sum of the elements' losses, and `direction` (B, ...),
the gradient of `sums.sum()`. Scaling both by `factor` gives the reductions "mean" and "none" (the means of the
samples); with 1 it is "sum". So one kernel serves all three, and all that waits for the backward pass is
`direction`, in the dtype of the input that receives it.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpdmd.kernels._formula import sample_size


def reduce(sums: Tensor, direction: Tensor, x: Tensor, reduction: str) -> Tensor:
    """The reduced loss, () or (B,), in the dtype of `sums`, whose gradient goes to `x`. An empty batch's mean is 0."""
    if reduction == "mean":
        factor = 1 / max(x.numel(), 1)
    elif reduction == "none":
        factor = 1 / sample_size(x)
    else:
        factor = 1
    if not (x.requires_grad and torch.is_grad_enabled()):
        return _reduced(sums, factor, reduction)
    return _Reduce.apply(x, (sums, direction.to(x.dtype)), factor, reduction)


def _reduced(sums: Tensor, factor: float, reduction: str) -> Tensor:
    return (sums if reduction == "none" else sums.sum()) * factor


class _Reduce(torch.autograd.Function):
    # `computed` is a tuple so that autograd sees no input but x.
    @staticmethod
    def forward(x, computed, factor, reduction):
        return _reduced(computed[0], factor, reduction)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, (_, direction), ctx.factor, _ = inputs
        ctx.save_for_backward(direction)

    @staticmethod
    @once_differentiable  # `direction` is a constant: a second derivative would be silently wrong
    def backward(ctx, upstream):
        (direction,) = ctx.saved_tensors
        # (1, ..., 1) or (B, 1, ..., 1): PyTorch would round a scale of shape () to bfloat16 before multiplying.
        scale = (upstream * ctx.factor).view(-1, *[1] * (direction.ndim - 1))
        return (direction * scale).to(direction.dtype), None, None, None
