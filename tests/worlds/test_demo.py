"""The demo itself, cut short: two ZeRO-3 processes make a student that beats its teacher at four evaluations."""

from __future__ import annotations

import json
import math
import os
import sys

import pytest
from processes import reserved_port, run_command
from runs import TRAIN

from dpdmd.worlds.demo import curves


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


def fake_results():
    def run(method, seed, accuracy):
        row = dict.fromkeys(curves.METRICS, 0.9)
        return {
            "variant": method,
            "seed": seed,
            "updates": [10, 20, 30],
            **{metric: [0.1, accuracy, accuracy + 0.2] for metric in curves.METRICS},
            "table": {"teacher, 30 steps": row},
        }

    return {"last": 2, "runs": [run("dpdmd", 0, 0.5), run("dpdmd", 1, 0.7), run("dmd", 0, 0.3), run("dmd", 1, 0.3)]}


def test_verdict_averages_the_last_measurements_of_each_run():
    summary = curves.summarise(fake_results())
    mean, spread = summary["dpdmd"]["accuracy"]
    assert mean == pytest.approx(0.7) and spread == pytest.approx(0.2 / 2**0.5)
    assert summary["dmd"]["accuracy"] == (pytest.approx(0.4), 0.0)


def test_curves_are_drawn_by_the_command(tmp_path, capsys):
    (tmp_path / "results.json").write_text(json.dumps(fake_results()))
    assert curves.main(["draw", str(tmp_path / "results.json"), "--output", str(tmp_path / "curves.png")]) == 0
    assert (tmp_path / "curves.png").stat().st_size > 5_000
    assert "0.700 ± 0.141" in capsys.readouterr().out


@pytest.mark.distributed
def test_curves_command_trains_every_method_and_seed(tmp_path):
    options = ["engine.batch_size=2", "evaluation.num_prompts=2", "evaluation.num_samples=1", "engine.device=cpu"]
    arguments = ["--seeds", "1", "--updates", "1", "--every", "1", "--last", "1", "--runs", str(tmp_path / "runs")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "dpdmd.worlds.demo.curves", "train", "--output", tmp_path / "out.json"]
    done = run_command([*command, *arguments, *options], env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    results = json.loads((tmp_path / "out.json").read_text())
    assert [(run["variant"], run["seed"], run["updates"]) for run in results["runs"]] == [
        ("dpdmd", 0, [1]),
        ("dmd", 0, [1]),
    ]
    assert results["packages"]["torch"] and results["command"].startswith("python -m dpdmd.worlds.demo.curves train")
