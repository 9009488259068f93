"""Adapters on a base that ZeRO-3 shards, in each role, against the same model on one process: outputs, and the gradients
of one role's adapter, in float32. Prints RESULT and a JSON object."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import deepspeed
import torch
from fuse_zero3 import ZERO, Backbone, distance, inputs, make

from dpdmd import engine
from dpdmd.config import parse_config
from dpdmd.kernels import fuse_transformer, selective_checkpoint
from dpdmd.lora import adapter_parameters, add_adapters, load_adapter, remember_role, save_adapter, use


def adapted(kind):
    model = make(kind)
    add_adapters(model, rank=3, alpha=5.0, seed=7)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for role in ("student", "critic"):
            for parameter in adapter_parameters(model, role).values():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def predict(model, kind, shard):
    x, cond = inputs(kind, shard)
    # With a frozen base nothing before the first block has a gradient, and DeepSpeed would release that block's weights
    # before its backward pass reads them.
    x.requires_grad_()
    return Backbone.predict(model, x, torch.full((2,), 0.5), cond)


def recompute(model, block):
    forward, parameters = block.forward, list(block.parameters())

    def again(*args, **kwargs):
        return selective_checkpoint(remember_role(model, forward), *args, parameters=parameters, **kwargs)

    block.forward = again


def run(world, kind, checkpointing, folder):
    stock, model = adapted(kind), adapted(kind)
    assert not fuse_transformer(model, verbose=False).left
    blocks = [block for block in model.modules() if isinstance(block, Backbone.block_classes)]
    for block in blocks:
        # A leaf is gathered as a whole, in whichever role; hooks on every module would find other ones at work in each.
        engine._LeafBlock(block)
        if checkpointing:
            recompute(model, block)
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "train_batch_size": 2 * world.size,
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": ZERO | {"stage": 3},
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    network, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(trained, lr=0.1), config=settings)

    found = {"output": 0.0, "sharded": sum(parameter.numel() == 0 for parameter in model.parameters())}
    for role in ("critic", "teacher", "student"):
        with torch.no_grad():
            use(stock, role)
            use(model, role)
            error = distance(predict(network, kind, world.rank), predict(stock, kind, world.rank))
        found["output"] = max(found["output"], error)

    for shard in range(world.size):
        (predict(stock, kind, shard).square().mean() / world.size).backward()
    loss = predict(network, kind, world.rank).square().mean()
    if checkpointing:
        with torch.no_grad():
            use(model, "teacher")
            predict(network, kind, world.rank)
    network.backward(loss)
    difference = size = 0.0
    expected = adapter_parameters(stock, "student")
    for name, parameter in adapter_parameters(model, "student").items():
        gradient = deepspeed.utils.safe_get_full_grad(parameter)
        difference += float((gradient - expected[name].grad).square().sum())
        size += float(expected[name].grad.square().sum())
    found["gradient"] = (difference / size) ** 0.5

    # To disk and back, with the parameters gathered.
    own = adapter_parameters(model, "student")
    with deepspeed.zero.GatheredParameters(list(own.values())):
        state = {name: parameter.detach().clone() for name, parameter in own.items()}
    if world.main:
        save_adapter(model, "student", folder, state)
    world.barrier()
    others = list(adapter_parameters(model, "critic").values())
    with deepspeed.zero.GatheredParameters(others, modifier_rank=0):
        load_adapter(model, "critic", folder)
    use(model, "critic")
    with torch.no_grad():
        use(stock, "student")
        found["loaded"] = distance(predict(network, kind, world.rank), predict(stock, kind, world.rank))
    return found


def main():
    config = parse_config({"prompts": {"file": "unused"}, "engine": {"device": "cpu"}})
    world = engine.start(config.engine)
    cases = {"sd3.5": ("sd3.5", False), "sd3.5, checkpointing": ("sd3.5", True), "flux, checkpointing": ("flux", True)}
    results = {name: run(world, *case, Path(sys.argv[-1]) / case[0]) for name, case in cases.items()}
    everyone = world.gather(results)
    if world.main:
        worst = {name: {key: max(each[name][key] for each in everyone) for key in results[name]} for name in results}
        print("RESULT " + json.dumps(worst), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
