"""A world in one file: how light pictures are. `evaluation.world=brightness:EVALUATION` measures runs in it."""

from __future__ import annotations

from dpdmd.evaluation.protocol import Evaluation


class Brightness(Evaluation):
    columns = {"brightness": "brightness", "spread": "spread"}  # noqa: RUF012

    def texts(self, config):
        return ["a light picture", "a dark picture", "a picture"][: config.num_prompts]

    def problem(self, config):
        given = config.evaluation.num_prompts
        return f"evaluation.num_prompts = {given}: there are 3; set 3 or less" if given > 3 else None

    def measure(self, images, texts):
        means = images.mean(dim=(1, 2, 3)).view(len(texts), -1)
        return {"brightness": means.mean().item(), "spread": means.std(dim=1).mean().item()}


EVALUATION = Brightness()
