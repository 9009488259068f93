"""benchmarks/cycle.py on the architecture alone: every phase timed, every number there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
CYCLE = BENCHMARKS / "cycle.py"


@pytest.mark.distributed
def test_cycle_by_phase(tiny_pipeline, tmp_path):
    settings = [f"model.pipeline={tiny_pipeline}", "model.random_init=true", "model.resolution=32", "engine.device=cpu"]
    settings += ["model.max_sequence_length=8", "engine.batch_size=1", "distill.critic_updates=2"]
    (tmp_path / "settings.yaml").write_text("{}")
    options = ["--cycles", "1", "--warmup", "0", "--json", str(tmp_path / "cycle.json")]
    done = subprocess.run(
        [sys.executable, str(CYCLE), "--config", str(tmp_path / "settings.yaml"), *options, *settings],
        capture_output=True,
        text=True,
        timeout=300,
        cwd="/",
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    result = json.loads((tmp_path / "cycle.json").read_text())
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
    (tmp_path / "settings.yaml").write_text("{}")
    settings = [f"model.pipeline={tiny_pipeline}", "model.random_init=true", "model.resolution=32", "engine.device=cpu"]
    settings += ["model.max_sequence_length=8", "engine.batch_size=1", "distill.critic_updates=1"]
    options = ["--config", str(tmp_path / "settings.yaml"), "--cycles", "1", "--warmup", "0"]
    options += ["--contenders", "fp8", "eager", "--json", str(tmp_path / "cycle.json")]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "run.py"), "--op", "cycle", *options, *settings],
        capture_output=True,
        text=True,
        timeout=300,
        cwd="/",
    )
    assert done.returncode == 1, done.stdout[-2000:] + done.stderr[-2000:]
    result = json.loads((tmp_path / "cycle.json").read_text())
    assert list(result["contenders"]) == ["eager"] and list(result["failed"]) == ["fp8"]
    assert result["contenders"]["eager"]["seconds_a_cycle"] > 0 and result["command"].startswith("python ")
    assert "FP8 products need a GPU" in result["failed"]["fp8"]
    assert "local_rank" not in result["contenders"]["eager"]["command"]
    assert "| eager PyTorch" in done.stdout


def test_the_table_has_the_floor():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import cycle
    finally:
        sys.path.remove(str(BENCHMARKS))
    run = {"seconds_a_cycle": 6.0, "images_a_second": 4.0, "communication": None}
    floor = {"products": 2.0, "attention": 2.0, "optimizers": 0.5}
    ours = run | {"title": "ours", "floor_seconds": floor, "peak_allocated_gib": 80.0}
    rows = cycle.table({"ours": ours, "eager": run | {"title": "eager", "seconds_a_cycle": 12.0}}, {}).splitlines()
    assert rows[2] == "| ours | 6.00 | 4.00 | 1.00 | 80.0 |  |" and rows[3] == "| eager | 12.00 | 4.00 | 2.00 |  |  |"
    assert rows[4] == "| floor: products, attention, optimizers | 4.50 | | 0.75 | | |"
