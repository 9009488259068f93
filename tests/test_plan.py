"""The planner against numbers made by hand, against what was measured on GPUs, and from its command line."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dpdmd import plan, trainer
from dpdmd.backbones import flux, load_backbone
from dpdmd.config import CONFIG_FOLDER, ConfigError, KeptPassesConfig, LoraConfig, load_config, parse_config
from dpdmd.engine.optimizer import STATE_BYTES
from dpdmd.kernels import fuse_transformer
from dpdmd.kernels.runtime.backend import shapes_only, use_backend
from dpdmd.planner import footprint, search, speed
from dpdmd.planner.cycle import Chain
from dpdmd.planner.footprint import Block, Footprint, Footprints, Meter, Pass, Work, measure
from dpdmd.planner.memory import GIB, Memory
from dpdmd.planner.plan import plan_of
from dpdmd.planner.residency import residencies
from dpdmd.planner.speed import gathers, seconds, traffic

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MEDIUM, FLUX = "stabilityai/stable-diffusion-3.5-medium", "black-forest-labs/FLUX.1-dev"


def backbone_of(pipeline, family="sd3", length=256):
    model = {"pipeline": pipeline, "family": family, "random_init": True, "max_sequence_length": length}
    return load_backbone(parse_config({"model": model, "prompts": {"file": "x"}}).model)


@pytest.fixture(scope="module")
def medium():
    return Footprints(backbone_of(MEDIUM))


def configured(*settings, file="sd35_medium.yaml"):
    return load_config(CONFIG_FOLDER / file, ["engine.checkpointing=auto", *settings])


# By hand

BLOCK = Block(
    *(100, 100),
    {"none": Pass(50, 50, 70), "selective": Pass(20, 60, 75), "full": Pass(10, 60, 70)},
    *(Work(gemm=66e12, attention=48e12, bytes=26e11), Work(gemm=132e12, attention=114e12, bytes=52e11)),
)
BY_HAND = Footprint(
    blocks=[BLOCK, BLOCK],
    outer_parameters=10,
    outer_trained=10,
    outer_kept=4,
    outer=Work(),
    no_grad=30,
    buffers=8,
    largest=60,
    dtype_bytes=2,
    fp8_bytes=0,
)


class ByHand(Footprints):
    """Three networks alike, of 210 parameters in bfloat16."""

    def __init__(self, whole=BY_HAND):
        self.backbone = SimpleNamespace(text_shapes={"prompt_embeds": (3, 5)}, attention_shapes=lambda: [(64, 7)])
        self._whole = whole

    def of(self, config, role, batch):
        return self._whole.scaled(batch / 4)


def by_hand(*settings):
    settings = ["model.random_init=true", "run.sample_every=0", "engine.checkpointing=none", *settings]
    config = load_config(CONFIG_FOLDER / "sd35_medium.yaml", settings)
    if config.engine.residency == "auto":
        config = search.with_engine(config, residency="phase")
    return config


def parts(phases, name):
    (found,) = [phase for phase in phases if phase.name == name]
    return found.parts


def test_a_chain_of_one_pass_by_hand():
    chain = Chain(BY_HAND, 1, "none", 0)
    assert chain.kept == 2 * 50 + 4
    # In the last block's backward pass: what the first has kept, the outside's 4, its own 70, its own gradients.
    assert chain.backward(held=False, earlier=False) == (50 + 4 + 70, 200)
    # The shard comes when the last block's gradients are complete: in the first block's pass it is there.
    assert chain.backward(held=False, earlier=False, shard=40) == (50 + 4 + 70, 200)
    assert chain.backward(held=False, earlier=False, shard=60) == (4 + 70, 60 + 200)
    # Where they stay, the first block's pass has less kept and the last one's gradients besides: 74 + 420 beats 124 + 220.
    assert chain.backward(held=True, earlier=False) == (4 + 70, 20 + 200 + 200)


def test_a_chain_of_two_passes_by_hand():
    chain = Chain(BY_HAND, 2, "selective", 1)
    assert chain.kept == 50 + 3 * 20 + 2 * 4 and chain.recomputed == 3
    # The first step's gradients, 420, wait; the second pass's, 420, are in autograd's buffers. Fullest where the last
    # block's weights are used for the last time: the first block's 50 and 2 x 4 kept, its own 75 and gradients of 200.
    assert chain.backward(held=False, earlier=True) == (50 + 8 + 75, 420 + 420 + 200)


def test_gradients_are_given_up_block_by_block():
    """Where the first block takes most, its pass finds the second's gradients sent: 420 waited, 200 are gone, and its own
    200 come."""
    wide = replace(BLOCK, passes={"none": Pass(50, 50, 1000)})
    chain = Chain(replace(BY_HAND, blocks=[wide, BLOCK]), 1, "none", 0)
    assert chain.backward(held=False, earlier=True) == (4 + 1000, 420 - 200 + 200)


def test_what_is_always_there_by_hand():
    settings = ["student_optimizer.state=bfloat16", "engine.accumulation=2", "ema.device=same"]
    state = Memory(by_hand(*settings), ByHand(), 4)._persistent()
    assert state["weights"] == 3 * 2 * 210 / 4 + 3 * 8
    assert state["gradients"] == 0  # which are there during an update
    assert state["optimizer"] == (4 + 4) * 210 / 4 + (4 + 8) * 210 / 4
    assert state["ema"] == 4 * 210 / 4
    copies = Memory(by_hand("engine.zero.teacher=0", "critic_optimizer.name=torch"), ByHand(), 4)._persistent()
    assert copies["weights"] == 2 * 2 * 210 / 4 + 2 * 210 + 3 * 8
    assert copies["gradients"] == 2 * 210 / 4  # the critic's, which DeepSpeed keeps
    assert copies["optimizer"] == 2 * 12 * 210 / 4
    rounded = Memory(by_hand("model.teacher_storage=float8"), ByHand(), 4)._persistent()
    assert rounded["weights"] == (2 * 2 + 1 + 4 / 128) * 210 / 4 + 3 * 8


def test_offload_by_hand():
    offloaded = Memory(by_hand("engine.offload=cpu", "ema.device=cpu"), ByHand(), 16)
    state = offloaded._persistent()
    assert state["optimizer"] == state["gradients"] == state["ema"] == 0
    here = Memory(by_hand(), ByHand(), 16)
    assert state["buffers"] - here._persistent()["buffers"] == 2 * 2 * 5e8  # a bucket of DeepSpeed's for each role
    assert offloaded._reducing("critic") == 2 * 210  # its copy; ours: three blocks' gradients
    assert here._reducing("critic") == 3 * 2 * 100
    named = Memory(by_hand("critic_optimizer.name=torch"), ByHand(), 16)  # DeepSpeed reduces, without a lasting bucket
    assert named._persistent()["buffers"] == here._persistent()["buffers"]
    assert named._reducing("critic") == 2 * 2 * 210
    host = offloaded.host()  # of a machine with 8 of the 16 processes
    assert host["masters, moments and gradients"] == 16 * 2 * 210 / 2
    assert host["average of the student"] == 4 * 210 / 2
    assert host["export: the student's weights"] == 2 * 210
    assert host["checkpoint: a copy of masters and moments"] == (2 * (4 + 8) + 4) * 210 / 2  # the average's too
    smaller = Memory(by_hand("student_optimizer.state=bfloat16", "ema.device=same"), ByHand(), 16).host()
    assert smaller["checkpoint: a copy of masters and moments"] == ((4 + 4) + (4 + 8) + 4) * 210 / 2
    once = Memory(by_hand("run.checkpoint_every=0"), ByHand(), 16).host()  # at the end, when nothing waits for it
    assert "checkpoint: a copy of masters and moments" not in once


@pytest.mark.parametrize(
    "residency, rollout, score, backward",
    [
        ("whole", 3 * 420, 3 * 420, 3 * 420),
        ("phase", 420, 2 * 420, 420),
        # What is outside the blocks, and two blocks of the network at work
        ("block", 20 + 400, 40 + 400, 20 + 400),
    ],
)
def test_gathered_weights_by_hand(residency, rollout, score, backward):
    memory = Memory(by_hand(f"engine.residency={residency}"), ByHand(), 4)
    assert parts(memory.critic_phases(), "critic update, student's rollout")["gathered"] == rollout
    assert parts(memory.student_phases(), "student update, chain and score")["gathered"] == score
    assert parts(memory.student_phases(), "student update, chain's backward")["gathered"] == backward
    alone = Memory(by_hand(f"engine.residency={residency}"), ByHand(), 1)
    assert all(phase.parts["gathered"] == 0 for phase in (*alone.critic_phases(), *alone.student_phases()))


def test_a_teacher_kept_in_float8_is_whole_in_its_phases():
    rounded = by_hand("model.teacher_storage=float8", "engine.residency=whole")
    alone, four = (Memory(rounded, ByHand(), gpus) for gpus in (1, 4))
    assert parts(alone.student_phases(), "student update, chain and score")["gathered"] == 420
    assert parts(alone.student_phases(), "student update, chain's backward")["gathered"] == 0
    assert parts(four.student_phases(), "student update, chain and score")["gathered"] == 3 * 420
    assert parts(four.student_phases(), "student update, chain's backward")["gathered"] == 2 * 420
    sent = traffic(rounded, ByHand(), 4)["gathered"]
    assert sent == 3 / 4 * 210 * ((1 + 5) * 2 + 2 * (1 + 4 / 128))


@pytest.mark.parametrize(
    "settings, gpus, replayed",
    [
        ((), 1, {"teacher", "student", "critic"}),
        (("model.teacher_storage=float8",), 1, {"student", "critic"}),
        (("engine.zero.teacher=0", "engine.residency=phase"), 4, {"teacher"}),
        (("engine.residency=whole",), 4, {"teacher", "student", "critic"}),
        (("engine.residency=phase",), 4, set()),
        (("engine.residency=phase", "lora.rank=4"), 4, {"teacher"}),  # adapters are given back, the base stays
        (("engine.residency=block", "lora.rank=4"), 4, set()),
        (("engine.cuda_graphs=false",), 1, set()),
    ],
)
def test_graphs_are_kept_where_weights_stay(settings, gpus, replayed):
    config = by_hand(*settings)
    assert {role for role, each in residencies(config, gpus).items() if each.replayed} == replayed
    with_them = Memory(config, ByHand(), gpus).critic_phases()
    without = Memory(by_hand(*settings, "engine.cuda_graphs=false"), ByHand(), gpus).critic_phases()
    most = 60 if "teacher" in replayed else 30 if replayed else 0  # the teacher's batch is twice the others'
    assert [a.total - b.total for a, b in zip(with_them, without, strict=True)] == pytest.approx([most] * 3)
    assert [phase.allocated for phase in with_them] == [phase.allocated for phase in without]


@pytest.mark.parametrize("residency", ["whole", "phase", "block"])
def test_roles_on_one_base_by_hand(residency):
    """Of 210 parameters 20 are a role's adapter: 10 in each block."""
    adapted = replace(BY_HAND, blocks=[replace(BLOCK, trained=10)] * 2, outer_trained=0)
    config = by_hand("lora.rank=4", f"engine.residency={residency}")
    memory = Memory(config, ByHand(adapted), 4)
    assert memory._persistent()["weights"] == 2 * (190 + 2 * 20) / 4 + 8
    base = {"whole": 2 * 190, "phase": 2 * 190, "block": 2 * (10 + 2 * 100)}[residency]
    adapters = 2 * 40 * (residency == "whole")  # those of both roles, which stay
    assert parts(memory.critic_phases(), "critic update, student's rollout")["gathered"] == base + (adapters or 40)
    assert parts(memory.student_phases(), "student update, optimizer")["gathered"] == base + adapters
    assert all(phase.parts["gathered"] == 0 for phase in Memory(config, ByHand(adapted), 1).student_phases())
    sent = traffic(config, ByHand(adapted), 4)["gathered"] / (2 * 3 / 4)
    if residency == "block":  # the blocks of the base in every pass of every role, and in backward passes once more
        assert sent == 180 * (5 * 4 + 4 + 4 + 2 * 5 + 1 + 6) + 20 * (6 + 6)
    else:
        assert sent == 20 * (1 + 5 if residency == "whole" else 6 + 6)


def test_the_students_phases_by_hand():
    phases = Memory(by_hand(), ByHand(), 1).student_phases()
    first = parts(phases, "student update, teacher's rollout")
    assert first["activations"] == 60  # the teacher's batch is twice the student's, for guidance
    assert first["gradients"] == 0
    assert parts(phases, "student update, first step's backward")["gradients"] == 420
    score = parts(phases, "student update, chain and score")
    assert (score["activations"], score["gradients"]) == (3 * 104 + 60, 420)
    # In the last block of the second pass of three: its own, what autograd sums up, the first step's; there is no shard yet.
    fullest = parts(phases, "student update, chain's backward")
    assert (fullest["activations"], fullest["gradients"]) == (104 + 50 + 8 + 70, 200 + 420 + 420)
    assert parts(phases, "student update, optimizer")["gradients"] == 420
    repeated = Memory(by_hand("engine.accumulation=2"), ByHand(), 4).student_phases()
    assert parts(repeated, "student update, teacher's rollout")["gradients"] == 4 * 210 / 4
    unguided = Memory(by_hand("distill.guidance_scale=1"), ByHand(), 1).student_phases()
    assert parts(unguided, "student update, teacher's rollout")["activations"] == 30
    # Not cut off, the first step is part of the chain, and no gradient waits for another.
    config = by_hand("distill.detach=false")
    assert not residencies(config, 1)["student"].in_parts
    phases = Memory(config, ByHand(), 1).student_phases()
    score = parts(phases, "student update, chain and score")
    assert (score["activations"], score["gradients"]) == (4 * 104 + 60, 0)
    drawn = Memory(by_hand("distill.rollout_gradient=random"), ByHand(), 1).student_phases()
    assert parts(drawn, "student update, chain and score")["activations"] == 104 + 60


def test_what_is_sent_by_hand():
    """The counts of gathers are those that test_role.py finds in two processes."""
    settings = ["distill.critic_updates=2", "distill.anchor=2", "distill.teacher_steps=6"]
    counts = {
        residency: gathers(by_hand(*settings, f"engine.residency={residency}"), 2)
        for residency in ("whole", "phase", "block")
    }
    assert {role: each["blocks"] for role, each in counts["whole"].items()} == {"student": 1, "critic": 2, "teacher": 0}
    assert {role: each["blocks"] for role, each in counts["phase"].items()} == {"student": 3, "critic": 3, "teacher": 2}
    assert {role: each["blocks"] for role, each in counts["block"].items()} == {
        "student": 16,
        "critic": 5,
        "teacher": 3,
    }
    assert {role: each["outer"] for role, each in counts["block"].items()} == {"student": 3, "critic": 3, "teacher": 2}
    sent = traffic(by_hand(*settings), ByHand(), 4)
    assert sent == {"gathered": 8 * 420 * 3 / 4, "reduced": 3 * 420 * 3 / 4}
    blocks = traffic(by_hand(*settings, "engine.residency=block"), ByHand(), 4)
    assert blocks["gathered"] == 3 / 4 * 2 * (24 * 200 + 8 * 10)
    assert traffic(by_hand(*settings), ByHand(), 1) == {"gathered": 0, "reduced": 0}


def test_seconds_by_hand():
    """A block's forward pass takes 0.1 s of products, 0.1 of attention and 1 of memory; its backward pass twice the
    first and the last, and 0.3 of attention."""
    config = by_hand("engine.checkpointing=selective", "engine.kept_passes.student=1", "engine.kept_passes.critic=2")
    taken = seconds(config, ByHand(), 1)
    assert taken["student's rollouts"] == pytest.approx(5 * 4 * 2 * 1.2)
    assert taken["critic's passes"] == pytest.approx(5 * 2 * (1.2 + 2.5))
    assert taken["teacher's passes"] == pytest.approx(6 * 2 * 2 * 1.2)
    # Of both chains, of 2 and of 6 block passes, one is kept; the others are computed again without attention.
    assert taken["student's passes"] == pytest.approx(8 * (1.2 + 2.5) + (1 + 5) * 1.1)
    # Two of the three steps after the first are evaluated without gradient.
    drawn = by_hand("engine.checkpointing=none", "distill.rollout_gradient=random")
    assert seconds(drawn, ByHand(), 1)["student's rollouts"] == pytest.approx((5 * 4 + 2) * 2 * 1.2)


def test_the_floor_by_hand():
    """Forward passes of a network: 0.132e15 operations in products, 0.096e15 in attention; the backward pass 0.264, 0.228."""
    found = speed.floor(by_hand("engine.checkpointing=full"), ByHand(), 1)
    forwards, backwards = 5 * 4 + 6 * 2 + 1 + 5 + 4, 5 + 4
    assert found["products"] == pytest.approx((forwards * 132e12 + backwards * 264e12) / 764e12)
    assert found["attention"] == pytest.approx(forwards * 96e12 / 480e12 + backwards * 228e12 / 434e12)
    assert found["optimizers"] == pytest.approx(6 * 210 * (4 + 8 + 16) / 4.2e12)


def test_the_floor_of_a_cycle(medium):
    """60 passes of 11.25 TFLOP a sample, 4.5 s at batch 4."""
    found = speed.floor(by_hand(), medium, 1)
    assert found["products"] + found["attention"] == pytest.approx(4.55, abs=0.1)


# What is measured on the meta device


@pytest.fixture(scope="module")
def tiny():
    """SD3.5's kinds of blocks, each twice but for the last."""
    return {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 5,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 40,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 28,
        "pos_embed_max_size": 8,
        "dual_attention_layers": (0, 1),
        "qk_norm": "rms_norm",
    }


class Architecture:
    """As a backbone, of a class and its arguments."""

    def __init__(self, whole, side=16, **values):
        self._values = values
        self._class, self.block_classes, self.predict = whole._class, whole.block_classes, whole.predict
        self.text_shapes = {"prompt_embeds": (7, 40), "pooled_prompt_embeds": (values["pooled_projection_dim"],)}
        self.latent_shape = (16, side, side)

    def transformer_config(self, role):
        return self._values

    def empty_transformer(self, role):
        with torch.device("meta"):
            return self._class.from_config(self._values)


@pytest.fixture(scope="module")
def networks(tiny):
    tiny_flux = {
        "in_channels": 64,
        "num_layers": 3,
        "num_single_layers": 3,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 40,
        "pooled_projection_dim": 20,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 6, 6),
    }
    return {
        "sd3": Architecture(backbone_of(MEDIUM), **tiny),
        "flux": Architecture(backbone_of(FLUX, "flux", 512), **tiny_flux),
    }


@pytest.mark.parametrize("family", ["sd3", "flux"])
@pytest.mark.parametrize("fused", [True, False])
def test_two_blocks_of_a_kind_stand_for_all(networks, family, fused):
    """The whole network, run as it is, keeps what the parts add up to, and does as much."""
    backbone = networks[family]
    measured = measure(backbone, "teacher", 3, torch.bfloat16, fused=fused)
    model = footprint._cast(backbone.empty_transformer("teacher"), torch.bfloat16).eval()
    assert measured.parameters == measured.trained == sum(p.numel() for p in model.parameters())
    if fused:
        fuse_transformer(model, verbose=False)
    arguments = footprint._arguments(backbone, 3, torch.bfloat16)
    with footprint._as_on_a_gpu(), Meter(model, arguments) as meter:
        output = backbone.predict(model, *arguments, torch.bfloat16)
    assert meter.live == measured.outer_kept + sum(block.passes["none"].kept for block in measured.blocks)
    assert meter.work.gemm == measured.forward.gemm and meter.work.attention == measured.forward.attention
    assert output.shape == arguments[0].shape


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_fused_and_stock_networks_multiply_alike(networks, family):
    fused, stock = (measure(networks[family], "teacher", 2, torch.bfloat16, fused=fused) for fused in (True, False))
    assert fused.forward.gemm == stock.forward.gemm and fused.forward.attention == stock.forward.attention
    for mine, its in zip(fused.blocks, stock.blocks, strict=True):
        assert mine.passes["none"].kept < its.passes["none"].kept


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_meta_tensors_keep_what_the_kernels_keep(networks, family, monkeypatch):
    """Size and dtype of all that autograd saves: on the meta device, and where the Triton kernels run (here in their
    interpreter)."""
    if not torch.cuda.is_available() and footprint_runs_no_triton():
        pytest.skip("Triton is not installed")
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")  # which it reads again when a kernel runs
    fewer = {"sd3": {"num_layers": 3, "dual_attention_layers": (0,)}, "flux": {"num_layers": 1, "num_single_layers": 2}}
    values = networks[family].transformer_config("teacher") | fewer[family]
    backbone = Architecture(networks[family], side=4, **values)  # the interpreter takes its time

    def saved(device):
        with torch.device(device):
            model = backbone._class.from_config(backbone.transformer_config("teacher"))
        model = footprint._cast(model, torch.bfloat16).eval()
        fuse_transformer(model, verbose=False)
        with torch.device(device):
            cond = {name: torch.zeros(1, *shape, dtype=torch.bfloat16) for name, shape in backbone.text_shapes.items()}
            x, t = torch.zeros(1, *backbone.latent_shape), torch.full((1,), 0.5)
        there = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}
        kept = {}

        def keep(tensor):
            kept[tensor.untyped_storage()._cdata] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            backbone.predict(model, x, t, cond, torch.bfloat16)
        # By storage: of a product's input one kernel keeps the rows, another the tensor that they are a view of.
        kept = [tensor for storage, tensor in kept.items() if storage not in there]
        return Counter((tensor.untyped_storage().nbytes(), tensor.dtype) for tensor in kept)

    with shapes_only():
        on_meta = saved("meta")
    monkeypatch.setenv("DPDMD_ATTENTION", "triton")  # which is what a meta tensor's attention is, too
    with use_backend("triton"):
        with_kernels = saved("cuda" if torch.cuda.is_available() else "cpu")
    assert on_meta == with_kernels and sum(on_meta.values()) > 30


def footprint_runs_no_triton():
    from dpdmd.kernels.runtime.backend import why_not

    return bool(why_not("triton", "cpu", None))


def test_outside_of_shapes_only_meta_tensors_take_the_reference():
    from dpdmd.kernels import adaln_modulate

    x, vector = torch.empty(2, 5, 16, device="meta", requires_grad=True), torch.empty(2, 16, device="meta")
    with shapes_only():
        fused = adaln_modulate(x, vector, vector).grad_fn
    reference = adaln_modulate(x, vector, vector).grad_fn
    assert "Adaln" in type(fused).__name__ and "Adaln" not in type(reference).__name__


def test_a_meter_counts_storages_once_and_while_they_live():
    there = torch.empty(10, device="meta")
    with Meter([there]) as meter:
        a = there + 1
        view = a.view(2, 5).t()
        assert meter.live == 40
        b = view @ torch.empty(2, 3, device="meta")
        assert meter.live == meter.peak - 24 == 40 + 60
        del a
        assert meter.live == 100  # the view holds it
        del view
        assert meter.live == 60 and b.shape == (5, 3)
        assert meter.work.gemm == 2 * 5 * 2 * 3


def test_memory_is_in_proportion_to_the_batch(networks):
    """Up to sums over samples: gradients of biases, of which a tiny network has as many as a large one."""
    backbone = networks["sd3"]
    four, eight = (measure(backbone, "teacher", batch, torch.bfloat16, fused=True) for batch in (16, 32))
    scaled = four.scaled(2)
    assert scaled.no_grad == pytest.approx(eight.no_grad, rel=0.01)
    assert scaled.outer_kept == pytest.approx(eight.outer_kept, rel=0.01)
    for mine, its in zip(scaled.blocks, eight.blocks, strict=True):
        for how, each in mine.passes.items():
            assert each.kept == pytest.approx(its.passes[how].kept, rel=0.01)
            assert each.backward == pytest.approx(its.passes[how].backward, rel=0.03)
        assert mine.forward.gemm == pytest.approx(its.forward.gemm, rel=1e-3)


def test_checkpoints_keep_inputs_and_attention(medium):
    """Of SD3.5-M's blocks by hand: the outputs, and attention's output with a float32 per query and head."""
    block = medium.of(configured(), "teacher", 4).blocks[13]
    tokens, width, heads = 4096 + 333, 1536, 24
    outputs = 4 * tokens * width * 2
    padded = -(-tokens // 128) * 128
    assert block.passes["full"].kept == outputs
    assert block.passes["selective"].kept == outputs + 4 * tokens * width * 2 + 4 * heads * padded * 4


def test_work_is_what_was_counted_by_hand(medium):
    """By hand: 7.02 TFLOP of products and 4.23 of attention for one sample; a backward pass has twice and 2.5 times that."""
    network = medium.of(configured(), "teacher", 4)
    assert network.parameters == 2_243_171_520 and network.buffers == 384**2 * 1536 * 2
    assert network.forward.gemm / 4e12 == pytest.approx(7.02, abs=0.01)
    assert network.forward.attention / 4e12 == pytest.approx(4.23, abs=0.01)
    for block in network.blocks:
        assert block.backward.gemm == pytest.approx(2 * block.forward.gemm, rel=0.01)
        assert block.backward.attention == 2.5 * block.forward.attention


def test_fp8_copies_are_as_large_as_measured(medium):
    network = medium.of(configured("model.fp8=no_grad"), "teacher", 4)
    rows = json.loads((RESULTS / "transformer.json").read_text())["transformer"]
    (measured,) = [
        row["weights_bytes"] for row in rows if row.get("size") == "sd35 forward b4" and "weights_bytes" in row
    ]
    assert network.fp8_bytes == pytest.approx(measured, rel=0.02)


def test_adapters(networks):
    backbone = networks["sd3"]
    whole = measure(backbone, "teacher", 2, torch.bfloat16, fused=True)
    adapted = measure(backbone, "teacher", 2, torch.bfloat16, fused=True, lora=LoraConfig(rank=4, targets=["to_q"]))
    # A (4, 32) and B (32, 4) for each of the five blocks, and for the second attention of two of them
    assert adapted.trained == 7 * 2 * 4 * 32 and adapted.parameters == whole.parameters + adapted.trained
    assert adapted.outer_trained == 0
    assert adapted.blocks[0].backward.gemm < whole.blocks[0].backward.gemm


# What was measured on GPUs


def rows():
    for file in ("transformer.json", "transformer_checkpointing.json", "transformer_flux.json"):
        for row in json.loads((RESULTS / file).read_text())["transformer"]:
            if row.get("kept_bytes") and row["implementation"] != "compiled":
                yield pytest.param(row, id=f"{file} {row['size']} {row['implementation']}")


@pytest.fixture(scope="module")
def measured_networks():
    """By family and whether they are fused. FLUX has 4 double and 8 single blocks there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(flux.KNOWN, FLUX, flux.KNOWN[FLUX] | {"num_layers": 4, "num_single_layers": 8})
        backbones = {"sd35": backbone_of(MEDIUM), "flux": backbone_of(FLUX, "flux", 512)}
    found = {}

    def network(family, fused):
        if (family, fused) not in found:
            found[family, fused] = measure(backbones[family], "teacher", 4, torch.bfloat16, fused=fused)
        return found[family, fused]

    return network


@pytest.mark.parametrize("row", list(rows()))
def test_a_training_pass_takes_what_was_measured(row, measured_networks):
    """Forward and backward pass of one network on an H100, gradients left with the parameters."""
    family, _, batch, *checkpointing = row["size"].split()
    how = "none" if not checkpointing else "selective" if row["implementation"] == "fused_selective" else "full"
    network = measured_networks(family, row["implementation"].startswith("fused")).scaled(int(batch[1:]) / 4)
    chain = Chain(network, 1, how, 0)
    assert chain.kept == pytest.approx(row["kept_bytes"], rel=0.02)
    assert sum(chain.backward(held=True, earlier=False)) == pytest.approx(row["peak_bytes"], rel=0.07)


def cycles():
    """Runs of benchmarks/cycle.py: torch.cuda.max_memory_allocated of whole cycles with random weights."""
    for file in sorted(RESULTS.glob("cycle_*.json")):
        results = json.loads(file.read_text())
        for name, run in results.get("contenders", {"ours": results}).items():
            # ZeRO stage 0 was measured before student and critic were always sharded.
            if "predicted_peak_gib" in run and run["config"]["engine"]["zero"]["student"] == 3:
                yield pytest.param(results["processes"], run, id=f"{file.stem} {name}")


@pytest.mark.parametrize("processes, run", list(cycles()))
def test_a_cycle_takes_what_was_measured(processes, run, monkeypatch):
    monkeypatch.chdir(ROOT)  # one of the architectures is benchmarks/six_blocks
    monkeypatch.setattr(speed, "NVME", 1.55e9)  # the disk's, as dd read and wrote it there past the page cache
    config = parse_config(run["config"])
    found = plan_of(config, Footprints(plan.architecture_only(config)), processes, 140 * GIB)
    assert found.peak / GIB == pytest.approx(run["peak_allocated_gib"], rel=0.1)
    assert found.cycle == pytest.approx(run["seconds_a_cycle"], rel=0.2)


def test_enough_cycles_were_measured():
    peaks = {round(each.values[1]["peak_allocated_gib"], 2) for each in cycles()}
    families = {each.values[1]["config"]["model"]["family"] for each in cycles()}
    assert len(peaks) >= 5 and families == {"sd3", "flux"}


# More is more


def test_memory_and_time_grow_with_what_they_depend_on(medium):
    def peak(*settings, gpus=8):
        config = by_hand("engine.residency=phase", *settings)
        return plan_of(config, medium, gpus, 80 * GIB)

    assert peak(gpus=8).needed > peak(gpus=16).needed > peak(gpus=64).needed
    plans = [peak(f"engine.residency={residency}") for residency in ("whole", "phase", "block")]
    assert plans[0].needed > plans[1].needed > plans[2].needed
    assert sum(plans[0].traffic.values()) < sum(plans[1].traffic.values()) < sum(plans[2].traffic.values())
    states = [peak(f"student_optimizer.state={state}", gpus=1).needed for state in STATE_BYTES]
    assert states[0] > states[1] > states[2]
    # DeepSpeed reduces under offload: the student's first step is part of the chain.
    chain = ("engine.checkpointing=full", "distill.detach=false")
    assert peak("engine.offload=cpu", *chain).needed < peak(*chain).needed
    assert peak("model.teacher_storage=float8").needed < peak().needed < peak("ema.device=same").needed
    assert peak("engine.offload=cpu").cycle > peak().cycle
    assert peak("engine.batch_size=2").needed < peak("engine.batch_size=4").needed
    ways = [peak(f"engine.checkpointing={how}") for how in footprint.CHECKPOINTING]
    assert ways[0].needed > ways[1].needed > ways[2].needed and ways[0].cycle < ways[1].cycle < ways[2].cycle
    kept = [peak("engine.checkpointing=selective", f"engine.kept_passes.student={n}") for n in (0, 10, 24, 30, 72)]
    assert all(fewer.needed < more.needed and fewer.cycle > more.cycle for fewer, more in itertools.pairwise(kept))
    assert peak("lora.rank=64").needed < peak().needed


def test_a_larger_share_of_a_transfer_shows_between_machines(medium):
    inside, between = (plan_of(by_hand(), medium, gpus, 80 * GIB).seconds["communication"] for gpus in (8, 16))
    assert between > 4 * inside


# What auto becomes


def test_without_a_gpu_nothing_is_judged():
    settled, found = search.resolve(load_config(None), None, 2, None)
    engine = settled.engine
    assert (engine.residency, engine.checkpointing) == ("phase", "none")
    assert engine.kept_passes == KeptPassesConfig(student=0, critic=0)
    assert found.fits and found.possible and found.peak == 0 and "phase" in found.summary()
    fixed = load_config(None, ["engine.residency=block", "engine.checkpointing=full", "engine.kept_passes.critic=3"])
    settled, _ = search.resolve(fixed, None, 2, None)
    assert (settled.engine.residency, settled.engine.checkpointing) == ("block", "full")
    assert settled.engine.kept_passes == KeptPassesConfig(student=0, critic=3)


def test_as_many_passes_are_kept_as_fit(medium):
    planner = search.Planner(medium, 8, 80 * GIB)
    found = planner.resolve(configured())
    kept = found.config.engine.kept_passes
    assert found.fits and found.config.engine.checkpointing == "selective"
    assert 0 < kept.student < 72 and kept.critic == 24
    more = search._with_kept(found.config, "student", kept.student + 1)
    assert not planner.plan(more).fits
    # What is given stays.
    given = planner.resolve(configured("engine.residency=block", "engine.kept_passes.student=5"))
    assert given.config.engine.residency == "block" and given.config.engine.kept_passes.student == 5


def test_with_memory_to_spare_nothing_is_computed_twice(medium):
    found = search.Planner(medium, 8, 200 * GIB).resolve(configured())
    assert (found.config.engine.residency, found.config.engine.checkpointing) == ("whole", "none")
    found = search.Planner(medium, 1, 1000 * GIB).resolve(configured())
    assert (found.config.engine.residency, found.config.engine.checkpointing) == ("whole", "none")


def test_less_memory_is_less_of_everything(medium):
    def choice(gib):
        engine = search.Planner(medium, 8, gib * GIB).resolve(configured()).config.engine
        return engine.kept_passes.student, engine.kept_passes.critic

    wide, narrow = choice(80), choice(40)
    assert wide[0] > narrow[0] and wide[1] >= narrow[1]
    small = search.Planner(medium, 8, 34 * GIB).resolve(configured())
    assert small.fits and small.config.engine.residency == "block"


def test_what_cannot_fit_is_refused_with_what_would(medium):
    with pytest.raises(ConfigError) as caught:
        search.resolve(configured(), medium.backbone, 1, 72 * GIB)
    message = str(caught.value)
    assert "this needs " in message and "1 GPU of 72.0 GiB" in message
    assert "student_optimizer.state=float8 critic_optimizer.state=float8 would fit (" in message
    assert "engine.offload=cpu would fit" in message and "lora" not in message

    def refusal(gpus, gib, *settings):
        config, planner = configured(*settings), search.Planner(medium, gpus, gib * GIB)
        return search.refusal(config, planner.resolve(config), planner)

    # A setting that was chosen too large can be left open.
    assert " engine.checkpointing=auto would fit (" in refusal(8, 80, "engine.checkpointing=none")
    assert "; lora.rank=64 would fit (" in refusal(1, 20)
    assert "a smaller model is needed" in refusal(1, 3)
    assert "such GPUs would do" in refusal(1, 10, "lora.rank=64")


def test_tight_runs_are_not_refused(medium):
    """Between what torch will allocate and what is good to have lies a reserve."""
    config = by_hand("engine.checkpointing=selective", "engine.kept_passes.critic=24", "engine.kept_passes.student=0")
    needed = plan_of(config, medium, 1, None).needed
    settled, found = search.resolve(config, medium.backbone, 1, needed - 1 * GIB)
    assert not found.fits and found.possible and "tight" in found.summary()
    assert settled.engine.kept_passes == config.engine.kept_passes
    with pytest.raises(ConfigError):
        search.resolve(config, medium.backbone, 1, needed - 6 * GIB)


def test_train_takes_the_smallest_gpu_of_all_processes(medium, monkeypatch):
    monkeypatch.setattr(trainer, "gpu_bytes", lambda: 81 * GIB)
    world = SimpleNamespace(size=8, device=torch.device("cuda"), gather=lambda value: [value, 80 * GIB, 90 * GIB])
    config, found = trainer.plan_run(configured(), medium.backbone, world)
    assert found.gpu_memory == 80 * GIB and found.config == config and config.engine.residency != "auto"
    world = SimpleNamespace(size=2, device=torch.device("cpu"))
    config, found = trainer.plan_run(configured(), medium.backbone, world)
    assert found.gpu_memory is None and config.engine.residency == "phase"


def test_roles_of_their_own_architecture_are_counted_each(tiny_pipeline):
    class Two(ByHand):
        def of(self, config, role, batch):
            twice = replace(BY_HAND, blocks=[BLOCK] * 4)
            return twice.scaled(batch / 4) if role == "teacher" else super().of(config, role, batch)

    weights = [Memory(by_hand(), footprints(), 1)._persistent()["weights"] for footprints in (ByHand, Two)]
    assert weights[1] - weights[0] == 2 * 200


# The command line


def run(capsys, *arguments):
    code = plan.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_writes_what_load_config_reads(capsys, tmp_path):
    file, output = CONFIG_FOLDER / "sd35_medium.yaml", tmp_path / "planned.yaml"
    code, out, _ = run(capsys, "--config", file, "--gpu-memory", 80, "--gpus", 8, "run.seed=7", "--output", output)
    assert code == 0
    for words in ("2.24 billion parameters", "8 GPUs of 80.0 GiB", "student update, chain's backward", "recommended: ",
                  "a GPU receives", "takes about", "engine.offload=cpu", "By residency and checkpointing"):  # fmt: skip
        assert words in out, words
    written = load_config(output)
    engine = written.engine
    assert written.run.seed == 7 and engine.device == "auto"
    assert "auto" not in (engine.residency, engine.checkpointing) and None not in dict(engine.kept_passes).values()
    assert plan_of(written, Footprints(backbone_of(MEDIUM)), 8, 80 * GIB).fits
    # Its own file is written over, a user's is not.
    assert run(capsys, "--config", output, "--gpus", 8, "--gpu-memory", 80, "--output", output)[0] == 0
    (mine := tmp_path / "mine.yaml").write_text("# mine\nrun: {seed: 3}\n")
    code, _, error = run(capsys, "--config", mine, "--gpu-memory", 80, "--output", mine)
    assert (
        code == 2 and error == f"error: --output {mine}: the file exists and is not this command's: take another name\n"
    )
    assert mine.read_text() == "# mine\nrun: {seed: 3}\n"


def test_the_command_says_what_does_not_fit(capsys, tmp_path):
    file, output = CONFIG_FOLDER / "sd35_large.yaml", tmp_path / "planned.yaml"
    code, out, _ = run(capsys, "--config", file, "--gpus", 1, "--gpu-memory", 15, "--output", output)
    assert code == 1 and "does not fit" in out and "a smaller model is needed" in out and not output.exists()


def test_the_command_plans_for_gpus_wherever_it_runs(capsys):
    """The demo's section for the CPU does not count; and without a GPU here its memory must be given."""
    code, out, _ = run(capsys, "--gpu-memory", 16)
    assert code == 0 and "batch 256 a GPU" in out
    if not torch.cuda.is_available():
        code, _, err = run(capsys)
        assert code == 2 and "--gpu-memory is not given" in err
    assert run(capsys, "--gpu-memory", 16, "--gpus", 0)[::2] == (2, "error: --gpus = 0: 1 or more are needed\n")
    none = run(capsys, "--gpu-memory", 16, "--gpus", "run.seed=7")
    assert none[::2] == (2, "error: --gpus = nothing: 1 or more are needed\n")
    assert "unknown key" in run(capsys, "--gpu-memory", 16, "engine.batchsize=3")[2]


def test_of_several_numbers_of_gpus_there_is_a_line_each(capsys, tmp_path):
    file = CONFIG_FOLDER / "flux_lora.yaml"
    code, out, _ = run(capsys, "--config", file, "--gpu-memory", 80, "--gpus", 1, 8)
    lines = [line.split(" | ") for line in out.splitlines() if not line.startswith("[")]
    assert code == 0 and [line[0] for line in lines[2:]] == ["| 1", "| 8"] and lines[3][2] == "whole"
    both = "--gpus", 1, 8, "--output", tmp_path / "planned.yaml"
    assert "one number is needed" in run(capsys, "--config", file, "--gpu-memory", 80, *both)[2]


@pytest.mark.parametrize("pipeline, family, length", [(MEDIUM, "sd3", 256), (FLUX, "flux", 512)])
def test_a_plan_measures_each_kind_of_block_once(monkeypatch, pipeline, family, length):
    """What takes seconds is measuring, and that is done for few of the blocks and none of the many plans."""
    networks, blocks = [], []
    measure_network, measure_block = footprint.measure, footprint._measure_block
    monkeypatch.setattr(footprint, "measure", lambda *a, **k: networks.append(measure_network(*a, **k)) or networks[-1])
    monkeypatch.setattr(footprint, "_measure_block", lambda *a, **k: blocks.append(1) or measure_block(*a, **k))
    settings = [f"model.pipeline={pipeline}", f"model.family={family}", f"model.max_sequence_length={length}"]
    config = configured(*settings)
    text, _ = plan.report(config, search.Planner(Footprints(backbone_of(pipeline, family, length)), 8, 141 * GIB))
    assert "recommended" in text
    assert len(networks) == 2  # with FP8's products and without
    assert len(blocks) < 0.25 * sum(len(network.blocks) for network in networks)


@pytest.mark.parametrize("file, gpus", [("sd35_medium", 8), ("sd35_large", 8), ("flux_lora", 1), ("flux_lora", 8)])
def test_shipped_configurations_fit_where_they_say(file, gpus):
    config = load_config(CONFIG_FOLDER / f"{file}.yaml")
    found = search.Planner(Footprints(plan.architecture_only(config)), gpus, 79 * GIB).resolve(config)
    assert found.fits


def test_flux_is_trained_as_a_guidance_distilled_model():
    config = load_config(CONFIG_FOLDER / "flux_lora.yaml")
    assert config.distill.guidance_scale == 1 and config.prompts.negative_prompt is None
    assert config.model.embedded_guidance == 3.5 and config.lora is not None
    assert load_config(CONFIG_FOLDER / "sd35_large.yaml").distill.guidance_scale == 3.5
