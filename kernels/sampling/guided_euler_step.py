"""Classifier-free guidance and one Euler step of a flow.

    z_{t'} = z_t + (t' - t) v,   v = v_uncond + s (v_cond - v_uncond)

Source: arXiv 2602.03139, the teacher's rollout (with guidance) and the student's (without).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dpdmd.kernels.runtime import checks, csrc, layout
from dpdmd.kernels.runtime.backend import choose
from dpdmd.kernels.runtime.formula import column, guided, widen
from dpdmd.kernels.runtime.launch import kernel, tl
from dpdmd.kernels.runtime.registration import register
from dpdmd.kernels.runtime.tile import NUM_WARPS, coefficient, joined, load, multiple, program, split, store
from dpdmd.kernels.sampling.linear import launch_elementwise, linear


class Step(NamedTuple):
    """The arguments of `guided_euler_step` beside x. v_uncond is None where guidance_scale is 1."""

    v: Tensor
    v_uncond: Tensor | None
    t: float | Tensor
    t_next: float | Tensor
    guidance_scale: float


def guided_euler_step_reference(x: Tensor, step: Step, arithmetic: torch.dtype) -> Tensor:
    """The definition. The result has x's dtype."""
    wide_x, v, v_uncond = widen(arithmetic, x, step.v, step.v_uncond)
    return (wide_x + column(step.t_next - step.t, x) * guided(v, v_uncond, step.guidance_scale)).to(x.dtype)


@kernel(NUM_WARPS)
def _guided_euler_step_kernel(
    x_ptr,
    v_ptr,
    uncond_ptr,
    out_ptr,
    x_stride: tl.int64,
    v_stride: tl.int64,
    uncond_stride: tl.int64,
    t,
    t_stride: tl.int64,
    t_next,
    t_next_stride: tl.int64,
    guidance_scale,
    size: tl.int64,
    tiles: tl.int64,
    DIVISIBLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, tile = program(tiles)
    size = multiple(size, DIVISIBLE)
    step = coefficient(t_next, t_next_stride, sample) - coefficient(t, t_stride, sample)
    offsets = tile * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    x = load(x_ptr, x_stride, sample, offsets, mask, DIVISIBLE)
    v = load(v_ptr, v_stride, sample, offsets, mask, DIVISIBLE)
    if uncond_ptr is not None:
        uncond = load(uncond_ptr, uncond_stride, sample, offsets, mask, DIVISIBLE)
        v = uncond + guidance_scale * (v - uncond)
    store(out_ptr, size, sample, offsets, x + step * v, mask, DIVISIBLE)


_guided_euler_step = register(
    "guided_euler_step_triton(Tensor x, Tensor v, Tensor? uncond, Tensor? t, float t_value, Tensor? t_next, "
    "float t_next_value, float guidance_scale) -> Tensor",
    lambda x, v, uncond, t, t_value, t_next, t_next_value, guidance_scale: launch_elementwise(
        _guided_euler_step_kernel,
        x,
        (v, uncond),
        (*joined(t, t_value), *joined(t_next, t_next_value), guidance_scale),
        x.dtype,
    ),
    lambda x, *arguments: layout.empty_like(x, x.dtype),
)


def _with_gradients(run: Callable[..., Tensor], x: Tensor, step: Step, times: tuple) -> Tensor:
    """run(x, v, v_uncond) with gradients. times: (t_next, t), or two times with the same difference."""
    if step.v_uncond is None:
        return linear(lambda x, v: run(x, v, None), (x, step.v), (None, (*times, 1.0)))
    scale = step.guidance_scale
    return linear(run, (x, step.v, step.v_uncond), (None, (*times, scale), (*times, 1 - scale)))


def guided_euler_step_triton(x: Tensor, step: Step, arithmetic: torch.dtype) -> Tensor:
    t, t_next = step.t, step.t_next
    if not isinstance(t, Tensor) and not isinstance(t_next, Tensor):
        t, t_next = 0.0, t_next - t  # in float64
    options = *split(t), *split(t_next), step.guidance_scale
    return _with_gradients(lambda *inputs: _guided_euler_step(*inputs, *options), x, step, (t_next, t))


def guided_euler_step_cuda(x: Tensor, step: Step, arithmetic: torch.dtype) -> Tensor:
    def run(x, v, v_uncond):
        x, v, v_uncond = layout.align(x, v, v_uncond)
        v, v_uncond = csrc.same_dtype(v, v_uncond)
        return torch.ops.dpdmd.guided_euler_step.default(
            x, v, v_uncond, step.guidance_scale, *split(step.t), *split(step.t_next)
        )

    return _with_gradients(run, x, step, (step.t_next, step.t))


IMPLEMENTATIONS = {
    "reference": guided_euler_step_reference,
    "triton": guided_euler_step_triton,
    "cuda": guided_euler_step_cuda,
}


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
    v_uncond (B, ...): the unconditional velocity. It receives a gradient; where guidance_scale is 1 it is not read.
    t, t_next: floats or (B,) float32, 1 for noise and 0 for data. They receive no gradient.

    Tensors are any mix of float32, float16 and bfloat16, with any strides and any batch; arithmetic is float32, or
    float64 where any tensor is. A rollout with x in float32 and v in bfloat16 rounds only the network's output.

    Raises TypeError for a dtype or type, ValueError for a shape, a device and guidance without v_uncond.
    """
    arithmetic = checks.tensors(x=x, v=v, v_uncond=v_uncond)
    checks.per_sample("t", t, x, arithmetic)
    checks.per_sample("t_next", t_next, x, arithmetic)
    checks.guidance(guidance_scale, "v_uncond", v_uncond)
    step = Step(v, None if guidance_scale == 1 else v_uncond, t, t_next, float(guidance_scale))
    return choose("guided_euler_step", IMPLEMENTATIONS, x.device, arithmetic)(x, step, arithmetic)
