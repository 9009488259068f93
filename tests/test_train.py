"""Whole runs on a pipeline made on the spot, most of them in two processes under ZeRO-3."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from deepspeed.ops.op_builder import AsyncIOBuilder
from processes import run_script
from runs import DRIVER, TRAIN, checked, distance, same_bits, weights
from safetensors.torch import load_file

from dpdmd import train
from dpdmd.config import load_config
from dpdmd.run.export import STUDENT_FILE


@pytest.fixture(scope="module")
def settings(tiny_pipeline, tmp_path_factory):
    """A configuration file for six updates (two of the student) on the tiny pipeline."""
    folder = tmp_path_factory.mktemp("settings")
    (folder / "prompts.txt").write_text("a red ring\na blue square\na big green cross\na yellow circle\n")
    values = {
        "model": {"pipeline": str(tiny_pipeline), "resolution": 32, "max_sequence_length": 8},
        "prompts": {"file": str(folder / "prompts.txt")},
        "distill": {"teacher_steps": 6, "anchor": 2, "critic_updates": 2},
        # A rate that falls: a resumed run must know how far it had come.
        "student_optimizer": {"lr": 1e-3, "decay": "cosine"},
        "critic_optimizer": {"lr": 1e-3, "decay": "cosine"},
        # 0: weights are really sharded.
        "engine": {"device": "cpu", "batch_size": 2},
        "run": {"iterations": 6, "checkpoint_every": 3, "sample_every": 1, "max_bad_updates": 3},
    }
    (folder / "settings.yaml").write_text(yaml.safe_dump(values))
    return folder / "settings.yaml"


@pytest.fixture(scope="module")
def straight(settings, tmp_path_factory):
    """Six updates in two processes, the noise of each written down."""
    folder = tmp_path_factory.mktemp("straight")
    checked(run_script(2, DRIVER, "recorded", folder, "--config", settings, f"run.output_dir={folder / 'run'}"))
    return folder


def entries(run_folder):
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.distributed
def test_a_run_leaves_what_it_promises(straight):
    folder = straight / "run"
    names = {path.name for path in folder.iterdir()}
    assert names >= {"config.yaml", "metrics.jsonl", "finished.json", "samples", "checkpoints", "student", "embeddings"}
    assert [entry["kind"] for entry in entries(folder)] == ["critic", "critic", "student"] * 2
    for entry in entries(folder):
        assert all(entry[key] > 0 for key in ("loss", "gradient_norm", "lr", "seconds", "samples_per_second"))
    assert [path.name for path in sorted((folder / "samples").iterdir())] == ["step_000003.png", "step_000006.png"]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step_000003", "step_000006"]
    assert json.loads((folder / "finished.json").read_text())["updates"] == {"student": 2, "critic": 4}
    if (folder / "tensorboard").exists():
        assert any((folder / "tensorboard").iterdir())


@pytest.mark.distributed
def test_processes_draw_different_noise(straight):
    first, second = ((straight / f"noise-{rank}.txt").read_text().splitlines() for rank in (0, 1))
    # The sample grids' noise is the same on all processes by intent: it has its own role, and is left out here.
    grid = set(first) & set(second)
    ours, theirs = ([line for line in lines if line not in grid] for lines in (first, second))
    assert len(ours) == len(theirs) == 6 * 2  # noise to start from and noise to renoise with, for each update
    assert len(set(ours) | set(theirs)) == 24


LEVERS = {
    "as configured": [],
    "rounded state": [
        "model.dtype=bfloat16",
        "student_optimizer.state=float8",
        "critic_optimizer.state=bfloat16",
        "engine.residency=block",
        "engine.checkpointing=selective",
        "ema={decay: 0.5}",
    ],
    "offload": [
        "model.dtype=bfloat16",
        "engine.offload=cpu",
        "engine.residency=whole",
        "model.teacher_storage=float8",
        "ema={decay: 0.5, device: cpu}",
    ],
    "swapping": [
        "model.dtype=bfloat16",
        "engine.offload=nvme",
        "engine.nvme_path={folder}",
        "engine.deepspeed={aio: {block_size: 4096}}",  # what is smaller stays in memory
    ],
    "adapters": ["model.dtype=bfloat16", "lora={rank: 4}", "student_optimizer.state=float8", "ema={decay: 0.5}"],
}


@pytest.mark.distributed
@pytest.mark.parametrize("lever", LEVERS)
def test_killed_while_saving_then_resumed_is_bit_for_bit_the_straight_run(settings, straight, tmp_path, lever):
    """Covers 3 + resume + 3 as well: the killed run's last complete checkpoint is that of update 3."""
    folder, expected = tmp_path / "run", straight / "run"
    if lever == "swapping" and not AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("needs the headers of libaio")
    disk = tmp_path / "disk"
    disk.mkdir()
    options = [option.format(folder=disk) if "{folder}" in option else option for option in LEVERS[lever]]
    plainly = (DRIVER, "nothing", tmp_path)
    if options:
        expected = tmp_path / "straight"
        checked(run_script(2, *plainly, "--config", settings, *options, f"run.output_dir={expected}"))
        assert not any(disk.iterdir())
    killed = run_script(2, DRIVER, "killed", tmp_path, "--config", settings, *options, f"run.output_dir={folder}")
    assert killed.returncode != 0
    left = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert left == [".unfinished-step_000006", "step_000003"]
    assert not (folder / "finished.json").exists()

    refused = run_script(2, *plainly, "--config", settings, *options, f"run.output_dir={folder}")
    assert refused.returncode != 0 and "holds an unfinished run" in refused.stderr and "--resume" in refused.stderr

    checked(run_script(2, *plainly, "--config", settings, *options, "--resume", f"run.output_dir={folder}"))
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step_000003", "step_000006"]
    assert same_bits(weights(folder), weights(expected))
    timings = ("seconds", "samples_per_second")
    strip = lambda lines: [{k: v for k, v in line.items() if k not in timings} for line in lines]  # noqa: E731
    assert strip(entries(folder)) == strip(entries(expected))


@pytest.mark.distributed
def test_state_that_would_not_be_swapped(settings, tmp_path):
    if not AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("needs the headers of libaio")
    options = ["engine.offload=nvme", f"engine.nvme_path={tmp_path}", f"run.output_dir={tmp_path / 'run'}"]
    done = run_script(0, TRAIN, "--config", settings, *options)
    assert done.returncode == 2 and "DeepSpeed swaps no tensor below 1 MiB" in done.stderr


@pytest.mark.distributed
def test_the_average_is_what_is_exported(settings, straight, tmp_path):
    """After two student updates: decay^2 start + (1 - decay) decay first + (1 - decay) second, against runs that export
    the weights themselves after one update and after two; training itself does not notice."""
    start = load_file(
        Path(load_config(settings).model.pipeline) / "transformer" / "diffusion_pytorch_model.safetensors"
    )
    one, averaged = tmp_path / "one", tmp_path / "averaged"
    cut = ["run.iterations=3", "run.sample_every=0", "student_optimizer.decay=none", "critic_optimizer.decay=none"]
    checked(run_script(0, TRAIN, "--config", settings, *cut, f"run.output_dir={one}"))
    two = tmp_path / "two"
    checked(run_script(0, TRAIN, "--config", settings, *cut, "run.iterations=6", f"run.output_dir={two}"))
    options = [*cut, "run.iterations=6", "ema={decay: 0.75}", "run.sample_every=1"]
    checked(run_script(0, TRAIN, "--config", settings, *options, f"run.output_dir={averaged}"))
    first, second, found = weights(one), weights(two), weights(averaged)
    moved = 0.0
    for name, value in found.items():
        expected = 0.75**2 * start[name].double() + 0.75 * 0.25 * first[name].double() + 0.25 * second[name].double()
        torch.testing.assert_close(value.double(), expected, atol=1e-6, rtol=1e-5)
        moved += float((second[name] - value).abs().sum())
    assert moved > 0
    timings = ("seconds", "samples_per_second")
    strip = lambda lines: [{k: v for k, v in line.items() if k not in timings} for line in lines]  # noqa: E731
    assert strip(entries(averaged)) == strip(entries(two))


@pytest.mark.distributed
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-4), ("bfloat16", 0.2)])
def test_two_processes_equal_one_at_the_same_global_batch(settings, straight, tmp_path, dtype, tolerance):
    """One process with two micro-batches takes the prompts and the noise that two processes take."""
    precision = [f"model.dtype={dtype}", "run.sample_every=0", "run.checkpoint_every=0"]
    one, two = tmp_path / "one", tmp_path / "two"
    checked(run_script(0, TRAIN, "--config", settings, *precision, "engine.accumulation=2", f"run.output_dir={one}"))
    if dtype == "float32":
        two = straight / "run"
    else:
        checked(run_script(2, TRAIN, "--config", settings, *precision, f"run.output_dir={two}"))
    start = load_file(
        Path(load_config(settings).model.pipeline) / "transformer" / "diffusion_pytorch_model.safetensors"
    )
    a, b = weights(one), weights(two)
    difference, moved = distance(a, b), distance(a, start)
    # Adam's first updates have the size of the rate whatever the gradient's, so its rounding shows in full where it is
    # near 0; the whole change of the weights is the measure.
    assert moved > 0 and difference < tolerance * moved
    norms = [[entry["gradient_norm"] for entry in entries(folder)] for folder in (one, two)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4 if dtype == "float32" else 0.03)


@pytest.mark.distributed
def test_run_that_stays_broken_stops_with_its_last_good_checkpoint(settings, tmp_path):
    folder = tmp_path / "run"
    options = ["run.iterations=20", "run.checkpoint_every=2", "run.sample_every=0"]
    done = run_script(0, DRIVER, "broken", tmp_path, "--config", settings, *options, f"run.output_dir={folder}")
    assert done.returncode == 1
    # Updates from the fifth on fail, of the critic numbers 5, 7 and 8. After the checkpoint of update 4 neither role's next
    # update was finite; after that of update 2 both were.
    assert "3 updates of the critic in a row were not finite (the last was number 8)" in done.stderr
    assert f"the last good checkpoint is {folder / 'checkpoints' / 'step_000002'}" in done.stderr
    assert "1 of the student's 2, 3 of the critic's 6 updates; prompts in them: 'a " in done.stderr
    assert [entry["skipped"] for entry in entries(folder)] == [0, 0, 0, 0, 1, 2, 3, 4]
    found = sorted(str(path.relative_to(folder)) for path in (folder / "checkpoints").glob("*/*") if path.is_file())
    assert [each for each in found if "index" not in each] == [
        "checkpoints/step_000002/confirmed",
        "checkpoints/step_000004/suspect",
    ]


@pytest.mark.distributed
def test_disk_that_fills_up_loses_nothing(settings, tmp_path):
    folder = tmp_path / "run"
    done = run_script(
        0, DRIVER, "full", tmp_path, "--config", settings, "run.sample_every=0", f"run.output_dir={folder}"
    )
    assert done.returncode == 1
    assert "step_000006 could not be written" in done.stderr and "No space left on device" in done.stderr
    assert f"the newest complete checkpoint is {folder / 'checkpoints' / 'step_000003'}" in done.stderr
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_000003"]


@pytest.mark.distributed
def test_resume_refuses_what_changed(settings, straight, tiny_pipeline, tmp_path):
    """Another architecture, another recipe: each named, and the checkpoint stays as it is."""
    from diffusers import SD3Transformer2DModel

    folder = tmp_path / "run"
    shutil.copytree(straight / "run", folder)
    changed = tmp_path / "pipeline"
    shutil.copytree(tiny_pipeline, changed)
    config = SD3Transformer2DModel.load_config(changed / "transformer")
    shutil.rmtree(changed / "transformer")
    SD3Transformer2DModel.from_config({**config, "num_layers": 3}).save_pretrained(changed / "transformer")
    one_process = ["run.iterations=9", f"run.output_dir={folder}"]
    done = run_script(2, TRAIN, "--config", settings, "--resume", f"model.pipeline={changed}", *one_process)
    assert done.returncode != 0
    assert "was saved with architecture" in done.stderr
    assert "num_layers = 2, and this run has 3" in done.stderr
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step_000003", "step_000006"]


@pytest.mark.distributed
def test_exported_student_gives_the_same_pictures_in_a_stock_pipeline(straight, tiny_pipeline):
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    from dpdmd.sample import first_noises, load_student

    folder = straight / "run" / "student"
    student = load_student(folder, device="cpu")
    prompts = ["a red ring", "a blue square"]
    noise = first_noises(0, 2, student.backbone.latent_shape)
    ours = student.backbone.load_decoder("cpu").decode(student.latents(student.encode(prompts), noise))

    description = json.loads((folder / STUDENT_FILE).read_text())
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        tiny_pipeline, transformer=SD3Transformer2DModel.from_pretrained(folder), local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        prompts,
        sigmas=description["pipeline_sigmas"],
        guidance_scale=description["guidance_scale"],
        latents=noise,
        height=description["resolution"],
        width=description["resolution"],
        max_sequence_length=description["max_sequence_length"],
        output_type="pt",
    ).images
    assert theirs.std() > 0.01
    torch.testing.assert_close(ours, theirs.clamp(0, 1).float(), atol=1e-5, rtol=0)
    assert (folder / "config.yaml").exists()


@pytest.mark.distributed
def test_exported_adapter_gives_the_same_pictures_in_a_stock_pipeline(settings, tiny_pipeline, tmp_path):
    from diffusers import StableDiffusion3Pipeline

    from dpdmd.sample import first_noises, load_student

    folder = tmp_path / "run"
    options = ["lora={rank: 4, alpha: 8}", "engine.zero.teacher=0", "student_optimizer.lr=0.1"]
    checked(run_script(0, TRAIN, "--config", settings, *options, f"run.output_dir={folder}"))
    assert not (folder / "student" / "config.json").exists()
    student = load_student(folder / "student", device="cpu")
    noise = first_noises(0, 2, student.backbone.latent_shape)
    ours = student.latents(student.encode(["a red ring", "a blue square"]), noise)

    description = json.loads((folder / "student" / STUDENT_FILE).read_text())
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_pipeline, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    call = {
        "prompt": ["a red ring", "a blue square"],
        "sigmas": description["pipeline_sigmas"],
        "guidance_scale": 1.0,
        "latents": noise,
        "height": 32,
        "width": 32,
        "max_sequence_length": 8,
        "output_type": "latent",
    }
    teacher = pipeline(**call).images
    pipeline.load_lora_weights(folder / "student")
    theirs = pipeline(**call).images
    torch.testing.assert_close(ours, theirs.float(), atol=1e-5, rtol=1e-5)
    assert (theirs - teacher).norm() > 0.01 * teacher.norm()


@pytest.mark.distributed
@pytest.mark.parametrize(
    "processes, options, logged",
    [
        (
            2,
            [
                "distill.method=dmd",
                "distill.renoise={per: sample, distribution: uniform}",
                "prompts.encoding=stream",
                "engine.zero.teacher=0",
                "student_optimizer.name=torch",
                "engine.accumulation=2",
            ],
            [0, 1, 2, 3, 4, 5],
        ),
        (
            0,
            [
                "distill.rollout_gradient=random",
                "distill.detach=false",
                "distill.student_grid=[1, 0.9, 0.6, 0.2]",
                "distill.guidance_scale=1",
                "prompts.negative_prompt=null",
                "student_optimizer.warmup=2",
                "engine.checkpointing=selective",
                "engine.clip=0.5",
                "distill.normalizer=sample",
                "run.log_every=2",
            ],
            [0, 2, 3],  # of the critic's updates 0, 1, 3, 4 and the student's 2, 5 every second
        ),
    ],
)
def test_runs_with_other_settings(settings, tmp_path, processes, options, logged):
    folder = tmp_path / "run"
    checked(run_script(processes, TRAIN, "--config", settings, *options, f"run.output_dir={folder}"))
    lines = entries(folder)
    assert [(entry["iteration"], entry["skipped"]) for entry in lines] == [(iteration, 0) for iteration in logged]
    assert all(torch.isfinite(value).all() for value in weights(folder).values())
    assert json.loads((folder / "student" / STUDENT_FILE).read_text())["times"][-1] == 0.0


def test_resume_and_overwrite_exclude_each_other(capsys):
    with pytest.raises(SystemExit):
        train.main(["--resume", "--overwrite"])
    assert "not allowed with argument" in capsys.readouterr().err


def test_sampling_from_the_command_line(straight, tmp_path, capsys):
    from dpdmd import sample

    arguments = ["--student", str(straight / "run" / "student"), "--prompt", "a red ring", "--device", "cpu"]
    assert sample.main([*arguments, "--num-images", "2", "--output", str(tmp_path / "out")]) == 0
    assert len(list((tmp_path / "out").glob("*.png"))) == 2
    assert sample.main([*arguments, "--num-images", "1", "--output", str(tmp_path / "out")]) == 0  # writes over nothing
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == [
        "000-0-000.png",
        "000-0-001.png",
        "001-0-000.png",
    ]
    assert sample.main(["--student", str(tmp_path), "--prompt", "x", "--output", str(tmp_path / "out")]) == 2
    assert "has no dpdmd.json" in capsys.readouterr().err


def test_dry_run_prints_the_configuration_and_touches_nothing(settings, tmp_path, capsys):
    folder = tmp_path / "run"
    assert train.main(["--config", str(settings), "--dry-run", "--local_rank=0", f"run.output_dir={folder}"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["distill"]["anchor"] == 2
    assert not folder.exists()
    assert train.main(["--config", str(settings), "--dry-run", "run.output_dir=/dev/null"]) == 2
    assert "run.output_dir = '/dev/null': /dev/null is no folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        (["model.pipeline={tmp}"], "diffusers pipeline folder has a model_index.json"),
        (["model.resolution=36"], "model.resolution = 36: must be a multiple of 8"),
        (["prompts.file={tmp}/empty.txt"], "empty.txt"),
        (["prompts.file={tmp}/latin.txt"], "latin.txt.*UTF-8"),
        (["distill.anchor=7"], "distill.anchor = 7 is more than distill.teacher_steps = 6"),
        (["distill.student_steps=1"], "2 or more are needed"),
        (["prompts.negative_prompt=null"], "needs unconditional embeddings"),
        pytest.param(
            ["run.wandb=project"],
            "run.wandb = 'project': wandb is not installed",
            marks=pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed"),
        ),
        (["student_optimizer.name=apex"], "optimizer name = 'apex' cannot be used: it needs a CUDA device"),
        (
            ["engine.deepspeed={tmp}/empty.txt", "engine.offload=cpu"],
            "engine.deepspeed = .*empty.txt': not a JSON file",
        ),
        (["distill.student_grid=[2, 0.6, 0.4, 0.2]"], "distill.student_grid = .*: starts at 2.0000"),
        (["distill.student_grid=[0.9, 0.6, 0.4, 0.2]"], "distill.student_grid = .*: starts at 0.9000"),
        (["distill.ancor=7"], "nearest known is distill.anchor"),
        (["student_optimizer={{state: float8, name: torch}}"], "state = float8 needs name = fused"),
        (
            ["engine.offload=cpu", "critic_optimizer.state=bfloat16"],
            "critic_optimizer.name = auto and state = bfloat16: offload needs",
        ),
        (["engine.offload=nvme"], "engine.offload = nvme needs engine.nvme_path"),
        (["engine.offload=nvme", "engine.nvme_path={tmp}/none"], "engine.nvme_path = .*none': no folder"),
        (
            ["engine.offload=cpu", "critic_optimizer.name=deepspeed"],
            "critic_optimizer.name = deepspeed and state = float32: offload needs name auto or torch, and state=float32",
        ),
        (
            ["engine.offload=nvme", "engine.nvme_path={tmp}", "ema={{decay: 0.5}}"],
            "ema with engine.offload = nvme: the masters must be in memory; set ema=null or engine.offload=cpu",
        ),
        (
            ["model.teacher_storage=float8", "engine.zero.teacher=0"],
            "needs ZeRO stage 3 and no LoRA, but engine.zero.teacher = 0",
        ),
        (["lora={{rank: 4}}", "model.critic={tmp}"], "model.critic = .* with lora: the critic is an adapter"),
    ],
)
def test_bad_input_stops_before_anything_is_loaded(settings, tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.setattr(train, "start", lambda *args: pytest.fail("started something"))
    monkeypatch.setattr(train, "build", lambda *args: pytest.fail("loaded something"))
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "latin.txt").write_bytes("caf\xe9\n".encode("latin-1"))
    options = [option.format(tmp=tmp_path) for option in options]
    assert train.main(["--config", str(settings), f"run.output_dir={tmp_path / 'run'}", *options]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_roles_take_turns():
    assert [train.role_of(iteration, 2) for iteration in range(6)] == ["critic", "critic", "student"] * 2
    assert [train.updates_before(iteration, 2) for iteration in range(9)] == [0, 1, 0, 2, 3, 1, 4, 5, 2]
