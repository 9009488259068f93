"""Classifier-free guidance and one Euler step of a flow.

    z_{t'} = z_t + (t' - t) v,   v = v_uncond + s (v_cond - v_uncond)

Source: arXiv 2602.03139, the teacher's rollout (with guidance) and the student's (without).
"""

import torch
from torch import Tensor

from dpdmd.kernels import _checks
from dpdmd.kernels._formula import column, guided, widen
from dpdmd.kernels.backend import choose


def guided_euler_step_reference(
    x: Tensor,
    v: Tensor,
    t: float | Tensor,
    t_next: float | Tensor,
    v_uncond: Tensor | None,
    guidance_scale: float,
    arithmetic: torch.dtype,
) -> Tensor:
    """The definition. The result has x's dtype."""
    wide_x, v, v_uncond = widen(arithmetic, x, v, v_uncond)
    return (wide_x + column(t_next - t, x) * guided(v, v_uncond, guidance_scale)).to(x.dtype)


IMPLEMENTATIONS = {"reference": guided_euler_step_reference}


def guided_euler_step(
    x: Tensor,
    v: Tensor,
    t: float | Tensor,
    t_next: float | Tensor,
    *,
    v_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
) -> Tensor:
    """x + (t_next - t) (v_uncond + guidance_scale (v - v_uncond)). The result has x's shape and dtype.

    x (B, ...): the sample at time t.  v (B, ...): the velocity there.  Both receive gradients.
    v_uncond (B, ...): the unconditional velocity; it receives a gradient too. Not read, nor given one, where
        guidance_scale is 1.
    t, t_next: floats or (B,) float32, 1 for noise and 0 for data. They receive no gradient.

    Tensors are float32, float16 or bfloat16, mixed as they come, of any strides and any batch; arithmetic is
    float32, or float64 where any tensor is. A rollout that keeps x in float32 and v in bfloat16 rounds nothing but
    the network's output.

    Raises TypeError for a dtype or type, ValueError for a shape, a device and guidance without v_uncond.
    """
    arithmetic = _checks.tensors(x=x, v=v, v_uncond=v_uncond)
    _checks.per_sample("t", t, x, arithmetic)
    _checks.per_sample("t_next", t_next, x, arithmetic)
    _checks.guidance(guidance_scale, "v_uncond", v_uncond)
    run = choose("guided_euler_step", IMPLEMENTATIONS, x.device, arithmetic)
    return run(x, v, t, t_next, v_uncond, guidance_scale, arithmetic)
