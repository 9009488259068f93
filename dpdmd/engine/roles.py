"""Teacher, student and critic on DeepSpeed: who is sharded how, and what one update is.

Each role is a `Network`: a callable (x, t, cond) -> prediction for distill.py, whose weights DeepSpeed keeps (stage 3:
sharded over the processes, and gathered as residency.py has it). Student and critic can also be updated: `backward` for each
micro-batch, then `step`, which clips, applies the optimizer, or skips an update that is not finite.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import hashlib
import importlib
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dpdmd.config import (
    Config,
    ConfigError,
    EngineConfig,
    ModelConfig,
    OptimizerConfig,
    merged,
)
from dpdmd.engine.averaging import Average
from dpdmd.engine.compilation import compiling
from dpdmd.engine.lora import adapter_parameters, add_adapters, remember_role
from dpdmd.engine.lora import use as use_role
from dpdmd.engine.optimizer import AdamW
from dpdmd.engine.replay import Replay
from dpdmd.engine.residency import Gradients, Policy, Traffic, Weights
from dpdmd.engine.shards import Layout
from dpdmd.engine.world import World, join, resolve_device
from dpdmd.files import is_finite
from dpdmd.kernels import Philox, fuse_transformer, requantize, selective_checkpoint
from dpdmd.kernels.blocks.fp8 import converts
from dpdmd.kernels.fusion.fuse_transformer import FusionReport
from dpdmd.kernels.runtime.backend import why_not

FUSED_ON = ("cuda",)  # devices where the fused operations are the faster ones


def resolve_dtype(name: str, device: str) -> torch.dtype:
    """'auto' to bfloat16 on CUDA and float32 on the CPU."""
    if name == "auto":
        return torch.bfloat16 if device == "cuda" else torch.float32
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]


def check(config: Config) -> None:
    """Raises ConfigError, before anything is loaded, for a device, optimizer or arithmetic that is not to be had."""
    device = resolve_device(config.engine.device)
    if config.model.fp8 != "off" and (device != "cuda" or not converts("cuda", torch.cuda.current_device())):
        raise ConfigError(
            f"model.fp8 = {config.model.fp8}: FP8 products need a GPU of compute capability 8.9 or newer, and this "
            f"machine's device is {torch.cuda.get_device_name() if device == 'cuda' else device}; model.fp8=off would run"
        )
    if config.engine.offload == "nvme":
        _check_nvme(config.engine.nvme_path)
    for optimizer in (config.student_optimizer, config.critic_optimizer):
        if optimizer.name in _FUSED and config.engine.offload == "none":
            _fused_adam(optimizer.name, device)


def _check_nvme(path: str) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not os.access(path, os.W_OK):
        raise ConfigError(f"engine.nvme_path = {path!r}: no folder that can be written to")
    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise ConfigError(
            "engine.offload = nvme: DeepSpeed's asynchronous file access cannot be built here, for which it needs the headers "
            "of libaio (Debian: libaio-dev); engine.offload=cpu would run"
        )


def _swap_folder(config: Config, role: str) -> Path:
    """Under engine.nvme_path, of one run and one role: DeepSpeed names files by parameters' numbers alone, and copies
    all that is there into a checkpoint."""
    run = hashlib.sha256(str(Path(config.run.output_dir).resolve()).encode()).hexdigest()[:12]
    return Path(config.engine.nvme_path) / f"dpdmd-{run}" / role


def _remove_swapped(folder: Path, root: Path) -> None:
    """A folder with all that is in it, and those above it that are empty then, up to root, which stays."""
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        while (folder := folder.parent) != root:
            folder.rmdir()


def start(config: EngineConfig, run: str = "") -> World:
    """Readies this process's device and joins the others of the run, as `world.join` says."""
    device = resolve_device(config.device)
    if device == "cuda":
        _let_segments_grow()
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"  # before DeepSpeed is imported, below
    if config.offload == "nvme":
        _load_file_access(device)
    return join(config, run)


def _load_file_access(device: str) -> None:
    """DeepSpeed's library for NVMe, which is compiled where it was not yet. Raises ConfigError where it cannot be."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if device == "cuda":
        _bind_cudnn()
    try:
        with compiling("async_io", "DeepSpeed's asynchronous file access"):
            AsyncIOBuilder().load(verbose=False)
    except ConfigError:
        raise
    except Exception as error:  # whatever the compiler, the linker or the environment's settings lead to
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"engine.offload = nvme: DeepSpeed's asynchronous file access could not be built or loaded ({reason[:500]}); "
            "engine.offload=cpu would run"
        ) from error


def _bind_cudnn() -> None:
    """Loads all parts of cuDNN, which loads each at its first use. DeepSpeed's library for NVMe makes torch's symbols
    global; a part that comes after it takes some of them for its own and crashes (torch 2.11, DeepSpeed 0.19)."""
    torch.backends.cudnn.version()  # loads the first part
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    for folder, version in set(re.findall(r"(/\S+)/libcudnn\.so\.(\d+)", maps)):
        for part in sorted(Path(folder).glob(f"libcudnn_*.so.{version}")):
            ctypes.CDLL(str(part), mode=os.RTLD_NOW)


def _let_segments_grow() -> None:
    """Of torch's allocator: what is freed in pieces then serves a larger tensor. A GPU that is full to 95 % has no room for
    pieces that fit nothing. The environment's settings, if there are any, stand instead."""
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")


class Later:
    """A device tensor on its way to the host: reading it waits for what was queued before it, not for what came after."""

    def __init__(self, value: Tensor):
        self._event = None
        self._value = value.detach()
        if value.is_cuda:
            self._value = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            self._value.copy_(value.detach(), non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> Tensor:
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return self._value


class Step:
    """What became of an update; its numbers are fetched from the device when they are asked for."""

    def __init__(self, lr: float, norm: Tensor):
        self.lr = lr
        self._norm = Later(norm)

    @property
    def gradient_norm(self) -> float:
        """Before clipping; inf where the update was not applied."""
        norm = float(self._norm.read())
        return norm if math.isfinite(norm) else math.inf

    @property
    def applied(self) -> bool:
        """False: loss or gradient was not finite and the weights stayed as they were."""
        return math.isfinite(self.gradient_norm)


class Phases:
    """Which network is at work. One whose residency is `phase` is released when another one's turn comes.

    pool: of memory for CUDA graphs, which the networks take turns to use; None without a GPU.
    """

    def __init__(self):
        self._current: Network | None = None
        self.pool = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None

    def enter(self, network: Network) -> None:
        previous, self._current = self._current, network
        if previous is not None and previous is not network and not previous.differentiating:
            previous.end_of_phase()

    def end(self) -> None:
        """The update is over."""
        if self._current is not None:
            self._current.end_of_phase()
        self._current = None


class Adapter(nn.Module):
    """The parameters of one role's LoRA adapter, for DeepSpeed to shard and to keep the state of. names: lora.py's."""

    def __init__(self, parameters: dict[str, nn.Parameter]):
        super().__init__()
        self.names = list(parameters)
        for index, parameter in enumerate(parameters.values()):
            self.register_parameter(str(index), parameter)


class Base:
    """The transformer that all three roles share under LoRA: its weights are frozen, and are the teacher's."""

    def __init__(self, transformer: nn.Module, backbone, config: Config, world: World):
        self.transformer = transformer.to(world.device).eval()
        lora = config.lora
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

    def shard(self, config: Config, world: World) -> None:
        """Cuts the frozen weights up; to be called once the adapters' engines have theirs."""
        import deepspeed

        if config.engine.zero.teacher == 0:
            return
        frozen = [parameter for parameter in self.transformer.parameters() if not parameter.requires_grad]
        settings = deepspeed_settings(config, "teacher", frozen[0].dtype, world.size)
        engine, *_ = deepspeed.initialize(model=self.transformer, config=settings)
        _without_hooks(engine, engine.optimizer)
        # All roles need it: it is never released as a whole.
        policy = "block" if residency(config, world.size) == "block" else "whole"
        self.weights = Weights(frozen, self.blocks, policy, world.size)

    def enter(self, role: str) -> nn.Module:
        """The transformer in a role, its weights where they are needed."""
        use_role(self.transformer, role)
        if self.weights is not None:
            self.weights.gather()
        return self.transformer


def _without_hooks(engine, zero) -> None:
    """Takes DeepSpeed's hooks off: when weights are gathered is decided in residency.py."""
    zero.destroy()
    # The engine's own go through all modules at each pass, and wait for the GPU to tell its throughput.
    engine.module_forward_pre_hook.remove()
    engine.module_forward_post_hook.remove()
    for each in engine.module.modules():
        each._parameters = each._original_parameters  # DeepSpeed's own ones look into its hooks' state at each access


_WHOLE = {"whole": "kept whole", "phase": "gathered for each phase", "block": "gathered block by block"}


class Network:
    """One role. Call it as (x, t, cond) -> prediction, as distill.py expects.

    role: teacher, student or critic; module: the transformer, in the dtype it is to compute in, or the Base that the
    roles share. The backbone's `predict` calls it: predict(module, x, t, cond, dtype).
    """

    def __init__(self, role: str, module: nn.Module | Base, backbone, config: Config, world: World, phases: Phases):
        import deepspeed

        self.role = role
        self._predict = backbone.predict
        self._phases = phases
        self._world_size = world.size
        self._accumulation = config.engine.accumulation
        self._clip = config.engine.clip
        self.trained = role != "teacher"
        self.base = module if isinstance(module, Base) else None
        transformer = module if self.base is None else self.base.transformer
        self._dtype = next(transformer.parameters()).dtype
        self._weights: Weights | None = None  # None: a copy in every process
        self._gradients: Gradients | None = None  # None: DeepSpeed reduces them and applies the update
        self.swaps = False  # its optimizer's state is on a disk (NVMe)
        self.differentiating = False  # a forward pass with a graph has run whose backward pass is to come
        self._micro_batches = 0  # differentiated for the update that is under way
        self._updates = 0
        self._unsettled: Step | None = None
        self.average: Average | None = None
        self._graphs = config.engine.cuda_graphs and world.device.type == "cuda"
        self._replay: Replay | None = None  # of passes without gradient
        self._kept_passes = (getattr(config.engine.kept_passes, role) or 0) if self.trained else 0
        if self.base is not None:
            blocks, self.fusion, self._recomputation = [], self.base.fusion, self.base.recomputation
            if not self.trained:
                self.engine = transformer
                return
            module = Adapter(adapter_parameters(transformer, role))
        else:
            module.requires_grad_(self.trained)
            # Before the recomputation below, which goes around the forward that it finds.
            self.fusion = fuse(module, config.model, world.device)
            blocks = [child for child in module.modules() if isinstance(child, backbone.block_classes)]
            self._recomputation = Recomputation.of(blocks, config.engine.checkpointing) if self.trained else None
            if not self.trained and config.engine.zero.teacher == 0:
                self.engine = module.to(world.device).eval()
                return
        settings = deepspeed_settings(config, role, self._dtype, world.size)
        optimizer = None
        if self.trained:
            self._optimizer_config = getattr(config, f"{role}_optimizer")
            self._total_updates = config.num_updates(role)
            module.to(world.device)
            optimizer = build_optimizer(
                list(module.parameters()),  # not what the first kind that fails to build would use up
                self._optimizer_config,
                world.device.type,
                seed=Philox.of(config.run.seed, role, world.rank).key,
                offload=config.engine.offload,
            )
        self.engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
        self.swaps = self.trained and config.engine.offload == "nvme"
        if self.swaps:
            swapped = Path(self.engine.optimizer.optimizer_swapper.swap_folder)
            atexit.register(_remove_swapped, swapped, Path(config.engine.nvme_path))
            self._check_swapping()
        self._take_over(blocks, config, world, isinstance(optimizer, AdamW))
        if role == "student" and config.ema is not None:
            device = "cpu" if config.ema.device == "cpu" else None
            self.average = Average(self.engine.optimizer.fp32_partitioned_groups_flat, config.ema.decay, device)

    def _check_swapping(self) -> None:
        zero = self.engine.optimizer
        sizes = zero.fp16_partitioned_groups_flat_numel
        if not zero.optimizer_swapper.is_swappable_tensor(None, numel=min(sizes)):
            raise ConfigError(
                f"engine.offload = nvme: DeepSpeed swaps no tensor below 1 MiB, but a process's part of the {self.role} is "
                f"cut into {', '.join(map(str, sizes))} numbers; engine.offload=cpu would run, or another "
                "zero_optimization.sub_group_size in engine.deepspeed"
            )

    def _take_over(self, blocks: list[nn.Module], config: Config, world: World, update: bool) -> None:
        """DeepSpeed has cut the weights up and keeps the state; when they are gathered is decided here from now on, and,
        with an optimizer of ours on the device (update), how gradients are reduced and applied."""
        zero = self.engine.optimizer
        _without_hooks(self.engine, zero if update or not self.trained else zero.parameter_offload)
        policy = residency(config, world.size)
        flat = zero.lp_param_buffer if self.trained else None
        float8 = not self.trained and config.model.teacher_storage == "float8"
        if float8 and policy == "whole":
            policy = "phase"  # whole they have the model's dtype
        self._weights = Weights(list(self.module.parameters()), blocks, policy, world.size, flat, float8=float8)
        if update:
            assert len(zero.fp32_partitioned_groups_flat) == 1, "one flat shard is needed"
            self._weights.gather()
            buffer = zero.grad_partitions_flat_buffer
            self._gradients = Gradients(self._weights.units, buffer.dtype, world.size, self._weights.traffic)
            buffer.untyped_storage().resize_(0)  # DeepSpeed's, which nothing fills
            self._weights.end_of_phase()
            zero._set_fp32_optimizer_param_groups()
            zero.optimizer.create_state(zero.fp32_partitioned_groups_flat[0])
            zero._clear_fp32_optimizer_param_groups()

    def __call__(self, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        self._phases.enter(self)
        if self._weights is not None:
            self._weights.gather()
        if self._recomputation is not None:
            self._recomputation.keep = self._kept_passes
        self.differentiating |= self.trained and torch.is_grad_enabled()
        if self.base is not None:
            module = self.base.enter(self.role)
        else:
            module = self.module
        predict = partial(self._predict, module, dtype=self._dtype)
        if torch.is_grad_enabled() or not (self._graphs and self._weights_stay):
            return predict(x, t, cond)
        if self._replay is None:
            self._replay = Replay(predict, self._phases.pool)
        return self._replay(x, t, cond)

    @property
    def _weights_stay(self) -> bool:
        """Whether what a pass reads is always at the same place."""
        of_base = None if self.base is None else self.base.weights
        return all(weights.stay for weights in (self._weights, of_base) if weights is not None)

    def describe(self) -> str:
        """For the log: size, precision, ZeRO stage, optimizer; and what is fused, with what is not and why."""
        optimizer = type(self.engine.basic_optimizer).__name__ if self.trained else "frozen"
        dtype = str(self._dtype).removeprefix("torch.")
        adapter = "adapter of " if self.base is not None and self.trained else ""
        size = f"{adapter}{self.num_parameters / 1e6:.1f} M parameters"
        line = f"{self.role}: {size}, {dtype}, {optimizer}"
        if self._weights is not None:
            line += f", sharded (ZeRO stage 3), {_WHOLE[self._weights.policy]}"
        return line if self.fusion is None else f"{line}; {self.fusion}"

    @property
    def num_parameters(self) -> int:
        """Of the whole network, however little of it this process holds; of the role's adapter under LoRA."""
        frozen = self.base is not None and not self.trained
        parameters = [p for p in self.module.parameters() if not (frozen and p.requires_grad)]
        return sum(getattr(p, "ds_numel", p.numel()) for p in parameters)

    @property
    def module(self) -> nn.Module:
        return getattr(self.engine, "module", self.engine)

    @property
    def traffic(self) -> Traffic | None:
        """What gathering and reducing has cost so far, of a shared base under the teacher; None where DeepSpeed does it."""
        weights = self.base.weights if self.base is not None and not self.trained else self._weights
        return None if weights is None else weights.traffic

    @property
    def updates(self) -> int:
        """Applied ones. Waits for the last to be known."""
        self.settle()
        return self._updates

    def backward(self, loss: Tensor, *, more: bool = False) -> None:
        """Adds one micro-batch's gradient. A loss that is not finite makes the gradient so, on every process.

        more: another backward pass of the same micro-batch follows, and the gradients are reduced only after it.
        """
        self._phases.enter(self)
        loss = loss * torch.where(loss.isfinite(), 1.0, torch.nan)
        if self._gradients is not None:
            self._gradients.held = more
            (loss / self._accumulation).backward()
            if not more:
                self._gradients.finish()
        else:
            assert not more, "DeepSpeed reduces after each backward pass"
            self.engine.optimizer.clear_backward_seen_flag()  # as its forward would
            self.engine.backward(loss)
        if self._recomputation is not None:
            self._recomputation.end_of_chain()
        if not more:
            self._micro_batches += 1
            self.differentiating = False
            if self._weights is not None:
                self._weights.end_of_phase()

    @property
    def differentiates_in_parts(self) -> bool:
        """Whether `backward` takes `more`."""
        return self._gradients is not None

    def step(self) -> Step | None:
        """After each micro-batch: None until the last of an update, then what became of it."""
        if self._micro_batches < self._accumulation:
            if self._gradients is None:
                self.engine.step()
            return None
        self.settle()
        self._micro_batches = 0
        lr = learning_rate(self._optimizer_config, self._updates, self._total_updates)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        norm = self._update() if self._gradients is not None else self._update_by_deepspeed()
        self._weights.changed()
        self._forget_rounded()
        if self.average is not None:
            self.average.update(norm.isfinite())
        self._unsettled = Step(lr, norm)
        return self._unsettled

    def settle(self) -> None:
        """Learns what became of the last update: how many were applied decides rate and bias correction of the next."""
        if self._unsettled is not None:
            self._updates += self._unsettled.applied
            self._unsettled = None

    def _update(self) -> Tensor:
        """One pass over this process's shards. Returns the gradient's norm over all of them; nothing is written where it
        is not finite, and the host need not know."""
        zero = self.engine.optimizer
        gradient = self._gradients.flat
        squared = sum_of_squares(gradient)
        if self._world_size > 1:
            dist.all_reduce(squared)
        norm = squared.sqrt().float()
        scale = (self._clip / (norm + 1e-6)).clamp(max=1.0) if self._clip > 0 else None
        (master,), (weight,) = zero.fp32_partitioned_groups_flat, zero.fp16_partitioned_groups_flat
        zero.optimizer.state[master]["step"] = self._updates  # it counts calls, those that were not applied too
        zero._set_fp32_optimizer_param_groups()  # DeepSpeed keeps them in the optimizer only while it saves or loads
        zero.optimizer.update(
            master,
            gradient,
            weight=None if weight.data_ptr() == master.data_ptr() else weight,
            scale=scale,
            apply=norm.isfinite(),
        )
        zero._clear_fp32_optimizer_param_groups()
        self._gradients.clear()
        return norm

    def _update_by_deepspeed(self) -> Tensor:
        self._weights.release()
        skipped_before = self.engine.skipped_steps
        self.engine.step()
        if self.engine.skipped_steps != skipped_before:
            return torch.tensor(torch.inf)
        return torch.as_tensor(self.engine.get_global_grad_norm())

    def end_of_phase(self) -> None:
        """Gives the weights back, where they are not to stay."""
        if self._weights is not None:
            self._weights.end_of_phase()

    def release(self) -> None:
        """Gives the weights back, as DeepSpeed wants to find them when it saves or loads."""
        if self._weights is not None:
            self._weights.release()

    # What a checkpoint keeps

    def layout(self) -> Layout:
        """How the parameters are cut up."""
        names = {parameter: name for name, parameter in self.module.named_parameters()}
        if self.base is not None:
            names = dict(zip(self.module.parameters(), self.module.names, strict=True))
        groups = self.engine.optimizer.fp16_groups
        return Layout(
            self._world_size, tuple(tuple((names[each], each.ds_numel) for each in group) for group in groups)
        )

    def state_groups(self) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """This process's part of masters, moments and average, a group after the other, as views where possible: to be
        copied before the next one is asked for."""
        self.release()
        zero = self.engine.optimizer
        for group, master in enumerate(zero.fp32_partitioned_groups_flat):
            with self._swapped_in(group):
                tensors = {"master": master.detach()}
                for name, value in zero.optimizer.state.get(master, {}).items():
                    tensors[name] = value.detach() if isinstance(value, Tensor) else _number(value)
                if "step" in zero.optimizer.param_groups[0]:  # apex counts there
                    tensors["step"] = _number(zero.optimizer.param_groups[0]["step"])
                if self.average is not None:
                    tensors["average"] = self.average.shards[group]
                yield group, tensors

    @torch.no_grad()
    def load(self, updates: int, read: Callable[[int], dict[str, Tensor]]) -> None:
        """What `state_groups` gave after so many updates; read: the tensors of a group. All processes call."""
        self.release()
        self._updates = updates
        zero = self.engine.optimizer
        for group, master in enumerate(zero.fp32_partitioned_groups_flat):
            tensors = read(group)
            with self._swapped_in(group):
                master.data.copy_(tensors.pop("master"))
                if self.average is not None:
                    self.average.shards[group].copy_(tensors.pop("average"))
                weight = zero.fp16_partitioned_groups_flat[group]
                if weight.data_ptr() != master.data_ptr():
                    weight.copy_(master)
                if "step" in tensors:
                    _restore_step(zero.optimizer, master, int(tensors.pop("step")))
                state = zero.optimizer.state[master]
                for name, value in tensors.items():
                    _restore(state, name, value, master.device)
        if self._replay is not None:
            self._replay.forget()
        self._forget_rounded()

    @contextlib.contextmanager
    def _swapped_in(self, group: int) -> Iterator[None]:
        """A group's masters and moments in memory, where they are on a disk."""
        zero = self.engine.optimizer
        if not self.swaps:
            yield
            return
        zero._optimizer_states_and_gradient_swap_in(group)
        yield
        zero._optimizer_states_and_gradient_swap_out(group)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside the block the weights are their moving average, where there is one."""
        if self.average is None:
            yield
            return
        self.release()
        with self.average.in_place_of(self.engine.optimizer.fp16_partitioned_groups_flat):
            self._forget_rounded()
            yield
            self.release()
        self._forget_rounded()

    def _forget_rounded(self) -> None:
        """FP8 copies are made anew: shards are written to past whatever else could tell."""
        if self.fusion is not None and self.fusion.num_fp8 and self.base is None:
            requantize(self.module)
            if self._replay is not None:
                self._replay.run_next()

    def bits(self) -> int:
        """The sum of this process's part of the weights, each number's bits read as a whole number: it tells whether any
        has changed."""
        self.release()
        kinds = {2: torch.int16, 4: torch.int32}
        weights = self.engine.optimizer.fp16_partitioned_groups_flat
        return sum(int(each.detach().view(kinds[each.itemsize]).sum(dtype=torch.int64)) for each in weights)

    def is_finite(self) -> bool:
        """Whether this process's part of the weights holds no NaN and no infinity."""
        self.release()
        return all(is_finite(each) for each in self.engine.optimizer.fp16_partitioned_groups_flat)

    def full_state_dict(self) -> dict[str, Tensor] | None:
        """Every weight, whole, on the CPU of the main process (None elsewhere); all processes must call."""
        import deepspeed

        self.release()
        state = {}
        main = dist.get_rank() == 0
        tensors = self.module.state_dict(keep_vars=True)
        if self.base is not None:
            tensors = dict(zip(self.module.names, self.module.parameters(), strict=True))
        for name, value in tensors.items():
            # One tensor at a time: a network's full weights never stand on a device all at once.
            gathered = [value] if isinstance(value, nn.Parameter) else []
            with deepspeed.zero.GatheredParameters(gathered, enabled=bool(gathered)):
                if main:
                    state[name] = value.detach().to("cpu", copy=True)
        return state if main else None


def _number(value: int | float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.int64)


def _restore(state: dict[str, Any], name: str, value: Tensor, device: torch.device) -> None:
    """One entry of an optimizer's state, in the place of what there is."""
    now = state.get(name)
    if isinstance(now, Tensor) and now.shape == value.shape and now.dtype == value.dtype:
        now.copy_(value)
    else:
        state[name] = value.to(device, copy=True)


def _restore_step(optimizer: torch.optim.Optimizer, master: Tensor, steps: int) -> None:
    """How many updates were made, as this kind of optimizer keeps it: another kind may have made them."""
    if isinstance(optimizer, torch.optim.AdamW):
        optimizer.state[master]["step"] = torch.tensor(float(steps), device=master.device)
    elif type(optimizer).__module__.startswith("apex."):
        optimizer.param_groups[0]["step"] = steps
    else:
        optimizer.state[master]["step"] = steps


CHUNK = 1 << 22  # elements of a sum on the CPU: converted to float64 at a time


def sum_of_squares(x: Tensor) -> Tensor:
    """Of all elements, without dimensions: in float64 on the CPU, where torch's float32 sums lose 4e-3 of the norm of 50
    million elements; in float32 on a GPU, which adds up in a tree."""
    if x.device.type != "cpu":
        return torch.linalg.vector_norm(x, dtype=torch.float32).square()
    parts = [part.double().square().sum() for part in x.detach().view(-1).split(CHUNK)]
    return torch.stack(parts).sum() if parts else torch.zeros((), dtype=torch.float64)


def residency(config: Config, world_size: int) -> Policy:
    """As configured; on one process weights are whole at no cost."""
    return "whole" if world_size == 1 else config.engine.residency


def fuse(module: nn.Module, config: ModelConfig, device: torch.device) -> FusionReport | None:
    """The transformer's blocks with fused operations, in place, where they are wanted; None where not."""
    if not config.fuse or device.type not in FUSED_ON or why_not("triton", device.type, device.index):
        return None
    return fuse_transformer(module, fp8=None if config.fp8 == "off" else config.fp8, verbose=False)


class Recomputation:
    """Activation checkpointing of blocks, inside their hooks, so that their weights are whole when they run again.

    keep: how many block passes of each forward chain, the first ones, keep their activations all the same.
    remember: makes of a block's forward one that runs again as it ran, where that depends on more than its arguments.
    """

    @classmethod
    def of(cls, blocks: list[nn.Module], how: str, remember: Callable | None = None) -> Recomputation | None:
        """As engine.checkpointing has it."""
        return None if how == "none" else cls(blocks, how, remember)

    def __init__(self, blocks: list[nn.Module], how: str, remember: Callable[[Callable], Callable] | None = None):
        self.keep = 0
        self._passes = 0  # of the chain that is under way
        for block in blocks:
            self._wrap(block, how, remember or (lambda forward: forward))

    def end_of_chain(self) -> None:
        self._passes = 0

    def _wrap(self, block: nn.Module, how: str, remember: Callable[[Callable], Callable]) -> None:
        forward = block.forward
        parameters = [parameter for parameter in block.parameters() if parameter.requires_grad]

        def checkpointed(*args, **kwargs):
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            self._passes += 1
            if self._passes <= self.keep:
                return forward(*args, **kwargs)
            if how == "full":
                return checkpoint(remember(forward), *args, use_reentrant=False, **kwargs)
            return selective_checkpoint(remember(forward), *args, parameters=parameters, **kwargs)

        block.forward = checkpointed


def deepspeed_settings(config: Config, role: str, dtype: torch.dtype, world_size: int) -> dict[str, Any]:
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
        # Reducing is done in residency.py: there is one flat shard, and no bucket.
        settings["zero_optimization"] |= {"sub_group_size": 10**15, "contiguous_gradients": False}
    if engine.accumulation > 1:
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    if role != "teacher" and engine.offload != "none":
        pinned = resolve_device(engine.device) == "cuda"
        offload = {"device": engine.offload, "pin_memory": pinned}
        if engine.offload == "nvme":
            offload |= {"nvme_path": str(_swap_folder(config, role)), "fast_init": True}
        settings["zero_optimization"]["offload_optimizer"] = offload
        settings["zero_force_ds_cpu_optimizer"] = False  # torch's fused AdamW updates on the CPU as well
    if role != "teacher" and engine.deepspeed is not None:
        settings = merged(settings, engine.deepspeed)
    return settings


def learning_rate(config: OptimizerConfig, updates: int, total: int) -> float:
    """The rate of the update that follows `updates` applied ones, of `total` in the run."""
    share = min(1.0, (updates + 1) / max(1, config.warmup))
    if config.decay == "cosine":
        share *= 0.5 * (1.0 + math.cos(math.pi * min(1.0, updates / total)))
    return config.lr * share


def build_optimizer(
    parameters, config: OptimizerConfig, device: str, *, seed: int = 0, offload: str = "none"
) -> torch.optim.Optimizer:
    """AdamW: the one that is named; auto is our own. seed: of stochastic rounding.

    offload: "cpu" or "nvme" where the state lives there, and torch's updates it on the CPU.

    Raises ConfigError when the named one cannot be had here, saying why.
    """
    arguments = {"lr": config.lr, "betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay}
    if offload == "none" and config.name in ("auto", "fused"):
        return AdamW(parameters, **arguments, state_dtype=config.state, seed=seed)
    if config.name in _FUSED:
        try:
            with compiling("fused_adam", "DeepSpeed's FusedAdam"):
                return _fused_adam(config.name, device)(parameters, adam_w_mode=True, **arguments)
        except ConfigError:
            raise
        except (
            Exception
        ) as error:  # building DeepSpeed's can fail in many ways: no compiler, another CUDA, a read-only cache
            raise _unusable(config.name, error) from error
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
