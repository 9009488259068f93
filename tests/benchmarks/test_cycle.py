"""benchmarks/cycle.py on the architecture alone: every phase timed, every number there."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from processes import run_command

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def measured(script, options, pipeline, folder, *settings):
    """The script run on the architecture of `pipeline`, and what it wrote."""
    (folder / "settings.yaml").write_text("{}")
    options = [*options, "--config", folder / "settings.yaml", "--cycles", 1, "--warmup", 0]
    options += ["--json", folder / "cycle.json"]
    settings = [f"model.pipeline={pipeline}", "model.random_init=true", "model.resolution=32", *settings]
    settings += ["model.max_sequence_length=8", "engine.device=cpu", "engine.batch_size=1"]
    done = run_command([sys.executable, script, *options, *settings])
    assert (folder / "cycle.json").exists(), done.stdout[-2000:] + done.stderr[-2000:]
    return done, json.loads((folder / "cycle.json").read_text())


@pytest.mark.distributed
def test_cycle_by_phase(tiny_pipeline, tmp_path):
    done, result = measured(BENCHMARKS / "cycle.py", [], tiny_pipeline, tmp_path, "distill.critic_updates=2")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    phases = result["seconds_by_phase"]
    assert set(phases) == {
        "critic: student forward without gradient",
        "critic: critic forward",
        "critic: backward",
        "critic: optimizer",
        "student: student forward",
        "student: teacher forward without gradient",
        "student: critic forward without gradient",
        "student: backward",
        "student: optimizer",
        "between the phases",
    }
    assert all(seconds > 0 for seconds in phases.values())
    assert sum(phases.values()) == pytest.approx(result["seconds_a_cycle"])
    assert result["packages"]["deepspeed"] and result["machine"]["cores"]


@pytest.mark.distributed
def test_contenders_in_turn(tiny_pipeline, tmp_path):
    """One that cannot run here, which the others survive, and a peer; the file is there after each of them."""
    options = ["--op", "cycle", "--contenders", "fp8", "eager"]
    done, result = measured(BENCHMARKS / "run.py", options, tiny_pipeline, tmp_path, "distill.critic_updates=1")
    assert done.returncode == 1, done.stdout[-2000:] + done.stderr[-2000:]
    assert list(result["contenders"]) == ["eager"] and list(result["failed"]) == ["fp8"]
    assert result["contenders"]["eager"]["seconds_a_cycle"] > 0 and result["command"].startswith("python ")
    assert "FP8 products need a GPU" in result["failed"]["fp8"]
    assert "local_rank" not in result["contenders"]["eager"]["command"]
    assert "| eager PyTorch" in done.stdout


def test_the_table_has_the_lower_bound():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        from cases import cycle
    finally:
        sys.path.remove(str(BENCHMARKS))
    run = {"seconds_a_cycle": 6.0, "images_a_second": 4.0, "communication": None}
    floor = {"products": 2.0, "attention": 2.0, "optimizers": 0.5}
    ours = run | {"title": "ours", "floor_seconds": floor, "peak_allocated_gib": 80.0}
    rows = cycle.table({"ours": ours, "eager": run | {"title": "eager", "seconds_a_cycle": 12.0}}, {}).splitlines()
    assert rows[2] == "| ours | 6.00 | 4.00 | 1.00 | 80.0 |  |" and rows[3] == "| eager | 12.00 | 4.00 | 2.00 |  |  |"
    assert rows[4] == "| lower bound: matmuls, attention, optimizers | 4.50 | | 0.75 | | |"
