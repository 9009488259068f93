"""The measurement: right on ground truth, and able to say that a picture is wrong."""

import dataclasses
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dpdmd.worlds.demo import measure, world

FULL = [
    world.Prompt(world.caption(**named), **named)
    for named in (
        {"color": "red", "shape": "ring", "size": "small", "position": "left", "background": "gray"},
        {"color": "blue", "shape": "square", "size": "big", "position": "top", "background": "white"},
    )
]


def scenes_of(prompts, samples, seed=5):
    """Scenes that follow the prompts, the free attributes drawn; grouped by prompt."""
    drawn = world.draw_scenes(64 * 4096, seed=seed)
    rows = []
    for prompt in prompts:
        fits = torch.ones(len(drawn), dtype=torch.bool)
        for attribute, names in world.ATTRIBUTES.items():
            if name := getattr(prompt, attribute):
                fits &= getattr(drawn, attribute) == names.index(name)
        rows.append(fits.nonzero()[:samples, 0])
    return drawn[torch.cat(rows)]


@pytest.mark.parametrize("noise", [0.0, 0.03])
def test_ground_truth_is_found(noise):
    scenes = world.draw_scenes(2048, seed=1)
    pictures = world.render(scenes)
    pictures = pictures + noise * torch.randn(pictures.shape, generator=world.generator(0, 0))
    found = measure.examine(pictures)
    for attribute in world.ATTRIBUTES:
        right = getattr(found, attribute) == getattr(scenes, attribute)
        assert right.float().mean() >= 0.99, attribute
    assert (found.radius - scenes.radius).abs().mean() < 0.1
    assert (found.center - scenes.center).abs().mean() < 0.1
    assert found.valid.float().mean() >= (0.99 if noise == 0 else 0.85)


def test_metrics_of_pictures_that_follow_their_prompts():
    prompts = world.evaluation_prompts()
    result = measure.measure(world.render(scenes_of(prompts, 16)), prompts)
    for key in ("accuracy", "accuracy_valid", "validity", *(f"accuracy_{name}" for name in world.ATTRIBUTES)):
        assert result[key] >= 0.99, key
    assert result["num_prompts"] == 64 and result["num_samples"] == 16
    # a uniform source at R = 16 measures 0.92, not 1: the bias that the module's text speaks of
    assert result["background_entropy"] == pytest.approx(0.92, abs=0.02)
    assert 4.5 <= result["background_kinds"] <= 5
    assert result["position_spread"] > 4 and result["size_spread"] > 1.5
    assert all(isinstance(value, float) for value in result.values())
    assert result == measure.measure(world.render(scenes_of(prompts, 16)), [prompt.text for prompt in prompts])


@pytest.mark.parametrize("attribute", list(world.ATTRIBUTES))
def test_a_wrong_attribute_is_seen(attribute):
    scenes = scenes_of(FULL, 8)
    names = world.ATTRIBUTES[attribute]
    wrong = (getattr(scenes, attribute) + 1) % len(names)
    changed = {attribute: wrong}
    if attribute == "size":
        changed["radius"] = torch.tensor([sum(pair) / 2 for pair in world.RADII])[wrong]
        changed["center"] = torch.full_like(scenes.center, 16.0)  # a big one fits in the middle only
    if attribute == "position":
        changed["center"] = 32 - scenes.center
    result = measure.measure(world.render(dataclasses.replace(scenes, **changed)), FULL)
    assert result["accuracy"] == 0 and result[f"accuracy_{attribute}"] == 0
    others = set(world.ATTRIBUTES) - {attribute, "position" if attribute == "size" else attribute}
    assert all(result[f"accuracy_{other}"] == 1 for other in others)
    assert result["validity"] == 1  # a good picture of something else


def test_a_missing_object_is_seen():
    back = torch.tensor(world.BACKGROUNDS["gray"])[None, :, None, None].expand(4, 3, 32, 32)
    result = measure.measure(back, [world.Prompt("a shape on gray", background="gray")])
    assert result["accuracy"] == 0 and result["validity"] == 0
    assert result["accuracy_background"] == 1 and math.isnan(result["accuracy_color"])


def test_what_the_world_cannot_draw_is_not_valid():
    scenes = scenes_of(FULL, 8)
    pictures = world.render(scenes)
    assert measure.examine(pictures).valid.all()
    two = pictures.clone()
    two[:, :, 20:31, 20:31] = torch.tensor(world.COLORS["green"])[:, None, None]
    assert not measure.examine(two).valid.any()
    assert not measure.examine(1 - pictures * 0.4).valid.any()
    noise = torch.rand(16, 3, 32, 32, generator=world.generator(0, 1))
    assert not measure.examine(noise).valid.any()
    assert not measure.examine(torch.full((2, 3, 32, 32), torch.nan)).valid.any()


def test_diversity_falls_when_pictures_repeat():
    prompt = world.parse("a red circle")
    one = world.render(world.draw_scenes(1, seed=2)).expand(16, -1, -1, -1)
    result = measure.measure(one, [prompt])
    assert result["background_entropy"] == 0 and result["background_kinds"] == 1
    assert result["position_spread"] == pytest.approx(0, abs=1e-4) == result["size_spread"]
    # two backgrounds, half each: log 2 / log 5
    two = world.render(dataclasses.replace(scenes_of([prompt], 16), background=torch.arange(16) % 2))
    assert measure.measure(two, [prompt])["background_entropy"] == pytest.approx(math.log(2) / math.log(5), abs=1e-4)


def test_bad_arguments_name_what_they_got():
    with pytest.raises(ValueError, match=r"\(2, 3, 16, 16\)"):
        measure.examine(torch.zeros(2, 3, 16, 16))
    with pytest.raises(ValueError, match="got 3"):
        measure.measure(torch.zeros(3, 3, 32, 32), FULL)
    assert len(measure.examine(torch.zeros(0, 3, 32, 32)).valid) == 0


class Count(TorchDispatchMode):
    """Of torch's operations."""

    operations = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.operations += 1
        return function(*arguments, **(keywords or {}))


def test_pictures_are_measured_together():
    """A thousand take seconds, as operations are made for chunks of 128 and not for each picture."""
    pictures = world.render(world.draw_scenes(1024, seed=4))
    measure.examine(pictures[:1])  # fills its cache
    counts = []
    for chosen in (pictures[:1], pictures[:128], pictures):
        with Count() as count:
            measure.examine(chosen)
        counts.append(count.operations)
    one, chunk, all_of_them = counts
    assert 0 < chunk < 1.1 * one and all_of_them <= 8 * chunk
