"""Is it right? Every implementation against float64 of the same inputs, before any of them is timed.

Also the table that says why the flow form of dmd_loss exists: the gradient's error where teacher and critic nearly
agree, for ours and for x0-space arithmetic in bfloat16.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from operations import DTYPE, Inputs, Operation
from torch import Tensor

from dpdmd.kernels import dmd_loss

# The worst that one rounding to bfloat16 can do to a norm. Two roundings make 2.4e-3, as errors differ in sign.
RESULT_LIMIT = 2**-8
LOSS_LIMIT = 1e-5  # a float32 sum of 155 million squares, in whatever order

DIFFERENCES = (0.05, 0.01, 0.001)
TIMES = (0.9, 0.5, 0.1, 0.03)


@dataclass(frozen=True)
class Check:
    """Relative norm error of gradient or result; relative error of the loss; for noise, that of its two moments."""

    result: float | None = None
    loss: float | None = None
    moments: float | None = None
    problem: str = ""  # "" where nothing is wrong

    def json(self) -> dict[str, float | None]:
        return {"result": self.result, "loss": self.loss, "moments": self.moments}


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh tensors hold NaN until written, so an element that a kernel forgets shows up."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def run_once(operation: Operation, function, inputs: Inputs) -> tuple[Tensor | None, Tensor]:
    """The loss and its gradient; None and the result where the operation is no loss."""
    if not operation.loss:
        return None, function(*inputs)
    inputs[0].grad = None
    loss = function(*inputs)
    loss.backward()
    return loss.detach(), inputs[0].grad


def check(operation: Operation, inputs: Inputs, outcomes: dict[str, tuple[Tensor | None, Tensor]]) -> dict[str, Check]:
    """Compares what every implementation made of `inputs` with float64.

    Sample by sample: float64 of a whole video batch, with all that autograd keeps, would not fit beside it.
    """
    samples = len(inputs[0])
    truth_inputs = operation.truth_inputs(*inputs)
    squares, loss = dict.fromkeys(outcomes, 0.0), 0.0
    norm = 0.0
    for index in range(samples):
        sample = [each[index : index + 1].detach() for each in truth_inputs]
        exact_loss, exact = _truth(operation, sample, samples)
        loss += exact_loss
        norm += exact.square().sum().item()
        for name, (_, got) in outcomes.items():
            squares[name] += (got[index : index + 1].double() - exact).square().sum().item()
    return {name: _judge(math.sqrt(squares[name] / norm), outcomes[name][0], loss) for name in outcomes}


def _truth(operation: Operation, sample: list[Tensor], samples: int) -> tuple[float, Tensor]:
    """This sample's share of the mean over the batch, with its gradient; 0 and the result for no loss."""
    function = operation.truth or operation.peer
    sample = [each.double() for each in sample]
    if not operation.loss:
        return 0.0, function(*sample, wide=torch.float64)
    first = sample[0].requires_grad_()
    loss = function(*sample, wide=torch.float64) / samples
    (gradient,) = torch.autograd.grad(loss, first)
    return loss.item(), gradient


def _judge(error: float, loss: Tensor | None, exact_loss: float) -> Check:
    problems = []
    if not error <= RESULT_LIMIT:  # NaN must not pass
        problems.append(f"relative error {error:.1e}, allowed {RESULT_LIMIT:.1e}")
    loss_error = None if loss is None else abs(loss.item() - exact_loss) / abs(exact_loss)
    if loss_error is not None and not loss_error <= LOSS_LIMIT:
        problems.append(f"relative error of the loss {loss_error:.1e}, allowed {LOSS_LIMIT:.1e}")
    return Check(result=error, loss=loss_error, problem="; ".join(problems))


def check_moments(inputs: Inputs, renoised: Tensor) -> Check:
    """For a peer that draws noise of its own: mean 0 and standard deviation 1 of the noise in (1 - t) x + t noise."""
    x, t = inputs
    mean, square = 0.0, 0.0
    for index in range(len(x)):
        noise = (renoised[index].double() - (1 - t[index]).double() * x[index].double()) / t[index].double()
        mean += noise.mean().item() / len(x)
        square += noise.square().mean().item() / len(x)
    error = max(abs(mean), abs(math.sqrt(square) - 1)) if square >= 0 else math.nan
    limit = 6 / math.sqrt(x.numel()) + 1e-3  # six standard errors, and the rounding of the result
    problem = "" if error <= limit else f"moments of the noise off by {error:.1e}, allowed {limit:.1e}"
    return Check(moments=error, problem=problem)


def cancellation(device: torch.device) -> list[dict[str, Any]]:
    """Relative error of the gradient where the critic's velocity differs from the teacher's by a few percent or less.

    All from the same bfloat16 tensors, whose float64 gradient is the truth. No guidance.
    """
    shape = (4, 16, 128, 128) if device.type == "cuda" else (1, 16, 64, 64)
    generator = torch.Generator(device).manual_seed(0)
    x, noise, other = (torch.randn(shape, generator=generator, device=device) for _ in range(3))
    x, noise = x.to(DTYPE), noise.to(DTYPE)
    teacher = (noise.float() - x.float()).to(DTYPE)
    rows = []
    for difference in DIFFERENCES:
        critic = (teacher.float() * (1 + difference * other)).to(DTYPE)
        for t in TIMES:
            x_t = ((1 - t) * x.float() + t * noise.float()).to(DTYPE)
            rows.append({"difference": difference, "t": t, **_gradient_errors(x, teacher, critic, x_t, t)})
    return rows


def _gradient_errors(x: Tensor, teacher: Tensor, critic: Tensor, x_t: Tensor, t: float) -> dict[str, float]:
    exact = _x0_gradient(*(each.double() for each in (teacher, critic, x_t)), t)
    in_bfloat16 = _x0_gradient(teacher, critic, x_t, t)
    pseudo_target = (x - in_bfloat16).to(DTYPE)
    gradients = {
        "ours_x_float32": _ours_gradient(x.float(), teacher, critic),
        "ours_x_bfloat16": _ours_gradient(x, teacher, critic),
        "x0_float32": _x0_gradient(*(each.float() for each in (teacher, critic, x_t)), t),
        "x0_bfloat16": in_bfloat16,
        "x0_bfloat16_pseudo_target": x.float() - pseudo_target.float(),
    }
    return {name: ((got.double() - exact).norm() / exact.norm()).item() for name, got in gradients.items()}


def _x0_gradient(teacher: Tensor, critic: Tensor, x_t: Tensor, t: float) -> Tensor:
    """As trainers write it: both clean estimates, their difference, the normaliser, in whatever dtype comes in."""
    x_real, x_fake = x_t - t * teacher, x_t - t * critic
    return (x_fake - x_real) / (x_t - x_real).abs().mean(dim=tuple(range(1, x_t.ndim)), keepdim=True)


def _ours_gradient(x: Tensor, teacher: Tensor, critic: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    dmd_loss(x, teacher, critic, reduction="sum").backward()
    return x.grad
