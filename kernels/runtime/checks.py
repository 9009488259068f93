"""The checks of the operations' arguments: TypeError for types and dtypes, ValueError for shapes, devices and values.

They read no tensor's values: a GPU never waits, and torch.compile traces the checks away.
"""

from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_FLOAT32_ARITHMETIC = DTYPES[:3]
REDUCTIONS = ("mean", "sum", "none")


def tensors(**arguments: Any) -> torch.dtype:
    """Check that these are floating tensors (B, ...) of the first one's shape and device, or None. Returns the dtype of
    the arithmetic: float64 where any tensor has it, else float32."""
    (first, like), *_ = arguments.items()
    floating(first, like)
    shape, device = like.shape, like.device
    if shape and alike(shape, device, *arguments.values()):
        return torch.float32
    given = {name: value for name, value in arguments.items() if value is not None}
    for name, value in given.items():
        floating(name, value)
        if value.shape != shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}; it needs {first}'s shape {tuple(shape)}")
        if value.device != device:
            raise ValueError(f"{name} is on {value.device}; it needs to be on {first}'s device {device}")
    if not shape:
        raise ValueError(f"{first} has shape (); it needs a batch dimension: (B, ...)")
    return torch.float64 if any(value.dtype == torch.float64 for value in given.values()) else torch.float32


def alike(shape: tuple[int, ...], device: torch.device, *values: object) -> bool:
    """Whether all are None or tensors of this shape and device, and the arithmetic is float32. This is faster than
    `tensors`, which names each argument for an error message."""
    for value in values:
        if value is None:
            continue
        if not isinstance(value, Tensor) or value.dtype not in _FLOAT32_ARITHMETIC:
            return False
        if value.shape != shape or value.device != device:
            return False
    return True


def floating(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; it needs to be a torch.Tensor")
    if value.dtype not in DTYPES:
        raise TypeError(f"{name} has dtype {value.dtype}; it needs float32, float16, bfloat16 or float64")


def number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is a {type(value).__name__}; it needs to be a float")


def per_sample(name: str, value: float | Tensor, like: Tensor, arithmetic: torch.dtype) -> None:
    """Check a coefficient: a float for all samples, or a tensor (B,) in float32 (float64 where the arithmetic is)."""
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} is a {type(value).__name__}; it needs to be a float or a float32 tensor (B,)")
        return
    if value.dtype != torch.float32 and not value.dtype == arithmetic == torch.float64:
        raise TypeError(
            f"{name} has dtype {value.dtype}; it needs float32, as a rounded time biases the result "
            f"(float64 goes with float64 tensors)"
        )
    if value.shape != like.shape[:1]:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; it needs one entry a sample: {tuple(like.shape[:1])}")
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device}; it needs to be on {like.device} like the other tensors")


def pair(name: str, value: tuple, parts: tuple[str, str], like: Tensor, arithmetic: torch.dtype) -> None:
    """Check two coefficients per sample, such as to_x0 = (a, b)."""
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{name} is a {type(value).__name__}; it needs to be a pair ({', '.join(parts)})")
    if len(value) != 2:
        raise ValueError(f"{name} has {len(value)} entries; it needs to be a pair ({', '.join(parts)})")
    for part, entry in zip(parts, value, strict=True):
        per_sample(f"{name}'s {part}", entry, like, arithmetic)


def guidance(guidance_scale: float, name: str, uncond: Tensor | None) -> None:
    """Check that guidance has the unconditional output, which the operation calls `name`."""
    number("guidance_scale", guidance_scale)
    if uncond is None and guidance_scale != 1:
        raise ValueError(
            f"guidance_scale={guidance_scale} needs {name}, the unconditional output, and got None; "
            f"guidance_scale=1.0 needs no {name}"
        )


def one_of(name: str, value: str | None, allowed: tuple[str | None, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it needs to be one of {', '.join(map(repr, allowed))}")
