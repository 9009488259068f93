"""The interface of a world that measures runs, and how a world is found.

A world chooses the prompts to sample, measures the pictures and names the measurements to print; report.py does the rest.
dpdmd/worlds/demo/evaluation.py is an example. `evaluation.world=package.module:attribute` selects a world elsewhere.
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
    """A derived class must define `texts` and `measure`; the rest has defaults.

    prompts: file of training prompts for runs without prompts.file. resolution: side in pixels of the pictures that it
    measures; None for any. columns: {name of a measurement: its heading} for the printed table, in order; table.json and
    metrics.jsonl have all measurements.
    """

    prompts: Path | None = None
    resolution: int | None = None
    columns: Mapping[str, str] = {}

    def problem(self, config: Config) -> str | None:
        """Why runs of this configuration cannot be measured, apart from the resolution: one line with the setting, its value
        and what to set instead. None if they can. Called before anything is loaded."""
        return None

    def texts(self, config: EvaluationConfig) -> list[str]:
        """The evaluation prompts, the same at every call. Each is sampled config.num_samples times."""
        raise NotImplementedError

    def measure(self, images: Tensor, texts: Sequence[str]) -> dict[str, float]:
        """{name: measurement} of float32 images (prompts * samples, 3, H, W) in [0, 1], on the run's device;
        images[i * samples : (i + 1) * samples] belong to texts[i]. Called by the main process only."""
        raise NotImplementedError

    def shown(self, texts: Sequence[str]) -> list[int]:
        """Indices into `texts` of the prompts in grid.png."""
        return list(range(min(len(texts), 8)))


def find_evaluation(config: Config) -> Evaluation:
    """Imports the evaluation of `config.world`. Raises ConfigError if there is none."""
    name = config.world
    if name is None:
        raise ConfigError("evaluation.world is not set, and model.pipeline names no world that ships")
    shipped = ":" not in name
    module, _, attribute = (f"dpdmd.worlds.{name}.evaluation:EVALUATION" if shipped else name).partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:
        if shipped:
            raise
        raise ConfigError(
            f"evaluation.world = {name!r}: it cannot be imported ({type(error).__name__}: {' '.join(str(error).split())}); "
            "put the folder of its module or package on PYTHONPATH"
        ) from error
    if isinstance(found, type) or not isinstance(found, Evaluation):
        raise ConfigError(
            f"evaluation.world = {name!r}: a {type(found).__name__}, where an object is needed that has what "
            "dpdmd.evaluation.protocol.Evaluation has"
        )
    return found


def check_evaluation(config: Config) -> None:
    """Raises ConfigError if the run is to be measured and cannot be."""
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
