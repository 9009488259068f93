"""The picture world: repeatable, balanced, captioned as documented."""

import pytest
import torch

from dpdmd.worlds.demo import PROMPTS, world


def test_same_seed_and_index_give_the_same_pictures():
    first = world.render(world.draw_scenes(65, seed=3, index=7))
    assert first.shape == (65, 3, 32, 32) and first.dtype == torch.float32
    assert first.min() >= 0 and first.max() <= 1
    assert torch.equal(first, world.render(world.draw_scenes(65, seed=3, index=7)))
    assert not torch.equal(first, world.render(world.draw_scenes(65, seed=3, index=8)))
    assert not torch.equal(first, world.render(world.draw_scenes(65, seed=4, index=7)))


def test_attributes_are_uniform_and_lengths_keep_their_ranges():
    scenes = world.draw_scenes(20000, seed=0)
    for attribute, names in world.ATTRIBUTES.items():
        share = torch.bincount(getattr(scenes, attribute), minlength=len(names)) / len(scenes)
        assert (share - 1 / len(names)).abs().max() < 0.02, attribute
    low, high = torch.tensor(world.RADII)[scenes.size].unbind(-1)
    assert ((scenes.radius >= low) & (scenes.radius <= high)).all()
    offset = scenes.center - world.SIZE / 2
    for position, (axis, sign) in {"left": (0, -1), "right": (0, 1), "top": (1, -1), "bottom": (1, 1)}.items():
        rows = offset[scenes.position == world.POSITIONS.index(position)]
        assert (sign * rows[:, axis] >= world.ALONG).all() and (rows[:, 1 - axis].abs() <= world.ACROSS).all()
    assert (offset[scenes.position == 4].abs() <= world.ACROSS).all()


def test_coverage_has_the_area_of_its_shape():
    r = 8.0
    areas = [torch.pi * r**2, (1.7 * r) ** 2, 27**0.5 * (0.55 * r) ** 2, 8 * 0.33 * r**2 - (0.66 * r) ** 2]
    areas.append(torch.pi * (r**2 - (r / 2) ** 2))
    masks = world.coverage(torch.arange(5), torch.full((5,), r), torch.full((5, 2), 16.3))
    for name, mask, area in zip(world.SHAPES, masks, areas, strict=True):
        # corners are rounded by half a pixel of anti-aliasing
        assert mask.sum().item() == pytest.approx(area, rel=0.02), name


def test_captions_name_what_they_should_and_parse_back():
    assert world.caption(color="red", shape="ring") == "a red ring"
    assert world.caption(color="blue", shape="square", size="big", position="left") == "a big blue square at left"
    assert world.caption(color="green", shape="circle", background="brown") == "a green circle on brown"
    assert world.caption(color="orange") == "an orange shape"
    scenes = world.draw_scenes(4000, seed=1)
    prompts = world.draw_prompts(scenes, seed=1, index=1)
    for prompt in prompts:
        assert world.parse(prompt.text) == prompt
    for attribute, rate in world.DROP_RATES.items():
        free = sum(getattr(prompt, attribute) is None for prompt in prompts) / len(prompts)
        assert free == pytest.approx(rate, abs=0.03), attribute
    with pytest.raises(ValueError, match="'dog'"):
        world.parse("a red dog")


def test_evaluation_prompts_are_fixed_and_apart_from_the_training_prompts():
    prompts = world.evaluation_prompts()
    assert prompts == world.evaluation_prompts() and len({prompt.text for prompt in prompts}) == 64
    assert sum(prompt.background is None for prompt in prompts) >= 24
    assert sum(prompt.position is None for prompt in prompts) >= 24
    lines = PROMPTS.read_text(encoding="utf-8").splitlines()
    assert lines == [prompt.text for prompt in world.training_prompts()]
    assert len(set(lines)) == len(lines) == 512
    assert not {prompt.text for prompt in prompts} & set(lines)


def test_more_prompts_than_captions_is_an_error():
    with pytest.raises(ValueError, match="5120"):
        world.training_prompts(6000)
