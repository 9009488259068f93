"""The residual stream: a gated branch is added to it, and the adaptive norm reads the sum.

    h = residual + gate (y + bias)
    out = norm(h) (1 + scale) + shift        as in adaln_modulate

The bias belongs to the linear layer that made y: the backward pass here computes its gradient's sum anyway. adaln.py has
the reference and the kernels, of which these are the cases with gates.

Source: arXiv 2212.09748 (DiT), section 3.2; arXiv 2403.03206 (SD3), figure 2. SD3.5 adds two branches at once.
"""

from typing import Any

import torch
from torch import Tensor

from dpdmd.kernels.blocks import adaln
from dpdmd.kernels.blocks.adaln_modulate import Vectors, check_modulated, check_tokens, check_vectors, entries
from dpdmd.kernels.blocks.fp8 import no_gradient
from dpdmd.kernels.runtime import checks

Biases = Tensor | tuple[Tensor | None, Tensor | None] | None


def gated_residual(residual: Tensor, gate: Vectors, y: Vectors, *, bias: Biases = None) -> Tensor:
    """residual + gate (y + bias), in residual's shape and dtype; pairs of gate, y and bias add both branches in one pass.

    residual, y (B, S, C); gate (B, C); bias (C,) or None. All receive gradients.

    Dtypes, strides and copies: as in adaln_modulate. The result is rounded once. Saved for backward: y, but not y + bias,
    if gate needs a gradient; eager saves as much.

    Raises TypeError for a dtype or type, ValueError for a shape and a device.
    """
    gates, ys, biases, arithmetic = _check_gated(residual, gate, y, bias)
    inputs = adaln.Inputs(residual, gates, ys, biases, (), (), False, 0.0, False)
    return adaln.run("gated_residual", inputs, arithmetic)[0]


def gated_residual_adaln(
    residual: Tensor,
    gate: Vectors,
    y: Vectors,
    scale: Vectors,
    shift: Vectors,
    *,
    bias: Biases = None,
    norm: str = "layer",
    eps: float = 1e-6,
    quantize: bool = False,
) -> tuple[Any, ...]:
    """`gated_residual`, then `adaln_modulate` of its result, in one pass: (h, out), or (h, out_1, out_2) where scale and
    shift are pairs. The results equal those of the two calls.

    residual, y (B, S, C); gate, scale, shift (B, C); bias (C,) or None: as there. All receive gradients.
    norm, eps, quantize: as in adaln_modulate. h is never quantised.

    Saved for backward: h, which the caller keeps anyway, and y if gate needs a gradient. Eager also saves n.

    Raises TypeError for a dtype or type, ValueError for a shape, a device, an unknown norm, and quantize if a tensor needs
    a gradient.
    """
    gates, ys, biases, arithmetic = _check_gated(residual, gate, y, bias, quantize)
    scales, shifts, arithmetic = check_modulated("residual", residual, scale, shift, norm, eps, quantize, arithmetic)
    inputs = adaln.Inputs(residual, gates, ys, biases, scales, shifts, norm == "rms", float(eps), quantize)
    return tuple(adaln.run("gated_residual_adaln", inputs, arithmetic))


def _check_gated(
    residual: Tensor, gate: Any, y: Any, bias: Any, quantize: bool = False
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor | None, ...], torch.dtype]:
    """Returns the gates, ys and biases, one each or two, and the arithmetic's dtype."""
    if not quantize and _one_gated(residual, gate, y, bias):
        return (gate,), (y,), (bias,), torch.float32
    ys = entries("y", y)
    gates = entries("gate", gate, "y", len(ys))
    biases = entries("bias", bias, "y", len(ys)) if bias is not None else {}
    arithmetic = check_tokens(residual=residual, **ys)
    B, _, C = residual.shape
    arithmetic = check_vectors(gates, (B, C), "residual", residual, arithmetic)
    there = {name: value for name, value in biases.items() if value is not None}
    arithmetic = check_vectors(there, (C,), "residual", residual, arithmetic)
    if quantize:
        no_gradient(residual=residual, **gates, **ys, **there)
    return tuple(gates.values()), tuple(ys.values()), tuple(biases.values()) or (None,) * len(ys), arithmetic


def _one_gated(residual: Tensor, gate: object, y: object, bias: object) -> bool:
    """Whether this is the usual case: one branch, nothing in float64, no error. It skips the slower checks."""
    if not isinstance(residual, Tensor) or residual.ndim != 3 or gate is None or y is None:
        return False
    shape, device = residual.shape, residual.device
    vectors = checks.alike(shape[::2], device, gate) and checks.alike(shape[2:], device, bias)
    return vectors and checks.alike(shape, device, residual, y)
