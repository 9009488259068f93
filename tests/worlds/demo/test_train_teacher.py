"""The teacher's training: its parts agree with the stock pipeline, and a tiny run writes a folder that stock diffusers uses."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from diffusers import DiffusionPipeline

from dpdmd.command import RunStopped
from dpdmd.worlds.demo import train_teacher, world


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder from a run of a few steps."""
    out = tmp_path_factory.mktemp("teacher")
    sizes = {"layers": 2, "width": 64, "steps": 4, "batch": 16, "autoencoder-steps": 3, "autoencoder-batch": 8}
    sizes |= {"num-prompts": 2, "num-samples": 1, "device": "cpu", "out": out}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_teacher, "POOL", 64)
        patch.setattr(train_teacher, "AUTOENCODER_POOL", 64)
        patch.setattr(train_teacher, "DECAY", 0.5)
        train_teacher.main([f"--{name}={value}" for name, value in sizes.items()])
    return out


@pytest.fixture(scope="module")
def pipeline(folder):
    return DiffusionPipeline.from_pretrained(folder, local_files_only=True)


def captions(count):
    scenes = world.draw_scenes(count, seed=9)
    prompts = world.draw_prompts(scenes, seed=9, index=1)
    attributes = torch.stack([getattr(scenes, name) for name in world.ATTRIBUTES], 1)
    named = torch.tensor([[getattr(prompt, name) is not None for name in world.ATTRIBUTES] for prompt in prompts])
    empty = torch.arange(count) % 10 == 0
    texts = ["" if none else prompt.text for none, prompt in zip(empty.tolist(), prompts, strict=True)]
    return attributes, named, empty, texts


def test_every_word_is_one_token_and_others_fall_apart():
    tokenizer = train_teacher.build_tokenizer()
    for word in world.words():
        assert tokenizer.tokenize(word) == [word + "</w>"]
    pieces = tokenizer.tokenize("déjà vu")
    assert len(pieces) > 2 and tokenizer.unk_token not in pieces
    assert tokenizer.model_max_length == train_teacher.TEXT_LENGTH


def test_the_folder_is_complete_and_samples_at_the_stock_defaults(folder, pipeline):
    card = json.loads((folder / "card.json").read_text())
    assert card["teacher"]["steps"] == 4 and len(card["evaluation"]) == len(train_teacher.SETTINGS)
    assert (folder / "README.md").stat().st_size > 500
    images = pipeline("a red ring", num_inference_steps=2).images
    assert images[0].size == (32, 32)
    without = DiffusionPipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None, local_files_only=True)
    noise = torch.randn(1, 16, 4, 4, generator=world.generator(0, 0))
    settings = {"num_inference_steps": 2, "latents": noise, "output_type": "pt"}
    assert torch.equal(pipeline("a red ring", **settings).images, without("a red ring", **settings).images)


def test_captions_are_the_tokenizers(pipeline):
    attributes, named, empty, texts = captions(400)
    made = train_teacher.Captions(pipeline.tokenizer, "cpu")(attributes, named, empty)
    length = train_teacher.TEXT_LENGTH
    wanted = pipeline.tokenizer(texts, padding="max_length", max_length=length, return_tensors="pt").input_ids
    assert torch.equal(made, wanted)


@torch.no_grad()
def test_encode_text_is_the_pipelines(pipeline):
    attributes, named, empty, texts = captions(40)
    ids = train_teacher.Captions(pipeline.tokenizer, "cpu")(attributes, named, empty)
    width = pipeline.transformer.config.joint_attention_dim
    encoders = [pipeline.text_encoder, pipeline.text_encoder_2]
    states, pooled = train_teacher.encode_text(encoders, ids, text_width=width, num_zeros=16)
    wanted, _, wanted_pooled, _ = pipeline.encode_prompt(
        texts, None, None, do_classifier_free_guidance=False, max_sequence_length=16
    )
    assert torch.equal(states, wanted) and torch.equal(pooled, wanted_pooled)
    # pooled at the end of the text: what is behind it must not matter
    row = texts.index("") + 1
    end = len(texts[row].split()) + 2
    changed = ids[row : row + 1].clone()
    changed[:, end:] = pipeline.tokenizer.bos_token_id
    other = train_teacher.encode_text(encoders, changed, text_width=width)[1]
    torch.testing.assert_close(other, pooled[row : row + 1])
    assert pooled.std(0).max() > 0.01  # and what is before it must: at the start token all captions are alike


@torch.no_grad()
@pytest.mark.parametrize("zeros", [1, 7, 256])
def test_one_weighted_zero_stands_for_many(zeros):
    torch.manual_seed(0)
    transformer = train_teacher.build_transformer(layers=3, width=64, text_width=48).eval()
    for parameter in transformer.parameters():  # away from blocks that are the identity
        parameter.add_(0.1 * torch.randn_like(parameter))
    x, states, pooled = torch.randn(4, 16, 4, 4), torch.randn(4, 15, 48), torch.randn(4, 48)
    times = torch.rand(4) * 1000

    def velocity(count, **attention):
        padded = F.pad(states, (0, 0, 0, count))
        return transformer(x, padded, pooled, times, return_dict=False, joint_attention_kwargs=attention)[0]

    many, one = velocity(zeros), velocity(1)
    transformer.set_attn_processor(train_teacher.BiasedJointAttention())
    key_bias = torch.zeros(4, 1, 1, 32)
    key_bias[..., -1] = math.log(zeros)
    weighted = velocity(1, key_bias=key_bias)
    assert (weighted - many).norm() / many.norm() < 1e-5
    assert zeros == 1 or (one - many).norm() / many.norm() > 1e-3  # the weight matters


def test_training_lowers_the_loss(monkeypatch):
    monkeypatch.setattr(train_teacher, "DECAY", 0.9)
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.ones(4))
    average = weight.detach().clone()
    report = train_teacher.optimise(
        lambda: weight.square().sum(), [weight], label="toy", rate=0.1, steps=200, averages=[average]
    )
    assert report["steps"] == 200
    assert weight.detach().abs().max() < 1e-2 and average.abs().max() < 0.05
    with pytest.raises(RunStopped, match="toy: the loss is nan after 2 steps; a smaller --rate is needed"):
        train_teacher.optimise(lambda: weight.sum() * torch.nan, [weight], label="toy", rate=0.1, steps=2)


def test_bad_width_is_an_error():
    with pytest.raises(ValueError, match=r"multiple of 64.*got 100"):
        train_teacher.build_transformer(layers=1, width=100, text_width=8)
