"""A run is measured in a world that the package does not know, of one file (tests/brightness.py), on a model of its own."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import brightness
import pytest
import yaml
from processes import run_script
from runs import TRAIN, checked

from dpdmd import trainer
from dpdmd.config import ConfigError, parse_config
from dpdmd.evaluation import report
from dpdmd.evaluation.protocol import check_evaluation, find_evaluation
from dpdmd.worlds.demo import PROMPTS
from dpdmd.worlds.demo.evaluation import EVALUATION as DEMO

WORLD = "brightness:EVALUATION"


@pytest.fixture
def settings(tiny_pipeline, tmp_path):
    """Six updates (two of the student) on the tiny pipeline, measured after each of the student's."""
    (tmp_path / "prompts.txt").write_text("a red ring\na blue square\n")
    values = {
        "model": {"pipeline": str(tiny_pipeline), "resolution": 32, "max_sequence_length": 8},
        "prompts": {"file": str(tmp_path / "prompts.txt")},
        "distill": {"teacher_steps": 6, "anchor": 2, "critic_updates": 2},
        "student_optimizer": {"lr": 1e-3},
        "engine": {"device": "cpu", "batch_size": 1},
        "evaluation": {"enabled": True, "world": WORLD, "every": 1, "num_prompts": 3, "num_samples": 3},
        "run": {"iterations": 6, "output_dir": str(tmp_path / "run"), "tensorboard": False},
    }
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "settings.yaml"


@pytest.mark.distributed
def test_a_run_is_measured_in_it(settings, tmp_path):
    done = checked(run_script(2, TRAIN, "--config", settings))
    assert "3 prompts x 3 samples, the same noise in each row" in done.stdout
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    measured = [line for line in lines if line["kind"] == "evaluation"]
    assert [line["iteration"] for line in measured] == [2, 5]
    table = json.loads((tmp_path / "run" / "evaluation" / "table.json").read_text())
    assert list(table) == [
        "teacher, 6 steps, guidance 3.5",
        "teacher, 4 steps, guidance 3.5",
        "teacher, 4 steps, no guidance",
        "student, 4 steps",
    ]
    student = table["student, 4 steps"]
    assert {name: measured[-1][name] for name in ("brightness", "spread")} == {
        name: student[name] for name in ("brightness", "spread")
    }
    assert len({row["brightness"] for row in table.values()}) == 4 and all(row["spread"] > 0 for row in table.values())
    assert (tmp_path / "run" / "evaluation" / "grid.png").exists()
    assert json.loads((tmp_path / "run" / "finished.json").read_text())["evaluation"] == table


@pytest.mark.distributed
def test_nothing_is_measured_where_evaluation_is_off(settings, tmp_path):
    """Whatever `every` says, which ended in a LookupError: the evaluation's prompts had no embeddings."""
    checked(run_script(0, TRAIN, "--config", settings, "evaluation.enabled=false"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["critic", "critic", "student"] * 2
    assert not (tmp_path / "run" / "evaluation").exists()
    assert "evaluation" not in json.loads((tmp_path / "run" / "finished.json").read_text())


def config(world=WORLD, resolution=32, **evaluation):
    return parse_config(
        {
            "model": {"pipeline": "/some/where", "resolution": resolution},
            "evaluation": {"enabled": True, "world": world, "num_prompts": 3, **evaluation},
            "prompts": {"file": "prompts.txt"},
        }
    )


def test_how_it_is_found():
    assert find_evaluation(config()) is brightness.EVALUATION
    assert find_evaluation(config("demo")) is DEMO  # of another model than the demo's teacher
    assert find_evaluation(parse_config({})) is DEMO
    assert trainer.load_prompts(parse_config({})) == PROMPTS.read_text().splitlines()
    check_evaluation(config())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"world": "no_such_module:EVALUATION"},
            "it cannot be imported (ModuleNotFoundError: No module named 'no_such_",
        ),
        (
            {"world": "brightness:NOTHING"},
            "it cannot be imported (AttributeError: module 'brightness' has no attribute",
        ),
        (
            {"world": "brightness:Brightness"},
            "evaluation.world = 'brightness:Brightness': a _ProtocolMeta, where an object",
        ),
        (
            {"world": "json:dumps"},
            "evaluation.world = 'json:dumps': a function, where an object is needed that has what",
        ),
        ({"num_prompts": 4}, "evaluation.num_prompts = 4: there are 3; set 3 or less"),
        (
            {"world": "demo", "resolution": 64},
            "model.resolution = 64 with evaluation.enabled = true: pictures of the world demo are measured at 32 pixels; set "
            "model.resolution=32 or evaluation.enabled=false",
        ),
    ],
)
def test_what_is_refused(given, words):
    with pytest.raises(ConfigError, match=f"^[^\n]*{re.escape(words)}[^\n]*$"):
        check_evaluation(config(**given))


class Mistaken(brightness.Brightness):
    columns = {"brightness": "brightness", "contrast": "contrast"}  # noqa: RUF012


def test_the_table_leaves_out_a_column_that_is_not_measured(capsys):
    run = SimpleNamespace(config=config(), evaluation=Mistaken())
    assert report._measured_columns(run, {"brightness": 0.5, "spread": 0.1}) == {"brightness": "brightness"}
    assert capsys.readouterr().err == (
        "warning: evaluation.world = 'brightness:EVALUATION': its columns have contrast, which its measure did not return "
        "(brightness, spread); the table leaves them out\n"
    )
    run.evaluation = brightness.EVALUATION
    assert report._measured_columns(run, {"brightness": 0.5, "spread": 0.1}) == {**brightness.EVALUATION.columns}
    assert not capsys.readouterr().err


def test_a_world_without_prompts_needs_others():
    with pytest.raises(
        ConfigError, match=r"prompts.file is not set, and evaluation.world = 'brightness:EVALUATION' has no"
    ):
        trainer.load_prompts(parse_config({"evaluation": {"world": WORLD}}))
