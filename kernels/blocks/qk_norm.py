"""RMSNorm of each head of q and k, an optional rotary embedding, and q, k, v of one or two streams of tokens written
into the joint buffers that attention reads.

    x = projection + bias                                (H heads of D for each token; q, k and v have one each)
    n = x / sqrt(mean_D(x^2) + eps) * weight             (q and k)
    y = n cos + rotate(n) sin                            (q and k, where there is an embedding)
    rotate: (a, b) -> (-b, a) for each pair of a head's elements: (2 i, 2 i + 1), or (i, i + D / 2)

Source: arXiv 2403.03206, section 5.3.2 and figure 2 (RMSNorm of q and k, joint attention of image and text); arXiv
2104.09864, equation 34 (rotary embedding).
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpdmd.kernels.runtime import checks
from dpdmd.kernels.runtime.backend import choose
from dpdmd.kernels.runtime.launch import jit, kernel, tl
from dpdmd.kernels.runtime.registration import register
from dpdmd.kernels.runtime.saved import save, saved
from dpdmd.kernels.runtime.tile import multiple, power_of_two

NUM_WARPS = 4
# Forward, 16 elements of q, k and v each for every thread, as with fewer a third of the work would be to find them.
# Half as many with a rotation, whose angles fill registers.
TILE = 2048
# Backward, a program walks along the tokens of a sample, with heads of GROUP elements in all, and takes 8 elements for
# every thread at a step: 16 bytes of bfloat16.
BACKWARD_TILE = 1024
GROUP = 512
# What a step reads is on its way to shared memory two steps before. Without these stages ptxas (CUDA 12.8) saves registers
# and puts half of a step's loads behind the first half's arithmetic: the memory's latency twice a step.
STAGES = 3
# Four programs for each of an H100's 132 multiprocessors, as many as its registers hold (128 a thread): all start at
# once and end together. Each leaves its sums, so more of them would be more to write and read.
PROGRAMS = 4 * 132
# Rows and columns of these sums that a program of the last launch adds up at a time: 32 columns are 128 bytes.
SUM_ROWS, SUM_COLUMNS = 64, 32

PARTS = ("q", "k", "v")


class TokenStream(NamedTuple):
    """The projections of one stream of tokens (image or text) and the weights of their norms.

    qkv: (B, S, 3, H, D), what one matrix product with the three weights stacked gives, or q, k, v (B, S, H, D) each.
    q_weight, k_weight (D,): None normalises and does not scale.
    bias: of the three projections, (H * D,) each or None, where it is not yet added. Added here, its gradient is a
        by-product.
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
    if cos is not None:
        q, k = rotated(q, cos, sin, interleaved), rotated(k, cos, sin, interleaved)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x (B, S, H, D) turned by the angles of cos and sin (S, D), or (S, D / 2) with one angle a pair."""
    pairs = (-1, 2) if interleaved else (2, -1)
    dim = -1 if interleaved else -2
    a, b = x.unflatten(-1, pairs).unbind(dim)
    if cos.shape[-1] != x.shape[-1]:
        cos, sin = (torch.stack([angle, angle], dim).flatten(-2) for angle in (cos, sin))
    cos, sin = (angle.detach().to(x.dtype)[:, None] for angle in (cos, sin))
    return x * cos + torch.stack([-b, a], dim).flatten(-2) * sin


@jit
def _load(rows, mask, D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The heads that start at the pointers `rows` (R, 1), in float32: the first elements of their pairs and the
    second, (R, HALF) each, zeros past the end. All is done to these two, so that no element looks for its other."""
    if INTERLEAVED:
        columns = tl.arange(0, 2 * HALF)[None, :]
        heads = tl.load(rows + columns, mask=mask & (columns < D), other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(heads, (rows.shape[0], HALF, 2)))
    else:
        columns = tl.arange(0, HALF)[None, :]
        mask = mask & (columns < D // 2)
        first = tl.load(rows + columns, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(rows + D // 2 + columns, mask=mask, other=0.0).to(tl.float32)
    return first, second


@jit
def _store(rows, pair, mask, D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    first, second = pair[0].to(rows.dtype.element_ty), pair[1].to(rows.dtype.element_ty)
    if INTERLEAVED:
        columns = tl.arange(0, 2 * HALF)[None, :]
        heads = tl.reshape(tl.join(first, second), (rows.shape[0], 2 * HALF))
        tl.store(rows + columns, heads, mask=mask & (columns < D))
    else:
        columns = tl.arange(0, HALF)[None, :]
        mask = mask & (columns < D // 2)
        tl.store(rows + columns, first, mask=mask)
        tl.store(rows + D // 2 + columns, second, mask=mask)


@jit
def _load_angles(
    ptr, tokens, mask, D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, ONE_ANGLE: tl.constexpr
):
    """The tokens' (R, 1) cosines or sines for the first and the second elements of the pairs."""
    if ONE_ANGLE:
        columns = tl.arange(0, HALF)[None, :]
        first = tl.load(ptr + tokens * (D // 2) + columns, mask=mask & (columns < D // 2), other=0.0)
        second = first
    else:
        first, second = _load(ptr + tokens * D, mask, D, HALF, INTERLEAVED)
    return first, second


@jit
def _plus(pair, bias_ptr, heads, mask, D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Each head, and its part of the bias where there is one."""
    first, second = pair
    if bias_ptr is not None:
        bias_first, bias_second = _load(bias_ptr + heads * D, mask, D, HALF, INTERLEAVED)
        first, second = first + bias_first, second + bias_second
    return first, second


@jit
def _mean_of_products(pair, other, D: tl.constexpr):
    """Over each head: (R, 1)."""
    return tl.sum(pair[0] * other[0] + pair[1] * other[1], 1, keep_dims=True) * (1 / D)


@jit
def _finished(pair, weight_ptr, eps, cos, sin, mask, D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Heads of q or k after norm, weight and rotation, where there are such."""
    first, second = pair
    if eps is not None:
        scale = tl.rsqrt(_mean_of_products(pair, pair, D) + eps)
        first, second = first * scale, second * scale
    if weight_ptr is not None:
        # The same for every row, but each thread loads what it needs; a vector would have to be handed around.
        weight = _load(weight_ptr + tl.zeros([first.shape[0], 1], tl.int32), mask, D, HALF, INTERLEAVED)
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
    """ROWS heads of a sample, token after token: in the first programs of stream 1, then of stream 2. A stream's
    tokens come after `offset` others in the joint buffers, which have `total`. q, k and v lie `part_stride` apart
    where they are packed, and have pointers of their own where that is 0."""
    program = tl.program_id(0)  # 64 bits would take three times as long to divide
    tensors = (q1_ptr, k1_ptr, v1_ptr, q1_bias_ptr, k1_bias_ptr, v1_bias_ptr, q1_weight_ptr, k1_weight_ptr)
    numbers = (batch_stride1, token_stride1, part_stride1, length1, offset1, tiles1)
    if program >= programs1:
        program -= programs1.to(tl.int32)
        tensors = (q2_ptr, k2_ptr, v2_ptr, q2_bias_ptr, k2_bias_ptr, v2_bias_ptr, q2_weight_ptr, k2_weight_ptr)
        numbers = (batch_stride2, token_stride2, part_stride2, length2, offset2, tiles2)
    q_ptr, k_ptr, v_ptr, q_bias_ptr, k_bias_ptr, v_bias_ptr, q_weight_ptr, k_weight_ptr = tensors
    batch_stride, token_stride, part_stride, length, offset, tiles = numbers
    token_stride = multiple(token_stride, DIVISIBLE)
    part_stride = multiple(part_stride, DIVISIBLE)

    sample = (program // tiles.to(tl.int32)).to(tl.int64)
    first_row = program % tiles.to(tl.int32) * ROWS
    first_token = (first_row // H).to(tl.int64)
    row = tl.arange(0, ROWS)[:, None]
    mask = first_row + row < length * H
    token = (first_row % H + row) // H
    heads = (first_row % H + row) % H
    rows = sample * multiple(batch_stride, DIVISIBLE) + first_token * token_stride + (token * token_stride + heads * D)
    q = _load(q_ptr + rows, mask, D, HALF, INTERLEAVED)
    k = _load(k_ptr + part_stride + rows, mask, D, HALF, INTERLEAVED)
    v = _load(v_ptr + 2 * part_stride + rows, mask, D, HALF, INTERLEAVED)
    cos = None
    sin = None
    if cos_ptr is not None:
        tokens = offset + first_token + token
        cos = _load_angles(cos_ptr, tokens, mask, D, HALF, INTERLEAVED, ONE_ANGLE)
        sin = _load_angles(sin_ptr, tokens, mask, D, HALF, INTERLEAVED, ONE_ANGLE)
    q = _plus(q, q_bias_ptr, heads, mask, D, HALF, INTERLEAVED)
    k = _plus(k, k_bias_ptr, heads, mask, D, HALF, INTERLEAVED)
    v = _plus(v, v_bias_ptr, heads, mask, D, HALF, INTERLEAVED)
    q = _finished(q, q_weight_ptr, eps, cos, sin, mask, D, HALF, INTERLEAVED)
    k = _finished(k, k_weight_ptr, eps, cos, sin, mask, D, HALF, INTERLEAVED)
    rows = ((sample * total + offset) * H + first_row) * D + row * D
    _store(q_out_ptr + rows, q, mask, D, HALF, INTERLEAVED)
    _store(k_out_ptr + rows, k, mask, D, HALF, INTERLEAVED)
    _store(v_out_ptr + rows, v, mask, D, HALF, INTERLEAVED)


@jit
def _backward(
    x_ptr,
    bias_ptr,
    weight_ptr,
    upstream,
    dx_ptr,
    cos_ptr,
    sin_ptr,
    eps,
    bias_sums_ptr,
    weight_sums_ptr,
    x_start,
    token_stride,
    dx_start,
    dx_token_stride,
    sums_row,
    sample,
    first,
    last,
    offset,
    group,
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
    """HEADS heads of q, k or v of a sample, from token `first` of the stream to before `last`, TOKENS at a time."""
    upstream_ptr, upstream_batch_stride, upstream_token_stride, upstream_head_stride = upstream
    upstream_token_stride = multiple(upstream_token_stride, DIVISIBLE)
    upstream_start = sample * multiple(upstream_batch_stride, DIVISIBLE) + offset * upstream_token_stride
    row = tl.arange(0, TOKENS * HEADS)[:, None]
    token = row // HEADS
    heads = group * HEADS + row % HEADS
    x_rows = x_start + (token * token_stride + heads * D)
    upstream_rows = upstream_start + (token * upstream_token_stride + heads * multiple(upstream_head_stride, DIVISIBLE))
    dx_rows = dx_start + (token * dx_token_stride + heads * D)
    bias_first = tl.zeros([TOKENS * HEADS, HALF], tl.float32)
    bias_second = tl.zeros([TOKENS * HEADS, HALF], tl.float32)
    weight_first = tl.zeros([TOKENS * HEADS, HALF], tl.float32)
    weight_second = tl.zeros([TOKENS * HEADS, HALF], tl.float32)
    if bias_ptr is not None and eps is not None:
        bias = _load(bias_ptr + heads * D, heads < H, D, HALF, INTERLEAVED)
    if weight_ptr is not None:
        weight = _load(weight_ptr + 0 * heads, heads < H, D, HALF, INTERLEAVED)
    for start in tl.range(first, last, TOKENS, num_stages=STAGES):
        mask = (token < last - start) & (heads < H)
        d = _load(upstream_ptr + start * upstream_token_stride + upstream_rows, mask, D, HALF, INTERLEAVED)
        if eps is not None:
            x = _load(x_ptr + start * token_stride + x_rows, mask, D, HALF, INTERLEAVED)
            if bias_ptr is not None:
                x = (x[0] + bias[0], x[1] + bias[1])
            # Where there is no token, d is 0, and n has to be a number whatever eps is.
            scale = tl.where(mask, tl.rsqrt(_mean_of_products(x, x, D) + eps), 0.0)
            n = (x[0] * scale, x[1] * scale)
        if cos_ptr is not None:
            cos = _load_angles(cos_ptr, offset + start + token, mask, D, HALF, INTERLEAVED, ONE_ANGLE)
            sin = _load_angles(sin_ptr, offset + start + token, mask, D, HALF, INTERLEAVED, ONE_ANGLE)
            d = (d[0] * cos[0] + d[1] * sin[1], d[1] * cos[1] - d[0] * sin[0])
        if eps is not None:
            if weight_sums_ptr is not None and weight_ptr is not None:
                weight_first += d[0] * n[0]
                weight_second += d[1] * n[1]
            if weight_ptr is not None:
                d = (d[0] * weight[0], d[1] * weight[1])
            mean = _mean_of_products(d, n, D)
            d = ((d[0] - n[0] * mean) * scale, (d[1] - n[1] * mean) * scale)
        if bias_sums_ptr is not None and bias_ptr is not None:
            bias_first += d[0]
            bias_second += d[1]
        if dx_ptr is not None:
            _store(dx_ptr + start * dx_token_stride + dx_rows, d, mask, D, HALF, INTERLEAVED)
    if bias_sums_ptr is not None and bias_ptr is not None:
        bias_first = tl.sum(tl.reshape(bias_first, (TOKENS, HEADS, HALF)), 0)
        bias_second = tl.sum(tl.reshape(bias_second, (TOKENS, HEADS, HALF)), 0)
        heads = group * HEADS + tl.arange(0, HEADS)[:, None]
        _store(bias_sums_ptr + (sums_row * H + heads) * D, (bias_first, bias_second), heads < H, D, HALF, INTERLEAVED)
    if weight_sums_ptr is not None and weight_ptr is not None:
        weight = (tl.sum(weight_first, 0, keep_dims=True), tl.sum(weight_second, 0, keep_dims=True))
        only = tl.zeros([1, 1], tl.int32)
        _store(weight_sums_ptr + (sums_row * GROUPS + group) * D + only, weight, only == 0, D, HALF, INTERLEAVED)


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
    """A chunk of the tokens of a sample, and a group of heads: q, then k, then v. The sums of chunk c of sample b of a
    stream are in row `row + b chunks + c` of the `rows` for each vector."""
    program = tl.program_id(0).to(tl.int64)
    tensors = (q1_ptr, k1_ptr, q1_bias_ptr, k1_bias_ptr, v1_bias_ptr, q1_weight_ptr, k1_weight_ptr)
    gradients = (dq1_ptr, dk1_ptr, dv1_ptr)
    numbers = (batch_stride1, token_stride1, part_stride1, length1, offset1, chunks1, row1)
    if program >= programs1:
        program -= programs1
        tensors = (q2_ptr, k2_ptr, q2_bias_ptr, k2_bias_ptr, v2_bias_ptr, q2_weight_ptr, k2_weight_ptr)
        gradients = (dq2_ptr, dk2_ptr, dv2_ptr)
        numbers = (batch_stride2, token_stride2, part_stride2, length2, offset2, chunks2, row2)
    q_ptr, k_ptr, q_bias_ptr, k_bias_ptr, v_bias_ptr, q_weight_ptr, k_weight_ptr = tensors
    dq_ptr, dk_ptr, dv_ptr = gradients
    batch_stride, token_stride, part_stride, length, offset, chunks, row = numbers
    token_stride = multiple(token_stride, DIVISIBLE)
    part_stride = multiple(part_stride, DIVISIBLE)

    group = program % GROUPS
    sample = program // GROUPS // chunks
    first = program // GROUPS % chunks * chunk
    last = tl.minimum(first + chunk, length)
    row += program // GROUPS
    x_start = sample * multiple(batch_stride, DIVISIBLE)
    dx_token_stride = H * D + 2 * part_stride
    dx_start = sample * length * dx_token_stride
    _backward(
        *(q_ptr, q_bias_ptr, q_weight_ptr, (q_upstream_ptr, q_stride0, q_stride1, q_stride2), dq_ptr),
        *(cos_ptr, sin_ptr, eps, bias_sums_ptr, weight_sums_ptr),
        *(x_start, token_stride, dx_start, dx_token_stride, row, sample, first, last, offset, group),
        *(H, D, HALF, TOKENS, HEADS, GROUPS, STAGES, INTERLEAVED, ONE_ANGLE, DIVISIBLE),
    )
    x_start += part_stride
    dx_start += part_stride
    _backward(
        *(k_ptr, k_bias_ptr, k_weight_ptr, (k_upstream_ptr, k_stride0, k_stride1, k_stride2), dk_ptr),
        *(cos_ptr, sin_ptr, eps, bias_sums_ptr, weight_sums_ptr),
        *(x_start, token_stride, dx_start, dx_token_stride, rows + row, sample, first, last, offset, group),
        *(H, D, HALF, TOKENS, HEADS, GROUPS, STAGES, INTERLEAVED, ONE_ANGLE, DIVISIBLE),
    )
    dx_start += part_stride
    _backward(
        *(None, v_bias_ptr, None, (v_upstream_ptr, v_stride0, v_stride1, v_stride2), dv_ptr),
        *(None, None, None, bias_sums_ptr, None),
        *(0, token_stride, dx_start, dx_token_stride, 2 * rows + row, sample, first, last, offset, group),
        *(H, D, HALF, TOKENS, HEADS, GROUPS, STAGES, INTERLEAVED, ONE_ANGLE, DIVISIBLE),
    )


@jit
def _column_sums(ptr, columns, inside, first, last, rows, WIDTH: tl.constexpr, SUM_ROWS: tl.constexpr):
    """Sums over the rows `first` to before `last` of sums (vectors, rows, WIDTH), by columns (vectors * WIDTH)."""
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
    """The gradients of a stream's three biases, then of its two weights, for each stream, in the order of the rows."""
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


# What an operation takes and a gradient is made for, of each stream: q, k and v, or qkv and twice None; the biases of
# q, k and v; the weights of q and k.
SLOTS = 8


def _by_stream(slots: Sequence) -> list[Sequence]:
    return [slots[i : i + SLOTS] for i in range(0, len(slots), SLOTS)]


def _readable(q: Tensor | None, k: Tensor | None, v: Tensor | None) -> tuple[list[Tensor | None], int]:
    """Projections of a stream as the kernels read them: dense heads, and one stride from sample to sample and one from
    token to token for all, copied where they are not so; and the distance from q to k and k to v in a packed one."""
    tensors = [q, k, v]
    present = [x for x in tensors if x is not None]
    if not all(x.is_contiguous() for x in present):
        strides = q.stride()[:2]
        if any(x.stride()[:2] != strides or not _heads_dense(x) for x in present):
            tensors = _contiguous(*tensors)
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


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in tensors]


def _divisible(*strides: int) -> bool:
    """Whether accesses can be 16 bytes wide."""
    return not any(stride % 16 for stride in strides)


def _half(dim: int, interleaved: bool) -> int:
    """Pairs of a head in a tile. Where they do not rotate, the last one's second element may be missing."""
    return max(power_of_two(dim) // 2, 1) if interleaved else power_of_two(dim // 2)


def _one_angle(cos: Tensor | None, dim: int) -> bool:
    return cos is not None and cos.shape[1] != dim


def _launch(
    inputs: Sequence[Tensor | None], cos: Tensor | None, sin: Tensor | None, interleaved: bool, eps: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """inputs: SLOTS of each stream."""
    out = _fake(inputs)
    if out[0].numel() == 0:
        return out
    batch, _, heads, dim = out[0].shape
    half = _half(dim, interleaved)
    rows = max(TILE // (2 * half if cos is None else 4 * half), 1)
    streams, strides, offset = [], [], 0
    for stream in _by_stream(inputs):
        tensors, part_stride = _readable(*stream[:3])
        length = stream[0].shape[1]
        tiles = -(-length * heads // rows)
        tensors += _contiguous(*stream[3:])
        streams.append((batch * tiles, *tensors, *tensors[0].stride()[:2], part_stride, length, offset, tiles))
        strides += *tensors[0].stride()[:2], part_stride
        offset += length
    for arguments in _launches(streams):
        _qk_norm_kernel(
            *(*arguments, *out, offset, *_contiguous(cos, sin), eps),
            *(heads, dim, half, rows, interleaved, _one_angle(cos, dim), _divisible(*strides)),
        )
    return out


def _launches(streams: list[tuple]) -> list[tuple]:
    """Arguments of the kernels, from (programs, arguments) of each stream: the programs, the arguments of streams 1 and
    2, and the programs of stream 1. One launch for two streams, where the compiled kernel of one is that of the other."""
    streams = [stream for stream in streams if stream[0]]
    kinds = [[getattr(argument, "dtype", None) for argument in stream] for stream in streams]
    if len(streams) == 2 and kinds[0] == kinds[1]:
        (one, *first), (other, *second) = streams
        return [(one + other, *first, *second, one)]
    return [(programs, *arguments, *arguments, programs) for programs, *arguments in streams]


def _fake(inputs: Sequence[Tensor | None], *options) -> tuple[Tensor, Tensor, Tensor]:
    x = inputs[0]
    shape = x.shape[0], sum(stream[0].shape[1] for stream in _by_stream(inputs)), *x.shape[-2:]
    q, k, v = (torch.empty(shape, dtype=x.dtype, device=x.device) for _ in range(3))
    return q, k, v


def _launch_backward(
    upstream: Sequence[Tensor | None],
    inputs: Sequence[Tensor | None],
    needed: Sequence[bool],
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    eps: float | None,
    lengths: Sequence[int],
    packed: Sequence[bool],
    dtype: torch.dtype,
) -> list[Tensor]:
    """upstream: of q, k and v, None for zeros. inputs: the SLOTS of each stream, without projections that the gradients
    do not depend on; needed: which of the SLOTS want a gradient. `dtype` is the projections'.

    The result: the gradients of the projections that want one; and where a bias or a weight does, one tensor for those
    of all biases, or all weights, or both: of `_vector_sizes` for stream 1, then for stream 2."""
    gradients = _fake_backward(upstream, inputs, needed, cos, sin, interleaved, eps, lengths, packed, dtype)
    like = _first(upstream)
    if like.numel() == 0:
        return [gradient.zero_() for gradient in gradients]
    batch, _, heads, dim = like.shape
    half = _half(dim, interleaved)
    heads_each = min(max(GROUP // (2 * half), 1), power_of_two(heads))
    tokens_each = max(BACKWARD_TILE // (heads_each * 2 * half), 1)
    groups = -(-heads // heads_each)
    chunk = _chunk(batch, tuple(lengths), groups, tokens_each)
    chunks = [-(-length // chunk) for length in lengths]
    rows = [batch * count for count in chunks]
    biases, weights = _vectors_needed(needed)
    vectors = [x for stream in _by_stream(inputs) for x in stream[3:]]
    # Zeros where a vector is missing, as nothing is written for it.
    new = torch.empty if all(x is not None for x in vectors) else torch.zeros
    options = {"dtype": torch.float32, "device": like.device}
    bias_sums = new((3, sum(rows), heads, dim), **options) if biases else None
    weight_sums = new((2, sum(rows), groups, dim), **options) if weights else None
    upstream = [_zeros(like) if x is None else x if x.stride(3) == 1 else x.contiguous() for x in upstream]
    streams, strides, made, offset = [], [s for x in upstream for s in x.stride()[:3]], iter(gradients), 0
    for i, (stream, wanted) in enumerate(zip(_by_stream(inputs), _by_stream(needed), strict=True)):
        (q, k, _), _ = _readable(*stream[:3])
        part_stride = heads * dim if packed[i] else 0
        strides += *((0, 0) if q is None else q.stride()[:2]), part_stride
        of_projections = [next(made) if one else None for one in wanted[: 1 if packed[i] else 3]]
        of_projections *= 3 // len(of_projections)
        tensors = q, k, *_contiguous(*stream[3:]), *of_projections
        numbers = *strides[-3:], lengths[i], offset, chunks[i], sum(rows[:i])
        streams.append((rows[i] * groups, *tensors, *numbers))
        offset += lengths[i]
    for arguments in _launches(streams):
        _qk_norm_backward_kernel(
            *(*arguments, *(part for x in upstream for part in (x, *x.stride()[:3]))),
            *(*_contiguous(cos, sin), eps, bias_sums, weight_sums, sum(rows), chunk),
            *(heads, dim, half, tokens_each, heads_each, groups, STAGES),
            *(interleaved, _one_angle(cos, dim), _divisible(*strides)),
        )
    if biases or weights:
        blocks = -(-gradients[-1].shape[0] // (len(lengths) * SUM_COLUMNS))
        _vectors_kernel(
            len(lengths) * blocks,
            *(bias_sums, weight_sums, gradients[-1], rows[0], sum(rows), blocks),
            *(heads, dim, groups, SUM_COLUMNS, SUM_ROWS),
        )
    return gradients


@functools.cache
def _chunk(batch: int, lengths: tuple[int, ...], groups: int, tokens_each: int) -> int:
    """How many tokens a program of the backward pass walks along: the fewest, in steps of tokens_each, with which there
    are no more than PROGRAMS programs, if that can be."""
    limit = max(PROGRAMS // groups, 1)
    chunk = -(-batch * sum(lengths) // (limit * tokens_each)) * tokens_each
    while chunk < max(lengths) and sum(batch * -(-length // chunk) for length in lengths) > limit:
        chunk += tokens_each
    return max(chunk, tokens_each)


def _zeros(like: Tensor) -> Tensor:
    """As the kernels read them: one head for all."""
    return like.new_zeros(like.shape[3]).expand(like.shape)


def _first(upstream: Sequence[Tensor | None]) -> Tensor:
    return next(x for x in upstream if x is not None)


def _vectors_needed(needed: Sequence[bool]) -> tuple[bool, bool]:
    """Whether any bias, and any weight, is to have a gradient."""
    streams = _by_stream(needed)
    return any(any(stream[3:6]) for stream in streams), any(any(stream[6:]) for stream in streams)


def _vector_sizes(biases: bool, weights: bool, heads: int, dim: int) -> list[int]:
    """Of a stream's vectors that get gradients together: biases, then weights."""
    return [heads * dim] * (3 if biases else 0) + [dim] * (2 if weights else 0)


def _fake_backward(upstream, inputs, needed, cos, sin, interleaved, eps, lengths, packed, dtype) -> list[Tensor]:
    like = _first(upstream)
    batch, _, heads, dim = like.shape
    gradients = []
    for length, one, wanted in zip(lengths, packed, _by_stream(needed), strict=True):
        shape = (batch, length, 3, heads, dim) if one else (batch, length, heads, dim)
        gradients += [torch.empty(shape, dtype=dtype, device=like.device) for x in wanted[:3] if x]
    biases, weights = _vectors_needed(needed)
    if biases or weights:
        dtypes = {x.dtype for stream in _by_stream(inputs) for x in stream[3:] if x is not None}
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        size = sum(_vector_sizes(biases, weights, heads, dim))
        gradients.append(torch.empty(len(lengths) * size, dtype=dtype, device=like.device))
    return gradients


_qk_norm = register(
    "qk_norm_triton(Tensor?[] inputs, Tensor? cos, Tensor? sin, bool interleaved, float? eps) "
    "-> (Tensor, Tensor, Tensor)",
    _launch,
    _fake,
)
_qk_norm_backward = register(
    "qk_norm_backward_triton(Tensor?[] upstream, Tensor?[] inputs, bool[] needed, Tensor? cos, Tensor? sin, "
    "bool interleaved, float? eps, SymInt[] lengths, bool[] packed, ScalarType dtype) -> Tensor[]",
    _launch_backward,
    _fake_backward,
)


class _QkNorm(torch.autograd.Function):
    # The older form of forward, with ctx: the newer one binds its arguments by inspection, 20 us a call.
    @staticmethod
    def forward(ctx, cos, sin, interleaved, eps, *inputs):
        ctx.interleaved, ctx.eps, ctx.dtype = interleaved, eps, inputs[0].dtype
        ctx.lengths = [stream[0].shape[1] for stream in _by_stream(inputs)]
        ctx.packed = [stream[1] is None for stream in _by_stream(inputs)]
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
            made = _qk_norm_backward(
                *(list(upstream), inputs, needed, cos, sin),
                *(ctx.interleaved, ctx.eps, ctx.lengths, ctx.packed, ctx.dtype),
            )
            biases, weights = _vectors_needed(needed)
            sizes = _vector_sizes(biases, weights, *_first(upstream).shape[2:])
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
    if torch.is_grad_enabled():
        for x in inputs:
            if x is not None and x.requires_grad:
                return _QkNorm.apply(cos, sin, interleaved, eps, *inputs)
    return _qk_norm(inputs, cos, sin, interleaved, eps)


IMPLEMENTATIONS = {"reference": qk_norm_reference, "triton": qk_norm_triton}


def qk_norm(*streams: TokenStream, eps: float | None = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    """(q, k, v), (B, S, H, D) each, contiguous, of the projections' dtype; S is all tokens, those of the first stream
    before those of the second. A head of q and k is x / sqrt(mean(x^2) + eps) * weight, one of v is x, where x is
    projection + bias.

    streams: one or two `TokenStream`s, whose projections have one dtype, B, H and D; any number of tokens, 0 included.
        Every projection, weight and bias receives a gradient.
    eps: None for no norm, and then there are no weights.

    Tensors are float32, float16 or bfloat16; weights and biases may have others than the projections. Arithmetic is
    float32, or float64 where any tensor is, and the results are rounded once. Projections are read where they are if
    their heads are dense, such as parts of the rows of a larger product; upstream gradients if a head's elements are.

    For the backward pass the projections of q and k are kept (of a packed one, that is v too) and nothing else; without
    norm nothing at all. In bfloat16 that is 4 (6) bytes for each of a token's H * D; diffusers' modules keep 16.

    Raises TypeError for a dtype or type, ValueError for a shape, a device and weights without eps.
    """
    arithmetic, device, _, _ = _check(streams, eps)
    return choose("qk_norm", IMPLEMENTATIONS, device, arithmetic)(streams, None, None, True, eps, arithmetic)


def qk_norm_rope(
    *streams: TokenStream, cos: Tensor, sin: Tensor, interleaved: bool = True, eps: float | None = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """`qk_norm`, and then each pair (a, b) of elements of q and k is (a cos - b sin, b cos + a sin).

    cos, sin (S, D) or (S, D / 2): float32, for the tokens in the order of the results, with an entry for each element
        (diffusers' FLUX) or for each pair (real and imaginary part of Qwen-Image's frequencies). No gradient.
    interleaved: the pairs are (2 i, 2 i + 1), as in FLUX and Qwen-Image; otherwise (i, i + D / 2).

    Raises TypeError for a dtype or type, ValueError for a shape and a device.
    """
    arithmetic, device, length, dim = _check(streams, eps)
    _check_angles(cos, sin, interleaved, arithmetic, device, length, dim)
    run = choose("qk_norm_rope", IMPLEMENTATIONS, device, arithmetic)
    return run(streams, cos, sin, interleaved, eps, arithmetic)


VECTORS = ("q_weight", "k_weight", "bias of q", "bias of k", "bias of v")


def _check(streams: tuple[TokenStream, ...], eps: float | None) -> tuple[torch.dtype, torch.device, int, int]:
    """Returns the dtype of the arithmetic, the device, and S and D of the results."""
    if not 1 <= len(streams) <= 2:
        raise ValueError(f"got {len(streams)} streams of tokens; it needs one or two")
    if eps is not None:
        checks.number("eps", eps)
    like, total = None, 0
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
                like, dtype, device = x, x.dtype, x.device
                batch, heads, dim = shape[0], shape[-2], shape[-1]
            if length is None:
                length = shape[1]
            if shape[0] != batch or shape[1] != length or shape[-2] != heads or shape[-1] != dim:
                raise ValueError(
                    f"{name} has shape {tuple(shape)}; it needs B, H, D = {batch}, {heads}, {dim}, as the first "
                    f"projection has, and S = {length}, as the first of its stream has"
                )
            if x.dtype != dtype:
                raise TypeError(f"{name} has dtype {x.dtype}; it needs the first projection's, {dtype}")
            if x.device != device:
                raise ValueError(f"{name} is on {x.device}; it needs to be on {device} like the first projection")
        total += length
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    for _, q_weight, k_weight, bias in streams:
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
            if vector.dtype == torch.float64:
                arithmetic = torch.float64
        if eps is None and not (q_weight is None and k_weight is None):
            raise ValueError("eps is None, which means no norm, and there is a weight; it needs an eps, or no weights")
    return arithmetic, device, total, dim


def _described(value: object) -> str:
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


def _check_angles(
    cos: Tensor, sin: Tensor, interleaved: bool, arithmetic: torch.dtype, device: torch.device, length: int, dim: int
) -> None:
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
