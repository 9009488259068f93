"""Whose folder a run's is: nothing of others is deleted or written over, and two runs never share one."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

import pytest
from processes import running

from dpdmd.config import ConfigError
from dpdmd.run.folder import MARK, RunFolder, check_place, check_space, delete_own


def written(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run.output_dir = .*file/run': .*/file is no folder"):
        RunFolder(tmp_path / "file" / "run")
    with pytest.raises(ConfigError, match=r"run.output_dir = .*file': .*/file is no folder"):
        RunFolder(tmp_path / "file")


def test_places_where_runs_delete(tmp_path):
    """Neither another run nor embeddings belong there."""
    run = written(tmp_path / "run", MARK)
    for place in (
        "checkpoints/step_000003/sub",
        "student",
        "student_step_000003/a",
        ".unfinished-student",
        "samples/b",
    ):
        with pytest.raises(
            ConfigError, match=f"run.output_dir = .*: it lies in {place.split('/')[0]} of the run {run}"
        ):
            check_place(run / place)
        for folder in (run, tmp_path / "new"):  # which has no mark yet
            with pytest.raises(
                ConfigError, match=rf"prompts.cache_dir = .*: it lies in {place.split('/')[0]} of the run"
            ):
                check_place(tmp_path / "new", folder / place)
    (run / "checkpoints").mkdir()
    (tmp_path / "link").symlink_to(run / "checkpoints")
    with pytest.raises(ConfigError, match=f"it lies in checkpoints of the run {run}"):
        check_place(tmp_path / "link" / "sub")
    for place in ("embeddings", "mine", "students", "student_step_3"):
        check_place(run, run / place)
        check_place(run / place)
    check_place(run, run)


RUN = (
    *("config.yaml", "metrics.jsonl", "finished.json", "samples/step_000003.png", "evaluation/grid.png"),
    *(
        "tensorboard/events.out.tfevents.1.host.2.0",
        "student/dpdmd.json",
        "student/diffusion_pytorch_model.safetensors",
    ),
    *("checkpoints/step_000003/index.json", "checkpoints/step_000003/student/rank_00000.safetensors"),
    *("checkpoints/step_000003/confirmed", "checkpoints/.unfinished-step_000006/critic/rank_00001_0002.safetensors"),
    *("student_step_000003/config.json", ".unfinished-student/config.json", "student_step_000003_2/dpdmd.json"),
    *("checkpoints/step_000003.left_out/index.json", "student/diffusion_pytorch_model-00001-of-00002.safetensors"),
    "student_step_000003/pytorch_lora_weights.safetensors",
)
MINE = (
    *("samples/photo.png", "notes.txt", "student/photo.png", "checkpoints/readme", "embeddings/key/shard.safetensors"),
    *("evaluation/mine.json", "other/config.yaml", "checkpoints/step_000003/student/mine.txt"),
    *("samples/step_by_step.png", "student_step_best/config.json", "checkpoints/step_000003_mine/index.json"),
    *("checkpoints/step_000003/student/rank_mine.safetensors", "checkpoints/.unfinished-mine/index.json"),
    *(
        "student/my_lora.safetensors",
        "student_step_3/dpdmd.json",
        "tensorboard/events.out.tfevents.mine",
        "samples/step_12.png",
    ),
    *(
        "checkpoints/step_000003/student/rank_1.safetensors",
        "student/mine.safetensors.index.json",
        "student_earlier/dpdmd.json",
    ),
)


@pytest.mark.parametrize("how", [{}, {"resume": True}, {"overwrite": True}])
@pytest.mark.parametrize(
    "mine", [["samples/photo.png", "config.yaml"], ["student/model.safetensors"], ["metrics.jsonl"]]
)
def test_what_no_run_made_is_left_alone(tmp_path, how, mine):
    written(tmp_path, *mine, "notes.txt")
    with pytest.raises(
        ConfigError, match=rf"holds .*{mine[-1].split('/')[0]}.*which a run would write over, and no \{MARK}"
    ):
        RunFolder(tmp_path, **how)
    assert names(tmp_path) == sorted([*mine, "notes.txt"])


def test_finished_run_is_overwritten_only_when_told_and_only_what_it_wrote(tmp_path):
    RunFolder(tmp_path).close()
    written(tmp_path, *RUN, *MINE)
    with pytest.raises(ConfigError, match=r"holds a finished run \(.*\): give --resume .* --overwrite"):
        RunFolder(tmp_path)
    RunFolder(tmp_path, resume=True).close()
    assert names(tmp_path) == sorted([*RUN, *MINE, MARK])
    taken = RunFolder(tmp_path, overwrite=True)
    assert names(tmp_path) == sorted([*RUN, *MINE, MARK])  # the new run may yet turn out to be impossible
    taken.clear()
    assert names(tmp_path) == sorted([*MINE, MARK])
    assert not (tmp_path / "checkpoints/.unfinished-step_000006").exists()  # empty folders go
    taken.close()
    with pytest.raises(ConfigError, match="holds an unfinished run"):  # what is left bears a run's names
        RunFolder(tmp_path)


def test_what_a_link_leads_to_is_not_deleted(tmp_path):
    run, elsewhere = written(tmp_path / "run", *RUN), written(tmp_path / "elsewhere", "config.json", "a.safetensors")
    (run / "finished.json").unlink()
    RunFolder(tmp_path / "marked").close()
    (tmp_path / "marked" / MARK).rename(run / MARK)
    (run / "student_step_000009").symlink_to(elsewhere)
    with pytest.raises(
        ConfigError, match="student_step_000009 in it is a link, and --overwrite deletes nothing outside"
    ):
        RunFolder(run, overwrite=True)
    assert names(elsewhere) == ["a.safetensors", "config.json"]
    RunFolder(run, resume=True).close()
    (run / "student_step_000009").unlink()
    checkpoint = written(tmp_path / "other", "index.json", "student/rank_00000.safetensors")
    (run / "checkpoints" / "step_000009").symlink_to(checkpoint)
    with pytest.raises(ConfigError, match="checkpoints/step_000009 in it is a link"):
        RunFolder(run, overwrite=True)
    assert names(checkpoint) == ["index.json", "student/rank_00000.safetensors"]


def test_what_a_run_writes_is_no_link_and_no_file(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / MARK).symlink_to(tmp_path / "mine")
    with pytest.raises(ConfigError, match=rf"run': \{MARK} in it is a link"):
        RunFolder(tmp_path / "run", resume=True)
    assert (tmp_path / "mine").read_text() == "mine"
    for number, name in enumerate(("checkpoints", "samples", "evaluation", "tensorboard", "embeddings")):
        written(tmp_path / f"a{number}", name)
        with pytest.raises(
            ConfigError, match=f"a{number}': {name} in it is no folder, and a run makes one: move it away"
        ):
            RunFolder(tmp_path / f"a{number}", resume=True)
    for name in ("metrics.jsonl", "config.yaml", "finished.json"):
        for make in (Path.mkdir, os.mkfifo, lambda path: path.symlink_to(tmp_path / "nowhere")):
            folder = Path(tempfile.mkdtemp(dir=tmp_path))
            make(folder / name)
            with pytest.raises(ConfigError, match=f": {name} in it is no file, and a run writes one: move it away"):
                RunFolder(folder, resume=True)


def test_folders_of_another_user(tmp_path, monkeypatch):
    written(tmp_path / "run", MARK, "checkpoints/step_000001/index.json")
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "checkpoints" and access(path, mode))
    with pytest.raises(ConfigError, match=r"run': checkpoints in it cannot be read and written to$"):
        RunFolder(tmp_path / "run", resume=True)


def test_a_process_ended_while_it_deletes_leaves_nothing_to_go_on_from(tmp_path, monkeypatch):
    """And what says that a run was here."""
    RunFolder(tmp_path).close()
    written(tmp_path, *RUN)
    left = []
    unlink = Path.unlink

    def noted(self, **options):
        unlink(self, **options)
        left.append(set(names(tmp_path)))

    monkeypatch.setattr(Path, "unlink", noted)
    delete_own(tmp_path)
    assert len(left) == len(RUN) and all("finished.json" in each for each in left[:-1])
    indices = [sum(name.endswith("index.json") for name in each) for each in left]
    assert indices[:2] == [1, 0] and indices[-1] == 0  # the first to go


def test_folder_with_other_things_is_taken_and_marked(tmp_path):
    written(tmp_path, "notes.txt", "photos/step_000001.png")
    taken = RunFolder(tmp_path)
    assert taken.fresh and json.loads((tmp_path / MARK).read_text()).keys() == {"process", "machine", "since"}
    taken.close()


HOLD = """
import sys, time
from pathlib import Path
from dpdmd.run.folder import RunFolder
taken = RunFolder(Path(sys.argv[1]), resume=True)
print("taken", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("how", [{}, {"resume": True}, {"overwrite": True}])
def test_two_runs_in_one_folder(tmp_path, how):
    with running(sys.executable, "-c", HOLD, tmp_path) as first:
        assert first.stdout.readline() == "taken\n"
        with pytest.raises(ConfigError, match=rf"another run is at work in it \(process {first.pid} on .*, since"):
            RunFolder(tmp_path, **how)
        first.kill()  # a run that dies leaves no lock
        first.wait()
        RunFolder(tmp_path, **how).close()


def test_folder_that_is_full(tmp_path):
    with pytest.raises(
        ConfigError,
        match=r"are free on its disk, and 4e\+03 TB more are needed, for 3 checkpoints of 1e\+03 TB at once .* 1e\+03 TB",
    ):
        check_space(tmp_path, 10**15, 3, 10**15)
    check_space(tmp_path, 1, 4, 1)


def test_checkpoints_that_make_way_count(tmp_path, monkeypatch):
    written(tmp_path, "checkpoints/step_000003/index.json")
    there = (tmp_path / "checkpoints/step_000003/index.json").stat().st_size
    monkeypatch.setattr("dpdmd.run.folder.shutil.disk_usage", lambda path: type("Usage", (), {"free": 100})())
    check_space(tmp_path, 50, 2, there)
    with pytest.raises(ConfigError, match="100 B are free"):
        check_space(tmp_path, 50, 2, there + 1)
