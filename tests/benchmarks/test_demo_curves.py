"""benchmarks/demo_curves.py: what it trains, sums up, draws and refuses."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path

import pytest
from processes import run_command

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def curves(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("demo_curves")
    sys.modules.pop("demo_curves")


def fake_results(curves):
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


def test_the_summary_averages_the_last_measurements_of_each_run(curves):
    summary = curves.summarise(fake_results(curves))
    mean, spread = summary["dpdmd"]["accuracy"]
    assert mean == pytest.approx(0.7) and spread == pytest.approx(0.2 / 2**0.5)
    assert summary["dmd"]["accuracy"] == (pytest.approx(0.4), 0.0)


def test_curves_are_drawn_by_the_command(curves, tmp_path, capsys):
    (tmp_path / "results.json").write_text(json.dumps(fake_results(curves)))
    assert curves.main(["draw", str(tmp_path / "results.json"), "--output", str(tmp_path / "curves.png")]) == 0
    assert (tmp_path / "curves.png").stat().st_size > 5_000
    assert "0.700 ± 0.141" in capsys.readouterr().out


@pytest.mark.distributed
def test_curves_command_trains_every_method_and_seed(tmp_path):
    options = ["engine.batch_size=2", "evaluation.num_prompts=2", "evaluation.num_samples=1", "engine.device=cpu"]
    arguments = ["--seeds", "1", "--updates", "1", "--every", "1", "--last", "1", "--runs", str(tmp_path / "runs")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, BENCHMARKS / "demo_curves.py", "train", "--output", tmp_path / "out.json"]
    done = run_command([*command, *arguments, *options], env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    results = json.loads((tmp_path / "out.json").read_text())
    assert [(run["variant"], run["seed"], run["updates"]) for run in results["runs"]] == [
        ("dpdmd", 0, [1]),
        ("dmd", 0, [1]),
    ]
    assert results["packages"]["torch"] and results["command"].startswith("python benchmarks/demo_curves.py train")


@pytest.mark.parametrize(
    "arguments",
    [
        ["draw", "{tmp}/none.json"],
        ["draw", "{tmp}/list.json"],
        ["draw", "{tmp}/object.json"],
        ["draw", "{tmp}/broken.json"],
        ["draw", "{tmp}/other.json"],
        ["draw", "{tmp}/runs.json", "--output", "{tmp}/curves.txt"],
        ["train", "--runs", "{tmp}/runs", "engine.batchsize=3"],
    ],
    ids=" ".join,
)
def test_what_is_refused_in_one_line(curves, arguments, tmp_path, capsys):
    numbers = {name: [0.5] for name in curves.METRICS}
    run = {"variant": "a", "updates": [1], **numbers, "table": {"teacher": dict.fromkeys(numbers, 0.5)}}
    runs, other = ({"last": 1, "runs": [run, run | changed]} for changed in ({}, {"updates": [1, 2]}))
    texts = {"list": "[]", "object": "{}", "broken": "{", "runs": json.dumps(runs), "other": json.dumps(other)}
    for file, text in texts.items():
        (tmp_path / f"{file}.json").write_text(text)
    status = curves.main([argument.format(tmp=tmp_path) for argument in arguments])
    err = capsys.readouterr().err
    assert status in (1, 2) and err.startswith("error: ") and err.count("\n") == 1, err
