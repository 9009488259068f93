"""LoRA adapters around a base product of any kind: packed, in FP8, or of rows apart in memory.

    y = x W^T + scale (x A^T) B^T       A (r, K), B (N, r), of a small rank r

`lowered` makes h = x A^T, for several layers of one input at once; `raised` adds scale h B^T to the base product in place.

Source: arXiv 2106.09685.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpdmd.kernels.runtime.rows import rows_product, rows_weight_gradient
from dpdmd.kernels.runtime.saved import Function, save, saved


class Adapter(NamedTuple):
    down: Tensor  # A (r, K)
    up: Tensor  # B (N, r)
    scale: float
    column: int = 0  # y's first of the N


def lowered(xs: tuple[Tensor, ...], adapters: list[Adapter]) -> tuple[tuple[Tensor, ...], Tensor]:
    """(xs, h): h (..., r_1 + r_2 + ...) of the tensors xs (..., K_1), (..., K_2), side by side.

    The base product has to take the returned xs: their gradient comes through here, where a matmul adds h's to it.
    """
    tensors = *xs, *[adapter.down for adapter in adapters]
    if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in tensors):
        return xs, _lower(xs, tensors[len(xs) :])
    *passed, h = _Lowered.apply(len(xs), *tensors)
    # All results of an autograd function require a gradient; the base product should compute none for an x without.
    return tuple(new if x.requires_grad else x for new, x in zip(passed, xs, strict=True)), h


def raised(y: Tensor, h: Tensor, adapters: list[Adapter]) -> Tensor:
    """Add scale h B^T to the columns of each adapter in y (..., N), in place."""
    ups = [adapter.up for adapter in adapters]
    places = [(adapter.column, adapter.scale) for adapter in adapters]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (y, h, *ups)):
        return _Raised.apply(y, h, places, *ups)
    return _raise(y, h, places, ups)


def _lower(xs: tuple[Tensor, ...], downs: tuple[Tensor, ...]) -> Tensor:
    down = _stacked(downs)
    if len(xs) == 1:
        (x,) = xs
        return F.linear(x, down) if x.is_contiguous() or x.ndim != 3 else rows_product(x, down.t())
    (x, *others), (part, *parts) = xs, down.split([x.shape[-1] for x in xs], dim=1)
    h = x.flatten(0, -2) @ part.t()
    for x, part in zip(others, parts, strict=True):
        h.addmm_(x.flatten(0, -2), part.t())
    return h.unflatten(0, xs[0].shape[:-1])


def _stacked(downs: tuple[Tensor, ...]) -> Tensor:
    return downs[0] if len(downs) == 1 else torch.cat(downs)


class _Lowered(Function):
    # The older form of forward, with ctx: the newer one binds its arguments by inspection, 20 us a call.
    @staticmethod
    def forward(ctx, count, *tensors):
        xs, downs = tensors[:count], tensors[count:]
        ctx.count, ctx.sizes = count, [x.shape[-1] for x in xs]
        ctx.set_materialize_grads(False)
        for_downs = any(ctx.needs_input_grad[1 + count :])
        save(ctx, *(xs if for_downs else [None] * count), *downs)
        return *xs, _lower(xs, downs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *upstream):
        tensors = saved(ctx)
        xs, downs = tensors[: ctx.count], tensors[ctx.count :]
        *dxs, dh = upstream
        _, *needed = ctx.needs_input_grad
        for_xs, for_downs = needed[: ctx.count], needed[ctx.count :]
        if dh is None:
            return None, *dxs, *[None] * len(downs)
        parts = _stacked(downs).split(ctx.sizes, dim=1)
        dxs = [_added(dx, dh, part) if wanted else None for dx, part, wanted in zip(dxs, parts, for_xs, strict=True)]
        ddowns = [None] * len(downs)
        if any(for_downs):
            # Slices of one tensor, each dense: as with packed_linear's, nothing clones them.
            gradients = [_gradient(dh, x) for x in xs]
            gradient = torch.cat(gradients, dim=1) if len(xs) > 1 else gradients[0]
            slices = gradient.split([len(down) for down in downs])
            ddowns = [each if wanted else None for each, wanted in zip(slices, for_downs, strict=True)]
        return None, *dxs, *ddowns


def _added(dx: Tensor | None, dh: Tensor, down: Tensor) -> Tensor:
    """dx + dh A (..., K)"""
    if dx is None:
        return dh @ down
    # Not in place: hooks may hold the base product's gradient.
    return torch.addmm(dx.reshape(-1, dx.shape[-1]), dh.reshape(-1, dh.shape[-1]), down).view(dx.shape)


def _gradient(dh: Tensor, x: Tensor) -> Tensor:
    """dh^T x (r, K)"""
    if x.is_contiguous() or x.ndim != 3:
        return dh.reshape(-1, dh.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
    return rows_weight_gradient(dh, x)


def _raise(y: Tensor, h: Tensor, places: list[tuple[int, float]], ups: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    rows = y.view(-1, y.shape[-1])
    parts = h.reshape(-1, h.shape[-1]).split([up.shape[1] for up in ups], dim=1)
    for (column, scale), up, part in zip(places, ups, parts, strict=True):
        rows[:, column : column + len(up)].addmm_(part, up.t(), alpha=scale)
    return y


class _Raised(Function):
    @staticmethod
    def forward(ctx, y, h, places, *ups):
        ctx.mark_dirty(y)
        ctx.places = places
        save(ctx, h if any(ctx.needs_input_grad[3:]) else None, *ups)
        return _raise(y, h, places, ups)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        h, *ups = saved(ctx)
        _, for_h, _, *for_ups = ctx.needs_input_grad
        rows = dy.reshape(-1, dy.shape[-1])
        rank = sum(up.shape[1] for up in ups)
        dh = dy.new_empty(*dy.shape[:-1], rank) if for_h else None
        dups: list[Tensor | None] = [None] * len(ups)
        first = 0
        for i, ((column, scale), up) in enumerate(zip(ctx.places, ups, strict=True)):
            part, lanes = rows[:, column : column + len(up)], slice(first, first + up.shape[1])
            first = lanes.stop
            if dh is not None:
                dh.view(-1, rank)[:, lanes].addmm_(part, up, beta=0, alpha=scale)
            if for_ups[i]:
                dups[i] = dup = torch.empty_like(up, memory_format=torch.contiguous_format)
                dup.addmm_(part.t(), h.reshape(-1, rank)[:, lanes], beta=0, alpha=scale)
        return dy if ctx.needs_input_grad[0] else None, dh, None, *dups
