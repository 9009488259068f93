"""The choice of `auto`, other settings that fit, and the recommendation.

Training calls `resolve`: it replaces `auto` by the fastest that fits, and refuses what cannot fit.
"""

from __future__ import annotations

import bisect
import itertools
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from dpdmd.config import (
    LARGEST_SIZE,
    TRAINED,
    Config,
    ConfigError,
    KeptPassesConfig,
    LoraConfig,
    merged,
    parse_config,
    read_overrides,
)
from dpdmd.engine.optimizer import STATE_BYTES
from dpdmd.engine.residency import POLICIES
from dpdmd.planner.cycle import block_passes
from dpdmd.planner.footprint import CHECKPOINTING, Footprints
from dpdmd.planner.memory import Memory
from dpdmd.planner.plan import Plan, gib, plan_of
from dpdmd.planner.residency import residencies

ALIKE = 0.015  # estimates that differ by less count as equal: the simpler setting is taken
WORTH = 0.05  # a change of settings is recommended only if it is faster by more


class Planner:
    """Plans configurations that share model and method; they share the measured footprints."""

    def __init__(self, footprints: Footprints, num_gpus: int, gpu_memory: float):
        self.footprints, self.num_gpus, self.gpu_memory = footprints, num_gpus, gpu_memory

    @property
    def policies(self) -> list[str]:
        """The values of engine.residency to choose from."""
        return list(POLICIES) if self.num_gpus > 1 else ["whole"]

    def with_gpus(self, num_gpus: int) -> Planner:
        return Planner(self.footprints, num_gpus, self.gpu_memory)

    def plan(self, config: Config) -> Plan:
        """The plan of a configuration without `auto`."""
        return plan_of(config, self.footprints, self.num_gpus, self.gpu_memory)

    def resolve(self, config: Config) -> Plan:
        """The fastest choice of `auto` that fits; if none fits, the one that needs least memory."""
        engine = config.engine
        policies = self.policies if engine.residency == "auto" else [engine.residency]
        ways = list(CHECKPOINTING) if engine.checkpointing == "auto" else [engine.checkpointing]
        if not config.model.fuse and engine.checkpointing == "auto":
            ways.remove("selective")  # without fusion it is the same as full
        plans = []
        for policy, how in itertools.product(policies, ways):
            settled = with_engine(config, residency=policy, checkpointing=how)
            plans.append(self.plan(self._with_kept_passes(settled)))
        fitting = [plan for plan in plans if plan.fits]
        if fitting:
            shortest = min(plan.cycle for plan in fitting)
            return next(plan for plan in fitting if plan.cycle <= (1 + ALIKE) * shortest)
        return min(plans, key=lambda plan: plan.needed)

    def _with_kept_passes(self, config: Config) -> Config:
        """Replaces null by the largest number with which the role's updates fit, else 0. Student and critic updates never
        overlap."""
        in_parts = residencies(config, self.num_gpus)["student"].in_parts
        for role in reversed(TRAINED):
            if getattr(config.engine.kept_passes, role) is None:
                most = block_passes(config, self.footprints, role, in_parts)
                if config.engine.checkpointing != "none":
                    most = _largest(partial(self._fits_with, config, role), most)
                config = _with_kept(config, role, most)
        return config

    def _fits_with(self, config: Config, role: str, kept: int) -> bool:
        memory = Memory(_with_kept(config, role, kept), self.footprints, self.num_gpus)
        phases = memory.critic_phases() if role == "critic" else memory.student_phases()
        return max(phase.total for phase in phases) <= self.gpu_memory


def _with_kept(config: Config, role: str, number: int) -> Config:
    return with_engine(config, kept_passes=config.engine.kept_passes.model_copy(update={role: number}))


def _largest(fits, most: int) -> int:
    """The largest number up to `most` that fits, or 0. Assumes that all smaller numbers fit too."""
    return most if fits(most) else bisect.bisect_left(range(1, most), True, key=lambda number: not fits(number))


def with_engine(config: Config, **engine: Any) -> Config:
    return config.model_copy(update={"engine": config.engine.model_copy(update=engine)})


def resolve(config: Config, backbone, num_gpus: int, gpu_memory: float | None) -> tuple[Config, Plan]:
    """`config` with engine.residency, engine.checkpointing and engine.kept_passes decided, and its plan.

    gpu_memory: bytes of the smallest GPU; None without GPUs: then weights are gathered by phase, activations are kept, and
    memory is not checked. Raises ConfigError for what cannot fit, naming the cheapest changes that would.
    """
    if gpu_memory is None:
        engine, kept = config.engine, config.engine.kept_passes
        settled = with_engine(
            config,
            residency=("phase" if num_gpus > 1 else "whole") if engine.residency == "auto" else engine.residency,
            checkpointing="none" if engine.checkpointing == "auto" else engine.checkpointing,
            kept_passes=KeptPassesConfig(student=kept.student or 0, critic=kept.critic or 0),
        )
        return settled, Plan(settled, num_gpus, None)
    planner = Planner(Footprints(backbone), num_gpus, gpu_memory)
    plan = planner.resolve(config)
    if not plan.possible:
        raise ConfigError(refusal(config, plan, planner))
    return plan.config, plan


def refusal(config: Config, plan: Plan, planner: Planner) -> str:
    """The message for what does not fit, with the cheapest changes that would."""
    gpus = f"{plan.num_gpus} GPU{'s' if plan.num_gpus > 1 else ''}"
    text = (
        f"this needs {gib(plan.needed)} GiB a GPU ({plan.fullest.name}, with {plan.choice}), and there are {gpus} of "
        f"{gib(planner.gpu_memory)} GiB"
    )
    fitting = [each for each in alternatives(config, planner) if each.plan.fits]
    if fitting:
        fewest = min(each.moves for each in fitting)
        cheapest = [each for each in fitting if each.moves == fewest][:3]
        named = [f"{' '.join(each.changes)} would fit ({gib(each.plan.needed)} GiB)" for each in cheapest]
        return f"{text}; {', or '.join(named)}"
    for factor in (2, 4, 8, 16, 32, 64):
        if planner.with_gpus(factor * plan.num_gpus).resolve(config).fits:
            return f"{text}; {factor * plan.num_gpus} such GPUs would do"
    return f"{text}; no change known here would fit, nor 64 times as many GPUs: a smaller model is needed"


@dataclass(frozen=True)
class Alternative:
    """changes: settings, as for the command line, made in `moves` moves; a move may take two settings."""

    changes: tuple[str, ...]
    moves: int
    plan: Plan


def alternatives(config: Config, planner: Planner) -> list[Alternative]:
    """Other settings: auto for fixed residency and checkpointing, accumulation of smaller batches, smaller moments, offload,
    a teacher in FP8, and adapters. Sorted: those that fit first, then those that train the whole network, then the fastest."""
    engine = config.engine
    fixed = [f"engine.kept_passes.{role}=null" for role, kept in engine.kept_passes if kept is not None]
    if engine.checkpointing != "auto":
        fixed.append("engine.checkpointing=auto")
    if engine.residency != "auto" and planner.num_gpus > 1:
        fixed.append("engine.residency=auto")
    batches: list[tuple[str, ...]] = [()]
    for parts in (2, 4):
        batch, times = engine.batch_size // parts, engine.accumulation * parts
        if engine.batch_size % parts == 0 and times <= LARGEST_SIZE:
            batches.append((f"engine.batch_size={batch}", f"engine.accumulation={times}"))
    updates: list[tuple[str, ...]] = [()]
    optimizers = {name: getattr(config, name) for name in ("student_optimizer", "critic_optimizer")}
    if engine.offload == "none" and all(each.name in ("auto", "fused") for each in optimizers.values()):
        for state in ("bfloat16", "float8"):
            larger = [name for name, each in optimizers.items() if STATE_BYTES[each.state] > STATE_BYTES[state]]
            if larger:
                updates.append(tuple(f"{name}.state={state}" for name in larger))
        states = [f"{name}.state=float32" for name, each in optimizers.items() if each.state != "float32"]
        updates.append(("engine.offload=cpu", *states))
    combinations = list(itertools.product(batches, updates))
    if config.lora is None:
        adapters = [f"lora.rank={LoraConfig().rank}"]
        if config.model.teacher_storage == "float8":
            adapters.append("model.teacher_storage=full")
        elif engine.zero.teacher == 3:
            combinations += [(("model.teacher_storage=float8",), update) for update in updates]
        combinations += [(tuple(adapters), batch) for batch in batches[:2]]
    if fixed:
        both = [] if planner.resolve(config).fits else combinations[1:]
        combinations += [(tuple(fixed),), *((tuple(fixed), *others) for others in both)]
    found = []
    for combination in combinations:
        changes = tuple(itertools.chain.from_iterable(combination))
        if changes:
            found.append(Alternative(changes, sum(map(bool, combination)), planner.resolve(changed(config, changes))))
    return sorted(found, key=_rank)


def _rank(each: Alternative) -> tuple:
    adapters = any(change.startswith("lora") for change in each.changes)
    return not each.plan.fits, adapters, each.plan.seconds_an_image, each.moves


def changed(config: Config, changes: tuple[str, ...]) -> Config:
    """`config` with settings in the command line's form."""
    return parse_config(merged(config.model_dump(mode="json"), read_overrides(changes)))


def recommend(config: Config, planner: Planner, others: list[Alternative]) -> Alternative | None:
    """Of those within WORTH of the fastest that fits, the one with the fewest changes; adapters only if no whole network fits."""
    own = Alternative((), 0, planner.resolve(config))
    fitting = [each for each in (own, *others) if each.plan.fits]
    fitting = [each for each in fitting if _rank(each)[1] == _rank(fitting[0])[1]]
    if not fitting:
        return None
    shortest = min(each.plan.seconds_an_image for each in fitting)
    alike = [each for each in fitting if each.plan.seconds_an_image <= (1 + WORTH) * shortest]
    return min(alike, key=lambda each: (each.moves, each.plan.seconds_an_image))


def gpu_bytes() -> float | None:
    """Memory of this process's GPU; None without one."""
    if not torch.cuda.is_available():
        return None
    return float(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
