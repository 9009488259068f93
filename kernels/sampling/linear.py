"""The launch and the gradients of operations that are linear in their tensors: coefficient times upstream."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dpdmd.kernels.runtime import layout, tile
from dpdmd.kernels.runtime.backend import choose
from dpdmd.kernels.runtime.formula import column
from dpdmd.kernels.runtime.launch import kernel, tl
from dpdmd.kernels.runtime.registration import register
from dpdmd.kernels.runtime.saved import Function
from dpdmd.kernels.runtime.tile import BLOCK, NUM_WARPS, coefficient, joined, load, multiple, program, split, store

# (plus, minus, factor) stands for (plus - minus) factor, where plus and minus are floats or tensors (B,), such as two
# times: the kernel computes their difference without another launch.
Coefficient = tuple[float | Tensor, float | Tensor, float]


def linear(
    run: Callable[..., Tensor], inputs: tuple[Tensor, ...], coefficients: tuple[Coefficient | None, ...]
) -> Tensor:
    """run(*inputs). Its gradient in an input is that input's coefficient (None: 1) times the upstream gradient."""
    if torch.is_grad_enabled():
        for tensor in inputs:
            if tensor.requires_grad:
                return _Linear.apply(run, coefficients, *inputs)
    return run(*inputs)


class _Linear(Function):
    # forward takes ctx: the newer form with setup_context binds its arguments by inspection, 20 us a call.
    @staticmethod
    def forward(ctx, run, coefficients, *inputs):
        parts = [part for by in coefficients if by is not None for part in by[:2]]
        ctx.save_for_backward(*{id(part): part for part in parts if isinstance(part, Tensor)}.values())
        ctx.coefficients = coefficients
        ctx.dtypes = [tensor.dtype for tensor in inputs]
        return run(*inputs)

    @staticmethod
    def backward(ctx, upstream):
        _ = ctx.saved_tensors  # raises where a coefficient was written to since
        each = zip(ctx.needs_input_grad[2:], ctx.coefficients, ctx.dtypes, strict=True)
        return None, None, *[multiplied(upstream, by, dtype) if needed else None for needed, by, dtype in each]


def multiplied(x: Tensor, by: Coefficient | None, dtype: torch.dtype) -> Tensor:
    """`by` (B,) times x (B, ...), in float32, rounded once to `dtype`; x itself for None. Differentiable in x."""
    if by is None:
        return x
    plus, minus, factor = by
    run = choose("multiply", IMPLEMENTATIONS, x.device, torch.float32)
    return linear(lambda x: run(x, split(plus), split(minus), float(factor), dtype), (x,), (by,))


@kernel(NUM_WARPS)
def _multiply_kernel(
    x_ptr,
    out_ptr,
    x_stride: tl.int64,
    plus,
    plus_stride: tl.int64,
    minus,
    minus_stride: tl.int64,
    factor,
    size: tl.int64,
    tiles: tl.int64,
    DIVISIBLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, tile = program(tiles)
    scale = (coefficient(plus, plus_stride, sample) - coefficient(minus, minus_stride, sample)) * factor
    offsets = tile * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < multiple(size, DIVISIBLE)
    x = load(x_ptr, x_stride, sample, offsets, mask, DIVISIBLE)
    store(out_ptr, size, sample, offsets, scale * x, mask, DIVISIBLE)


def launch_elementwise(
    run: Any, x: Tensor, others: tuple[Tensor | None, ...], coefficients: tuple, dtype: torch.dtype
) -> Tensor:
    """The result of a Triton kernel, in `dtype` and in x's shape and memory order. The kernel takes x, the others, the
    result, the strides of x and of the others, the coefficients, and size, tiles, DIVISIBLE, BLOCK."""
    out = layout.empty_like(x, dtype)
    if out.numel() == 0:
        return out
    aligned = layout.align(x, *others)
    size = out.shape[1:].numel()
    tiles = tile.tiles(size)
    strides = [tile.stride(tensor) for tensor in aligned]
    programs = out.shape[0] * tiles
    run(programs, *aligned, out, *strides, *coefficients, size, tiles, tile.multiples(size, *strides), BLOCK)
    return out


_multiply = register(
    "multiply_triton(Tensor x, Tensor? plus, float plus_value, Tensor? minus, float minus_value, float factor, "
    "ScalarType dtype) -> Tensor",
    lambda x, plus, plus_value, minus, minus_value, factor, dtype: launch_elementwise(
        _multiply_kernel, x, (), (*joined(plus, plus_value), *joined(minus, minus_value), factor), dtype
    ),
    lambda x, plus, plus_value, minus, minus_value, factor, dtype: layout.empty_like(x, dtype),
)


def _multiplied_cuda(x: Tensor, plus: tuple, minus: tuple, factor: float, dtype: torch.dtype) -> Tensor:
    (x,) = layout.align(x)
    return torch.ops.dpdmd.multiply.default(x, *minus, *plus, factor, dtype)


def _multiplied_reference(x: Tensor, plus: tuple, minus: tuple, factor: float, dtype: torch.dtype) -> Tensor:
    """The definition."""
    first, second = (value if tensor is None else column(tensor, x) for tensor, value in (plus, minus))
    return (x.float() * ((first - second) * factor)).to(dtype)


IMPLEMENTATIONS = {
    "reference": _multiplied_reference,
    "triton": lambda x, plus, minus, factor, dtype: _multiply(x, *plus, *minus, factor, dtype),
    "cuda": _multiplied_cuda,
}
