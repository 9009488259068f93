"""Noise processes, without any network: time grids, conversions, steps and targets.

Flow                 z_t = (1 - t) x + t eps,           networks predict the velocity v = eps - x     (SD3.5, FLUX, ...)
VariancePreserving   z_t = alpha_t x + sigma_t eps,     networks predict the noise eps                (SDXL, ...)
                     with alpha^2 + sigma^2 = 1

A model family picks one, or brings a `NoiseProcess` of its own; distill.py needs nothing else. Times are float32; grids
fall from noise to data, and n steps have n + 1 times. All come from the model's own diffusers scheduler, shift included.
Source: arXiv 2602.03139, with x0 for data and eps for the initial noise.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from dpdmd import kernels

EARLIEST_START, LATEST = 0.999, 1.001  # range of a flow's first time: noise is at 1, up to rounding

Grid = str | list[float]  # "scheduler", "uniform", or explicit times without the final data time


class NoiseProcess(ABC):
    """The interface of a noise process, on the model's scheduler.

    prediction: what networks predict. start, end: the times of noise and of data. anchor_needs_teacher: whether the first
    step's target needs a teacher's pass at the anchor. train_times, renoise_times (num_train_timesteps,) float32: the times
    that the scheduler trains at, and those that distill.renoise.distribution = scheduler draws from. Samples x, noise and
    predictions are (B, ...), t (B,) float32.
    """

    prediction: ClassVar[str]
    start: float
    end: float
    anchor_needs_teacher: ClassVar[bool]
    num_train_timesteps: int
    train_times: Tensor
    renoise_times: Tensor

    @abstractmethod
    def times(self, num_steps: int) -> Tensor:
        """The teacher's grid, (num_steps + 1,) float32: a pipeline's with num_inference_steps."""

    @abstractmethod
    def student_times(self, num_steps: int, grid: Grid) -> Tensor:
        """The student's grid, (num_steps + 1,) float32. Raises ValueError for a grid that the scheduler cannot walk."""

    def uniform_time(self, u: Tensor) -> Tensor:
        """Maps u in [0, 1] linearly to a time."""
        return u * self.start

    @abstractmethod
    def timestep(self, t: Tensor) -> Tensor:
        """The network's timestep argument, (B,) float32."""

    @abstractmethod
    def to_x0(self, t: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """(a, b), each (B,), with x0 = a x_t + b prediction."""

    @abstractmethod
    def renoise(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t of the sample x."""

    @abstractmethod
    def step(self, x, prediction, t, t_next, *, uncond=None, guidance_scale=1.0) -> Tensor:
        """From t to t_next along the guided prediction, u + guidance_scale (c - u)."""

    @abstractmethod
    def first_step_loss(self, prediction, noise, start, anchor: Anchor) -> Tensor:
        """Distance of the student's prediction at the noise, time `start` (B,), from the one that leads to the anchor."""

    @abstractmethod
    def critic_loss(self, prediction: Tensor, noise: Tensor, x: Tensor) -> Tensor:
        """Distance of the critic's prediction at x, renoised with the noise, from the one that leads back to x."""

    def dmd_loss(self, x, teacher, critic, x_t, t, *, teacher_uncond, guidance_scale, normalizer) -> Tensor:
        """kernels.dmd_loss, on a flow's velocities under the paper's normaliser, where t cancels; else in x0 space."""
        free_of_t = self.prediction == "velocity" and normalizer == "teacher"
        return kernels.dmd_loss(
            x,
            teacher,
            critic,
            teacher_uncond=teacher_uncond,
            guidance_scale=guidance_scale,
            x_t=None if free_of_t else x_t,
            to_x0=None if free_of_t else self.to_x0(t, _arithmetic(x)),
            normalizer=normalizer,
        )


@dataclass(frozen=True)
class Anchor:
    """The state after the teacher's first steps: z (B, ...) at t (B,). teacher, teacher_uncond: its predictions there, if
    they are needed; teacher None: z is data."""

    z: Tensor
    t: Tensor
    teacher: Tensor | None = None
    teacher_uncond: Tensor | None = None
    guidance_scale: float = 1.0


class Flow(NoiseProcess):
    """Linear path between data (t = 0) and noise (t = 1), networks predict the velocity.

    scheduler: a diffusers FlowMatchEulerDiscreteScheduler; it is copied, never changed.
    mu: the shift of a scheduler that shifts by resolution (use_dynamic_shifting), or a function of the number of steps to
    it. Without it such a scheduler raises ValueError.
    even_steps: the pipeline takes n steps as sigmas 1, (n - 1) / n, ..., 1 / n before the shift (FluxPipeline); else the
    steps that the scheduler makes of the number n (StableDiffusion3Pipeline).
    train_times (1000,) float32: the scheduler's training grid, falling, shift included.
    renoise_times (1000,) float32: the scheduler's set_timesteps(1000) without the data time. It spaces the steps evenly
    between the ends of the shifted grid and shifts them again: under a fixed shift of 3 it ends at 0.00893, train_times at
    0.00299. The authors draw from it.
    """

    prediction = "velocity"
    start, end = 1.0, 0.0
    anchor_needs_teacher = False  # the velocity target needs states alone; the x0 target below a pass at the anchor

    def __init__(self, scheduler, *, mu: float | Callable[[int], float] | None = None, even_steps: bool = False):
        self._scheduler = scheduler
        self._mu: Callable[[int], Any] = mu if callable(mu) else lambda num_steps: mu
        self._even_steps = even_steps
        self.num_train_timesteps = scheduler.config.num_train_timesteps
        times = type(scheduler).from_config(scheduler.config).sigmas
        if scheduler.config.use_dynamic_shifting:
            if mu is None:
                raise ValueError("mu = None: a scheduler with use_dynamic_shifting needs the shift of its resolution")
            times = scheduler.time_shift(self._mu(self.num_train_timesteps), 1.0, times)
        self.train_times = times.float()
        self.renoise_times = self._walked(self.num_train_timesteps)[:-1]

    def times(self, num_steps: int) -> Tensor:
        if self._even_steps:
            return self._walked(num_steps, self.pipeline_sigmas(num_steps, "scheduler"))
        return self._walked(num_steps)

    def _walked(self, num_steps: int, sigmas: list[float] | None = None) -> Tensor:
        scheduler = copy.deepcopy(self._scheduler)
        steps = {"num_inference_steps": num_steps} if sigmas is None else {"sigmas": sigmas}
        scheduler.set_timesteps(**steps, mu=self._mu(num_steps))
        return scheduler.sigmas.float()

    def pipeline_sigmas(self, num_steps: int, grid: Grid) -> list[float]:
        """The pipeline's argument `sigmas` that gives the student's grid after the pipeline's shift."""
        if grid == "scheduler" and self._even_steps:
            sigmas = np.linspace(1.0, 1.0 / num_steps, num_steps)
        elif grid == "scheduler":
            times = type(self._scheduler).from_config(self._scheduler.config)
            sigmas = np.linspace(times.sigma_max, times.sigma_min, num_steps)
        elif grid == "uniform":
            sigmas = np.linspace(1.0, 0.0, num_steps + 1)[:-1]
        else:
            config, shift = (
                self._scheduler.config,
                self._scheduler.shift,
            )  # sigma -> shift sigma / (1 + (shift - 1) sigma)
            if config.use_dynamic_shifting:
                mu = self._mu(num_steps)
                shift = math.exp(mu) if config.time_shift_type == "exponential" else mu
            sigmas = np.array(grid, dtype=np.float64)
            sigmas = sigmas / (shift - (shift - 1.0) * sigmas)
        return [float(sigma) for sigma in sigmas.astype(np.float32)]

    def student_times(self, num_steps: int, grid: Grid) -> Tensor:
        """Bitwise equal to a pipeline's grid for `pipeline_sigmas`."""
        times = self._walked(num_steps, self.pipeline_sigmas(num_steps, grid))
        if isinstance(grid, list) and not np.allclose(times[:-1], grid, atol=1e-4):
            raise ValueError(
                f"distill.student_grid = {grid}: the model's scheduler turns it into {times[:-1].tolist()} "
                "(it rescales custom sigmas); take scheduler or uniform"
            )
        if not EARLIEST_START <= times[0] <= LATEST:
            raise ValueError(
                f"distill.student_grid = {grid}: starts at {times[0]:.4f}; sampling starts from noise, at 1"
            )
        return _falling(times, grid)

    def timestep(self, t: Tensor) -> Tensor:
        """In [0, 1000]."""
        return t * self.num_train_timesteps

    def to_x0(self, t: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t, dtype=dtype), -t.to(dtype)

    def renoise(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return kernels.renoise(x, noise, t)

    def step(self, x, prediction, t, t_next, *, uncond=None, guidance_scale=1.0) -> Tensor:
        return kernels.guided_euler_step(x, prediction, t, t_next, v_uncond=uncond, guidance_scale=guidance_scale)

    def first_step_loss(self, prediction, noise, start, anchor: Anchor) -> Tensor:
        """mean |v - (eps - z_K) / (1 - t_K)|^2 (arXiv 2602.03139)."""
        return kernels.v_prediction_loss(prediction, noise, anchor.z, anchor.t)

    def critic_loss(self, prediction: Tensor, noise: Tensor, x: Tensor) -> Tensor:
        """mean |v - (eps - x)|^2."""
        return kernels.flow_matching_loss(prediction, noise, x)


class VariancePreserving(NoiseProcess):
    """Noise-predicting diffusion with alphabar_t = alpha_t^2 given at 1000 steps.

    A time is a (possibly fractional) training step, float32: 999 is noise, 0 the least noisy trained step, -1 is data
    (alphabar = 1). Between steps sigma / alpha is interpolated linearly, as in diffusers' Euler scheduler.
    train_times and renoise_times (1000,) float32: every training step, 999 to 0; set_timesteps(1000) under SDXL's leading
    spacing would give 1000 to 1, and step 1000 was never trained.
    scheduler: a diffusers scheduler with `alphas_cumprod` and prediction_type "epsilon"; copied, never changed.
    """

    prediction = "noise"
    end = -1.0
    anchor_needs_teacher = True

    def __init__(self, scheduler):
        if scheduler.config.prediction_type != "epsilon":
            raise ValueError(
                f"scheduler prediction_type = {scheduler.config.prediction_type!r}: only 'epsilon' (noise) is supported"
            )
        self._scheduler = scheduler
        alphabar = scheduler.alphas_cumprod.double()
        # Index 0 is data (time -1), index i + 1 is training step i.
        self._ratios = torch.cat([alphabar.new_zeros(1), ((1 - alphabar) / alphabar).sqrt()])
        self.num_train_timesteps = len(alphabar)
        self.start = float(self.num_train_timesteps - 1)
        self.train_times = torch.arange(self.num_train_timesteps - 1, -1, -1, dtype=torch.float32)
        self.renoise_times = self.train_times

    def times(self, num_steps: int) -> Tensor:
        """The scheduler's own timesteps and the data time."""
        scheduler = copy.deepcopy(self._scheduler)
        scheduler.set_timesteps(num_steps)
        return self._with_end(scheduler.timesteps)

    def student_times(self, num_steps: int, grid: Grid) -> Tensor:
        """`uniform` is 999, 749, 499, 249 for four steps."""
        if grid == "scheduler":
            return self.times(num_steps)
        if grid == "uniform":
            share = torch.arange(num_steps, 0, -1, dtype=torch.float64) / num_steps
            return self._with_end((share * self.num_train_timesteps).round() - 1)
        times = self._with_end(torch.tensor(grid))
        if times[0] > self.start:
            raise ValueError(f"distill.student_grid = {grid}: starts above the last training step, {self.start:.0f}")
        return _falling(times, grid)

    def _with_end(self, timesteps: Tensor) -> Tensor:
        return torch.cat([timesteps.float(), torch.tensor([self.end])])

    def timestep(self, t: Tensor) -> Tensor:
        """The time itself."""
        return t

    def _ratio(self, t: Tensor) -> Tensor:
        """sigma / alpha at t (B,), float64."""
        ratios = self._ratios.to(t.device)
        position = (t.double() + 1).clamp(0, len(ratios) - 1)
        below = position.floor().long().clamp(max=len(ratios) - 2)
        return torch.lerp(ratios[below], ratios[below + 1], position - below)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at t (B,), float64."""
        ratio = self._ratio(t)
        alpha = (1 + ratio.square()).rsqrt()
        return alpha, ratio * alpha

    def to_x0(self, t: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """a = 1 / alpha, b = -sigma / alpha."""
        ratio = self._ratio(t)
        return (1 + ratio.square()).sqrt().to(dtype), -ratio.to(dtype)

    def renoise(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self.alpha_sigma(t)
        dtype = _arithmetic(x)
        return kernels.renoise(x, noise, (alpha.to(dtype), sigma.to(dtype)))

    def step(self, x, prediction, t, t_next, *, uncond=None, guidance_scale=1.0) -> Tensor:
        """DDIM: an Euler step in (x / alpha, sigma / alpha) along the guided noise."""
        dtype = _arithmetic(x)
        now, following = self._ratio(t), self._ratio(t_next)
        shape = (-1, *([1] * (x.dim() - 1)))
        scaled = x * (1 + now.square()).sqrt().to(dtype).view(shape)
        stepped = kernels.guided_euler_step(
            scaled, prediction, now.to(dtype), following.to(dtype), v_uncond=uncond, guidance_scale=guidance_scale
        )
        return stepped * (1 + following.square()).rsqrt().to(dtype).view(shape)

    def first_step_loss(self, prediction, noise, start, anchor: Anchor) -> Tensor:
        """mean |x_student - x_target|^2 in x0 space (arXiv 2602.03139, noise-predicting models); x_target is the guided
        teacher's at the anchor, or z if the rollout reached the data."""
        target = z = anchor.z
        if anchor.teacher is not None:
            # A step to the data time is the conversion to x0, guidance included.
            end, guidance = torch.full_like(anchor.t, self.end), {"guidance_scale": anchor.guidance_scale}
            target = self.step(z, anchor.teacher, anchor.t, end, uncond=anchor.teacher_uncond, **guidance)
        return kernels.x_prediction_loss(prediction, noise, self.to_x0(start, _arithmetic(noise)), target)

    def critic_loss(self, prediction: Tensor, noise: Tensor, x: Tensor) -> Tensor:
        """mean |eps_critic - eps|^2: the x0 form with x0 = prediction."""
        ones = torch.ones(len(x), device=x.device, dtype=_arithmetic(x))
        return kernels.x_prediction_loss(prediction, x, (torch.zeros_like(ones), ones), noise)


def _arithmetic(x: Tensor) -> torch.dtype:
    """The dtype of per-sample scalars for the kernels: float64 only for float64 samples."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _falling(times: Tensor, grid: Grid) -> Tensor:
    """Returns the times; raises ValueError unless they fall in float32."""
    if not (times.diff() < 0).all():
        raise ValueError(f"distill.student_grid = {grid}: in float32 it is {times.tolist()}, and must fall to the end")
    return times
