"""The backward pass of a loss whose gradient is computed in the forward pass: gradient * (upstream * rest)."""

import torch
from torch import Tensor

from dpdmd.kernels.runtime import layout, tile
from dpdmd.kernels.runtime.backend import choose
from dpdmd.kernels.runtime.launch import kernel, tl
from dpdmd.kernels.runtime.registration import register
from dpdmd.kernels.runtime.tile import BLOCK, NUM_WARPS, load, multiple, program, store


def scaled(gradient: Tensor, upstream: Tensor, rest: float) -> Tensor:
    """The definition: gradient (B, ...) times upstream, () or (B,), in upstream's dtype, float32 or float64, rounded once."""
    # (1, ..., 1) or (B, 1, ..., 1): PyTorch would round a scale of shape () to bfloat16 before multiplying.
    scale = (upstream * rest).view(-1, *[1] * (gradient.ndim - 1))
    return (gradient * scale).to(gradient.dtype)


@kernel(NUM_WARPS)
def _scale_kernel(
    gradient_ptr,
    stride: tl.int64,
    upstream_ptr,
    upstream_stride: tl.int64,
    rest,
    size: tl.int64,
    tiles: tl.int64,
    DIVISIBLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, tile = program(tiles)
    size = multiple(size, DIVISIBLE)
    scale = tl.load(upstream_ptr + sample * upstream_stride) * rest
    if scale != 1.0:  # else the gradient is not read
        offsets = tile * BLOCK + tl.arange(0, BLOCK)
        mask = offsets < size
        gradient = load(gradient_ptr, stride, sample, offsets, mask, DIVISIBLE)
        store(gradient_ptr, stride, sample, offsets, gradient * scale, mask, DIVISIBLE)


def _launch(gradient: Tensor, upstream: Tensor, rest: float) -> None:
    batch, size = gradient.shape[0], gradient.shape[1:].numel()
    tiles = tile.tiles(size)
    _scale_kernel(
        batch * tiles,
        *(gradient, gradient.stride(0)),
        *(upstream, upstream.stride(0) if upstream.ndim else 0, rest),
        *(size, tiles, tile.divisible(size, gradient), BLOCK),
    )


_scale_in_place = register(
    "scale_in_place_triton(Tensor(a!) gradient, Tensor upstream, float rest) -> ()",
    _launch,
    lambda *arguments: None,
)


def scaled_triton(gradient: Tensor, upstream: Tensor, rest: float) -> Tensor:
    if gradient.numel() == 0:
        return gradient
    (gradient,) = layout.align(gradient)
    _scale_in_place(gradient, upstream, float(rest))
    return gradient


def scaled_cuda(gradient: Tensor, upstream: Tensor, rest: float) -> Tensor:
    torch.ops.dpdmd.scale_.default(gradient, upstream, rest)
    return gradient


IMPLEMENTATIONS = {"reference": scaled, "triton": scaled_triton, "cuda": scaled_cuda}


def scaled_in_place(gradient: Tensor, upstream: Tensor, rest: float) -> Tensor:
    """As `scaled`, but may overwrite `gradient`; a fused kernel does not touch it where the scale is 1."""
    return choose("scale", IMPLEMENTATIONS, gradient.device, upstream.dtype)(gradient, upstream, rest)
