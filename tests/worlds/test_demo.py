"""The demo itself, cut short: two ZeRO-3 processes make a student that beats its teacher at four evaluations."""

from __future__ import annotations

import json
import math
import sys

import pytest
from processes import reserved_port, run_command
from runs import TRAIN


@pytest.mark.distributed
def test_demo_gains_accuracy(tmp_path):
    """20 student updates; the whole demo's 50 gain some 30 points."""
    runner = [sys.executable, "-m", "deepspeed.launcher.runner"]
    options = ["engine.device=cpu", "run.iterations=120", "run.checkpoint_every=0", "evaluation.num_samples=4"]
    with reserved_port() as port:
        command = [*runner, "--num_accelerators", "2", "--master_port", port, TRAIN]
        done = run_command([*command, *options, f"run.output_dir={tmp_path / 'run'}"])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    table = json.loads((tmp_path / "run" / "evaluation" / "table.json").read_text())
    guided, _, unguided, student = table.values()
    assert [row["network_evaluations"] for row in table.values()] == [60, 8, 4, 4]
    assert guided["accuracy"] > 0.95
    assert student["accuracy"] > unguided["accuracy"] + 0.15
    assert student["background_entropy"] > 0.7 * guided["background_entropy"]
    assert (tmp_path / "run" / "evaluation" / "grid.png").stat().st_size > 10_000
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(line["loss"]) and line["skipped"] == 0 for line in lines)
    assert "student, 4 steps" in done.stdout
