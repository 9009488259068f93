"""RMSNorm of q's and k's heads, an optional rotary embedding, and q, k, v of one or two token streams joined for attention.

    x = projection + bias                                (H heads of D for each token; q, k and v have one each)
    n = x / sqrt(mean_D(x^2) + eps) * weight             (q and k)
    y = n cos + rotate(n) sin                            (q and k, with a rotary embedding)
    rotate: (a, b) -> (-b, a) for each pair of a head's elements: (2 i, 2 i + 1), or (i, i + D / 2)

Source: arXiv 2403.03206, section 5.3.2 and figure 2 (RMSNorm of q and k, joint attention of image and text); arXiv
2104.09864, equation 34 (rotary embedding).
"""

# Kernels set and read a variable under one condition on constants; loops over streams run at least once.
# pyright: reportPossiblyUnboundVariable=false

import functools
from collections import namedtuple
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpdmd.kernels.runtime import checks
from dpdmd.kernels.runtime.backend import choose
from dpdmd.kernels.runtime.launch import jit, kernel, tl
from dpdmd.kernels.runtime.layout import contiguous
from dpdmd.kernels.runtime.registration import register
from dpdmd.kernels.runtime.saved import Function, save, saved
from dpdmd.kernels.runtime.tile import multiple, multiples, power_of_two

NUM_WARPS = 4
# Forward: 16 elements of q, k and v each for every thread, as with fewer a third of the work would be addresses; half as
# many with a rotation, whose angles fill registers.
TILE = 2048
# Backward: a program walks a sample's tokens in heads of GROUP elements in all; a step is 8 elements (16 bytes) a thread.
BACKWARD_TILE = 1024
GROUP = 512
# Loads into shared memory run two steps ahead. Without these stages ptxas (CUDA 12.8) saves registers and puts half of a
# step's loads after the first half's arithmetic: the memory's latency twice a step.
STAGES = 3
# Four programs for each of an H100's 132 multiprocessors, as many as registers allow (128 a thread): all run at once. More
# programs would write and read more partial sums.
PROGRAMS = 4 * 132
# Rows and columns of the partial sums that a program of the last launch adds at a time: 32 columns are 128 bytes.
SUM_ROWS, SUM_COLUMNS = 64, 32

PARTS = ("q", "k", "v")


class TokenStream(NamedTuple):
    """The projections of one stream of tokens (image or text) and the weights of their norms.

    qkv: (B, S, 3, H, D), from one matmul with the three weights stacked, or q, k, v (B, S, H, D) each.
    q_weight, k_weight (D,): None normalises and does not scale.
    bias: those of the three projections, (H * D,) or None each, if they are not yet added.
    """

    qkv: Tensor | tuple[Tensor, Tensor, Tensor]
    q_weight: Tensor | None = None
    k_weight: Tensor | None = None
    bias: tuple[Tensor | None, Tensor | None, Tensor | None] | None = None


def qk_norm_reference(
    streams: tuple[TokenStream, ...],
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    eps: float | None,
    arithmetic: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition. The results have the projections' dtype."""
    joint = {name: [] for name in PARTS}
    for stream in streams:
        parts = stream.qkv.unbind(2) if isinstance(stream.qkv, Tensor) else stream.qkv
        biases = stream.bias or (None, None, None)
        weights = stream.q_weight, stream.k_weight, None
        for name, x, bias, weight in zip(PARTS, parts, biases, weights, strict=True):
            dtype, heads = x.dtype, x.shape[2:]
            x = x.to(arithmetic)
            if bias is not None:
                x = x + bias.to(arithmetic).view(heads)
            if name != "v" and eps is not None:
                x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
            joint[name].append(x if weight is None else x * weight.to(arithmetic))
    q, k, v = (torch.cat(streams, dim=1) for streams in joint.values())
    if cos is not None and sin is not None:
        q, k = rotated(q, cos, sin, interleaved), rotated(k, cos, sin, interleaved)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x (B, S, H, D) rotated by the angles of cos and sin (S, D), or (S, D / 2) with one angle a pair."""
    pairs = (-1, 2) if interleaved else (2, -1)
    dim = -1 if interleaved else -2
    a, b = x.unflatten(-1, pairs).unbind(dim)
    if cos.shape[-1] != x.shape[-1]:
        cos, sin = (torch.stack([angle, angle], dim).flatten(-2) for angle in (cos, sin))
    cos, sin = (angle.detach().to(x.dtype)[:, None] for angle in (cos, sin))
    return x * cos + torch.stack([-b, a], dim).flatten(-2) * sin


# Groups of kernel arguments: pointers (or None), integers and constants. A stream's fields have the order of the kernels'
# parameters. Packed q, k and v are `part_stride` apart; it is 0 if they are separate. The stream's tokens follow `offset`
# others in the joint buffers. `tiles` programs (backward: `chunks` for each group of heads) work on a sample, and the
# stream's rows of sums begin at `row`.
_Stream = namedtuple(
    "_Stream",
    "q k v q_bias k_bias v_bias q_weight k_weight batch_stride token_stride part_stride length offset tiles",
)
_BackwardStream = namedtuple(
    "_BackwardStream",
    "q k q_bias k_bias v_bias q_weight k_weight dq dk dv "
    "batch_stride token_stride part_stride length offset chunks row",
)
_Upstream = namedtuple("_Upstream", "ptr batch_stride token_stride head_stride")
_Walk = namedtuple("_Walk", "ptr start token_stride")  # the heads of a sample, from the element `start` on
_Place = namedtuple("_Place", "sample first last offset group")  # some tokens of a stream, a group of heads
_Sums = namedtuple("_Sums", "bias_ptr weight_ptr row")
# D elements as two halves, the first elements of the pairs and the second; ONE_ANGLE: cos and sin have one a pair.
_Head = namedtuple("_Head", "D HALF INTERLEAVED ONE_ANGLE")
_Tile = namedtuple("_Tile", "H TOKENS HEADS GROUPS STAGES DIVISIBLE")


@jit
def _load(rows, mask, head):
    """The heads that start at the pointers `rows` (R, 1), in float32: the first elements of the pairs and the second ones,
    (R, HALF) each, zeros past the end. All arithmetic works on these two, so that a pair's elements are in one thread."""
    if head.INTERLEAVED:
        columns = tl.arange(0, 2 * head.HALF)[None, :]
        heads = tl.load(rows + columns, mask=mask & (columns < head.D), other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(heads, (rows.shape[0], head.HALF, 2)))
    else:
        columns = tl.arange(0, head.HALF)[None, :]
        mask = mask & (columns < head.D // 2)
        first = tl.load(rows + columns, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(rows + head.D // 2 + columns, mask=mask, other=0.0).to(tl.float32)
    return first, second


@jit
def _store(rows, pair, mask, head):
    first, second = pair[0].to(rows.dtype.element_ty), pair[1].to(rows.dtype.element_ty)
    if head.INTERLEAVED:
        columns = tl.arange(0, 2 * head.HALF)[None, :]
        heads = tl.reshape(tl.join(first, second), (rows.shape[0], 2 * head.HALF))
        tl.store(rows + columns, heads, mask=mask & (columns < head.D))
    else:
        columns = tl.arange(0, head.HALF)[None, :]
        mask = mask & (columns < head.D // 2)
        tl.store(rows + columns, first, mask=mask)
        tl.store(rows + head.D // 2 + columns, second, mask=mask)


@jit
def _load_angles(ptr, tokens, mask, head):
    """The tokens' (R, 1) cosines or sines for the first and the second elements of the pairs."""
    if head.ONE_ANGLE:
        columns = tl.arange(0, head.HALF)[None, :]
        first = tl.load(ptr + tokens * (head.D // 2) + columns, mask=mask & (columns < head.D // 2), other=0.0)
        second = first
    else:
        first, second = _load(ptr + tokens * head.D, mask, head)
    return first, second


@jit
def _plus(pair, bias_ptr, heads, mask, head):
    """The heads plus their part of the bias, if there is one."""
    first, second = pair
    if bias_ptr is not None:
        bias_first, bias_second = _load(bias_ptr + heads * head.D, mask, head)
        first, second = first + bias_first, second + bias_second
    return first, second


@jit
def _mean_of_products(pair, other, head):
    """The mean over each head: (R, 1)."""
    return tl.sum(pair[0] * other[0] + pair[1] * other[1], 1, keep_dims=True) * (1 / head.D)


@jit
def _finished(pair, weight_ptr, eps, cos, sin, mask, head):
    """Heads of q or k after norm, weight and rotation, each if given."""
    first, second = pair
    if eps is not None:
        scale = tl.rsqrt(_mean_of_products(pair, pair, head) + eps)
        first, second = first * scale, second * scale
    if weight_ptr is not None:
        # The same for every row; a vector of one row would have to be passed between threads.
        weight = _load(weight_ptr + tl.zeros([first.shape[0], 1], tl.int32), mask, head)
        first, second = first * weight[0], second * weight[1]
    if cos is not None:
        first, second = first * cos[0] - second * sin[0], second * cos[1] + first * sin[1]
    return first, second


@kernel(NUM_WARPS)
def _qk_norm_kernel(
    q1_ptr,
    k1_ptr,
    v1_ptr,
    q1_bias_ptr,
    k1_bias_ptr,
    v1_bias_ptr,
    q1_weight_ptr,
    k1_weight_ptr,
    batch_stride1: tl.int64,
    token_stride1: tl.int64,
    part_stride1: tl.int64,
    length1: tl.int64,
    offset1: tl.int64,
    tiles1: tl.int64,
    q2_ptr,
    k2_ptr,
    v2_ptr,
    q2_bias_ptr,
    k2_bias_ptr,
    v2_bias_ptr,
    q2_weight_ptr,
    k2_weight_ptr,
    batch_stride2: tl.int64,
    token_stride2: tl.int64,
    part_stride2: tl.int64,
    length2: tl.int64,
    offset2: tl.int64,
    tiles2: tl.int64,
    programs1: tl.int64,
    q_out_ptr,
    k_out_ptr,
    v_out_ptr,
    total: tl.int64,
    cos_ptr,
    sin_ptr,
    eps,
    H: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ONE_ANGLE: tl.constexpr,
    DIVISIBLE: tl.constexpr,
):
    """A program takes ROWS heads of a sample, of stream 1 or then stream 2. The joint buffers have `total` tokens."""
    program = tl.program_id(0)  # 64 bits would take three times as long to divide
    stream = _Stream(
        *(q1_ptr, k1_ptr, v1_ptr, q1_bias_ptr, k1_bias_ptr, v1_bias_ptr, q1_weight_ptr, k1_weight_ptr),
        *(batch_stride1, token_stride1, part_stride1, length1, offset1, tiles1),
    )
    if program >= programs1:
        program -= programs1.to(tl.int32)
        stream = _Stream(
            *(q2_ptr, k2_ptr, v2_ptr, q2_bias_ptr, k2_bias_ptr, v2_bias_ptr, q2_weight_ptr, k2_weight_ptr),
            *(batch_stride2, token_stride2, part_stride2, length2, offset2, tiles2),
        )
    token_stride = multiple(stream.token_stride, DIVISIBLE)
    part_stride = multiple(stream.part_stride, DIVISIBLE)

    sample = (program // stream.tiles.to(tl.int32)).to(tl.int64)
    first_row = program % stream.tiles.to(tl.int32) * ROWS
    first_token = (first_row // H).to(tl.int64)
    row = tl.arange(0, ROWS)[:, None]
    mask = first_row + row < stream.length * H
    token = (first_row % H + row) // H
    heads = (first_row % H + row) % H
    sample_start = sample * multiple(stream.batch_stride, DIVISIBLE)
    rows = sample_start + first_token * token_stride + (token * token_stride + heads * D)
    head: tl.constexpr = _Head(D, HALF, INTERLEAVED, ONE_ANGLE)
    q = _load(stream.q + rows, mask, head)
    k = _load(stream.k + part_stride + rows, mask, head)
    v = _load(stream.v + 2 * part_stride + rows, mask, head)
    cos = None
    sin = None
    if cos_ptr is not None:
        tokens = stream.offset + first_token + token
        cos = _load_angles(cos_ptr, tokens, mask, head)
        sin = _load_angles(sin_ptr, tokens, mask, head)
    q = _plus(q, stream.q_bias, heads, mask, head)
    k = _plus(k, stream.k_bias, heads, mask, head)
    v = _plus(v, stream.v_bias, heads, mask, head)
    q = _finished(q, stream.q_weight, eps, cos, sin, mask, head)
    k = _finished(k, stream.k_weight, eps, cos, sin, mask, head)
    rows = ((sample * total + stream.offset) * H + first_row) * D + row * D
    _store(q_out_ptr + rows, q, mask, head)
    _store(k_out_ptr + rows, k, mask, head)
    _store(v_out_ptr + rows, v, mask, head)


@jit
def _backward(x, bias_ptr, weight_ptr, upstream, dx, cos_ptr, sin_ptr, eps, sums, place, head, tile):
    """The gradients of q, k or v at the `_Place` place: x and dx are `_Walk`s, upstream an `_Upstream`."""
    upstream_token_stride = multiple(upstream.token_stride, tile.DIVISIBLE)
    upstream_start = (
        place.sample * multiple(upstream.batch_stride, tile.DIVISIBLE) + place.offset * upstream_token_stride
    )
    row = tl.arange(0, tile.TOKENS * tile.HEADS)[:, None]
    token = row // tile.HEADS
    heads = place.group * tile.HEADS + row % tile.HEADS
    x_rows = x.start + (token * x.token_stride + heads * head.D)
    upstream_rows = upstream_start + (
        token * upstream_token_stride + heads * multiple(upstream.head_stride, tile.DIVISIBLE)
    )
    dx_rows = dx.start + (token * dx.token_stride + heads * head.D)
    bias_first = tl.zeros([tile.TOKENS * tile.HEADS, head.HALF], tl.float32)
    bias_second = tl.zeros([tile.TOKENS * tile.HEADS, head.HALF], tl.float32)
    weight_first = tl.zeros([tile.TOKENS * tile.HEADS, head.HALF], tl.float32)
    weight_second = tl.zeros([tile.TOKENS * tile.HEADS, head.HALF], tl.float32)
    if bias_ptr is not None and eps is not None:
        bias = _load(bias_ptr + heads * head.D, heads < tile.H, head)
    if weight_ptr is not None:
        weight = _load(weight_ptr + 0 * heads, heads < tile.H, head)
    for start in tl.range(place.first, place.last, tile.TOKENS, num_stages=tile.STAGES):
        mask = (token < place.last - start) & (heads < tile.H)
        d = _load(upstream.ptr + start * upstream_token_stride + upstream_rows, mask, head)
        if eps is not None:
            y = _load(x.ptr + start * x.token_stride + x_rows, mask, head)
            if bias_ptr is not None:
                y = (y[0] + bias[0], y[1] + bias[1])
            # Past the last token d is 0, and n must not be NaN, even if eps is 0.
            scale = tl.where(mask, tl.rsqrt(_mean_of_products(y, y, head) + eps), 0.0)
            n = (y[0] * scale, y[1] * scale)
        if cos_ptr is not None:
            cos = _load_angles(cos_ptr, place.offset + start + token, mask, head)
            sin = _load_angles(sin_ptr, place.offset + start + token, mask, head)
            d = (d[0] * cos[0] + d[1] * sin[1], d[1] * cos[1] - d[0] * sin[0])
        if eps is not None:
            if sums.weight_ptr is not None and weight_ptr is not None:
                weight_first += d[0] * n[0]
                weight_second += d[1] * n[1]
            if weight_ptr is not None:
                d = (d[0] * weight[0], d[1] * weight[1])
            mean = _mean_of_products(d, n, head)
            d = ((d[0] - n[0] * mean) * scale, (d[1] - n[1] * mean) * scale)
        if sums.bias_ptr is not None and bias_ptr is not None:
            bias_first += d[0]
            bias_second += d[1]
        if dx.ptr is not None:
            _store(dx.ptr + start * dx.token_stride + dx_rows, d, mask, head)
    if sums.bias_ptr is not None and bias_ptr is not None:
        bias_first = tl.sum(tl.reshape(bias_first, (tile.TOKENS, tile.HEADS, head.HALF)), 0)
        bias_second = tl.sum(tl.reshape(bias_second, (tile.TOKENS, tile.HEADS, head.HALF)), 0)
        heads = place.group * tile.HEADS + tl.arange(0, tile.HEADS)[:, None]
        rows = sums.bias_ptr + (sums.row * tile.H + heads) * head.D
        _store(rows, (bias_first, bias_second), heads < tile.H, head)
    if sums.weight_ptr is not None and weight_ptr is not None:
        weight = (tl.sum(weight_first, 0, keep_dims=True), tl.sum(weight_second, 0, keep_dims=True))
        only = tl.zeros([1, 1], tl.int32)
        rows = sums.weight_ptr + (sums.row * tile.GROUPS + place.group) * head.D
        _store(rows + only, weight, only == 0, head)


@kernel(NUM_WARPS)
def _qk_norm_backward_kernel(
    q1_ptr,
    k1_ptr,
    q1_bias_ptr,
    k1_bias_ptr,
    v1_bias_ptr,
    q1_weight_ptr,
    k1_weight_ptr,
    dq1_ptr,
    dk1_ptr,
    dv1_ptr,
    batch_stride1: tl.int64,
    token_stride1: tl.int64,
    part_stride1: tl.int64,
    length1: tl.int64,
    offset1: tl.int64,
    chunks1: tl.int64,
    row1: tl.int64,
    q2_ptr,
    k2_ptr,
    q2_bias_ptr,
    k2_bias_ptr,
    v2_bias_ptr,
    q2_weight_ptr,
    k2_weight_ptr,
    dq2_ptr,
    dk2_ptr,
    dv2_ptr,
    batch_stride2: tl.int64,
    token_stride2: tl.int64,
    part_stride2: tl.int64,
    length2: tl.int64,
    offset2: tl.int64,
    chunks2: tl.int64,
    row2: tl.int64,
    programs1: tl.int64,
    q_upstream_ptr,
    q_stride0: tl.int64,
    q_stride1: tl.int64,
    q_stride2: tl.int64,
    k_upstream_ptr,
    k_stride0: tl.int64,
    k_stride1: tl.int64,
    k_stride2: tl.int64,
    v_upstream_ptr,
    v_stride0: tl.int64,
    v_stride1: tl.int64,
    v_stride2: tl.int64,
    cos_ptr,
    sin_ptr,
    eps,
    bias_sums_ptr,
    weight_sums_ptr,
    rows: tl.int64,
    chunk: tl.int64,
    H: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    STAGES: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ONE_ANGLE: tl.constexpr,
    DIVISIBLE: tl.constexpr,
):
    """A chunk of a sample's tokens and a group of heads: q, then k, then v. Each vector has `rows` rows of sums."""
    program = tl.program_id(0).to(tl.int64)
    stream = _BackwardStream(
        *(q1_ptr, k1_ptr, q1_bias_ptr, k1_bias_ptr, v1_bias_ptr, q1_weight_ptr, k1_weight_ptr),
        *(dq1_ptr, dk1_ptr, dv1_ptr),
        *(batch_stride1, token_stride1, part_stride1, length1, offset1, chunks1, row1),
    )
    if program >= programs1:
        program -= programs1
        stream = _BackwardStream(
            *(q2_ptr, k2_ptr, q2_bias_ptr, k2_bias_ptr, v2_bias_ptr, q2_weight_ptr, k2_weight_ptr),
            *(dq2_ptr, dk2_ptr, dv2_ptr),
            *(batch_stride2, token_stride2, part_stride2, length2, offset2, chunks2, row2),
        )
    token_stride = multiple(stream.token_stride, DIVISIBLE)
    part_stride = multiple(stream.part_stride, DIVISIBLE)

    group = program % GROUPS
    sample = program // GROUPS // stream.chunks
    first = program // GROUPS % stream.chunks * chunk
    last = tl.minimum(first + chunk, stream.length)
    row = stream.row + program // GROUPS
    here = _Place(sample, first, last, stream.offset, group)
    x_start = sample * multiple(stream.batch_stride, DIVISIBLE)
    dx_token_stride = H * D + 2 * part_stride
    dx_start = sample * stream.length * dx_token_stride
    head: tl.constexpr = _Head(D, HALF, INTERLEAVED, ONE_ANGLE)
    tile: tl.constexpr = _Tile(H, TOKENS, HEADS, GROUPS, STAGES, DIVISIBLE)
    _backward(
        *(_Walk(stream.q, x_start, token_stride), stream.q_bias, stream.q_weight),
        *(_Upstream(q_upstream_ptr, q_stride0, q_stride1, q_stride2), _Walk(stream.dq, dx_start, dx_token_stride)),
        *(cos_ptr, sin_ptr, eps, _Sums(bias_sums_ptr, weight_sums_ptr, row), here, head, tile),
    )
    x_start += part_stride
    dx_start += part_stride
    _backward(
        *(_Walk(stream.k, x_start, token_stride), stream.k_bias, stream.k_weight),
        *(_Upstream(k_upstream_ptr, k_stride0, k_stride1, k_stride2), _Walk(stream.dk, dx_start, dx_token_stride)),
        *(cos_ptr, sin_ptr, eps, _Sums(bias_sums_ptr, weight_sums_ptr, rows + row), here, head, tile),
    )
    dx_start += part_stride
    _backward(
        *(_Walk(None, 0, token_stride), stream.v_bias, None),
        *(_Upstream(v_upstream_ptr, v_stride0, v_stride1, v_stride2), _Walk(stream.dv, dx_start, dx_token_stride)),
        *(None, None, None, _Sums(bias_sums_ptr, None, 2 * rows + row), here, head, tile),
    )


@jit
def _column_sums(ptr, columns, inside, first, last, rows, WIDTH: tl.constexpr, SUM_ROWS: tl.constexpr):
    """Sums over rows [first, last) of ptr (vectors, rows, WIDTH), for columns of (vectors * WIDTH)."""
    starts = columns // WIDTH * rows * WIDTH + columns % WIDTH
    sums = tl.zeros([SUM_ROWS, columns.shape[0]], tl.float32)
    for start in range(first, last, SUM_ROWS):
        row = (start + tl.arange(0, SUM_ROWS))[:, None]
        sums += tl.load(ptr + starts[None, :] + row * WIDTH, mask=(row < last) & inside[None, :], other=0.0)
    return tl.sum(sums, 0)


@kernel(NUM_WARPS)
def _vectors_kernel(
    bias_sums_ptr,
    weight_sums_ptr,
    out_ptr,
    rows1: tl.int64,
    rows: tl.int64,
    blocks: tl.int64,
    H: tl.constexpr,
    D: tl.constexpr,
    GROUPS: tl.constexpr,
    SUM_COLUMNS: tl.constexpr,
    SUM_ROWS: tl.constexpr,
):
    """The gradients of stream 1's three biases, then of its two weights; then stream 2's."""
    program = tl.program_id(0).to(tl.int64)
    first, last = 0 * rows1, rows1
    if program >= blocks:
        first, last = rows1, rows
    columns = program % blocks * SUM_COLUMNS + tl.arange(0, SUM_COLUMNS)
    num_biases = 3 * H * D if bias_sums_ptr is not None else 0
    num_columns = num_biases + (2 * D if weight_sums_ptr is not None else 0)
    sums = tl.zeros([SUM_COLUMNS], tl.float32)
    if bias_sums_ptr is not None:
        end = tl.where(program % blocks * SUM_COLUMNS < num_biases, last, first)
        sums += _column_sums(bias_sums_ptr, columns, columns < num_biases, first, end, rows, H * D, SUM_ROWS)
    if weight_sums_ptr is not None:
        end = tl.where((program % blocks + 1) * SUM_COLUMNS > num_biases, last, first)
        inside = (columns >= num_biases) & (columns < num_columns)
        columns -= num_biases
        sums += _column_sums(
            *(weight_sums_ptr, columns, inside, first * GROUPS, end * GROUPS, rows * GROUPS, D, SUM_ROWS)
        )
        columns += num_biases
    out_ptrs = out_ptr + program // blocks * num_columns + columns
    tl.store(out_ptrs, sums.to(out_ptr.dtype.element_ty), mask=columns < num_columns)


class _Slots(NamedTuple):
    """A stream's part of the registered operations' arguments: tensors, or whether their gradients are wanted."""

    projections: Sequence[Any]  # of q, k and v; a packed one is q's, and those of k and v are None
    vectors: Sequence[Any]  # the biases of q, k and v, the weights of q and k


SLOTS = 8


def _by_stream(slots: Sequence) -> list[_Slots]:
    return [_Slots(slots[i : i + 3], slots[i + 3 : i + SLOTS]) for i in range(0, len(slots), SLOTS)]


def _vectors_needed(needed: list[_Slots]) -> tuple[bool, bool]:
    """Whether any bias, and any weight, needs a gradient."""
    return any(any(stream.vectors[:3]) for stream in needed), any(any(stream.vectors[3:]) for stream in needed)


def _readable(q: Tensor | None, k: Tensor | None, v: Tensor | None) -> tuple[list[Any], int]:
    """A stream's projections with dense heads and common strides of samples and of tokens, copied if needed; and the
    distance from q to k and from k to v if they are packed, else 0."""
    tensors = [q, k, v]
    present = [x for x in tensors if x is not None]
    if not all(x.is_contiguous() for x in present):
        strides = present[0].stride()[:2]
        if any(x.stride()[:2] != strides or not _heads_dense(x) for x in present):
            tensors = contiguous(*tensors)
    if q is not None and q.ndim == 5:
        return [tensors[0]] * 3, q.shape[3] * q.shape[4]
    return tensors, 0


def _heads_dense(x: Tensor) -> bool:
    expected = 1
    for size, stride in zip(reversed(x.shape[2:]), reversed(x.stride()[2:]), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _half(dim: int, interleaved: bool) -> int:
    """Pairs of a head in a tile. Without rotation D may be odd: then the last pair has one element."""
    return max(power_of_two(dim) // 2, 1) if interleaved else power_of_two(dim // 2)


def _launch(
    inputs: Sequence[Tensor | None], cos: Tensor | None, sin: Tensor | None, interleaved: bool, eps: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """inputs: SLOTS of each stream."""
    by_stream = _by_stream(inputs)
    out = _empty_results(by_stream)
    if out[0].numel() == 0:
        return out
    batch, _, heads, dim = out[0].shape
    half = _half(dim, interleaved)
    rows = max(TILE // (2 * half if cos is None else 4 * half), 1)
    streams, strides, offset = [], [], 0
    for stream in by_stream:
        tensors, part_stride = _readable(*stream.projections)
        length = tensors[0].shape[1]
        tiles = -(-length * heads // rows)
        strides += *tensors[0].stride()[:2], part_stride
        tensors += contiguous(*stream.vectors)
        streams.append((batch * tiles, _Stream(*(*tensors, *strides[-3:], length, offset, tiles))))
        offset += length
    for programs, *arguments in _launches(streams):
        _qk_norm_kernel(
            programs,
            *(*arguments, *out, offset, *contiguous(cos, sin), eps),
            *(heads, dim, half, rows, interleaved, cos is not None and cos.shape[1] != dim, multiples(*strides)),
        )
    return out


def _launches(streams: list[tuple[int, NamedTuple]]) -> list[tuple]:
    """Launches for the (programs, arguments) of each stream: all programs, the arguments of streams 1 and 2, the programs
    of stream 1. Two streams share one launch if they need the same compiled kernel."""
    streams = [(programs, stream) for programs, stream in streams if programs]
    kinds = [[getattr(argument, "dtype", None) for argument in stream] for _, stream in streams]
    if len(streams) == 2 and kinds[0] == kinds[1]:
        (one, first), (other, second) = streams
        return [(one + other, *first, *second, one)]
    return [(programs, *stream, *stream, programs) for programs, stream in streams]


def _empty_results(by_stream: list[_Slots]) -> tuple[Tensor, Tensor, Tensor]:
    x = by_stream[0].projections[0]
    shape = x.shape[0], sum(stream.projections[0].shape[1] for stream in by_stream), *x.shape[-2:]
    q, k, v = (torch.empty(shape, dtype=x.dtype, device=x.device) for _ in range(3))
    return q, k, v


class _BackwardInputs(NamedTuple):
    """The arguments of the backward pass, in the order of the registered operation.

    upstream: the gradients of q, k and v, None for zeros.  inputs: the `_Slots` of each stream, without projections that
        no gradient depends on.  needed: which of the slots need a gradient.
    lengths, packed: for each stream, its tokens and whether q, k and v are one tensor.  dtype: the projections'.
    """

    upstream: Sequence[Tensor | None]
    inputs: Sequence[Tensor | None]
    needed: Sequence[bool]
    cos: Tensor | None
    sin: Tensor | None
    interleaved: bool
    eps: float | None
    lengths: Sequence[int]
    packed: Sequence[bool]
    dtype: torch.dtype

    @property
    def like(self) -> Tensor:
        """A tensor of the results' shape, (B, S, H, D), and device."""
        return next(x for x in self.upstream if x is not None)

    def vector_sizes(self, biases: bool, weights: bool) -> list[int]:
        """The sizes of a stream's biases, then of its weights, each if wanted."""
        *_, heads, dim = self.like.shape
        return [heads * dim] * (3 if biases else 0) + [dim] * (2 if weights else 0)

    def empty_gradients(self) -> list[Tensor]:
        """Uninitialised: the wanted gradients of projections, then one tensor for the vectors of streams 1 and 2."""
        batch, _, heads, dim = self.like.shape
        device, needed = self.like.device, _by_stream(self.needed)
        gradients = []
        for length, packed, wanted in zip(self.lengths, self.packed, needed, strict=True):
            shape = (batch, length, 3, heads, dim) if packed else (batch, length, heads, dim)
            gradients += [torch.empty(shape, dtype=self.dtype, device=device) for x in wanted.projections if x]
        sizes = self.vector_sizes(*_vectors_needed(needed))
        if sizes:
            dtypes = {x.dtype for stream in _by_stream(self.inputs) for x in stream.vectors if x is not None}
            dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
            gradients.append(torch.empty(len(self.lengths) * sum(sizes), dtype=dtype, device=device))
        return gradients


def _launch_backward(*arguments) -> list[Tensor]:
    """arguments: the fields of `_BackwardInputs`."""
    call = _BackwardInputs(*arguments)
    gradients, like = call.empty_gradients(), call.like
    if like.numel() == 0:
        return [gradient.zero_() for gradient in gradients]
    batch, _, heads, dim = like.shape
    half = _half(dim, call.interleaved)
    heads_each = min(max(GROUP // (2 * half), 1), power_of_two(heads))
    tokens_each = max(BACKWARD_TILE // (heads_each * 2 * half), 1)
    groups = -(-heads // heads_each)
    chunk = _chunk(batch, tuple(call.lengths), groups, tokens_each)
    chunks = [-(-length // chunk) for length in call.lengths]
    rows = [batch * count for count in chunks]
    by_stream, needed = _by_stream(call.inputs), _by_stream(call.needed)
    biases, weights = _vectors_needed(needed)
    # Zeros if a vector is missing, as the kernel writes no sums for it.
    new = torch.empty if all(x is not None for stream in by_stream for x in stream.vectors) else torch.zeros
    options = {"dtype": torch.float32, "device": like.device}
    bias_sums = new((3, sum(rows), heads, dim), **options) if biases else None
    weight_sums = new((2, sum(rows), groups, dim), **options) if weights else None
    upstream = [like.new_zeros(dim).expand(like.shape) if x is None else x for x in call.upstream]
    upstream = [x if x.stride(3) == 1 else x.contiguous() for x in upstream]
    upstream = [_Upstream(x, *x.stride()[:3]) for x in upstream]
    streams, strides, made, offset = [], [s for x in upstream for s in x[1:]], iter(gradients), 0
    for i, (stream, wanted) in enumerate(zip(by_stream, needed, strict=True)):
        (q, k, _), _ = _readable(*stream.projections)
        part_stride = heads * dim if call.packed[i] else 0
        strides += *((0, 0) if q is None else q.stride()[:2]), part_stride
        of_projections = [next(made) if one else None for one in wanted.projections[: 1 if call.packed[i] else 3]]
        of_projections *= 3 // len(of_projections)
        tensors = q, k, *contiguous(*stream.vectors), *of_projections
        numbers = *strides[-3:], call.lengths[i], offset, chunks[i], sum(rows[:i])
        streams.append((rows[i] * groups, _BackwardStream(*(*tensors, *numbers))))
        offset += call.lengths[i]
    for programs, *arguments in _launches(streams):
        _qk_norm_backward_kernel(
            programs,
            *(*arguments, *(part for x in upstream for part in x)),
            *(*contiguous(call.cos, call.sin), call.eps, bias_sums, weight_sums, sum(rows), chunk),
            *(heads, dim, half, tokens_each, heads_each, groups, STAGES),
            *(call.interleaved, call.cos is not None and call.cos.shape[1] != dim, multiples(*strides)),
        )
    if biases or weights:
        blocks = -(-gradients[-1].shape[0] // (len(call.lengths) * SUM_COLUMNS))
        _vectors_kernel(
            len(call.lengths) * blocks,
            *(bias_sums, weight_sums, gradients[-1], rows[0], sum(rows), blocks),
            *(heads, dim, groups, SUM_COLUMNS, SUM_ROWS),
        )
    return gradients


@functools.cache
def _chunk(batch: int, lengths: tuple[int, ...], groups: int, tokens_each: int) -> int:
    """Tokens for a program of the backward pass: the least multiple of tokens_each with PROGRAMS programs or fewer, if any."""
    limit = max(PROGRAMS // groups, 1)
    chunk = -(-batch * sum(lengths) // (limit * tokens_each)) * tokens_each
    while chunk < max(lengths) and sum(batch * -(-length // chunk) for length in lengths) > limit:
        chunk += tokens_each
    return max(chunk, tokens_each)


_qk_norm = register(
    "qk_norm_triton(Tensor?[] inputs, Tensor? cos, Tensor? sin, bool interleaved, float? eps) "
    "-> (Tensor, Tensor, Tensor)",
    _launch,
    lambda inputs, *options: _empty_results(_by_stream(inputs)),
)
_qk_norm_backward = register(
    "qk_norm_backward_triton(Tensor?[] upstream, Tensor?[] inputs, bool[] needed, Tensor? cos, Tensor? sin, "
    "bool interleaved, float? eps, SymInt[] lengths, bool[] packed, ScalarType dtype) -> Tensor[]",
    _launch_backward,
    lambda *arguments: _BackwardInputs(*arguments).empty_gradients(),
)


class _QkNorm(Function):
    # The older form of forward, with ctx: the newer one binds its arguments by inspection, 20 us a call.
    @staticmethod
    def forward(ctx, cos, sin, interleaved, eps, *inputs):
        ctx.interleaved, ctx.eps, ctx.dtype = interleaved, eps, inputs[0].dtype
        ctx.lengths, ctx.packed = [x.shape[1] for x in inputs[::SLOTS]], [x is None for x in inputs[1::SLOTS]]
        kept = list(inputs)
        for i in range(0, len(kept), SLOTS):
            kept[i + 2] = None  # no gradient depends on v, nor on q and k where there is no norm
            if eps is None:
                kept[i] = kept[i + 1] = None
        save(ctx, cos, sin, *kept)
        ctx.set_materialize_grads(False)
        return _qk_norm(list(inputs), cos, sin, interleaved, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, *upstream):
        needed = list(ctx.needs_input_grad[4:])
        gradients = [None] * len(needed)
        if any(x is not None for x in upstream):
            cos, sin, *inputs = saved(ctx)
            call = _BackwardInputs(
                *(list(upstream), inputs, needed, cos, sin),
                *(ctx.interleaved, ctx.eps, ctx.lengths, ctx.packed, ctx.dtype),
            )
            made = _qk_norm_backward(*call)
            biases, weights = _vectors_needed(_by_stream(needed))
            sizes = call.vector_sizes(biases, weights)
            of_vectors = iter(made[-1].split(sizes * len(ctx.lengths)) if sizes else ())
            of_projections = iter(made)
            for i, wanted in enumerate(needed):
                slot = i % SLOTS
                if slot < 3:
                    gradients[i] = next(of_projections) if wanted else None
                elif biases if slot < 6 else weights:
                    vector = next(of_vectors)
                    gradients[i] = vector.to(inputs[i].dtype) if wanted else None
        return None, None, None, None, *gradients


def qk_norm_triton(
    streams: tuple[TokenStream, ...],
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    eps: float | None,
    arithmetic: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = []
    for qkv, q_weight, k_weight, bias in streams:
        inputs += (qkv, None, None) if isinstance(qkv, Tensor) else qkv
        inputs += [*(bias or (None, None, None)), q_weight, k_weight]
    eps = None if eps is None else float(eps)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        return _QkNorm.apply(cos, sin, interleaved, eps, *inputs)
    return _qk_norm(inputs, cos, sin, interleaved, eps)


IMPLEMENTATIONS = {"reference": qk_norm_reference, "triton": qk_norm_triton}


def qk_norm(*streams: TokenStream, eps: float | None = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    """(q, k, v), (B, S, H, D) each, contiguous, in the projections' dtype; S is the first stream's tokens, then the second's.
    With x = projection + bias, a head of q and k is x / sqrt(mean(x^2) + eps) * weight, and one of v is x.

    streams: one or two `TokenStream`s, whose projections have one dtype, B, H and D; any number of tokens, also 0. Every
        projection, weight and bias receives a gradient.
    eps: None for no norm, and then no weights.

    Tensors are float32, float16 or bfloat16; weights and biases may differ from the projections. Arithmetic is float32, or
    float64 where any tensor is; results are rounded once. Projections with dense heads, such as slices of a larger
    matmul's rows, are read without a copy, and so are upstream gradients with dense D.

    Saved for backward: the projections of q and k (a packed one includes v); nothing without norm. In bfloat16 that is 4
    (packed: 6) bytes for each of a token's H * D; diffusers' modules save 16.

    Raises TypeError for a dtype or type, ValueError for a shape, a device and weights without eps.
    """
    arithmetic, device, _, _ = _check(streams, eps)
    return choose("qk_norm", IMPLEMENTATIONS, device, arithmetic)(streams, None, None, True, eps, arithmetic)


def qk_norm_rope(
    *streams: TokenStream, cos: Tensor, sin: Tensor, interleaved: bool = True, eps: float | None = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """`qk_norm`, then each pair (a, b) of elements of q and k becomes (a cos - b sin, b cos + a sin).

    cos, sin (S, D) or (S, D / 2): float32, for all tokens in the results' order, with an entry for each element
        (diffusers' FLUX) or for each pair (real and imaginary part of Qwen-Image's frequencies). No gradient.
    interleaved: the pairs are (2 i, 2 i + 1), as in FLUX and Qwen-Image; otherwise (i, i + D / 2).

    Raises TypeError for a dtype or type, ValueError for a shape and a device.
    """
    arithmetic, device, length, dim = _check(streams, eps)
    if not isinstance(interleaved, bool):
        raise TypeError(f"interleaved is a {type(interleaved).__name__}; it needs to be a bool")
    if dim % 2:
        raise ValueError(f"the projections have D = {dim}; a rotary embedding needs an even one")
    for name, angle in (("cos", cos), ("sin", sin)):
        checks.floating(name, angle)
        if angle.dtype != torch.float32 and not angle.dtype == arithmetic == torch.float64:
            raise TypeError(f"{name} has dtype {angle.dtype}; it needs float32 (float64 goes with float64 tensors)")
        if angle.ndim != 2 or angle.shape[0] != length or angle.shape[1] not in (dim, dim // 2):
            raise ValueError(
                f"{name} has shape {tuple(angle.shape)}; it needs ({length}, {dim}) or ({length}, {dim // 2})"
            )
        if angle.device != device:
            raise ValueError(f"{name} is on {angle.device}; it needs to be on {device} like the projections")
    if cos.shape != sin.shape:
        raise ValueError(f"sin has shape {tuple(sin.shape)}; it needs cos's shape {tuple(cos.shape)}")
    run = choose("qk_norm_rope", IMPLEMENTATIONS, device, arithmetic)
    return run(streams, cos, sin, interleaved, eps, arithmetic)


VECTORS = ("q_weight", "k_weight", "bias of q", "bias of k", "bias of v")


def _check(streams: tuple[TokenStream, ...], eps: float | None) -> tuple[torch.dtype, torch.device, int, int]:
    """Returns the arithmetic's dtype, the device, and S and D of the results."""
    if not 1 <= len(streams) <= 2:
        raise ValueError(f"got {len(streams)} streams of tokens; it needs one or two")
    if eps is not None:
        checks.number("eps", eps)
    like, total, heads, dim, wide = None, 0, 0, 0, False
    for stream in streams:
        if not isinstance(stream, TokenStream):
            raise TypeError(f"a stream is a {type(stream).__name__}; it needs to be a TokenStream")
        qkv, q_weight, k_weight, bias = stream
        packed = isinstance(qkv, Tensor)
        if not packed and not (isinstance(qkv, (tuple, list)) and len(qkv) == 3):
            raise TypeError(f"qkv is {_described(qkv)}; it needs to be a tensor (B, S, 3, H, D), or q, k and v")
        length = None
        for name, x in (("qkv", qkv),) if packed else zip(PARTS, qkv, strict=True):
            checks.floating(name, x)
            shape = x.shape
            if len(shape) != (5 if packed else 4) or (packed and shape[2] != 3):
                wanted = "(B, S, 3, H, D)" if packed else "(B, S, H, D)"
                raise ValueError(f"{name} has shape {tuple(shape)}; it needs {wanted}")
            if like is None:
                like, dtype, device, (batch, *_, heads, dim) = x, x.dtype, x.device, shape
            if length is None:
                length = shape[1]
            if shape[0] != batch or shape[1] != length or shape[-2] != heads or shape[-1] != dim:
                raise ValueError(
                    f"{name} has shape {tuple(shape)}; it needs B, H, D = {batch}, {heads}, {dim} like the first "
                    f"projection, and S = {length} like the first of its stream"
                )
            if x.dtype != dtype:
                raise TypeError(f"{name} has dtype {x.dtype}; it needs the first projection's, {dtype}")
            if x.device != device:
                raise ValueError(f"{name} is on {x.device}; it needs to be on {device} like the first projection")
        total += shape[1]
        if bias is None:
            bias = (None, None, None)
        elif not (isinstance(bias, (tuple, list)) and len(bias) == 3):
            raise TypeError(f"bias is {_described(bias)}; it needs to be those of q, k and v")
        for name, vector in zip(VECTORS, (q_weight, k_weight, *bias), strict=True):
            if vector is None:
                continue
            checks.floating(name, vector)
            size = dim if name.endswith("weight") else heads * dim
            if vector.shape != (size,):
                raise ValueError(f"{name} has shape {tuple(vector.shape)}; it needs ({size},)")
            if vector.device != device:
                raise ValueError(f"{name} is on {vector.device}; it needs to be on {device} like the projections")
            wide = wide or vector.dtype == torch.float64
        if eps is None and not (q_weight is None and k_weight is None):
            raise ValueError("eps is None, which means no norm, but there is a weight; it needs an eps, or no weights")
    return torch.float64 if wide or dtype == torch.float64 else torch.float32, device, total, dim


def _described(value: object) -> str:
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"
