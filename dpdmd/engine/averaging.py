"""Exponential moving average of a sharded network: average <- decay average + (1 - decay) weights, after each update.

Each process averages its own flat float32 shards, on their device or in host memory; nothing is communicated. Sampling
and export put the average in the weights' place for a while (`in_place_of`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK = 1 << 26  # elements copied from the device to the host at a time


class Average:
    """shards: the average of float32 shards (masters), cut alike; float32, on `device` (None: each master's own)."""

    def __init__(self, masters: list[Tensor], decay: float, device: torch.device | str | None = None):
        self._masters = [master.detach() for master in masters]
        self._decay = decay
        self.shards = [master.to(device or master.device, copy=True) for master in self._masters]

    @torch.no_grad()
    def update(self, applied: Tensor) -> None:
        """Call after each update. applied: bool (), on the masters' device; where it is False the average stays."""
        for shard, master in zip(self.shards, self._masters, strict=True):
            weight = ((1.0 - self._decay) * applied.to(torch.float32)).to(shard.device)
            for first in range(0, len(shard), CHUNK):
                part = shard[first : first + CHUNK]
                part.lerp_(master[first : first + CHUNK].to(shard.device), weight)

    @contextlib.contextmanager
    def in_place_of(self, weights: list[Tensor]) -> Iterator[None]:
        """Inside the block `weights`, shards cut alike, hold the average in their dtype; then their own values again."""
        before = [weight.to(shard.device, copy=True) for weight, shard in zip(weights, self.shards, strict=True)]
        try:
            for weight, shard in zip(weights, self.shards, strict=True):
                weight.copy_(shard)
            yield
        finally:
            for weight, held in zip(weights, before, strict=True):
                weight.copy_(held)
