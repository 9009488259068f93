"""Passes without gradient as CUDA graphs: recorded once, then launched as a whole, without gaps between the kernels.

A graph reads and writes the addresses that it was recorded with, so weights must stay in place (residency `whole`); their
values may change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

GRAPHS = 2  # per function: training's shape and another; further shapes are rare and run directly


class Replay:
    """A function of CUDA tensors that returns a Tensor, called without gradient.

    For each set of input shapes the first call runs directly, which compiles kernels and fills caches; the second is
    recorded; all others are replayed. Results are new tensors, bitwise equal to the function's.

    pool: memory for intermediates (torch.cuda.graph_pool_handle()), shared by functions that never run at the same time.
    """

    def __init__(self, function: Callable[..., Tensor], pool: Any):
        self._function = function
        self._pool = pool
        self._recorded: dict[tuple, _Recorded | None] = {}  # None: seen once
        self._direct = False

    def __call__(self, *arguments: Any) -> Tensor:
        inputs, structure = tree_flatten(arguments)
        key = (str(structure), *((x.shape, x.dtype, x.device) for x in inputs))
        recorded = self._recorded.get(key)
        if self._direct or key not in self._recorded or (recorded is None and len(self) == GRAPHS):
            self._recorded.setdefault(key, None)
            self._direct = False
            return self._function(*arguments)
        if recorded is None:
            recorded = self._recorded[key] = _Recorded(self._function, inputs, structure, self._pool)
        return recorded(inputs)

    def __len__(self) -> int:
        """Graphs recorded."""
        return sum(each is not None for each in self._recorded.values())

    def run_next(self) -> None:
        """Runs the next call directly: it may have to remake FP8 copies of changed weights."""
        self._direct = True

    def forget(self) -> None:
        """Drops all graphs; call it if weights may have moved."""
        self._recorded.clear()


class _Recorded:
    def __init__(self, function: Callable[..., Tensor], inputs: list[Tensor], structure: Any, pool: Any):
        self._inputs = [x.clone() for x in inputs]
        self._graph = torch.cuda.CUDAGraph()
        # thread_local: threads that fetch prompts, and NCCL's, use CUDA meanwhile.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._output = function(*tree_unflatten(self._inputs, structure))

    def __call__(self, inputs: list[Tensor]) -> Tensor:
        torch._foreach_copy_(self._inputs, inputs)
        self._graph.replay()
        return self._output.clone()
