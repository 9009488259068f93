"""A whole run on a FLUX pipeline made on the spot, in two processes under ZeRO-3."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from processes import run_script
from runs import TRAIN
from safetensors.torch import load_file

from dpdmd.run.export import STUDENT_FILE


@pytest.fixture(scope="module")
def settings(tiny_flux, tmp_path_factory):
    """Six updates (two of the student), guided by the embedded guidance alone, as FLUX.1-dev is to be trained."""
    folder = tmp_path_factory.mktemp("settings")
    (folder / "prompts.txt").write_text("a red ring\na blue square\na big green cross\na yellow circle\n")
    model = {"pipeline": str(tiny_flux), "family": "flux", "embedded_guidance": 2.5}
    values = {
        "model": {**model, "resolution": 32, "max_sequence_length": 8},
        "prompts": {"file": str(folder / "prompts.txt"), "negative_prompt": None},
        "distill": {"teacher_steps": 6, "anchor": 2, "critic_updates": 2, "guidance_scale": 1.0},
        "student_optimizer": {"lr": 1e-3},
        "critic_optimizer": {"lr": 1e-3},
        # 0: weights are really sharded.
        "engine": {"device": "cpu", "batch_size": 2},
        "run": {"iterations": 6},
    }
    (folder / "settings.yaml").write_text(yaml.safe_dump(values))
    return folder / "settings.yaml"


def train(processes, settings, folder, *options):
    done = run_script(processes, TRAIN, "--config", settings, f"run.output_dir={folder}", *options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.fixture(scope="module")
def straight(settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight") / "run"
    train(2, settings, folder, "run.sample_every=1", "engine.checkpointing=selective")
    return folder


def student_weights(folder):
    return load_file(folder / "student" / "diffusion_pytorch_model.safetensors")


def entries(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.distributed
def test_a_run_finishes_and_exports(straight, tiny_flux):
    assert [entry["kind"] for entry in entries(straight)] == ["critic", "critic", "student"] * 2
    for entry in entries(straight):
        assert all(entry[key] > 0 for key in ("loss", "gradient_norm")) and entry["skipped"] == 0
    assert [path.name for path in sorted((straight / "samples").iterdir())] == ["step_000003.png", "step_000006.png"]
    before = load_file(tiny_flux / "transformer" / "diffusion_pytorch_model.safetensors")
    after = student_weights(straight)
    assert after.keys() == before.keys()
    assert all(value.isfinite().all() and not torch.equal(value, before[name]) for name, value in after.items())
    description = json.loads((straight / "student" / STUDENT_FILE).read_text())
    assert (description["family"], description["guidance_scale"]) == ("flux", 2.5)


@pytest.mark.distributed
def test_two_processes_equal_one(straight, settings, tiny_flux, tmp_path):
    """One process with two micro-batches takes the prompts and the noise that two processes take."""
    options = ["engine.accumulation=2", "engine.zero.teacher=0"]
    train(0, settings, tmp_path / "one", *options)
    start = load_file(tiny_flux / "transformer" / "diffusion_pytorch_model.safetensors")
    a, b = student_weights(tmp_path / "one"), student_weights(straight)
    difference = sum(float((a[name].double() - b[name].double()).square().sum()) for name in a) ** 0.5
    moved = sum(float((a[name].double() - start[name].double()).square().sum()) for name in a) ** 0.5
    # Adam's first updates have the size of the rate whatever the gradient's, so rounding shows where it is near 0.
    assert moved > 0 and difference < 1e-3 * moved
    norms = [[entry["gradient_norm"] for entry in entries(folder)] for folder in (tmp_path / "one", straight)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


@pytest.mark.distributed
def test_exported_student_gives_the_same_pictures_in_a_stock_pipeline(straight, tiny_flux):
    from diffusers import FluxPipeline, FluxTransformer2DModel

    from dpdmd.backbones.flux import pack
    from dpdmd.sample import first_noises, load_student

    student = load_student(straight / "student", device="cpu")
    prompts = ["a red ring", "a blue square"]
    noise = first_noises(0, 2, student.backbone.latent_shape)
    ours = student.backbone.load_decoder("cpu").decode(student.latents(student.encode(prompts), noise))

    description = json.loads((straight / "student" / STUDENT_FILE).read_text())
    transformer = FluxTransformer2DModel.from_pretrained(straight / "student")
    pipeline = FluxPipeline.from_pretrained(tiny_flux, transformer=transformer, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        prompts,
        sigmas=description["pipeline_sigmas"],
        guidance_scale=description["guidance_scale"],
        latents=pack(noise),
        height=description["resolution"],
        width=description["resolution"],
        max_sequence_length=description["max_sequence_length"],
        output_type="pt",
    ).images
    assert theirs.std() > 0.01
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.distributed
def test_sampling_from_the_command_line(straight, tmp_path):
    from dpdmd import sample

    arguments = ["--student", str(straight / "student"), "--prompt", "a red ring", "--device", "cpu"]
    assert sample.main([*arguments, "--num-images", "2", "--output", str(tmp_path / "out")]) == 0
    assert len(list((tmp_path / "out").glob("*.png"))) == 2
