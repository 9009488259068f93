"""Finds what a picture of the world shows, and measures how well a set of pictures follows its prompts.

One picture: the background is the palette colour nearest to the median of the border. The foreground colour is the one onto
whose direction the difference from the background projects with the smallest rest; the projection is a coverage map. Shape,
centre and radius are the least-squares fit of a coverage mask to that map, found with one matrix product over a bank of
candidate masks and polished by Gauss-Newton steps. The picture is valid if rendering these findings explains it.

A set of pictures: accuracy of what the prompts name, and variety of what they leave free. Entropy from R samples a prompt
is biased low, by about (5 - 1) / (2 R) nats for five backgrounds: a uniform source measures 0.92 at R = 16 and 0.85 at
R = 8. Compare values at equal R only (`num_samples`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import world

MIN_AREA = 8.0
"""Pixels of coverage below which there is no object (the smallest real one, a ring of radius 4, covers 38)."""
MAX_UNEXPLAINED = 0.1
"""Largest share of the difference from the background (sum of squares) that a valid picture leaves unexplained ..."""
MAX_NOISE = 0.03
"""... unless the rest is no more than noise of this standard deviation (a small ring has little to explain)."""
MAX_BACKGROUND_ERROR = 0.15
"""Largest distance (RGB, Euclidean) of a valid picture's background from the palette."""

_BANK_RADII = [2.5 + 0.5 * step for step in range(18)]
_BANK_OFFSETS = [-1.5 + 0.5 * step for step in range(7)]
_CHUNK = 128


@dataclasses.dataclass(frozen=True)
class Findings:
    """What was found in N pictures. Indices, int64 (N,), are those of world.ATTRIBUTES; -1 if there is no object."""

    color: Tensor
    shape: Tensor
    size: Tensor
    position: Tensor
    background: Tensor  # never -1
    radius: Tensor  # float32 (N,), pixels
    center: Tensor  # float32 (N, 2), x and y in pixels
    valid: Tensor  # bool (N,)


@functools.lru_cache(maxsize=4)
def _bank(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Candidate masks around the middle: masks (pixels, shapes * K), radius (K,), offset (K, 2)."""
    radius, y, x = torch.meshgrid(
        torch.tensor(_BANK_RADII), torch.tensor(_BANK_OFFSETS), torch.tensor(_BANK_OFFSETS), indexing="ij"
    )
    radius, offset = radius.flatten(), torch.stack([x.flatten(), y.flatten()], -1)
    shape = torch.arange(len(world.SHAPES))[:, None].expand(-1, len(radius))
    masks = world.coverage(shape, radius.expand_as(shape), world.SIZE / 2 + offset.expand(*shape.shape, 2))
    return masks.flatten(0, 1).flatten(1).T.contiguous().to(device), radius.to(device), offset.to(device)


def _shift(maps: Tensor, by: Tensor) -> Tensor:
    """Move maps (N, 32, 32) by integer pixels (N, 2), x and y; the outside is 0."""
    size = world.SIZE
    axis = torch.arange(size, device=maps.device)
    column, row = axis - by[:, :1], axis - by[:, 1:]
    inside = ((row >= 0) & (row < size))[:, :, None] & ((column >= 0) & (column < size))[:, None, :]
    source = row.clamp(0, size - 1)[:, :, None] * size + column.clamp(0, size - 1)[:, None, :]
    return maps.flatten(1).gather(1, source.flatten(1)).view_as(maps) * inside


def _polish(target: Tensor, shape: Tensor, radius: Tensor, center: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Three Gauss-Newton steps on (x, y, radius) with finite differences. Returns radius, center, error of the best point."""
    steps = 3
    point = torch.cat([center, radius[:, None]], -1)  # (N, 3)
    probe = torch.cat([torch.zeros(1, 3), 0.1 * torch.eye(3)]).to(point)
    best, best_error = point, torch.full_like(radius, torch.inf)
    for step in range(steps + 1):
        at = point[:, None] + (probe if step < steps else probe[:1])  # (N, 4, 3), the last time (N, 1, 3)
        masks = world.coverage(shape[:, None].expand(at.shape[:2]), at[..., 2], at[..., :2]).flatten(2)
        rest = target.flatten(1) - masks[:, 0]
        error = rest.square().sum(-1)
        better = error < best_error
        best, best_error = torch.where(better[:, None], point, best), torch.where(better, error, best_error)
        if step < steps:
            slope = (masks[:, 1:] - masks[:, :1]) / 0.1  # (N, 3, pixels)
            normal = slope @ slope.mT + 0.1 * torch.eye(3, device=slope.device)
            move = torch.linalg.solve_ex(normal, slope @ rest[:, :, None])[0][..., 0].clamp(-0.5, 0.5)
            point = point + move
            point = torch.cat([point[:, :2], point[:, 2:].clamp(1.5, 14)], -1)
    return best[:, 2], best[:, :2], best_error


def _examine(images: Tensor) -> Findings:
    device, count, size = images.device, len(images), world.SIZE
    fronts, backs = world.palette(world.COLORS, device), world.palette(world.BACKGROUNDS, device)

    border = torch.cat([images[:, :, 0], images[:, :, -1], images[:, :, 1:-1, 0], images[:, :, 1:-1, -1]], -1)
    back = border.median(-1).values  # (N, 3)
    to_palette = (back[:, None] - backs).square().sum(-1)
    background, background_error = to_palette.argmin(-1), to_palette.amin(-1).sqrt()

    departure = (images - back[:, :, None, None]).flatten(2)  # (N, 3, pixels)
    direction = fronts - back[:, None]  # (N, colours, 3)
    length = direction.square().sum(-1, keepdim=True)
    share = (direction @ departure / length).clamp(0, 1)  # (N, colours, pixels)
    # |d - s f|^2 = |d|^2 - 2 s d.f + s^2 |f|^2; the first term does not depend on the colour
    rest = (share.square() * length - 2 * share * (direction @ departure)).sum(-1)
    color = rest.argmin(-1)
    every = torch.arange(count, device=device)
    target = share[every, color].view(count, size, size)

    area = target.sum((1, 2))
    present = area >= MIN_AREA
    solid = torch.where(target > 0.4, target, 0)  # faint haze must not move the centroid
    weight = solid.sum((1, 2)).clamp_min(1e-6)
    axis = torch.arange(size, device=device) + 0.5
    centroid = torch.stack([(solid.sum(1) * axis).sum(-1), (solid.sum(2) * axis).sum(-1)], -1) / weight[:, None]
    by = torch.where(present[:, None], size / 2 - centroid, 0).round().long()
    masks, bank_radius, bank_offset = _bank(device)
    error = masks.square().sum(0) - 2 * _shift(target, by).flatten(1) @ masks
    error = error.view(count, len(world.SHAPES), len(bank_radius))
    smallest, entry = error.min(-1)  # (N, shapes)

    # The bank's coarse grid can rank two similar shapes wrongly: polish the two best and compare again.
    candidates = smallest.topk(2, dim=-1, largest=False).indices  # (N, 2)
    entry = entry.gather(1, candidates).flatten()
    middle = (bank_offset[entry] + size / 2).view(count, 2, 2) - by[:, None]
    radius, center, error = _polish(
        target[:, None].expand(-1, 2, -1, -1).flatten(0, 1),
        candidates.flatten(),
        bank_radius[entry],
        middle.flatten(0, 1),
    )
    winner = error.view(count, 2).argmin(-1)
    shape = candidates[every, winner]
    radius, center = radius.view(count, 2)[every, winner], center.view(count, 2, 2)[every, winner]

    mask = world.coverage(shape, radius, center).flatten(1)
    explained = mask[:, None] * (fronts[color] - back)[..., None]
    left, whole = (departure - explained).square().sum((1, 2)), departure.square().sum((1, 2))
    allowed = (MAX_UNEXPLAINED * whole).clamp_min(MAX_NOISE**2 * 3 * size * size)
    valid = present & (left <= allowed) & (background_error <= MAX_BACKGROUND_ERROR)

    dx, dy = (center - size / 2).unbind(-1)
    sideways = dx.abs() > dy.abs()
    position = torch.where(sideways, (dx > 0).long(), 2 + (dy > 0).long())
    position = torch.where(torch.maximum(dx.abs(), dy.abs()) <= world.POSITION_BORDER, 4, position)
    found_size = (radius > world.SIZE_BORDER).long()
    color, shape, found_size, position = (
        torch.where(present, value, -1) for value in (color, shape, found_size, position)
    )
    return Findings(color, shape, found_size, position, background, radius, center, valid)


@torch.no_grad()
def examine(images: Tensor) -> Findings:
    """Find the object and the background in each picture.

    images (N, 3, 32, 32), float, in [0, 1] (values outside are clamped, NaN is read as 0), on any device.
    Raises ValueError for another shape.
    """
    if images.ndim != 4 or images.shape[1:] != (3, world.SIZE, world.SIZE):
        raise ValueError(f"images must have shape (N, 3, {world.SIZE}, {world.SIZE}), got {tuple(images.shape)}")
    images = torch.nan_to_num(images.detach().float(), nan=0.0).clamp(0, 1)
    parts = [_examine(chunk) for chunk in images.split(_CHUNK)] if len(images) else [_examine(images)]
    fields = [field.name for field in dataclasses.fields(Findings)]
    return Findings(**{name: torch.cat([getattr(part, name) for part in parts]) for name in fields})


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def measure(images: Tensor, prompts: Sequence[world.Prompt | str]) -> dict[str, float]:
    """Prompt-following and diversity of pictures grouped by prompt.

    images (P * R, 3, 32, 32) in [0, 1]; prompts: P of them, images[i * R : (i + 1) * R] belong to prompts[i].
    Raises ValueError if the number of pictures is not a multiple of the number of prompts.

    Returns (nan if no prompt applies):
      accuracy                 share of pictures in which every attribute that the prompt names is right
      accuracy_valid           the same, and the picture is valid
      accuracy_<attribute>     share right among the pictures whose prompt names color, shape, size, position, background
      validity                 share of valid pictures
      background_entropy       entropy of a prompt's R backgrounds over log 5, mean over the prompts that leave it free
      background_kinds         number of backgrounds among a prompt's R pictures, mean over the same prompts
      position_spread          root of the summed variances of x and y (pixels), mean over prompts that leave the position free
      size_spread              standard deviation of the radius (pixels), mean over prompts that leave the size free
      num_prompts, num_samples P and R; entropy and kinds depend on R (see the module's docstring)
    Spreads are over the pictures that show an object.
    """
    prompts = [world.parse(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    if not prompts or not len(images) or len(images) % len(prompts):
        raise ValueError(
            f"images: their number must be a positive multiple of the {len(prompts)} prompts, got {len(images)}"
        )
    samples = len(images) // len(prompts)
    found = examine(images)

    result: dict[str, float] = {}
    every_right = torch.ones(len(images), dtype=torch.bool)
    for attribute, names in world.ATTRIBUTES.items():
        wanted = torch.tensor([names.index(n) if (n := getattr(p, attribute)) else -1 for p in prompts])
        wanted = wanted.repeat_interleave(samples)
        named, right = wanted >= 0, getattr(found, attribute).cpu() == wanted
        every_right &= right | ~named
        result[f"accuracy_{attribute}"] = right[named].float().mean().item()
    valid = found.valid.cpu()
    # a picture without an object follows no caption, even if the caption names only the background
    every_right &= found.color.cpu() >= 0
    result = {
        "accuracy": every_right.float().mean().item(),
        "accuracy_valid": (every_right & valid).float().mean().item(),
        **result,
        "validity": valid.float().mean().item(),
    }

    background = found.background.cpu().view(-1, samples)
    center, radius = found.center.cpu().view(-1, samples, 2), found.radius.cpu().view(-1, samples)
    present = (found.color.cpu() >= 0).view(-1, samples)
    entropies, kinds, position_spreads, size_spreads = [], [], [], []
    for row, prompt in enumerate(prompts):
        if prompt.background is None:
            share = torch.bincount(background[row], minlength=len(world.BACKGROUNDS)) / samples
            entropies.append(torch.special.entr(share).sum().item() / math.log(len(world.BACKGROUNDS)))
            kinds.append(float((share > 0).sum()))
        shown = present[row]
        if prompt.position is None and shown.any():
            position_spreads.append(center[row, shown].var(0, correction=0).sum().sqrt().item())
        if prompt.size is None and shown.any():
            size_spreads.append(radius[row, shown].std(correction=0).item())
    return result | {
        "background_entropy": _mean(entropies),
        "background_kinds": _mean(kinds),
        "position_spread": _mean(position_spreads),
        "size_spread": _mean(size_spreads),
        "num_prompts": float(len(prompts)),
        "num_samples": float(samples),
    }
