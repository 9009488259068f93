"""The critic's loss: flow matching on the student's samples.

    L = mean |v - (noise - x)|^2

Source: arXiv 2602.03139, the critic's update; flow matching along z_t = (1 - t) x + t noise, of velocity noise - x.
"""

import torch
from torch import Tensor

from dpdmd.kernels.losses import squared
from dpdmd.kernels.losses.autograd import Loss, attach, fake, from_reference, run_triton
from dpdmd.kernels.runtime import checks
from dpdmd.kernels.runtime.backend import choose
from dpdmd.kernels.runtime.formula import sample_sum, widen
from dpdmd.kernels.runtime.launch import jit, tl  # noqa: F401 (the interpreter wants tl where a kernel is)
from dpdmd.kernels.runtime.registration import register


def flow_matching_loss_reference(v: Tensor, noise: Tensor, x: Tensor, arithmetic: torch.dtype) -> tuple[Tensor, Tensor]:
    """The definition: the sum of squares a sample, (B,), and its gradient in v, (B, ...)."""
    v, noise, x = widen(arithmetic, v, noise, x)
    residual = v - (noise - x)
    return sample_sum(residual * residual), 2 * residual


@jit
def _residual(v, noise, x, p, q):
    return v - (noise - x), 1.0


_flow_matching_loss = register(
    "flow_matching_loss_triton(Tensor v, Tensor noise, Tensor x, str reduction) -> (Tensor, Tensor)",
    lambda v, noise, x, reduction: squared.squared_loss(_residual, v, noise, x, (0.0, 0), (0.0, 0), reduction),
    fake,
)


def flow_matching_loss_triton(v: Tensor, noise: Tensor, x: Tensor, arithmetic: torch.dtype, *, reduction: str) -> Loss:
    return run_triton(_flow_matching_loss, v, noise, x, reduction=reduction)


def flow_matching_loss_cuda(v: Tensor, noise: Tensor, x: Tensor, arithmetic: torch.dtype, *, reduction: str) -> Loss:
    return squared.velocity_loss_cuda(v, noise, x, 0.0, arithmetic, reduction=reduction)


IMPLEMENTATIONS = {
    "reference": from_reference(flow_matching_loss_reference),
    "triton": flow_matching_loss_triton,
    "cuda": flow_matching_loss_cuda,
}


def flow_matching_loss(v: Tensor, noise: Tensor, x: Tensor, *, reduction: str = "mean") -> Tensor:
    """mean |v - (noise - x)|^2.

    v (B, ...): the critic's velocity at the renoised sample, the only input that receives a gradient.
    noise (B, ...): the noise that the sample was renoised with.  x (B, ...): the student's sample.
    reduction: "mean"; "sum" of the squares; "none", the samples' means (B,).

    Tensors are any mix of float32, float16 and bfloat16, with any strides and any batch; arithmetic and result are
    float32, or float64 where any tensor is. The gradient has v's dtype. An empty batch's mean is 0.

    Raises TypeError for a dtype or type, ValueError for a shape, a device and an unknown reduction.
    """
    arithmetic = checks.tensors(v=v, noise=noise, x=x)
    checks.one_of("reduction", reduction, checks.REDUCTIONS)

    run = choose("flow_matching_loss", IMPLEMENTATIONS, v.device, arithmetic)
    return attach(v, run(v, noise, x, arithmetic, reduction=reduction))
