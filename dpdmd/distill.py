"""The algorithm: DP-DMD (arXiv 2602.03139) on plain callables, without DeepSpeed or diffusers.

A network is any callable (x (B, ...), t (B,) float32, cond) -> prediction (B, ...). A student update is

    z_K   = teacher's first K guided steps from eps                                   no gradient
    L_div = |student's first prediction - the one that leads straight from eps to z_K|^2   teaches step 1 diversity
    z_1   = stopgrad(student's first step)                                            DMD never reaches step 1
    x     = student's remaining steps from z_1
    L_dmd : dL/dx = (x_fake - x_real) / w at a renoised x                             teaches the rest quality
    L     = L_dmd + lambda L_div

and a critic update fits the critic to the student's samples. Every draw comes from `Draws`, so a run repeats bit for bit
from its configuration alone.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpdmd.config import DistillConfig
from dpdmd.diffusion import Anchor, NoiseProcess
from dpdmd.kernels import Philox

Network = Callable[[Tensor, Tensor, Any], Tensor]
Condition = Any  # a tensor, or a dict of tensors, whose first dimension is the batch


class Draws:
    """Random numbers keyed by (seed, iteration, role, shard): the same key and order of calls give the same numbers.

    shard: the index of a part of the global batch, micro-batch * processes + rank: ranks differ, and one process with two
    micro-batches draws what two processes with one draw.
    """

    def __init__(self, seed: int, iteration: int, role: str, shard: int, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        key, shared = Philox.of(seed, iteration, role, shard).key, Philox.of(seed, iteration, role, "shared").key
        self._generator = torch.Generator(self.device).manual_seed(key)
        self._shared = torch.Generator().manual_seed(shared)

    def noise(self, shape, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal, drawn in float32."""
        return torch.randn(shape, generator=self._generator, device=self.device).to(dtype)

    def index(self, high: int, count: int) -> Tensor:
        """(count,) int64, uniform over [0, high)."""
        return torch.randint(high, (count,), generator=self._generator, device=self.device)

    def uniform(self, count: int) -> Tensor:
        """(count,) float32, uniform over [0, 1)."""
        return torch.rand(count, generator=self._generator, device=self.device)

    def shared_index(self, high: int) -> int:
        """One integer of [0, high), the same on every shard: use it where the draw decides which collectives run."""
        return int(torch.randint(high, (), generator=self._shared))


def sampling_noise(seed: int, index: int, shape: tuple[int, ...]) -> Tensor:
    """Initial noise (1, C, H, W) of one image, float32 on the CPU: the same on every device and process."""
    return Draws(seed, index, "sample", 0).noise((1, *shape))


def first_noises(seed: int, count: int, shape: tuple[int, ...]) -> Tensor:
    """`sampling_noise` of the first `count` images, (count, C, H, W)."""
    return torch.cat([sampling_noise(seed, index, shape) for index in range(count)])


@dataclass(frozen=True)
class StudentLoss:
    remaining: Tensor  # still to be differentiated: all of total, or dmd if `backward` got the first step's loss
    total: Tensor  # detached scalars for the log: dmd + weight * diversity
    dmd: Tensor
    diversity: Tensor
    sample: Tensor  # (B, ...) the student's final sample, detached


class Distillation:
    """The method's two losses and the student's sampler on one noise process.

    student_times (N + 1,), teacher_times (T + 1,): float32 grids, noise to data, from the model's own scheduler.
    """

    def __init__(self, diffusion: NoiseProcess, config: DistillConfig, device: torch.device | str = "cpu"):
        self.diffusion = diffusion
        self.config = config
        self.student_times = diffusion.student_times(config.student_steps, config.student_grid).to(device)
        self.teacher_times = diffusion.times(config.teacher_steps).to(device)
        own = config.renoise.distribution == "scheduler"
        self._renoise_times = (diffusion.renoise_times if own else diffusion.train_times).to(device)

    def sample(self, student: Network, noise: Tensor, cond: Condition) -> Tensor:
        """The student's N steps from noise (B, ...) without guidance."""
        return rollout(self.diffusion, student, noise, self.student_times, cond)

    def student_loss(
        self,
        student: Network,
        teacher: Network,
        critic: Network,
        noise: Tensor,
        cond: Condition,
        uncond: Condition | None,
        draws: Draws,
        backward: Callable[[Tensor], None] | None = None,
    ) -> StudentLoss:
        """Loss of one student update; noise (B, ...) is eps. Only the student's graph is kept.

        backward: with distill.detach, called with the first step's weighted loss before the other steps run, so that its
        graph is freed first.
        """
        config, diffusion = self.config, self.diffusion
        steps = time_steps(self.student_times, noise)
        x, diversity, remaining = noise, noise.new_zeros((), dtype=torch.float32), 0.0
        if config.method == "dpdmd":
            t, t_next = steps.pop(0)
            anchor = self._anchor(teacher, noise, cond, uncond)
            prediction = student(noise, t, cond)
            diversity = diffusion.first_step_loss(prediction, noise, t, anchor)
            remaining = config.diversity_weight * diversity
            x = diffusion.step(noise, prediction, t, t_next)
            if config.detach:
                x = x.detach()
                if backward is not None:
                    backward(remaining)
                    remaining = 0.0
        x = self._trained_rollout(student, x, steps, cond, draws)
        dmd = self._dmd_loss(teacher, critic, x, cond, uncond, draws)
        remaining = dmd + remaining
        dmd, diversity = dmd.detach(), diversity.detach()
        return StudentLoss(remaining, dmd + config.diversity_weight * diversity, dmd, diversity, x.detach())

    def _anchor(self, teacher, noise, cond, uncond) -> Anchor:
        """The state after the teacher's K steps from noise (B, ...), for `first_step_loss`."""
        config, diffusion = self.config, self.diffusion
        scale = config.guidance_scale
        anchor_times = self.teacher_times[: config.anchor + 1]
        t = anchor_times[-1].expand(len(noise))
        with torch.no_grad():
            z = rollout(diffusion, teacher, noise, anchor_times, cond, uncond, scale)
            if diffusion.anchor_needs_teacher and config.anchor < config.teacher_steps:
                return Anchor(z, t, *guided(teacher, z, t, cond, uncond, scale), scale)
        return Anchor(z, t)

    def _trained_rollout(self, student, x, steps, cond, draws) -> Tensor:
        """The steps that DMD trains: a graph through all of them, or through one drawn at random.

        With "random" the other steps' predictions are constants: they pass the gradient on unchanged and not rescaled.
        """
        chosen = None if self.config.rollout_gradient == "full" else draws.shared_index(len(steps))
        for number, (t, t_next) in enumerate(steps):
            with contextlib.nullcontext() if chosen in (None, number) else torch.no_grad():
                prediction = student(x, t, cond)
            x = self.diffusion.step(x, prediction, t, t_next)
        return x

    def _dmd_loss(self, teacher, critic, x, cond, uncond, draws) -> Tensor:
        config = self.config
        with torch.no_grad():
            t = self._renoise_time(len(x), draws)
            x_t = self.diffusion.renoise(x.detach(), draws.noise(x.shape, x.dtype), t)
            real, real_uncond = guided(teacher, x_t, t, cond, uncond, config.guidance_scale)
            fake = critic(x_t, t, cond)
            # The kernel turns non-finite gradient entries into 0; the loss becomes NaN here instead, so that the update is
            # skipped and counted.
            usable = _usable(real, real_uncond, fake, config.guidance_scale, config.normalizer)
        loss = self.diffusion.dmd_loss(
            x,
            real,
            fake,
            x_t,
            t,
            teacher_uncond=real_uncond,
            guidance_scale=config.guidance_scale,
            normalizer=config.normalizer,
        )
        return loss * torch.where(usable, 1.0, torch.nan)

    def critic_loss(self, critic: Network, student: Network, noise: Tensor, cond: Condition, draws: Draws) -> Tensor:
        """Loss of one critic update: denoise the student's samples from noise (B, ...). Only the critic has a graph."""
        with torch.no_grad():
            x = self.sample(student, noise, cond)
            t = self._renoise_time(len(x), draws)
            fresh = draws.noise(x.shape, x.dtype)
            x_t = self.diffusion.renoise(x, fresh, t)
        return self.diffusion.critic_loss(critic(x_t, t, cond), fresh, x)

    def _renoise_time(self, batch: int, draws: Draws) -> Tensor:
        """(B,) float32: one of a scheduler's times, or uniform in [low, high]; one per batch or per sample."""
        renoise = self.config.renoise
        count = batch if renoise.per == "sample" else 1
        if renoise.distribution == "uniform":
            t = self.diffusion.uniform_time(renoise.low + (renoise.high - renoise.low) * draws.uniform(count))
        else:
            t = self._renoise_times[draws.index(len(self._renoise_times), count)]
        return t.expand(batch)


def _usable(real: Tensor, real_uncond: Tensor | None, fake: Tensor, guidance_scale: float, normalizer: str) -> Tensor:
    """bool (): whether the DMD gradient is finite: no NaN or infinity in a prediction (B, ...) or the guided combination, and
    no division by a teacher's prediction that is all zeros."""
    score = real.float() if real_uncond is None else torch.lerp(real_uncond.float(), real.float(), guidance_scale)
    usable = score.isfinite().all() & fake.isfinite().all()
    if normalizer == "teacher":
        usable &= score.flatten(1).any(dim=1).all()
    return usable


def rollout(diffusion, network, x, times, cond, uncond=None, guidance_scale=1.0) -> Tensor:
    """Every step of the grid `times` (n + 1,) from x (B, ...) at times[0], guided unless guidance_scale is 1."""
    for t, t_next in time_steps(times, x):
        prediction, prediction_uncond = guided(network, x, t, cond, uncond, guidance_scale)
        x = diffusion.step(x, prediction, t, t_next, uncond=prediction_uncond, guidance_scale=guidance_scale)
    return x


def time_steps(times: Tensor, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The pairs (t, t_next) of a grid, each (B,) float32."""
    return list(itertools.pairwise(time.expand(len(x)) for time in times))


def guided(network, x, t, cond, uncond, guidance_scale) -> tuple[Tensor, Tensor | None]:
    """Conditional and unconditional prediction from one forward pass of twice the batch; at scale 1 (prediction, None)."""
    if guidance_scale == 1.0:
        return network(x, t, cond), None
    if uncond is None:
        raise ValueError(
            f"guidance_scale = {guidance_scale} needs unconditional embeddings, but uncond is None: "
            "give the embedding of the negative prompt, or guidance_scale = 1"
        )
    if isinstance(cond, dict):
        conditions = {key: torch.cat([value, uncond[key]]) for key, value in cond.items()}
    else:
        conditions = torch.cat([cond, uncond])
    return network(torch.cat([x, x]), torch.cat([t, t]), conditions).chunk(2)
