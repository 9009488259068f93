"""The state of a sharded network on disk, and how another number of processes reads it.

A parameter of n elements is cut into N equal pieces, the last padded with zeros: process r has elements r p to (r + 1) p,
p = ceil(n / N). The masters (float32), each moment and the average are flat tensors: a process's pieces of all parameters of
a group, one after the other. There is one group, or several under offload.

    file of a role, process and group    master, average (group's size); exp_avg, exp_avg_sq and whatever else the optimizer
                                         keeps; numbers such as step, 0-dimensional
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpdmd.files import TensorFile, open_tensors
from dpdmd.kernels.optim.adamw import BLOCK, Moments

_NEAREST = 1 << 15  # the value of the 16 random bits that rounds to the nearest


@dataclass(frozen=True)
class Layout:
    """groups: each one's parameters in order, as (name, number of elements)."""

    processes: int
    groups: tuple[tuple[tuple[str, int], ...], ...]

    @staticmethod
    def from_json(processes: int, groups: list[list[list[Any]]]) -> Layout:
        return Layout(processes, tuple(tuple((name, size) for name, size in group) for group in groups))

    def piece(self, size: int) -> int:
        """Elements that each process has of a parameter of `size` elements."""
        return -(-size // self.processes)

    def size(self, group: int) -> int:
        """Elements that each process has of a group."""
        return sum(self.piece(size) for _, size in self.groups[group])

    @cached_property
    def places(self) -> dict[str, tuple[int, int]]:
        """Each parameter's group, and its offset in that group's flat tensor."""
        places = {}
        for group, parameters in enumerate(self.groups):
            offset = 0
            for name, size in parameters:
                places[name] = group, offset
                offset += self.piece(size)
        return places

    @property
    def sizes(self) -> dict[str, int]:
        return {name: size for parameters in self.groups for name, size in parameters}

    def name(self, rank: int, group: int) -> str:
        """The file name of one process and group."""
        return f"rank_{rank:05d}.safetensors" if len(self.groups) == 1 else f"rank_{rank:05d}_{group:04d}.safetensors"


def pieces(old: Layout, new: Layout, rank: int, group: int) -> Iterator[tuple[int, int, int, int, int]]:
    """The parts of a new process's group: (offset in the new flat tensor, old rank, old group, begin and end there)."""
    offset = 0
    for name, size in new.groups[group]:
        piece, old_piece = new.piece(size), old.piece(size)
        old_group, old_offset = old.places[name]
        at, end = rank * piece, min((rank + 1) * piece, size)
        while at < end:
            old_rank = at // old_piece
            until = min(end, (old_rank + 1) * old_piece)
            begin = old_offset + at - old_rank * old_piece
            yield offset + at - rank * piece, old_rank, old_group, begin, begin + until - at
            at = until
        offset += piece


class SavedRole:
    """A role's files in a checkpoint. Raises DamagedFile for one that cannot be read."""

    def __init__(self, folder: Path, layout: Layout):
        self._folder = folder
        self._layout = layout
        self._opened: dict[tuple[int, int], TensorFile] = {}

    def group(self, layout: Layout, rank: int, group: int) -> dict[str, Tensor]:
        """The tensors of one process and group in `layout`: bit for bit if they were saved in it; else 8-bit moments are
        rounded again."""
        if layout == self._layout:
            file = self._file(rank, group)
            return {name: file.read(name) for name in file.layout}
        first = self._file(0, 0)
        names = set(first.layout)
        tensors = {name: first.read(name) for name, (_, shape) in first.layout.items() if not shape}
        if {"exp_avg_scale", "exp_avg_sq_scale"} <= names:
            read = {name: partial(self._moment, name) for name in ("exp_avg", "exp_avg_sq")}
            tensors |= _float8(**{name: self._cut(layout, rank, group, each) for name, each in read.items()})
        for name in names - tensors.keys():
            tensors[name] = self._cut(layout, rank, group, partial(self._slice, name))
        return tensors

    def _file(self, rank: int, group: int) -> TensorFile:
        if (rank, group) not in self._opened:
            self._opened[rank, group] = open_tensors(self._folder / self._layout.name(rank, group))
        return self._opened[rank, group]

    def _cut(self, layout: Layout, rank: int, group: int, read: Callable[[int, int, int, int], Tensor]) -> Tensor:
        found = [(place, read(*piece)) for place, *piece in pieces(self._layout, layout, rank, group)]
        dtype = found[0][1].dtype if found else read(0, 0, 0, 0).dtype
        flat = torch.zeros(layout.size(group), dtype=dtype)
        for place, values in found:
            flat[place : place + len(values)] = values
        return flat

    def _slice(self, name: str, rank: int, group: int, begin: int, end: int) -> Tensor:
        return self._file(rank, group).read(name, begin, end)

    def _moment(self, name: str, rank: int, group: int, begin: int, end: int) -> Tensor:
        """The float32 values of an 8-bit moment."""
        first = begin // BLOCK * BLOCK
        codes = self._slice(name, rank, group, first, end)
        scales = self._slice(f"{name}_scale", rank, group, first // BLOCK, -(-end // BLOCK))
        return Moments(codes, scales, codes, scales).read()[name == "exp_avg_sq"][begin - first :]


def _float8(exp_avg: Tensor, exp_avg_sq: Tensor) -> dict[str, Tensor]:
    """Float32 moments (n,) in 8 bits, rounded to the nearest."""
    size, blocks = len(exp_avg), -(-len(exp_avg) // BLOCK)
    codes = [torch.empty(size, dtype=torch.uint8) for _ in range(2)]
    scales = [torch.empty(blocks) for _ in range(2)]
    nearest = torch.full((size,), _NEAREST, dtype=torch.int32)
    written = Moments(codes[0], scales[0], codes[1], scales[1])
    written.write(exp_avg, exp_avg_sq, exp_avg_sq.sqrt(), None, (nearest, nearest))
    return {"exp_avg": codes[0], "exp_avg_scale": scales[0], "exp_avg_sq": codes[1], "exp_avg_sq_scale": scales[1]}
