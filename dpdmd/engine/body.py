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

FUSED_ON = ("cuda",)  # devices where the fused operations are the faster ones


def fuse(module: nn.Module, config: ModelConfig, device: torch.device) -> FusionReport | None:
    """The transformer's blocks with fused operations, in place, where they are wanted; None where not."""
    if not config.fuse or device.type not in FUSED_ON or why_not("triton", device.type, device.index):
        return None
    return fuse_transformer(module, fp8=None if config.fp8 == "off" else config.fp8, verbose=False)


class Own:
    """A transformer of a role's own."""

    base = None

    def __init__(self, module: nn.Module, backbone, config: Config, world: World, *, trained: bool):
        self.network = self.module = module.requires_grad_(trained)
        self.dtype = next(module.parameters()).dtype
        # Before the recomputation below, which goes around the forward that it finds.
        self.fusion = fuse(module, config.model, world.device)
        self.blocks = [child for child in module.modules() if isinstance(child, backbone.block_classes)]
        self.recomputation = Recomputation.of(self.blocks, config.engine.checkpointing) if trained else None

    def enter(self) -> None:
        """Readies the network for a pass."""

    def parameters(self) -> list[nn.Parameter]:
        """Those that are counted as the role's."""
        return list(self.module.parameters())

    def tensors(self) -> dict[str, Tensor]:
        """What is exported, by name: parameters, and buffers that are saved."""
        return self.module.state_dict(keep_vars=True)

    def names(self) -> dict[nn.Parameter, str]:
        return {parameter: name for name, parameter in self.module.named_parameters()}


class Base:
    """The transformer that all three roles share under LoRA: its weights are frozen, and are the teacher's."""

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
        remember = partial(remember_role, self.transformer)
        self.recomputation = Recomputation.of(self.blocks, config.engine.checkpointing, remember)
        self.weights: Weights | None = None  # None: a copy in every process

    def shard(self, config: Config, world: World, residency: Residency) -> None:
        """Cuts the frozen weights up; to be called once the adapters have theirs."""
        if not residency.sharded:
            return
        frozen = [parameter for parameter in self.transformer.parameters() if not parameter.requires_grad]
        deepspeed.cut_up(self.transformer, deepspeed.settings_of(config, "teacher", frozen[0].dtype, world.size))
        self.weights = Weights(frozen, self.blocks, residency.policy, world.size)

    def enter(self, role: str) -> None:
        """Puts the transformer in a role, with its weights where they are needed."""
        use_role(self.transformer, role)
        if self.weights is not None:
            self.weights.gather()


class OnBase:
    """A shared transformer in one role: the teacher, or with the role's adapter.

    module: the transformer itself for the teacher, of whose weights this process may have a piece; else the adapter.
    """

    blocks: tuple[nn.Module, ...] = ()  # gathered by the base

    def __init__(self, base: Base, role: str):
        self.base, self._role = base, role
        self.dtype, self.fusion, self.recomputation = base.dtype, base.fusion, base.recomputation
        self.network = base.transformer
        self._adapter = {} if role == "teacher" else adapter_parameters(base.transformer, role)
        self.module = Parameters(self._adapter.values()) if self._adapter else base.transformer

    def enter(self) -> None:
        self.base.enter(self._role)

    def parameters(self) -> list[nn.Parameter]:
        """The adapter's; the teacher's without any adapter."""
        return [*self._adapter.values()] or [p for p in self.module.parameters() if not p.requires_grad]

    def tensors(self) -> dict[str, Tensor]:
        return dict(self._adapter)

    def names(self) -> dict[nn.Parameter, str]:
        return {parameter: name for name, parameter in self._adapter.items()}


class Parameters(nn.Module):
    """The parameters of one adapter, for DeepSpeed to shard and to keep the state of."""

    def __init__(self, parameters):
        super().__init__()
        for index, parameter in enumerate(parameters):
            self.register_parameter(str(index), parameter)
