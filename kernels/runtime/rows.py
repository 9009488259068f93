"""Tensors (..., C) for kernels that work on rows of C elements, dense in memory; column sums; matrix products.

Rows have one stride or two: a slice of a sequence, such as attention's output for the image alone, has one stride from
token to token and another from sample to sample. Such slices are read in place.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dpdmd.kernels.runtime.launch import jit, kernel, tl
from dpdmd.kernels.runtime.registration import register
from dpdmd.kernels.runtime.tile import NUM_WARPS, multiple


class Rows(NamedTuple):
    """Row r starts at element r // inner * outer_stride + r % inner * stride of `tensor`."""

    tensor: Tensor
    num_rows: int
    inner: int
    outer_stride: int
    stride: int

    @property
    def nested(self) -> bool:
        """Whether there are two strides. With one, row r starts at r * stride."""
        return self.inner < self.num_rows

    @property
    def divisible(self) -> bool:
        """Whether every row starts at a multiple of 16 elements, so that accesses can be 16 bytes wide."""
        return self.stride % 16 == 0 and (self.outer_stride % 16 == 0 or not self.nested)


def rows(x: Tensor) -> Rows:
    """The rows of x (..., C), C > 0. Copies x where C is not dense or the rows have more than two strides."""
    size = x.shape[-1]
    count = x.numel() // size
    if not x.is_contiguous():
        if levels := _levels(x):
            (_, outer_stride), (inner, stride) = levels
            return Rows(x, count, inner, outer_stride, stride)
        x = x.contiguous()
    return Rows(x, count, count, 0, size)


def _levels(x: Tensor) -> list[tuple[int, int]] | None:
    """(size, stride) of the outer and of the inner dimension of x's rows; None where there are more than two."""
    if x.stride(-1) != 1 and x.shape[-1] != 1:
        return None
    levels = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if levels and levels[-1][1] == size * stride:
            levels[-1] = (levels[-1][0] * size, stride)
        else:
            levels.append((size, stride))
    if len(levels) > 2:
        return None
    return [(1, 0)] * (2 - len(levels)) + levels


@jit
def row_starts(rows, inner, outer_stride, stride, NESTED: tl.constexpr, DIVISIBLE: tl.constexpr):
    """The elements at which these rows (int64) of a `Rows` start."""
    if NESTED:
        starts = rows // inner * multiple(outer_stride, DIVISIBLE) + rows % inner * multiple(stride, DIVISIBLE)
    else:  # a 64-bit division takes as long as the rest of an elementwise kernel
        starts = rows * multiple(stride, DIVISIBLE)
    return starts


@kernel(4)
def _chunk_sums_kernel(
    x_ptr,
    partial_ptr,
    count: tl.int64,
    columns: tl.int64,
    tiles: tl.int64,
    DIVISIBLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A program sums ROWS rows in COLUMNS columns."""
    chunk = tl.program_id(0).to(tl.int64) // tiles
    lanes = tl.program_id(0).to(tl.int64) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    columns = multiple(columns, DIVISIBLE)
    rows = chunk * ROWS + tl.arange(0, ROWS)
    mask = (rows < count)[:, None] & (lanes < columns)[None, :]
    x = tl.load(x_ptr + rows[:, None] * columns + lanes[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(partial_ptr + chunk * columns + lanes, tl.sum(x, 0), mask=lanes < columns)


@kernel(NUM_WARPS)
def _column_sums_kernel(
    partial_ptr,
    out_ptr,
    count: tl.int64,
    columns: tl.int64,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    lanes = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, count, ROWS):
        rows = start + tl.arange(0, ROWS)
        mask = (rows < count)[:, None] & (lanes < columns)[None, :]
        sums += tl.load(partial_ptr + rows[:, None] * columns + lanes[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + lanes, tl.sum(sums, 0).to(out_ptr.dtype.element_ty), mask=lanes < columns)


def column_sums(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """The column sums (C,) of partial (P, C) float32, contiguous, in a fixed order, rounded once to `dtype`."""
    count, columns = partial.shape
    out = torch.empty(columns, dtype=dtype, device=partial.device)
    # 32 columns are 128 bytes, the least that is read at once; a vector of 6144 makes 192 programs.
    _column_sums_kernel(-(-columns // 32), partial, out, count, columns, 128, 32)
    return out


def _launch_sum_rows(x: Tensor) -> Tensor:
    count, columns = x.shape
    if x.numel() == 0:
        return x.new_zeros(columns)
    ROWS, COLUMNS = 64, 128  # the fastest of twelve tiles on an H100
    chunks, tiles = -(-count // ROWS), -(-columns // COLUMNS)
    partial = torch.empty((chunks, columns), dtype=torch.float32, device=x.device)
    _chunk_sums_kernel(chunks * tiles, x, partial, count, columns, tiles, columns % 16 == 0, ROWS, COLUMNS)
    return column_sums(partial, x.dtype)


sum_rows = register("sum_rows_triton(Tensor x) -> Tensor", _launch_sum_rows, lambda x: x.new_empty(x.shape[1]))


def rows_product(x: Tensor, matrix: Tensor, **out: Tensor) -> Tensor:
    """x (B, S, K) times matrix (K, N). The samples of x, and of `out`, may have gaps between them in memory."""
    return torch.bmm(x, matrix.expand(len(x), -1, -1), **out)


def rows_weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """The sum of dy^T x (N, K) over the samples of dy (B, S, N) and x (B, S, K), rounded once: in half precision on a GPU
    each sample's product stays in float32. (Copying x is slower: 177 us against 130 for SD3.5-M, batch 4.)"""
    if x.is_cuda and x.dtype in (torch.float16, torch.bfloat16) and x.dtype == dy.dtype:
        return torch.bmm(dy.transpose(1, 2), x, out_dtype=torch.float32).sum(0).to(x.dtype)
    return dy.flatten(0, 1).t() @ x.flatten(0, 1)
