"""Model families: one file each, which loads from a diffusers pipeline, calls the network, encodes and decodes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dpdmd.backbones.family import backbones, families, find
from dpdmd.backbones.pipeline import PipelineFolder

if TYPE_CHECKING:
    from dpdmd.backbones.base import Backbone
    from dpdmd.config import ModelConfig


def load_backbone(config: ModelConfig) -> Backbone:
    """Reads and checks the configuration files of config.pipeline, without weights. Raises ConfigError.

    The family is config.family; if that is None, the family of the pipeline's class, or under random_init the one whose
    `known` has the name.
    """
    if config.family is not None:
        return find(config.family)(config)
    if config.random_init and not Path(config.pipeline).is_dir():
        for backbone in backbones().values():
            if config.pipeline in backbone.family.known:
                return backbone(config)
    pipeline = PipelineFolder("model.pipeline", config.pipeline, families(), config.revision)
    return find(pipeline.family.name)(config, pipeline)
