"""Adaptive normalisation: a norm without weights, then a scale and a shift for each sample and channel.

    out = norm(x) (1 + scale) + shift

adaln.py has the norms' formulas, the reference and the kernels, of which this is the case without gates.

Source: arXiv 2212.09748 (DiT), section 3.2; arXiv 2403.03206 (SD3), figure 2. SD3.5 modulates one n twice.
"""

from typing import Any, overload

import torch
from torch import Tensor

from dpdmd.kernels.blocks import adaln
from dpdmd.kernels.blocks.fp8 import Quantized, no_gradient
from dpdmd.kernels.runtime import checks

NORMS = ("layer", "rms")
Vectors = Tensor | tuple[Tensor, Tensor]


@overload
def adaln_modulate(x: Tensor, scale: Tensor, shift: Tensor, *, norm: str = ..., eps: float = ...) -> Tensor: ...
@overload
def adaln_modulate(
    x: Tensor,
    scale: Vectors,
    shift: Vectors,
    *,
    norm: str = ...,
    eps: float = ...,
    quantize: bool = ...,
    fork: bool = ...,
) -> Tensor | tuple[Any, ...]: ...
def adaln_modulate(
    x: Tensor,
    scale: Vectors,
    shift: Vectors,
    *,
    norm: str = "layer",
    eps: float = 1e-6,
    quantize: bool = False,
    fork: bool = False,
) -> Tensor | Quantized | tuple[Tensor | Quantized, ...]:
    """norm(x) (1 + scale) + shift, in x's shape and dtype; two results, from one normalisation, with pairs.

    x (B, S, C): the tokens.  scale, shift (B, C), or pairs of such tensors.  All receive gradients.
    norm: "layer" for (x - mean) / sqrt(var + eps) over C, "rms" for x / sqrt(mean x^2 + eps).
    quantize: results as `Quantized`, each token in e4m3 with its own scale, rounded once. Without gradient.
    fork: return x first, for its other readers, such as a residual connection. Its gradient is then added in the same
        kernel, and rounded once; autograd would add the two in another pass.

    Tensors are float32, float16 or bfloat16, in any mix, of any strides and any batch; arithmetic is float32, or float64
    where any tensor is. Scale and shift may be slices of columns; only tokens whose channels are not dense are copied.

    Saved for backward: x. Eager saves x and n, twice the bytes.

    Raises TypeError for a dtype or type, ValueError for a shape, a device, an unknown norm, and quantize if a tensor needs
    a gradient.
    """
    arithmetic = check_tokens(x=x)
    scales, shifts, arithmetic = check_modulated("x", x, scale, shift, norm, eps, quantize, arithmetic)
    inputs = adaln.Inputs(x, (), (), (), scales, shifts, norm == "rms", float(eps), quantize)
    results = adaln.run("adaln_modulate", inputs, arithmetic, fork)
    return tuple(results) if len(results) > 1 else results[0]


def check_tokens(**tokens: Tensor) -> torch.dtype:
    """Tensors (B, S, C) of one shape. Returns the arithmetic's dtype."""
    arithmetic = checks.tensors(**tokens)
    name, first = next(iter(tokens.items()))
    if first.ndim != 3:
        raise ValueError(f"{name} has shape {tuple(first.shape)}; it needs three dimensions: (B, S, C)")
    return arithmetic


def entries(name: str, value: Vectors, like: str = "", count: int = 0) -> dict[str, Tensor]:
    """The tensor, or both of a pair, by their names for errors; `count` entries, as argument `like` has, unless 0."""
    pair = isinstance(value, (tuple, list))
    if pair and len(value) != 2:
        raise ValueError(f"{name} has {len(value)} entries; it needs to be a tensor or a pair of tensors")
    if count and pair != (count == 2):
        kinds = ("a tensor", "a pair")
        raise ValueError(f"{name} is {kinds[pair]} and {like} is {kinds[count - 1]}; both need to be the same")
    return {f"{name}[{i}]": entry for i, entry in enumerate(value)} if pair else {name: value}


def check_vectors(
    vectors: dict[str, Tensor], shape: tuple[int, ...], name: str, like: Tensor, arithmetic: torch.dtype
) -> torch.dtype:
    """Vectors of `shape`, (B, C) or (C,), for the tokens `like`, named `name`. Returns the arithmetic's dtype."""
    if checks.alike(shape, like.device, *vectors.values()):
        return arithmetic
    for vector, value in vectors.items():
        checks.floating(vector, value)
        if value.dtype == torch.float64:
            arithmetic = torch.float64
        if value.shape != shape:
            hint = ", without a dimension for tokens" if value.ndim > len(shape) else ""
            raise ValueError(
                f"{vector} has shape {tuple(value.shape)}; with {name} {tuple(like.shape)} it needs {shape}{hint}"
            )
        if value.device != like.device:
            raise ValueError(f"{vector} is on {value.device}; it needs to be on {name}'s device {like.device}")
    return arithmetic


def check_modulated(
    name: str,
    like: Tensor,
    scale: Vectors,
    shift: Vectors,
    norm: str,
    eps: float,
    quantize: bool,
    arithmetic: torch.dtype,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], torch.dtype]:
    """Returns the scales, the shifts (one each, or two) and the arithmetic's dtype, for the tokens `like`, named `name`."""
    scales = entries("scale", scale)
    shifts = entries("shift", shift, "scale", len(scales))
    B, _, C = like.shape
    for vectors in (scales, shifts):
        arithmetic = check_vectors(vectors, (B, C), name, like, arithmetic)
    checks.one_of("norm", norm, NORMS)
    checks.number("eps", eps)
    if quantize:
        no_gradient(**{name: like}, **scales, **shifts)
    return tuple(scales.values()), tuple(shifts.values()), arithmetic
