"""`Backbone.attention_shapes` against what passes of the stock transformers attend to."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from dpdmd.backbones import load_backbone
from dpdmd.config import ModelConfig


def attended(backbone, roles, monkeypatch):
    """(head dimension, tokens) of every attention in a pass of each role's network, each once, sorted."""
    seen, attend = set(), torch.nn.functional.scaled_dot_product_attention

    def noted(query, key, *args, **kwargs):
        assert query.shape == key.shape
        seen.add((query.shape[-1], query.shape[-2]))
        return attend(query, key, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    cond = {name: torch.zeros(1, *shape) for name, shape in backbone.text_shapes.items()}
    for role in roles:
        with torch.no_grad():
            network = backbone.load_transformer(role, torch.float32)
            backbone.predict(network, torch.zeros(1, *backbone.latent_shape), torch.full((1,), 0.5), cond)
    return sorted(seen)


@pytest.mark.parametrize("resolution", [32, 64])
@pytest.mark.parametrize("fixture", ["tiny_pipeline", "tiny_pipeline_no_t5", "tiny_flux", "tiny_schnell"])
def test_shapes_are_what_a_pass_attends_to(request, monkeypatch, fixture, resolution):
    family = "sd3" if "pipeline" in fixture else "flux"
    folder = str(request.getfixturevalue(fixture))
    backbone = load_backbone(ModelConfig(family=family, pipeline=folder, resolution=resolution, max_sequence_length=9))
    image, (text, _) = (resolution // 8) ** 2, backbone.text_shapes["prompt_embeds"]
    expected = {"sd3": [(8, image), (8, image + text)], "flux": [(16, image + text)]}[family]
    assert backbone.attention_shapes() == attended(backbone, ["teacher"], monkeypatch) == expected


def test_roles_may_differ(tiny_pipeline, tmp_path, monkeypatch):
    """A student with other heads and without blocks of the image alone."""
    student = shutil.copytree(tiny_pipeline, tmp_path / "student")
    file = student / "transformer" / "config.json"
    heads = {"attention_head_dim": 16, "num_attention_heads": 2, "dual_attention_layers": []}
    file.write_text(json.dumps(json.loads(file.read_text()) | heads))
    backbone = load_backbone(
        ModelConfig(pipeline=str(tiny_pipeline), student=str(student), resolution=32, random_init=True)
    )
    assert backbone.attention_shapes() == attended(backbone, ["teacher", "student"], monkeypatch)
    assert {head_dim for head_dim, _ in backbone.attention_shapes()} == {8, 16}


def test_known_models():
    for name, length, expected in (
        ("stabilityai/stable-diffusion-3.5-medium", 256, [(64, 4096), (64, 4429)]),
        ("stabilityai/stable-diffusion-3.5-large", 256, [(64, 4429)]),
        ("black-forest-labs/FLUX.1-dev", 512, [(128, 4608)]),
    ):
        family = "flux" if "FLUX" in name else "sd3"
        config = ModelConfig(
            family=family, pipeline=name, resolution=1024, random_init=True, max_sequence_length=length
        )
        assert load_backbone(config).attention_shapes() == expected
