"""The documentation's code and commands run as they stand."""

from __future__ import annotations

import argparse
import json
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from students import exported

from dpdmd.config import known_keys, load_config

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# What stands where the documents have a hub id.
HUB = {
    "stabilityai/stable-diffusion-3.5-medium": "tiny_pipeline",
    "black-forest-labs/FLUX.1-dev": "tiny_flux",
}


def blocks(document: Path, *languages: str) -> list[str]:
    """The text of its code blocks in any of these languages; "" is none."""
    found, inside = [], None
    for line in document.read_text().splitlines(keepends=True):
        if line.startswith("```"):
            inside = [line[3:].strip()] if inside is None else found.append(inside)
        elif inside is not None:
            inside.append(line)
    return ["".join(lines) for language, *lines in found if language in languages]


SNIPPETS = [(document, number) for document in DOCUMENTS for number in range(len(blocks(document, "python")))]


def snippet(name: str, containing: str) -> tuple[Path, int]:
    """The only one of a document that has a text in it."""
    ((document, number),) = (
        (document, number)
        for document, number in SNIPPETS
        if document.name == name and containing in blocks(document, "python")[number]
    )
    return document, number


def execute(document: Path, number: int) -> dict:
    names: dict = {}
    exec(compile(blocks(document, "python")[number], f"{document.name}, snippet {number}", "exec"), names)
    return names


LENGTH, SIDE = 12, 64  # not what a pipeline takes by itself: 256 tokens, and 32 pixels of this one


@pytest.fixture(scope="module")
def runs(tiny_pipeline, tiny_flux, tmp_path_factory):
    """A folder with students of the runs that the documents speak of, each by its own configuration."""
    folder = tmp_path_factory.mktemp("documents")
    small = [f"model.max_sequence_length={LENGTH}", f"model.resolution={SIDE}", "engine.device=cpu"]
    for name, own in (
        ("sd35_medium", [f"model.pipeline={tiny_pipeline}"]),
        ("flux_lora", [f"model.pipeline={tiny_flux}", "lora.rank=4", "lora.alpha=6"]),
    ):
        config = load_config(ROOT / "configs" / f"{name}.yaml", [*small, *own])
        exported(folder / config.run.output_dir / "student", config)
    return folder


@pytest.fixture
def as_a_user(runs, request, monkeypatch, tmp_path):
    """In a folder with those runs, and with tiny pipelines where the hub's are."""
    from diffusers import DiffusionPipeline

    original = DiffusionPipeline.from_pretrained.__func__

    def from_pretrained(cls, name, **settings):
        if name in HUB:
            name = request.getfixturevalue(HUB[name])
        return original(cls, name, **settings)

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", classmethod(from_pretrained))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(runs / "runs", tmp_path / "runs")


@pytest.mark.parametrize(("document", "number"), SNIPPETS, ids=lambda value: getattr(value, "name", str(value)))
def test_every_snippet_runs_by_itself(document, number, as_a_user):
    """Imports included; what a snippet only defines is called by the tests below."""
    execute(document, number)


@pytest.mark.parametrize(
    ("name", "containing", "run", "pipeline_class"),
    [
        ("README.md", "a lighthouse at dusk", "sd35_medium", "StableDiffusion3Pipeline"),
        ("engine.md", "a lighthouse at dusk", "flux_lora", "FluxPipeline"),
    ],
)
@pytest.mark.parametrize("precision", ["as it stands", "float32"])
def test_a_stock_pipeline_gives_the_pictures_of_dpdmd_sample(
    name, containing, run, pipeline_class, precision, as_a_user, monkeypatch, capsys
):
    """From the same noise, at another number of tokens and another size than the pipeline takes by itself. In float32 to
    one grey level; in bfloat16, as the snippet is written, to the rounding of latents that a pipeline keeps in it."""
    import diffusers
    from PIL import Image

    from dpdmd import sample
    from dpdmd.backbones.flux import pack

    exact = precision == "float32"
    folder = f"runs/{run}/student"
    latents = sample.first_noises(0, 1, (16, SIDE // 4, SIDE // 4))
    latents = pack(latents) if run == "flux_lora" else latents
    stock = getattr(diffusers, pipeline_class)
    original = stock.prepare_latents
    asked = []

    def prepare_latents(self, *arguments):
        asked.append(arguments[2:4])
        return original(self, *arguments[:-1], latents)

    with monkeypatch.context() as patch:
        patch.setattr(stock, "prepare_latents", prepare_latents)
        if exact:
            patch.setattr(torch, "bfloat16", torch.float32)
        theirs = execute(*snippet(name, containing))["image"]
    assert asked == [(SIDE, SIDE)] and theirs.size == (SIDE, SIDE)

    arguments = ["--student", folder, "--prompt", "a lighthouse at dusk", "--num-images", "1", "--device", "cpu"]
    assert sample.main([*arguments, "--dtype", "float32" if exact else "bfloat16", "--output", "pictures"]) == 0
    (path,) = Path("pictures").glob("*.png")
    ours = np.asarray(Image.open(path)).astype(int)
    difference = abs(ours - np.asarray(theirs).astype(int))
    assert ours.std() > 2
    assert difference.max() <= (1 if exact else 24) and difference.mean() < (0.1 if exact else 3), difference.max()
    call = json.loads(Path(folder, "dpdmd.json").read_text())["pipeline_call"]
    assert call["max_sequence_length"] == LENGTH and call["height"] == call["width"] == SIDE


def small_transformer():
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=16,
        pooled_projection_dim=20,
        pos_embed_max_size=8,
    )


def velocity(transformer):
    generator = torch.Generator().manual_seed(1)
    x, text, pooled = (torch.randn(shape, generator=generator) for shape in ((1, 4, 6, 8), (1, 5, 24), (1, 20)))
    return transformer(x, text, pooled, torch.tensor([500.0])).sample


def test_the_functions_of_the_transformers_snippets(tmp_path, capsys):
    stock = velocity(small_transformer()).detach()
    fusing = execute(*snippet("transformer.md", "def faster"))
    fused = fusing["faster"](small_transformer())
    torch.testing.assert_close(velocity(fused).detach(), stock, rtol=1e-4, atol=1e-5)
    assert "fused" in capsys.readouterr().out
    assert torch.equal(velocity(fusing["as_it_was"](fused)).detach(), stock)

    roles = execute(*snippet("transformer.md", "def with_roles"))
    transformer = small_transformer()
    parameters = roles["with_roles"](transformer)
    velocity(transformer).square().sum().backward()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in parameters.values())
    roles["keep"](transformer, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]

    transformer = execute(*snippet("transformer.md", "def with_checkpoints"))["with_checkpoints"](small_transformer())
    transformer.train()
    result = velocity(transformer)
    torch.testing.assert_close(result.detach(), stock)
    result.square().sum().backward()
    assert all(p.grad is not None for p in transformer.transformer_blocks[0].attn.to_q.parameters())


# Commands


class Parsed(BaseException):
    """A program has read its arguments."""


def command_lines() -> list[tuple[str, str]]:
    """(document, command) of every code block of commands."""
    found = []
    for document in DOCUMENTS:
        text = "\n".join(blocks(document, "bash", "")).replace("\\\n", " ")
        for line in text.splitlines():
            if re.match(r"(python|deepspeed|dpdmd|make|pip) ", line):
                found.append((document.name, line.split("  #")[0].strip()))
    return found


COMMANDS = command_lines()


def test_the_documents_commands_are_found():
    programs = [line.split()[0] for _, line in COMMANDS]
    assert {"python", "deepspeed", "make", "pip"} <= set(programs) and len(COMMANDS) > 15


def parse(arguments: list[str], monkeypatch) -> argparse.Namespace:
    """What a Python program makes of its command line; it goes no further."""
    for name in ("parse_args", "parse_intermixed_args"):
        original = getattr(argparse.ArgumentParser, name)

        def stop(self, *given, original=original, **settings):
            raise Parsed(original(self, *given, **settings))

        monkeypatch.setattr(argparse.ArgumentParser, name, stop)
    monkeypatch.chdir(ROOT)
    with pytest.raises(Parsed) as parsed:
        if arguments[0] == "-m":
            monkeypatch.setattr(sys, "argv", arguments[1:])
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            monkeypatch.setattr(sys, "argv", arguments)
            monkeypatch.syspath_prepend(str(ROOT / Path(arguments[0]).parent))
            runpy.run_path(str(ROOT / arguments[0]), run_name="__main__")
    return parsed.value.args[0]


@pytest.mark.parametrize(("document", "line"), COMMANDS, ids=[line[:60] for _, line in COMMANDS])
def test_every_command_is_understood(document, line, monkeypatch):
    """Programs, flags, choices, files of settings and settings are there."""
    program, *arguments = shlex.split(line)
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert arguments[0] in targets
        return
    if program == "pip":
        extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
        assert arguments[0] == "install" and (ROOT / arguments[arguments.index("-c") + 1]).is_file()
        assert set(re.findall(r"\w+", re.search(r"\[(.*)\]", arguments[-1])[1])) <= set(extras)
        return
    if program == "dpdmd":
        from dpdmd.__main__ import COMMANDS

        arguments = ["-m", COMMANDS[arguments[0]][0], *arguments[1:]]
    if program == "deepspeed":
        from deepspeed.launcher import runner

        launched = runner.parse_args(arguments)
        arguments = [launched.user_script, *launched.user_args]
    given = parse(arguments, monkeypatch)
    settings = getattr(given, "overrides", None) or getattr(given, "settings", None) or []
    config = getattr(given, "config", None)
    if config is not None or settings:
        own = ["run.sample_every=0"] if arguments[0].startswith("benchmarks/") else []  # as cycle.py has it
        load_config(config, [*own, *settings])


def test_settings_that_the_documents_name():
    sections = {key.split(".")[0] for key in known_keys() if "." in key}
    named = 0
    for document in DOCUMENTS:
        for text in re.findall(r"`([^`\n]+)`", document.read_text()):
            match = re.fullmatch(r"(\w+)((?:\.[a-z]\w*)+)(?:[=:] ?\S.*)?", text)
            if match and match[1] in sections and not match[2].endswith((".py", ".yaml", ".md")):
                assert match[1] + match[2] in known_keys(), f"{document.name}: {text}"
                named += 1
    assert named > 20


def test_files_that_the_documents_link():
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text()):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name}: {target}"


# What a snippet computes


def test_the_example_replaces_the_loss_of_a_dmd2_style_trainer():
    (code,) = re.findall(r"```python\n(# In a DMD2.*?)```", (ROOT / "docs" / "kernels.md").read_text(), re.DOTALL)
    assert len(code.strip().splitlines()) <= 15
    names: dict = {}
    exec(compile(code, "docs/kernels.md", "exec"), names)

    torch.manual_seed(0)
    shift = torch.randn(4, 1, 1)
    networks = {"teacher": lambda x, t, text: x * t[0] + text, "critic": lambda x, t, text: x * t[0] - shift}
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    text, no_text = torch.ones(1), torch.zeros(1)
    loss = names["generator_loss"](x, networks["teacher"], networks["critic"], text, no_text, guidance_scale=3.0)
    loss.backward()
    assert loss > 0 and x.grad.isfinite().all()

    # What such trainers write out: x0 estimates, their difference, a pseudo-target.
    torch.manual_seed(0)
    torch.randn(4, 1, 1), torch.randn(2, 4, 8, 8)
    t = torch.rand(2)
    noise = torch.randn_like(x)
    at = t.view(-1, 1, 1, 1)
    x_t = (1 - at) * x.detach() + at * noise
    cond, uncond = (networks["teacher"](x_t, t, each) for each in (text, no_text))
    real = x_t - at * (uncond + 3.0 * (cond - uncond))
    fake = x_t - at * networks["critic"](x_t, t, text)
    gradient = (fake - real) / (x_t - real).abs().mean(dim=(1, 2, 3), keepdim=True)
    target = (x - gradient).detach()
    expected = 0.5 * torch.nn.functional.mse_loss(x, target)
    (expected_gradient,) = torch.autograd.grad(expected, x)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(x.grad, expected_gradient, rtol=1e-3, atol=1e-8)


def test_the_example_of_the_optimizers_step():
    """Clipped, rounded and written, and skipped where the gradient is not finite."""
    (code,) = re.findall(
        r"```python\n(import torch\n\nfrom dpdmd.kernels import Float8State.*?)```",
        (ROOT / "docs" / "kernels.md").read_text(),
        re.DOTALL,
    )
    torch.manual_seed(0)
    names: dict = {}
    exec(compile(code, "docs/kernels.md", "exec"), names)
    torch.manual_seed(0)
    before = torch.randn(names["n"])
    clipped = names["gradient"].float() / names["norm"]
    # The first step of Adam: the sign of the gradient, but for eps.
    expected = (1 - 1e-7) * before - 1e-5 * clipped / (clipped.abs() + 1e-8)
    torch.testing.assert_close(names["master"], expected, rtol=1e-6, atol=1e-8)
    assert torch.equal(names["weight"], names["master"].bfloat16()) and names["exp_avg_sq"].values.any()

    broken = code.replace("norm = ", "gradient[7] = torch.inf\nnorm = ")
    torch.manual_seed(0)
    exec(compile(broken, "docs/kernels.md", "exec"), names)
    assert torch.equal(names["master"], before) and not names["exp_avg_sq"].values.any()
