"""The contenders of cases/cycle.py: this engine with several settings, and its peers on the same algorithm.

A peer uses diffusers' modules, and losses and sampler steps in plain PyTorch (DPDMD_KERNELS=reference). As in most trainers,
weights are bfloat16, torch's fused AdamW updates them directly, and every block is checkpointed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from dpdmd.config import Config
from dpdmd.engine.step import Step
from dpdmd.engine.world import World


@dataclass(frozen=True)
class Contender:
    title: str
    settings: tuple[str, ...] = ()  # override the command line's
    peer: str | None = None
    environment: dict[str, str] = field(default_factory=dict)


PLAIN = {"DPDMD_KERNELS": "reference"}
CONTENDERS = {
    "ours": Contender("dpdmd, as configured"),
    "fp8": Contender("dpdmd, FP8 in passes without gradient", ("model.fp8=no_grad",)),
    "eager": Contender("eager PyTorch, bf16 AdamW", peer="eager", environment=PLAIN),
    "compile": Contender("the same, torch.compile on each block", peer="compile", environment=PLAIN),
    "tutorial": Contender("DeepSpeed ZeRO-3, three engines, fp32 masters", peer="tutorial", environment=PLAIN),
}


class Peer:
    """The peer of `dpdmd.engine.role.Role`: a call (x, t, cond) -> prediction, backward, step."""

    differentiates_in_parts = False
    traffic = None

    def __init__(self, kind: str, role: str, module: torch.nn.Module, backbone, config: Config, world: World):
        self.name, self.module = role, module
        self.trained = role != "teacher"
        self._predict, self._world, self._clip = backbone.predict, world, config.engine.clip
        self._dtype = next(module.parameters()).dtype
        module.to(world.device).requires_grad_(self.trained)
        if self.trained:
            module.train()
            module.enable_gradient_checkpointing()
        if kind == "compile":
            for block in module.modules():
                if isinstance(block, backbone.block_classes):
                    block.compile()
        self._engine, self._callable = None, module
        lr = config.optimizer(role).lr if self.trained else None
        if kind == "tutorial":
            self._engine = self._callable = _deepspeed(module, lr, config, world)
        elif self.trained:
            self._optimizer = torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=0.0, fused=True)
        self._lr = lr

    def __call__(self, x, t, cond):
        return self._predict(self._callable, x, t, cond, self._dtype)

    def backward(self, loss):
        if self._engine is not None:
            self._engine.backward(loss)
            return
        loss.backward()
        if self._world.size > 1:
            for parameter in self.module.parameters():
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad.div_(self._world.size))

    def step(self) -> Step:
        if self._engine is not None:
            self._engine.step()
            return Step(self._lr, torch.as_tensor(self._engine.get_global_grad_norm()))
        norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), self._clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return Step(self._lr, norm)


def _deepspeed(module, lr: float | None, config: Config, world: World):
    import deepspeed

    settings = {
        "train_micro_batch_size_per_gpu": config.engine.batch_size,
        "train_batch_size": config.engine.batch_size * world.size,
        "gradient_clipping": config.engine.clip,
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 3},
        "bf16": {"enabled": next(module.parameters()).dtype == torch.bfloat16},
    }
    optimizer = None if lr is None else torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=0.0, fused=True)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
    return engine
