"""For drivers that compare gradients: what a Network has of a parameter's, put together from all processes."""

import deepspeed
import torch
import torch.distributed as dist


def full_gradient(network, parameter):
    """The mean over the processes, whole, after the backward passes and before the step."""
    gradients = getattr(network, "_gradients", None)
    if gradients is None:
        return deepspeed.utils.safe_get_full_grad(parameter)
    for unit in gradients._units:
        start = unit.offset
        for each, size in zip(unit.parameters, unit.sizes, strict=True):
            if each is parameter:
                pieces = [torch.empty(size, dtype=gradients.flat.dtype) for _ in range(dist.get_world_size())]
                dist.all_gather(pieces, gradients.flat[start : start + size].contiguous())
                return torch.cat(pieces)[: parameter.ds_numel].view(parameter.ds_shape)
            start += size
    raise AssertionError("not a parameter of this network")
