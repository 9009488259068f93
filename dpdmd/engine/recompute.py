"""Activation checkpointing of blocks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dpdmd.kernels import selective_checkpoint


class Recomputation:
    """Activation checkpointing of blocks, inside their hooks, so that their weights are whole when they run again.

    how: engine.checkpointing, "selective" or "full". keep: the first block passes of each forward chain keep their
    activations, this many. remember: wraps a block's forward so that it runs again as it ran, where that depends on more
    than its arguments.
    """

    def __init__(self, blocks: list[nn.Module], how: str, remember: Callable[[Callable], Callable] | None = None):
        self.keep = 0
        self._passes = 0  # of the current chain
        for block in blocks:
            self._wrap(block, how, remember or (lambda forward: forward))

    def end_of_chain(self) -> None:
        self._passes = 0

    def _wrap(self, block: nn.Module, how: str, remember: Callable[[Callable], Callable]) -> None:
        forward = block.forward
        parameters = [parameter for parameter in block.parameters() if parameter.requires_grad]

        def checkpointed(*args, **kwargs):
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            self._passes += 1
            if self._passes <= self.keep:
                return forward(*args, **kwargs)
            if how == "full":
                return checkpoint(remember(forward), *args, use_reentrant=False, **kwargs)
            return selective_checkpoint(remember(forward), *args, parameters=parameters, **kwargs)

        block.forward = checkpointed
