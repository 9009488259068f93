"""What a world brings so that a run is measured in it, and how it is found.

A world knows what its pictures show. It says what to sample, measures the samples, and says what of it to report; all the rest
is report.py's. The demo's (dpdmd/worlds/demo/evaluation.py) is an example, and `evaluation.world=package.module:attribute`
takes any other.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from torch import Tensor

from dpdmd.config import Config, ConfigError, EvaluationConfig


@runtime_checkable
class Evaluation(Protocol):
    """A class that derives from this one has to define `texts` and `measure`, and has the rest as it stands here.

    prompts: file of training prompts, for runs that are given no other. resolution: the side of the pictures that it
    measures, in pixels; None for any. columns: the heading of each measurement that the printed table has, in order;
    table.json and metrics.jsonl have all measurements.
    """

    prompts: Path | None = None
    resolution: int | None = None
    columns: Mapping[str, str] = {}

    def problem(self, config: Config) -> str | None:
        """Why runs of this configuration cannot be measured, beside the resolution: a line that names the setting, what it
        is, and what to set instead. None where they can. Called before anything is loaded."""
        return None

    def texts(self, config: EvaluationConfig) -> list[str]:
        """The evaluation prompts, the same at each call. Each is sampled config.num_samples times."""
        raise NotImplementedError

    def measure(self, images: Tensor, texts: Sequence[str]) -> dict[str, float]:
        """Named numbers of float32 images (prompts * samples, 3, H, W) in [0, 1], on the run's device. Images number
        i * samples to (i + 1) * samples are those of texts[i]. The main process alone calls."""
        raise NotImplementedError

    def shown(self, texts: Sequence[str]) -> list[int]:
        """The prompts, by their place in `texts`, whose pictures grid.png shows."""
        return list(range(min(len(texts), 8)))


def find_evaluation(config: Config) -> Evaluation:
    """The evaluation of `config.world`, imported. Raises ConfigError where there is none."""
    name = config.world
    if name is None:
        raise ConfigError("evaluation.world is not set, and model.pipeline names no world that ships")
    shipped = ":" not in name
    module, _, attribute = (
        f"dpdmd.worlds.{name}.evaluation:EVALUATION".partition(":") if shipped else name.partition(":")
    )
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:
        if shipped:
            raise
        raise ConfigError(
            f"evaluation.world = {name!r}: it cannot be imported ({type(error).__name__}: {' '.join(str(error).split())}); "
            "the folder of its module or package has to be on PYTHONPATH"
        ) from error
    if isinstance(found, type) or not isinstance(found, Evaluation):
        raise ConfigError(
            f"evaluation.world = {name!r}: a {type(found).__name__}, where an object is needed that has what "
            "dpdmd.evaluation.protocol.Evaluation has"
        )
    return found


def check_evaluation(config: Config) -> None:
    """Raises ConfigError where the run is to be measured, and cannot be."""
    if not config.evaluation.enabled:
        return
    evaluation, side = find_evaluation(config), config.model.resolution
    problem = evaluation.problem(config)
    if evaluation.resolution not in (None, side):
        problem = (
            f"model.resolution = {side} with evaluation.enabled = true: pictures of the world {config.world} are measured at "
            f"{evaluation.resolution} pixels; set model.resolution={evaluation.resolution} or evaluation.enabled=false"
        )
    if problem is not None:
        raise ConfigError(problem)
