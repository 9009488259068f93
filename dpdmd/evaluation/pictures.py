"""Pictures: decoded from latents, as files, and side by side in a grid."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor


def decode(decoder, latents: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) of latents (B, C, h, w), one at a time: a VAE's activations at 1024 x 1024 take gigabytes."""
    return torch.cat([decoder.decode(each[None]) for each in latents])


def save_png(image: Tensor, path: Path) -> None:
    """image (3, H, W) in [0, 1]."""
    _pil(image).save(path)


def _pil(image: Tensor):
    from PIL import Image

    return Image.fromarray((image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def save_grid(path: Path, rows: list[tuple[str, list[tuple[str, Tensor]]]]) -> None:
    """Draws a titled row for each prompt, with titled blocks of images side by side.

    rows: (title, [(block title, images (n, 3, H, W) in [0, 1]), ...]).
    """
    from PIL import Image, ImageDraw

    height, width = rows[0][1][0][1].shape[-2:]
    # Small pictures are enlarged by an integer factor, large ones reduced to 256 pixels a side.
    scale = max(1, 64 // height)
    cell = min(256, height * scale), min(256, width * scale)
    gap, text = 6, 16
    widths = [len(images) * cell[1] for _, images in rows[0][1]]
    size = sum(widths) + gap * (len(widths) + 1), text + len(rows) * (cell[0] + text + gap)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    resample = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    left = gap
    for (title, _), block_width in zip(rows[0][1], widths, strict=True):
        draw.text((left, 2), title, fill="black")
        left += block_width + gap
    for row, (title, blocks) in enumerate(rows):
        top = text + row * (cell[0] + text + gap)
        draw.text((gap, top + 2), title, fill="dimgray")
        left = gap
        for _, images in blocks:
            for image in images:
                canvas.paste(_pil(image).resize((cell[1], cell[0]), resample), (left, top + text))
                left += cell[1]
            left += gap
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path)
