"""Which implementation of an operation runs: `reference` (plain PyTorch, any device), `triton` or `cuda` (fused).

`auto`, the default, takes the reference on CPU and for float64; else the first that runs of `cuda` (csrc/ built for the
device), `triton` and the reference. The environment variable DPDMD_KERNELS overrides it for the process, `use_backend`
for a block of code and over the variable. An implementation that cannot run raises an error that says how to get it.
torch.compile chooses while it traces: a later `use_backend` recompiles, a later change of the environment does not.
Inside a transform of torch.func (grad, vmap) the reference always runs, as torch can transform that alone.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping

import torch

from dpdmd.kernels.runtime import csrc, launch, registration

ENVIRONMENT_VARIABLE = "DPDMD_KERNELS"
CHOICES = ("auto", "reference", "triton", "cuda")
FASTEST_FIRST = ("cuda", "triton")
MISSING = {"cuda": csrc.missing, "triton": launch.missing}

# A plain global rather than a ContextVar: torch.compile guards on globals and cannot trace ContextVar.get.
_forced: str | None = None


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the operations inside the block, in all threads, with "auto", "reference", "triton" or "cuda".

    Raises ValueError for another name. An operation that lacks the implementation raises RuntimeError when called.
    """
    global _forced
    if name not in CHOICES:
        raise ValueError(f"use_backend got {name!r}; it takes one of {', '.join(CHOICES)}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """Let operations on meta tensors inside the block go the way of their Triton kernels without running any, so that
    autograd saves what it saves on a GPU; the references, which run otherwise, save more. Needs neither Triton nor a GPU,
    and holds for all threads of the process."""
    before, registration.shapes_only = registration.shapes_only, True
    try:
        yield
    finally:
        registration.shapes_only = before


def requested() -> str:
    """The requested one: "reference" in a transform of torch.func, else `use_backend`'s, DPDMD_KERNELS's or "auto"."""
    if registration.transformed():
        return "reference"
    if _forced is not None:
        return _forced
    name = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
    if name not in CHOICES:
        raise ValueError(f"{ENVIRONMENT_VARIABLE}={name!r} in the environment; it takes one of {', '.join(CHOICES)}")
    return name


def choose(
    operation: str, implementations: Mapping[str, Callable], device: torch.device, arithmetic: torch.dtype
) -> Callable:
    """The callable to run for this device and arithmetic, out of `implementations` by name, which has "reference"."""
    name = requested()
    if registration.shapes_only and device.type == "meta" and "triton" in implementations:
        return implementations["triton"]
    if name == "auto":
        if device.type != "cuda" or arithmetic == torch.float64:
            return implementations["reference"]
        for name in served(device.index):
            if name in implementations:
                return implementations[name]
    if name == "reference":
        return implementations["reference"]
    reason = why_not(name, device.type, device.index)
    if name not in implementations:
        reason = f"this operation has only {', '.join(implementations)}"
    elif arithmetic == torch.float64:
        reason = "only the reference takes float64 tensors"
    if reason:
        raise RuntimeError(
            f"{operation} has no {name!r} implementation here: {reason}. {ENVIRONMENT_VARIABLE}=auto, or "
            f"dpdmd.kernels.use_backend('auto') around the call, chooses one that runs"
        )
    return implementations[name]


_served: dict[int | None, tuple[str, ...]] = {}


def served(index: int | None) -> tuple[str, ...]:
    """The implementations that run on CUDA device `index`, the fastest first."""
    if index not in _served:
        fused = [name for name in FASTEST_FIRST if not MISSING[name]("cuda", index)]
        _served[index] = (*fused, "reference")
    return _served[index]


def why_not(name: str, device_type: str, index: int | None) -> str:
    """Why implementation `name` does not run on a device, and how to get it; "" where it runs."""
    if name == "triton" and device_type == "meta" and registration.shapes_only:
        return ""
    return MISSING[name](device_type, index)


# torch.compile runs these two while tracing. (torch.compiler.assume_constant_result imports torch._dynamo: a second.)
served.__dict__["_dynamo_marked_constant"] = why_not.__dict__["_dynamo_marked_constant"] = True
