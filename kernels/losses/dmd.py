"""The score-difference loss of distribution matching distillation: it moves the student's samples to the teacher's.

    v      = teacher_uncond + s (teacher - teacher_uncond)              guidance
    x_real = a x_t + b v,    x_fake = a x_t + b critic                  to_x0 = (a, b); a flow has a = 1, b = -t
    g      = (x_fake - x_real) / w = b (critic - v) / w                 w = mean |x_t - x_real| over a sample
    L      = 0.5 mean |x - stopgrad(x - g)|^2 = 0.5 mean g^2,           so dL/dx = g / numel

In a flow w = t mean |v|, and t cancels: g = (v - critic) / mean |v|. Neither form subtracts x_real from x_fake, which
share their leading digits: in bfloat16 such a gradient is 96 % wrong at t = 0.03 where teacher and critic differ by 5 %.

Source: arXiv 2602.03139, the student's update: score difference and normaliser, after DMD2 (arXiv 2405.14867).
"""

# Kernels set and read a variable under the same condition on constants.
# pyright: reportPossiblyUnboundVariable=false

from typing import NamedTuple

import torch
from torch import Tensor

from dpdmd.kernels.losses.autograd import (
    Loss,
    attach,
    empty_results,
    factor,
    factor_now,
    fake,
    from_reference,
    run_cuda,
    run_triton,
)
from dpdmd.kernels.runtime import checks, csrc, layout, tile
from dpdmd.kernels.runtime.backend import choose
from dpdmd.kernels.runtime.formula import column, guided, sample_mean, sample_sum, widen
from dpdmd.kernels.runtime.launch import jit, kernel, tl
from dpdmd.kernels.runtime.registration import register
from dpdmd.kernels.runtime.tile import (
    BLOCK,
    MAX_TILES,
    NUM_WARPS,
    coefficient,
    joined,
    load,
    multiple,
    program,
    split,
    store,
    stride,
    total,
)

NORMALIZERS = ("teacher", "sample", "none")
CUDA_NORMALIZERS = ("velocity", *NORMALIZERS)  # as csrc/ops.h numbers them


class Scores(NamedTuple):
    """The arguments of `dmd_loss` beside x, in the registered operation's order; a and b as `tile.split` returns them.

    uncond is None where guidance_scale is 1. x_t is None for flow velocities: then a is 1 and b is -1, as t cancels.
    """

    teacher: Tensor
    critic: Tensor
    uncond: Tensor | None
    guidance_scale: float
    x_t: Tensor | None
    a: Tensor | None
    a_value: float
    b: Tensor | None
    b_value: float
    normalizer: str

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.teacher, self.critic, self.uncond, self.x_t


def dmd_loss_reference(x: Tensor, scores: Scores, arithmetic: torch.dtype) -> tuple[Tensor, Tensor]:
    """The definition: 0.5 sum g^2 a sample, (B,), and g (B, ...)."""
    x, teacher, critic, uncond, x_t = widen(arithmetic, x, *scores.tensors)
    v = guided(teacher, uncond, scores.guidance_scale)
    # The normaliser w has no smallest value: entries divided by a w of 0 become 0 (nan_to_num below). The same division
    # stands in `_dmd_loss_kernel` and in csrc/dmd_loss.cu, and `_usable` in dpdmd/distill.py tests for a flow's w of 0.
    if x_t is None:
        g = (v - critic) / column(sample_mean(v.abs()), v)
    else:
        a, b = column(joined(scores.a, scores.a_value)[0], v), column(joined(scores.b, scores.b_value)[0], v)
        g = b * (critic - v)
        if scores.normalizer != "none":
            origin = x_t if scores.normalizer == "teacher" else x
            g = g / column(sample_mean((origin - (a * x_t + b * v)).abs()), v)
    g = g.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    return 0.5 * sample_sum(g * g), g


@jit
def _guided(
    teacher_ptr, teacher_stride, uncond_ptr, uncond_stride, scale, sample, offsets, mask, DIVISIBLE: tl.constexpr
):
    v = load(teacher_ptr, teacher_stride, sample, offsets, mask, DIVISIBLE)
    if uncond_ptr is not None:
        uncond = load(uncond_ptr, uncond_stride, sample, offsets, mask, DIVISIBLE)
        v = uncond + scale * (v - uncond)
    return v


@kernel(NUM_WARPS)
def _normalizer_kernel(
    teacher_ptr,
    uncond_ptr,
    x_t_ptr,
    origin_ptr,
    sums_ptr,
    counters_ptr,
    teacher_stride: tl.int64,
    uncond_stride: tl.int64,
    x_t_stride: tl.int64,
    origin_stride: tl.int64,
    guidance_scale,
    a,
    a_stride: tl.int64,
    b,
    b_stride: tl.int64,
    size: tl.int64,
    tiles: tl.int64,
    blocks: tl.int64,
    CONVERTED: tl.constexpr,
    DIVISIBLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Partial sums of |v|, or of |origin - x_real|. Sets the counters of the next pass to 0."""
    sample, tile = program(tiles)
    size = multiple(size, DIVISIBLE)
    a = coefficient(a, a_stride, sample)
    b = coefficient(b, b_stride, sample)
    sums = tl.zeros([BLOCK], tl.float32)
    for block in range(blocks):
        offsets = (tile * blocks + block) * BLOCK + tl.arange(0, BLOCK)
        mask = offsets < size
        y = _guided(
            *(teacher_ptr, teacher_stride, uncond_ptr, uncond_stride, guidance_scale),
            *(sample, offsets, mask, DIVISIBLE),
        )
        if CONVERTED:
            x_real = a * load(x_t_ptr, x_t_stride, sample, offsets, mask, DIVISIBLE) + b * y
            y = load(origin_ptr, origin_stride, sample, offsets, mask, DIVISIBLE) - x_real
        sums += tl.where(mask, tl.abs(y), 0.0)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(sums, 0))
    if tile == 0:
        tl.store(counters_ptr + sample, 0)


@kernel(NUM_WARPS)
def _dmd_loss_kernel(
    teacher_ptr,
    critic_ptr,
    uncond_ptr,
    normalizer_sums_ptr,
    gradient_ptr,
    sums_ptr,
    counters_ptr,
    loss_ptr,
    teacher_stride: tl.int64,
    critic_stride: tl.int64,
    uncond_stride: tl.int64,
    guidance_scale,
    b,
    b_stride: tl.int64,
    gradient_factor,
    loss_factor,
    size: tl.int64,
    tiles: tl.int64,
    blocks: tl.int64,
    PER_SAMPLE: tl.constexpr,
    DIVISIBLE: tl.constexpr,
    MAX_TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, tile = program(tiles)
    size = multiple(size, DIVISIBLE)
    b = coefficient(b, b_stride, sample)
    if normalizer_sums_ptr is not None:
        w = tl.div_rn(total(normalizer_sums_ptr + sample * tiles, tiles, MAX_TILES), size.to(tl.float32))
    squares = tl.zeros([BLOCK], tl.float32)
    for block in range(blocks):
        offsets = (tile * blocks + block) * BLOCK + tl.arange(0, BLOCK)
        mask = offsets < size
        v = _guided(
            *(teacher_ptr, teacher_stride, uncond_ptr, uncond_stride, guidance_scale),
            *(sample, offsets, mask, DIVISIBLE),
        )
        g = b * (load(critic_ptr, critic_stride, sample, offsets, mask, DIVISIBLE) - v)
        if normalizer_sums_ptr is not None:
            g = tl.div_rn(g, w)
        g = tl.where(tl.abs(g) < float("inf"), g, 0.0)  # false for NaN too
        store(gradient_ptr, size, sample, offsets, g * gradient_factor, mask, DIVISIBLE)
        squares += g * g
    tl.store(sums_ptr + tl.program_id(0), tl.sum(squares, 0))

    # The last program of a sample (of all, where the loss is one number) finds every sum written and adds them in a fixed
    # order. The barrier puts one thread's store before another's count; acquire and release do the rest.
    tl.debug_barrier()
    if PER_SAMPLE:
        group = sample
        count = tiles
    else:
        group = sample * 0
        count = tl.num_programs(0).to(tl.int64)
    if tl.atomic_add(counters_ptr + group, 1, sem="acq_rel") == count - 1:
        tl.store(loss_ptr + group, total(sums_ptr + group * tiles, count, BLOCK) * loss_factor)


def _launch(x: Tensor, *arguments) -> tuple[Tensor, Tensor]:
    """arguments: the fields of `Scores`, and the reduction."""
    *fields, reduction = arguments
    scores = Scores(*fields)
    loss, gradient = empty_results(x, reduction)
    if x.numel() == 0:
        return loss.zero_(), gradient

    batch, size = x.shape[0], x.shape[1:].numel()
    x, teacher, critic, uncond, x_t = layout.align(x, *scores.tensors)
    converted, normalizer = x_t is not None, scores.normalizer
    tiles, blocks = tile.tiles_and_blocks(size)
    programs = batch * tiles
    a, b = joined(scores.a, scores.a_value), joined(scores.b, scores.b_value)
    sums = torch.empty(2 * programs, dtype=torch.float32, device=x.device)
    counters = (torch.zeros if normalizer == "none" else torch.empty)(batch, dtype=torch.int32, device=x.device)
    normalizer_sums = None
    if normalizer != "none":
        normalizer_sums = sums[programs:]
        origin = (x_t if normalizer == "teacher" else x) if converted else None
        _normalizer_kernel(
            programs,
            *(teacher, uncond, x_t, origin, normalizer_sums, counters),
            *(stride(teacher), stride(uncond), stride(x_t), stride(origin)),
            *(scores.guidance_scale, *a, *b),
            *(size, tiles, blocks),
            *(converted, tile.divisible(size, teacher, uncond, x_t, origin), BLOCK),
        )
    _dmd_loss_kernel(
        programs,
        *(teacher, critic, uncond, normalizer_sums, gradient, sums, counters, loss),
        *(stride(teacher), stride(critic), stride(uncond)),
        *(scores.guidance_scale, *b),
        *(factor_now(x, reduction)[0], 0.5 * factor(x, reduction)),
        *(size, tiles, blocks),
        *(reduction == "none", tile.divisible(size, teacher, critic, uncond), MAX_TILES, BLOCK),
    )
    return loss, gradient


_dmd_loss = register(
    "dmd_loss_triton(Tensor x, Tensor teacher, Tensor critic, Tensor? uncond, float guidance_scale, Tensor? x_t, "
    "Tensor? a, float a_value, Tensor? b, float b_value, str normalizer, str reduction) -> (Tensor, Tensor)",
    _launch,
    fake,
)


def dmd_loss_triton(x: Tensor, scores: Scores, arithmetic: torch.dtype, *, reduction: str) -> Loss:
    return run_triton(_dmd_loss, x, *scores, reduction=reduction)


def dmd_loss_cuda(x: Tensor, scores: Scores, arithmetic: torch.dtype, *, reduction: str) -> Loss:
    x, teacher, critic, uncond, x_t = layout.align(x, *scores.tensors)
    teacher, critic, uncond = csrc.same_dtype(teacher, critic, uncond)
    normalizer = CUDA_NORMALIZERS.index("velocity" if x_t is None else scores.normalizer)
    coefficients = scores.a, scores.a_value, scores.b, scores.b_value
    arguments = x, teacher, critic, uncond, scores.guidance_scale, x_t, *coefficients, normalizer
    return run_cuda(torch.ops.dpdmd.dmd_loss.default, *arguments, reduction=reduction)


IMPLEMENTATIONS = {
    "reference": from_reference(dmd_loss_reference),
    "triton": dmd_loss_triton,
    "cuda": dmd_loss_cuda,
}


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

    x (B, ...): the student's sample, the only input that receives a gradient. Only normalizer "sample" reads its values.
    teacher, critic (B, ...): raw network outputs at x_t.
    teacher_uncond (B, ...): the teacher's unconditional output, for v = teacher_uncond + guidance_scale (teacher -
        teacher_uncond). Not read where guidance_scale is 1.
    to_x0: None for flow velocities, where t cancels and x_t is not read; or (a, b), each a float or (B,) float32, with
        x0 = a x_t + b prediction. Then x_t (B, ...) is needed.
    normalizer: w, for each sample: "teacher" = mean |x_t - x_real| (the paper's code), "sample" = mean |x - x_real|
        (DMD2), "none" = 1. Without to_x0 only "teacher" is defined.
    reduction: "mean"; "sum" (0.5 sum g^2, dL/dx = g); "none", the samples' means (B,).

    Tensors are any mix of float32, float16 and bfloat16, with any strides and any batch; arithmetic and result are
    float32, or float64 where any tensor is. The gradient has x's dtype. An empty batch's mean is 0.

    Entries of g that are not finite become 0 in gradient and loss: a NaN in the critic's output loses that entry; a NaN
    in the teacher's output, or w = 0, loses the sample. In the paper's code only NaN becomes 0: +inf and -inf stay.

    Raises TypeError for a dtype or type, ValueError for a shape, a device, an unknown word, guidance without
    teacher_uncond, to_x0 without x_t, and a normalizer that needs to_x0.
    """
    arithmetic = checks.tensors(x=x, teacher=teacher, critic=critic, teacher_uncond=teacher_uncond, x_t=x_t)
    checks.guidance(guidance_scale, "teacher_uncond", teacher_uncond)
    checks.one_of("normalizer", normalizer, NORMALIZERS)
    checks.one_of("reduction", reduction, checks.REDUCTIONS)
    if to_x0 is not None:
        checks.pair("to_x0", to_x0, ("a", "b"), x, arithmetic)
        if x_t is None:
            raise ValueError("to_x0 needs x_t, the renoised sample that the networks saw, and got None")
        a, b = to_x0
    elif normalizer != "teacher":
        raise ValueError(
            f"normalizer={normalizer!r} needs to_x0 = (a, b) and got None, which defines 'teacher' only; "
            f"for a flow that is to_x0=(1.0, -t)"
        )
    else:
        x_t, a, b = None, 1.0, -1.0

    uncond = None if guidance_scale == 1 else teacher_uncond
    scores = Scores(teacher, critic, uncond, float(guidance_scale), x_t, *split(a), *split(b), normalizer)
    run = choose("dmd_loss", IMPLEMENTATIONS, x.device, arithmetic)
    return attach(x, run(x, scores, arithmetic, reduction=reduction))
