"""Attention in Triton, forward and backward, without atomics: results repeat bit for bit.

    s = scale q k^T     p = exp(s - lse)     o = p v                                        lse = log sum exp s, a row
    dv = p^T do         dp = do v^T          ds = p (dp - delta)     delta = sum_D o do, a row
    dq = scale ds k     dk = scale ds^T q

A program of the forward pass has a tile of queries and loops over the keys (arXiv 2205.14135). The backward pass computes
s twice, once for a tile of queries (dq) and once for a tile of keys (dk, dv): 7 matmuls, where one kernel with atomics
for dq takes 5. But each runs twice as fast (H100: 600 and 550 TFLOP/s against 300), and dq's sum has a fixed order.

q, o (B, S, H, D) and k, v (B, T, H, D) are float16 or bfloat16; sums are float32. They are read through tensor
descriptors, which read zeros past the end: so any length, any D, and any strides of tokens and heads.
lse, in units of log 2, and delta are float32 (B, H, P); P is S rounded up to whole tiles. Past S lse is +inf, which makes
weights 0 without a mask.
"""

import functools
import math

import torch
from torch import Tensor

from dpdmd.kernels.runtime.launch import Kernel, descriptor, jit, tl
from dpdmd.kernels.runtime.registration import register
from dpdmd.kernels.runtime.tile import power_of_two

_LOG2_E = math.log2(math.e)
PADDING = 128  # queries; a multiple of every tile
# The largest sum of a row's weights, relative to the maximum over its first keys, that stays in the inputs' range.
LIMITS = {torch.bfloat16: 2.0**64, torch.float16: 2.0**15}
_LANES = 4  # threads that share a row of a matmul's result on Hopper


@jit
def _tile_of(tiles, H):
    """(tile, row of lse, sample, head) of this program; the tiles of a head are consecutive programs."""
    program = tl.program_id(0)
    row = program // tiles
    return (program % tiles).to(tl.int32), row, (row // H).to(tl.int32), (row % H).to(tl.int32)


@jit
def _read(tensor, sample, first, head, TILE: tl.constexpr, BLOCK_D: tl.constexpr):
    return tensor.load([sample, first, head, 0]).reshape([TILE, BLOCK_D])


@jit
def _write(tensor, sample, first, head, value, TILE: tl.constexpr, BLOCK_D: tl.constexpr):
    tensor.store([sample, first, head, 0], value.to(tensor.dtype).reshape([1, TILE, 1, BLOCK_D]))


@jit
def _fixed_step(
    acc, total, reference, q, k, v, left, scale, TILE_T: tl.constexpr, MASK: tl.constexpr, LANES: tl.constexpr
):
    """acc and total (TILE_S, LANES) are relative to 2^reference; `left` keys remain, with this tile's. A row's sum stays
    in LANES pieces, one for each thread that holds it: they are added up once, after the loop."""
    p = tl.exp2(tl.dot(q, k.T) * scale - reference[:, None])
    if MASK:
        p = tl.where((tl.arange(0, TILE_T) < left)[None, :], p, 0.0)
    total += tl.sum(tl.sum(tl.reshape(p, [p.shape[0], TILE_T // (2 * LANES), LANES, 2]), 3), 1)
    return tl.dot(p.to(v.dtype), v, acc), total


@jit
def _online_step(acc, total, maximum, q, k, v, left, scale, TILE_T: tl.constexpr):
    """As `_fixed_step`, relative to the maximum so far, which may grow."""
    s = tl.where((tl.arange(0, TILE_T) < left)[None, :], tl.dot(q, k.T) * scale, float("-inf"))
    new_maximum = tl.maximum(maximum, tl.max(s, 1))
    p = tl.exp2(s - new_maximum[:, None])
    shrink = tl.exp2(maximum - new_maximum)
    total = total * shrink + tl.sum(p, 1)
    return tl.dot(p.to(v.dtype), v, acc * shrink[:, None]), total, new_maximum


def _forward_kernel(
    q_desc,
    k_desc,
    v_desc,
    o_desc,
    lse_ptr,
    scale,
    limit,
    H: tl.int64,
    S: tl.int64,
    T: tl.int64,
    P: tl.int64,
    tiles: tl.int64,
    LANES: tl.constexpr,
    TILE_S: tl.constexpr,
    TILE_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """scale includes log2(e).

    A row's weights are relative to its maximum over the first tile of keys. A running maximum would take a third of the
    time. Only a tile where a later logit exceeds that maximum by about log2(limit) is computed again with one."""
    tile, row, sample, head = _tile_of(tiles, H)
    first = tile * TILE_S
    T = T.to(tl.int32)
    q = _read(q_desc, sample, first, head, TILE_S, BLOCK_D)
    k = _read(k_desc, sample, 0, head, TILE_T, BLOCK_D)
    s = tl.where((tl.arange(0, TILE_T) < T)[None, :], tl.dot(q, k.T), float("-inf"))
    maximum = tl.max(s, 1) * scale
    acc = tl.zeros([TILE_S, BLOCK_D], tl.float32)
    totals = tl.zeros([TILE_S, LANES], tl.float32)
    whole = T // TILE_T * TILE_T
    for t in range(0, whole, TILE_T):
        k = _read(k_desc, sample, t, head, TILE_T, BLOCK_D)
        v = _read(v_desc, sample, t, head, TILE_T, BLOCK_D)
        acc, totals = _fixed_step(acc, totals, maximum, q, k, v, T - t, scale, TILE_T, False, LANES)
    if whole < T:
        k = _read(k_desc, sample, whole, head, TILE_T, BLOCK_D)
        v = _read(v_desc, sample, whole, head, TILE_T, BLOCK_D)
        acc, totals = _fixed_step(acc, totals, maximum, q, k, v, T - whole, scale, TILE_T, True, LANES)
    total = tl.sum(totals, 1)
    if tl.sum((total <= limit).to(tl.int32), 0) < TILE_S:  # also where a total is NaN
        acc = tl.zeros([TILE_S, BLOCK_D], tl.float32)
        total = tl.zeros([TILE_S], tl.float32)
        maximum = tl.full([TILE_S], float("-inf"), tl.float32)
        for t in range(0, T, TILE_T):
            k = _read(k_desc, sample, t, head, TILE_T, BLOCK_D)
            v = _read(v_desc, sample, t, head, TILE_T, BLOCK_D)
            acc, total, maximum = _online_step(acc, total, maximum, q, k, v, T - t, scale, TILE_T)
    _write(o_desc, sample, first, head, acc / total[:, None], TILE_S, BLOCK_D)
    rows = first + tl.arange(0, TILE_S)
    lse = tl.where(rows < S, maximum + tl.log2(total), float("inf"))
    tl.store(lse_ptr + row * tl.multiple_of(P, TILE_S) + rows, lse)


@jit
def _dq_step(dq, q, do, k, v, lse, delta, left, scale, TILE_T: tl.constexpr, MASK: tl.constexpr):
    s = tl.dot(q, k.T)
    dp = tl.dot(do, v.T)
    p = tl.exp2(s * scale - lse[:, None])
    if MASK:  # keys past the end are zeros, but their weights may be infinite
        p = tl.where((tl.arange(0, TILE_T) < left)[None, :], p, 0.0)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(q.dtype), k, dq)


def _dq_kernel(
    q_desc,
    k_desc,
    v_desc,
    o_desc,
    do_desc,
    dq_desc,
    lse_ptr,
    delta_ptr,
    scale,
    factor,
    H: tl.int64,
    T: tl.int64,
    P: tl.int64,
    tiles: tl.int64,
    TILE_S: tl.constexpr,
    TILE_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dq, and delta for `_dkv_kernel`. scale includes log2(e); factor does not."""
    tile, row, sample, head = _tile_of(tiles, H)
    first = tile * TILE_S
    T = T.to(tl.int32)
    rows = first + tl.arange(0, TILE_S)
    do = _read(do_desc, sample, first, head, TILE_S, BLOCK_D)
    o = _read(o_desc, sample, first, head, TILE_S, BLOCK_D)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    lse_ptr += row * tl.multiple_of(P, TILE_S)
    delta_ptr += row * tl.multiple_of(P, TILE_S)
    tl.store(delta_ptr + rows, delta)
    q = _read(q_desc, sample, first, head, TILE_S, BLOCK_D)
    lse = tl.load(lse_ptr + rows)
    dq = tl.zeros([TILE_S, BLOCK_D], tl.float32)
    whole = T // TILE_T * TILE_T
    for t in range(0, whole, TILE_T):
        k = _read(k_desc, sample, t, head, TILE_T, BLOCK_D)
        v = _read(v_desc, sample, t, head, TILE_T, BLOCK_D)
        dq = _dq_step(dq, q, do, k, v, lse, delta, T - t, scale, TILE_T, False)
    if whole < T:
        k = _read(k_desc, sample, whole, head, TILE_T, BLOCK_D)
        v = _read(v_desc, sample, whole, head, TILE_T, BLOCK_D)
        dq = _dq_step(dq, q, do, k, v, lse, delta, T - whole, scale, TILE_T, True)
    _write(dq_desc, sample, first, head, dq * factor, TILE_S, BLOCK_D)


def _dkv_kernel(
    q_desc,
    k_desc,
    v_desc,
    do_desc,
    dk_desc,
    dv_desc,
    lse_ptr,
    delta_ptr,
    scale,
    factor,
    H: tl.int64,
    S: tl.int64,
    T: tl.int64,
    P: tl.int64,
    tiles: tl.int64,
    MASK: tl.constexpr,
    TILE_S: tl.constexpr,
    TILE_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """s and p are transposed, so that p^T do and ds^T q take them from registers. Queries past the end have weights of 0
    by their lse; the rows of keys past the end are not written. MASK changes only how the compiler orders the matmuls:
    for D = 128 1.7 ms with it and 2.2 without, for D = 64 2.2 and 1.7 (H100)."""
    tile, row, sample, head = _tile_of(tiles, H)
    first = tile * TILE_T
    k = _read(k_desc, sample, first, head, TILE_T, BLOCK_D)
    v = _read(v_desc, sample, first, head, TILE_T, BLOCK_D)
    dk = tl.zeros([TILE_T, BLOCK_D], tl.float32)
    dv = tl.zeros([TILE_T, BLOCK_D], tl.float32)
    beyond = (first + tl.arange(0, TILE_T) >= T)[:, None]  # unused without MASK
    lse_ptr += row * tl.multiple_of(P, TILE_S)
    delta_ptr += row * tl.multiple_of(P, TILE_S)
    for s in range(0, S.to(tl.int32), TILE_S):
        q = _read(q_desc, sample, s, head, TILE_S, BLOCK_D)
        do = _read(do_desc, sample, s, head, TILE_S, BLOCK_D)
        lse = tl.load(lse_ptr + s + tl.arange(0, TILE_S))
        delta = tl.load(delta_ptr + s + tl.arange(0, TILE_S))
        st = tl.dot(k, q.T)
        dpt = tl.dot(v, do.T)
        pt = tl.exp2(st * scale - lse[None, :])
        if MASK:
            pt = tl.where(beyond, 0.0, pt)
        dv = tl.dot(pt.to(q.dtype), do, dv)
        dst = pt * (dpt - delta[None, :])
        dk = tl.dot(dst.to(q.dtype), q, dk)
    _write(dk_desc, sample, first, head, dk * factor, TILE_T, BLOCK_D)
    _write(dv_desc, sample, first, head, dv, TILE_T, BLOCK_D)


MAX_HEAD_DIM = 128


@functools.cache
def _kernel(which: str, head_dim: int) -> tuple[Kernel, list[int], list[int], tuple[int, int, int]]:
    """The kernel for heads of this size, the blocks of its tensor descriptors along queries and along keys, and TILE_S,
    TILE_T and BLOCK_D. The tiles are the fastest on H100 (docs/tuning-log.md)."""
    block_d = max(16, power_of_two(head_dim))
    function = {"forward": _forward_kernel, "dq": _dq_kernel, "dkv": _dkv_kernel}[which]
    tile_s = 32 if which == "dkv" else 64
    tile_t = 32 if which == "forward" and block_d == 128 else 64
    of_queries, of_keys = ([1, tile, 1, block_d] for tile in (tile_s, tile_t))
    return Kernel(function, num_warps=4, num_stages=3), of_queries, of_keys, (tile_s, tile_t, block_d)


def why_not(q: Tensor, k: Tensor, scale: float) -> str:
    """Why these kernels cannot run such tensors; "" where they can."""
    D = q.shape[-1]
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"it needs float16 or bfloat16, and q has {q.dtype}"
    if D > MAX_HEAD_DIM or D % 8:
        return f"it needs heads of up to {MAX_HEAD_DIM}, in multiples of 8, and q's have {D}"
    if not scale > 0:
        return f"it needs a scale above 0, and got {scale}"
    if max(q.shape[1], k.shape[1]) >= 2**31 - PADDING:
        return "it needs fewer than 2^31 tokens"
    return ""


def _readable(tensor: Tensor) -> Tensor:
    """The tensor, copied unless a tensor descriptor can read it: 16-byte aligned rows of dense D."""
    align = 16 // tensor.element_size()
    *strides, dense = tensor.stride()
    if dense != 1 or tensor.data_ptr() % 16:
        return tensor.contiguous()
    for stride in strides:
        if stride <= 0 or stride % align:
            return tensor.contiguous()
    return tensor


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _results(q: Tensor) -> tuple[Tensor, Tensor]:
    """o and lse, uninitialised."""
    B, S, H, _ = q.shape
    return _like(q), q.new_empty((B, H, -(-S // PADDING) * PADDING), dtype=torch.float32)


def _launch_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    B, S, H, D = q.shape
    o, lse = _results(q)
    run, of_queries, of_keys, tile = _kernel("forward", D)
    tiles = -(-S // tile[0])
    run(
        B * H * tiles,
        descriptor(_readable(q), of_queries),
        *(descriptor(_readable(k), of_keys), descriptor(_readable(v), of_keys)),
        descriptor(o, of_queries),
        *(lse, scale * _LOG2_E, LIMITS[q.dtype], H, S, k.shape[1], lse.shape[2], tiles),
        *(_LANES, *tile),
    )
    return o, lse


def _launch_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    B, S, H, D = q.shape
    T = k.shape[1]
    do, q, k, v, o = map(_readable, (do, q, k, v, o))
    dq, dk, dv = map(_like, (q, k, v))
    delta = torch.empty_like(lse)
    P, scales = lse.shape[2], (scale * _LOG2_E, scale)

    run, of_queries, of_keys, tile = _kernel("dq", D)
    tiles = -(-S // tile[0])
    run(
        B * H * tiles,
        *(descriptor(q, of_queries), descriptor(k, of_keys), descriptor(v, of_keys)),
        *(descriptor(o, of_queries), descriptor(do, of_queries), descriptor(dq, of_queries)),
        *(lse, delta, *scales, H, T, P, tiles, *tile),
    )
    run, of_queries, of_keys, tile = _kernel("dkv", D)
    tiles = -(-T // tile[1])
    run(
        B * H * tiles,
        *(descriptor(q, of_queries), descriptor(k, of_keys), descriptor(v, of_keys), descriptor(do, of_queries)),
        *(descriptor(dk, of_keys), descriptor(dv, of_keys)),
        *(lse, delta, *scales, H, S, T, P, tiles, tile[2] == 128, *tile),
    )
    return dq, dk, dv


forward = register(
    "attention_forward_triton(Tensor q, Tensor k, Tensor v, float scale) -> (Tensor, Tensor)",
    _launch_forward,
    lambda q, k, v, scale: _results(q),
)
backward = register(
    "attention_backward_triton(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, float scale) "
    "-> (Tensor, Tensor, Tensor)",
    _launch_backward,
    lambda do, q, k, v, o, lse, scale: tuple(map(_like, (q, k, v))),
)


def natural(lse: Tensor, num_queries: int) -> Tensor:
    """lse (B, H, S, 1) in natural units, for cuDNN's backward pass."""
    return (lse[:, :, :num_queries, None] * math.log(2)).contiguous()
