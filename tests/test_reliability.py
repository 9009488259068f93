"""Runs that are broken or resumed: none ends well that trained nothing, none loses what it saved."""

from __future__ import annotations

import json
import os
import re
import shutil

import pytest
import torch
from processes import run_script
from runs import DRIVER, TRAIN, checked, distance, same_bits, weights
from safetensors.torch import load_file, save_file

from dpdmd.worlds.demo import TEACHER


@pytest.mark.distributed
def test_a_run_whose_student_is_never_updated_does_not_end_well(options, tmp_path):
    """Its critic's updates are finite, and say nothing of the student's."""
    for limit, words in (
        ("2", "2 updates of the student in a row were not finite (the last was number 6)"),
        ("10", "the student was never updated, so it is not exported: it is still the teacher"),
    ):
        folder = tmp_path / limit
        mine = [*options, f"run.max_bad_updates={limit}", f"run.output_dir={folder}"]
        done = checked(run_script(0, DRIVER, "no-uncond", tmp_path, *mine), 1)
        assert words in done.stderr and "of the student's " in done.stderr and "prompts in them: 'a " in done.stderr
        assert not (folder / "student").exists() and not (folder / "finished.json").exists()
        lines = (folder / "metrics.jsonl").read_text()
        assert "NaN" not in lines and "Infinity" not in lines
        entries = [json.loads(line) for line in lines.splitlines()]
        assert entries[2]["kind"] == "student" and entries[2]["loss"] is None and entries[3]["loss"] > 0


@pytest.mark.distributed
def test_a_student_that_has_not_moved_is_not_exported(options, tmp_path):
    folder = tmp_path / "run"
    mine = [*options, f"run.output_dir={folder}", "engine.accumulation=1"]
    still = [
        "student_optimizer.lr=1e-12",
        "student_optimizer.eps=1",
        "engine.clip=1e-6",
        "student_optimizer.warmup=400",
    ]
    done = checked(run_script(2, TRAIN, *mine, *still, "ema={decay: 0.9}"), 1)
    for line in (
        "warning: student_optimizer.warmup = 400 is longer than the run's 3 updates of the student: the rate ends at 7.5e-15",
        "warning: ema.decay = 0.9: of the average, which is what is exported, 73% is still the student's beginning after",
        "after 3 updates the student's weights are to the bit those that it began with, so it is not exported; student_opt",
    ):
        assert done.stderr.count(line) == 1, done.stderr[-3000:]
    assert not (folder / "student").exists() and not (folder / "finished.json").exists()


@pytest.mark.distributed
def test_an_adapter_that_changes_nothing_is_not_exported(options, tmp_path):
    folder = tmp_path / "run"
    mine = [*options, f"run.output_dir={folder}", "engine.accumulation=1", "lora={rank: 4}"]
    done = checked(run_script(0, TRAIN, *mine, "student_optimizer.warmup=2147483647"), 1)
    assert "after 3 updates the adapter changes no bit of what the teacher makes in as many steps" in done.stderr
    assert not (folder / "student").exists()
    # What there is is not lost: with another rate it trains on.
    checked(run_script(0, TRAIN, *mine, "run.iterations=18", "--resume"))
    assert (folder / "student").exists()


@pytest.mark.distributed
@pytest.mark.parametrize("more", [[], ["lora={rank: 2}"], ["ema={decay: 0.5}"]], ids=["whole", "adapters", "averaged"])
def test_a_student_that_exploded_at_the_last_update_is_not_exported(options, tmp_path, more):
    """No update after it tells."""
    folder = tmp_path / "run"
    mine = [*options, f"run.output_dir={folder}", "run.iterations=3", "student_optimizer.lr=1e10", *more]
    done = checked(run_script(0, TRAIN, *mine), 1)
    assert (
        "after 1 updates the student " in done.stderr
        and ", so it is not exported; student_optimizer.lr = 1e+10" in done.stderr
    )
    assert not (folder / "student").exists() and list(folder.glob("checkpoints/step_*"))


@pytest.mark.distributed
def test_going_on_with_another_kind_of_optimizer(options, straight, tmp_path):
    """Which keeps the number of updates in another form."""
    folder = tmp_path / "run"
    shutil.copytree(straight, folder)
    mine = [*options, f"run.output_dir={folder}", "--resume", "run.iterations=12"]
    first = checked(run_script(0, TRAIN, *mine))
    expected = weights(folder)
    shutil.rmtree(folder)
    shutil.copytree(straight, folder)
    others = ["student_optimizer.name=torch", "critic_optimizer.name=torch"]
    done = checked(run_script(0, TRAIN, *mine, *others))
    assert "student_optimizer.name = torch (was auto)" in done.stdout and "other settings" in first.stdout
    assert distance(weights(straight), expected) > 0 and distance(weights(folder), expected) < 1e-4
    checked(run_script(0, TRAIN, *mine, "run.iterations=15"))  # and back


@pytest.mark.distributed
def test_a_setting_that_breaks_a_run_costs_no_checkpoint(options, straight, tmp_path):
    """Not even where no update after the last checkpoint is known."""
    folder = tmp_path / "run"
    shutil.copytree(straight, folder)
    mine = [*options, f"run.output_dir={folder}", "--resume", "run.iterations=40"]
    broken = ["student_optimizer.lr=1e30", "critic_optimizer.lr=1e30", "run.max_bad_updates=2"]
    done = checked(run_script(0, TRAIN, *mine, *broken), 1)
    assert "updates of the critic in a row were not finite" in done.stderr
    done = checked(run_script(0, TRAIN, *mine, "run.iterations=12"))
    assert "going on from iteration 9 " in done.stdout


@pytest.mark.distributed
def test_skipped_updates_are_told_at_the_end(options, tmp_path):
    """A run that goes on all the same says how many there were, and which prompts were in them."""
    driver = tmp_path / "once.py"
    driver.write_text(
        "import sys\nfrom dpdmd import train\nloss = train.Trainer.loss\n"
        "def once(self, role, iteration, shard):\n"
        "    total, numbers = loss(self, role, iteration, shard)\n"
        "    return (total * float('nan') if iteration == 3 else total), numbers\n"
        "train.Trainer.loss = once\nsys.exit(train.main([a for a in sys.argv[1:] if 'local_rank' not in a]))\n"
    )
    folder = tmp_path / "run"
    done = checked(run_script(0, driver, *options, f"run.output_dir={folder}"))
    assert "skipped as not finite: 0 of the student's 3, 1 of the critic's 6 updates; prompts in them: " in done.stdout
    finished = json.loads((folder / "finished.json").read_text())
    assert finished["skipped"] == {"student": [], "critic": [3]} and len(finished["skipped_prompts"]["4"]) == 2


@pytest.mark.distributed
def test_the_last_good_checkpoint_of_a_student_that_exploded(options, tmp_path):
    folder = tmp_path / "run"
    mine = [
        *options,
        "run.checkpoint_every=1",
        "run.keep_checkpoints=2",
        "run.max_bad_updates=2",
        f"run.output_dir={folder}",
    ]
    exploding = [*mine, "student_optimizer.lr=1e6", "student_optimizer.warmup=0"]
    done = checked(run_script(0, TRAIN, *exploding), 1)
    # The student's first update (number 3) is finite and leaves weights that are not of use. The critic's next update after
    # the checkpoint of update 2 is the one that breaks; after that of update 1 it was number 2, which was finite.
    assert f"the last good checkpoint is {folder / 'checkpoints' / 'step_000001'}" in done.stderr, done.stderr[-2000:]
    done = checked(run_script(0, TRAIN, *mine, "--resume"))
    assert "going on from iteration 1 " in done.stdout and "is not a good one" in done.stderr
    assert all(value.isfinite().all() for value in weights(folder).values())


@pytest.mark.distributed
@pytest.mark.parametrize("lora", [[], ["lora={rank: 2}"]], ids=["whole", "adapters"])
def test_another_teacher_is_refused(options, tmp_path, lora):
    """Of the same architecture, so that nothing else would tell."""
    folder, teacher = tmp_path / "run", tmp_path / "teacher"
    shutil.copytree(TEACHER, teacher)
    mine = [*options, *lora, "run.iterations=3", f"run.output_dir={folder}"]
    checked(run_script(0, TRAIN, *mine, f"model.pipeline={teacher}"))
    (file,) = (teacher / "transformer").glob("*.safetensors")
    save_file({name: 1.01 * value for name, value in load_file(file).items()}, file)
    done = checked(run_script(0, TRAIN, *mine, f"model.pipeline={teacher}", "run.iterations=6", "--resume"), 2)
    assert "was saved with teacher.transformer = '" in done.stderr
    shutil.rmtree(teacher)
    shutil.copytree(TEACHER, teacher)
    scheduler = teacher / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"shift": 7.0}))
    done = checked(run_script(0, TRAIN, *mine, f"model.pipeline={teacher}", "run.iterations=6", "--resume"), 2)
    assert "was saved with teacher.scheduler.shift = " in done.stderr and "and this run has 7.0" in done.stderr
    # Where its folder lies does not matter.
    done = checked(run_script(0, TRAIN, *mine, "run.iterations=6", "--resume"))
    assert "text encoders" not in done.stdout
    if not lora:  # Other embeddings of the same weights are taken, as other prompts are.
        shutil.rmtree(teacher)
        shutil.copytree(TEACHER, teacher)
        settings = teacher / "text_encoder" / "config.json"
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"hidden_act": "relu"}))
        done = checked(run_script(0, TRAIN, *mine, f"model.pipeline={teacher}", "run.iterations=9", "--resume"))
        assert "the text encoders' settings, tokenizers or length: prompts are encoded anew" in done.stdout


@pytest.mark.distributed
def test_resume_says_from_where(options, straight, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(straight, folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name[0] != "."}
    mine = [*options, f"run.output_dir={folder}", "--resume"]
    done = checked(run_script(0, TRAIN, *mine))
    assert f"finished: {folder} has all its 9 iterations, and its student" in done.stdout
    assert {
        path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name[0] != "."
    } == before

    done = checked(run_script(0, TRAIN, *mine, "run.seed=7"))
    assert "other settings than the run's, which nothing is trained with: run.seed = 7 (was 0)\n" in done.stdout

    # A student that is not whole is exported anew, and what was there stays.
    (folder / "student" / "notes.txt").write_text("mine")
    (file,) = (folder / "student").glob("*.safetensors")
    with file.open("r+b") as damaged:
        damaged.seek(-1, os.SEEK_END)
        damaged.write(b"\xff")
    done = checked(run_script(0, TRAIN, *mine))
    assert f"--resume: {file} is damaged or changed" in done.stderr and same_bits(weights(folder), weights(straight))
    aside = folder / "student_step_000009"
    assert (aside / "notes.txt").read_text() == "mine"
    shutil.rmtree(aside)
    (folder / "student" / "notes.txt").write_text("mine")
    (folder / "student" / "config.json").unlink()
    done = checked(run_script(0, TRAIN, *mine))
    assert f"--resume: {folder / 'student' / 'config.json'} is missing" in done.stderr
    assert (aside / "notes.txt").read_text() == "mine" and (folder / "student" / "config.json").exists()
    shutil.rmtree(aside)
    (folder / "student" / "config.yaml").write_text("# mine")
    (folder / "finished.json").write_text('{"student": {}}')
    done = checked(run_script(0, TRAIN, *mine))
    assert (
        f"--resume: {folder / 'finished.json'} does not say what was exported; the student is exported" in done.stderr
    )
    assert (aside / "config.yaml").read_text() == "# mine"
    shutil.rmtree(aside)

    done = checked(run_script(0, TRAIN, *mine, "run.iterations=6"), 2)
    assert "run.iterations = 6, but --resume goes on from iteration 9" in done.stderr

    with (folder / "metrics.jsonl").open("a") as metrics:
        metrics.write("[" * 200_000)
    longer = checked(run_script(0, TRAIN, *mine, "run.iterations=12"))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == list(range(12))
    assert "going on from iteration 9" in longer.stdout
    assert "other settings than the checkpoint's: run.iterations = 12 (was 9)\n" in longer.stdout, longer.stdout[:600]
    assert same_bits(load_file(next((folder / "student_step_000009").glob("*.safetensors"))), weights(straight))
    assert json.loads((folder / "student" / "dpdmd.json").read_text())["iterations"] == 12

    # Another student of as many iterations is another student.
    for step in (folder / "checkpoints").glob("step_000012"):
        (step / "index.json").write_text("{}")
    first = weights(folder)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red ring\na blue cross\n")
    others = ["run.iterations=12", "student_optimizer.lr=1e-2", "run.seed=7", f"prompts.file={prompts}"]
    others.append("engine.accumulation=1")
    done = checked(run_script(0, TRAIN, *mine, *others))
    assert (
        "engine.accumulation = 1 given: engine.accumulation = 2, so that an update stays one of 2 samples"
        in done.stdout
    )
    for words in ("student_optimizer.lr = 0.01 (was 0.001)", "run.seed = 7 (was ", "the content of prompts.file"):
        assert words in re.search("other settings than the checkpoint's: .*", done.stdout)[0]
    assert same_bits(load_file(next((folder / "student_step_000012").glob("*.safetensors"))), first)
    assert not same_bits(weights(folder), first)

    # Nothing is deleted for a run that turns out to be impossible.
    anew = [each for each in mine if each != "--resume"] + ["--overwrite"]
    for impossible, words in (
        ("lora.targets=['(']", "target '(' is no linear layer"),
        ("lora.rank=129", "lora.rank = 129: the adapted weights have a rank of at most 128"),
        (f"prompts.cache_dir={TRAIN}", f"prompts.cache_dir: {TRAIN}"),
    ):
        done = checked(run_script(0, TRAIN, *anew, impossible), 2)
        assert words in done.stderr, done.stderr
        assert (folder / "student" / "dpdmd.json").exists() and (folder / "finished.json").exists()

    shutil.rmtree(folder / "checkpoints")
    done = checked(run_script(0, TRAIN, *mine, "run.iterations=12"), 2)
    assert "holds finished.json and student/dpdmd.json of a run and no checkpoint to go on from" in done.stderr
    assert (folder / "student" / "dpdmd.json").exists()


@pytest.mark.distributed
def test_resume_of_a_mistyped_folder(options, straight, tmp_path):
    shutil.copytree(straight, tmp_path / "my_run_2")
    folder = tmp_path / "my_run2"
    done = checked(run_script(0, TRAIN, *options, "run.iterations=3", f"run.output_dir={folder}", "--resume"))
    assert f"starting at iteration 0: --resume found no checkpoint in {folder / 'checkpoints'}" in done.stdout
    assert f"no run in {folder} (there is my_run_2 beside it)" in done.stdout


@pytest.mark.distributed
def test_a_damaged_checkpoint_falls_back_in_a_run(options, straight, tmp_path):
    """And an export that was cut off is made."""
    folder = tmp_path / "run"
    mine = [*options, "run.checkpoint_every=3", f"run.output_dir={folder}"]
    checked(run_script(2, TRAIN, *mine, "engine.accumulation=1"))
    expected = weights(folder)
    shutil.rmtree(folder / "student")
    (folder / "finished.json").unlink()
    file = folder / "checkpoints" / "step_000009" / "critic" / "rank_00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-7] ^= 1
    file.write_bytes(bytes(data))
    done = checked(run_script(2, TRAIN, *mine, "engine.accumulation=1", "--resume"))
    assert f"{file} is damaged: its content is not what was written (SHA-256); step_000009 is left out" in done.stderr
    assert "going on from iteration 6 " in done.stdout and same_bits(weights(folder), expected)


@pytest.mark.distributed
def test_a_norm_is_exact_on_the_cpu():
    """vector_norm in float32 was 4e-4 off at 10 million elements, and sets the clipping."""
    from dpdmd.engine.gradients import sum_of_squares

    x = torch.rand(10_000_000, generator=torch.Generator().manual_seed(0))
    exact = float(x.double().norm())
    assert float(sum_of_squares(x).sqrt()) == pytest.approx(exact, rel=1e-9)
    assert float(sum_of_squares(x[:0]).sqrt()) == 0.0
    assert abs(float(torch.linalg.vector_norm(x)) / exact - 1) > 1e-6  # what it is for
