"""Started by test_checkpoint_wrapped.py in two processes: gradients of a model whose blocks `selective_checkpoint`
checkpoints, under each wrapper that shards weights or reduces gradients, against the plain model's without a checkpoint.

A loss runs the model twice before it is differentiated; the gradients of two losses add up. Prints one JSON line.
"""

import functools
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import deepspeed
import small
import torch
import torch.distributed as dist
import torch.utils.checkpoint
from diffusers.models.attention import JointTransformerBlock
from gradients import full_gradient, report
from torch import nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, weight_norm

from dpdmd.config import parse_config
from dpdmd.engine.start import start
from dpdmd.kernels import selective_checkpoint

WIDTH = 8
LOSSES = 2


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp, self.gate = Mlp(), nn.Parameter(torch.ones(WIDTH))

    def forward(self, x, cond):
        return x + self.gate * self.mlp(x * cond)


class Model(nn.Module):
    """As a diffusers transformer calls its blocks once checkpointing is enabled."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.out = nn.Linear(WIDTH, WIDTH)
        self.checkpoint = None

    def forward(self, x, cond):
        for block in self.blocks:
            x = block(x, cond) if self.checkpoint is None else self.checkpoint(block, x, cond)
        return self.out(x)

    @staticmethod
    def inputs(generator):
        return torch.randn(2, 3, WIDTH, generator=generator)


class Sd3(nn.Module):
    """The real one, small, behind the same calls."""

    def __init__(self):
        super().__init__()
        self.transformer = small.sd3()

    @property
    def blocks(self):
        return self.transformer.transformer_blocks

    def forward(self, x, cond):
        text = {"encoder_hidden_states": cond, "pooled_projections": cond.mean(1)}
        return self.transformer(x, timestep=torch.full((len(x),), 500.0), return_dict=False, **text)[0]

    @staticmethod
    def inputs(generator):
        return torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 16, generator=generator)


def make(change):
    torch.manual_seed(0)
    model = Sd3() if change is sd3 else Model()
    change(model)
    return model


def losses(model, inputs):
    """Those of this process."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(LOSSES):
        x, cond = inputs(generator)
        yield model(model(x, cond), cond).float().square().mean()


# What happens to the model before it is wrapped; the plain one has it too.


def as_it_is(model):
    pass


def sd3(model):
    """Another model."""


def half_frozen(model):
    """One layer of each block is trained, as an adapter is."""
    model.requires_grad_(False)
    for block in model.blocks:
        block.mlp.second.requires_grad_()


def parametrized(model):
    for block in model.blocks:
        parametrizations.weight_norm(block.mlp.first)


def replaced_by_hooks(model):
    """A hook before each pass puts a tensor in the place of a weight."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the one above is the newer
        for block in model.blocks:
            weight_norm(block.mlp.first)


# How blocks are checkpointed; what is inside the wrapper's hooks is so before it is wrapped.


def module(model):
    if isinstance(model, Sd3):
        model.transformer.enable_gradient_checkpointing(selective_checkpoint)
    else:
        model.checkpoint = selective_checkpoint


def function(model):
    """Of which nothing is known but the parameters that the block has at the call."""
    model.checkpoint = lambda block, *args: selective_checkpoint(
        lambda *args: block(*args), *args, parameters=block.parameters()
    )


def inside(model):
    """Inside the hooks of what is wrapped, with the parameters that there were at first, as this project's trainer."""
    for block in model.blocks:
        parameters = list(block.parameters())
        block.forward = functools.partial(selective_checkpoint, block.forward, parameters=parameters)


def inside_module(model):
    """The same by torch's wrapper, around a part of the block."""
    for block in model.blocks:
        block.mlp = checkpoint_wrapper(block.mlp, checkpoint_fn=selective_checkpoint)


# Wrappers. Each returns what is called.


def ddp(model, **options):
    return DistributedDataParallel(model, **options)


def ddp_blocks(model):
    for name, block in model.blocks.named_children():
        setattr(model.blocks, name, DistributedDataParallel(block))
    return model


def replicated_blocks(model):
    for block in model.blocks:
        replicate(block)
    return model


def fsdp2(model, parts=("block", "root"), **options):
    shard = functools.partial(fully_shard, mesh=init_device_mesh("cpu", (dist.get_world_size(),)), **options)
    for block in model.blocks:
        if "mlp" in parts:
            shard(block.mlp)
        if "block" in parts:
            shard(block)
    return shard(model)


def fsdp1(model, kinds=(Block, JointTransformerBlock), **options):
    return FullyShardedDataParallel(
        model, auto_wrap_policy=ModuleWrapPolicy(set(kinds)), device_id=torch.device("cpu"), **options
    )


def zero(model, stage, **options):
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": LOSSES,
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, **options},
    }
    return deepspeed.initialize(model=model, optimizer=torch.optim.SGD(model.parameters()), config=settings)[0]


NOTHING_STAYS = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_max_live_parameters": 0,
    "stage3_prefetch_bucket_size": 0,
}
BFLOAT16 = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
WRAPPERS = {
    "ddp": ddp,
    "ddp, unused parameters": functools.partial(ddp, find_unused_parameters=True),
    "ddp of blocks": ddp_blocks,
    "replicated blocks": replicated_blocks,
    "fsdp2": fsdp2,
    "fsdp2, not resharded": functools.partial(fsdp2, reshard_after_forward=False),
    "fsdp2 of the root": functools.partial(fsdp2, parts=()),
    "fsdp2, nested": functools.partial(fsdp2, parts=("mlp", "block")),
    "fsdp2 within blocks, not resharded": functools.partial(fsdp2, parts=("mlp",), reshard_after_forward=False),
    "fsdp2, bfloat16": functools.partial(fsdp2, mp_policy=MixedPrecisionPolicy(**BFLOAT16)),
    "fsdp1": functools.partial(fsdp1, use_orig_params=True),
    "fsdp1, flat": functools.partial(fsdp1, use_orig_params=False),
    "fsdp1 of the root": functools.partial(fsdp1, kinds=(), use_orig_params=True),
    "fsdp1 of the root, flat": functools.partial(fsdp1, kinds=(), use_orig_params=False),
    "fsdp1 within blocks, flat": functools.partial(fsdp1, kinds=(Mlp,), use_orig_params=False),
    "fsdp1, bfloat16": functools.partial(fsdp1, use_orig_params=True, mixed_precision=MixedPrecision(**BFLOAT16)),
    "zero 1": functools.partial(zero, stage=1),
    "zero 2": functools.partial(zero, stage=2),
    "zero 3": functools.partial(zero, stage=3, **NOTHING_STAYS),
    "zero 3, small ones stay whole": functools.partial(zero, stage=3),
}


def gradients(model):
    """{name in the plain model: whole gradient, the mean over the processes} after the backward passes."""
    if isinstance(model, FullyShardedDataParallel):
        # What a step of SGD takes away: FSDP1 shows whole weights, and whole gradients not in each of its forms.
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        torch.optim.SGD(model.parameters(), lr=1.0).step()
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            found = {name: before[name] - parameter.detach() for name, parameter in model.named_parameters()}
    elif isinstance(model, deepspeed.DeepSpeedEngine):
        found = {name: full_gradient(model, parameter) for name, parameter in model.module.named_parameters()}
    else:
        found = {name: parameter.grad for name, parameter in model.named_parameters()}
        found = {name: each.full_tensor() if isinstance(each, DTensor) else each for name, each in found.items()}
    for wrapper in ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "module."):
        found = {name.replace(wrapper, ""): gradient for name, gradient in found.items()}
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def differentiate(model, inputs):
    if not isinstance(model, deepspeed.DeepSpeedEngine):
        for loss in losses(model, inputs):
            loss.backward()
        return
    for number, loss in enumerate(losses(model, inputs), start=1):
        model.backward(loss)
        if number < LOSSES:
            model.step()  # which only counts


def compare(wrap, how, change):
    """The error of all gradients together, and how many parameters have none."""
    plain, model = make(change), make(change)
    differentiate(plain, plain.inputs)
    if how in (inside, inside_module):
        how(model)
        wrapped = wrap(model)
    else:
        wrapped = wrap(model)
        how(model)
    differentiate(wrapped, plain.inputs)
    mean = dist.get_world_size() * (LOSSES if isinstance(wrapped, deepspeed.DeepSpeedEngine) else 1)
    found = gradients(wrapped)
    difference = size = missing = 0.0
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            expected = parameter.grad / mean
            missing += name not in found
            difference += float((found.get(name, 0.0) - expected).square().sum())
            size += float(expected.square().sum())
    return {"error": (difference / size) ** 0.5, "missing": missing}


def case(wrap, how, change):
    """`compare`; how many passes were left to torch's checkpoint; 1 where it was refused in the backward pass."""
    calls, checkpoint = [], torch.utils.checkpoint.checkpoint

    def counted(*args, **kwargs):
        calls.append(kwargs)
        return checkpoint(*args, **kwargs)

    torch.utils.checkpoint.checkpoint = counted
    try:
        return compare(wrap, how, change) | {"left": len(calls), "refused": 0}
    except RuntimeError as error:
        if "neither among its arguments nor among its parameters" not in str(error):
            raise
        return {"error": 0.0, "missing": 0.0, "left": len(calls), "refused": 1}
    finally:
        torch.utils.checkpoint.checkpoint = checkpoint


def main():
    world = start(parse_config({"prompts": {"file": "unused"}, "engine": {"device": "cpu"}}).engine)
    results = {}
    for name, wrap in WRAPPERS.items():
        changes = {
            module: (as_it_is, half_frozen),
            function: (as_it_is,),
            inside: (as_it_is,),
            inside_module: (as_it_is,),
        }
        if wrap in (ddp_blocks, replicated_blocks):
            changes = {module: (half_frozen,)}  # nothing reduces the gradients around the blocks
        if "flat" in name:
            changes[module] = (as_it_is,)  # a flat parameter is trained as a whole
        if name in ("fsdp2", "fsdp1", "zero 3"):
            changes[module] += (parametrized, replaced_by_hooks)
        if name in ("ddp, unused parameters", "fsdp2", "fsdp1", "fsdp1, flat", "zero 3"):
            changes[module] += (sd3,)
        for how in changes:
            for change in changes[how]:
                results[f"{name}: {how.__name__}, {change.__name__}"] = case(wrap, how, change)
    report(world, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
