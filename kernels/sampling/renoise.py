"""Adds noise to a clean sample, for a chosen time.

    x_t = alpha x + sigma noise;   a flow has alpha = 1 - t, sigma = t

Source: arXiv 2602.03139, the renoising before the score networks (student's update) and in the critic's update.
"""

import torch
from torch import Tensor

from dpdmd.kernels.runtime import checks, layout, tile
from dpdmd.kernels.runtime.backend import choose
from dpdmd.kernels.runtime.formula import column, widen
from dpdmd.kernels.runtime.launch import jit, kernel, tl
from dpdmd.kernels.runtime.philox import Philox
from dpdmd.kernels.runtime.registration import register
from dpdmd.kernels.runtime.tile import BLOCK, NUM_WARPS, coefficient, joined, load, multiple, program, split, store
from dpdmd.kernels.sampling.linear import launch_elementwise, linear


def renoise_reference(
    x: Tensor, noise: Tensor | Philox, alpha: float | Tensor | None, sigma: float | Tensor, arithmetic: torch.dtype
) -> Tensor:
    """The definition; alpha is None for 1 - sigma. The result has x's dtype."""
    if isinstance(noise, Philox):
        noise = noise.normal(x.shape, device=x.device)
    alpha = 1 - sigma if alpha is None else alpha
    wide_x, wide_noise = widen(arithmetic, x, noise)
    return (column(alpha, x) * wide_x + column(sigma, x) * wide_noise).to(x.dtype)


@jit
def _alpha(alpha, stride, sigma, sample):
    if alpha is None:
        value = 1 - sigma
    else:
        value = coefficient(alpha, stride, sample)
    return value


@kernel(NUM_WARPS)
def _renoise_kernel(
    x_ptr,
    noise_ptr,
    out_ptr,
    x_stride: tl.int64,
    noise_stride: tl.int64,
    alpha,
    alpha_stride: tl.int64,
    sigma,
    sigma_stride: tl.int64,
    size: tl.int64,
    tiles: tl.int64,
    DIVISIBLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, tile = program(tiles)
    size = multiple(size, DIVISIBLE)
    sigma = coefficient(sigma, sigma_stride, sample)
    alpha = _alpha(alpha, alpha_stride, sigma, sample)
    offsets = tile * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    x = load(x_ptr, x_stride, sample, offsets, mask, DIVISIBLE)
    noise = load(noise_ptr, noise_stride, sample, offsets, mask, DIVISIBLE)
    store(out_ptr, size, sample, offsets, alpha * x + sigma * noise, mask, DIVISIBLE)


@jit
def _box_muller(first, second):
    radius = tl.sqrt_rn(-2 * tl.log((first.to(tl.float32) + 0.5) * 2**-32))
    angle = 6.283185307179586 * (second.to(tl.float32) * 2**-32)
    return radius * tl.cos(angle), radius * tl.sin(angle)


@jit
def _normal(key, counters):
    """The normals (4 * counters' size,) of Philox(key), four per counter, in order."""
    zero = tl.zeros_like(counters).to(tl.uint32)
    low = counters.to(tl.uint32)
    high = (counters >> 32).to(tl.uint32)
    r0, r1, r2, r3 = tl.philox(key, low, high, zero, zero)
    n0, n1 = _box_muller(r0, r1)
    n2, n3 = _box_muller(r2, r3)
    return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))


@kernel(NUM_WARPS)
def _renoise_philox_kernel(
    x_ptr,
    out_ptr,
    key: tl.int64,
    alpha,
    alpha_stride: tl.int64,
    sigma,
    sigma_stride: tl.int64,
    size: tl.int64,
    tiles: tl.int64,
    DIVISIBLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x is contiguous. A sample may start inside the four elements of a counter: its tiles start at the first of them."""
    sample, tile = program(tiles)
    size = multiple(size, DIVISIBLE)
    sigma = coefficient(sigma, sigma_stride, sample)
    alpha = _alpha(alpha, alpha_stride, sigma, sample)
    first_counter = sample * size // 4 + tile * (BLOCK // 4)
    offsets = multiple(first_counter * 4, DIVISIBLE) + tl.arange(0, BLOCK)
    mask = (offsets >= sample * size) & (offsets < (sample + 1) * size)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    noise = _normal(key, first_counter + tl.arange(0, BLOCK // 4))
    tl.store(out_ptr + offsets, (alpha * x + sigma * noise).to(out_ptr.dtype.element_ty), mask=mask)


def _launch_philox(
    x: Tensor, key: int, alpha: Tensor | None, alpha_value: float | None, sigma: Tensor | None, sigma_value: float
) -> Tensor:
    x = x.contiguous()  # the order of the noise
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    size = x.shape[1:].numel()
    tiles = tile.tiles(size if size % 4 == 0 else size + 3)
    _renoise_philox_kernel(
        x.shape[0] * tiles,
        *(x, out, key),
        *(*joined(alpha, alpha_value), *joined(sigma, sigma_value)),
        *(size, tiles, tile.divisible(size), BLOCK),
    )
    return out


_COEFFICIENTS = "Tensor? alpha, float? alpha_value, Tensor? sigma, float sigma_value"
_renoise = register(
    f"renoise_triton(Tensor x, Tensor noise, {_COEFFICIENTS}) -> Tensor",
    lambda x, noise, alpha, alpha_value, sigma, sigma_value: launch_elementwise(
        _renoise_kernel, x, (noise,), (*joined(alpha, alpha_value), *joined(sigma, sigma_value)), x.dtype
    ),
    lambda x, *arguments: layout.empty_like(x, x.dtype),
)
_renoise_philox = register(
    f"renoise_philox_triton(Tensor x, int key, {_COEFFICIENTS}) -> Tensor",
    _launch_philox,
    lambda x, *arguments: torch.empty_like(x, memory_format=torch.contiguous_format),
)


def renoise_triton(
    x: Tensor, noise: Tensor | Philox, alpha: float | Tensor | None, sigma: float | Tensor, arithmetic: torch.dtype
) -> Tensor:
    if alpha is None and not isinstance(sigma, Tensor):
        alpha = 1 - sigma  # in float64
    gradient_x = (1.0, sigma, 1.0) if alpha is None else (alpha, 0.0, 1.0)
    coefficients = *((None, None) if alpha is None else split(alpha)), *split(sigma)
    if isinstance(noise, Philox):
        return linear(lambda x: _renoise_philox(x, noise.key, *coefficients), (x,), (gradient_x,))
    return linear(lambda x, noise: _renoise(x, noise, *coefficients), (x, noise), (gradient_x, (sigma, 0.0, 1.0)))


def renoise_cuda(
    x: Tensor, noise: Tensor | Philox, alpha: float | Tensor | None, sigma: float | Tensor, arithmetic: torch.dtype
) -> Tensor:
    flow = alpha is None
    gradient_x = (1.0, sigma, 1.0) if flow else (alpha, 0.0, 1.0)
    coefficients = flow, *split(0.0 if flow else alpha), *split(sigma)
    run = torch.ops.dpdmd.renoise.default
    if isinstance(noise, Philox):
        return linear(lambda x: run(x.contiguous(), None, noise.key, *coefficients), (x,), (gradient_x,))
    return linear(
        lambda *inputs: run(*layout.align(*inputs), 0, *coefficients), (x, noise), (gradient_x, (sigma, 0.0, 1.0))
    )


IMPLEMENTATIONS = {"reference": renoise_reference, "triton": renoise_triton, "cuda": renoise_cuda}


def renoise(x: Tensor, noise: Tensor | Philox, t: float | Tensor | tuple[float | Tensor, float | Tensor]) -> Tensor:
    """(1 - t) x + t noise, or alpha x + sigma noise for t = (alpha, sigma). The result has x's shape and dtype.

    x, noise (B, ...): both receive gradients. A `Philox` gives noise.normal(x.shape); kernels make no tensor of it.
    t: a float or (B,) float32, 0 for clean and 1 for noise, or a pair of such coefficients. It receives no gradient,
        and its range is not checked.

    Tensors are any mix of float32, float16 and bfloat16, with any strides and any batch; arithmetic is float32, or
    float64 where any tensor is.

    Raises TypeError for a dtype or type, ValueError for a shape and a device.
    """
    arithmetic = checks.tensors(x=x) if isinstance(noise, Philox) else checks.tensors(x=x, noise=noise)
    if isinstance(t, (tuple, list)):
        checks.pair("t", t, ("alpha", "sigma"), x, arithmetic)
        alpha, sigma = t
    else:
        checks.per_sample("t", t, x, arithmetic)
        alpha, sigma = None, t
    return choose("renoise", IMPLEMENTATIONS, x.device, arithmetic)(x, noise, alpha, sigma, arithmetic)
