"""Which implementation of an operation runs: `reference` (plain PyTorch, any device), `triton` or `cuda` (fused).

`auto`, the default, takes the fastest one there is for the tensors at hand: the reference on CPU and for float64,
else `cuda`, then `triton`, then the reference. Two things override it: the environment variable DPDMD_KERNELS for
the process, and `use_backend` for a block of code, which wins over the variable. Under torch.compile the choice is
made at tracing: a later `use_backend` recompiles, a later change of the environment does not.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping

import torch

ENVIRONMENT_VARIABLE = "DPDMD_KERNELS"
CHOICES = ("auto", "reference", "triton", "cuda")
FASTEST_FIRST = ("cuda", "triton", "reference")

# A plain global rather than a ContextVar: torch.compile guards on globals and cannot trace ContextVar.get.
_forced: str | None = None


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the block's operations with implementation `name`: "auto", "reference", "triton" or "cuda". Not per
    thread: the process's.

    Raises ValueError for another name; an operation that lacks the implementation raises RuntimeError when it is
    called.
    """
    global _forced
    if name not in CHOICES:
        raise ValueError(f"use_backend got {name!r}; it takes one of {', '.join(CHOICES)}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def requested() -> str:
    """The implementation asked for: by `use_backend`, else by DPDMD_KERNELS, else "auto"."""
    if _forced is not None:
        return _forced
    name = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
    if name not in CHOICES:
        raise ValueError(f"{ENVIRONMENT_VARIABLE}={name!r} in the environment; it takes one of {', '.join(CHOICES)}")
    return name


def choose(
    operation: str, implementations: Mapping[str, Callable], device: torch.device, arithmetic: torch.dtype
) -> Callable:
    """The callable in `implementations` (by name, "reference" always there) to run for this device and arithmetic."""
    name = requested()
    if name == "auto":
        if device.type == "cpu" or arithmetic == torch.float64:
            return implementations["reference"]
        return next(implementations[candidate] for candidate in FASTEST_FIRST if candidate in implementations)
    if name not in implementations:
        raise RuntimeError(
            f"{operation} has no {name!r} implementation in this version of dpdmd, only: {', '.join(implementations)}. "
            f"Set {ENVIRONMENT_VARIABLE}=auto, or wrap the call in dpdmd.kernels.use_backend('auto'), or install a "
            f"version of dpdmd that has it"
        )
    return implementations[name]
