"""When the weights of a network that ZeRO-3 shards are whole.

DeepSpeed shards: each process keeps one flat piece of the weights, of the gradient and of the optimizer's state. Its own
hooks gather the weights in every pass of every submodule; with three networks and sixty passes a cycle that costs more than
the passes. Here a network is gathered for a phase (all passes of a rollout, or a forward chain and its backward pass), in
units: one per transformer block, one before the blocks and one after.

On one process a gather copies nothing: parameters are views of the flat piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dpdmd.engine.deepspeed import mark, piece_of, piece_size, whole_shape, whole_size

# How long weights stay whole: until an update changes them; for a phase; while a block runs. A new word also touches POLICIES
# and `Weights` below, engine.residency (config.py), `EXPLAINED` (plan.py), and in planner/ `_policy` (residency.py), `gathers`,
# `traffic` and `seconds` (speed.py), `Memory._whole` (memory.py) and `resolve` (search.py).
Policy = Literal["whole", "phase", "block"]
POLICIES: dict[Policy, str] = {  # most memory first; in words, for the log
    "whole": "kept whole",
    "phase": "gathered for each phase",
    "block": "gathered block by block",
}


@dataclass(frozen=True)
class Residency:
    """Where one role's weights are and how it is updated. Decided in planner/residency.py, for the plan and for the run.

    policy: how long they are whole; on a shared base, the adapter's. sharded: each process keeps a piece; else all of it.
    float8: the pieces are kept and sent in FP8. replayed: passes without gradient become CUDA graphs on a GPU, as all that
    they read stays in place. reduced: the engine reduces gradients and updates; else DeepSpeed does. in_parts: the first step
    is differentiated before the others run.
    """

    policy: Policy
    sharded: bool = True
    float8: bool = False
    replayed: bool = False
    reduced: bool = False
    in_parts: bool = False


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
        sizes = [piece_size(parameter) for parameter in parameters]
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
        """Keeps and sends the shard in FP8 from now on."""
        self._pieces = to_float8(self._pieces[0])

    def empty(self, size: int, dtype: torch.dtype) -> Tensor:
        """Uninitialised, on the shard's device."""
        return torch.empty(size, dtype=dtype, device=self._device)

    def launch(self) -> int:
        """Starts the gather; returns the bytes that it will receive."""
        if self.whole or self._works or self._world_size == 1:
            return 0
        self._received = [piece.new_empty(self._world_size, *piece.shape) for piece in self._pieces]
        for received, piece in zip(self._received, self._pieces, strict=True):
            self._works.append(dist.all_gather_into_tensor(received.view(-1), piece.view(-1), async_op=True))
        return (self._world_size - 1) * sum(piece.nbytes for piece in self._pieces)

    def finish(self) -> None:
        """Makes the parameters whole for later work of this stream."""
        if self.whole:
            return
        if self._world_size == 1:
            values = self._values(self._pieces)
            for parameter, place in zip(self.parameters, self.places, strict=True):
                parameter.data = values[place].view(whole_shape(parameter))
        else:
            for work in self._works:
                work.wait()
            sizes = [*map(whole_size, self.parameters)]
            rows = self._values(self._received)
            whole = self.empty(sum(sizes), self._dtype) if self._flat is None else self._flat
            if self._stays:
                self._flat = whole
            flats = whole.split(sizes)
            to, of = self.pieces(flats, rows)
            torch._foreach_copy_(to, of)
            for parameter, flat in zip(self.parameters, flats, strict=True):
                parameter.data = flat.view(whole_shape(parameter))
            self._works, self._received = [], []
        mark(self.parameters, whole=True)
        self.whole = True

    def release(self) -> None:
        for work in self._works:
            work.wait()
        self._works, self._received = [], []
        if self.whole:
            for parameter in self.parameters:
                parameter.data = parameter.data.new_empty(0)
            mark(self.parameters, whole=False)
            self.whole = False

    def _values(self, pieces: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
        """(..., size) in the weights' dtype."""
        return pieces[0] if len(pieces) == 1 else from_float8(pieces[0], pieces[1], self._dtype)[..., : self.size]

    def pieces(self, flats: Sequence[Tensor | None], rows: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Matching views without padding: the parts of each parameter's elements flats[i] (None: left out) that a process
        has, and their places in rows (processes, size)."""
        of_flats, of_rows = [], []
        for flat, place in zip(flats, self.places, strict=True):
            size = place.stop - place.start
            for rank, piece in enumerate(() if flat is None else flat.split(size)):
                of_flats.append(piece)
                of_rows.append(rows[rank, place][: len(piece)])
        return of_flats, of_rows


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

    parameters: partitioned by DeepSpeed, whose hooks are removed; blocks: the transformer blocks, in the order in which they
    run; flat: this process's piece, in the order of parameters (None: made here of the parameters' own pieces); float8:
    frozen weights are kept and sent in FP8, rounded to it.
    """

    def __init__(
        self,
        parameters: list[nn.Parameter],
        blocks: Sequence[nn.Module],
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
        offset = 0
        for index, consecutive in groupby(parameters, key=owner.get):
            run = list(consecutive)
            size = sum(map(piece_size, run))
            self.units.append(Unit(run, flat[offset : offset + size], offset, world_size, self.stay))
            if index is not None:
                assert index not in of_block, "a block's parameters are not consecutive"
                of_block[index] = self.units[-1]
            offset += size
        assert offset == flat.numel(), (offset, flat.numel())
        if float8:
            for unit in self.units:
                unit.compress()
            for parameter in parameters:
                piece_of(parameter).data = piece_of(parameter).new_empty(0)
        self._blockwise = [of_block[index] for index in range(len(blocks))] if policy == "block" else []
        self._resident = [unit for unit in self.units if unit not in self._blockwise]
        self._backward_unit: int | None = None  # the block whose backward pass is running
        for index, block in enumerate(blocks if policy == "block" else []):
            self._guard(block, index)

    @property
    def stay(self) -> bool:
        """Whether whole weights are always at the same address."""
        return self.policy == "whole"

    def gather(self) -> None:
        """Makes whole what a phase needs: everything, or what is outside the blocks."""
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
        if not self.stay:
            self.release()

    def changed(self) -> None:
        """Call when an update has written the shards: whole weights are out of date, except on one process. Those that stay
        whole are fetched again while other roles work."""
        if self._world_size > 1:
            self.release()
            if self.stay:
                self.prefetch()

    def _launch(self, unit: Unit) -> None:
        received = unit.launch()
        self.traffic.gathered_bytes += received
        self.traffic.unit_gathers += received > 0

    def _guard(self, block: nn.Module, index: int) -> None:
        """Hooks that gather the block's weights when it runs, forward and backward, and start its neighbour's gather."""
        units = self._blockwise

        def before_backward(*_):
            # Blocks without differentiable inputs get no hook after their backward pass, so the next hook releases them.
            if self._backward_unit is not None and self._backward_unit != index:
                units[self._backward_unit].release()
            self._backward_unit = index
            self._enter(index, index - 1)

        block.register_forward_pre_hook(lambda *_: self._enter(index, index + 1))
        block.register_forward_hook(lambda *_: units[index].release())
        block.register_full_backward_pre_hook(before_backward)

    def _enter(self, index: int, neighbour: int) -> None:
        units = self._blockwise
        self._launch(units[index])
        if 0 <= neighbour < len(units):
            self._launch(units[neighbour])
        units[index].finish()


def _defragment(parameters: list[nn.Parameter]) -> Tensor:
    """Copies the parameters' pieces into one flat tensor; they become views of it."""
    pieces = [piece_of(parameter) for parameter in parameters]
    flat = torch.cat([piece.data.view(-1) for piece in pieces])
    offset = 0
    for piece in pieces:
        piece.data = flat[offset : offset + piece.numel()]
        offset += piece.numel()
    return flat
