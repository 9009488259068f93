"""A family that one file brings along: it is found, trained, exported and sampled from, and nothing else has changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from processes import run_script
from runs import SHORT, TRAIN, checked

from dpdmd import plan, sample
from dpdmd.backbones import family, load_backbone
from dpdmd.backbones.family import find, register
from dpdmd.config import ConfigError, ModelConfig
from dpdmd.engine.lora import adapter_parameters, add_adapters
from dpdmd.run.export import STUDENT_FILE

FILE = Path(__file__).parents[2] / "examples" / "toy_family.py"
LENGTH = 8
PROMPTS = ["a red ring", "a blue square at left", ""]
WORDS = "[pad] [unk] a red ring blue square at left big green cross yellow circle"


@pytest.fixture(scope="module", autouse=True)
def known_here_alone():
    """Other tests' families are those that ship."""
    yield
    family._REGISTERED.pop("toy", None)
    family._from_file.cache_clear()


def toy():
    """The module: names in it are those of the classes that the family has."""
    import sys

    return sys.modules[find(str(FILE)).__module__]


@pytest.fixture(scope="session")
def toy_pipeline(tmp_path_factory) -> Path:
    """Folder of a pipeline of the family. Not to be written to."""
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2Model

    folder = tmp_path_factory.mktemp("toy") / "pipeline"
    torch.manual_seed(0)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS.split())}, unk_token="[unk]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    llm = Qwen2Config(
        vocab_size=len(WORDS.split()),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    parts = {
        "tokenizer": PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[pad]", unk_token="[unk]"),
        "text_encoder": Qwen2Model(llm),
        "transformer": toy().ToyTransformer(),
        "vae": AutoencoderKLWan(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 1],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[0.1, 0.2, -0.1, 0.3],
            latents_std=[1.0, 2.0, 0.5, 1.5],
            scale_factor_temporal=1,
            scale_factor_spatial=2,
        ),
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    }
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    index = {name: [type(part).__module__.split(".")[0], type(part).__name__] for name, part in parts.items()}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "ToyPipeline", **index}))
    return folder


def config(pipeline, **values) -> ModelConfig:
    find(str(FILE))
    return ModelConfig(**{"pipeline": str(pipeline), "resolution": 16, "max_sequence_length": LENGTH, **values})


# What it is


def test_the_family_is_that_of_the_pipeline(toy_pipeline, tiny_flux, tmp_path):
    by_class, by_file = (load_backbone(config(toy_pipeline, family=family)) for family in (None, str(FILE)))
    assert type(by_class) is type(by_file) is toy().Toy
    assert (by_class.config.family, by_file.config.family, by_class.config.fuse) == ("toy", str(FILE), False)
    assert by_class.latent_shape == (4, 2, 8, 8)
    assert by_class.text_shapes == {"caption": (LENGTH, 16), "caption_mask": (LENGTH,)}
    assert [each.__name__ for each in by_class.block_classes] == ["ToyBlock"]
    assert load_backbone(config(tiny_flux, resolution=32)).family.name == "flux"
    with pytest.raises(ConfigError, match=r"is a FluxPipeline; a ToyPipeline is needed .*takes model\.family=flux"):
        load_backbone(config(tiny_flux, family="toy"))
    other = shutil.copytree(toy_pipeline, tmp_path / "other")
    (other / "model_index.json").write_text(json.dumps({"_class_name": "OtherPipeline"}))
    with pytest.raises(ConfigError, match="is a OtherPipeline; a FluxPipeline or StableDiffusion3Pipeline or Toy"):
        load_backbone(config(other))


def test_families_that_there_are_not(toy_pipeline, tmp_path):
    with pytest.raises(ConfigError, match=r"model\.family = 'toys': there is no such family; there are flux, sd3, toy"):
        load_backbone(config(toy_pipeline, family="toys"))
    with pytest.raises(ConfigError, match=r"model\.family: .*none\.py cannot be read"):
        load_backbone(config(toy_pipeline, family=str(tmp_path / "none.py")))
    (tmp_path / "empty.py").touch()
    with pytest.raises(ConfigError, match="it registers 0 families, and one is needed"):
        load_backbone(config(toy_pipeline, family=str(tmp_path / "empty.py")))
    with pytest.raises(ValueError, match="Toy has that name or class"):
        register(toy().Toy)
    with pytest.raises(ConfigError, match="no fused operations for the family toy"):
        load_backbone(config(toy_pipeline, fp8="no_grad"))


def test_random_weights_of_a_published_model():
    backbone = load_backbone(config("toy/published", random_init=True))
    assert (backbone.family.name, backbone.text_key) == ("toy", "random-8x16-8")
    cond = backbone.load_text("cpu", torch.float32).encode(PROMPTS)
    assert (cond["caption_mask"] == 1).all() and cond["caption"].std() > 0.5
    x = torch.randn(3, *backbone.latent_shape)
    transformer = backbone.load_transformer("student", torch.float32)
    assert backbone.predict(transformer, x, torch.full((3,), 0.5), cond).shape == x.shape
    assert len(transformer.layers) == 3


def test_text_of_any_length(toy_pipeline):
    """The mask tells the tokens, and what is padded with how much makes no difference."""
    backbone, longer = (load_backbone(config(toy_pipeline, max_sequence_length=n)) for n in (LENGTH, 2 * LENGTH))
    cond, padded = (each.load_text("cpu", torch.float32).encode(PROMPTS) for each in (backbone, longer))
    assert cond["caption_mask"].sum(1).tolist() == [3, 5, 0]
    assert (cond["caption"][cond["caption_mask"] == 0] == 0).all()
    transformer = backbone.load_transformer("teacher", torch.float32)
    x, t = torch.randn(3, *backbone.latent_shape), torch.tensor([0.9, 0.5, 0.1])
    with torch.no_grad():
        ours, theirs = (b.predict(transformer, x, t, c) for b, c in ((backbone, cond), (longer, padded)))
    torch.testing.assert_close(ours, theirs)
    assert (
        ours[0] - backbone.predict(transformer, x, t, {**cond, "caption_mask": cond["caption_mask"].roll(1, 0)})[0]
    ).any()


def test_latents_are_decoded_by_their_statistics(toy_pipeline):
    backbone = load_backbone(config(toy_pipeline))
    latents, decoder = torch.randn(2, *backbone.latent_shape), backbone.load_decoder("cpu")
    mean, std = torch.tensor([0.1, 0.2, -0.1, 0.3]), torch.tensor([1.0, 2.0, 0.5, 1.5])
    raw = latents * std.view(4, 1, 1, 1) + mean.view(4, 1, 1, 1)
    with torch.no_grad():
        frames = (decoder._vae.decode(raw).sample * 0.5 + 0.5).clamp(0, 1)
    images = decoder.decode(latents)
    assert images.shape == (2, 3, 16, 2 * 16) and frames.shape == (2, 3, 2, 16, 16)
    assert torch.equal(images[..., :16], frames[:, :, 0]) and torch.equal(images[..., 16:], frames[:, :, 1])


def test_adapters_and_plan_know_it(toy_pipeline, capsys):
    transformer = load_backbone(config(toy_pipeline)).load_transformer("teacher", torch.float32)
    add_adapters(transformer, rank=2, alpha=2, seed=0)
    layers = {name.rsplit(".lora_", 1)[0] for name in adapter_parameters(transformer, "student")}
    assert layers == {f"layers.{i}.{name}" for i in (0, 1) for name in ("to_q", "to_v", "net.0")}
    model = [f"model.pipeline={toy_pipeline}", "model.resolution=16", f"model.max_sequence_length={LENGTH}"]
    assert plan.main(["--gpu-memory", "16", *model, "prompts.file=x", "evaluation.enabled=false"]) == 0
    assert "a cycle" in capsys.readouterr().out


# What a run makes of it


@pytest.fixture(scope="module")
def run(toy_pipeline, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    prompts = folder.with_name("prompts.txt")
    prompts.write_text("\n".join(PROMPTS[:2]))
    model = [f"model.pipeline={toy_pipeline}", f"model.family={FILE}", "model.resolution=16"]
    options = [f"model.max_sequence_length={LENGTH}", f"prompts.file={prompts}", "distill.student_grid=uniform"]
    checked(run_script(0, TRAIN, *SHORT, *model, *options, f"run.output_dir={folder}", "run.sample_every=3"))
    return folder


@pytest.mark.distributed
def test_it_is_trained_and_exported(run, toy_pipeline):
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [entry["kind"] for entry in entries] == ["critic", "critic", "student"] * 3
    assert all(entry["loss"] > 0 and entry["gradient_norm"] > 0 and entry["skipped"] == 0 for entry in entries)
    assert len(list((run / "samples").glob("*.png"))) == 1
    load = toy().ToyTransformer.from_pretrained
    before, after = (load(each).state_dict() for each in (toy_pipeline / "transformer", run / "student"))
    assert after.keys() == before.keys() and all((after[name] != before[name]).any() for name in after)
    description = json.loads((run / "student" / STUDENT_FILE).read_text())
    assert (description["family"], description["pipeline_call"]["guidance_scale"]) == ("toy", 0.0)
    # e^mu / (e^mu + 1 / t - 1) of t = 1, 3 / 4, 1 / 2, 1 / 4, with the mu of four steps
    shift = torch.tensor(0.75).exp()
    expected = [float(shift / (shift + 1 / t - 1)) for t in (1, 0.75, 0.5, 0.25)]
    assert description["times"] == pytest.approx([*expected, 0], abs=1e-6)


@pytest.mark.distributed
def test_it_is_sampled_from(run, tmp_path):
    """What a student's folder names is never run: the file is the user's to name."""
    command = ["--student", str(run / "student"), "--prompt", "a red ring", "--device", "cpu", "--num-images", "2"]
    assert sample.main([*command, "--family", str(FILE), "--output", str(tmp_path / "out")]) == 0
    from PIL import Image

    assert [Image.open(path).size for path in (tmp_path / "out").iterdir()] == [(32, 16)] * 2
    answer = run_script(0, TRAIN.with_name("sample.py"), *command)
    assert (
        answer.returncode == 2
        and "has family = 'toy'; value error, there is no such family; there are flux" in answer.stderr
    )
