"""Correctness: relative errors in norm, their limits, and memory that shows what a kernel did not write."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# The largest error in norm of one rounding to bfloat16. Two roundings make 2.4e-3, as errors differ in sign.
RESULT_LIMIT = 2**-8
LOSS_LIMIT = 1e-5  # a float32 sum of 155 million squares, in any order
PEER_LIMIT = 2**-5  # peers round to bfloat16 after every operation: this checks only that they compute the same
QUANTIZED_LIMIT = 2**-5  # e4m3 has three bits: 2.6 % of error in norm


class Error(NamedTuple):
    value: float
    limit: float

    @property
    def allowed(self) -> bool:
        return self.value <= self.limit  # False for NaN


def relative(got: Tensor | Iterable[Tensor], exact: Tensor | Iterable[Tensor]) -> float:
    """Norm of the difference over the norm of `exact`, in float64; several tensors count as one vector."""
    pairs = [(got, exact)] if isinstance(got, Tensor) else zip(got, exact, strict=True)
    squares = [squared(*pair) for pair in pairs]
    return root(*(sum(each) for each in zip(*squares, strict=True))) if squares else 0.0


def squared(got: Tensor, exact: Tensor) -> tuple[float, float]:
    """Squared norms of the difference and of the exact tensor."""
    got, exact = got.double(), exact.double()
    return (got - exact).square().sum().item(), exact.square().sum().item()


def root(difference: float, exact: float) -> float:
    """The relative error from squared norms: 0 if both are 0."""
    return math.sqrt(difference / exact) if exact else math.inf if difference else 0.0


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill new tensors with NaN, so that an element that a kernel does not write shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def said(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
