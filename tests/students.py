"""Students that no one has trained, exported as a run exports them."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from dpdmd.backbones import load_backbone
from dpdmd.backbones.base import Backbone
from dpdmd.config import Config
from dpdmd.distill import Distillation
from dpdmd.engine.lora import adapter_parameters, add_adapters, use
from dpdmd.run.export import export_student

_WORLD = SimpleNamespace(main=True, barrier=lambda: None)


class _Network:
    """What `export_student` asks of a trained network."""

    def __init__(self, transformer: nn.Module, state: dict[str, Tensor]):
        adapted = hasattr(transformer, "peft_config")
        self.base = SimpleNamespace(transformer=transformer) if adapted else None
        self._state = state

    def averaged(self):
        return contextlib.nullcontext()

    def full_state_dict(self):
        return self._state


def exported(folder: Path, config: Config) -> tuple[Backbone, nn.Module]:
    """Writes a student that differs from its teacher; its backbone, and its transformer in the student's role."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    backbone = load_backbone(config.model)
    transformer = backbone.load_transformer("student", torch.float32)
    if config.lora is None:
        parameters, state = dict(transformer.named_parameters()), transformer.state_dict()
    else:
        rank = config.lora.rank
        add_adapters(transformer, rank=rank, alpha=config.lora.alpha or rank, targets=config.lora.targets, seed=0)
        use(transformer, "student")
        parameters = state = adapter_parameters(transformer, "student")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    network = _Network(transformer, {name: tensor.detach().clone() for name, tensor in state.items()})
    distillation = Distillation(backbone.diffusion, config.distill)
    export_student(folder, network, backbone, distillation, config, _WORLD)
    return backbone, transformer
