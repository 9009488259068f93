"""The critic's loss: flow matching on the student's samples.

    L = mean |v - (noise - x)|^2

Source: arXiv 2602.03139, the critic's update; flow matching along z_t = (1 - t) x + t noise, whose velocity is noise
- x.
"""

import torch
from torch import Tensor

from dpdmd.kernels import _checks
from dpdmd.kernels._formula import sample_sum, widen
from dpdmd.kernels._reduction import reduce
from dpdmd.kernels.backend import choose


def flow_matching_loss_reference(v: Tensor, noise: Tensor, x: Tensor, arithmetic: torch.dtype) -> tuple[Tensor, Tensor]:
    """The definition: the sum of squares a sample, (B,), and its gradient in v, (B, ...)."""
    v, noise, x = widen(arithmetic, v, noise, x)
    residual = v - (noise - x)
    return sample_sum(residual * residual), 2 * residual


IMPLEMENTATIONS = {"reference": flow_matching_loss_reference}


def flow_matching_loss(v: Tensor, noise: Tensor, x: Tensor, *, reduction: str = "mean") -> Tensor:
    """mean |v - (noise - x)|^2.

    v (B, ...): the critic's velocity at the renoised sample, the only input that receives a gradient.
    noise (B, ...): the noise that the sample was renoised with.  x (B, ...): the student's sample.
    reduction: "mean"; "sum" of the squares; "none", the (B,) means of the samples, whose mean is the "mean".

    Tensors are float32, float16 or bfloat16, mixed as they come, of any strides and any batch; arithmetic and result
    are float32, or float64 where any tensor is. The gradient has v's dtype. An empty batch's mean is 0.

    Raises TypeError for a dtype or type, ValueError for a shape, a device and an unknown reduction.
    """
    arithmetic = _checks.tensors(v=v, noise=noise, x=x)
    _checks.one_of("reduction", reduction, _checks.REDUCTIONS)

    run = choose("flow_matching_loss", IMPLEMENTATIONS, v.device, arithmetic)
    with torch.no_grad():
        sums, direction = run(v, noise, x, arithmetic)
    return reduce(sums, direction, v, reduction)
