"""Teacher, student and critic at work: one class for each way in which a role is kept and updated.

    Teacher        frozen: in every process, in pieces (ZeRO stage 3), or the base that all roles share
    Sharded        trained, in pieces; gradients are reduced, clipped and applied here
    ByDeepSpeed    trained, in pieces; DeepSpeed's own stages reduce and apply (offload, other optimizers)

`make` chooses. Whether a role runs a transformer of its own or an adapter on a shared one is its body's (body.py).
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
from dpdmd.engine.residency import Residency, Traffic, Weights
from dpdmd.engine.shards import Layout
from dpdmd.engine.step import Step
from dpdmd.engine.world import World
from dpdmd.files import is_finite
from dpdmd.kernels import Philox, requantize

_GATHERED = {"whole": "kept whole", "phase": "gathered for each phase", "block": "gathered block by block"}


class Phases:
    """Which role is at work. One whose weights are gathered for a phase gives them back when another one's turn comes.

    pool: of memory for CUDA graphs, which the roles take turns to use; None without a GPU.
    """

    def __init__(self):
        self._current: Role | None = None
        self.pool = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None

    def enter(self, role: Role) -> None:
        previous, self._current = self._current, role
        if previous is not None and previous is not role and not previous.differentiating:
            previous.end_of_phase()

    def end(self) -> None:
        """The update is over."""
        if self._current is not None:
            self._current.end_of_phase()
        self._current = None


def make(
    name: str, module: nn.Module | Base, backbone, config: Config, world: World, phases: Phases, residency: Residency
) -> Role:
    """The role `name`: teacher, student or critic.

    module: the transformer, in the dtype it is to compute in, or the Base that the roles share. The backbone's `predict`
    calls it: predict(module, x, t, cond, dtype).
    """
    trained = name != "teacher"
    body = OnBase(module, name) if isinstance(module, Base) else Own(module, backbone, config, world, trained=trained)
    kind = Teacher if not trained else Sharded if residency.reduced else ByDeepSpeed
    return kind(name, body, backbone, config, world, phases, residency)


class Role(ABC):
    """Call it as (x, t, cond) -> prediction, as distill.py expects."""

    trained = False

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
        self.differentiating = False  # a forward pass with a graph has run whose backward pass is to come
        self._body = body
        self._phases = phases
        self._predict = partial(backbone.predict, body.network, dtype=body.dtype)
        self._replay: Replay | None = None  # of passes without gradient
        if residency.replayed and world.device.type == "cuda":
            self._replay = Replay(self._predict, phases.pool)
        self._weights: Any = None  # Weights that this role gathers; None: a copy in every process, or the base's
        self._take_over(config, world)

    @abstractmethod
    def _take_over(self, config: Config, world: World) -> None:
        """Brings the weights where they are to be."""

    @property
    def module(self) -> nn.Module:
        """What is sharded: the transformer, or the role's adapter."""
        return self._body.module

    @property
    def num_parameters(self) -> int:
        """Of the whole network, however little of it this process holds; of the role's adapter under LoRA."""
        return sum(map(deepspeed.whole_size, self._body.parameters()))

    @property
    @abstractmethod
    def traffic(self) -> Traffic | None:
        """What gathering and reducing has cost so far; None where every process has a copy."""

    @abstractmethod
    def describe(self) -> str:
        """For the log: size, precision, ZeRO stage, optimizer; and what is fused, with what is not and why."""

    def __call__(self, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        self._phases.enter(self)
        if self._weights is not None:
            self._weights.gather()
        self._body.enter()
        predict = self._predict if torch.is_grad_enabled() or self._replay is None else self._replay
        return predict(x, t, cond)

    def _gathered(self, world: World, flat: Tensor | None = None, *, float8: bool = False) -> Weights:
        """The weights, once they are cut up, as the residency has them."""
        parameters = list(self.module.parameters())
        return Weights(parameters, self._body.blocks, self.residency.policy, world.size, flat, float8=float8)

    def end_of_phase(self) -> None:
        """Gives the weights back, where they are not to stay."""
        if self._weights is not None:
            self._weights.end_of_phase()

    def _described(self, what: str, weights: Weights | None) -> str:
        adapter = "adapter of " if self.trained and self.base is not None else ""
        dtype = str(self._body.dtype).removeprefix("torch.")
        line = f"{self.name}: {adapter}{self.num_parameters / 1e6:.1f} M parameters, {dtype}, {what}"
        if weights is not None:
            line += f", sharded (ZeRO stage 3), {_GATHERED[weights.policy]}"
        return line if self.fusion is None else f"{line}; {self.fusion}"


class Teacher(Role):
    """Frozen. On a shared base its weights are the base's, which all roles gather."""

    def _take_over(self, config: Config, world: World) -> None:
        if self.base is not None:
            return
        if not self.residency.sharded:
            self.module.to(world.device).eval()
            return
        deepspeed.cut_up(self.module, deepspeed.settings_of(config, self.name, self._body.dtype, world.size))
        self._weights = self._gathered(world, float8=self.residency.float8)

    @property
    def traffic(self) -> Traffic | None:
        weights = self._weights if self.base is None else self.base.weights
        return None if weights is None else weights.traffic

    def describe(self) -> str:
        return self._described("frozen", self._weights)


class Trained(Role):
    """`backward` for each micro-batch, then `step`, which clips, applies the optimizer, or skips an update that is not
    finite. The subclasses say who reduces and applies.

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
        self._micro_batches = 0  # differentiated for the update that is under way
        self._updates = 0
        self._unsettled: Step | None = None
        self.module.to(world.device)
        optimizer = build_optimizer(
            list(self.module.parameters()),  # not what the first kind that fails to build would use up
            self._optimizer_config,
            world.device.type,
            seed=Philox.of(config.run.seed, name, world.rank).key,
            offload=config.engine.offload,
        )
        settings = deepspeed.settings_of(config, name, self._body.dtype, world.size)
        reduces = not self.residency.reduced
        self._partition = deepspeed.Partition(self.module, optimizer, settings, reduces=reduces)
        self.swaps = self._partition.swaps
        if self._partition.folder is not None:
            atexit.register(remove_swapped, self._partition.folder, swap_folder(config, name).parents[1])
            self._check_swapping()
        self._weights = self._gathered(world, self._partition.flat)
        self._begin()
        self.average: Average | None = None
        if name == "student" and config.ema is not None:
            device = "cpu" if config.ema.device == "cpu" else None
            self.average = Average(self._partition.masters, config.ema.decay, device)

    @abstractmethod
    def _begin(self) -> None:
        """What the kind needs once the weights are cut up."""

    @abstractmethod
    def _differentiate(self, loss: Tensor, more: bool) -> None:
        """Adds a micro-batch's gradient, reduced unless more is to come."""

    @abstractmethod
    def _between(self) -> None:
        """After a micro-batch that is not the update's last."""

    @abstractmethod
    def _update(self, lr: float) -> Tensor:
        """Applies the update unless it is not finite. Returns the gradient's norm before clipping, inf or NaN if so."""

    def _check_swapping(self) -> None:
        if not self._partition.swappable:
            raise ConfigError(
                f"engine.offload = nvme: DeepSpeed swaps no tensor below 1 MiB, but a process's part of the {self.name} is "
                f"cut into {', '.join(map(str, self._partition.sizes))} numbers; engine.offload=cpu would run, or another "
                "zero_optimization.sub_group_size in engine.deepspeed"
            )

    def __call__(self, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        if self._body.recomputation is not None:
            self._body.recomputation.keep = self._kept_passes
        prediction = super().__call__(x, t, cond)
        self.differentiating |= torch.is_grad_enabled()
        return prediction

    @property
    def traffic(self) -> Traffic:
        return self._weights.traffic

    def describe(self) -> str:
        return self._described(type(self._partition.optimizer).__name__, self._weights)

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
        self._differentiate(loss * torch.where(loss.isfinite(), 1.0, torch.nan), more)
        if self._body.recomputation is not None:
            self._body.recomputation.end_of_chain()
        if not more:
            self._micro_batches += 1
            self.differentiating = False
            self._weights.end_of_phase()

    def step(self) -> Step | None:
        """After each micro-batch: None until the last of an update, then what became of it."""
        if self._micro_batches < self._accumulation:
            self._between()
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
        """Learns what became of the last update: how many were applied decides rate and bias correction of the next."""
        if self._unsettled is not None:
            self._updates += self._unsettled.applied
            self._unsettled = None

    def release(self) -> None:
        """Gives the weights back, as DeepSpeed wants to find them when it saves or loads."""
        self._weights.release()

    # What a checkpoint keeps

    def layout(self) -> Layout:
        """How the parameters are cut up."""
        names = self._body.names()
        return Layout(
            self._world_size,
            tuple(
                tuple((names[each], deepspeed.whole_size(each)) for each in group)
                for group in self._partition.parameters
            ),
        )

    def state_groups(self) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """This process's part of masters, moments and average, a group after the other, as views where possible: to be
        copied before the next one is asked for."""
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
        """What `state_groups` gave after so many updates; read: the tensors of a group. All processes call."""
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
                    _restore(state, name, value, master.device)
        if self._replay is not None:
            self._replay.forget()
        self._forget_rounded()

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside the block the weights are their moving average, where there is one."""
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
        return sum(
            int(each.detach().view(kinds[each.itemsize]).sum(dtype=torch.int64)) for each in self._partition.weights
        )

    def is_finite(self) -> bool:
        """Whether this process's part of the weights holds no NaN and no infinity."""
        self.release()
        return all(is_finite(each) for each in self._partition.weights)

    def full_state_dict(self) -> dict[str, Tensor] | None:
        """Every weight, whole, on the CPU of the main process (None elsewhere); all processes must call."""
        self.release()
        state = {}
        main = dist.get_rank() == 0
        for name, value in self._body.tensors().items():
            # One tensor at a time: a network's full weights never stand on a device all at once.
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

    def _between(self) -> None:
        pass

    def _update(self, lr: float) -> Tensor:
        """One pass over this process's shard. Nothing is written where the norm is not finite, and the host need not
        know."""
        gradient, optimizer = self._gradients.flat, self._partition.optimizer
        squared = sum_of_squares(gradient)
        if self._world_size > 1:
            dist.all_reduce(squared)
        norm = squared.sqrt().float()
        scale = (self._clip / (norm + 1e-6)).clamp(max=1.0) if self._clip > 0 else None
        (master,), (weight,) = self._partition.masters, self._partition.weights
        optimizer.state[master]["step"] = self._updates  # it counts calls, those that were not applied too
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

    def _between(self) -> None:
        self._partition.engine.step()  # which counts

    def _update(self, lr: float) -> Tensor:
        self._partition.set_lr(lr)
        self.release()
        return self._partition.step()


def _number(value: int | float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.int64)


def _restore(state: dict[str, Any], name: str, value: Tensor, device: torch.device) -> None:
    """One entry of an optimizer's state, in the place of what there is."""
    now = state.get(name)
    if isinstance(now, Tensor) and now.shape == value.shape and now.dtype == value.dtype:
        now.copy_(value)
    else:
        state[name] = value.to(device, copy=True)
