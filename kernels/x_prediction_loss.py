"""The diversity loss of a noise-predicting model, in the space of clean samples.

    L = mean |a x_t + b prediction - x0_target|^2

Where a noise-predicting model starts at alphabar near 0, a = 1 / sqrt(alphabar) and b = -sqrt(1 - alphabar) /
sqrt(alphabar).

Source: arXiv 2602.03139, L_div for diffusion models (SDXL): x0_target is the teacher's clean estimate after its K
steps.
"""

import torch
from torch import Tensor

from dpdmd.kernels import _checks
from dpdmd.kernels._formula import column, sample_sum, widen
from dpdmd.kernels._reduction import reduce
from dpdmd.kernels.backend import choose


def x_prediction_loss_reference(
    prediction: Tensor, x_t: Tensor, to_x0: tuple, x0_target: Tensor, arithmetic: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The definition: the sum of squares a sample, (B,), and its gradient in prediction, (B, ...)."""
    prediction, x_t, x0_target = widen(arithmetic, prediction, x_t, x0_target)
    a, b = (column(coefficient, x_t) for coefficient in to_x0)
    residual = a * x_t + b * prediction - x0_target
    return sample_sum(residual * residual), 2 * b * residual


IMPLEMENTATIONS = {"reference": x_prediction_loss_reference}


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
    reduction: "mean"; "sum" of the squares; "none", the (B,) means of the samples, whose mean is the "mean".

    Tensors are float32, float16 or bfloat16, mixed as they come, of any strides and any batch; arithmetic and result
    are float32, or float64 where any tensor is. The gradient has prediction's dtype. An empty batch's mean is 0.

    Raises TypeError for a dtype or type, ValueError for a shape, a device, an unknown reduction and a to_x0 that is
    no pair.
    """
    arithmetic = _checks.tensors(prediction=prediction, x_t=x_t, x0_target=x0_target)
    _checks.pair("to_x0", to_x0, ("a", "b"), prediction, arithmetic)
    _checks.one_of("reduction", reduction, _checks.REDUCTIONS)

    run = choose("x_prediction_loss", IMPLEMENTATIONS, prediction.device, arithmetic)
    with torch.no_grad():
        sums, direction = run(prediction, x_t, to_x0, x0_target, arithmetic)
    return reduce(sums, direction, prediction, reduction)
