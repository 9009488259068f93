"""The fused losses that are a sum of squares: one pass for residual, gradient and partial sums, and a small launch that
adds the sums. For Triton each loss brings its residual; csrc/squared_loss.cu has those for CUDA.
"""

import torch
from torch import Tensor

from dpdmd.kernels.losses.autograd import Loss, empty_results, factor, factor_now, run_cuda
from dpdmd.kernels.runtime import csrc, layout, tile
from dpdmd.kernels.runtime.launch import kernel, tl
from dpdmd.kernels.runtime.tile import BLOCK, NUM_WARPS, coefficient, load, multiple, program, split, store, total


@kernel(NUM_WARPS)
def _squared_loss_kernel(
    first_ptr,
    second_ptr,
    third_ptr,
    gradient_ptr,
    sums_ptr,
    first_stride: tl.int64,
    second_stride: tl.int64,
    third_stride: tl.int64,
    p,
    p_stride: tl.int64,
    q,
    q_stride: tl.int64,
    gradient_factor,
    size: tl.int64,
    tiles: tl.int64,
    blocks: tl.int64,
    RESIDUAL: tl.constexpr,
    DIVISIBLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, tile = program(tiles)
    size = multiple(size, DIVISIBLE)
    p = coefficient(p, p_stride, sample)
    q = coefficient(q, q_stride, sample)
    squares = tl.zeros([BLOCK], tl.float32)
    for block in range(blocks):
        offsets = (tile * blocks + block) * BLOCK + tl.arange(0, BLOCK)
        mask = offsets < size
        first = load(first_ptr, first_stride, sample, offsets, mask, DIVISIBLE)
        second = load(second_ptr, second_stride, sample, offsets, mask, DIVISIBLE)
        third = load(third_ptr, third_stride, sample, offsets, mask, DIVISIBLE)
        residual, slope = RESIDUAL(first, second, third, p, q)
        gradient = 2 * slope * residual * gradient_factor
        store(gradient_ptr, size, sample, offsets, gradient, mask, DIVISIBLE)
        squares += tl.where(mask, residual * residual, 0.0)  # 0 / 0 in no element must not count
    tl.store(sums_ptr + tl.program_id(0), tl.sum(squares, 0))


@kernel(NUM_WARPS)
def _total_kernel(sums_ptr, total_ptr, count: tl.int64, factor, BLOCK: tl.constexpr):
    """Each program adds `count` sums."""
    index = tl.program_id(0).to(tl.int64)
    tl.store(total_ptr + index, total(sums_ptr + index * count, count, BLOCK) * factor)


def squared_loss(
    residual, first: Tensor, second: Tensor, third: Tensor, p: tuple, q: tuple, reduction: str
) -> tuple[Tensor, Tensor]:
    """The reduced loss, and its gradient in `first` but for the rest of `factor_now`.

    residual(first, second, third, p, q), a Triton function, returns an element's residual and its derivative in
    `first`. p, q: coefficients as `tile.joined` makes them.
    """
    loss, gradient = empty_results(first, reduction)
    if first.numel() == 0:
        return loss.zero_(), gradient

    batch, size = first.shape[0], first.shape[1:].numel()
    first, second, third = layout.align(first, second, third)
    tiles, blocks = tile.tiles_and_blocks(size)
    sums = torch.empty(batch * tiles, dtype=torch.float32, device=first.device)
    _squared_loss_kernel(
        batch * tiles,
        *(first, second, third, gradient, sums),
        *(first.stride(0), second.stride(0), third.stride(0)),
        *(*p, *q),
        factor_now(first, reduction)[0],
        *(size, tiles, blocks),
        *(residual, tile.divisible(size, first, second, third), BLOCK),
    )
    totals = loss.numel()
    _total_kernel(totals, sums, loss, batch * tiles // totals, factor(first, reduction), BLOCK)
    return loss, gradient


def velocity_loss_cuda(
    v: Tensor, noise: Tensor, z: Tensor, t: float | Tensor, arithmetic: torch.dtype, *, reduction: str
) -> Loss:
    """The sum of |v - (noise - z) / (1 - t)|^2, reduced."""
    v, noise, z = layout.align(v, noise, z)
    noise, z = csrc.same_dtype(noise, z)
    return run_cuda(torch.ops.dpdmd.velocity_loss.default, v, noise, z, *split(t), reduction=reduction)
