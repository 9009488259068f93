"""The VAE: a family's description of it, its settings, and the decoder.

Networks see latents of mean 0 and variance 1, of shape (C, H, W) or, with frames, (C, F, H, W). `LatentStatistics` brings
them to the VAE's own scale.
"""

from __future__ import annotations

import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pydantic
import torch
from torch import Tensor

from dpdmd.backbones.files import check_setting
from dpdmd.config import ConfigError

if typing.TYPE_CHECKING:
    from dpdmd.backbones.pipeline import PipelineFolder

_POSITIVE = typing.Annotated[pydantic.FiniteFloat, pydantic.Field(gt=0)]
_SCALE = typing.Annotated[list[pydantic.PositiveInt], pydantic.Field(min_length=1)] | pydantic.PositiveInt


@dataclass(frozen=True)
class LatentStatistics:
    """settings: {name: type} of those in vae/config.json that `undo` reads; none for statistics that are weights of the VAE
    (a BatchNorm's). undo: (VAE, the networks' latents (B, C, ...)) -> the latents that the VAE decodes."""

    settings: dict[str, Any]
    undo: Callable[[Any, Tensor], Tensor]


def _mean_and_std(vae, latents: Tensor) -> Tensor:
    shape = (-1, *[1] * (latents.ndim - 2))
    mean, std = (latents.new_tensor(each).view(shape) for each in (vae.config.latents_mean, vae.config.latents_std))
    return latents * std + mean


SHIFT_AND_SCALE = LatentStatistics(
    {"scaling_factor": _POSITIVE, "shift_factor": pydantic.FiniteFloat},
    lambda vae, latents: latents / vae.config.scaling_factor + vae.config.shift_factor,
)
MEAN_AND_STD = LatentStatistics(
    {"latents_mean": list[pydantic.FiniteFloat], "latents_std": list[_POSITIVE]}, _mean_and_std
)


@dataclass(frozen=True)
class Vae:
    """class_name: in diffusers. scale: the setting with the pixels a latent, or with the widths of the levels, each half as
    large as the one before. channels: the setting with the channels of the latents. published: the two values for models
    in `Family.known`."""

    class_name: str = "AutoencoderKL"
    scale: str = "block_out_channels"
    channels: str = "latent_channels"
    statistics: LatentStatistics = SHIFT_AND_SCALE
    published: tuple[int, int] = (8, 16)

    @property
    def _class(self):
        import diffusers

        return getattr(diffusers, self.class_name)

    def read(self, pipeline: PipelineFolder | None) -> tuple[int, int]:
        """(pixels a latent, latent channels); those of the published models if pipeline is None. Raises ConfigError."""
        if pipeline is None:
            return self.published
        pipeline.require("vae", self.class_name)
        config = pipeline.read("vae")
        for name, kind in {self.scale: _SCALE, self.channels: int, **self.statistics.settings}.items():
            if config.get(name) is None:
                raise ConfigError(f"{pipeline}: vae/config.json has no {name}, which the stock pipeline decodes with")
            check_setting(name, config[name], kind, f"{pipeline}: vae/config.json")
        with pipeline.reading("vae"), torch.device("meta"):
            self._class.from_config(config)
        scale = config[self.scale]
        return scale if isinstance(scale, int) else 2 ** (len(scale) - 1), config[self.channels]

    def load(self, pipeline: PipelineFolder, device: torch.device | str) -> Decoder:
        """The VAE in float32. Raises ConfigError for weights that are damaged or do not fit."""
        return Decoder(pipeline.load("vae", self._class, device, torch_dtype=torch.float32), self.statistics)


AUTOENCODER_KL = Vae()


class Decoder:
    """A VAE in float32 and the statistics of its latents."""

    def __init__(self, vae, statistics: LatentStatistics):
        self._vae = vae
        self._statistics = statistics

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """latents (B, C, H, W) -> images (B, 3, scale H, scale W) float32 in [0, 1], on the VAE's device. The frames of
        latents (B, C, F, H, W) are side by side."""
        latents = self._statistics.undo(self._vae, latents.to(self._vae.device, torch.float32))
        images = self._vae.decode(latents, return_dict=False)[0]
        if images.ndim == 5:  # (B, 3, F, H, W)
            images = images.permute(0, 1, 3, 2, 4).flatten(3)
        return (images * 0.5 + 0.5).clamp(0, 1)
