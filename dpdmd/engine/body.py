"""The network that a role runs: a transformer of its own, or one that all roles share, with an adapter for each.

A body tells a role what to call (`network`, after `enter`), what is trained and sharded (`module`), which blocks are
gathered one by one, and under which names its tensors are saved.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from dpdmd.config import Config, ModelConfig
from dpdmd.engine import deepspeed
from dpdmd.engine.lora import adapter_parameters, add_adapters, remember_role
from dpdmd.engine.lora import use as use_role
from dpdmd.engine.recompute import Recomputation
from dpdmd.engine.residency import Residency, Weights
from dpdmd.engine.world import World
from dpdmd.kernels import Philox, fuse_transformer
from dpdmd.kernels.fusion.fuse_transformer import FusionReport
from dpdmd.kernels.runtime.backend import why_not

FUSED_ON = ("cuda",)  # devices where the fused operations are faster


def fuse(module: nn.Module, config: ModelConfig, device: torch.device) -> FusionReport | None:
    """Fuses the operations of the transformer's blocks in place; None: model.fuse is off or the device has no kernels."""
    if not config.fuse or device.type not in FUSED_ON or why_not("triton", device.type, device.index):
        return None
    return fuse_transformer(module, fp8=None if config.fp8 == "off" else config.fp8, verbose=False)


class Own:
    """A transformer of a role's own."""

    base = None

    def __init__(self, module: nn.Module, backbone, config: Config, world: World, *, trained: bool):
        self.network = self.module = module.requires_grad_(trained)
        self.dtype = next(module.parameters()).dtype
        self.fusion = fuse(module, config.model, world.device)  # before the recomputation, which wraps the forward
        self.blocks = [child for child in module.modules() if isinstance(child, backbone.block_classes)]
        how = config.engine.checkpointing
        self.recomputation = Recomputation(self.blocks, how) if trained and how != "none" else None

    def enter(self) -> None:
        """Readies the network for a pass."""

    def parameters(self) -> list[nn.Parameter]:
        """The parameters counted as the role's."""
        return list(self.module.parameters())

    def tensors(self) -> dict[str, Tensor]:
        """The exported tensors by name: parameters, and buffers that are saved."""
        return self.module.state_dict(keep_vars=True)


class Base:
    """The transformer that all three roles share under LoRA: its frozen weights are the teacher's."""

    def __init__(self, transformer: nn.Module, backbone, config: Config, world: World):
        self.transformer = transformer.to(world.device).eval()
        self.dtype = next(transformer.parameters()).dtype
        lora = config.lora
        assert lora is not None, "without adapters nothing is shared"
        add_adapters(
            self.transformer,
            rank=lora.rank,
            alpha=lora.alpha or lora.rank,
            targets=lora.targets,
            seed=Philox.of(config.run.seed, "adapters").key,
        )
        self.fusion = fuse(self.transformer, config.model, world.device)
        self.blocks = [child for child in self.transformer.modules() if isinstance(child, backbone.block_classes)]
        how, remember = config.engine.checkpointing, partial(remember_role, self.transformer)
        self.recomputation = None if how == "none" else Recomputation(self.blocks, how, remember)
        self.weights: Weights | None = None  # None: a copy in every process

    def shard(self, config: Config, world: World, residency: Residency) -> None:
        """Shards the frozen weights; call it after the adapters are sharded."""
        if not residency.sharded:
            return
        frozen = [parameter for parameter in self.transformer.parameters() if not parameter.requires_grad]
        deepspeed.cut_up(self.transformer, deepspeed.settings_of(config, "teacher", frozen[0].dtype, world.size))
        self.weights = Weights(frozen, self.blocks, residency.policy, world.size)

    def enter(self, role: str) -> None:
        """Puts the transformer in a role and gathers its weights."""
        use_role(self.transformer, role)
        if self.weights is not None:
            self.weights.gather()


class OnBase:
    """A shared transformer in one role: the teacher, or with the role's adapter.

    module: the role's adapter; for the teacher the transformer itself, which may be sharded.
    """

    blocks: tuple[nn.Module, ...] = ()  # gathered by the base

    def __init__(self, base: Base, role: str):
        self.base, self._role = base, role
        self.dtype, self.fusion, self.recomputation = base.dtype, base.fusion, base.recomputation
        self.network = base.transformer
        self._adapter = {} if role == "teacher" else adapter_parameters(base.transformer, role)
        self.module = nn.ParameterList(self._adapter.values()) if self._adapter else base.transformer

    def enter(self) -> None:
        self.base.enter(self._role)

    def parameters(self) -> list[nn.Parameter]:
        """The adapter's parameters; the frozen ones for the teacher."""
        return [*self._adapter.values()] or [p for p in self.module.parameters() if not p.requires_grad]

    def tensors(self) -> dict[str, Tensor]:
        return dict(self._adapter)
