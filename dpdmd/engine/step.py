"""The outcome of an update, read without making the host wait for later work of the device."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Later:
    """A device tensor on its way to the host: reading it waits for earlier work of the stream only."""

    def __init__(self, value: Tensor):
        self._event = None
        self._value = value.detach()
        if value.is_cuda:
            self._value = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            self._value.copy_(value.detach(), non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> Tensor:
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return self._value


class Step:
    """The outcome of an update; its numbers are fetched from the device when they are read."""

    def __init__(self, lr: float, norm: Tensor):
        self.lr = lr
        self._norm = Later(norm)

    @property
    def gradient_norm(self) -> float:
        """Norm before clipping; inf if the update was not applied."""
        norm = float(self._norm.read())
        return norm if math.isfinite(norm) else math.inf

    @property
    def applied(self) -> bool:
        """False: loss or gradient was not finite, and the weights were not changed."""
        return math.isfinite(self.gradient_norm)
