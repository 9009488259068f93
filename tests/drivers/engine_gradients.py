"""Started by test_engine.py with the deepspeed launcher: gradients and skipped updates of a Network, case by case.

Each case runs a loss with the student's pattern (a pass without gradient, then a chain of passes differentiated at once,
cut after the first) through DeepSpeed and through the plain module, and compares full gradients. Prints one JSON line.
"""

import itertools
import json
import sys

import deepspeed
import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.attention import JointTransformerBlock

from dpdmd import engine
from dpdmd.config import parse_config


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
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=32,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    return model.to(dtype)


def chain_loss(network, shard):
    generator = torch.Generator().manual_seed(shard)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    cond = {"text": torch.randn(2, 5, 16, generator=generator), "pooled": torch.randn(2, 16, generator=generator)}
    t = torch.full((2,), 0.5)
    with torch.no_grad():
        network(x, t, cond)
    first = x - 0.2 * network(x, t, cond)
    x = first.detach()
    for _ in range(2):
        x = x - 0.2 * network(x, t, cond)
    return (x - 1).square().mean() + 0.5 * (first + 1).square().mean()


def main():
    world = None
    results = {}
    cases = [(stage, "float32", a, c, False) for stage, a, c in itertools.product((0, 1, 2, 3), (1, 2), (False,))]
    cases += [(3, "float32", 1, True, False), (3, "float32", 2, True, False), (2, "float32", 1, True, False)]
    cases += [(stage, "bfloat16", 1, False, False) for stage in (0, 1, 2, 3)]
    cases += [(3, "float32", 2, checkpointing, True) for checkpointing in (False, True)]
    for stage, dtype_name, accumulation, checkpointing, fused in cases:
        # The fused operations' reference, as the trainer fuses on a GPU only.
        engine.FUSED_ON = ("cpu",) if fused else ()
        engine.why_not = lambda *device: ""
        config = parse_config(
            {
                "prompts": {"file": "unused"},
                "engine": {
                    "device": "cpu",
                    "batch_size": 2,
                    "accumulation": accumulation,
                    "clip": 0.0,
                    "checkpointing": checkpointing,
                    # 0: every parameter is really sharded and gathered.
                    "zero": {"student": stage, "param_persistence_threshold": 0},
                },
            }
        )
        world = world or engine.start(config.engine)
        dtype = getattr(torch, dtype_name)
        student = engine.Network("student", make(dtype), Backbone, config, world)
        plain = make(dtype)
        shards = range(accumulation * world.size)
        for shard in shards:
            loss = chain_loss(lambda x, t, cond, m=plain, d=dtype: Backbone.predict(m, x, t, cond, d), shard)
            (loss / len(shards)).backward()
        for micro_batch in range(accumulation):
            student.backward(chain_loss(student, micro_batch * world.size + world.rank))
            if micro_batch + 1 < accumulation:
                assert student.step() is None
        difference = size = 0.0
        for ours, theirs in zip(student.module.parameters(), plain.parameters(), strict=True):
            if theirs.grad is not None:
                full = deepspeed.utils.safe_get_full_grad(ours).double()
                difference += float((full - theirs.grad.double()).square().sum())
                size += float(theirs.grad.double().square().sum())
        step = student.step()
        norm_error = abs(step.gradient_norm / size**0.5 - 1)

        # A loss that breaks on one process must stop the update on all, and leave no trace.
        before = student.full_state_dict()
        for micro_batch in range(accumulation):
            loss = chain_loss(student, micro_batch)
            student.backward(loss * torch.nan if world.rank == 0 else loss)
            broken = student.step()
        after = student.full_state_dict()
        unchanged = not world.main or all(torch.equal(before[name], after[name]) for name in before)
        for micro_batch in range(accumulation):
            student.backward(chain_loss(student, micro_batch))
            recovered = student.step()
        results[
            f"stage {stage}, {dtype_name}, accumulation {accumulation}, checkpointing {checkpointing}, fused {fused}"
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
