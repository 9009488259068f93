"""Noise put back on a clean sample, to a chosen time.

    x_t = alpha x + sigma noise;   a flow has alpha = 1 - t, sigma = t

Source: arXiv 2602.03139, the renoising before the score networks (student's update) and in the critic's update.
"""

import torch
from torch import Tensor

from dpdmd.kernels import _checks
from dpdmd.kernels._formula import column, widen
from dpdmd.kernels.backend import choose


def renoise_reference(
    x: Tensor, noise: Tensor, alpha: float | Tensor, sigma: float | Tensor, arithmetic: torch.dtype
) -> Tensor:
    """The definition. The result has x's dtype."""
    wide_x, wide_noise = widen(arithmetic, x, noise)
    return (column(alpha, x) * wide_x + column(sigma, x) * wide_noise).to(x.dtype)


IMPLEMENTATIONS = {"reference": renoise_reference}


def renoise(x: Tensor, noise: Tensor, t: float | Tensor | tuple[float | Tensor, float | Tensor]) -> Tensor:
    """(1 - t) x + t noise, or alpha x + sigma noise where t is a tuple (alpha, sigma). The result has x's shape and
    dtype.

    x, noise (B, ...): both receive gradients.
    t: a float or (B,) float32, 0 for clean and 1 for noise, or a pair of such coefficients. It receives no gradient;
        its range is the caller's.

    Tensors are float32, float16 or bfloat16, mixed as they come, of any strides and any batch; arithmetic is
    float32, or float64 where any tensor is.

    Raises TypeError for a dtype or type, ValueError for a shape and a device.
    """
    arithmetic = _checks.tensors(x=x, noise=noise)
    if isinstance(t, (tuple, list)):
        _checks.pair("t", t, ("alpha", "sigma"), x, arithmetic)
        alpha, sigma = t
    else:
        _checks.per_sample("t", t, x, arithmetic)
        alpha, sigma = 1 - t, t
    return choose("renoise", IMPLEMENTATIONS, x.device, arithmetic)(x, noise, alpha, sigma, arithmetic)
