"""Teacher, student and critic on DeepSpeed: who is sharded how, and what one update is.

Each role is a `Network`: a callable (x, t, cond) -> prediction for distill.py, whose weights DeepSpeed keeps (stage 3:
sharded over the processes and gathered block by block). Student and critic can also be updated: `backward` for each
micro-batch, then `step`, which clips, applies the optimizer, or skips an update that is not finite.
"""

from __future__ import annotations

import importlib
import inspect
import json
import math
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dpdmd.config import Config, ConfigError, EngineConfig, ModelConfig, OptimizerConfig, merged
from dpdmd.kernels import fuse_transformer, selective_checkpoint
from dpdmd.kernels.backend import why_not
from dpdmd.kernels.fp8 import converts
from dpdmd.kernels.fuse_transformer import FusionReport

FUSED_ON = ("cuda",)  # devices where the fused operations are the faster ones


@dataclass(frozen=True)
class World:
    """The processes of this run: rank and size, and the device of this one."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def on_main(self, function, *args, **kwargs) -> None:
        """Runs a check on the main process; the ConfigError that it raises there is raised on every process."""
        problem = None
        if self.main:
            try:
                function(*args, **kwargs)
            except ConfigError as error:
                problem = str(error)
        problem = self.gather(problem)[0]
        if problem is not None:
            raise ConfigError(problem)

    def gather(self, value: Any) -> list[Any]:
        """A Python object of every process, in order of rank, on every process."""
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """The mean over the processes of each number."""
        numbers = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        if self.size > 1:
            dist.all_reduce(numbers)
        return dict(zip(values, (numbers / self.size).tolist(), strict=True))


def resolve_device(name: str) -> str:
    """'auto' to 'cuda' where there is one, else 'cpu'. Raises ConfigError for CUDA that is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("engine.device = cuda: torch sees no CUDA device here; engine.device=cpu or auto would run")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def resolve_dtype(name: str, device: str) -> torch.dtype:
    """'auto' to bfloat16 on CUDA and float32 on the CPU."""
    if name == "auto":
        return torch.bfloat16 if device == "cuda" else torch.float32
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]


def check(config: Config) -> None:
    """Raises ConfigError, before anything is loaded, for a device, DeepSpeed file, optimizer or arithmetic that is not to
    be had."""
    device = resolve_device(config.engine.device)
    if config.model.fp8 != "off" and (device != "cuda" or not converts("cuda", torch.cuda.current_device())):
        raise ConfigError(
            f"model.fp8 = {config.model.fp8}: FP8 products need a GPU of compute capability 8.9 or newer, and this "
            f"machine's device is {torch.cuda.get_device_name() if device == 'cuda' else device}; model.fp8=off would run"
        )
    if config.engine.deepspeed is not None:
        read_deepspeed(config.engine.deepspeed)
    for optimizer in (config.student_optimizer, config.critic_optimizer):
        if optimizer.name in _FUSED:
            _fused_adam(optimizer.name, device)


def start(config: EngineConfig) -> World:
    """Joins the processes that the deepspeed launcher started, or stands alone when there was no launcher."""
    device = resolve_device(config.device)
    if device == "cpu":
        # DeepSpeed asks the environment, not us, which accelerator to work on.
        os.environ["DS_ACCELERATOR"] = "cpu"
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        os.environ.update(alone, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import deepspeed

    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if device == "cuda":
        torch.cuda.set_device(local_rank)
    else:
        # Processes that share cores stall one another when each starts a thread for every core.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // _local_processes()))
    deepspeed.init_distributed("nccl" if device == "cuda" else "gloo", auto_mpi_discovery=False, verbose=False)
    return World(dist.get_rank(), dist.get_world_size(), torch.device(device, local_rank if device == "cuda" else None))


def _local_processes() -> int:
    """Processes of this run on this machine, by the name that each launcher has for it (deepspeed's, torchrun's)."""
    return int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)


@dataclass(frozen=True)
class Step:
    """What became of an update."""

    applied: bool  # False: loss or gradient was not finite and the weights stayed as they were
    gradient_norm: float  # before clipping; inf where not applied
    lr: float


class Network:
    """One role. Call it as (x, t, cond) -> prediction, as distill.py expects.

    role: teacher, student or critic; module: the transformer, in the dtype it is to compute in; predict: the backbone's
    way to call it, predict(module, x, t, cond, dtype).
    """

    def __init__(self, role: str, module: nn.Module, backbone, config: Config, world: World):
        import deepspeed

        self.role = role
        self._predict = backbone.predict
        self.stage = getattr(config.engine.zero, role)
        self.trained = role != "teacher"
        self.updates = 0
        self._dtype = next(module.parameters()).dtype
        module.requires_grad_(self.trained)
        # Before the hooks and the recomputation below, which go around the forward that they find.
        self.fusion = fuse(module, config.model, world.device)
        blocks = [child for child in module.modules() if isinstance(child, backbone.block_classes)]
        self._leaves = [_LeafBlock(block) for block in blocks] if self.stage == 3 else []
        if self.trained and config.engine.checkpointing:
            for block in blocks:
                _recompute(block)
        if not self.trained and self.stage == 0:
            self.engine = module.to(world.device).eval()
            return
        settings = deepspeed_settings(config, role, self._dtype, world.size)
        optimizer = None
        if self.trained:
            self._optimizer_config = getattr(config, f"{role}_optimizer")
            student_updates = config.run.iterations // (config.distill.critic_updates + 1)
            self._total_updates = student_updates if role == "student" else config.run.iterations - student_updates
            # With an offloaded optimizer DeepSpeed builds its own CPU one from the settings.
            if "optimizer" not in settings:
                module.to(world.device)
                optimizer = build_optimizer(module.parameters(), self._optimizer_config, world.device.type)
        self.engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)

    def __call__(self, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return self._predict(self.engine, x, t, cond, self._dtype)

    def describe(self) -> str:
        """For the log: size, precision, ZeRO stage, optimizer; and what is fused, with what is not and why."""
        optimizer = type(self.engine.basic_optimizer).__name__ if self.trained else "frozen"
        dtype = str(self._dtype).removeprefix("torch.")
        size = f"{self.num_parameters / 1e6:.1f} M parameters"
        line = f"{self.role}: {size}, {dtype}, ZeRO stage {self.stage}, {optimizer}"
        return line if self.fusion is None else f"{line}; {self.fusion}"

    @property
    def num_parameters(self) -> int:
        """Of the whole network, however little of it this process holds."""
        return sum(getattr(p, "ds_numel", p.numel()) for p in self.module.parameters())

    @property
    def module(self) -> nn.Module:
        return getattr(self.engine, "module", self.engine)

    def backward(self, loss: Tensor) -> None:
        """Adds one micro-batch's gradient. A loss that is not finite makes the gradient so, on every process."""
        self.engine.backward(loss * torch.where(loss.isfinite(), 1.0, torch.nan))
        assert not any(leaf.pending for leaf in self._leaves), f"{self.role}: a forward pass was not differentiated"

    def step(self) -> Step | None:
        """After each micro-batch: None until the last of an update, then what became of it."""
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()
            return None
        lr = learning_rate(self._optimizer_config, self.updates, self._total_updates)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        skipped_before = self.engine.skipped_steps
        plain = self.stage == 0 and self._dtype == torch.float32
        norm = self._gradient_norm() if plain else None
        if plain and not norm.isfinite():
            # Under stage 0 in float32 DeepSpeed runs the bare optimizer, with neither a check nor a norm to ask for.
            self.engine.zero_grad()
            self.engine.micro_steps += 1
            self.engine.skipped_steps += 1
        else:
            self.engine.step()
        applied = self.engine.skipped_steps == skipped_before
        self.updates += applied
        if norm is None:
            norm = self.engine.get_global_grad_norm()
        return Step(applied, float(norm) if applied else torch.inf, lr)

    def _gradient_norm(self) -> Tensor:
        # Stage 0 has reduced the gradients already, so every process comes to the same answer.
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))

    def full_state_dict(self) -> dict[str, Tensor] | None:
        """Every weight, whole, on the CPU of the main process (None elsewhere); all processes must call."""
        import deepspeed

        state = {}
        main = dist.get_rank() == 0
        parameters = dict(self.module.named_parameters())
        for name, value in self.module.state_dict(keep_vars=True).items():
            # One tensor at a time: a network's full weights never stand on a device all at once.
            gathered = [value] if self.stage == 3 and name in parameters else []
            with deepspeed.zero.GatheredParameters(gathered, enabled=bool(gathered)):
                if main:
                    state[name] = value.detach().to("cpu", copy=True)
        return state if main else None


def fuse(module: nn.Module, config: ModelConfig, device: torch.device) -> FusionReport | None:
    """The transformer's blocks with fused operations, in place, where they are wanted; None where not."""
    if not config.fuse or device.type not in FUSED_ON or why_not("triton", device.type, device.index):
        return None
    return fuse_transformer(module, fp8=None if config.fp8 == "off" else config.fp8, verbose=False)


class _LeafBlock:
    """Makes one transformer block a ZeRO-3 leaf, gathered and reduced as a whole, and keeps its gradients right.

    DeepSpeed's hooks on every small submodule double the time of a step; with a leaf there is one set a block. Two
    things about leaves must be made up for. They look at positional inputs only, and diffusers passes keywords: the
    block would be taken for one without differentiable inputs, and its gradients reduced before they are computed. And
    they reduce at every backward pass through the block, where the student's chain passes through it once a step but
    its gradient is whole only after the last: DeepSpeed's `ds_grad_is_ready` holds the reduction back until then.
    """

    def __init__(self, block: nn.Module):
        import deepspeed

        self._parameters = list(block.parameters())
        self._signature = inspect.signature(block.forward)
        self.pending = 0  # forward passes whose backward pass is still to come
        # Before DeepSpeed's own hooks, which it registers in initialize.
        block.register_forward_pre_hook(self._make_positional, with_kwargs=True)
        block.register_forward_hook(self._count)
        block.register_full_backward_hook(self._uncount)
        deepspeed.utils.set_z3_leaf_module(block, True)

    def _make_positional(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]):
        bound = self._signature.bind(*args, **kwargs)
        return bound.args, bound.kwargs

    def _count(self, block: nn.Module, args: tuple, output: Any) -> None:
        self.pending += torch.is_grad_enabled()

    def _uncount(self, block: nn.Module, grad_input: Any, grad_output: Any) -> None:
        self.pending -= 1
        for parameter in self._parameters:
            parameter.ds_grad_is_ready = self.pending == 0


def _recompute(block: nn.Module) -> None:
    """Activation checkpointing inside the block's hooks.

    Around them, as diffusers does it, the recomputation's own hooks would free the weights of a ZeRO-3 leaf just before
    its backward pass reads them.
    """
    forward, parameters = block.forward, list(block.parameters())

    def checkpointed(*args, **kwargs):
        return selective_checkpoint(forward, *args, parameters=parameters, **kwargs)

    block.forward = checkpointed


def deepspeed_settings(config: Config, role: str, dtype: torch.dtype, world_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration of one role; engine.deepspeed is merged over it for student and critic."""
    engine = config.engine
    stage = getattr(engine.zero, role)
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": engine.batch_size,
        "gradient_accumulation_steps": engine.accumulation,
        "train_batch_size": engine.batch_size * engine.accumulation * world_size,
        "gradient_clipping": engine.clip,
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": dtype == torch.bfloat16},
    }
    if stage == 3:
        settings["zero_optimization"] |= {
            "stage3_param_persistence_threshold": engine.zero.param_persistence_threshold,
            # DeepSpeed's own linear adds the bias in a second pass over the output.
            "memory_efficient_linear": False,
        }
    if role != "teacher" and engine.deepspeed is not None:
        settings = merged(settings, read_deepspeed(engine.deepspeed))
    return settings


def read_deepspeed(source: str | dict[str, Any]) -> dict[str, Any]:
    """The user's own DeepSpeed settings. Raises ConfigError for a file that is not a JSON object."""
    if isinstance(source, dict):
        return source
    try:
        settings = json.loads(Path(source).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"engine.deepspeed = {source!r}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ConfigError(f"engine.deepspeed = {source!r}: not a JSON file ({error})") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"engine.deepspeed = {source!r}: holds a {type(settings).__name__}; an object is needed")
    return settings


def learning_rate(config: OptimizerConfig, updates: int, total: int) -> float:
    """The rate of the update that follows `updates` applied ones, of `total` in the run."""
    share = min(1.0, (updates + 1) / max(1, config.warmup))
    if config.decay == "cosine":
        share *= 0.5 * (1.0 + math.cos(math.pi * min(1.0, updates / total)))
    return config.lr * share


def build_optimizer(parameters, config: OptimizerConfig, device: str) -> torch.optim.Optimizer:
    """AdamW of the first of apex, DeepSpeed and torch that is installed, or of the one that is named.

    Raises ConfigError when the named one cannot be had here, saying why.
    """
    arguments = {"lr": config.lr, "betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay}
    for name in _FUSED if config.name == "auto" else {config.name} & set(_FUSED):
        try:
            return _fused_adam(name, device)(parameters, adam_w_mode=True, **arguments)
        except Exception as error:
            # Building DeepSpeed's kernel can fail in many ways: no compiler, another CUDA, a read-only cache.
            if config.name != "auto":
                raise error if isinstance(error, ConfigError) else _unusable(name, error) from error
    return torch.optim.AdamW(parameters, fused=True, **arguments)


# PyPI's apex is another project; NVIDIA's has this module.
_FUSED = {"apex": "apex.optimizers", "deepspeed": "deepspeed.ops.adam"}


def _fused_adam(name: str, device: str) -> type:
    """The class FusedAdam of apex or DeepSpeed. Raises ConfigError where it cannot be had."""
    if device != "cuda":
        raise _unusable(name, "it needs a CUDA device")
    try:
        return importlib.import_module(_FUSED[name]).FusedAdam
    except (ImportError, AttributeError) as error:
        raise _unusable(name, error) from error


def _unusable(name: str, reason: object) -> ConfigError:
    return ConfigError(f"optimizer name = {name!r} cannot be used: {reason}; auto or torch would run")
