"""The teacher that ships: small, complete for stock diffusers, and good at what its prompts say."""

import json

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from diffusers import StableDiffusion3Pipeline

from dpdmd.worlds.demo import TEACHER, measure, train_teacher, world


@pytest.fixture(scope="module")
def pipeline():
    return StableDiffusion3Pipeline.from_pretrained(TEACHER, local_files_only=True)


def test_the_folder_is_small_and_its_card_keeps_what_is_promised():
    assert sum(path.stat().st_size for path in TEACHER.rglob("*") if path.is_file()) <= 10e6
    assert not list(TEACHER.rglob("*.bin"))
    card = json.loads((TEACHER / "card.json").read_text())
    assert card["reconstruction"]["kept"] >= 0.97
    for row in card["evaluation"]:
        if row["steps"] == 30 and row["guidance_scale"] > 1:
            assert row["accuracy"] >= 0.92
            assert row["num_samples"] < 16 or row["background_entropy"] >= 0.75


def test_it_samples_at_the_pipelines_own_defaults(pipeline):
    image = pipeline("a big red ring on white", generator=torch.Generator().manual_seed(0)).images[0]
    assert image.size == (32, 32)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(1, 32, 32, 3).permute(0, 3, 1, 2)
    result = measure.measure(pixels / 255, ["a big red ring on white"])
    assert result["accuracy"] == 1 and result["validity"] == 1


def test_it_follows_prompts_and_leaves_variety(pipeline):
    prompts = world.evaluation_prompts(16)
    images = train_teacher.sample(pipeline, prompts, 8, steps=30, guidance_scale=4.0)
    result = measure.measure(images, prompts)
    assert result["accuracy"] >= 0.95 and result["validity"] >= 0.75  # 0.83 over all prompts
    # 8 samples: a uniform source measures 0.85
    assert result["background_entropy"] >= 0.5 and result["position_spread"] >= 2
    # the measurement sees a prompt that is not followed
    assert measure.measure(images, prompts[1:] + prompts[:1])["accuracy"] <= 0.3


def test_the_autoencoder_keeps_the_attributes(pipeline):
    assert train_teacher.check_autoencoder(pipeline.vae, count=128)["kept"] >= 0.95
