"""The diversity loss of a noise-predicting model, in the space of clean samples.

    L = mean |a x_t + b prediction - x0_target|^2,   a = 1 / sqrt(alphabar),   b = -sqrt(1 - alphabar) / sqrt(alphabar)

Source: arXiv 2602.03139, L_div for diffusion models (SDXL): x0_target is the teacher's clean estimate after K steps.
"""

import torch
from torch import Tensor

from dpdmd.kernels.losses import squared
from dpdmd.kernels.losses.autograd import Loss, attach, fake, from_reference, run_cuda, run_triton
from dpdmd.kernels.runtime import checks, csrc, layout
from dpdmd.kernels.runtime.backend import choose
from dpdmd.kernels.runtime.formula import column, sample_sum, widen
from dpdmd.kernels.runtime.launch import jit, tl  # noqa: F401 (the interpreter wants tl where a kernel is)
from dpdmd.kernels.runtime.registration import register
from dpdmd.kernels.runtime.tile import joined, split


def x_prediction_loss_reference(
    prediction: Tensor, x_t: Tensor, to_x0: tuple, x0_target: Tensor, arithmetic: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The definition: the sum of squares a sample, (B,), and its gradient in prediction, (B, ...)."""
    prediction, x_t, x0_target = widen(arithmetic, prediction, x_t, x0_target)
    a, b = (column(coefficient, x_t) for coefficient in to_x0)
    residual = a * x_t + b * prediction - x0_target
    return sample_sum(residual * residual), 2 * b * residual


@jit
def _residual(prediction, x_t, x0_target, a, b):
    return a * x_t + b * prediction - x0_target, b


_x_prediction_loss = register(
    "x_prediction_loss_triton(Tensor prediction, Tensor x_t, Tensor? a, float a_value, Tensor? b, float b_value, "
    "Tensor x0_target, str reduction) -> (Tensor, Tensor)",
    lambda prediction, x_t, a, a_value, b, b_value, x0_target, reduction: squared.squared_loss(
        _residual, prediction, x_t, x0_target, joined(a, a_value), joined(b, b_value), reduction
    ),
    fake,
)


def x_prediction_loss_triton(
    prediction: Tensor, x_t: Tensor, to_x0: tuple, x0_target: Tensor, arithmetic: torch.dtype, *, reduction: str
) -> Loss:
    a, b = to_x0
    return run_triton(_x_prediction_loss, prediction, x_t, *split(a), *split(b), x0_target, reduction=reduction)


def x_prediction_loss_cuda(
    prediction: Tensor, x_t: Tensor, to_x0: tuple, x0_target: Tensor, arithmetic: torch.dtype, *, reduction: str
) -> Loss:
    prediction, x_t, x0_target = layout.align(prediction, x_t, x0_target)
    x_t, x0_target = csrc.same_dtype(x_t, x0_target)
    arguments = prediction, x_t, x0_target, *split(to_x0[0]), *split(to_x0[1])
    return run_cuda(torch.ops.dpdmd.x_prediction_loss.default, *arguments, reduction=reduction)


IMPLEMENTATIONS = {
    "reference": from_reference(x_prediction_loss_reference),
    "triton": x_prediction_loss_triton,
    "cuda": x_prediction_loss_cuda,
}


def x_prediction_loss(
    prediction: Tensor,
    x_t: Tensor,
    to_x0: tuple[float | Tensor, float | Tensor],
    x0_target: Tensor,
    *,
    reduction: str = "mean",
) -> Tensor:
    """mean |a x_t + b prediction - x0_target|^2.

    prediction (B, ...): the student's raw output at x_t, the only input that receives a gradient.
    x_t (B, ...): what the student saw.  x0_target (B, ...): the clean sample to meet.
    to_x0: (a, b), each a float or (B,) float32, so that x0 = a x_t + b prediction.
    reduction: "mean"; "sum" of the squares; "none", the samples' means (B,).

    Tensors are any mix of float32, float16 and bfloat16, with any strides and any batch; arithmetic and result are
    float32, or float64 where any tensor is. The gradient has prediction's dtype. An empty batch's mean is 0.

    Raises TypeError for a dtype or type, ValueError for a shape, a device, an unknown reduction and a to_x0 of length != 2.
    """
    arithmetic = checks.tensors(prediction=prediction, x_t=x_t, x0_target=x0_target)
    checks.pair("to_x0", to_x0, ("a", "b"), prediction, arithmetic)
    checks.one_of("reduction", reduction, checks.REDUCTIONS)

    run = choose("x_prediction_loss", IMPLEMENTATIONS, prediction.device, arithmetic)
    return attach(prediction, run(prediction, x_t, to_x0, x0_target, arithmetic, reduction=reduction))
