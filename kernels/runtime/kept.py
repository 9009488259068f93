"""Results that a checkpoint keeps from its forward pass, so that the recomputation need not compute them.

The forward pass runs without a graph, the recomputation with one. Operations that use another kernel where gradients are
wanted ask `gradients_wanted`, which makes the two the same bit for bit.
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
    """Whether this thread is inside a checkpoint that keeps results. torch.compile traces no such checkpoint."""
    return not torch.compiler.is_compiling() and _active.keep is not None


def kept(compute: Callable[[], Results]) -> Results:
    """compute(), or its result from the forward pass where a checkpoint is being recomputed."""
    keep = _active.keep if keeping() else None
    return compute() if keep is None else keep(compute)


def gradients_wanted(*tensors: Tensor) -> bool:
    """Whether any of the tensors may get a gradient, in this pass or in its recomputation. True in every transform of
    torch.func, where requires_grad only knows of the innermost transform."""
    return keeping() or transformed() or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))


@contextlib.contextmanager
def recording() -> Iterator[list[Results]]:
    """A list that collects everything `kept` inside the block."""
    recorded = []

    def keep(compute):
        results = compute()
        recorded.append(results)
        return results

    with _keep(keep):
        yield recorded


@contextlib.contextmanager
def replaying(recorded: list[Results]) -> Iterator[None]:
    """Inside the block `kept` returns what was `recorded`, in order. RuntimeError for more calls or fewer."""
    remaining = list(recorded)

    def keep(compute):
        if not remaining:
            raise RuntimeError(OTHERWISE)
        return tuple(each.detach() for each in remaining.pop(0))  # what is returned gets a graph of its own

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
