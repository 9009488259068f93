"""What right means: relative errors in norm, the limits that they have, and memory that shows what a kernel forgot."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# The worst that one rounding to bfloat16 can do to a norm. Two roundings make 2.4e-3, as errors differ in sign.
RESULT_LIMIT = 2**-8
LOSS_LIMIT = 1e-5  # a float32 sum of 155 million squares, in whatever order
# Peers in bfloat16 round after every operation: of them it is only asked whether they compute the same.
PEER_LIMIT = 2**-5
QUANTIZED_LIMIT = 2**-5  # e4m3 has three bits: 2.6 % of error in norm


class Error(NamedTuple):
    value: float
    limit: float

    @property
    def allowed(self) -> bool:
        return self.value <= self.limit  # not of NaN


def relative(got: Tensor | Iterable[Tensor], exact: Tensor | Iterable[Tensor]) -> float:
    """Norm of the difference over the norm of what is exact, in float64; several tensors are one vector."""
    pairs = [(got, exact)] if isinstance(got, Tensor) else zip(got, exact, strict=True)
    squares = [squared(*pair) for pair in pairs]
    return root(*(sum(each) for each in zip(*squares, strict=True))) if squares else 0.0


def squared(got: Tensor, exact: Tensor) -> tuple[float, float]:
    """Squared norms of the difference and of the exact tensor."""
    got, exact = got.double(), exact.double()
    return (got - exact).square().sum().item(), exact.square().sum().item()


def root(difference: float, exact: float) -> float:
    """The relative error of squared norms; what is 0 and should be is not wrong."""
    return math.sqrt(difference / exact) if exact else math.inf if difference else 0.0


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh tensors hold NaN until written, so an element that a kernel forgets shows up."""
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
