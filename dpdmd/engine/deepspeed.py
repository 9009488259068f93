"""DeepSpeed as the engine uses it: it shards networks and keeps their state, and can reduce and update by itself.

All use of DeepSpeed's private names is here, with the versions that have them. `check` compares the version before anything
starts, `check_names` the names of classes after the import; the names of instances are checked when a network is sharded.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from dpdmd.config import Config, ConfigError, merged
from dpdmd.engine.nvme import swap_folder
from dpdmd.engine.world import resolve_device

OLDEST, BEFORE = (0, 19), (0, 20)

_OF_STAGE_3 = (
    "_set_fp32_optimizer_param_groups",
    "_clear_fp32_optimizer_param_groups",
    "_optimizer_states_and_gradient_swap_in",
    "_optimizer_states_and_gradient_swap_out",
    "clear_backward_seen_flag",
    "destroy",
)
_OF_A_TRAINED = (
    "fp32_partitioned_groups_flat",
    "fp16_partitioned_groups_flat",
    "fp16_partitioned_groups_flat_numel",
    "fp16_groups",
    "lp_param_buffer",
    "grad_partitions_flat_buffer",
    "parameter_offload",
)


def check() -> None:
    """Raises ConfigError for a version of DeepSpeed whose private names are not known here."""
    version = importlib.metadata.version("deepspeed")
    found = tuple(int(part) for part in version.split(".")[:2])
    if not OLDEST <= found < BEFORE:
        raise ConfigError(
            f"DeepSpeed {version} is installed; {_text(OLDEST)} or newer and below {_text(BEFORE)} is needed: the engine takes "
            f"its hooks off and works on its shards (pip install 'deepspeed>={_text(OLDEST)},<{_text(BEFORE)}')"
        )


def check_names() -> None:
    """Imports DeepSpeed and raises ConfigError if it lacks a name used here."""
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    _require(DeepSpeedZeroOptimizer_Stage3, _OF_STAGE_3)
    _require(DeepSpeedZeRoOffload, ("destroy",))
    _require(ZeroParamStatus, ("AVAILABLE", "NOT_AVAILABLE"))


def _require(owner: Any, names: tuple[str, ...]) -> None:
    missing = [name for name in names if not hasattr(owner, name)]
    if missing:
        kind = owner if isinstance(owner, type) else type(owner)
        raise ConfigError(
            f"DeepSpeed {importlib.metadata.version('deepspeed')}: its {kind.__name__} has no {', '.join(missing)}, which the "
            f"engine uses; {_text(OLDEST)} has"
        )


def _text(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def settings_of(config: Config, role: str, dtype: torch.dtype, world_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration of one role; engine.deepspeed is merged over it for student and critic."""
    engine = config.engine
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": engine.batch_size,
        "gradient_accumulation_steps": engine.accumulation,
        "train_batch_size": engine.batch_size * engine.accumulation * world_size,
        "gradient_clipping": engine.clip,
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},  # they wait for the GPU at each pass
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,  # DeepSpeed keeps no parameter whole by itself
            # DeepSpeed's own linear adds the bias in a second pass over the output.
            "memory_efficient_linear": False,
        },
        "bf16": {"enabled": dtype == torch.bfloat16},
    }
    if engine.offload == "none":
        # gradients.py reduces gradients: one flat shard, and no bucket.
        settings["zero_optimization"] |= {"sub_group_size": 10**15, "contiguous_gradients": False}
    if engine.accumulation > 1:
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    if role != "teacher" and engine.offload != "none":
        pinned = resolve_device(engine.device) == "cuda"
        offload = {"device": engine.offload, "pin_memory": pinned}
        if engine.offload == "nvme":
            offload |= {"nvme_path": str(swap_folder(config, role)), "fast_init": True}
        settings["zero_optimization"]["offload_optimizer"] = offload
        settings["zero_force_ds_cpu_optimizer"] = False  # torch's fused AdamW updates on the CPU as well
    if role != "teacher" and engine.deepspeed is not None:
        settings = merged(settings, engine.deepspeed)
    return settings


def cut_up(module: nn.Module, settings: dict[str, Any]) -> None:
    """Shards a network that has no optimizer, and removes DeepSpeed's hooks."""
    engine = _initialize(module, settings)
    _take_hooks_off(engine, engine.optimizer)


class Partition:
    """This process's shards of a trained network (or adapter): weights, float32 masters and optimizer state.

    DeepSpeed's hooks are removed, except those that reduce gradients if DeepSpeed is to do so (reduces).

    optimizer: the torch optimizer, whose parameters DeepSpeed has replaced by the masters. masters, weights: flat, one a
    group. parameters: those of each group, in the order of the flat shards. flat: all weights in one, in the order of the
    module's parameters. folder: where masters and moments are swapped to disk; None: they are in memory.
    """

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any], *, reduces: bool):
        self.engine = _initialize(module, settings, optimizer)
        self._zero = zero = self.engine.optimizer  # DeepSpeedZeroOptimizer_Stage3
        _require(zero, _OF_A_TRAINED)
        _take_hooks_off(self.engine, zero.parameter_offload if reduces else zero)
        self.optimizer: Any = zero.optimizer
        self.weights: list[Tensor] = zero.fp16_partitioned_groups_flat
        self.parameters: list[list[nn.Parameter]] = zero.fp16_groups
        self.flat: Tensor = zero.lp_param_buffer
        self.sizes: list[int] = zero.fp16_partitioned_groups_flat_numel
        swapper = getattr(zero, "optimizer_swapper", None)
        self.folder = None if swapper is None else Path(swapper.swap_folder)

    @property
    def masters(self) -> list[Tensor]:
        return self._zero.fp32_partitioned_groups_flat

    @property
    def swappable(self) -> bool:
        """Whether the smallest group is large enough for DeepSpeed to swap."""
        return self._zero.optimizer_swapper.is_swappable_tensor(None, numel=min(self.sizes))

    def free_gradients(self) -> torch.dtype:
        """Frees DeepSpeed's gradient buffer, unused where gradients.py reduces. Returns its dtype."""
        buffer = self._zero.grad_partitions_flat_buffer
        buffer.untyped_storage().resize_(0)
        return buffer.dtype

    @contextlib.contextmanager
    def masters_in_optimizer(self) -> Iterator[None]:
        """Inside the block the optimizer's parameters are the masters, as DeepSpeed has them only while it saves or loads."""
        self._zero._set_fp32_optimizer_param_groups()
        yield
        self._zero._clear_fp32_optimizer_param_groups()

    @contextlib.contextmanager
    def swapped_in(self, group: int) -> Iterator[None]:
        """Inside the block a group's masters and moments are in memory."""
        if self.folder is not None:
            self._zero._optimizer_states_and_gradient_swap_in(group)
        yield
        if self.folder is not None:
            self._zero._optimizer_states_and_gradient_swap_out(group)

    def backward(self, loss: Tensor) -> None:
        """Adds a micro-batch's gradient, reduced by DeepSpeed."""
        self._zero.clear_backward_seen_flag()  # as its forward would
        self.engine.backward(loss)

    def step(self) -> Tensor:
        """DeepSpeed's update, with its clipping. Returns the gradient's norm before clipping; inf for a skipped update."""
        skipped_before = self.engine.skipped_steps
        self.engine.step()
        if self.engine.skipped_steps != skipped_before:
            return torch.tensor(torch.inf)
        return torch.as_tensor(self.engine.get_global_grad_norm())

    def set_lr(self, lr: float) -> None:
        for group in self._zero.param_groups:
            group["lr"] = lr


def _initialize(module: nn.Module, settings: dict[str, Any], optimizer: torch.optim.Optimizer | None = None) -> Any:
    import deepspeed

    # DeepSpeed asks whether the optimizer is its Muon. Importing that would load torch.compile: 3 s of each process.
    name = "deepspeed.runtime.zero.muon.muon_optimizer"
    stand_in: Any = ModuleType(name)
    stand_in.MuonWithAuxAdam = type("MuonWithAuxAdam", (), {})
    loaded = sys.modules.setdefault(name, stand_in)
    try:
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
    finally:
        if loaded is stand_in:
            del sys.modules[name]
    return engine


def _take_hooks_off(engine, zero) -> None:
    """Removes DeepSpeed's hooks: residency.py decides when weights are gathered."""
    zero.destroy()
    # The engine's hooks walk through all modules at each pass, and wait for the GPU to tell its throughput.
    engine.module_forward_pre_hook.remove()
    engine.module_forward_post_hook.remove()
    for each in engine.module.modules():
        each._parameters = each._original_parameters  # DeepSpeed's replacement looks up its hooks' state at each access


def piece_of(parameter: Any) -> Tensor:
    """This process's shard of a parameter."""
    return parameter.ds_tensor


def piece_size(parameter: Any) -> int:
    """Elements of a process's shard of a parameter, padding included."""
    return parameter.ds_tensor.ds_numel


def whole_size(parameter: Tensor) -> int:
    """Elements of the whole parameter, sharded or not."""
    return getattr(parameter, "ds_numel", parameter.numel())


def whole_shape(parameter: Any) -> torch.Size:
    return parameter.ds_shape


def mark(parameters: Iterable[Any], whole: bool) -> None:
    """Sets the status that DeepSpeed checks when it saves and loads."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    status = ZeroParamStatus.AVAILABLE if whole else ZeroParamStatus.NOT_AVAILABLE
    for parameter in parameters:
        parameter.ds_status = status


@contextlib.contextmanager
def gathered(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Inside the block the parameters are whole; all processes enter."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters, enabled=bool(parameters)):
        yield
