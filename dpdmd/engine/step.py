"""What became of an update, learnt without making the host wait for the device."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Later:
    """A device tensor on its way to the host: reading it waits for what was queued before it, not for what came after."""

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
    """What became of an update; its numbers are fetched from the device when they are asked for."""

    def __init__(self, lr: float, norm: Tensor):
        self.lr = lr
        self._norm = Later(norm)

    @property
    def gradient_norm(self) -> float:
        """Before clipping; inf where the update was not applied."""
        norm = float(self._norm.read())
        return norm if math.isfinite(norm) else math.inf

    @property
    def applied(self) -> bool:
        """False: loss or gradient was not finite and the weights stayed as they were."""
        return math.isfinite(self.gradient_norm)
