"""Started by test_role.py in two processes: gradients and skipped updates of a role, case by case.

Each case runs a loss with the student's pattern (a pass without gradient, then a chain of passes differentiated at once,
cut after the first) through DeepSpeed and through the plain module, and compares full gradients. Prints one JSON line.
"""

import itertools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import small
import torch
from diffusers.models.attention import JointTransformerBlock
from gradients import full_gradient, role_of

from dpdmd.config import parse_config
from dpdmd.engine import body
from dpdmd.engine.start import start


class Backbone:
    block_classes = (JointTransformerBlock,)

    @staticmethod
    def predict(module, x, t, cond, dtype):
        return module(
            hidden_states=x.to(dtype),
            timestep=t * 1000,
            encoder_hidden_states=cond["text"].to(dtype),
            pooled_projections=cond["pooled"].to(dtype),
            return_dict=False,
        )[0]


def make(dtype):
    return small.sd3().to(dtype)


def chain_losses(network, shard):
    """The loss in two parts that share no graph, as a student's first step and its others do."""
    generator = torch.Generator().manual_seed(shard)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    cond = {"text": torch.randn(2, 5, 16, generator=generator), "pooled": torch.randn(2, 16, generator=generator)}
    t = torch.full((2,), 0.5)
    with torch.no_grad():
        network(x, t, cond)
    first = x - 0.2 * network(x, t, cond)
    yield 0.5 * (first + 1).square().mean()
    x = first.detach()
    for _ in range(2):
        x = x - 0.2 * network(x, t, cond)
    yield (x - 1).square().mean()


def backward(network, shard, broken=False):
    """Both parts, one after the other where the network takes them so, else together."""
    scale = torch.nan if broken else 1.0
    if network.differentiates_in_parts:
        first, second = chain_losses(network, shard), None
        network.backward(next(first) * scale, more=True)
        second = next(first)
        network.backward(second)
    else:
        network.backward(sum(chain_losses(network, shard)) * scale)


def cases():
    """(dtype, accumulation, checkpointing, fused, residency[, offload])"""
    for residency, accumulation in itertools.product(("whole", "phase", "block"), (1, 2)):
        yield "float32", accumulation, "none", False, residency
    for residency, checkpointing in itertools.product(("phase", "block"), ("selective", "full")):
        yield "float32", 1, checkpointing, False, residency
    for accumulation in (1, 2):
        yield "bfloat16", accumulation, "none", False, "phase"
    for checkpointing, residency in itertools.product(("none", "selective"), ("phase", "block")):
        yield "float32", 2, checkpointing, True, residency
    for accumulation, residency in ((1, "phase"), (2, "block")):
        yield "bfloat16", accumulation, "none", False, residency, "cpu"


def main():
    world = None
    results = {}
    for dtype_name, accumulation, checkpointing, fused, residency, *offload in cases():
        # The fused operations' reference, as the trainer fuses on a GPU only.
        body.FUSED_ON = ("cpu",) if fused else ()
        body.why_not = lambda *device: ""
        config = parse_config(
            {
                "prompts": {"file": "unused"},
                "engine": {
                    "device": "cpu",
                    "batch_size": 2,
                    "accumulation": accumulation,
                    "clip": 0.0,
                    "checkpointing": checkpointing,
                    "residency": residency,
                    "offload": offload[0] if offload else "none",
                },
            }
        )
        world = world or start(config.engine)
        dtype = getattr(torch, dtype_name)
        student = role_of("student", make(dtype), Backbone, config, world)
        plain = make(dtype)
        shards = range(accumulation * world.size)
        for shard in shards:
            losses = chain_losses(lambda x, t, cond, m=plain, d=dtype: Backbone.predict(m, x, t, cond, d), shard)
            (sum(losses) / len(shards)).backward()
        for micro_batch in range(accumulation):
            backward(student, micro_batch * world.size + world.rank)
            if micro_batch + 1 < accumulation:
                assert student.step() is None
        difference = size = 0.0
        for ours, theirs in zip(student.module.parameters(), plain.parameters(), strict=True):
            if theirs.grad is not None:
                full = full_gradient(student, ours).double()
                difference += float((full - theirs.grad.double()).square().sum())
                size += float(theirs.grad.double().square().sum())
        step = student.step()
        norm_error = abs(step.gradient_norm / size**0.5 - 1)

        # A loss that breaks on one process must stop the update on all, and leave no trace.
        before = student.full_state_dict()
        for micro_batch in range(accumulation):
            backward(student, micro_batch, broken=world.rank == 0)
            broken = student.step()
        after = student.full_state_dict()
        unchanged = not world.main or all(torch.equal(before[name], after[name]) for name in before)
        for micro_batch in range(accumulation):
            backward(student, micro_batch)
            recovered = student.step()
        results[
            f"{dtype_name}, accumulation {accumulation}, checkpointing {checkpointing}, fused {fused}, "
            f"residency {residency}, offload {offload}"
        ] = {
            "fused": student.fusion is not None and sum(student.fusion.replaced.values()),
            "gradient_error": (difference / size) ** 0.5,
            "norm_error": norm_error,
            "applied": step.applied,
            "broken_applied": broken.applied,
            "broken_left_weights": unchanged,
            "recovered": recovered.applied,
            "updates": student.updates,
        }
    if world.main:
        print("RESULT " + json.dumps(results), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
