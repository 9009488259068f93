"""Model families: one file each, which loads from a diffusers pipeline, calls the network, encodes and decodes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dpdmd.backbones.base import Backbone
    from dpdmd.config import ModelConfig


def load_backbone(config: ModelConfig) -> Backbone:
    """Reads and checks the configuration files of config.pipeline; no weights yet. Raises ConfigError."""
    if config.family == "sd3":
        from dpdmd.backbones.sd3 import SD3

        return SD3(config)
    if config.family == "flux":
        from dpdmd.backbones.flux import Flux

        return Flux(config)
    raise AssertionError(f"model.family = {config.family!r} has no backbone")
