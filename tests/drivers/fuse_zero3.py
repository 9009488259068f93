"""Started by test_fuse_zero3.py in two processes: fused transformers under ZeRO-3, case by case.

Two updates a case, on two processes: outputs and full gradients against the stock module on one, whose weights follow
with the same updates. Every parameter is really sharded, and none stays for the next module that might want it. Prints
one JSON line.
"""

import copy
import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import deepspeed
import small
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from gradients import full_gradient, report, role_of

from dpdmd.config import parse_config
from dpdmd.engine import body, role
from dpdmd.engine.start import start
from dpdmd.kernels.fusion.fuse_transformer import fuse_transformer

LEARNING_RATE = 0.1
ZERO = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_max_live_parameters": 0,
    "stage3_prefetch_bucket_size": 0,
    "memory_efficient_linear": False,
}


class Backbone:
    block_classes = (JointTransformerBlock, FluxTransformerBlock, FluxSingleTransformerBlock)

    @staticmethod
    def predict(module, x, t, cond, dtype=None):
        text, pooled = cond["text"], cond["pooled"]
        tokens = {"img_ids": cond["ids"], "txt_ids": torch.zeros(5, 3)} if "ids" in cond else {}
        return module(
            hidden_states=x,
            timestep=t if "ids" in cond else 1000 * t,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            return_dict=False,
            **tokens,
        )[0]


def make(kind):
    torch.manual_seed(0)
    if kind != "flux":
        qk_norm = "rms_norm" if kind == "sd3.5" else None
        return small.sd3(num_layers=3, qk_norm=qk_norm, dual_attention_layers=(0, 1))
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=8,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 6, 6),
    )


def inputs(kind, shard):
    generator = torch.Generator().manual_seed(shard)
    cond = {"text": torch.randn(2, 5, 16, generator=generator), "pooled": torch.randn(2, 16, generator=generator)}
    if kind == "flux":
        ids = torch.zeros(12, 3)
        ids[:, 1:] = torch.cartesian_prod(torch.arange(3.0), torch.arange(4.0))
        return torch.randn(2, 12, 8, generator=generator), cond | {"ids": ids}
    return torch.randn(2, 4, 8, 8, generator=generator), cond


def chain(network, kind, shard):
    """Two passes that are differentiated at once. Returns (loss, last prediction)."""
    x, cond = inputs(kind, shard)
    x = x - 0.3 * network(x, torch.full((2,), 0.5), cond)
    prediction = network(x, torch.full((2,), 0.25), cond)
    return prediction.square().mean(), prediction.detach()


def distance(x, y):
    return float((x - y).norm() / y.norm())


class PlainEngine:
    """DeepSpeed as another trainer has it: ZeRO-3, with hooks on every module or with leaves by class."""

    def __init__(self, module, world):
        settings = {
            "train_micro_batch_size_per_gpu": 2,
            "train_batch_size": 2 * world.size,
            "gradient_clipping": 0.0,
            "steps_per_print": None,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": ZERO | {"stage": 3},
        }
        optimizer = torch.optim.SGD(module.parameters(), lr=LEARNING_RATE)
        self.engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
        self.module = self.engine.module

    def __call__(self, x, t, cond):
        return Backbone.predict(self.engine, x, t, cond)

    def backward(self, loss):
        self.engine.backward(loss)

    def step(self):
        self.engine.step()


def our_engine(module, world, checkpointing, residency, fp8):
    config = parse_config(
        {
            "prompts": {"file": "unused"},
            "student_optimizer": {"lr": LEARNING_RATE},
            "engine": {
                "device": "cpu",
                "batch_size": 2,
                "clip": 0.0,
                "residency": residency,
                "checkpointing": "selective" if checkpointing else "none",
            },
        }
    )
    # As on a GPU, where it is the engine that fuses: it has to know of FP8 copies.
    fuse, build = body.fuse, role.build_optimizer
    if fp8:
        body.fuse = lambda model, *_: fuse_transformer(model, fp8=fp8, verbose=False)
    else:
        role.build_optimizer = lambda parameters, *_, **__: torch.optim.SGD(parameters, lr=LEARNING_RATE)
    try:
        return role_of("student", module, Backbone, config, world, **({} if fp8 else {"reduced": False}))
    finally:
        body.fuse, role.build_optimizer = fuse, build


def alone(model, tokens):
    return model.transformer_blocks[0](*tokens)


stock_forwards = set()  # ids of the blocks that ran the class's own forward


def note_stock_forwards():
    for cls in Backbone.block_classes:

        def forward(self, *args, original=cls.forward, **kwargs):
            stock_forwards.add(id(self))
            return original(self, *args, **kwargs)

        cls.forward = functools.wraps(cls.forward)(forward)


def run(world, kind, with_engine, fuse, checkpointing=False, fp8=None, residency="phase"):
    stock = make(kind)
    model = copy.deepcopy(stock)
    if fuse == "before":
        assert not fuse_transformer(model, fp8=fp8, verbose=False).left
    if with_engine == "ours":
        network = our_engine(model, world, checkpointing, residency, fp8)
    else:
        if checkpointing:
            model.enable_gradient_checkpointing()
        network = PlainEngine(model, world)
    if fuse == "after":
        assert not fuse_transformer(model, fp8=fp8, verbose=False).left

    def plain(x, t, cond):
        return Backbone.predict(stock, x, t, cond)

    in_fp8 = copy.deepcopy(stock)
    fuse_transformer(in_fp8, fp8=fp8, verbose=False)
    found = {"output": 0.0, "no_grad": 0.0, "around": 0.0, "gradient": 0.0, "kept": 0, "stock": 0}
    blocks = {id(module) for module in model.modules() if isinstance(module, Backbone.block_classes)}
    for update in range(2):
        shards = [10 * update + rank for rank in range(world.size)]
        stock.zero_grad()
        for shard in shards:
            loss, prediction = chain(plain, kind, shard)
            (loss / world.size).backward()
            if shard == shards[world.rank]:
                expected = prediction
        x, cond = inputs(kind, shards[world.rank])
        t = torch.full((2,), 0.5)
        with torch.no_grad():
            in_fp8.load_state_dict(stock.state_dict())
            without = Backbone.predict(in_fp8, x, t, cond)
            if fp8 is None and with_engine == "plain":
                # A block by itself, around the pass of the model in which DeepSpeed gathers whatever is read.
                tokens = [torch.randn(shape) for shape in ((2, 12, 32), (2, 5, 32), (2, 32))]
                for got, expected_part in zip(alone(model, tokens), alone(in_fp8, tokens), strict=True):
                    found["around"] = max(found["around"], distance(got, expected_part))
            stock_forwards.clear()
            found["no_grad"] = max(found["no_grad"], distance(network(x, t, cond), without))
            found["fp8"] = distance(without, plain(x, t, cond))
        if with_engine == "ours":
            network.end_of_phase()
        found["kept"] += sum(parameter.ds_status.name == "AVAILABLE" for parameter in model.parameters())
        loss, prediction = chain(network, kind, shards[world.rank])
        found["output"] = max(found["output"], distance(prediction, expected))
        network.backward(loss)
        found["stock"] += len(stock_forwards & blocks)
        difference = size = 0.0
        for ours, theirs in zip(model.parameters(), stock.parameters(), strict=True):
            gradient = full_gradient(network, ours)
            difference += float((gradient - theirs.grad).square().sum())
            size += float(theirs.grad.square().sum())
        found["gradient"] = max(found["gradient"], (difference / size) ** 0.5)
        network.step()
        if with_engine == "ours" and fp8:  # with the engine's own optimizer: its weights are what is to be followed
            states = [network.full_state_dict()]
            torch.distributed.broadcast_object_list(states, 0)
            stock.load_state_dict(states[0])
            continue
        with torch.no_grad():
            for parameter in stock.parameters():
                parameter -= LEARNING_RATE * parameter.grad
    return found


CASES = {
    "sd3.5, our engine, checkpointing": ("sd3.5", "ours", "before", True),
    "sd3.5, our engine, fused after": ("sd3.5", "ours", "after"),
    "sd3.5, our engine, checkpointing, by block": ("sd3.5", "ours", "before", True, None, "block"),
    "sd3.0, another trainer": ("sd3.0", "plain", "before"),
    "sd3.5, another trainer, fused after, checkpointing": ("sd3.5", "plain", "after", True),
    "sd3.5, our engine, fp8": ("sd3.5", "ours", "engine", False, "no_grad"),
    "sd3.5, our engine, fp8, whole": ("sd3.5", "ours", "engine", False, "no_grad", "whole"),
    "flux, our engine, checkpointing, by block": ("flux", "ours", "before", True, None, "block"),
    "flux, another trainer, fp8": ("flux", "plain", "before", False, "no_grad"),
}


def main():
    config = parse_config({"prompts": {"file": "unused"}, "engine": {"device": "cpu"}})
    world = start(config.engine)
    note_stock_forwards()
    results = {name: run(world, *case) for name, case in CASES.items()}
    report(world, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
