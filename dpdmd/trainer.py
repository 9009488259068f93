"""The trainer: what an update of student or critic needs, the checks before a run, and how the networks are built."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dpdmd.backbones.base import Backbone
from dpdmd.command import RunStopped
from dpdmd.config import ROLES, TRAINED, Config, ConfigError
from dpdmd.distill import Distillation, Draws
from dpdmd.engine.body import Base
from dpdmd.engine.lora import largest_rank
from dpdmd.engine.role import Phases, make
from dpdmd.engine.start import check as check_engine
from dpdmd.engine.start import resolve_dtype
from dpdmd.engine.step import Later, Step
from dpdmd.engine.world import World
from dpdmd.evaluation.protocol import Evaluation, check_evaluation, find_evaluation
from dpdmd.evaluation.report import sample_prompts
from dpdmd.planner.plan import Plan
from dpdmd.planner.residency import residencies
from dpdmd.planner.search import gpu_bytes, resolve
from dpdmd.run.checkpoint import Checkpoints
from dpdmd.run.embeddings import Conditioner, make_conditioner
from dpdmd.run.folder import check_place
from dpdmd.run.journal import check_writers
from dpdmd.run.progress import EncodingProgress
from dpdmd.run.prompts import PromptOrder, digest_of, read_prompts


class Update:
    """An update that the device is still computing; reading its numbers waits for it."""

    def __init__(self, role: str, iteration: int, step: Step, names: list[str], values: torch.Tensor):
        self.role, self.iteration = role, iteration
        self._step, self._names, self._values = step, names, Later(values)

    @property
    def applied(self) -> bool:
        return self._step.applied

    @property
    def requests(self) -> tuple[bool, bool]:
        """Whether any process was asked to end, and whether any failed to write a checkpoint; equal on all processes."""
        stop, failed = self._values.read().tolist()[-2:]
        return stop > 0, failed > 0

    def numbers(self) -> dict[str, float]:
        """Loss and its parts, averaged over the processes; gradient norm and learning rate."""
        means = dict(zip(self._names, self._values.read().tolist()[:-2], strict=True))
        return {**means, "gradient_norm": self._step.gradient_norm, "lr": self._step.lr}


@dataclass
class Trainer:
    """Everything that an update needs, and the two updates."""

    config: Config
    world: World
    backbone: Backbone
    distillation: Distillation
    networks: dict[str, Any]  # each role's Role; student and critic are Trained
    prompts: list[str]
    conditioner: Conditioner
    phases: Phases
    evaluation: Evaluation | None = None  # of the world that the run is measured in
    requested: Callable[[], tuple[bool, bool]] = lambda: (False, False)  # this process's `Update.requests`
    skipped: dict[str, list[int]] = field(default_factory=lambda: {role: [] for role in TRAINED})  # their iterations
    skipped_in_a_row: dict[str, int] = field(default_factory=lambda: dict.fromkeys(TRAINED, 0))
    outcomes: list[tuple[str, int, bool]] = field(default_factory=list)  # role, iteration, applied: not yet looked at
    initial_bits: int | None = None  # of the student's weights
    attention_times: dict | None = None  # by which all processes choose attention's kernels
    stop_requested: bool = False
    writing_failed: bool = False
    order: PromptOrder = field(init=False)
    _unsettled: Update | None = field(init=False, default=None)

    def __post_init__(self):
        self.order = PromptOrder(len(self.prompts), self.config.run.seed)

    def update(self, role: str, iteration: int) -> Update:
        """Queues one update of student or critic on the device: `accumulation` micro-batches and the optimizer step.
        The host runs one update ahead: it waits for the previous one."""
        network, accumulation = self.networks[role], self.config.engine.accumulation
        totals: dict[str, torch.Tensor] = {}
        step: Any = None
        for micro_batch in range(accumulation):
            loss, numbers = self.loss(role, iteration, micro_batch * self.world.size + self.world.rank)
            network.backward(loss)
            step = network.step()
            for name, value in numbers.items():
                totals[name] = totals.get(name, 0.0) + value.float() / accumulation
        self.phases.end()
        self.settle()
        values = torch.stack([*totals.values()])
        requests = [values.new_full((), float(request)) for request in self.requested()]
        values = self.world.mean(torch.cat([values, torch.stack(requests)]))
        self._unsettled = Update(role, iteration, step, list(totals), values)
        self.conditioner.prefetch(self.prompts_of_batch(iteration + 1, self.world.rank))
        return self._unsettled

    def loss(self, role: str, iteration: int, shard: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The part of a micro-batch's loss that still needs a backward pass, and the numbers to log. shard: the
        micro-batch's place in the iteration's global batch."""
        batch_size = self.config.engine.batch_size
        cond = self.conditioner.cond(self.prompts_of_batch(iteration, shard))
        draws = Draws(self.config.run.seed, iteration, role, shard, self.world.device)
        noise = draws.noise((batch_size, *self.backbone.latent_shape))
        student, critic = self.networks["student"], self.networks["critic"]
        if role == "critic":
            loss = self.distillation.critic_loss(critic, student, noise, cond, draws)
            return loss, {"loss": loss.detach()}
        uncond = self.conditioner.uncond(batch_size)
        first_part = partial(student.backward, more=True) if student.differentiates_in_parts else None
        losses = self.distillation.student_loss(
            student, self.networks["teacher"], critic, noise, cond, uncond, draws, first_part
        )
        return losses.remaining, {"loss": losses.total, "dmd": losses.dmd, "diversity": losses.diversity}

    def prompts_of_batch(self, iteration: int, shard: int) -> list[str]:
        """The prompts of one micro-batch."""
        num_shards = self.world.size * self.config.engine.accumulation
        indices = self.order.indices(iteration, shard, num_shards, self.config.engine.batch_size)
        return [self.prompts[index] for index in indices]

    def settle(self) -> None:
        """Waits for the queued update and records its outcome."""
        update, self._unsettled = self._unsettled, None
        if update is None:
            return
        role = update.role
        if update.applied:
            self.skipped_in_a_row[role] = 0
        else:
            self.skipped[role].append(update.iteration)
            self.skipped_in_a_row[role] += 1
        self.outcomes.append((role, update.iteration, update.applied))
        stop, failed = update.requests
        self.stop_requested |= stop
        self.writing_failed |= failed

    @property
    def num_skipped(self) -> int:
        return sum(map(len, self.skipped.values()))

    def stop_if_broken(self, checkpoints: Checkpoints) -> None:
        """Raises RunStopped if `run.max_bad_updates` updates of one role in a row were not finite."""
        for role, in_a_row in self.skipped_in_a_row.items():
            if in_a_row >= self.config.run.max_bad_updates:
                good = checkpoints.give_up()
                raise RunStopped(
                    f"{in_a_row} updates of the {role} in a row were not finite (the last was number "
                    f"{self.skipped[role][-1] + 1}); the last good checkpoint is {good or 'none'}. {self.describe_skipped()}"
                )

    def skipped_prompts(self) -> dict[int, list[str]]:
        """The prompts, of all processes, in each skipped update; by iteration."""
        shards = range(self.world.size * self.config.engine.accumulation)
        return {
            each: [prompt for shard in shards for prompt in self.prompts_of_batch(each, shard)]
            for iterations in self.skipped.values()
            for each in iterations
        }

    def describe_skipped(self, most: int = 5) -> str:
        """The number of updates that were not finite, and the prompts in them, most frequent first."""
        counts = ", ".join(
            f"{len(self.skipped[role])} of the {role}'s {self.networks[role].updates + len(self.skipped[role])}"
            for role in TRAINED
        )
        prompts = Counter(prompt for texts in self.skipped_prompts().values() for prompt in set(texts))
        shown = ", ".join(f"{prompt[:60]!r} ({count})" for prompt, count in prompts.most_common(most))
        more = f" and {len(prompts) - most} more" if len(prompts) > most else ""
        return f"skipped as not finite: {counts} updates" + (f"; prompts in them: {shown}{more}" if prompts else "")

    def summary(self, iterations: int) -> dict:
        """Counts of updates, and the bytes that this process received from gathers and reductions of ZeRO stage 3 in
        the last `iterations` updates."""
        state = self.state()
        summary = {"updates": state["updates"], "skipped": state["skipped"]}
        if self.num_skipped:
            prompts = sorted(self.skipped_prompts().items())
            summary["skipped_prompts"] = {str(iteration + 1): texts for iteration, texts in prompts}
        traffic = [network.traffic for network in self.networks.values() if network.traffic is not None]
        if received := sum(each.gathered_bytes + each.reduced_bytes for each in traffic):
            cycles = iterations / (self.config.distill.critic_updates + 1)
            summary["received_bytes_a_cycle"] = received / max(cycles, 1)
        return summary

    def state(self) -> dict:
        """The part of a checkpoint beside weights and optimizer state."""
        self.settle()
        return {
            "updates": {role: self.networks[role].updates for role in TRAINED},
            "skipped": {role: list(iterations) for role, iterations in self.skipped.items()},
            "skipped_in_a_row": dict(self.skipped_in_a_row),
            "attention_times": self.attention_times,
            "prompts": digest_of(self.prompts),
            "text": self.backbone.text_key,
        }

    def restore(self, state: dict) -> None:
        """Takes back what `state` returned."""
        self.skipped = {role: list(iterations) for role, iterations in state["skipped"].items()}
        self.skipped_in_a_row = dict(state["skipped_in_a_row"])

    def close(self) -> None:
        """Ends the threads that run beside the updates."""
        self.conditioner.close()


def role_of(iteration: int, critic_updates: int) -> str:
    """Each student update follows `critic_updates` critic updates."""
    return "student" if (iteration + 1) % (critic_updates + 1) == 0 else "critic"


def updates_before(iteration: int, critic_updates: int) -> int:
    """Number of earlier updates of the iteration's own role."""
    students = iteration // (critic_updates + 1)
    return students if role_of(iteration, critic_updates) == "student" else iteration - students


def load_prompts(config: Config) -> list[str]:
    """Reads prompts.file, or the world's own prompts. Raises ConfigError if there are none."""
    if config.prompts.file is not None:
        return read_prompts(config.prompts.file, config.prompts.field)
    own = find_evaluation(config).prompts
    if own is None:
        raise ConfigError(
            f"prompts.file is not set, and evaluation.world = {config.world!r} has no prompts: name a file of prompts"
        )
    return read_prompts(own)


def check(config: Config, backbone) -> None:
    """Raises ConfigError for what cannot work, before processes meet and weights are read."""
    check_place(Path(config.run.output_dir), config.prompts.cache_dir)
    check_evaluation(config)
    check_engine(config)
    check_writers(config)
    try:
        Distillation(backbone.diffusion, config.distill)
    except ValueError as error:  # a time grid that the model's scheduler cannot walk
        raise ConfigError(str(error)) from error
    if config.lora is not None:
        most = largest_rank(backbone.empty_transformer("teacher"), config.lora.targets)
        if config.lora.rank > most:
            raise ConfigError(
                f"lora.rank = {config.lora.rank}: the adapted weights have a rank of at most {most}, so a larger adapter adds "
                f"nothing; {most} or less is needed"
            )


def plan_run(config: Config, backbone, world: World) -> tuple[Config, Plan]:
    """Replaces `auto` by what fits the smallest GPU, alike on every process. Raises ConfigError if nothing fits."""
    memory = min(world.gather(gpu_bytes())) if world.device.type == "cuda" else None
    return resolve(config, backbone, world.size, memory)


def build(config: Config, world: World, backbone, prompts: list[str]) -> Trainer:
    """Encodes the prompts, then loads the three networks. The caller closes the trainer."""
    backbone.check_weights()  # before the prompts are encoded, which takes long
    dtype = resolve_dtype(config.model.dtype, world.device.type)
    cache_dir = config.prompts.cache_dir or str(Path(config.run.output_dir) / "embeddings")
    evaluation = find_evaluation(config) if config.evaluation.enabled else None
    extra = sample_prompts(config, prompts) if config.run.sample_every else []
    with contextlib.closing(EncodingProgress()) as progress:
        conditioner = make_conditioner(
            backbone,
            config.prompts.model_copy(update={"cache_dir": cache_dir}),
            prompts,
            world.device,
            world.rank,
            world.size,
            world.barrier,
            extra_prompts=[*extra, *(evaluation.texts(config.evaluation) if evaluation else [])],
            dtype=dtype,
            progress=progress if world.main else None,
        )
    with contextlib.ExitStack() as opened:
        opened.callback(conditioner.close)
        networks, phases = {}, Phases()
        decided = residencies(config, world.size)
        load_to = world.device if config.model.random_init else "cpu"
        base = None
        if config.lora is not None:
            base = Base(backbone.load_transformer("teacher", dtype, load_to), backbone, config, world)
        for role in ROLES:
            module = base or backbone.load_transformer(role, dtype, load_to)
            networks[role] = make(role, module, backbone, config, world, phases, decided[role])
        if base is not None:
            base.shard(config, world, decided["teacher"])
        if world.main and not config.model.random_init and (config.run.sample_every or evaluation):
            backbone.load_decoder("cpu")  # refuses a broken VAE now: pictures are drawn much later
        distillation = Distillation(backbone.diffusion, config.distill, world.device)
        opened.pop_all()
    return Trainer(config, world, backbone, distillation, networks, prompts, conditioner, phases, evaluation)
