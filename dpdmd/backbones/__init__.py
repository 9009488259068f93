"""Model families: one file each, which loads from a diffusers pipeline, calls the network, encodes and decodes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dpdmd.backbones.sd3 import SD3
    from dpdmd.config import ModelConfig


def load_backbone(config: ModelConfig) -> SD3:
    """Reads and checks the configuration files of config.pipeline; no weights yet. Raises ConfigError."""
    if config.family == "sd3":
        from dpdmd.backbones.sd3 import SD3

        return SD3(config)
    raise AssertionError(f"model.family = {config.family!r} has no backbone")
