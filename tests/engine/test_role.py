"""Two real DeepSpeed processes: gradients, and updates that are not finite."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from deepspeed.ops.op_builder import AsyncIOBuilder
from processes import results_of, run_command

from dpdmd.config import ConfigError, load_config, parse_config
from dpdmd.engine.body import fuse
from dpdmd.engine.deepspeed import settings_of
from dpdmd.engine.nvme import load_file_access
from dpdmd.engine.optimizer import AdamW, build_optimizer, learning_rate, restore_step
from dpdmd.engine.start import _let_segments_grow, check, resolve_dtype
from dpdmd.engine.world import resolve_device

DRIVERS = Path(__file__).parents[1] / "drivers"


@pytest.fixture(scope="module")
def results():
    return results_of(DRIVERS / "engine_gradients.py")


@pytest.mark.distributed
def test_gradients_are_those_of_the_plain_module(results):
    """Two processes, chains of forward passes, leaf modules, accumulation, checkpointing: the same full gradient."""
    assert len(results) == 18
    for case, result in results.items():
        assert result["fused"] == (3 if "fused True" in case else 0), case  # two blocks and the last norm
        # bfloat16: sums of three passes in another order; a wrong reduction is off by its whole size.
        assert result["gradient_error"] < (5e-3 if "bfloat16" in case else 1e-6), case
        assert result["applied"], case


@pytest.mark.distributed
def test_gradient_norm_is_reported(results):
    for case, result in results.items():
        assert result["norm_error"] < (5e-3 if "bfloat16" in case else 1e-5), case


@pytest.mark.distributed
def test_update_that_is_not_finite_is_skipped_everywhere(results):
    for case, result in results.items():
        assert not result["broken_applied"] and result["broken_left_weights"], case
        assert result["recovered"] and result["updates"] == 2, case


DEEPSPEED = {"zero_optimization": {"sub_group_size": 5e5}}


def test_settings_of_each_role():
    config = parse_config(
        {
            "prompts": {"file": "p"},
            "engine": {"accumulation": 3, "batch_size": 2, "offload": "cpu", "deepspeed": DEEPSPEED},
        }
    )
    settings = settings_of(config, "student", torch.bfloat16, 4)
    assert settings["train_batch_size"] == 24 and settings["gradient_accumulation_steps"] == 3
    assert settings["gradient_clipping"] == 1.0 and settings["bf16"]["enabled"]
    assert settings["zero_optimization"]["stage"] == 3 and settings["zero_optimization"]["sub_group_size"] == 500_000
    teacher = settings_of(config, "teacher", torch.float32, 4)
    assert "sub_group_size" not in teacher["zero_optimization"] and not teacher["bf16"]["enabled"]


def test_fp8_where_there_is_none(monkeypatch):
    config = load_config(None, ["model.fp8=no_grad", "engine.device=cpu"])
    with pytest.raises(
        ConfigError, match=r"model\.fp8 = no_grad: FP8 products need a GPU .* device is cpu; model.fp8=off"
    ):
        check(config)


def test_fused_on_a_gpu_only():
    """Where it is wanted; on a CPU the reference of each operation would be no gain."""
    config = load_config(None).model
    assert config.fuse and fuse(torch.nn.Identity(), config, torch.device("cpu")) is None
    assert fuse(torch.nn.Identity(), config.model_copy(update={"fuse": False}), torch.device("cuda")) is None


@pytest.fixture
def no_allocator_settings(monkeypatch):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("environment", "set_to"),
    [({}, ["expandable_segments:True"]), ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512"}, [])],
)
def test_segments_grow_unless_the_environment_says_otherwise(monkeypatch, no_allocator_settings, environment, set_to):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    settings = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", settings.append)
    _let_segments_grow()
    assert settings == set_to


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_run_has_segments_that_grow(no_allocator_settings):
    """In a process of its own: the allocator's settings are the process's."""
    script = """
import torch
from dpdmd.config import EngineConfig
from dpdmd.engine.start import start
start(EngineConfig())
kept = [torch.empty(2**20, device="cuda") for _ in range(100)]
print({segment["is_expandable"] for segment in torch.cuda.memory_snapshot()}, len(torch.cuda.memory_snapshot()))
"""
    done = run_command([sys.executable, "-c", script])
    assert done.returncode == 0, done.stderr[-3000:]
    expandable, number = done.stdout.splitlines()[-1].rsplit(" ", 1)
    assert expandable == "{True}" and int(number) < 10, done.stdout


def test_file_access_that_cannot_be_built(monkeypatch):
    def load(self, verbose):
        raise ValueError("invalid literal for int() with base 10: '0a'")

    monkeypatch.setattr(AsyncIOBuilder, "load", load)
    with pytest.raises(
        ConfigError, match=r"engine\.offload = nvme: .* \(invalid literal .*'0a'\); engine\.offload=cpu"
    ):
        load_file_access("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_convolutions_beside_file_access(tmp_path):
    """In a process of its own, which crashed."""
    if not AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("needs the headers of libaio")
    script = f"""
import torch
from dpdmd.config import EngineConfig
from dpdmd.engine.start import start
start(EngineConfig(offload="nvme", nvme_path={str(tmp_path)!r}))
for dtype in (torch.bfloat16, torch.float32):
    convolution = torch.nn.Conv2d(16, 1536, 2, stride=2, device="cuda", dtype=dtype)
    for size in (8, 128):
        print(convolution(torch.randn(2, 16, size, size, device="cuda", dtype=dtype)).sum().item())
"""
    done = run_command([sys.executable, "-c", script])
    assert done.returncode == 0 and len(done.stdout.splitlines()) >= 4, done.stderr[-3000:]


def test_device_and_dtype():
    assert resolve_dtype("auto", "cpu") == torch.float32 and resolve_dtype("auto", "cuda") == torch.bfloat16
    assert resolve_dtype("bfloat16", "cpu") == torch.bfloat16
    if not torch.cuda.is_available():
        assert resolve_device("auto") == "cpu"
        with pytest.raises(ConfigError, match=r"engine\.device = cuda: torch sees no CUDA device"):
            resolve_device("cuda")


def test_learning_rate():
    config = load_config(
        None, ["student_optimizer.lr=0.5", "student_optimizer.warmup=4", "student_optimizer.decay=none"]
    )
    rates = [learning_rate(config.student_optimizer, updates, 10) for updates in range(10)]
    assert rates == [0.125, 0.25, 0.375, 0.5] + [0.5] * 6
    cosine = config.student_optimizer.model_copy(update={"warmup": 0, "decay": "cosine"})
    rates = [learning_rate(cosine, updates, 10) for updates in range(11)]
    assert rates[0] == 0.5 and rates[5] == pytest.approx(0.25) and rates[10] == pytest.approx(0)
    assert rates == sorted(rates, reverse=True)


def test_optimizer_choice(monkeypatch):
    config = load_config(None).student_optimizer
    parameters = [torch.nn.Parameter(torch.zeros(2))]
    assert isinstance(
        build_optimizer(parameters, config.model_copy(update={"name": "torch"}), "cpu"), torch.optim.AdamW
    )
    assert isinstance(build_optimizer(parameters, config, "cpu", offload="cpu"), torch.optim.AdamW)
    sharded = build_optimizer(parameters, config.model_copy(update={"state": "bfloat16"}), "cpu", seed=5)
    assert isinstance(sharded, AdamW) and sharded.param_groups[0]["state_dtype"] == "bfloat16"
    assert sharded.param_groups[0]["seed"] == 5
    assert isinstance(build_optimizer(parameters, config.model_copy(update={"name": "fused"}), "cpu"), AdamW)
    with pytest.raises(ConfigError, match="optimizer name = 'apex' cannot be used: it needs a CUDA device"):
        build_optimizer(parameters, config.model_copy(update={"name": "apex"}), "cpu")

    class Fake:
        def __init__(self, parameters, **arguments):
            self.arguments = arguments

    installed = {"apex.optimizers": SimpleNamespace(FusedAdam=Fake)}
    monkeypatch.setattr("dpdmd.engine.compilation.build_folder", lambda library: Path("/nowhere"))
    monkeypatch.setattr("dpdmd.engine.optimizer.importlib.import_module", lambda module: installed[module])
    assert isinstance(build_optimizer(parameters, config.model_copy(update={"name": "apex"}), "cuda"), Fake)
    installed["deepspeed.ops.adam"] = SimpleNamespace(FusedAdam=lambda *args, **kwargs: 1 / 0)
    with pytest.raises(
        ConfigError, match="optimizer name = 'deepspeed' cannot be used: division by zero; auto or torch"
    ):
        build_optimizer(parameters, config.model_copy(update={"name": "deepspeed"}), "cuda")


def test_the_number_of_updates_in_each_kind_of_optimizer(monkeypatch):
    """A checkpoint may be of another kind's."""
    master = torch.nn.Parameter(torch.zeros(3))
    for optimizer in (torch.optim.AdamW([master], fused=True), AdamW([master])):
        master.grad = torch.ones(3)
        optimizer.step()
        kind = type(optimizer.state[master]["step"])
        restore_step(optimizer, master, 7)
        assert type(optimizer.state[master]["step"]) is kind and optimizer.state[master]["step"] == 7
        optimizer.step()
        assert optimizer.state[master]["step"] == 8

    class Apex(torch.optim.SGD):
        __module__ = "apex.optimizers.fused_adam"

    optimizer = Apex([master])
    restore_step(optimizer, master, 7)
    assert optimizer.param_groups[0]["step"] == 7 and not optimizer.state[master]


@pytest.fixture(scope="module")
def traffic(tiny_pipeline):
    return results_of(DRIVERS / "gathers.py", tiny_pipeline)


# A cycle of two critic updates (each the student's rollout, then the critic's pass) and one of the student (its own chain,
# the teacher's rollout, then teacher and critic for the score).
NETWORKS_GATHERED = {
    "phase": {"student": 2 + 1, "critic": 2 + 1, "teacher": 2},
    # Once in the run, and after each of its own updates.
    "whole": {"student": 1, "critic": 2, "teacher": 0},
}


@pytest.mark.distributed
@pytest.mark.parametrize("residency", NETWORKS_GATHERED)
def test_a_network_is_gathered_once_a_phase(traffic, residency):
    """The second and third cycle gather the same: nothing is recorded, nothing invalidated, and nobody else gathers."""
    for cycle in traffic[residency]["cycles"][1:]:
        assert {role: each["network_gathers"] for role, each in cycle["roles"].items()} == NETWORKS_GATHERED[residency]
        units = sum(each["unit_gathers"] for each in cycle["roles"].values())
        assert units == 4 * sum(NETWORKS_GATHERED[residency].values())  # two blocks, what is before and what is after
        assert cycle["all_gathers"] == units
        expected = sum(NETWORKS_GATHERED[residency].values()) * traffic["shard_bytes"]
        assert sum(each["gathered_bytes"] for each in cycle["roles"].values()) == expected
        assert sum(each["reduced_bytes"] for each in cycle["roles"].values()) == 3 * traffic["shard_bytes"]


@pytest.mark.distributed
def test_blocks_are_gathered_as_they_run(traffic):
    """Every pass gathers both blocks, a backward pass again; what lies outside them is gathered for the phase."""
    passes = {"student": 2 * 4 + 4 + 4, "critic": 2 * (1 + 1) + 1, "teacher": 2 + 1}  # 2 anchor steps
    for cycle in traffic["block"]["cycles"][1:]:
        for role, each in cycle["roles"].items():
            # The block with which the backward pass of the first step ends is there when the second step begins.
            spared = 1 if role == "student" else 0
            assert each["unit_gathers"] == 2 * passes[role] + 2 * NETWORKS_GATHERED["phase"][role] - spared, role


@pytest.mark.distributed
def test_weights_that_stay_whole_are_gathered_to_the_same_place(traffic):
    """As CUDA graphs need them."""
    assert traffic["whole"]["stayed"] and not traffic["float8"]["stayed"]


@pytest.mark.distributed
def test_no_hook_of_deepspeed_is_left(traffic):
    """Neither of ZeRO's nor of its engine, which goes through all modules at each pass and waits for the GPU."""
    assert [traffic[residency]["hooks"] for residency in ("whole", "phase", "float8")] == [0] * 3


@pytest.mark.distributed
def test_residency_changes_no_bit(traffic):
    losses = [traffic[residency]["losses"] for residency in ("whole", "phase", "block")]
    assert len(losses[0]) == 9 and losses[0] == losses[1] == losses[2]


@pytest.mark.distributed
def test_a_teacher_in_float8(traffic):
    """A quarter of float32's bytes travel and a scale for each 128; the run is another by the rounding, not more."""
    cycle, exact = traffic["float8"]["cycles"][1], traffic["phase"]["cycles"][1]
    assert cycle["roles"]["teacher"]["network_gathers"] == 2
    received, full = (each["roles"]["teacher"]["gathered_bytes"] for each in (cycle, exact))
    assert 0.25 * full < received < 0.26 * full + 2 * 4 * 132
    losses = list(zip(traffic["float8"]["losses"], traffic["phase"]["losses"], strict=True))
    assert all(a == b for a, b in losses[:2]) and losses[2][0] != losses[2][1]  # only the student's updates ask it
    assert all(a == pytest.approx(b, rel=0.1) for a, b in losses)


@pytest.mark.distributed
def test_shards_are_all_that_stays(traffic):
    assert traffic["phase"]["whole_after"] == 0 and traffic["block"]["whole_after"] == 0
