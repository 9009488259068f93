"""Teacher, student and critic at work: one class for each way in which a role is kept and updated.

    Teacher        frozen: in every process, sharded (ZeRO stage 3), or the base that all roles share
    Sharded        trained, sharded; gradients are reduced, clipped and applied here
    ByDeepSpeed    trained, sharded; DeepSpeed's own stages reduce and apply (offload, other optimizers)

`make` chooses. A role's body (body.py) is a transformer of its own or an adapter on a shared one.
"""

from __future__ import annotations

import atexit
import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dpdmd.config import Config, ConfigError
from dpdmd.engine import deepspeed
from dpdmd.engine.averaging import Average
from dpdmd.engine.body import Base, OnBase, Own
from dpdmd.engine.gradients import Gradients, sum_of_squares
from dpdmd.engine.nvme import remove_swapped, swap_folder
from dpdmd.engine.optimizer import build_optimizer, learning_rate, restore_step
from dpdmd.engine.replay import Replay
from dpdmd.engine.residency import POLICIES, Residency, Traffic, Weights
from dpdmd.engine.shards import Layout
from dpdmd.engine.step import Step
from dpdmd.engine.world import World
from dpdmd.files import is_finite
from dpdmd.kernels import Philox, requantize


class Phases:
    """Which role is at work. Weights that are gathered for a phase are released when another role's turn comes.

    pool: memory for CUDA graphs, shared by the roles, which run one at a time; None without a GPU.
    """

    def __init__(self):
        self._current: Role | None = None
        self.pool = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None

    def enter(self, role: Role) -> None:
        previous, self._current = self._current, role
        if previous is not None and previous is not role and not previous.differentiating:
            previous.end_of_phase()

    def end(self) -> None:
        """Call at the end of an update."""
        if self._current is not None:
            self._current.end_of_phase()
        self._current = None


def make(
    name: str, module: nn.Module | Base, backbone, config: Config, world: World, phases: Phases, residency: Residency
) -> Role:
    """The role `name`: teacher, student or critic.

    module: the transformer, in the dtype of its computation, or the Base that the roles share. The backbone calls it:
    predict(module, x, t, cond, dtype).
    """
    trained = name != "teacher"
    body = OnBase(module, name) if isinstance(module, Base) else Own(module, backbone, config, world, trained=trained)
    kind = Teacher if not trained else Sharded if residency.reduced else ByDeepSpeed
    return kind(name, body, backbone, config, world, phases, residency)


class Role(ABC):
    """Call it as (x, t, cond) -> prediction, as distill.py expects."""

    trained = False
    _updated_by = "frozen"  # else the optimizer's name

    def __init__(
        self,
        name: str,
        body: Own | OnBase,
        backbone,
        config: Config,
        world: World,
        phases: Phases,
        residency: Residency,
    ):
        self.name, self.base, self.fusion = name, body.base, body.fusion
        self.residency = residency
        self.differentiating = False  # a forward pass with a graph has run, its backward pass has not
        self._body = body
        self._phases = phases
        self._predict = partial(backbone.predict, body.network, dtype=body.dtype)
        self._replay: Replay | None = None  # for passes without gradient
        if residency.replayed and world.device.type == "cuda":
            self._replay = Replay(self._predict, phases.pool)
        self._weights: Any = None  # Weights that this role gathers; None: whole in every process, or the base's
        self._take_over(config, world)

    @abstractmethod
    def _take_over(self, config: Config, world: World) -> None:
        """Moves the weights to the device, and shards them."""

    @property
    def module(self) -> nn.Module:
        """What is sharded: the transformer, or the role's adapter."""
        return self._body.module

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole network, sharded or not; under LoRA, of the role's adapter."""
        return sum(map(deepspeed.whole_size, self._body.parameters()))

    @property
    def traffic(self) -> Traffic | None:
        """Counts of gathers and reductions so far; None if every process has a copy."""
        weights = self._weights if self.trained or self.base is None else self.base.weights
        return None if weights is None else weights.traffic

    def describe(self) -> str:
        """For the log: size, precision, ZeRO stage, optimizer; which operations are fused, and why others are not."""
        adapter = "adapter of " if self.trained and self.base is not None else ""
        dtype = str(self._body.dtype).removeprefix("torch.")
        line = f"{self.name}: {adapter}{self.num_parameters / 1e6:.1f} M parameters, {dtype}, {self._updated_by}"
        if self._weights is not None:
            line += f", sharded (ZeRO stage 3), {POLICIES[self._weights.policy]}"
        return line if self.fusion is None else f"{line}; {self.fusion}"

    def __call__(self, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        self._phases.enter(self)
        if self._weights is not None:
            self._weights.gather()
        self._body.enter()
        predict = self._predict if torch.is_grad_enabled() or self._replay is None else self._replay
        return predict(x, t, cond)

    def _gathered(self, world: World, flat: Tensor | None = None, *, float8: bool = False) -> Weights:
        """The weights, after they are sharded, with the residency's policy."""
        parameters = list(self.module.parameters())
        return Weights(parameters, self._body.blocks, self.residency.policy, world.size, flat, float8=float8)

    def end_of_phase(self) -> None:
        """Releases the weights, unless they stay whole."""
        if self._weights is not None:
            self._weights.end_of_phase()


class Teacher(Role):
    """Frozen. On a shared base, all roles gather its weights."""

    def _take_over(self, config: Config, world: World) -> None:
        if self.base is not None:
            return
        if not self.residency.sharded:
            self.module.to(world.device).eval()
            return
        deepspeed.cut_up(self.module, deepspeed.settings_of(config, self.name, self._body.dtype, world.size))
        self._weights = self._gathered(world, float8=self.residency.float8)


class Trained(Role):
    """Call `backward` for each micro-batch, then `step`, which clips and applies the optimizer, or skips an update that is
    not finite. The subclasses define who reduces and applies.

    average: the moving average of the weights, or None. swaps: masters and moments are on a disk.
    """

    trained = True

    def _take_over(self, config: Config, world: World) -> None:
        name = self.name
        self.differentiates_in_parts = self.residency.in_parts  # whether `backward` is called with `more`
        self._world_size = world.size
        self._accumulation = config.engine.accumulation
        self._clip = config.engine.clip
        self._optimizer_config = config.optimizer(name)
        self._total_updates = config.num_updates(name)
        self._kept_passes = getattr(config.engine.kept_passes, name) or 0
        self._micro_batches = 0  # differentiated for the current update
        self._updates = 0
        self._unsettled: Step | None = None
        self.module.to(world.device)
        optimizer = build_optimizer(
            self.module.parameters(),
            self._optimizer_config,
            world.device.type,
            seed=Philox.of(config.run.seed, name, world.rank).key,
            offload=config.engine.offload,
        )
        settings = deepspeed.settings_of(config, name, self._body.dtype, world.size)
        self._partition = deepspeed.Partition(self.module, optimizer, settings, reduces=not self.residency.reduced)
        self._updated_by = type(self._partition.optimizer).__name__
        self.swaps = self._partition.folder is not None
        if self._partition.folder is not None:
            atexit.register(remove_swapped, self._partition.folder, swap_folder(config, name).parents[1])
            if not self._partition.swappable:
                raise ConfigError(
                    f"engine.offload = nvme: DeepSpeed swaps no tensor below 1 MiB, but a process's part of the {name} is cut "
                    f"into {', '.join(map(str, self._partition.sizes))} numbers; engine.offload=cpu would run, or another "
                    "zero_optimization.sub_group_size in engine.deepspeed"
                )
        self._weights = self._gathered(world, self._partition.flat)
        self._begin()
        self.average: Average | None = None
        if name == "student" and config.ema is not None:
            device = "cpu" if config.ema.device == "cpu" else None
            self.average = Average(self._partition.masters, config.ema.decay, device)

    @abstractmethod
    def _begin(self) -> None:
        """Prepares what the subclass needs, after the weights are sharded."""

    @abstractmethod
    def _differentiate(self, loss: Tensor, more: bool) -> None:
        """Adds a micro-batch's gradient, reduced unless more is to come."""

    @abstractmethod
    def _update(self, lr: float) -> Tensor:
        """Applies the update if it is finite. Returns the gradient's norm before clipping; inf or NaN if it is not."""

    def __call__(self, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        if self._body.recomputation is not None:
            self._body.recomputation.keep = self._kept_passes
        prediction = super().__call__(x, t, cond)
        self.differentiating |= torch.is_grad_enabled()
        return prediction

    @property
    def updates(self) -> int:
        """Applied updates. Waits for the outcome of the last."""
        self.settle()
        return self._updates

    def backward(self, loss: Tensor, *, more: bool = False) -> None:
        """Adds one micro-batch's gradient. A loss that is not finite makes the gradient NaN on every process.

        more: another backward pass of the same micro-batch follows; gradients are reduced after it.
        """
        self._phases.enter(self)
        self._differentiate(loss * torch.where(loss.isfinite(), 1.0, torch.nan), more)
        if self._body.recomputation is not None:
            self._body.recomputation.end_of_chain()
        if not more:
            self._micro_batches += 1
            self.differentiating = False
            self._weights.end_of_phase()

    def step(self) -> Step | None:
        """Call after each micro-batch: None until an update's last, then the update's outcome."""
        if self._micro_batches < self._accumulation:
            return None
        self.settle()
        self._micro_batches = 0
        lr = learning_rate(self._optimizer_config, self._updates, self._total_updates)
        norm = self._update(lr)
        self._weights.changed()
        self._forget_rounded()
        if self.average is not None:
            self.average.update(norm.isfinite())
        self._unsettled = Step(lr, norm)
        return self._unsettled

    def settle(self) -> None:
        """Counts the last update if it was applied: the count decides the next one's rate and bias correction."""
        if self._unsettled is not None:
            self._updates += self._unsettled.applied
            self._unsettled = None

    def release(self) -> None:
        """Releases all gathered weights."""
        self._weights.release()

    def layout(self) -> Layout:
        """How the parameters are sharded."""
        names = {value: name for name, value in reversed(self._body.tensors().items())}  # of tied ones the first
        groups = self._partition.parameters
        sizes = tuple(tuple((names[each], deepspeed.whole_size(each)) for each in group) for group in groups)
        return Layout(self._world_size, sizes)

    def state_groups(self) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """This process's part of masters, moments and average, group by group, as views where possible: copy them before
        asking for the next group."""
        self.release()
        optimizer = self._partition.optimizer
        for group, master in enumerate(self._partition.masters):
            with self._partition.swapped_in(group):
                tensors = {"master": master.detach()}
                for name, value in optimizer.state.get(master, {}).items():
                    tensors[name] = value.detach() if isinstance(value, Tensor) else _number(value)
                if "step" in optimizer.param_groups[0]:  # apex counts there
                    tensors["step"] = _number(optimizer.param_groups[0]["step"])
                if self.average is not None:
                    tensors["average"] = self.average.shards[group]
                yield group, tensors

    @torch.no_grad()
    def load(self, updates: int, read: Callable[[int], dict[str, Tensor]]) -> None:
        """Restores what `state_groups` gave after `updates` updates; read(group) returns its tensors. All processes call."""
        self.release()
        self._updates = updates
        optimizer = self._partition.optimizer
        for group, master in enumerate(self._partition.masters):
            tensors = read(group)
            with self._partition.swapped_in(group):
                master.data.copy_(tensors.pop("master"))
                if self.average is not None:
                    self.average.shards[group].copy_(tensors.pop("average"))
                weight = self._partition.weights[group]
                if weight.data_ptr() != master.data_ptr():
                    weight.copy_(master)
                if "step" in tensors:
                    restore_step(optimizer, master, int(tensors.pop("step")))
                state = optimizer.state[master]
                for name, value in tensors.items():
                    now = state.get(name)
                    if isinstance(now, Tensor) and now.shape == value.shape and now.dtype == value.dtype:
                        now.copy_(value)
                    else:
                        state[name] = value.to(master.device, copy=True)
        if self._replay is not None:
            self._replay.forget()
        self._forget_rounded()

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside the block the weights are their moving average, if there is one."""
        if self.average is None:
            yield
            return
        self.release()
        with self.average.in_place_of(self._partition.weights):
            self._forget_rounded()
            yield
            self.release()
        self._forget_rounded()

    def _forget_rounded(self) -> None:
        """Marks FP8 copies as out of date: writes to the shards do not change the parameters' versions."""
        if self.fusion is not None and self.fusion.num_fp8 and self.base is None:
            requantize(self.module)
            if self._replay is not None:
                self._replay.run_next()

    def bits(self) -> int:
        """Sum of the bits of this process's weights, read as integers: it shows whether any has changed."""
        self.release()
        kinds = {2: torch.int16, 4: torch.int32}
        return sum(
            int(each.detach().view(kinds[each.itemsize]).sum(dtype=torch.int64)) for each in self._partition.weights
        )

    def is_finite(self) -> bool:
        """Whether this process's part of the weights has no NaN or infinity."""
        self.release()
        return all(is_finite(each) for each in self._partition.weights)

    def full_state_dict(self) -> dict[str, Tensor] | None:
        """Every weight, whole, on the CPU of the main process (None elsewhere). All processes must call."""
        self.release()
        state = {}
        main = dist.get_rank() == 0
        for name, value in self._body.tensors().items():
            # One tensor at a time: the full weights never need to fit on a device.
            with deepspeed.gathered([value] if isinstance(value, nn.Parameter) else []):
                if main:
                    state[name] = value.detach().to("cpu", copy=True)
        return state if main else None


class Sharded(Trained):
    """Gradients are reduced block by block during the backward pass; one pass over the shard applies the update."""

    def _begin(self) -> None:
        assert len(self._partition.masters) == 1, "one flat shard is needed"
        weights = self._weights
        weights.gather()
        self._gradients = Gradients(weights.units, self._partition.free_gradients(), self._world_size, weights.traffic)
        weights.end_of_phase()
        with self._partition.masters_in_optimizer():
            self._partition.optimizer.create_state(self._partition.masters[0])

    def _differentiate(self, loss: Tensor, more: bool) -> None:
        self._gradients.held = more
        (loss / self._accumulation).backward()
        if not more:
            self._gradients.finish()

    def _update(self, lr: float) -> Tensor:
        """One pass over this process's shard, which writes nothing if the norm is not finite; the host does not wait."""
        gradient, optimizer = self._gradients.flat, self._partition.optimizer
        squared = sum_of_squares(gradient)
        if self._world_size > 1:
            dist.all_reduce(squared)
        norm = squared.sqrt().float()
        scale = (self._clip / (norm + 1e-6)).clamp(max=1.0) if self._clip > 0 else None
        (master,), (weight,) = self._partition.masters, self._partition.weights
        optimizer.state[master]["step"] = self._updates  # it also counts calls that were not applied
        self._partition.set_lr(lr)
        with self._partition.masters_in_optimizer():
            optimizer.update(
                master,
                gradient,
                weight=None if weight.data_ptr() == master.data_ptr() else weight,
                scale=scale,
                apply=norm.isfinite(),
            )
        self._gradients.clear()
        return norm


class ByDeepSpeed(Trained):
    """DeepSpeed reduces after each backward pass, clips and applies."""

    def _begin(self) -> None:
        pass

    def _differentiate(self, loss: Tensor, more: bool) -> None:
        assert not more, "DeepSpeed reduces after each backward pass"
        self._partition.backward(loss)

    def step(self) -> Step | None:
        if self._micro_batches < self._accumulation:
            self._partition.engine.step()  # counts the micro-batch
        return super().step()

    def _update(self, lr: float) -> Tensor:
        self._partition.set_lr(lr)
        self.release()
        return self._partition.step()


def _number(value: int | float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.int64)
