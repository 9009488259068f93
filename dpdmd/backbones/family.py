"""A model family: what the rest of the package needs to know about it, and how families are found.

A family is one file: a `Backbone` under `@register` whose attribute `family` is a `Family`. Files in this folder are found
automatically; a file elsewhere is registered when a program imports it or `model.family` names it.
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
# The projections of attention and feed-forwards, of both streams of diffusers' joint blocks.
JOINT_TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    *("net.0.proj", "net.2"),
)
BLOCK_LISTS = ("transformer_blocks", "single_transformer_blocks")  # diffusers' usual names


class Guidance(Enum):
    """How a pipeline counts its guidance scale s (c, u: conditional and unconditional prediction); value: s for no guidance.

    distill.guidance_scale is counted from u in every family, so that 1 means no guidance. The value that a network takes
    as an input (FLUX.1-dev) is `Backbone.pipeline_guidance_scale`. Guidance that rescales the norm needs its own noise
    process, whose `step` and `dmd_loss` see both predictions.
    """

    FROM_UNCOND = 1.0  # u + s (c - u)
    FROM_COND = 0.0  # c + s (c - u)

    def counted(self, guidance_scale: float) -> float:
        """The pipeline's value for `distill.guidance_scale`."""
        return guidance_scale - 1.0 + self.value


@dataclass(frozen=True, kw_only=True)
class Family:
    name: str  # in model.family and dpdmd.json
    pipeline: str  # class of its pipelines in model_index.json
    transformer: str | type[nn.Module]  # name of a class in diffusers, or the class itself
    blocks: tuple[str, ...]  # names of the transformer blocks' classes in the transformer's module
    block_lists: tuple[str, ...] = BLOCK_LISTS  # attributes of the transformer that hold blocks, if present
    lora_targets: tuple[str, ...] = JOINT_TARGETS  # endings of the names of linear layers that get adapters
    text: tuple[Encoder, ...]
    longest_text: int = 512  # tokens; a run takes model.max_sequence_length, and this is the most that it may be
    text_parameters: float = 0.0  # total of a published model's text encoders, for the planner
    vae: Vae = AUTOENCODER_KL
    guidance: Guidance = Guidance.FROM_UNCOND
    common: tuple[str, ...]  # settings of the transformer that must be equal in all roles
    optional: tuple[str, ...] = ()  # settings that may be null even if the transformer's class does not allow it
    packing: int = 1  # packing x packing latents are one pixel of the network's input
    # Published models, which random_init builds without their files: settings of transformer and scheduler.
    known: dict[str, dict[str, Any]] = field(default_factory=dict)
    schedulers: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def transformer_name(self) -> str:
        return self.transformer if isinstance(self.transformer, str) else self.transformer.__name__

    @property
    def fused(self) -> bool:
        """Whether the blocks have fused forwards."""
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
    """Decorator that registers a backbone's family. Raises ValueError for a name or pipeline class of another family."""
    family = backbone.family
    for other in _REGISTERED.values():
        if other.family.name == family.name or other.family.pipeline == family.pipeline:
            raise ValueError(
                f"family {family.name!r} of {family.pipeline}: {other.__qualname__} has that name or class"
            )
    _REGISTERED[family.name] = backbone
    return backbone


def backbones() -> dict[str, type[Backbone]]:
    """{family's name: backbone}."""
    package = __name__.rpartition(".")[0]
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        importlib.import_module(f"{package}.{module.name}")
    return dict(_REGISTERED)


def families() -> list[Family]:
    return [backbone.family for backbone in backbones().values()]


def family_of(transformer: str) -> Family | None:
    """The family whose transformer class has that name, or None."""
    return next((family for family in families() if family.transformer_name == transformer), None)


def find(name: str) -> type[Backbone]:
    """The backbone that model.family names: a family, or a Python file that registers one. Raises ConfigError."""
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
