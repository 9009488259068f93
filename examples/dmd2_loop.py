"""Distribution matching distillation with the losses of dpdmd.kernels, in your own training loop.

Needs only torch and dpdmd.kernels. `python examples/dmd2_loop.py` trains a teacher on points in the plane (four classes of
two clusters each) and distils its many guided steps into one step, in a few seconds on a CPU. Replace `Velocity` with your
network, and `points` and `classes` with your batches.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math

import torch
from torch import Tensor, nn

from dpdmd.kernels import dmd_loss, flow_matching_loss, guided_euler_step, renoise

CLASSES, SPREAD = 4, 0.05
NO_CLASS = CLASSES  # the condition of the unconditional pass
angles = torch.arange(2 * CLASSES) * math.pi / CLASSES
CLUSTERS = torch.stack([angles.cos(), angles.sin()], -1).view(2, CLASSES, 2)  # a class's two clusters are opposite


class Velocity(nn.Module):
    """v(x_t, t, class) for the flow x_t = (1 - t) x + t noise, whose velocity is noise - x. x_t (B, 2), t (B,)."""

    def __init__(self, width: int = 128):
        super().__init__()
        self.classes = nn.Embedding(CLASSES + 1, width)
        self.frequencies = nn.Buffer(2.0 ** torch.arange(4) * math.pi / 2)
        self.inputs = nn.Linear(2 + 8, width)
        self.body = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2))

    def forward(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        phases = t[:, None] * self.frequencies
        features = torch.cat([x_t, phases.sin(), phases.cos()], -1)
        return self.body(self.inputs(features) + self.classes(condition))


def points(condition: Tensor) -> Tensor:
    """Samples of the data, (B, 2)."""
    side = torch.randint(2, condition.shape)
    return CLUSTERS[side, condition] + SPREAD * torch.randn(len(condition), 2)


def classes(batch: int) -> Tensor:
    return torch.randint(CLASSES, (batch,))


def update(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def train_teacher(updates: int, batch: int) -> Velocity:
    teacher = Velocity()
    optimizer = torch.optim.Adam(teacher.parameters(), 2e-3, fused=True)
    for _ in range(updates):
        condition = classes(batch)
        x, noise, t = points(condition), torch.randn(batch, 2), torch.rand(batch)
        condition = condition.where(torch.rand(batch) > 0.1, NO_CLASS)
        update(optimizer, flow_matching_loss(teacher(renoise(x, noise, t), t, condition), noise, x))
    return teacher.requires_grad_(False)


def generate(student: Velocity, noise: Tensor, condition: Tensor) -> Tensor:
    """The student's one step, from time 1 to 0."""
    return noise - student(noise, torch.ones(len(noise)), condition)


def distil(teacher: Velocity, cycles: int, batch: int, guidance_scale: float, critic_updates: int) -> Velocity:
    student, critic = (copy.deepcopy(teacher).requires_grad_(True) for _ in range(2))
    # Two time scales: the critic learns the student's outputs before each update of the student.
    student_optimizer = torch.optim.Adam(student.parameters(), 5e-4, betas=(0.0, 0.99), fused=True)
    critic_optimizer = torch.optim.Adam(critic.parameters(), 2e-3, betas=(0.0, 0.99), fused=True)
    for _ in range(cycles):
        for _ in range(critic_updates):
            condition = classes(batch)
            with torch.no_grad():
                x = generate(student, torch.randn(batch, 2), condition)
            noise, t = torch.randn(batch, 2), torch.rand(batch)
            update(critic_optimizer, flow_matching_loss(critic(renoise(x, noise, t), t, condition), noise, x))

        condition = classes(batch)
        x = generate(student, torch.randn(batch, 2), condition)
        with torch.no_grad():
            t = 0.02 + 0.96 * torch.rand(batch)
            x_t = renoise(x, torch.randn(batch, 2), t)
            real = teacher(x_t, t, condition)
            real_uncond = teacher(x_t, t, torch.full_like(condition, NO_CLASS))
            fake = critic(x_t, t, condition)
        # Pass velocities: no x0 estimates, no pseudo-target. Only x gets a gradient.
        loss = dmd_loss(x, real, fake, teacher_uncond=real_uncond, guidance_scale=guidance_scale)
        update(student_optimizer, loss)
    return student


@torch.no_grad()
def teachers(teacher: Velocity, noise: Tensor, condition: Tensor, steps: int, guidance_scale: float) -> Tensor:
    """The teacher's samples (B, 2) from the noise, in `steps` steps of two passes each."""
    x = noise
    times = torch.linspace(1.0, 0.0, steps + 1)
    for now, then in itertools.pairwise(times):
        t = now.expand(len(x))
        v, v_uncond = teacher(x, t, condition), teacher(x, t, torch.full_like(condition, NO_CLASS))
        x = guided_euler_step(x, v, t, then.expand(len(x)), v_uncond=v_uncond, guidance_scale=guidance_scale)
    return x


def measure(x: Tensor, condition: Tensor) -> tuple[float, float]:
    """Mean distance to the class's nearer cluster, and the rarer cluster's share in the worst class (0.5 is best)."""
    distances = (x[None] - CLUSTERS[:, condition]).norm(dim=-1)  # (2, B)
    rarer = [distances[:, condition == each].argmin(0).float().mean().item() for each in range(CLASSES)]
    return distances.amin(0).mean().item(), min(min(share, 1 - share) for share in rarer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--teacher-updates", type=int, default=1000)
    parser.add_argument("--cycles", type=int, default=250, help="updates of the student")
    parser.add_argument("--critic-updates", type=int, default=5, help="before each update of the student")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--guidance-scale", type=float, default=1.5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # more are slower with tensors this small
    teacher = train_teacher(args.teacher_updates, args.batch)
    student = distil(teacher, args.cycles, args.batch, args.guidance_scale, args.critic_updates)
    noise, condition = torch.randn(2000, 2), classes(2000)
    with torch.no_grad():
        rows = {
            "teacher, 20 steps": teachers(teacher, noise, condition, 20, args.guidance_scale),
            "teacher, 1 step": teachers(teacher, noise, condition, 1, args.guidance_scale),
            "student, 1 step": generate(student, noise, condition),
        }
    print(f"{'':<20}{'distance':>10}{'rarer':>8}")
    for name, x in rows.items():
        distance, rarer = measure(x, condition)
        print(f"{name:<20}{distance:>10.3f}{rarer:>8.2f}")


if __name__ == "__main__":
    main()
