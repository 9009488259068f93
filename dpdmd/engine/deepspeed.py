"""DeepSpeed as the engine uses it: it cuts networks up and keeps their state, and can reduce and update by itself.

All that is private to DeepSpeed stands here, with the versions that it is known of. `check` compares the version before
anything starts, `check_names` the names once DeepSpeed is imported; what only an instance has is looked for when a network
is cut up.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Iterable, Iterator
from pathlib import Path
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
    """Raises ConfigError for a version of DeepSpeed whose inside is not known here."""
    version = importlib.metadata.version("deepspeed")
    found = tuple(int(part) for part in version.split(".")[:2])
    if not OLDEST <= found < BEFORE:
        raise ConfigError(
            f"DeepSpeed {version} is installed; {_text(OLDEST)} or newer and below {_text(BEFORE)} is needed: the engine takes "
            f"its hooks off and works on its shards (pip install 'deepspeed>={_text(OLDEST)},<{_text(BEFORE)}')"
        )


def check_names() -> None:
    """Raises ConfigError where the installed DeepSpeed lacks what is used here. Imports it."""
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    for owner, names in (
        (DeepSpeedZeroOptimizer_Stage3, _OF_STAGE_3),
        (DeepSpeedZeRoOffload, ("destroy",)),
        (ZeroParamStatus, ("AVAILABLE", "NOT_AVAILABLE")),
    ):
        _require(owner, names)


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
        "timers": {"throughput": {"enabled": False}},  # waits for the GPU at each pass
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,  # gathering is: nothing stays behind on its own account
            # DeepSpeed's own linear adds the bias in a second pass over the output.
            "memory_efficient_linear": False,
        },
        "bf16": {"enabled": dtype == torch.bfloat16},
    }
    if engine.offload == "none":
        # Gradients are reduced in gradients.py: there is one flat shard, and no bucket.
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
    """Leaves each process a piece of a network without an optimizer, and takes DeepSpeed's hooks off."""
    engine = _initialize(module, settings)
    _take_hooks_off(engine, engine.optimizer)


class Partition:
    """A network (or an adapter) that is trained, cut up: this process's pieces of weights, float32 masters and optimizer state.

    All hooks of DeepSpeed are taken off but, where it is to reduce the gradients (reduces), those that do so.

    optimizer: the torch optimizer, whose parameters DeepSpeed has replaced by the masters. masters, weights: flat, one a
    group. parameters: those of each group, in the order of the flat pieces. flat: all weights in one, in the order of the
    module's parameters. swaps: masters and moments are on a disk.
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
        self.swaps = swapper is not None
        self.folder = None if swapper is None else Path(swapper.swap_folder)

    @property
    def masters(self) -> list[Tensor]:
        return self._zero.fp32_partitioned_groups_flat

    @property
    def swappable(self) -> bool:
        """Whether its smallest group is large enough for DeepSpeed to swap."""
        return self._zero.optimizer_swapper.is_swappable_tensor(None, numel=min(self.sizes))

    def free_gradients(self) -> torch.dtype:
        """Frees DeepSpeed's buffer of gradients, which nothing fills where they are reduced elsewhere. Returns its dtype."""
        buffer = self._zero.grad_partitions_flat_buffer
        buffer.untyped_storage().resize_(0)
        return buffer.dtype

    @contextlib.contextmanager
    def masters_in_optimizer(self) -> Iterator[None]:
        """Inside the block the optimizer's parameters are the masters; else DeepSpeed has them there only while it saves or
        loads."""
        self._zero._set_fp32_optimizer_param_groups()
        yield
        self._zero._clear_fp32_optimizer_param_groups()

    @contextlib.contextmanager
    def swapped_in(self, group: int) -> Iterator[None]:
        """A group's masters and moments in memory, where they are on a disk."""
        if not self.swaps:
            yield
            return
        self._zero._optimizer_states_and_gradient_swap_in(group)
        yield
        self._zero._optimizer_states_and_gradient_swap_out(group)

    # DeepSpeed's own stages

    def backward(self, loss: Tensor) -> None:
        """Adds a micro-batch's gradient, reduced by DeepSpeed."""
        self._zero.clear_backward_seen_flag()  # as its forward would
        self.engine.backward(loss)

    def step(self) -> Tensor:
        """DeepSpeed's update, with its clipping. Returns the gradient's norm before clipping; inf where the update was
        skipped."""
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

    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
    return engine


def _take_hooks_off(engine, zero) -> None:
    """When weights are gathered is decided in residency.py."""
    zero.destroy()
    # The engine's own go through all modules at each pass, and wait for the GPU to tell its throughput.
    engine.module_forward_pre_hook.remove()
    engine.module_forward_post_hook.remove()
    for each in engine.module.modules():
        each._parameters = each._original_parameters  # DeepSpeed's own ones look into its hooks' state at each access


# What DeepSpeed has made of a parameter, which has attributes that torch does not know


def piece_of(parameter: Any) -> Tensor:
    """This process's piece."""
    return parameter.ds_tensor


def piece_size(parameter: Any) -> int:
    """Elements of a process's piece, padding included."""
    return parameter.ds_tensor.ds_numel


def whole_size(parameter: Tensor) -> int:
    """Elements of the whole, of a parameter that is cut up or is not."""
    return getattr(parameter, "ds_numel", parameter.numel())


def whole_shape(parameter: Any) -> torch.Size:
    return parameter.ds_shape


def mark(parameters: Iterable[Any], whole: bool) -> None:
    """DeepSpeed's own checks, when it saves and loads, ask for the status."""
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
