"""The kernels of `adaln_modulate`, `gated_residual` and `gated_residual_adaln`, three cases of one form:

    h = residual [+ gate_1 (y_1 + bias_1)] [+ gate_2 (y_2 + bias_2)]
    n = norm(h);   out_j = n (1 + scale_j) + shift_j,   j up to 2

    n = (h - mean) / sqrt(var + eps)      "layer": mean and biased variance over the channels
    n = h / sqrt(mean h^2 + eps)          "rms"

    residual, y, h, out (B, S, C); gate, scale, shift (B, C); bias (C,)

The gradients, for upstream gradients dh_out and dout_j:

    dn = sum_j dout_j (1 + scale_j);   dh = dh_out + rstd (dn - mean dn - n mean(dn n)), for "rms" without mean dn
    dresidual = dh;   dy_k = gate_k dh
    dgate_k = sum_S dh (y_k + bias_k);   dbias_k = sum_B gate_k sum_S dh
    dscale_j = sum_S dout_j n;   dshift_j = sum_S dout_j

h is rounded to residual's dtype before it is normalised, as the backward pass reads the rounded h. That pass computes
mean and rstd again, and reads h, the upstream gradients and, where a gate needs a gradient, y, each once.
"""

# Kernels set and read a variable under one condition on constants.
# pyright: reportPossiblyUnboundVariable=false

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpdmd.kernels.blocks.fp8 import Quantized, converts, empty_quantized, quantize_rows_reference, quantized
from dpdmd.kernels.runtime.backend import choose
from dpdmd.kernels.runtime.formula import widen
from dpdmd.kernels.runtime.launch import by_warps, jit, kernel, tl
from dpdmd.kernels.runtime.layout import contiguous
from dpdmd.kernels.runtime.registration import register
from dpdmd.kernels.runtime.saved import Function, save, saved
from dpdmd.kernels.runtime.tile import NUM_WARPS, multiple, multiples, power_of_two

WARPS = (1, 2, 4, 8, 16)

# Tokens, and elements (32 a thread), that a program of the forward pass takes at most: several tokens share one read of
# their sample's vectors, and in a small program fewer warps wait for one another.
ROWS, TILE = 4, 8192
# Programs of the backward pass with 8 warps: as many as 132 multiprocessors hold at once (registers allow 512 threads of
# 128). Writing a program's sums costs as much as 8 tokens.
PROGRAMS = 264
MIN_CHUNK = 4
# Bytes of shared memory a warp for tokens that are loaded ahead, and the most of these tokens.
SHARED = 6 * 1024
MAX_AHEAD = 4
# Partial sums, and channels (128 bytes, the least that a read fetches), that are added at a time.
SUM_ROWS, SUM_COLUMNS = 64, 32


class Inputs(NamedTuple):
    """The arguments of the form, in the order of the registered operation.

    gates, ys, biases: one for each branch, 0 to 2.  scales, shifts: one for each result, 0 to 2.
    rms: the norm is "rms", otherwise "layer".  quantize: the results are `Quantized`, h never.
    """

    residual: Tensor
    gates: Sequence[Tensor]
    ys: Sequence[Tensor]
    biases: Sequence[Tensor | None]
    scales: Sequence[Tensor]
    shifts: Sequence[Tensor]
    rms: bool
    eps: float
    quantize: bool

    def empty_results(self) -> list[Tensor]:
        """Uninitialised: h if there are gates; all outs, or their e4m3 values and then those values' scales."""
        residual, count = self.residual, len(self.scales)
        results = [_like(residual)] if self.gates else []
        if not self.quantize:
            return results + [_like(residual) for _ in range(count)]
        values, row_scales = zip(*[empty_quantized(residual.shape, residual.device) for _ in range(count)], strict=True)
        return [*results, *values, *row_scales]


def adaln_reference(inputs: Inputs, arithmetic: torch.dtype, fork: bool = False) -> list[Tensor | Quantized]:
    """The definition: h if there are gates or `fork`, and an out for each scale and shift, in residual's dtype or
    quantised. The norm reads the rounded h."""
    dtype, h = inputs.residual.dtype, inputs.residual
    if inputs.gates:
        h = h.to(arithmetic)
        for gate, y, bias in zip(inputs.gates, inputs.ys, inputs.biases, strict=True):
            gate, y, bias = widen(arithmetic, gate[:, None], y, bias)
            h = h + gate * (y if bias is None else y + bias)
        h = h.to(dtype)
    results = [h] if inputs.gates or fork else []
    if not inputs.scales:
        return results
    n = h.to(arithmetic)
    if not inputs.rms:
        n = n - n.mean(-1, keepdim=True)
    n = n / (n.square().mean(-1, keepdim=True) + inputs.eps).sqrt()
    for scale, shift in zip(inputs.scales, inputs.shifts, strict=True):
        scale, shift = widen(arithmetic, scale[:, None], shift[:, None])
        out = n * (1 + scale) + shift
        results.append(quantize_rows_reference(out) if inputs.quantize else out.to(dtype))
    return results


def _forward_tile(C: int, quantize: bool) -> tuple[int, int, int]:
    """(ROWS, COLUMNS, warps) of the forward pass; half the tokens and warps if quantised, as warps wait for the maxima."""
    columns = max(power_of_two(C), 16)
    rows = min(ROWS, max(TILE // columns, 1))
    rows = max(rows // 2, 1) if quantize else rows
    return rows, columns, min(max(rows * columns // 1024, 1), 16)


@jit
def _sample_and_tile(tiles):
    """The sample and the tile of this program, divided in 32 bits, which is fast and enough: a grid ends at 2^31."""
    index, tiles = tl.program_id(0), tiles.to(tl.int32)
    return (index // tiles).to(tl.int64), (index % tiles).to(tl.int64)


@jit
def _read(ptr, offsets, mask):
    return tl.load(ptr + offsets, mask=mask, other=0.0).to(tl.float32)


@jit
def _plus_gated(h, gate_ptr, y_ptr, bias_ptr, y_at, vector_at, columns, mask, inside):
    """h + gate (y + bias); h if there is no gate."""
    if gate_ptr is not None:
        y = _read(y_ptr, y_at, mask)
        if bias_ptr is not None:
            y += _read(bias_ptr, columns, inside)
        h += _read(gate_ptr, vector_at, inside) * y
    return h


@jit
def _store_modulated(n, scale_ptr, shift_ptr, out_ptr, row_scale_ptr, out_at, row_at, vector_at, mask, token, inside):
    """Store n (1 + scale) + shift, quantised if row_scale_ptr is given."""
    if out_ptr is not None:
        out = n * (1 + _read(scale_ptr, vector_at, inside)) + _read(shift_ptr, vector_at, inside)
        if row_scale_ptr is not None:
            out, row_scale = quantized(out)
            tl.store(row_scale_ptr + row_at, row_scale, mask=token)
        tl.store(out_ptr + out_at, out.to(out_ptr.dtype.element_ty), mask=mask)


def _adaln_kernel(
    residual_ptr,
    gate_1_ptr,
    gate_2_ptr,
    y_1_ptr,
    y_2_ptr,
    bias_1_ptr,
    bias_2_ptr,
    scale_1_ptr,
    scale_2_ptr,
    shift_1_ptr,
    shift_2_ptr,
    h_ptr,
    out_1_ptr,
    out_2_ptr,
    row_scale_1_ptr,
    row_scale_2_ptr,
    residual_stride: tl.int64,
    residual_row: tl.int64,
    y_stride: tl.int64,
    y_row: tl.int64,
    vector_stride: tl.int64,
    S: tl.int64,
    C: tl.int64,
    eps,
    RMS: tl.constexpr,
    DIVISIBLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A program takes ROWS tokens of a sample. Pointers may be None."""
    sample, tile = _sample_and_tile(tl.cdiv(S, ROWS))
    C = multiple(C, DIVISIBLE)
    residual_row = multiple(residual_row, DIVISIBLE)
    y_row = multiple(y_row, DIVISIBLE)
    first = tile * ROWS
    rows = tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, COLUMNS)[None, :]
    token, inside = rows < S - first, columns < C
    mask = token & inside
    residual_at = sample * multiple(residual_stride, DIVISIBLE) + first * residual_row + (rows * residual_row + columns)
    y_at = sample * multiple(y_stride, DIVISIBLE) + first * y_row + (rows * y_row + columns)
    vector_at = sample * multiple(vector_stride, DIVISIBLE) + columns
    row_at = sample * S + first + rows
    out_at = (sample * S + first) * C + (rows * C + columns)
    h = _read(residual_ptr, residual_at, mask)
    h = _plus_gated(h, gate_1_ptr, y_1_ptr, bias_1_ptr, y_at, vector_at, columns, mask, inside)
    h = _plus_gated(h, gate_2_ptr, y_2_ptr, bias_2_ptr, y_at, vector_at, columns, mask, inside)
    if h_ptr is not None:
        rounded = h.to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + out_at, rounded, mask=mask)
        h = rounded.to(tl.float32)
    if out_1_ptr is not None:
        share = 1 / C.to(tl.float32)
        if not RMS:  # the mean first, then deviations from it: nothing cancels
            h = tl.where(inside, h - tl.sum(h, 1, keep_dims=True) * share, 0.0)
        n = h * tl.rsqrt(tl.sum(h * h, 1, keep_dims=True) * share + eps)
        at = out_at, row_at, vector_at, mask, token, inside
        _store_modulated(n, scale_1_ptr, shift_1_ptr, out_1_ptr, row_scale_1_ptr, *at)
        _store_modulated(n, scale_2_ptr, shift_2_ptr, out_2_ptr, row_scale_2_ptr, *at)


_adaln_kernels = by_warps(_adaln_kernel, *WARPS)


@jit
def _two_sums(a, b):
    """The sums of the rows of both (ROWS, COLUMNS), in the time of one: warps wait for one another once."""
    first, second = tl.split(tl.sum(tl.join(a, b), 1))
    return first[:, None], second[:, None]


def _adaln_backward_kernel(
    h_ptr,
    scale_1_ptr,
    scale_2_ptr,
    dh_ptr,
    dout_1_ptr,
    dout_2_ptr,
    gate_1_ptr,
    gate_2_ptr,
    y_1_ptr,
    y_2_ptr,
    dresidual_ptr,
    dy_1_ptr,
    dy_2_ptr,
    partial_ptr,
    h_stride: tl.int64,
    h_row: tl.int64,
    upstream_stride: tl.int64,
    upstream_row: tl.int64,
    y_stride: tl.int64,
    y_row: tl.int64,
    vector_stride: tl.int64,
    S: tl.int64,
    C: tl.int64,
    chunk: tl.int64,
    eps,
    SUM_OUT: tl.constexpr,
    SUM_H: tl.constexpr,
    RMS: tl.constexpr,
    DIVISIBLE: tl.constexpr,
    STAGES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A program walks `chunk` tokens of a sample, ROWS at a time. It sums over them for each channel dout n and dout
    (SUM_OUT), dh y (where there is a y) and dh (SUM_H), and writes the sums in that order to partial (sums, B, chunks of
    a sample, C). Pointers are None for what is missing or not wanted."""
    sample, tile = _sample_and_tile(tl.cdiv(S, chunk))
    C = multiple(C, DIVISIBLE)
    columns = tl.arange(0, COLUMNS)[None, :]
    inside = columns < C
    vector_at = sample * multiple(vector_stride, DIVISIBLE) + columns
    if dout_1_ptr is not None:
        plus_1 = 1 + _read(scale_1_ptr, vector_at, inside)
    if dout_2_ptr is not None:
        plus_2 = 1 + _read(scale_2_ptr, vector_at, inside)
    if dy_1_ptr is not None:
        gate_1 = _read(gate_1_ptr, vector_at, inside)
    if dy_2_ptr is not None:
        gate_2 = _read(gate_2_ptr, vector_at, inside)
    scale_1_sum = tl.zeros([1, COLUMNS], tl.float32)
    scale_2_sum = tl.zeros([1, COLUMNS], tl.float32)
    shift_1_sum = tl.zeros([1, COLUMNS], tl.float32)
    shift_2_sum = tl.zeros([1, COLUMNS], tl.float32)
    y_1_sum = tl.zeros([1, COLUMNS], tl.float32)
    y_2_sum = tl.zeros([1, COLUMNS], tl.float32)
    h_sum = tl.zeros([1, COLUMNS], tl.float32)
    h_row = multiple(h_row, DIVISIBLE)
    upstream_row = multiple(upstream_row, DIVISIBLE)
    y_row = multiple(y_row, DIVISIBLE)
    h_first = sample * multiple(h_stride, DIVISIBLE) + columns
    upstream_first = sample * multiple(upstream_stride, DIVISIBLE) + columns
    y_first = sample * multiple(y_stride, DIVISIBLE) + columns
    share = 1 / C.to(tl.float32)
    first = tile * chunk
    last = tl.minimum(first + chunk, S)
    # Not through _read: the interpreter's calls are slow.
    for row in tl.range(first, last, ROWS, num_stages=STAGES):
        rows = row + tl.arange(0, ROWS)[:, None]
        token = rows < last
        mask = token & inside
        upstream_at = upstream_first + rows * upstream_row
        y_at = y_first + rows * y_row
        out_at = (sample * S + rows) * C + columns
        if dout_1_ptr is not None:
            h = tl.load(h_ptr + h_first + rows * h_row, mask=mask, other=0.0).to(tl.float32)
            dout_1 = tl.load(dout_1_ptr + upstream_at, mask=mask, other=0.0).to(tl.float32)
            dn = dout_1 * plus_1
            if dout_2_ptr is not None:
                dout_2 = tl.load(dout_2_ptr + upstream_at, mask=mask, other=0.0).to(tl.float32)
                dn += dout_2 * plus_2
            if not RMS:
                h_total, dn_total = _two_sums(h, dn)
                h = tl.where(inside, h - h_total * share, 0.0)
                dn -= dn_total * share
            squares, products = _two_sums(h * h, dn * h)
            rstd = tl.where(token, tl.rsqrt(squares * share + eps), 0.0)
            n = h * rstd
            dh = rstd * (dn - n * (rstd * share * products))
            if SUM_OUT:
                scale_1_sum += tl.sum(dout_1 * n, 0, keep_dims=True)
                shift_1_sum += tl.sum(dout_1, 0, keep_dims=True)
                if dout_2_ptr is not None:
                    scale_2_sum += tl.sum(dout_2 * n, 0, keep_dims=True)
                    shift_2_sum += tl.sum(dout_2, 0, keep_dims=True)
            if dh_ptr is not None:
                dh += tl.load(dh_ptr + upstream_at, mask=mask, other=0.0).to(tl.float32)
        else:
            dh = tl.load(dh_ptr + upstream_at, mask=mask, other=0.0).to(tl.float32)
        if y_1_ptr is not None:
            y_1 = tl.load(y_1_ptr + y_at, mask=mask, other=0.0).to(tl.float32)
            y_1_sum += tl.sum(dh * y_1, 0, keep_dims=True)
        if y_2_ptr is not None:
            y_2 = tl.load(y_2_ptr + y_at, mask=mask, other=0.0).to(tl.float32)
            y_2_sum += tl.sum(dh * y_2, 0, keep_dims=True)
        if SUM_H:
            h_sum += tl.sum(dh, 0, keep_dims=True)
        if dresidual_ptr is not None:
            tl.store(dresidual_ptr + out_at, dh.to(dresidual_ptr.dtype.element_ty), mask=mask)
        if dy_1_ptr is not None:
            tl.store(dy_1_ptr + out_at, (gate_1 * dh).to(dy_1_ptr.dtype.element_ty), mask=mask)
        if dy_2_ptr is not None:
            tl.store(dy_2_ptr + out_at, (gate_2 * dh).to(dy_2_ptr.dtype.element_ty), mask=mask)
    if partial_ptr is not None:
        plane = tl.num_programs(0).to(tl.int64) * C
        partial = partial_ptr + tl.program_id(0).to(tl.int64) * C + columns
        if SUM_OUT:
            tl.store(partial, scale_1_sum, mask=inside)
            tl.store(partial + plane, shift_1_sum, mask=inside)
            partial += 2 * plane
            if dout_2_ptr is not None:
                tl.store(partial, scale_2_sum, mask=inside)
                tl.store(partial + plane, shift_2_sum, mask=inside)
                partial += 2 * plane
        if y_1_ptr is not None:
            tl.store(partial, y_1_sum, mask=inside)
            partial += plane
        if y_2_ptr is not None:
            tl.store(partial, y_2_sum, mask=inside)
            partial += plane
        if SUM_H:
            tl.store(partial, h_sum, mask=inside)


_adaln_backward_kernels = by_warps(_adaln_backward_kernel, *WARPS)


@jit
def _store_plane(ptr, at, sums, plane, bias_ptr, last, columns, inside, PLANES: tl.constexpr):
    """Store one of the sums (PLANES, COLUMNS), plus bias times the last of them if there is a bias."""
    if ptr is not None:
        planes = tl.arange(0, PLANES)[:, None]
        values = tl.sum(tl.where(planes == plane, sums, 0.0), 0)
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
            values += bias * tl.sum(tl.where(planes == last, sums, 0.0), 0)
        tl.store(ptr + at, values.to(ptr.dtype.element_ty), mask=inside)


@jit
def _store_bias_gradient(
    dbias_ptr,
    gate_ptr,
    vector_stride,
    partial_ptr,
    tiles,
    count,
    C,
    columns,
    inside,
    ROWS: tl.constexpr,
):
    """Store the sum of the `count` partial sums of dh, each times its sample's gate."""
    if dbias_ptr is not None:
        lanes = tl.arange(0, ROWS)[:, None]
        products = tl.zeros([ROWS, columns.shape[0]], tl.float32)
        for start in range(0, count, ROWS):
            rows = start + lanes
            mask = (rows < count) & inside[None, :]
            gate = _read(gate_ptr, rows // tiles * vector_stride + columns[None, :], mask)
            products += gate * _read(partial_ptr, rows * C + columns[None, :], mask)
        tl.store(dbias_ptr + columns, tl.sum(products, 0).to(dbias_ptr.dtype.element_ty), mask=inside)


@kernel(NUM_WARPS)
def _sum_partials_kernel(
    partial_ptr,
    gate_1_ptr,
    gate_2_ptr,
    bias_1_ptr,
    bias_2_ptr,
    dgate_1_ptr,
    dgate_2_ptr,
    dbias_1_ptr,
    dbias_2_ptr,
    dscale_1_ptr,
    dscale_2_ptr,
    dshift_1_ptr,
    dshift_2_ptr,
    vector_stride: tl.int64,
    B: tl.int64,
    tiles: tl.int64,
    C: tl.int64,
    DIVISIBLE: tl.constexpr,
    COUNT: tl.constexpr,
    PLANES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Adds up the partial sums (COUNT, B, tiles, C) of `_adaln_backward_kernel`. A program takes COLUMNS channels of a
    sample; after those of the last sample come the programs for the biases' gradients, which are sums over samples."""
    sample, block = _sample_and_tile(tl.cdiv(C, COLUMNS))
    C = multiple(C, DIVISIBLE)
    vector_stride = multiple(vector_stride, DIVISIBLE)
    columns = block * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < C
    if sample < B:
        planes = tl.arange(0, PLANES)[:, None, None]
        lanes = tl.arange(0, ROWS)[None, :, None]
        sums = tl.zeros([PLANES, ROWS, COLUMNS], tl.float32)
        for start in range(0, tiles, ROWS):
            rows = start + lanes
            mask = (planes < COUNT) & (rows < tiles) & inside[None, None, :]
            sums += _read(partial_ptr, planes * (B * tiles * C) + (sample * tiles + rows) * C + columns, mask)
        sums = tl.sum(sums, 1)
        at = sample * C + columns
        rest = COUNT - 1, columns, inside
        _store_plane(dscale_1_ptr, at, sums, 0, None, *rest, PLANES)
        _store_plane(dshift_1_ptr, at, sums, 1, None, *rest, PLANES)
        _store_plane(dscale_2_ptr, at, sums, 2, None, *rest, PLANES)
        _store_plane(dshift_2_ptr, at, sums, 3, None, *rest, PLANES)
        plane = 0
        if dscale_1_ptr is not None:
            plane += 2
        if dscale_2_ptr is not None:
            plane += 2
        _store_plane(dgate_1_ptr, at, sums, plane, bias_1_ptr, *rest, PLANES)
        _store_plane(dgate_2_ptr, at, sums, plane + 1, bias_2_ptr, *rest, PLANES)
    else:
        last = partial_ptr + (COUNT - 1) * B * tiles * C
        where = last, tiles, B * tiles, C, columns, inside
        _store_bias_gradient(dbias_1_ptr, gate_1_ptr, vector_stride, *where, ROWS)
        _store_bias_gradient(dbias_2_ptr, gate_2_ptr, vector_stride, *where, ROWS)


def _walk(tensors: list[Tensor | None]) -> tuple[list[Tensor | None], int, int]:
    """The tensors, (B, S, C) or (B, C), with dense channels and the same strides, and those strides of samples and of
    tokens. If strides differ, tensors that are not contiguous are copied. None stays None."""
    present = [tensor for tensor in tensors if tensor is not None]
    if not present:
        return tensors, 0, 0
    like, strides = present[0], present[0].stride()
    if strides[-1] == 1 and not like.is_contiguous() and all(tensor.stride() == strides for tensor in present):
        return tensors, strides[0], strides[1]
    # A dimension of size 1 may have any stride.
    return contiguous(*tensors), like.shape[1:].numel(), like.shape[2:].numel()


def _two(tensors: Sequence) -> list:
    return [*tensors, None, None][:2]


def _like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised, contiguous tensor. (torch.empty with shape, dtype and device takes 3 us longer.)"""
    return torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)


def _launch(*arguments) -> list[Tensor]:
    """arguments: the fields of `Inputs`."""
    inputs = Inputs(*arguments)
    results, residual = inputs.empty_results(), inputs.residual
    if residual.numel() == 0:
        return [result.fill_(1) if result.numel() else result for result in results]  # scales, if C is 0
    B, S, C = residual.shape
    (residual,), residual_stride, residual_row = _walk([residual])
    ys, y_stride, y_row = _walk(_two(inputs.ys))
    vectors, vector_stride, _ = _walk([*_two(inputs.gates), *_two(inputs.scales), *_two(inputs.shifts)])
    h, *outs = results if inputs.gates else [None, *results]
    count = len(inputs.scales)
    rows, columns, num_warps = _forward_tile(C, inputs.quantize)
    strides = residual_stride, residual_row, y_stride, y_row, vector_stride
    _adaln_kernels[num_warps](
        B * -(-S // rows),
        *(residual, *vectors[:2], *ys, *contiguous(*_two(inputs.biases)), *vectors[2:]),
        *(h, *_two(outs[:count]), *_two(outs[count:])),
        *(*strides, S, C, inputs.eps, inputs.rms, multiples(C, *strides), rows, columns),
    )
    return results


class BackwardInputs(NamedTuple):
    """The arguments of the backward pass, in the order of the registered operation.

    h: the norm's input; None without scales: its gradient is then dh.  ys: for the gates' gradients only.
    dh, douts: the upstream gradients.  y_dtype, vector_dtype: the dtypes of the gradients of ys, and of scales and shifts.
    residual, gate, y, bias, modulation: which gradients are wanted; the last is for scales and shifts.
    """

    h: Tensor | None
    gates: Sequence[Tensor]
    ys: Sequence[Tensor]
    biases: Sequence[Tensor | None]
    scales: Sequence[Tensor]
    dh: Tensor | None
    douts: Sequence[Tensor]
    y_dtype: torch.dtype | None
    vector_dtype: torch.dtype | None
    rms: bool
    eps: float
    residual: bool
    gate: bool
    y: bool
    bias: bool
    modulation: bool

    @property
    def like(self) -> Tensor | Any:
        """A tensor with the shape and the dtype of h."""
        return self.dh if self.h is None else self.h

    def empty_gradients(self) -> list[Tensor]:
        """Uninitialised: the wanted gradients of residual, gates, ys, biases, scales and shifts."""
        gradients = [_like(self.like)] if self.residual else []
        if self.gate:
            gradients += [_like(tensor) for tensor in self.gates]
        if self.y:
            gradients += [_like(self.like, self.y_dtype) for _ in self.gates]
        if self.bias:
            gradients += [_like(tensor) for tensor in self.biases if tensor is not None]
        if self.modulation:
            gradients += [_like(tensor, self.vector_dtype) for tensor in (*self.scales, *self.scales)]
        return gradients

    def by_input(self, gradients: list[Tensor]) -> tuple[list[Tensor | None], ...]:
        """`empty_gradients` as a list for each kind of input, with None for the unwanted."""
        rest = iter(gradients)

        def take(wanted, entries):
            return [next(rest) if wanted and entry is not None else None for entry in entries]

        return (
            *(take(self.residual, [True]), take(self.gate, self.gates), take(self.y, self.gates)),
            *(take(self.bias, self.biases), take(self.modulation, self.scales), take(self.modulation, self.scales)),
        )


def _launch_backward(*arguments) -> list[Tensor]:
    """arguments: the fields of `BackwardInputs`."""
    inputs = BackwardInputs(*arguments)
    gradients, like = inputs.empty_gradients(), inputs.like
    if like.numel() == 0 or not gradients:
        return [gradient.zero_() for gradient in gradients]
    (dresidual,), *pairs = inputs.by_input(gradients)
    dgates, dys, dbiases, dscales, dshifts = map(_two, pairs)
    B, S, C = like.shape
    K, J = len(inputs.gates), len(inputs.scales)
    (h,), h_stride, h_row = _walk([inputs.h])
    upstream, upstream_stride, upstream_row = _walk([inputs.dh, *_two(inputs.douts)])
    ys, y_stride, y_row = _walk(_two(inputs.ys))
    vectors, vector_stride, _ = _walk([*_two(inputs.gates), *_two(inputs.scales)])
    gates, scales = vectors[:2], vectors[2:]
    biases = contiguous(*_two(inputs.biases))
    sum_h = inputs.bias or (inputs.gate and any(tensor is not None for tensor in biases))
    count = 2 * J * inputs.modulation + K * inputs.gate + sum_h
    columns = max(power_of_two(C), 16)
    num_warps = min(max(columns // 256, 1), 16)  # 8 elements a thread, 16 bytes of bfloat16
    chunk = max(-(-S // max(PROGRAMS * 8 // num_warps // B, 1)), MIN_CHUNK)
    tiles = -(-S // chunk)
    partial = torch.empty(count, B, tiles, C, dtype=torch.float32, device=like.device) if count else None
    # Two tokens at a time if registers allow: the program then waits for sums half as often.
    rows = 2 if K + J == 1 else 1
    token = columns * sum(tensor.element_size() for tensor in (h, *upstream, *ys) if tensor is not None)
    ahead = min(SHARED * num_warps // (rows * token), MAX_AHEAD)
    strides = h_stride, h_row, upstream_stride, upstream_row, y_stride, y_row, vector_stride
    _adaln_backward_kernels[num_warps](
        B * tiles,
        *(h, *scales, *upstream, *gates, *ys, dresidual, *dys, partial),
        *(*strides, S, C, chunk, inputs.eps),
        *(inputs.modulation, sum_h, inputs.rms, multiples(C, *strides), 1 + ahead, rows, columns),
    )
    if count:
        _sum_partials_kernel(
            (B + inputs.bias) * -(-C // SUM_COLUMNS),
            *(partial, *gates, *biases, *dgates, *dbiases, *dscales, *dshifts),
            *(vector_stride, B, tiles, C, multiples(C, vector_stride)),
            *(count, power_of_two(count), SUM_ROWS, SUM_COLUMNS),
        )
    return gradients


_forward_operation = register(
    "adaln_triton(Tensor residual, Tensor[] gates, Tensor[] ys, Tensor?[] biases, Tensor[] scales, Tensor[] shifts, "
    "bool rms, float eps, bool quantize) -> Tensor[]",
    _launch,
    lambda *arguments: Inputs(*arguments).empty_results(),
)
_backward_operation = register(
    "adaln_backward_triton(Tensor? h, Tensor[] gates, Tensor[] ys, Tensor?[] biases, Tensor[] scales, "
    "Tensor? dh, Tensor[] douts, ScalarType? y_dtype, ScalarType? vector_dtype, bool rms, float eps, "
    "bool residual, bool gate, bool y, bool bias, bool modulation) -> Tensor[]",
    _launch_backward,
    lambda *arguments: BackwardInputs(*arguments).empty_gradients(),
)


class _Adaln(Function):
    # The older form of forward, with ctx: the newer one binds its arguments by inspection, 20 us a call.
    @staticmethod
    def forward(ctx, rms, eps, K, J, fork, residual, *rest):
        gates, ys, biases, scales, shifts = parts = _split(rest, K, K, K, J, J)
        results = _forward_operation(residual, *parts, rms, eps, False)
        if fork:
            results = [residual.view_as(residual), *results]
        ctx.set_materialize_grads(False)
        ctx.rms, ctx.eps, ctx.K, ctx.J, ctx.fork = rms, eps, K, J, fork
        # One dtype for all of a kind, wide enough for each: autograd rounds further where they differ.
        ctx.y_dtype, ctx.vector_dtype = _promoted(*ys), _promoted(*scales, *shifts)
        if K and not any(ctx.needs_input_grad[5 : 6 + 3 * K]):
            ctx.mark_non_differentiable(results[0])
        h = None if J == 0 else results[0] if K else residual
        save(ctx, h, *gates, *biases, *scales, *(ys if any(ctx.needs_input_grad[6 : 6 + K]) else ()))
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx, *upstream):
        K, J = ctx.K, ctx.J
        h, *rest = saved(ctx)
        gates, biases, scales, ys = _split(rest, K, K, J, K)
        has_dh = K > 0 or ctx.fork
        dh, douts = upstream[0] if has_dh else None, upstream[has_dh:]
        used = [j for j in range(J) if douts[j] is not None]
        if dh is None and not used:
            return (None,) * len(ctx.needs_input_grad)
        residual = ctx.needs_input_grad[5]
        gate, y, bias, scale, shift = (any(part) for part in _split(ctx.needs_input_grad[6:], K, K, K, J, J))
        scales, douts = ([entries[j] for j in used] for entries in (scales, douts))
        inputs = BackwardInputs(
            *(h if used else None, gates, ys, biases, scales, dh, douts, ctx.y_dtype, ctx.vector_dtype),
            *(ctx.rms, ctx.eps, residual and bool(used), gate, y, bias, (scale or shift) and bool(used)),
        )
        (dresidual,), dgates, dys, dbiases, dscales, dshifts = inputs.by_input(_backward_operation(*inputs))
        if residual and not used:
            dresidual = dh
        dvectors = [each[used.index(j)] if j in used else None for each in (dscales, dshifts) for j in range(J)]
        return None, None, None, None, None, dresidual, *dgates, *dys, *dbiases, *dvectors


def _promoted(*tensors: Tensor) -> torch.dtype | None:
    """The dtype that all of them promote to; None without tensors."""
    return functools.reduce(torch.promote_types, {tensor.dtype for tensor in tensors}) if tensors else None


def _split(entries: Sequence, *counts: int) -> list:
    """The first counts[0] entries, the next counts[1], ...; the last part is shorter if entries run out."""
    ends = list(itertools.accumulate(counts))
    return [entries[end - count : end] for count, end in zip(counts, ends, strict=True)]


def adaln_triton(inputs: Inputs, arithmetic: torch.dtype, fork: bool = False) -> list[Tensor | Quantized]:
    """`adaln_reference` by the kernels; a GPU without e4m3 quantises by the reference. With `fork` there are no gates: h is
    residual, and its gradient is added in the kernel."""
    residual, count = inputs.residual, len(inputs.scales)
    if inputs.quantize and not converts(residual.device.type, residual.device.index):
        if not inputs.gates:
            return adaln_reference(inputs, arithmetic, fork)
        (h,) = adaln_triton(inputs._replace(scales=(), shifts=(), quantize=False), arithmetic)
        return [h, *adaln_reference(inputs._replace(residual=h, gates=(), ys=(), biases=()), arithmetic)]
    tensors = residual, *inputs.gates, *inputs.ys, *inputs.biases, *inputs.scales, *inputs.shifts
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        forked = fork and residual.requires_grad
        results = _Adaln.apply(inputs.rms, inputs.eps, len(inputs.gates), count, forked, *tensors)
        return [residual, *results] if fork and not forked else list(results)
    results = _forward_operation(*inputs)
    if inputs.quantize:
        h, values, row_scales = _split(results, len(inputs.gates) > 0, count, count)
        results = [*h, *map(Quantized, values, row_scales)]
    return [residual, *results] if fork else results


IMPLEMENTATIONS = {"reference": adaln_reference, "triton": adaln_triton}


def run(operation: str, inputs: Inputs, arithmetic: torch.dtype, fork: bool = False) -> list[Any]:
    """`adaln_reference`, by the implementation chosen for `operation`."""
    return choose(operation, IMPLEMENTATIONS, inputs.residual.device, arithmetic)(inputs, arithmetic, fork)
