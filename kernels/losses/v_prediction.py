"""The diversity loss of a flow model: the student's first velocity against the one to the teacher's anchor.

    L = mean |v - (noise - z) / (1 - t)|^2

The target is the velocity of the straight line from the noise at time 1 to the teacher's z at time t.

Source: arXiv 2602.03139, the student's first step (L_div), with z = z_K and t = t_K after K steps of the teacher.
"""

import torch
from torch import Tensor

from dpdmd.kernels.losses import squared
from dpdmd.kernels.losses.autograd import Loss, attach, fake, from_reference, run_triton
from dpdmd.kernels.runtime import checks
from dpdmd.kernels.runtime.backend import choose
from dpdmd.kernels.runtime.formula import column, sample_sum, widen
from dpdmd.kernels.runtime.launch import jit, tl
from dpdmd.kernels.runtime.registration import plain, register, transformed
from dpdmd.kernels.runtime.tile import joined, split


def v_prediction_loss_reference(
    v: Tensor, noise: Tensor, z: Tensor, t: float | Tensor, arithmetic: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The definition: the sum of squares a sample, (B,), and its gradient in v, (B, ...)."""
    v, noise, z = widen(arithmetic, v, noise, z)
    residual = v - (noise - z) / (1 - column(t, v))
    return sample_sum(residual * residual), 2 * residual


@jit
def _residual(v, noise, z, start, t):
    return v - tl.div_rn(noise - z, start - t), 1.0


def _launch(
    v: Tensor, noise: Tensor, z: Tensor, t: Tensor | None, remaining: float, reduction: str
) -> tuple[Tensor, Tensor]:
    # The kernel computes start - t. For a float t this is `remaining`, computed in float64.
    start, end = (remaining, 0.0) if t is None else (1.0, t)
    return squared.squared_loss(_residual, v, noise, z, (start, 0), joined(*split(end)), reduction)


_v_prediction_loss = register(
    "v_prediction_loss_triton(Tensor v, Tensor noise, Tensor z, Tensor? t, float remaining, str reduction) "
    "-> (Tensor, Tensor)",
    _launch,
    fake,
)


def v_prediction_loss_triton(
    v: Tensor, noise: Tensor, z: Tensor, t: float | Tensor, arithmetic: torch.dtype, *, reduction: str
) -> Loss:
    times = (t, 1.0) if isinstance(t, Tensor) else (None, float(1 - t))
    return run_triton(_v_prediction_loss, v, noise, z, *times, reduction=reduction)


IMPLEMENTATIONS = {
    "reference": from_reference(v_prediction_loss_reference),
    "triton": v_prediction_loss_triton,
    "cuda": squared.velocity_loss_cuda,
}


def _in_range(t: float | Tensor) -> bool:
    if not isinstance(t, Tensor):
        return 0 <= t < 1
    if t.device.type != "cpu" or torch.compiler.is_compiling() or transformed() or not plain((t,)):
        return True  # unknown on a GPU and for fake tensors
    return bool(((t >= 0) & (t < 1)).all())


def v_prediction_loss(v: Tensor, noise: Tensor, z: Tensor, t: float | Tensor, *, reduction: str = "mean") -> Tensor:
    """mean |v - (noise - z) / (1 - t)|^2.

    v (B, ...): the student's velocity at time 1, the only input that receives a gradient.
    noise (B, ...): the initial noise.  z (B, ...): the teacher's sample at time t of its rollout from that noise.
    t: a float or (B,) float32, in [0, 1). On a GPU a tensor is not checked, as that waits: t = 1 gives a non-finite loss.
    reduction: "mean"; "sum" of the squares; "none", the samples' means (B,).

    Tensors are any mix of float32, float16 and bfloat16, with any strides and any batch; arithmetic and result are
    float32, or float64 where any tensor is. The gradient has v's dtype. An empty batch's mean is 0.

    Raises TypeError for a dtype or type, ValueError for a shape, a device, an unknown reduction and t outside [0, 1).
    """
    arithmetic = checks.tensors(v=v, noise=noise, z=z)
    checks.per_sample("t", t, v, arithmetic)
    if not _in_range(t):
        raise ValueError(f"t is {t}; it needs to be in [0, 1), as the target divides by 1 - t")
    checks.one_of("reduction", reduction, checks.REDUCTIONS)

    run = choose("v_prediction_loss", IMPLEMENTATIONS, v.device, arithmetic)
    return attach(v, run(v, noise, z, t, arithmetic, reduction=reduction))
