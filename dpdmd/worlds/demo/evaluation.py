"""The demo's evaluation: the picture world's prompts and exact measurements."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dpdmd.config import EvaluationConfig
from dpdmd.evaluation.protocol import Evaluation
from dpdmd.worlds.demo import PROMPTS, world
from dpdmd.worlds.demo.measure import measure


class PictureWorld(Evaluation):
    prompts = PROMPTS
    resolution = world.SIZE
    columns = {  # noqa: RUF012
        "accuracy": "accuracy",
        "validity": "valid",
        "background_entropy": "background entropy",
        "position_spread": "position spread",
    }

    def texts(self, config: EvaluationConfig) -> list[str]:
        return [prompt.text for prompt in world.evaluation_prompts(config.num_prompts)]

    def measure(self, images: Tensor, texts: Sequence[str]) -> dict[str, float]:
        return measure(images, texts)

    def shown(self, texts: Sequence[str]) -> list[int]:
        """The eight shortest prompts: they leave most free, so their pictures show variety."""
        return sorted(range(len(texts)), key=lambda number: len(texts[number]))[:8]


EVALUATION = PictureWorld()
