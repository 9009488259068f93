"""The passes of a cycle: how many, which are differentiated, and what a chain of them keeps."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from dpdmd.config import Config
from dpdmd.planner.footprint import Block, Footprint, Footprints, Pass


def steps_with_graph(config: Config) -> tuple[int, int]:
    """The student's steps that are differentiated: the first by itself (1 or 0), and those of the chain that DMD trains."""
    distill = config.distill
    first = 1 if distill.method == "dpdmd" else 0
    rest = distill.student_steps - first
    return first, rest if distill.rollout_gradient == "full" else 1


@dataclass(frozen=True)
class Passes:
    """Passes of a cycle. rollouts: the student's without gradient; student, critic: those with a backward pass."""

    rollouts: int
    teacher: int
    score: int
    critic: int
    student: int

    @classmethod
    def of(cls, config: Config) -> Passes:
        distill, times = config.distill, config.engine.accumulation
        first, rest = steps_with_graph(config)
        steps = distill.student_steps
        return cls(
            rollouts=times * (distill.critic_updates * steps + steps - first - rest),
            teacher=times * ((distill.anchor if first else 0) + 1),
            score=times,
            critic=times * distill.critic_updates,
            student=times * (first + rest),
        )


def chain_lengths(config: Config, in_parts: bool) -> list[int]:
    """Steps of each chain that a student update differentiates. in_parts: the first step is a chain of its own."""
    first, rest = steps_with_graph(config)
    return [steps for steps in ([first, rest] if in_parts else [first + rest]) if steps]


def block_passes(config: Config, footprints: Footprints, role: str, in_parts: bool) -> int:
    """Block passes of the longest forward chain with a graph."""
    steps = 1 if role == "critic" else max(chain_lengths(config, in_parts))
    return steps * len(footprints.of(config, role, config.engine.batch_size).blocks)


@dataclass
class Chain:
    """A forward chain of a role's network with a graph, `steps` consecutive passes, and its backward pass."""

    footprint: Footprint
    steps: int
    how: str  # engine.checkpointing
    keep: int  # the first block passes keep everything, this many

    @cached_property
    def passes(self) -> list[tuple[Block, Pass]]:
        blocks = self.footprint.blocks * self.steps
        return [(block, block.passes["none" if i < self.keep else self.how]) for i, block in enumerate(blocks)]

    @property
    def recomputed(self) -> int:
        return 0 if self.how == "none" else max(0, self.steps * len(self.footprint.blocks) - self.keep)

    @cached_property
    def kept(self) -> float:
        """Bytes kept between forward and backward pass."""
        return sum(each.kept for _, each in self.passes) + self.steps * self.footprint.outer_kept

    def backward(self, *, held: bool, earlier: bool, shard: float = 0.0) -> tuple[float, float]:
        """Bytes of (activations, gradients) at the fullest moment of the backward pass.

        held: the gradients stay with the parameters; earlier: earlier gradients are held, and these are added. A block's own
        gradients of this pass count in full while its backward pass runs. shard: bytes of the shard that all gradients are
        reduced to, allocated with the first.
        """
        fp = self.footprint
        width, count = fp.dtype_bytes, len(fp.blocks)
        passes = self.passes
        live = self.kept
        gradients = width * fp.trained if earlier else 0
        best = (live, gradients)
        for step in reversed(range(self.steps)):
            first_seen, last_use = step == self.steps - 1, step == 0
            if first_seen and (held or not last_use):
                gradients += width * fp.outer_trained
            for index in reversed(range(count)):
                block, each = passes[step * count + index]
                own = width * block.trained
                now = live - each.kept + each.backward, gradients + own
                best = max(best, now, key=sum)
                live -= each.kept
                if first_seen and (held or not last_use):
                    gradients += own
                if last_use and not held:
                    gradients += shard - own * ((self.steps > 1) + earlier)
                    shard = 0.0
        return best
