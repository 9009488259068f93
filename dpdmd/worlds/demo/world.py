"""The picture world: one object on a plain ground, 32 x 32 RGB, with a caption that names some of what is seen.

A scene has five attributes: colour (7), shape (5), size (2), position (5) and background (5). Within a size the radius
is free, within a position the centre is. A caption names some attributes ("a red ring", "a big blue square at left", "a
green circle on brown"); diversity is measured on the attributes that it leaves free.

The same (seed, index) gives the same scenes on every device. Pixel (row i, column j) has its centre at y = i + 0.5,
x = j + 0.5; lengths are in pixels.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Collection

import torch
from torch import Tensor

SIZE = 32

COLORS = {
    "red": (0.88, 0.12, 0.12),
    "green": (0.10, 0.65, 0.20),
    "blue": (0.13, 0.25, 0.92),
    "yellow": (0.96, 0.90, 0.15),
    "purple": (0.55, 0.15, 0.75),
    "orange": (1.00, 0.55, 0.05),
    "cyan": (0.10, 0.80, 0.92),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
SIZES = ("small", "big")
POSITIONS = ("left", "right", "top", "bottom", "center")
BACKGROUNDS = {
    "black": (0.04, 0.04, 0.04),
    "gray": (0.50, 0.50, 0.50),
    "white": (0.96, 0.96, 0.96),
    "pink": (1.00, 0.70, 0.80),
    "brown": (0.40, 0.25, 0.12),
}
ATTRIBUTES = {
    "color": tuple(COLORS),
    "shape": SHAPES,
    "size": SIZES,
    "position": POSITIONS,
    "background": tuple(BACKGROUNDS),
}
"""{attribute: names}; an index into the names is what tensors hold."""

DROP_RATES = {"color": 0.1, "shape": 0.1, "size": 0.5, "position": 0.5, "background": 0.5}
"""Probability that a caption leaves an attribute free."""

ANY_SHAPE = "shape"
"""The noun of a caption that leaves the shape free."""

RADII = ((4.0, 5.5), (7.5, 9.5))
"""Range of the radius, small and big; the gap between them keeps the two apart."""
SIZE_BORDER = 6.5
"""Radius that separates small from big in a measurement."""

# A position is an offset of the centre from the middle of the picture: at most ACROSS in each direction for "center", else
# at least ALONG towards its side and at most ACROSS in the other direction. POSITION_BORDER separates them.
ACROSS = 2.0
ALONG = 4.0
POSITION_BORDER = 3.0
MARGIN = 1.0


@dataclasses.dataclass(frozen=True)
class Scenes:
    """N scenes: indices into ATTRIBUTES, int64 (N,); radius float32 (N,); center float32 (N, 2) as x, y."""

    color: Tensor
    shape: Tensor
    size: Tensor
    position: Tensor
    background: Tensor
    radius: Tensor
    center: Tensor

    def __len__(self) -> int:
        return len(self.color)

    def to(self, device: torch.device | str) -> Scenes:
        return Scenes(**{field.name: getattr(self, field.name).to(device) for field in dataclasses.fields(self)})

    def __getitem__(self, rows: slice | Tensor) -> Scenes:
        return Scenes(**{field.name: getattr(self, field.name)[rows] for field in dataclasses.fields(self)})


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A caption and the attributes it names; None is free."""

    text: str
    color: str | None = None
    shape: str | None = None
    size: str | None = None
    position: str | None = None
    background: str | None = None


def generator(seed: int, index: int) -> torch.Generator:
    """A CPU generator for one (seed, index). torch's uses only the lowest 32 bits of a seed, so the pair is hashed to 32 bits."""
    digest = hashlib.blake2b(f"{int(seed)} {int(index)}".encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def draw_scenes(count: int, *, seed: int, index: int = 0) -> Scenes:
    """Draw `count` scenes, every attribute uniform, on the CPU."""
    random = generator(seed, index)

    def choose(attribute: str) -> Tensor:
        return torch.randint(len(ATTRIBUTES[attribute]), (count,), generator=random)

    color, shape, size, position, background = (choose(attribute) for attribute in ATTRIBUTES)
    uniform = torch.rand(3, count, generator=random)
    low, high = torch.tensor(RADII)[size].unbind(-1)
    radius = low + (high - low) * uniform[0]
    across = (2 * uniform[1] - 1) * ACROSS
    along = ALONG + (SIZE / 2 - MARGIN - radius - ALONG) * uniform[2]
    sideways, middle = position < 2, position == POSITIONS.index("center")
    # left and top have even indices and lie towards smaller coordinates
    along = torch.where(middle, (2 * uniform[2] - 1) * ACROSS, torch.where(position % 2 == 0, -along, along))
    center = SIZE / 2 + torch.where(
        sideways[:, None], torch.stack([along, across], -1), torch.stack([across, along], -1)
    )
    return Scenes(color, shape, size, position, background, radius, center)


def coverage(shape: Tensor, radius: Tensor, center: Tensor) -> Tensor:
    """Share of each pixel that the object covers, anti-aliased over one pixel.

    shape int64 (...), radius (...), center (..., 2) -> (..., 32, 32) in [0, 1]. The centre is the shape's centroid; the
    radius is that of the circle, the ring's outer edge and the cross's arms.
    """
    axis = torch.arange(SIZE, device=radius.device, dtype=radius.dtype) + 0.5
    x = axis - center[..., 0, None, None]
    y = axis[:, None] - center[..., 1, None, None]
    x, y = x.abs(), y.expand(*y.shape[:-1], SIZE)  # every shape is its own mirror image
    r, kind = radius[..., None, None], shape[..., None, None]
    from_center = (x.square() + y.square()).sqrt()
    high = y.abs()
    distance = from_center - r  # signed distance to the edge, negative inside
    distance = torch.where(kind == 1, torch.maximum(x, high) - 0.85 * r, distance)
    # equilateral, one tip up: inscribed circle of 0.55 r, tip at 1.1 r
    distance = torch.where(kind == 2, torch.maximum(y, 3**0.5 / 2 * x - y / 2) - 0.55 * r, distance)
    arms = torch.minimum(torch.maximum(x - r, high - 0.33 * r), torch.maximum(x - 0.33 * r, high - r))
    distance = torch.where(kind == 3, arms, distance)
    distance = torch.where(kind == 4, (from_center - 0.75 * r).abs() - 0.25 * r, distance)
    return (0.5 - distance).clamp(0, 1)


def palette(colors: dict[str, tuple[float, float, float]], device: torch.device | str = "cpu") -> Tensor:
    """(number of colours, 3) float32."""
    return torch.tensor(list(colors.values()), device=device)


def render(scenes: Scenes) -> Tensor:
    """Pictures (N, 3, 32, 32) in [0, 1], float32, on the scenes' device."""
    mask = coverage(scenes.shape, scenes.radius, scenes.center)[:, None]
    front = palette(COLORS, mask.device)[scenes.color][..., None, None]
    back = palette(BACKGROUNDS, mask.device)[scenes.background][..., None, None]
    return back + mask * (front - back)


def caption(
    *,
    color: str | None = None,
    shape: str | None = None,
    size: str | None = None,
    position: str | None = None,
    background: str | None = None,
) -> str:
    """The caption that names these attributes and no other."""
    words = [word for word in (size, color, shape or ANY_SHAPE) if word]
    words.insert(0, "an" if words[0][0] in "aeiou" else "a")
    if position:
        words += ["at", position]
    if background:
        words += ["on", background]
    return " ".join(words)


def parse(text: str) -> Prompt:
    """The attributes that a caption names. Raises ValueError for an unknown word."""
    kinds = {name: attribute for attribute, names in ATTRIBUTES.items() for name in names}
    named: dict[str, str] = {}
    for word in text.split():
        if word in kinds:
            named[kinds[word]] = word
        elif word not in words():
            raise ValueError(f"prompt {text!r}: the picture world has no word {word!r}")
    return Prompt(text, **named)


def words() -> list[str]:
    """Every word of the captions, each once."""
    return list(dict.fromkeys(["a", "an", "at", "on", ANY_SHAPE, *itertools.chain(*ATTRIBUTES.values())]))


def draw_prompts(scenes: Scenes, *, seed: int, index: int = 0) -> list[Prompt]:
    """One caption a scene; DROP_RATES says how often it leaves an attribute free."""
    random = generator(seed, index)
    named = {}
    for attribute, names in ATTRIBUTES.items():
        keep = torch.rand(len(scenes), generator=random) >= DROP_RATES[attribute]
        values = getattr(scenes, attribute).tolist()
        named[attribute] = [names[value] if kept else None for value, kept in zip(values, keep.tolist(), strict=True)]
    rows = [dict(zip(named, row, strict=True)) for row in zip(*named.values(), strict=True)]
    return [Prompt(caption(**row), **row) for row in rows]


def _distinct_prompts(num: int, *, seed: int, without: Collection[str] = ()) -> list[Prompt]:
    """without: distinct texts."""
    captions = math.prod(len(names) + 1 for names in ATTRIBUTES.values()) - len(without)
    if num > captions:
        raise ValueError(f"num must be at most {captions}, the number of captions, got {num}")
    prompts: dict[str, Prompt] = {}
    index = 0
    while len(prompts) < num:
        for prompt in draw_prompts(draw_scenes(256, seed=seed, index=2 * index), seed=seed, index=2 * index + 1):
            if prompt.text not in without:
                prompts.setdefault(prompt.text, prompt)
        index += 1
    return list(prompts.values())[:num]


def evaluation_prompts(num: int = 64) -> list[Prompt]:
    """The fixed evaluation prompts: distinct, drawn like training captions; about half leave the background free."""
    return _distinct_prompts(num, seed=2602)


def training_prompts(num: int = 512) -> list[Prompt]:
    """Distinct captions, none of them among the 64 evaluation prompts. prompts.txt has the first 512, one a line."""
    return _distinct_prompts(num, seed=0, without=[prompt.text for prompt in evaluation_prompts()])
