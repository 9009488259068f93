"""What is measured: the operations, the sizes, their inputs, the peers, and the bytes each operation must move.

A peer is what a good trainer writes by hand: the paper's formula in plain PyTorch on tensors upcast to float32. The
same function in float64 is the truth that everything is checked against.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dpdmd.kernels import (
    Philox,
    dmd_loss,
    flow_matching_loss,
    guided_euler_step,
    renoise,
    v_prediction_loss,
    x_prediction_loss,
)

DTYPE = torch.bfloat16
GUIDANCE_SCALE = 4.0
KEY = 20260203  # of the noise that renoise_philox draws
SDXL_LAST_ALPHABAR = 0.0047  # SDXL's schedule ends here, and its first step starts here

SIZES = {
    "sd35-b1": (1, 16, 128, 128),  # SD3.5 latents, 1024 x 1024
    "sd35-b4": (4, 16, 128, 128),
    "sd35-b16": (16, 16, 128, 128),
    "flux": (4, 4096, 64),  # FLUX packed latents, 1024 x 1024
    "wan-480p": (1, 16, 21, 60, 104),  # Wan video latents, 81 frames of 480 x 832
    "wan-720p": (1, 16, 21, 90, 160),
    "video": (8, 16, 84, 90, 160),  # 325 frames: memory-bound, whoever launches
    "awkward": (3, 5, 1023),  # odd, and a multiple of no vector width
}

Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Operation:
    """One row of the benchmark. `ours` and `peer` take the inputs in order; the first gets the gradient of a loss."""

    module: str  # dpdmd.kernels.<module> holds its implementations
    loss: bool
    make: Callable[[Callable[[], Tensor], Tensor], Inputs]
    ours: Callable[..., Tensor]
    peer: Callable[..., Tensor]  # takes `wide`, the dtype of the arithmetic
    reads: tuple[str, ...]  # tensors of the size's shape that must be read, each once; one more is written
    truth: Callable[..., Tensor] | None = None  # where the peer in float64 is not the truth
    truth_inputs: Callable[..., Inputs] = lambda *inputs: inputs
    random_peer: bool = False  # the peer draws noise of its own: its moments are checked

    def bytes(self, elements: int) -> int:
        """The count that TB/s stand on: the fewest bytes that any implementation can do with. Coefficients (B,) and
        the loss itself are left out: a few bytes a sample."""
        return (len(self.reads) + 1) * elements * DTYPE.itemsize

    def bytes_counted(self) -> str:
        written = "gradient" if self.loss else "result"
        return f"reads {', '.join(self.reads)}; writes the {written}: {self.bytes(1)} bytes an element"


def make_inputs(operation: Operation, shape: tuple[int, ...], device: torch.device, seed: int) -> Inputs:
    """One set of random inputs in bfloat16, with times (B,) in float32. Nothing is zero, and no two sets are equal."""
    generator = torch.Generator(device).manual_seed(seed)

    def randn() -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=DTYPE)

    t = 0.2 + 0.7 * torch.rand(shape[:1], generator=generator, device=device)
    first, *rest = operation.make(randn, t)
    return (first.requires_grad_(operation.loss), *rest)


def _column(coefficient: Tensor, like: Tensor) -> Tensor:
    return coefficient.view(-1, *[1] * (like.ndim - 1))


def _guided(cond: Tensor, uncond: Tensor) -> Tensor:
    return uncond + GUIDANCE_SCALE * (cond - uncond)


def _score_outputs(randn: Callable[[], Tensor]) -> Inputs:
    """teacher, teacher_uncond and a critic 5 % away from the guided teacher, as late in training."""
    teacher = randn()
    uncond = teacher + 0.1 * randn()
    return teacher, uncond, _guided(teacher, uncond) + 0.05 * randn()


# dmd_loss: the peer is the paper's form; ours knows that t cancels for a flow, and reads neither x nor x_t.


def _make_dmd(randn, t: Tensor) -> Inputs:
    x = randn()
    return x, *_score_outputs(randn), (1 - _column(t, x)).to(DTYPE) * x + _column(t, x).to(DTYPE) * randn(), t


def _dmd_ours(x, teacher, uncond, critic, x_t, t):
    return dmd_loss(x, teacher, critic, teacher_uncond=uncond, guidance_scale=GUIDANCE_SCALE)


def _dmd_peer(x, teacher, uncond, critic, x_t, t, wide=torch.float32):
    x, teacher, uncond, critic, x_t = (each.to(wide) for each in (x, teacher, uncond, critic, x_t))
    t = _column(t.to(wide), x)
    return _score_difference(x, x_t, x_t - t * _guided(teacher, uncond), x_t - t * critic)


def _score_difference(x: Tensor, x_t: Tensor, x_real: Tensor, x_fake: Tensor) -> Tensor:
    weight = (x_t - x_real).abs().mean(dim=tuple(range(1, x.ndim)), keepdim=True)
    gradient = torch.nan_to_num((x_fake - x_real) / weight)
    return 0.5 * F.mse_loss(x, (x - gradient).detach())


# dmd_loss_x0: a noise-predicting model, whose conversion does not cancel. Ours reads x_t for the normaliser.


def _make_dmd_x0(randn, alphabar: Tensor) -> Inputs:
    x = randn()
    signal, noise = _column(alphabar.sqrt(), x).to(DTYPE), _column((1 - alphabar).sqrt(), x).to(DTYPE)
    a, b = alphabar.rsqrt(), -(1 - alphabar).sqrt() * alphabar.rsqrt()
    return x, *_score_outputs(randn), signal * x + noise * randn(), a, b


def _dmd_x0_ours(x, teacher, uncond, critic, x_t, a, b):
    guidance = {"teacher_uncond": uncond, "guidance_scale": GUIDANCE_SCALE}
    return dmd_loss(x, teacher, critic, **guidance, x_t=x_t, to_x0=(a, b))


def _dmd_x0_peer(x, teacher, uncond, critic, x_t, a, b, wide=torch.float32):
    x, teacher, uncond, critic, x_t = (each.to(wide) for each in (x, teacher, uncond, critic, x_t))
    a, b = _column(a.to(wide), x), _column(b.to(wide), x)
    return _score_difference(x, x_t, a * x_t + b * _guided(teacher, uncond), a * x_t + b * critic)


# The losses of the first step and of the critic.


def _v_prediction_peer(v, noise, z, t, wide=torch.float32):
    return F.mse_loss(v.to(wide), (noise.to(wide) - z.to(wide)) / (1 - _column(t.to(wide), v)))


def _flow_matching_peer(v, noise, x, wide=torch.float32):
    return F.mse_loss(v.to(wide), noise.to(wide) - x.to(wide))


def _make_x_prediction(randn, t: Tensor) -> Inputs:
    prediction, x_t, x0_target = randn(), randn(), randn()
    alphabar = torch.full_like(t, SDXL_LAST_ALPHABAR)
    return prediction, x_t, alphabar.rsqrt(), -((1 - alphabar) / alphabar).sqrt(), x0_target


def _x_prediction_ours(prediction, x_t, a, b, x0_target):
    return x_prediction_loss(prediction, x_t, (a, b), x0_target)


def _x_prediction_peer(prediction, x_t, a, b, x0_target, wide=torch.float32):
    a, b = _column(a.to(wide), x_t), _column(b.to(wide), x_t)
    return F.mse_loss(a * x_t.to(wide) + b * prediction.to(wide), x0_target.to(wide))


# The elementwise operations.


def _renoise_peer(x, noise, t, wide=torch.float32):
    t = _column(t.to(wide), x)
    return ((1 - t) * x.to(wide) + t * noise.to(wide)).to(_result(x, wide))


def _philox_ours(x, t):
    return renoise(x, Philox(KEY), t)


def _philox_peer(x, t, wide=torch.float32):
    return _renoise_peer(x, torch.randn_like(x), t, wide)


def _philox_truth_inputs(x, t) -> Inputs:
    return x, Philox(KEY).normal(x.shape, dtype=torch.float32, device=x.device), t


def _euler_ours(x, v, v_uncond, t, t_next):
    return guided_euler_step(x, v, t, t_next, v_uncond=v_uncond, guidance_scale=GUIDANCE_SCALE)


def _euler_peer(x, v, v_uncond, t, t_next, wide=torch.float32):
    step = _column(t_next.to(wide) - t.to(wide), x)
    return (x.to(wide) + step * _guided(v.to(wide), v_uncond.to(wide))).to(_result(x, wide))


def _result(x: Tensor, wide: torch.dtype) -> torch.dtype:
    return wide if wide == torch.float64 else x.dtype  # the truth stays unrounded


OPERATIONS = {
    "dmd_loss": Operation(
        module="losses.dmd",
        loss=True,
        make=_make_dmd,
        ours=_dmd_ours,
        peer=_dmd_peer,
        # The forward pass writes the gradient, and the backward pass hands it on: both together move what one does.
        reads=("teacher", "teacher_uncond", "critic"),
    ),
    "dmd_loss_x0": Operation(
        module="losses.dmd",
        loss=True,
        make=_make_dmd_x0,
        ours=_dmd_x0_ours,
        peer=_dmd_x0_peer,
        reads=("teacher", "teacher_uncond", "critic", "x_t"),
    ),
    "v_prediction_loss": Operation(
        module="losses.v_prediction",
        loss=True,
        make=lambda randn, t: (randn(), randn(), randn(), t),
        ours=v_prediction_loss,
        peer=_v_prediction_peer,
        reads=("v", "noise", "z"),
    ),
    "flow_matching_loss": Operation(
        module="losses.flow_matching",
        loss=True,
        make=lambda randn, t: (randn(), randn(), randn()),
        ours=flow_matching_loss,
        peer=_flow_matching_peer,
        reads=("v", "noise", "x"),
    ),
    "x_prediction_loss": Operation(
        module="losses.x_prediction",
        loss=True,
        make=_make_x_prediction,
        ours=_x_prediction_ours,
        peer=_x_prediction_peer,
        reads=("prediction", "x_t", "x0_target"),
    ),
    "renoise": Operation(
        module="sampling.renoise",
        loss=False,
        make=lambda randn, t: (randn(), randn(), t),
        ours=renoise,
        peer=_renoise_peer,
        reads=("x", "noise"),
    ),
    "renoise_philox": Operation(  # the noise is made where it is used: read from nowhere, written nowhere
        module="sampling.renoise",
        loss=False,
        make=lambda randn, t: (randn(), t),
        ours=_philox_ours,
        peer=_philox_peer,
        reads=("x",),
        truth=_renoise_peer,
        truth_inputs=_philox_truth_inputs,
        random_peer=True,
    ),
    "guided_euler_step": Operation(
        module="sampling.guided_euler_step",
        loss=False,
        make=lambda randn, t: (randn(), randn(), randn(), t, 0.8 * t),
        ours=_euler_ours,
        peer=_euler_peer,
        reads=("x", "v", "v_uncond"),
    ),
}


def sets_needed(operation: Operation, shape: tuple[int, ...], cache_bytes: int) -> int:
    """Input sets that together are more than twice the cache, so that no call finds its inputs there."""
    return max(2, math.ceil((2 * cache_bytes + 1) / (len(operation.reads) * math.prod(shape) * DTYPE.itemsize)))
