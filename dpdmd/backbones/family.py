"""A model family: all that the rest of the house needs to know of it, and where families are found.

A family is one file: a `Backbone` under `@register` whose attribute `family` is a `Family`. The files in this folder are
found by themselves. One that lies elsewhere is known once a program has imported it, or where `model.family` names it.
"""

from __future__ import annotations

import functools
import importlib.util
import pkgutil
import sys
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dpdmd.backbones.files import check_file
from dpdmd.backbones.vae import AUTOENCODER_KL, Vae
from dpdmd.config import ConfigError
from dpdmd.kernels.fusion.fuse_transformer import FAMILIES

if TYPE_CHECKING:
    from torch import nn

    from dpdmd.backbones.base import Backbone
    from dpdmd.backbones.text import Encoder

Registered = TypeVar("Registered", bound="type[Backbone]")
# Of diffusers' joint blocks: the projections of both streams' attention and feed-forwards.
JOINT_TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    *("net.0.proj", "net.2"),
)
BLOCK_LISTS = ("transformer_blocks", "single_transformer_blocks")  # diffusers' usual names


class Guidance(Enum):
    """How a pipeline counts its guidance scale s, with the predictions c and u; the value is its s for no guidance.

    distill.guidance_scale is counted from u, whatever the family, so that 1 is none everywhere. What a network takes
    as an input (FLUX.1-dev) is `Backbone.pipeline_guidance_scale`. Guidance whose norm is rescaled afterwards is no
    matter of counting: it belongs into a noise process of its own, whose `step` and `dmd_loss` see both predictions.
    """

    FROM_UNCOND = 1.0  # u + s (c - u)
    FROM_COND = 0.0  # c + s (c - u)

    def counted(self, guidance_scale: float) -> float:
        """`distill.guidance_scale` as the pipeline counts it."""
        return guidance_scale - 1.0 + self.value


@dataclass(frozen=True, kw_only=True)
class Family:
    name: str  # in model.family and dpdmd.json
    pipeline: str  # class of its pipelines, as model_index.json has it
    transformer: str | type[nn.Module]  # a class of diffusers, by its name, or the class itself
    blocks: tuple[str, ...]  # classes of the transformer blocks, by their names in the transformer's module
    block_lists: tuple[str, ...] = BLOCK_LISTS  # attributes of the transformer that hold blocks, where they are there
    lora_targets: tuple[str, ...] = JOINT_TARGETS  # endings of names: linear layers of the blocks with adapters
    text: tuple[Encoder, ...]
    longest_text: int = 512  # tokens that the pipeline takes at most
    text_parameters: float = 0.0  # of a published model's text encoders together, for the planner
    vae: Vae = AUTOENCODER_KL
    guidance: Guidance = Guidance.FROM_UNCOND
    common: tuple[str, ...]  # settings of the transformer that all roles must have alike
    optional: tuple[str, ...] = ()  # settings that may be null, whatever the transformer's class says
    packing: int = 1  # the pipeline makes one pixel of the network's input of packing x packing latents
    # Published models, which random_init builds where their files are not: transformer's and scheduler's settings.
    known: dict[str, dict[str, Any]] = field(default_factory=dict)
    schedulers: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def transformer_name(self) -> str:
        return self.transformer if isinstance(self.transformer, str) else self.transformer.__name__

    @property
    def fused(self) -> bool:
        """Whether there are fused forwards for the blocks."""
        return self.transformer_name in FAMILIES

    @property
    def transformer_class(self) -> type[nn.Module]:
        if not isinstance(self.transformer, str):
            return self.transformer
        import diffusers

        return getattr(diffusers, self.transformer)

    @property
    def block_classes(self) -> tuple[type[nn.Module], ...]:
        """The units of ZeRO-3 gathering and of activation checkpointing."""
        module = sys.modules[self.transformer_class.__module__]
        return tuple(getattr(module, name) for name in self.blocks)


_REGISTERED: dict[str, type[Backbone]] = {}


def register(backbone: Registered) -> Registered:
    """Makes a backbone's family known, and returns the backbone: a decorator. Raises ValueError for a name or a pipeline
    class that another family has."""
    family = backbone.family
    for other in _REGISTERED.values():
        if other.family.name == family.name or other.family.pipeline == family.pipeline:
            raise ValueError(
                f"family {family.name!r} of {family.pipeline}: {other.__qualname__} has that name or class"
            )
    _REGISTERED[family.name] = backbone
    return backbone


def backbones() -> dict[str, type[Backbone]]:
    """Every family's, by the family's name."""
    package = __name__.rpartition(".")[0]
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        importlib.import_module(f"{package}.{module.name}")
    return dict(_REGISTERED)


def families() -> list[Family]:
    return [backbone.family for backbone in backbones().values()]


def family_of(transformer: str) -> Family | None:
    """The family whose transformers are of the class of that name; None where there is none."""
    return next((family for family in families() if family.transformer_name == transformer), None)


def find(name: str) -> type[Backbone]:
    """What model.family names: a family, or the Python file of one's own, which is run. Raises ConfigError."""
    if name.endswith(".py"):
        return _from_file(Path(name).resolve())
    there = backbones()
    if name not in there:
        raise ConfigError(
            f"model.family = {name!r}: there is no such family; there are {', '.join(sorted(there))}, or the name of a .py "
            "file that registers one"
        )
    return there[name]


@functools.cache
def _from_file(path: Path) -> type[Backbone]:
    check_file(path, "model.family")
    before = set(backbones())
    spec = importlib.util.spec_from_file_location(f"dpdmd_family_{path.stem}", path)
    assert spec is not None and spec.loader is not None, path  # it ends in .py
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    added = [name for name in _REGISTERED if name not in before]
    if len(added) != 1:
        raise ConfigError(f"model.family = {str(path)!r}: it registers {len(added)} families, and one is needed")
    return _REGISTERED[added[0]]
