"""For drivers that compare gradients: what a role has of a parameter's, put together from all processes; and the report."""

import json
from dataclasses import replace

import deepspeed
import torch
import torch.distributed as dist

from dpdmd.engine.deepspeed import whole_shape, whole_size
from dpdmd.engine.role import Phases, make
from dpdmd.planner.residency import residencies


def role_of(name, module, backbone, config, world, phases=None, **changes):
    """A role as the trainer makes it; changes: to its residency."""
    residency = replace(residencies(config, world.size)[name], **changes)
    return make(name, module, backbone, config, world, phases or Phases(), residency)


def full_gradient(network, parameter):
    """The mean over the processes, whole, after the backward passes and before the step."""
    gradients = getattr(network, "_gradients", None)
    if gradients is None:
        return deepspeed.utils.safe_get_full_grad(parameter)
    for unit in gradients._units:
        shard = gradients.flat[unit.offset : unit.offset + unit.size]
        for each, place in zip(unit.parameters, unit.places, strict=True):
            if each is parameter:
                pieces = [torch.empty_like(shard[place]) for _ in range(dist.get_world_size())]
                dist.all_gather(pieces, shard[place].contiguous())
                return torch.cat(pieces)[: whole_size(parameter)].view(whole_shape(parameter))
    raise AssertionError("not a parameter of this network")


def report(world, results):
    """Prints each case's numbers, of each the worst that a process has, for the test that started the driver."""
    everyone = world.gather(results)
    if world.main:
        worst = {name: {key: max(each[name][key] for each in everyone) for key in results[name]} for name in results}
        print("RESULT " + json.dumps(worst), flush=True)
