"""Started by test_lora_zero3.py in two processes: three roles on a base that ZeRO-3 shards, against the same
adapters on the stock modules of one process, in float32: outputs, and the gradients of one role's adapter, before and
after an update. Prints RESULT and a JSON object."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from fuse_zero3 import Backbone, distance, inputs, make
from gradients import full_gradient, report

from dpdmd.config import ROLES, parse_config
from dpdmd.engine import roles as engine
from dpdmd.engine.lora import adapter_parameters, load_adapter, save_adapter, use

LEARNING_RATE = 0.1


def give_values(model):
    """B of an adapter is 0 at first, and half of the gradients with it."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for role in ("student", "critic"):
            for parameter in adapter_parameters(model, role).values():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def loss_of(network, kind, shard):
    x, cond = inputs(kind, shard)
    t = torch.full((2,), 0.5)
    return network(x - 0.3 * network(x, t, cond), t / 2, cond).square().mean()


def run(world, kind, residency, checkpointing, folder):
    config = parse_config(
        {
            "prompts": {"file": "unused"},
            "lora": {"rank": 3, "alpha": 5.0},
            "student_optimizer": {"lr": LEARNING_RATE},
            "critic_optimizer": {"lr": LEARNING_RATE},
            "engine": {
                "device": "cpu",
                "batch_size": 2,
                "clip": 0.0,
                "residency": residency,
                "checkpointing": checkpointing,
            },
        }
    )
    base = engine.Base(make(kind), Backbone, config, world)
    give_values(base.transformer)
    stock = copy.deepcopy(base.transformer)
    for block in stock.modules():
        block.__dict__.pop("forward", None)  # the class's own, neither fused nor checkpointed
    phases = engine.Phases()
    networks = {role: engine.Network(role, base, Backbone, config, world, phases) for role in ROLES}
    base.shard(config, world)

    def plain(role):
        def network(x, t, cond):
            use(stock, role)
            return Backbone.predict(stock, x, t, cond)

        return network

    found = {"fused": sum(base.fusion.replaced.values()), "output": 0.0, "gradient": 0.0, "after": 0.0}
    found["sharded"] = sum(parameter.numel() == 0 for parameter in base.transformer.parameters())
    for role in ("critic", "teacher", "student"):
        x, cond = inputs(kind, world.rank)
        t = torch.full((2,), 0.5)
        with torch.no_grad():
            error = distance(networks[role](x, t, cond), plain(role)(x, t, cond))
        found["output"] = max(found["output"], error)

    student = networks["student"]
    expected = adapter_parameters(stock, "student")
    for update in range(2):
        shards = [10 * update + rank for rank in range(world.size)]
        for shard in shards:
            (loss_of(plain("student"), kind, shard) / world.size).backward()
        loss = loss_of(student, kind, shards[world.rank])
        with torch.no_grad():  # whatever runs before the backward pass, a checkpointed block runs again as the student
            x, cond = inputs(kind, 5)
            networks["critic"](x, t, cond)
            networks["teacher"](x, t, cond)
        student.backward(loss)
        difference = size = 0.0
        for name, parameter in adapter_parameters(base.transformer, "student").items():
            gradient = full_gradient(student, parameter)
            difference += float((gradient - expected[name].grad).square().sum())
            size += float(expected[name].grad.square().sum())
        found["gradient"] = max(found["gradient"], (difference / size) ** 0.5)
        assert student.step().applied
        phases.end()
        # The stock student takes the weights that the update made, and both go on from there.
        state = student.full_state_dict()
        states = [state]
        torch.distributed.broadcast_object_list(states, 0)
        with torch.no_grad():
            for name, parameter in expected.items():
                parameter.copy_(states[0][name])
                parameter.grad = None
        with torch.no_grad():
            found["after"] = max(found["after"], distance(student(x, t, cond), plain("student")(x, t, cond)))

    if world.main:
        save_adapter(base.transformer, "student", folder, state)
    world.barrier()
    load_adapter(stock, "critic", folder)
    with torch.no_grad():
        found["loaded"] = distance(student(x, t, cond), plain("critic")(x, t, cond))
    # What stays whole between phases: nothing of the adapters, and of a base by block only what is outside the blocks.
    phases.end()
    found["adapters_left"] = sum(p.numel() for p in base.transformer.parameters() if p.requires_grad)
    return found


def main():
    engine.FUSED_ON, engine.why_not = ("cpu",), lambda *device: ""  # the fused operations' reference
    world = engine.start(parse_config({"prompts": {"file": "unused"}, "engine": {"device": "cpu"}}).engine)
    folder = Path(next(argument for argument in sys.argv[1:] if not argument.startswith("--")))
    cases = {
        "sd3.5": ("sd3.5", "phase", "none"),
        "sd3.5, by block, checkpointing": ("sd3.5", "block", "selective"),
        "flux, checkpointing": ("flux", "phase", "selective"),
        "flux, by block, full checkpointing": ("flux", "block", "full"),
    }
    results = {name: run(world, *case, folder / case[0]) for name, case in cases.items()}
    report(world, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
