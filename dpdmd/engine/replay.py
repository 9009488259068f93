"""Passes without gradient as CUDA graphs: recorded once, then launched as a whole, without gaps between the kernels.

A graph reads and writes where it did when it was recorded. So it is for weights that stay where they are (residency
`whole`), and what they hold may change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

GRAPHS = 2  # recorded of one function: training's shape and another; further shapes are rare, and run as they are


class Replay:
    """function(...) -> Tensor of tensors on a CUDA device, called without gradient.

    The first call with inputs of some shapes runs as it is, which compiles kernels and fills caches; the second one is
    recorded; all others are replayed. Results are new tensors, and the function's own to the bit.

    pool: of memory (torch.cuda.graph_pool_handle()) for what is made on the way, shared with functions that never run at
    the same time.
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
        first_of_its_shape = key not in self._recorded
        if self._direct or first_of_its_shape or (recorded is None and len(self) == GRAPHS):
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
        """The next call runs as it is, for what is made on the way from weights that have changed (FP8 copies)."""
        self._direct = True

    def forget(self) -> None:
        """Records anew, where weights may have moved."""
        self._recorded.clear()


class _Recorded:
    def __init__(self, function: Callable[..., Tensor], inputs: list[Tensor], structure: Any, pool: Any):
        self._inputs = [x.clone() for x in inputs]
        self._graph = torch.cuda.CUDAGraph()
        # Other threads fetch prompts meanwhile, and NCCL's asks how far it is.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._output = function(*tree_unflatten(self._inputs, structure))

    def __call__(self, inputs: list[Tensor]) -> Tensor:
        torch._foreach_copy_(self._inputs, inputs)
        self._graph.replay()
        return self._output.clone()
