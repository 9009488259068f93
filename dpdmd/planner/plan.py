"""The plan of one configuration without `auto`: memory of every phase of a cycle, bytes sent, and estimated time."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from dpdmd.config import Config
from dpdmd.planner.footprint import Footprints
from dpdmd.planner.memory import CONTEXT, GIB, NCCL, Memory, Phase
from dpdmd.planner.speed import floor, seconds, traffic


@dataclass(frozen=True)
class Plan:
    """One configuration without `auto` on num_gpus GPUs of gpu_memory bytes (None: a CPU, which is not planned).

    host: bytes of a machine's memory by use; traffic: bytes a cycle that a GPU receives in gathers and sends in reductions;
    seconds: estimated, of a cycle, by use; floor: lower bound of the seconds for any implementation.
    """

    config: Config
    num_gpus: int
    gpu_memory: float | None
    phases: list[Phase] = field(default_factory=list)
    host: dict[str, float] = field(default_factory=dict)
    traffic: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    floor: dict[str, float] = field(default_factory=dict)

    @cached_property
    def fullest(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def peak(self) -> float:
        """Peak bytes that torch allocates."""
        return max((phase.allocated for phase in self.phases), default=0.0)

    @property
    def needed(self) -> float:
        """Bytes needed on a GPU, context and reserve included."""
        return self.fullest.total

    @property
    def fits(self) -> bool:
        """Whether it fits with the reserve."""
        return self.gpu_memory is None or self.needed <= self.gpu_memory

    @property
    def possible(self) -> bool:
        """Whether it fits without the reserve."""
        context = CONTEXT + (NCCL if self.num_gpus > 1 else 0.0)
        return self.gpu_memory is None or self.peak + context <= self.gpu_memory

    @property
    def cycle(self) -> float:
        return sum(self.seconds.values())

    @property
    def seconds_an_image(self) -> float:
        engine = self.config.engine
        updates = self.config.distill.critic_updates + 1
        return self.cycle / (engine.batch_size * engine.accumulation * updates * self.num_gpus)

    @property
    def choice(self) -> str:
        """The values chosen for `auto` and null, as settings."""
        engine = self.config.engine
        line = f"engine.residency={engine.residency} engine.checkpointing={engine.checkpointing}"
        if engine.checkpointing != "none":
            kept = engine.kept_passes
            line += f" engine.kept_passes.student={kept.student} engine.kept_passes.critic={kept.critic}"
        return line

    def summary(self) -> str:
        """One line for the start of a run."""
        if self.gpu_memory is None:
            return f"plan: {self.choice}"
        tight = "" if self.fits else " (tight: less than the usual reserve is left)"
        return (
            f"plan: {self.choice}: {gib(self.peak)} GiB allocated at the peak ({self.fullest.name}), {gib(self.needed)} "
            f"of {gib(self.gpu_memory)} GiB with context and reserve{tight}; a cycle takes about {self.cycle:.1f} s"
        )


def plan_of(config: Config, footprints: Footprints, num_gpus: int, gpu_memory: float | None) -> Plan:
    """The plan of a configuration without `auto`."""
    memory = Memory(config, footprints, num_gpus)
    return Plan(
        *(config, num_gpus, gpu_memory),
        [*memory.critic_phases(), *memory.student_phases(), *memory.other_phases()],
        memory.host(),
        traffic(config, footprints, num_gpus),
        seconds(config, footprints, num_gpus),
        floor(config, footprints, num_gpus),
    )


def gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.1f}"
