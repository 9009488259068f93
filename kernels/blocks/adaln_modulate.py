"""Adaptive normalisation: a norm without weights of its own, then a scale and a shift for each sample and channel.

    out = n (1 + scale) + shift
    n = (x - mean) / sqrt(var + eps)      "layer": mean and biased variance over the channels
    n = x / sqrt(mean x^2 + eps)          "rms"

    x (B, S, C); scale, shift (B, C)

Source: arXiv 2212.09748 (DiT), section 3.2; arXiv 2403.03206 (SD3), figure 2. SD3.5 modulates one n twice.
"""

import torch
from torch import Tensor

from dpdmd.kernels.blocks import adaln
from dpdmd.kernels.blocks.fp8 import Quantized, converts, quantize_rows_reference
from dpdmd.kernels.runtime.backend import choose
from dpdmd.kernels.runtime.formula import widen


def adaln_modulate_reference(
    x: Tensor,
    scales: tuple[Tensor, ...],
    shifts: tuple[Tensor, ...],
    norm: str,
    eps: float,
    quantize: bool,
    arithmetic: torch.dtype,
    fork: bool = False,
) -> list[Tensor | Quantized]:
    """The definition: a result for each scale and shift, in x's dtype or quantised; x before them with `fork`."""
    n = x.to(arithmetic)
    if norm == "layer":
        n = n - n.mean(-1, keepdim=True)
    n = n / (n.square().mean(-1, keepdim=True) + eps).sqrt()
    outs = []
    for scale, shift in zip(scales, shifts, strict=True):
        scale, shift = widen(arithmetic, scale[:, None], shift[:, None])
        out = n * (1 + scale) + shift
        outs.append(quantize_rows_reference(out) if quantize else out.to(x.dtype))
    return [x, *outs] if fork else outs


def adaln_modulate_triton(
    x: Tensor,
    scales: tuple[Tensor, ...],
    shifts: tuple[Tensor, ...],
    norm: str,
    eps: float,
    quantize: bool,
    arithmetic: torch.dtype,
    fork: bool,
) -> list[Tensor | Quantized]:
    if quantize and not converts(x.device.type, x.device.index):
        return adaln_modulate_reference(x, scales, shifts, norm, eps, quantize, arithmetic, fork)
    return adaln.fused(x, (), (), (), scales, shifts, norm, eps, quantize, fork)


IMPLEMENTATIONS = {"reference": adaln_modulate_reference, "triton": adaln_modulate_triton}


def adaln_modulate(
    x: Tensor,
    scale: Tensor | tuple[Tensor, Tensor],
    shift: Tensor | tuple[Tensor, Tensor],
    *,
    norm: str = "layer",
    eps: float = 1e-6,
    quantize: bool = False,
    fork: bool = False,
) -> Tensor | Quantized | tuple[Tensor | Quantized, ...]:
    """norm(x) (1 + scale) + shift. The result has x's shape and dtype; with pairs for scale and shift there are two
    results, from one reading of x and one normalisation.

    x (B, S, C): the tokens.  scale, shift (B, C), or pairs of such tensors.  All receive gradients.
    norm: "layer" for (x - mean) / sqrt(var + eps) over C, "rms" for x / sqrt(mean x^2 + eps).
    quantize: results as `Quantized`, each token in e4m3 with its own scale, rounded once. Without gradient.
    fork: return x first, for what else reads it, such as a residual connection. The gradient that comes back through it
        is added where that of the results is made, and rounded with it; autograd would add the two in another pass.

    Tensors are float32, float16 or bfloat16, mixed as they come, of any strides and any batch; arithmetic is
    float32, or float64 where any tensor is. Chunks of columns, as scale and shift often are, are read where they are;
    tokens whose channels are not dense are copied.

    Kept for the backward pass: x. In eager mode it is x and n, twice the bytes.

    Raises TypeError for a dtype or type, ValueError for a shape, a device, an unknown norm and for quantize where a
    tensor would get a gradient.
    """
    arithmetic = adaln.check_tokens(x=x)
    scales, shifts, arithmetic = adaln.check_modulated("x", x, scale, shift, norm, eps, quantize, arithmetic)
    run = choose("adaln_modulate", IMPLEMENTATIONS, x.device, arithmetic)
    results = run(x, scales, shifts, norm, float(eps), quantize, arithmetic, fork)
    return tuple(results) if len(results) > 1 else results[0]
