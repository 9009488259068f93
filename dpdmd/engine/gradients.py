"""Reduces gradients: a unit's are averaged over the processes as soon as autograd has finished them; the shard is kept."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dpdmd.engine.residency import Traffic, Unit

CHUNK = 1 << 22  # elements converted to float64 at a time, on the CPU


def sum_of_squares(x: Tensor) -> Tensor:
    """Sum over all elements, (): in float64 on the CPU, where torch's float32 sums lose 4e-3 of the norm of 50 million
    elements; in float32 on a GPU, which sums in a tree."""
    if x.device.type != "cpu":
        return torch.linalg.vector_norm(x, dtype=torch.float32).square()
    parts = [part.double().square().sum() for part in x.detach().view(-1).split(CHUNK)]
    return torch.stack(parts).sum() if parts else torch.zeros((), dtype=torch.float64)


class Gradients:
    """Takes each parameter's gradient when autograd has finished it, averages over the processes, keeps the shard.

    flat: this process's shard of the gradient, in the units' order, in `dtype` (float32 or the weights'). Several backward
    passes add to it until `clear` frees it, so that networks that take turns need the memory once.
    """

    def __init__(self, units: list[Unit], dtype: torch.dtype, world_size: int, traffic: Traffic):
        self.flat: Any = None  # a Tensor after an update's first backward pass
        self._dtype = dtype
        self._units = units
        self._world_size = world_size
        self._traffic = traffic
        self._taken: dict[Unit, list[nn.Parameter]] = {unit: [] for unit in units}
        self._in_flight: deque[Callable[[], None]] = deque()
        self._first = True  # the next backward pass begins a sum
        self._reduced: set[Unit] = set()
        self.held = False  # gradients stay with the parameters, for another backward pass to add to
        for unit in units:
            for parameter in unit.parameters:
                if parameter.requires_grad:
                    self._watch(unit, parameter)

    def clear(self) -> None:
        """Frees the sum; the next backward pass begins a new one."""
        self.flat = None
        self._first = True

    def finish(self) -> None:
        """Call after a backward pass: reduces the remaining units and completes the shard, in this stream's order."""
        for unit in self._units:
            if unit not in self._reduced:
                self._reduce(unit)
        while self._in_flight:
            self._in_flight.popleft()()
        self._reduced.clear()
        self._first = False

    def _watch(self, unit: Unit, parameter: nn.Parameter) -> None:
        def take(_):
            if self.held:
                return
            taken = self._taken[unit]
            taken.append(parameter)
            if len(taken) == len(unit.parameters):
                self._reduce(unit)

        # The parameter must be whole here: autograd's accumulation node takes its shape from it.
        parameter.register_post_accumulate_grad_hook(take)

    @torch.no_grad()
    def _reduce(self, unit: Unit) -> None:
        if self.flat is None:
            self.flat = unit.empty(sum(each.size for each in self._units), self._dtype)
        shard: Tensor = self.flat[unit.offset : unit.offset + unit.size]
        self._taken[unit].clear()
        self._reduced.add(unit)
        if self._world_size == 1:
            self._keep(unit, shard)
            return
        # (processes, unit.size): each process's part; 0 in padding and where there is no gradient
        sent = unit.parameters[0].new_zeros(self._world_size, unit.size)
        of, to = unit.pieces(_taken(unit), sent)
        if to:
            torch._foreach_copy_(to, of)
        self._traffic.reduced_bytes += (self._world_size - 1) * sent[0].nbytes
        direct = self._first and sent.dtype == shard.dtype
        received = shard if direct else torch.empty_like(sent[0])
        sent.div_(self._world_size)
        work: Any = dist.reduce_scatter_tensor(received, sent.view(-1), async_op=True)

        def complete():
            work.wait()
            if not direct:
                shard.copy_(received) if self._first else shard.add_(received)

        self._in_flight.append(complete)
        if len(self._in_flight) > 2:  # each keeps what it sends in memory
            self._in_flight.popleft()()

    def _keep(self, unit: Unit, shard: Tensor) -> None:
        gradients = _taken(unit)
        for gradient, place in zip(gradients, unit.places, strict=True):
            if gradient is None and self._first:
                shard[place].zero_()
        of, to = unit.pieces(gradients, shard.unsqueeze(0))
        if to:
            (torch._foreach_copy_ if self._first else torch._foreach_add_)(to, of)


def _taken(unit: Unit) -> list[Tensor | None]:
    """Returns the parameters' gradients, flat, and clears them."""
    gradients = [None if parameter.grad is None else parameter.grad.reshape(-1) for parameter in unit.parameters]
    for parameter in unit.parameters:
        parameter.grad = None
    return gradients
