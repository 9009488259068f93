"""When the weights of a network that ZeRO-3 shards are whole, and where its gradients go.

DeepSpeed shards: each process keeps one flat piece of the weights, of the gradient and of the optimizer's state. Its own
hooks gather the weights anew in every pass of every submodule; with three networks and sixty passes a cycle that costs
more than the passes. Here a network is gathered for a phase (all passes of a rollout, or a forward chain and its
backward pass), in units: one a transformer block, one for what lies before the blocks and one for what comes after.

Weights      units gathered and released, for a phase at once or block by block with the next one under way
Gradients    each unit's gradient averaged over the processes as soon as autograd has finished it; the shard is kept

On one process a gather is no copy: parameters are views of the flat piece.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

# How long weights stay whole: until an update changes them; for a phase; while a block runs.
Policy = Literal["whole", "phase", "block"]


class Traffic:
    """Counts what a network sends for and receives: unit gathers, whole-network gathers, bytes received."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        self.network_gathers = 0
        self.unit_gathers = 0
        self.gathered_bytes = 0
        self.reduced_bytes = 0


class Unit:
    """Consecutive parameters that are gathered together; their shards are one slice of the flat piece."""

    def __init__(self, parameters: list[nn.Parameter], shard: Tensor, offset: int, world_size: int, stays: bool):
        self.parameters = parameters
        self.offset = offset  # of the shard in the flat piece
        self.size = len(shard)  # elements, padding included
        sizes = [parameter.ds_tensor.ds_numel for parameter in parameters]
        starts = accumulate(sizes, initial=0)
        self.places = [slice(start, start + size) for start, size in zip(starts, sizes, strict=False)]  # in the shard
        self._pieces: tuple[Tensor, ...] = (shard,)  # what travels: the shard, or its codes and their scales
        self._dtype, self._device = shard.dtype, shard.device
        self._world_size = world_size
        self._works: list = []
        self._received: list[Tensor] = []
        self._stays = stays  # whole weights are always at the same place
        self._flat: Tensor | None = None
        self.whole = False

    def compress(self) -> None:
        """From now on the shard is kept, and travels, in FP8."""
        self._pieces = to_float8(self._pieces[0])

    def empty(self, size: int, dtype: torch.dtype) -> Tensor:
        """Uninitialised, where the shard is."""
        return torch.empty(size, dtype=dtype, device=self._device)

    def launch(self) -> int:
        """Starts the gather; returns bytes that it will receive."""
        if self.whole or self._works or self._world_size == 1:
            return 0
        self._received = [piece.new_empty(self._world_size, *piece.shape) for piece in self._pieces]
        for received, piece in zip(self._received, self._pieces, strict=True):
            self._works.append(dist.all_gather_into_tensor(received.view(-1), piece.view(-1), async_op=True))
        return (self._world_size - 1) * sum(piece.nbytes for piece in self._pieces)

    def finish(self) -> None:
        """Makes the parameters whole; later work of this stream sees them so."""
        if self.whole:
            return
        if self._world_size == 1:
            values = self._values(self._pieces)
            for parameter, place in zip(self.parameters, self.places, strict=True):
                parameter.data = values[place].view(parameter.ds_shape)
        else:
            for work in self._works:
                work.wait()
            rows = self._values(self._received)
            whole = self._flat
            if whole is None:
                whole = self.empty(sum(parameter.ds_numel for parameter in self.parameters), self._dtype)
            if self._stays:
                self._flat = whole
            flats = whole.split([parameter.ds_numel for parameter in self.parameters])
            to, of = self.pieces(flats, rows)
            torch._foreach_copy_(to, of)
            for parameter, flat in zip(self.parameters, flats, strict=True):
                parameter.data = flat.view(parameter.ds_shape)
            self._works, self._received = [], []
        self._mark(True)

    def release(self) -> None:
        for work in self._works:
            work.wait()
        self._works, self._received = [], []
        if self.whole:
            for parameter in self.parameters:
                parameter.data = parameter.data.new_empty(0)
            self._mark(False)

    def _values(self, pieces: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
        """(..., size) in the weights' dtype."""
        return pieces[0] if len(pieces) == 1 else from_float8(*pieces, self._dtype)[..., : self.size]

    def pieces(self, flats: Sequence[Tensor | None], rows: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """What belongs together, without padding: of each parameter's elements flats[i] (None: left out) those that a
        process has, and where they are in rows (processes, size)."""
        of_flats, of_rows = [], []
        for flat, place in zip(flats, self.places, strict=True):
            size = place.stop - place.start
            for rank, piece in enumerate(() if flat is None else flat.split(size)):
                of_flats.append(piece)
                of_rows.append(rows[rank, place][: len(piece)])
        return of_flats, of_rows

    def _mark(self, whole: bool) -> None:
        # DeepSpeed's own checks, when it saves and loads, ask for the status.
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        status = ZeroParamStatus.AVAILABLE if whole else ZeroParamStatus.NOT_AVAILABLE
        for parameter in self.parameters:
            parameter.ds_status = status
        self.whole = whole


GROUP = 128  # elements of a shard that share a scale: its four bytes are 3 % of theirs
_LARGEST = torch.finfo(torch.float8_e4m3fn).max


def to_float8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (groups, 128), uint8 that hold e4m3, and scales (groups, 1), float32, of x (n,), its end filled up with 0:
    x = code * scale to a 16th of itself, or to 2^-18 of the largest in its group."""
    groups = torch.nn.functional.pad(x, (0, -len(x) % GROUP)).view(-1, GROUP).float()
    scales = (groups.abs().amax(dim=1, keepdim=True) / _LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    return (groups / scales).to(torch.float8_e4m3fn).view(torch.uint8), scales


def from_float8(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """(..., 128 groups) of codes (..., groups, 128) and scales (..., groups, 1)."""
    return (codes.view(torch.float8_e4m3fn).float() * scales).to(dtype).flatten(-2)


class Weights:
    """The weights of one network under ZeRO-3.

    parameters: partitioned by DeepSpeed, which has no hooks on their modules (any more); blocks: the transformer blocks,
    in the order in which they run; flat: this process's piece, in the order of parameters; None: made here of the
    parameters' own pieces; float8: frozen weights are kept and sent in FP8, and are rounded by it.
    """

    def __init__(
        self,
        parameters: list[nn.Parameter],
        blocks: list[nn.Module],
        policy: Policy,
        world_size: int,
        flat: Tensor | None = None,
        *,
        float8: bool = False,
    ):
        self.policy = policy
        self.traffic = Traffic()
        self._world_size = world_size
        if flat is None:
            flat = _defragment(parameters)
        owner = {parameter: index for index, block in enumerate(blocks) for parameter in block.parameters()}
        self.units: list[Unit] = []
        of_block: dict[int, Unit] = {}
        offset, run = 0, []
        for i, parameter in enumerate(parameters):
            run.append(parameter)
            following = parameters[i + 1] if i + 1 < len(parameters) else None
            if following is None or owner.get(following) != owner.get(parameter):
                size = sum(each.ds_tensor.ds_numel for each in run)
                unit = Unit(run, flat[offset : offset + size], offset, world_size, self.stay)
                self.units.append(unit)
                if parameter in owner:
                    assert owner[parameter] not in of_block, "a block's parameters are not consecutive"
                    of_block[owner[parameter]] = unit
                offset, run = offset + size, []
        assert offset == flat.numel(), (offset, flat.numel())
        if float8:
            for unit in self.units:
                unit.compress()
            for parameter in parameters:
                parameter.ds_tensor.data = parameter.ds_tensor.new_empty(0)
        self._blockwise = [of_block[index] for index in range(len(blocks))] if policy == "block" else []
        self._resident = [unit for unit in self.units if unit not in self._blockwise]
        self._backward_unit: int | None = None  # the block whose backward pass is under way
        for index, block in enumerate(blocks if policy == "block" else []):
            self._guard(block, index)

    @property
    def stay(self) -> bool:
        """Whether weights are at the same place whenever they are whole."""
        return self.policy == "whole"

    def gather(self) -> None:
        """Makes whole what a phase needs whole: everything, or what is outside the blocks."""
        outstanding = [unit for unit in self._resident if not unit.whole]
        if not outstanding:
            return
        self.traffic.network_gathers += 1
        self.prefetch()
        for unit in outstanding:
            unit.finish()

    def prefetch(self) -> None:
        """Starts `gather` without waiting for it."""
        for unit in self._resident:
            self._launch(unit)

    def release(self) -> None:
        for unit in self.units:
            unit.release()
        self._backward_unit = None

    def end_of_phase(self) -> None:
        if self.policy != "whole":
            self.release()

    def changed(self) -> None:
        """To be called when an update has written the shards: what is whole is that of before, but on one process. Weights
        that are to stay whole are fetched anew while others work."""
        if self._world_size > 1:
            self.release()
            if self.policy == "whole":
                self.prefetch()

    def _launch(self, unit: Unit) -> None:
        received = unit.launch()
        self.traffic.gathered_bytes += received
        self.traffic.unit_gathers += received > 0

    def _guard(self, block: nn.Module, index: int) -> None:
        """The block's weights are there when it runs, forward and backward, with its neighbour's on the way."""
        units = self._blockwise

        def before_forward(*_):
            self._enter(index, index + 1)

        def after_forward(*_):
            units[index].release()

        def before_backward(*_):
            # Blocks without differentiable inputs have no hook after their backward pass: the one before them closes it.
            if self._backward_unit is not None and self._backward_unit != index:
                units[self._backward_unit].release()
            self._backward_unit = index
            self._enter(index, index - 1)

        block.register_forward_pre_hook(before_forward)
        block.register_forward_hook(after_forward)
        block.register_full_backward_pre_hook(before_backward)

    def _enter(self, index: int, neighbour: int) -> None:
        units = self._blockwise
        self._launch(units[index])
        if 0 <= neighbour < len(units):
            self._launch(units[neighbour])
        units[index].finish()


def _defragment(parameters: list[nn.Parameter]) -> Tensor:
    """One flat tensor of the parameters' pieces, which become views of it."""
    pieces = [parameter.ds_tensor for parameter in parameters]
    flat = torch.cat([piece.data.view(-1) for piece in pieces])
    offset = 0
    for piece in pieces:
        piece.data = flat[offset : offset + piece.numel()]
        offset += piece.numel()
    return flat


class Gradients:
    """Takes each parameter's gradient when autograd has finished it, averages over the processes, keeps the shard.

    flat: this process's shard of the gradient, in the units' order, in `dtype` (float32 or the weights'). The shards of
    several backward passes are added until `clear` is called; between two updates there is none, so that networks that
    take turns need the memory once.
    """

    def __init__(self, units: list[Unit], dtype: torch.dtype, world_size: int, traffic: Traffic):
        self.flat: Tensor | None = None
        self._dtype = dtype
        self._units = units
        self._world_size = world_size
        self._traffic = traffic
        self._taken: dict[Unit, list[nn.Parameter]] = {unit: [] for unit in units}
        self._in_flight: deque[Callable[[], None]] = deque()
        self._first = True  # of the backward passes whose sum is wanted
        self._reduced: set[Unit] = set()
        self.held = False  # gradients stay with the parameters, for another backward pass to add to
        for unit in units:
            for parameter in unit.parameters:
                if parameter.requires_grad:
                    self._watch(unit, parameter)

    def clear(self) -> None:
        """The sum has been used; the next backward pass begins a new one."""
        self.flat = None
        self._first = True

    def finish(self) -> None:
        """After a backward pass: every unit is reduced and the shard complete in the order of this stream."""
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

        # The node that accumulates takes its shape from the parameter, which must be whole when it is made.
        parameter.register_post_accumulate_grad_hook(take)

    @torch.no_grad()
    def _reduce(self, unit: Unit) -> None:
        if self.flat is None:
            self.flat = unit.empty(sum(each.size for each in self._units), self._dtype)
        shard = self.flat[unit.offset : unit.offset + unit.size]
        self._taken[unit].clear()
        self._reduced.add(unit)
        if self._world_size == 1:
            self._keep(unit, shard)
            return
        sent = self._sent(unit)
        self._traffic.reduced_bytes += (self._world_size - 1) * sent[0].nbytes
        direct = self._first and sent.dtype == shard.dtype
        received = shard if direct else torch.empty_like(sent[0])
        sent.div_(self._world_size)
        work = dist.reduce_scatter_tensor(received, sent.view(-1), async_op=True)

        def complete():
            work.wait()
            if not direct:
                shard.copy_(received) if self._first else shard.add_(received)

        self._in_flight.append(complete)
        if len(self._in_flight) > 2:  # what is sent stays in memory until then
            self._in_flight.popleft()()

    def _keep(self, unit: Unit, shard: Tensor) -> None:
        gradients = _taken(unit)
        for gradient, place in zip(gradients, unit.places, strict=True):
            if gradient is None and self._first:
                shard[place].zero_()
        of, to = unit.pieces(gradients, shard.unsqueeze(0))
        if to:
            (torch._foreach_copy_ if self._first else torch._foreach_add_)(to, of)

    def _sent(self, unit: Unit) -> Tensor:
        """(processes, unit.size): what each of them is to get, padding and parameters without a gradient 0."""
        sent = unit.parameters[0].new_zeros(self._world_size, unit.size)
        of, to = unit.pieces(_taken(unit), sent)
        if to:
            torch._foreach_copy_(to, of)
        return sent


def _taken(unit: Unit) -> list[Tensor | None]:
    """The parameters' gradients, flat, taken from them."""
    gradients = [None if parameter.grad is None else parameter.grad.reshape(-1) for parameter in unit.parameters]
    for parameter in unit.parameters:
        parameter.grad = None
    return gradients
