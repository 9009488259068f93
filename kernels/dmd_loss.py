"""The score-difference loss of distribution matching distillation: it moves the student's samples to the teacher's.

    v      = teacher_uncond + s (teacher - teacher_uncond)              guidance
    x_real = a x_t + b v,    x_fake = a x_t + b critic                  to_x0 = (a, b); a flow has a = 1, b = -t
    g      = (x_fake - x_real) / w = b (critic - v) / w                 w = mean |x_t - x_real| over a sample
    L      = 0.5 mean |x - stopgrad(x - g)|^2 = 0.5 mean g^2,           so dL/dx = g / numel

In a flow w = t mean |v|, and t cancels: g = (v - critic) / mean |v|. Neither form subtracts x_fake and x_real, which
share their leading digits: in bfloat16 that gives a gradient 96 % wrong at t = 0.03 where teacher and critic differ by
5 %.

Source: arXiv 2602.03139, the student's update from the renoised sample on (its score difference and its normaliser),
after DMD2 (arXiv 2405.14867).
"""

import torch
from torch import Tensor

from dpdmd.kernels import _checks
from dpdmd.kernels._formula import column, guided, sample_mean, sample_sum, widen
from dpdmd.kernels._reduction import reduce
from dpdmd.kernels.backend import choose

NORMALIZERS = ("teacher", "sample", "none")


def dmd_loss_reference(
    x: Tensor,
    teacher: Tensor,
    critic: Tensor,
    teacher_uncond: Tensor | None,
    guidance_scale: float,
    x_t: Tensor | None,
    to_x0: tuple | None,
    normalizer: str,
    arithmetic: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The definition: 0.5 sum g^2 a sample, (B,), and g (B, ...)."""
    x, teacher, critic, teacher_uncond, x_t = widen(arithmetic, x, teacher, critic, teacher_uncond, x_t)
    v = guided(teacher, teacher_uncond, guidance_scale)
    if to_x0 is None:
        g = (v - critic) / column(sample_mean(v.abs()), v)
    else:
        a, b = (column(coefficient, v) for coefficient in to_x0)
        g = b * (critic - v)
        if normalizer != "none":
            x_real = a * x_t + b * v
            origin = x_t if normalizer == "teacher" else x
            g = g / column(sample_mean((origin - x_real).abs()), v)
    g = g.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    return 0.5 * sample_sum(g * g), g


IMPLEMENTATIONS = {"reference": dmd_loss_reference}


def dmd_loss(
    x: Tensor,
    teacher: Tensor,
    critic: Tensor,
    *,
    teacher_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    x_t: Tensor | None = None,
    to_x0: tuple[float | Tensor, float | Tensor] | None = None,
    normalizer: str = "teacher",
    reduction: str = "mean",
) -> Tensor:
    """L = 0.5 mean |x - stopgrad(x - g)|^2 with g = (x_fake - x_real) / w, so that dL/dx = g / numel.

    x (B, ...): the student's sample, the only input that receives a gradient (others get none, even where they
        require one). Only the normalizer "sample" reads its values.
    teacher, critic (B, ...): raw network outputs at x_t.
    teacher_uncond (B, ...): the teacher's unconditional output, for v = teacher_uncond + guidance_scale (teacher -
        teacher_uncond). Not read where guidance_scale is 1.
    to_x0: None for flow velocities, where t cancels and x_t is not read; or (a, b), each a float or (B,) float32, so
        that x0 = a x_t + b prediction. Then x_t (B, ...) is needed.
    normalizer: w, for each sample: "teacher" = mean |x_t - x_real| (the paper's code), "sample" = mean |x - x_real|
        (DMD2), "none" = 1. Without to_x0 only "teacher" is defined.
    reduction: "mean"; "sum" (0.5 sum g^2, dL/dx = g); "none", the (B,) means of the samples, whose mean is the
        "mean".

    Tensors are float32, float16 or bfloat16, mixed as they come, of any strides and any batch; arithmetic and result
    are float32, or float64 where any tensor is. The gradient has x's dtype. An empty batch's mean is 0.

    Entries of g that are not finite become 0 in gradient and loss, as in the paper's code: a NaN in the critic's
    output loses that entry, a NaN in the teacher's its sample, and so does a w of 0.

    Raises TypeError for a dtype or type, ValueError for a shape, a device, an unknown word, guidance without
    teacher_uncond, to_x0 without x_t, and a normalizer that needs to_x0.
    """
    arithmetic = _checks.tensors(x=x, teacher=teacher, critic=critic, teacher_uncond=teacher_uncond, x_t=x_t)
    _checks.guidance(guidance_scale, "teacher_uncond", teacher_uncond)
    _checks.one_of("normalizer", normalizer, NORMALIZERS)
    _checks.one_of("reduction", reduction, _checks.REDUCTIONS)
    if to_x0 is not None:
        _checks.pair("to_x0", to_x0, ("a", "b"), x, arithmetic)
        if x_t is None:
            raise ValueError("to_x0 needs x_t, the renoised sample that the networks saw, and got None")
    elif normalizer != "teacher":
        raise ValueError(
            f"normalizer={normalizer!r} needs to_x0 = (a, b) and got None, which defines 'teacher' only; "
            f"for a flow that is to_x0=(1.0, -t)"
        )

    run = choose("dmd_loss", IMPLEMENTATIONS, x.device, arithmetic)
    with torch.no_grad():
        sums, g = run(x, teacher, critic, teacher_uncond, guidance_scale, x_t, to_x0, normalizer, arithmetic)
    return reduce(sums, g, x, reduction)
