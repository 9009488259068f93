"""What a checkpoint keeps: results of its forward pass that the recomputation takes in place of computing them again.

The forward pass runs without a graph, the recomputation with one. For the two to be the same bit for bit, operations
that take another kernel where gradients are wanted ask `gradients_wanted`.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dpdmd.kernels.runtime.registration import transformed

Results = tuple[Tensor, ...]
OTHERWISE = "a checkpointed function did not call attention as often in the backward pass as in the forward pass"


class _Active(threading.local):
    keep: Callable[[Callable[[], Results]], Results] | None = None


_active = _Active()


def keeping() -> bool:
    """Whether a checkpoint that keeps results is at work in this thread; torch.compile traces none."""
    return not torch.compiler.is_compiling() and _active.keep is not None


def kept(compute: Callable[[], Results]) -> Results:
    """compute(); where a checkpoint is being recomputed, what it gave in the forward pass."""
    keep = _active.keep if keeping() else None
    return compute() if keep is None else keep(compute)


def gradients_wanted(*tensors: Tensor) -> bool:
    """Whether some of them get a gradient, of this pass or of its recomputation. In a transform of torch.func they may:
    there requires_grad tells of the innermost one alone."""
    return keeping() or transformed() or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))


@contextlib.contextmanager
def recording() -> Iterator[list[Results]]:
    """A list, to which everything `kept` inside the block is added."""
    recorded = []

    def keep(compute):
        results = compute()
        recorded.append(results)
        return results

    with _keep(keep):
        yield recorded


@contextlib.contextmanager
def replaying(recorded: list[Results]) -> Iterator[None]:
    """Inside the block what is `kept` comes from `recorded`, in that order. RuntimeError where there is more or less."""
    remaining = list(recorded)

    def keep(compute):
        if not remaining:
            raise RuntimeError(OTHERWISE)
        return tuple(each.detach() for each in remaining.pop(0))  # what is returned joins a graph

    with _keep(keep):
        yield
    if remaining:
        raise RuntimeError(OTHERWISE)


@contextlib.contextmanager
def _keep(keep: Callable[[Callable[[], Results]], Results]) -> Iterator[None]:
    outer, _active.keep = _active.keep, keep
    try:
        yield
    finally:
        _active.keep = outer
