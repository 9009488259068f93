"""Started by test_role.py in two processes: what three cycles gather under each residency, and their losses.

Prints one JSON line.
"""

import json
import sys
import tempfile
from collections import OrderedDict, defaultdict

import torch.distributed as dist

from dpdmd import trainer as train
from dpdmd.backbones import load_backbone
from dpdmd.config import parse_config
from dpdmd.engine.residency import Traffic, Unit
from dpdmd.engine.start import start

PROMPTS = ["a red ring", "a blue square", "a big green cross", "a yellow circle"]


def run(world, pipeline, residency, folder, storage="full"):
    config = parse_config(
        {
            "model": {"pipeline": pipeline, "resolution": 32, "max_sequence_length": 8, "teacher_storage": storage},
            "prompts": {"file": "unused", "cache_dir": folder},
            "distill": {"teacher_steps": 6, "anchor": 2, "critic_updates": 2},
            "student_optimizer": {"lr": 1e-3},
            "critic_optimizer": {"lr": 1e-3},
            "engine": {"device": "cpu", "batch_size": 1, "residency": residency, "checkpointing": "none"},
            "run": {"output_dir": folder, "iterations": 9},
        }
    )
    trainer = train.build(config, world, load_backbone(config.model), PROMPTS)
    counted = []
    gather = dist.all_gather_into_tensor
    dist.all_gather_into_tensor = lambda *args, **kwargs: counted.append(1) or gather(*args, **kwargs)
    places, finish = defaultdict(set), Unit.finish

    def noted(unit):
        finish(unit)
        places[unit].add(unit.parameters[-1].data_ptr())

    Unit.finish = noted
    cycles, losses = [], []
    for cycle in range(3):
        for network in trainer.networks.values():
            network.traffic.reset()
        counted.clear()
        for iteration in range(3 * cycle, 3 * cycle + 3):
            losses.append(trainer.update(train.role_of(iteration, 2), iteration).numbers()["loss"])
        roles = {role: dict(vars(network.traffic)) for role, network in trainer.networks.items()}
        cycles.append({"roles": roles, "all_gathers": len(counted)})
    dist.all_gather_into_tensor, Unit.finish = gather, finish
    whole = sum(parameter.numel() for network in trainer.networks.values() for parameter in network.module.parameters())
    shard = sum(parameter.ds_tensor.nbytes for parameter in trainer.networks["teacher"].module.parameters())
    stayed = all(len(each) == 1 for each in places.values())
    modules = [module for network in trainer.networks.values() for module in network.module.modules()]
    hooks = sum(len(each._forward_hooks) + len(each._forward_pre_hooks) for each in modules)
    hooks += sum(type(each._parameters) not in (dict, OrderedDict) for each in modules)
    return {"cycles": cycles, "losses": losses, "whole_after": whole, "stayed": stayed, "hooks": hooks}, shard


def main():
    assert vars(Traffic()).keys() == {"network_gathers", "unit_gathers", "gathered_bytes", "reduced_bytes"}
    pipeline = next(argument for argument in sys.argv[1:] if not argument.startswith("--"))
    results = {}
    with tempfile.TemporaryDirectory() as mine:
        world = start(parse_config({"prompts": {"file": "unused"}, "engine": {"device": "cpu"}}).engine)
        folder = world.gather(mine)[0]
        for residency in ("whole", "phase", "block"):
            results[residency], results["shard_bytes"] = run(world, pipeline, residency, folder)
        results["float8"], _ = run(world, pipeline, "whole", folder, "float8")
        dist.barrier()
    if dist.get_rank() == 0:
        print("RESULT " + json.dumps(results), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
