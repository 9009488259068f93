"""The residual stream: what a gated branch adds to it, and the adaptive norm that reads it next.

    h = residual + gate (y + bias)
    n = norm(h);   out = n (1 + scale) + shift        as in adaln_modulate

    residual, y (B, S, C); gate, scale, shift (B, C); bias (C,)

The bias is that of the matrix product which made y: its gradient is a sum that the backward pass here forms anyway.

Source: arXiv 2212.09748 (DiT), section 3.2; arXiv 2403.03206 (SD3), figure 2. SD3.5 adds two branches at once.
"""

import torch
from torch import Tensor

from dpdmd.kernels.blocks import adaln
from dpdmd.kernels.blocks.adaln_modulate import adaln_modulate_reference
from dpdmd.kernels.blocks.fp8 import Quantized, converts
from dpdmd.kernels.runtime.backend import choose
from dpdmd.kernels.runtime.formula import widen


def gated_residual_reference(
    residual: Tensor,
    gates: tuple[Tensor, ...],
    ys: tuple[Tensor, ...],
    biases: tuple[Tensor | None, ...],
    arithmetic: torch.dtype,
) -> Tensor:
    """The definition. The result has residual's dtype."""
    h = residual.to(arithmetic)
    for gate, y, bias in zip(gates, ys, biases, strict=True):
        gate, y, bias = widen(arithmetic, gate[:, None], y, bias)
        h = h + gate * (y if bias is None else y + bias)
    return h.to(residual.dtype)


def gated_residual_adaln_reference(
    residual: Tensor,
    gates: tuple[Tensor, ...],
    ys: tuple[Tensor, ...],
    biases: tuple[Tensor | None, ...],
    scales: tuple[Tensor, ...],
    shifts: tuple[Tensor, ...],
    norm: str,
    eps: float,
    quantize: bool,
    arithmetic: torch.dtype,
) -> list[Tensor | Quantized]:
    """The definition: h, and one result for each scale and shift. What is normalised is h as it is stored."""
    h = gated_residual_reference(residual, gates, ys, biases, arithmetic)
    return [h, *adaln_modulate_reference(h, scales, shifts, norm, eps, quantize, arithmetic)]


def gated_residual_triton(
    residual: Tensor,
    gates: tuple[Tensor, ...],
    ys: tuple[Tensor, ...],
    biases: tuple[Tensor | None, ...],
    arithmetic: torch.dtype,
) -> Tensor:
    return adaln.fused(residual, gates, ys, biases, (), (), "layer", 0.0, False)[0]


def gated_residual_adaln_triton(
    residual: Tensor,
    gates: tuple[Tensor, ...],
    ys: tuple[Tensor, ...],
    biases: tuple[Tensor | None, ...],
    scales: tuple[Tensor, ...],
    shifts: tuple[Tensor, ...],
    norm: str,
    eps: float,
    quantize: bool,
    arithmetic: torch.dtype,
) -> list[Tensor | Quantized]:
    if quantize and not converts(residual.device.type, residual.device.index):
        h = gated_residual_triton(residual, gates, ys, biases, arithmetic)
        return [h, *adaln_modulate_reference(h, scales, shifts, norm, eps, quantize, arithmetic)]
    return adaln.fused(residual, gates, ys, biases, scales, shifts, norm, eps, quantize)


IMPLEMENTATIONS = {"reference": gated_residual_reference, "triton": gated_residual_triton}
ADALN_IMPLEMENTATIONS = {"reference": gated_residual_adaln_reference, "triton": gated_residual_adaln_triton}


def gated_residual(
    residual: Tensor,
    gate: Tensor | tuple[Tensor, Tensor],
    y: Tensor | tuple[Tensor, Tensor],
    *,
    bias: Tensor | tuple[Tensor | None, Tensor | None] | None = None,
) -> Tensor:
    """residual + gate (y + bias). The result has residual's shape and dtype; with pairs for gate and y (and bias) both
    branches are added, in one pass.

    residual, y (B, S, C); gate (B, C); bias (C,) or None. All receive gradients.

    Tensors are float32, float16 or bfloat16, mixed as they come, of any strides and any batch; arithmetic is
    float32, or float64 where any tensor is, and the result is rounded once. Chunks of columns, as gate often is, are
    read where they are; tokens whose channels are not dense are copied.

    Kept for the backward pass: y, where gate needs a gradient, as in eager mode; the sum y + bias is not. The gradient
    of residual is that of the result itself.

    Raises TypeError for a dtype or type, ValueError for a shape and a device.
    """
    gates, ys, biases, arithmetic = adaln.check_gated(residual, gate, y, bias)
    run = choose("gated_residual", IMPLEMENTATIONS, residual.device, arithmetic)
    return run(residual, gates, ys, biases, arithmetic)


def gated_residual_adaln(
    residual: Tensor,
    gate: Tensor | tuple[Tensor, Tensor],
    y: Tensor | tuple[Tensor, Tensor],
    scale: Tensor | tuple[Tensor, Tensor],
    shift: Tensor | tuple[Tensor, Tensor],
    *,
    bias: Tensor | tuple[Tensor | None, Tensor | None] | None = None,
    norm: str = "layer",
    eps: float = 1e-6,
    quantize: bool = False,
) -> tuple[Tensor | Quantized, ...]:
    """`gated_residual` and the `adaln_modulate` of its result, in one pass: (h, out), or (h, out_1, out_2) where scale
    and shift are pairs. Equal to calling one after the other.

    residual, y (B, S, C); gate, scale, shift (B, C); bias (C,) or None: as there. All receive gradients.
    norm, eps, quantize: as in adaln_modulate. h is never quantised.

    Kept for the backward pass: h, which the caller keeps anyway as the residual of what follows, and y where gate needs
    a gradient. In eager mode there is n besides.

    Raises TypeError for a dtype or type, ValueError for a shape, a device, an unknown norm and for quantize where a
    tensor would get a gradient.
    """
    gates, ys, biases, arithmetic = adaln.check_gated(residual, gate, y, bias, quantize)
    scales, shifts, arithmetic = adaln.check_modulated(
        "residual", residual, scale, shift, norm, eps, quantize, arithmetic
    )
    run = choose("gated_residual_adaln", ADALN_IMPLEMENTATIONS, residual.device, arithmetic)
    return tuple(run(residual, gates, ys, biases, scales, shifts, norm, float(eps), quantize, arithmetic))
