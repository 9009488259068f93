"""The activations of a transformer's feed-forward layers, with the bias of the linear layer before them.

    u = x + bias
    gelu_tanh:  u (1 + tanh(sqrt(2 / pi) (u + 0.044715 u^3))) / 2
    swiglu:     (first half of u) SiLU(second half of u),   SiLU(g) = g / (1 + exp(-g))

Sources: arXiv 1606.08415 (GELU, its tanh form), arXiv 2002.05202 (SwiGLU).
"""

from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpdmd.kernels.blocks.fp8 import (
    WARPS,
    Quantized,
    converts,
    empty_quantized,
    no_gradient,
    quantize_rows_reference,
    quantized,
    whole_rows,
)
from dpdmd.kernels.runtime import checks
from dpdmd.kernels.runtime.backend import choose
from dpdmd.kernels.runtime.formula import widen
from dpdmd.kernels.runtime.launch import by_warps, jit, tl
from dpdmd.kernels.runtime.layout import contiguous
from dpdmd.kernels.runtime.registration import register
from dpdmd.kernels.runtime.rows import column_sums, row_starts, rows
from dpdmd.kernels.runtime.saved import Function, save, saved
from dpdmd.kernels.runtime.tile import NUM_WARPS, multiple, power_of_two


def activation_reference(
    x: Tensor, bias: Tensor | None, form: str, quantize: bool, arithmetic: torch.dtype
) -> Tensor | Quantized:
    """The definition of form "gelu_tanh", "swiglu" or "swiglu_gate_first". Results are rounded, or quantised, once."""
    wide_x, wide_bias = widen(arithmetic, x, bias)
    u = wide_x if bias is None else wide_x + wide_bias
    if form == "gelu_tanh":
        y = F.gelu(u, approximate="tanh")
    else:
        first, second = u.chunk(2, dim=-1)
        y = first * F.silu(second) if form == "swiglu" else F.silu(first) * second
    return quantize_rows_reference(y) if quantize else y.to(x.dtype)


@jit
def _biased(x_ptr, bias_ptr, offsets, lanes, in_row, mask):
    """x + bias (ROWS, COLUMNS); 0 in lanes past the row's end."""
    u = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        u += tl.load(bias_ptr + lanes, mask=in_row, other=0.0).to(tl.float32)[None, :]
    return u


@jit
def _gelu_exponent(u):
    """2 log2(e) sqrt(2 / pi) (u + 0.044715 u^3). (1 + tanh(z)) / 2 is computed as 1 / (1 + exp(-2 z)): that has no
    cancellation, and gives 0 or 1 where the exponential overflows."""
    return u * (2.302208198144325 + 0.1029432395800235 * (u * u))


@jit
def _sigmoid(exponent):
    """1 / (1 + 2^-exponent), and 1 minus that, both accurate to float32's rounding; no exponential overflows."""
    power = tl.exp2(-tl.abs(exponent))
    larger = 1 / (1 + power)
    smaller = power * larger
    return tl.where(exponent >= 0, larger, smaller), tl.where(exponent >= 0, smaller, larger)


@jit
def _gelu_slope(u):
    sigmoid, rest = _sigmoid(_gelu_exponent(u))
    # From u^2 = 10^4 on, sigmoid * rest is 0; the minimum avoids 0 * inf.
    inner = 1.5957691216057308 + 0.21406444881780076 * tl.minimum(u * u, 1e4)
    return sigmoid + sigmoid * rest * inner * u


@jit
def _activated(x_ptr, bias_ptr, offsets, lanes, columns, in_row, mask, FORM: tl.constexpr):
    first = _biased(x_ptr, bias_ptr, offsets, lanes, in_row, mask)
    if FORM == "gelu_tanh":
        y = first / (1 + tl.exp2(-_gelu_exponent(first)))
    else:
        second = _biased(x_ptr, bias_ptr, offsets + columns, lanes + columns, in_row, mask)
        if FORM == "swiglu":
            y = first * (second / (1 + tl.exp2(-1.4426950408889634 * second)))
        else:
            y = second * (first / (1 + tl.exp2(-1.4426950408889634 * first)))
    return y


def _activation_kernel(
    x_ptr,
    bias_ptr,
    out_ptr,
    scale_ptr,
    count: tl.int64,
    inner: tl.int64,
    outer_stride: tl.int64,
    stride: tl.int64,
    columns: tl.int64,
    tiles: tl.int64,
    FORM: tl.constexpr,
    NESTED: tl.constexpr,
    DIVISIBLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A program computes ROWS x COLUMNS of the result; whole rows if it quantises (scale_ptr is not None)."""
    index = tl.program_id(0).to(tl.int64)
    rows = index // tiles * ROWS + tl.arange(0, ROWS)
    lanes = index % tiles * COLUMNS + tl.arange(0, COLUMNS)
    columns = multiple(columns, DIVISIBLE)
    in_row = lanes < columns
    mask = (rows < count)[:, None] & in_row[None, :]
    starts = row_starts(rows, inner, outer_stride, stride, NESTED, DIVISIBLE)
    y = _activated(x_ptr, bias_ptr, starts[:, None] + lanes[None, :], lanes, columns, in_row, mask, FORM)
    out_ptrs = out_ptr + (rows * columns)[:, None] + lanes[None, :]
    if scale_ptr is None:
        tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        values, scale = quantized(y)
        tl.store(out_ptrs, values, mask=mask)
        tl.store(scale_ptr + rows[:, None], scale, mask=(rows < count)[:, None])


def _activation_backward_kernel(
    x_ptr,
    bias_ptr,
    upstream_ptr,
    dx_ptr,
    partial_ptr,
    count: tl.int64,
    inner: tl.int64,
    outer_stride: tl.int64,
    stride: tl.int64,
    upstream_inner: tl.int64,
    upstream_outer_stride: tl.int64,
    upstream_stride: tl.int64,
    columns: tl.int64,
    tiles: tl.int64,
    FORM: tl.constexpr,
    NESTED: tl.constexpr,
    UPSTREAM_NESTED: tl.constexpr,
    DIVISIBLE: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A program walks CHUNK rows, ROWS at a time, in COLUMNS columns of the result. It writes dx, and the sums over its
    chunk to partial, each unless the pointer is None."""
    index = tl.program_id(0).to(tl.int64)
    chunk = index // tiles
    lanes = index % tiles * COLUMNS + tl.arange(0, COLUMNS)
    columns = multiple(columns, DIVISIBLE)
    in_row = lanes < columns
    width = columns
    if FORM != "gelu_tanh":
        width = 2 * columns
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    second_sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, CHUNK, ROWS):
        rows = chunk * CHUNK + start + tl.arange(0, ROWS)
        mask = (rows < count)[:, None] & in_row[None, :]
        offsets = row_starts(rows, inner, outer_stride, stride, NESTED, DIVISIBLE)[:, None] + lanes[None, :]
        dx_ptrs = (rows * width)[:, None] + lanes[None, :]
        upstream_starts = row_starts(
            rows, upstream_inner, upstream_outer_stride, upstream_stride, UPSTREAM_NESTED, DIVISIBLE
        )
        upstream = tl.load(upstream_ptr + upstream_starts[:, None] + lanes[None, :], mask=mask, other=0.0)
        upstream = upstream.to(tl.float32)
        first = _biased(x_ptr, bias_ptr, offsets, lanes, in_row, mask)
        if FORM == "gelu_tanh":
            first_gradient = upstream * _gelu_slope(first)
        else:
            second = _biased(x_ptr, bias_ptr, offsets + columns, lanes + columns, in_row, mask)
            gate, factor = second, first
            if FORM == "swiglu_gate_first":
                gate, factor = first, second
            sigmoid, rest = _sigmoid(1.4426950408889634 * gate)
            factor_gradient = upstream * (gate * sigmoid)
            gate_gradient = upstream * factor * (sigmoid + sigmoid * rest * gate)
            first_gradient, second_gradient = factor_gradient, gate_gradient
            if FORM == "swiglu_gate_first":
                first_gradient, second_gradient = gate_gradient, factor_gradient
            if dx_ptr is not None:
                tl.store(dx_ptr + dx_ptrs + columns, second_gradient.to(dx_ptr.dtype.element_ty), mask=mask)
            second_sums += second_gradient
        if dx_ptr is not None:
            tl.store(dx_ptr + dx_ptrs, first_gradient.to(dx_ptr.dtype.element_ty), mask=mask)
        sums += first_gradient
    if partial_ptr is not None:
        tl.store(partial_ptr + chunk * width + lanes, tl.sum(sums, 0), mask=in_row)
        if FORM != "gelu_tanh":
            tl.store(partial_ptr + chunk * width + columns + lanes, tl.sum(second_sums, 0), mask=in_row)


_activation_kernels = by_warps(_activation_kernel, *WARPS)
_activation_backward_kernels = by_warps(_activation_backward_kernel, *WARPS)


def _tile(columns: int, num_warps: int, elements: int) -> tuple[int, int, int]:
    """(ROWS, COLUMNS, warps) of a tile with `elements` a thread. 512 divides most widths; 32 is the least `_chunk`."""
    padded = min(power_of_two(columns), 512)
    return min(32 * num_warps * elements // padded, 32), padded, num_warps


def _empty_results(x: Tensor, bias: Tensor | None, form: str, quantize: bool) -> list[Tensor]:
    """Uninitialised: the result, or its values and scale."""
    shape = x.shape if form == "gelu_tanh" else (*x.shape[:-1], x.shape[-1] // 2)
    return [*empty_quantized(shape, x.device)] if quantize else [torch.empty(shape, dtype=x.dtype, device=x.device)]


def _launch(x: Tensor, bias: Tensor | None, form: str, quantize: bool) -> list[Tensor]:
    results = _empty_results(x, bias, form, quantize)
    out, scale = results[0], results[1] if quantize else None
    if out.numel() == 0:
        return [out] if scale is None else [out, scale.fill_(1.0)]
    columns = out.shape[-1]
    ROWS, COLUMNS, num_warps = whole_rows(columns) if quantize else _tile(columns, NUM_WARPS, 16)
    walk = rows(x)
    tiles = -(-columns // COLUMNS)
    _activation_kernels[num_warps](
        -(-walk.num_rows // ROWS) * tiles,
        *(walk.tensor, *contiguous(bias), out, scale, *walk[1:], columns, tiles),
        *(form, walk.nested, walk.divisible and columns % 16 == 0, ROWS, COLUMNS),
    )
    return results


def _chunk(count: int, tiles: int) -> int:
    """Rows that a program sums, with about eight programs a multiprocessor. At 128 the partial sums are 1 % of the bytes."""
    for chunk in (128, 64):
        if -(-count // chunk) * tiles >= 1024:
            return chunk
    return 32


def _launch_backward(
    x: Tensor, bias: Tensor | None, upstream: Tensor, form: str, for_x: bool, for_bias: bool
) -> list[Tensor]:
    """The gradients of x and of bias, as far as they are wanted."""
    if upstream.numel() == 0:
        return [gradient.zero_() for gradient in _empty_gradients(x, bias, upstream, form, for_x, for_bias)]
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if for_x else None
    columns = upstream.shape[-1]
    walk, upstream_walk = rows(x), rows(upstream)
    # With its sums a thread has 48 registers (GELU) or 80 (SwiGLU) at these sizes, so 40 or 24 warps fit on a
    # multiprocessor, with 40 KB in flight; twice the elements would leave 16 and 8.
    if form == "gelu_tanh":
        ROWS, COLUMNS, num_warps = _tile(columns, 8, 8 if for_bias else 16)
    else:
        ROWS, COLUMNS, num_warps = _tile(columns, 4 if for_bias else 8, 8)
    tiles = -(-columns // COLUMNS)
    chunk = _chunk(walk.num_rows, tiles) if for_bias else ROWS
    chunks = -(-walk.num_rows // chunk)
    partial = torch.empty((chunks, x.shape[-1]), dtype=torch.float32, device=x.device) if for_bias else None
    _activation_backward_kernels[num_warps](
        chunks * tiles,
        *(walk.tensor, *contiguous(bias), upstream_walk.tensor, dx, partial),
        *(*walk[1:], *upstream_walk[2:], columns, tiles),
        *(form, walk.nested, upstream_walk.nested),
        *(walk.divisible and upstream_walk.divisible and columns % 16 == 0, chunk, ROWS, COLUMNS),
    )
    gradients = dx, None if partial is None or bias is None else column_sums(partial, bias.dtype)
    return [gradient for gradient in gradients if gradient is not None]


def _empty_gradients(x, bias, upstream, form, for_x, for_bias) -> list[Tensor]:
    wanted = (x, for_x), (bias, for_bias)
    return [torch.empty(each.shape, dtype=each.dtype, device=each.device) for each, needed in wanted if needed]


_activation = register(
    "activation_triton(Tensor x, Tensor? bias, str form, bool quantize) -> Tensor[]", _launch, _empty_results
)
_activation_backward = register(
    "activation_backward_triton(Tensor x, Tensor? bias, Tensor upstream, str form, bool for_x, bool for_bias) "
    "-> Tensor[]",
    _launch_backward,
    _empty_gradients,
)


class _Activation(Function):
    # The older form of forward, with ctx: the newer one binds its arguments by inspection, 20 us a call.
    @staticmethod
    def forward(ctx, x, bias, form):
        save(ctx, x, bias)
        ctx.form = form
        return _activation(x, bias, form, False)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        x, bias = saved(ctx)
        for_x, for_bias, _ = ctx.needs_input_grad
        gradients = _activation_backward(x, bias, upstream, ctx.form, for_x, for_bias)
        return gradients[0] if for_x else None, gradients[-1] if for_bias else None, None


def activation_triton(
    x: Tensor, bias: Tensor | None, form: str, quantize: bool, arithmetic: torch.dtype
) -> Tensor | Quantized:
    if quantize:
        if not converts(x.device.type, x.device.index):
            return activation_reference(x, bias, form, quantize, arithmetic)
        return Quantized(*_activation(x, bias, form, True))
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return _Activation.apply(x, bias, form)
    return _activation(x, bias, form, False)[0]


IMPLEMENTATIONS = {"reference": activation_reference, "triton": activation_triton}


@overload
def gelu_tanh(x: Tensor, bias: Tensor | None = ...) -> Tensor: ...
@overload
def gelu_tanh(x: Tensor, bias: Tensor | None = ..., *, quantize: bool) -> Tensor | Quantized: ...
def gelu_tanh(x: Tensor, bias: Tensor | None = None, *, quantize: bool = False) -> Tensor | Quantized:
    """GELU of x + bias, in its tanh form. The result has x's shape and dtype.

    x (..., N): a linear layer's output without its bias.  bias (N,).  Both receive gradients, in one pass.
    quantize: return the rows as a `Quantized`, made from the float32 results, for an FP8 product. No gradient.

    Tensors are float32, float16 or bfloat16, in any mix, of any strides and any size; arithmetic is float32, or float64
    where any tensor is. Saved for backward: x and bias, as many bytes as eager keeps.

    Raises TypeError for a dtype or type, ValueError for a shape, a device, and quantize if a tensor needs a gradient.
    """
    arithmetic = _check(x, bias, quantize)
    run = choose("gelu_tanh", IMPLEMENTATIONS, x.device, arithmetic)
    return run(x, bias, "gelu_tanh", quantize, arithmetic)


@overload
def swiglu(x: Tensor, bias: Tensor | None = ..., *, gate_first: bool = ...) -> Tensor: ...
@overload
def swiglu(x: Tensor, bias: Tensor | None = ..., *, gate_first: bool = ..., quantize: bool) -> Tensor | Quantized: ...
def swiglu(
    x: Tensor, bias: Tensor | None = None, *, gate_first: bool = False, quantize: bool = False
) -> Tensor | Quantized:
    """One half of x + bias times SiLU of the other: (..., N) in x's dtype.

    x (..., 2 N), bias (2 N,): dtypes and strides as in `gelu_tanh`.
    quantize: as in `gelu_tanh`.
    gate_first: SiLU(first half) times the second, as in FLUX.2 and LLaMA; by default the first half times SiLU(second
        half), as in diffusers' SwiGLU.

    Saved for backward: x and bias. Eager also keeps SiLU's result, 2 N bytes a row in bfloat16.

    Raises as `gelu_tanh`; ValueError also for an odd last dimension of x.
    """
    arithmetic = _check(x, bias, quantize)
    if x.shape[-1] % 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; it needs two halves: (..., 2 N)")
    run = choose("swiglu", IMPLEMENTATIONS, x.device, arithmetic)
    return run(x, bias, "swiglu_gate_first" if gate_first else "swiglu", quantize, arithmetic)


def _check(x: Tensor, bias: Tensor | None, quantize: bool) -> torch.dtype:
    """Returns the dtype of the arithmetic."""
    checks.floating("x", x)
    if x.ndim == 0:
        raise ValueError("x has shape (); it needs a dimension of channels: (..., N)")
    wide = x.dtype == torch.float64
    if bias is not None:
        checks.floating("bias", bias)
        wide = wide or bias.dtype == torch.float64
        if bias.shape != x.shape[-1:]:
            raise ValueError(f"bias has shape {tuple(bias.shape)}; with x {tuple(x.shape)} it needs ({x.shape[-1]},)")
        if bias.device != x.device:
            raise ValueError(f"bias is on {bias.device}; it needs to be on x's device {x.device}")
    if quantize:
        no_gradient(x=x, bias=bias)
    return torch.float64 if wide else torch.float32
