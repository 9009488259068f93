"""Reading an exported student: what samples from it, and what is refused in one line."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from students import exported

from dpdmd import sample
from dpdmd.config import Config, ConfigError, parse_config
from dpdmd.engine.lora import WEIGHTS_FILE
from dpdmd.run.export import STUDENT_FILE

FAMILIES = {"sd3": "tiny_pipeline", "flux": "tiny_flux"}
RANK, ALPHA = 3, 5.0


def config(pipeline, family, adapter) -> Config:
    values = {
        "model": {"pipeline": str(pipeline), "family": family, "resolution": 32, "max_sequence_length": 8},
        "prompts": {"file": "prompts.txt"},
        "lora": {"rank": RANK, "alpha": ALPHA} if adapter else None,
    }
    return parse_config(values)


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(params=[False, True], ids=["whole", "adapter"])
def adapter(request):
    return request.param


@pytest.fixture
def made(request, family, adapter, tmp_path):
    """(folder of a student, backbone, transformer as it was trained)"""
    folder = tmp_path / "student"
    return folder, *exported(folder, config(request.getfixturevalue(FAMILIES[family]), family, adapter))


def test_the_student_computes_what_was_trained(made):
    """Whole, and as an adapter with alpha other than its rank."""
    folder, backbone, transformer = made
    student = sample.load_student(folder, device="cpu")
    cond = student.encode(["a red ring"])
    noise = sample.first_noises(0, 1, backbone.latent_shape)
    with torch.no_grad():
        t = torch.tensor([0.7])
        ours = backbone.predict(student.transformer, noise, t, cond)
        trained = backbone.predict(transformer, noise, t, cond)
        teacher = backbone.predict(backbone.load_transformer("teacher", torch.float32), noise, t, cond)
    assert (ours - trained).norm() < 1e-5 * trained.norm()
    assert (teacher - trained).norm() > 0.01 * trained.norm()


def test_what_a_stock_pipeline_is_called_with(made, family):
    folder, backbone, _ = made
    call = json.loads((folder / STUDENT_FILE).read_text())["pipeline_call"]
    assert call == {
        "sigmas": backbone.diffusion.pipeline_sigmas(4, "scheduler"),
        "guidance_scale": 1.0 if family == "sd3" else 3.5,
        "height": 32,
        "width": 32,
        "max_sequence_length": 8,
    }


# What is refused


@pytest.fixture(scope="module")
def intact(tiny_pipeline, tmp_path_factory):
    """{adapter: folder of a student}. Not to be written to."""
    folder = tmp_path_factory.mktemp("students")
    for adapter in (False, True):
        exported(folder / str(adapter), config(tiny_pipeline, "sd3", adapter))
    return {adapter: folder / str(adapter) for adapter in (False, True)}


@pytest.fixture
def folder(intact, adapter, tmp_path):
    return shutil.copytree(intact[adapter], tmp_path / "student")


def refusal(folder, **settings) -> str:
    with pytest.raises(ConfigError) as error:
        sample.load_student(folder, device="cpu", **settings)
    message = str(error.value)
    assert "\n" not in message and str(folder) in message, message
    return message


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 9523\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        ("[]", "holds a list where an object is needed"),
        ("null", "holds a NoneType where an object is needed"),
        (POINTER, "git lfs pull"),
        ("{}", "has an unknown format (format = None; 1 is needed)"),
        ('{"format": 2}', "was written by a newer dpdmd (format = 2; 1 is needed)"),
        ('{"format": "1"}', "has an unknown format (format = '1'; 1 is needed)"),
        ('{"format": true}', "has an unknown format (format = True; 1 is needed)"),
        ('{"format": 0}', "has an unknown format (format = 0; 1 is needed)"),
    ],
)
def test_a_damaged_description(folder, content, words):
    path = folder / STUDENT_FILE
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert words in refusal(folder)


def test_no_description(folder):
    (folder / STUDENT_FILE).unlink()
    assert "has no dpdmd.json; the folder `student` of a finished run is needed" in refusal(folder)
    (folder / STUDENT_FILE).mkdir()
    assert "it is a folder" in refusal(folder)
    assert "the folder `student` of a finished run is needed" in refusal(folder / "nowhere")


VALUES = [None, "text", 5, -1, 0, 1.5, [], {}, True, float("nan"), float("inf"), [1.0, "x"], [0.5, 1.0], [1.0, 1.0]]
POSSIBLE = {  # of its own kind, so taken, or refused later for what it says
    "adapter": [True],
    "pipeline": ["text"],
    "revision": [None, "text"],
    "guidance_scale": [5, 0, 1.5],
    "resolution": [5],
    "max_sequence_length": [5],
    "iterations": [None, 5, 0],
    "prediction": [None, "text"],
    "method": [None, "text"],
    "num_steps": [None],
    "pipeline_sigmas": [None, [], [0.5, 1.0], [1.0, 1.0]],
    "pipeline_call": [None, {}],
}
OPTIONAL = {"adapter", "iterations", "prediction", "method", "num_steps", "pipeline_sigmas", "pipeline_call"}


@pytest.mark.parametrize("key", ["family", "times", *POSSIBLE])
def test_a_description_of_wrong_kinds(folder, key):
    path = folder / STUDENT_FILE
    content = json.loads(path.read_text())
    for value in VALUES:
        if any(value is each or (value == each and type(value) is type(each)) for each in POSSIBLE.get(key, [])):
            continue
        path.write_text(json.dumps(content | {key: value}))
        assert f"{STUDENT_FILE} has {key}" in refusal(folder), value
    if key not in OPTIONAL:
        path.write_text(json.dumps({name: value for name, value in content.items() if name != key}))
        assert f"{STUDENT_FILE} has no {key}" in refusal(folder)


@pytest.mark.parametrize(
    ("edits", "words"),
    [
        ({"max_sequence_length": 10**9}, "has max_sequence_length = 1000000000; "),
        ({"resolution": 2**40}, "has resolution = 1099511627776; "),
        ({"guidance_scale": 1e9}, "has guidance_scale = 1000000000.0; "),
        ({"pipeline": ""}, "has pipeline = ''; "),
        (
            {"times": [1.0, 0.5, -3.0], "num_steps": 2},
            "has times = [1.0, 0.5, -3.0]; they must fall from 1 (noise) to 0",
        ),
        (
            {"times": [900.0, 0.5, 0.0], "num_steps": 2},
            "has times = [900.0, 0.5, 0.0]; they must fall from 1 (noise) to 0",
        ),
        ({"times": [0.2, 0.1, 0.0], "num_steps": 2}, "has times = [0.2, 0.1, 0.0]; they must fall from 1 (noise) to 0"),
        ({"times": [1.0, 0.5, 0.1], "num_steps": 2}, "has times = [1.0, 0.5, 0.1]; they must fall from 1 (noise) to 0"),
        ({"num_steps": 7}, "has num_steps = 7 and times for 4"),
        ({"prediction": "noise"}, "has prediction = 'noise', and the pipeline's is 'velocity'"),
    ],
)
def test_a_description_of_what_cannot_be(folder, edits, words):
    path = folder / STUDENT_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | edits))
    assert words in refusal(folder)


def test_more_in_the_description_than_is_known(folder):
    path = folder / STUDENT_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"note": "mine"}))
    sample.load_student(folder, device="cpu")


def weights_of(folder, adapter):
    return folder / (WEIGHTS_FILE if adapter else "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize(
    "damage", ["pointer", "empty", "cut off", "folder", "gone", "nan", "lacks", "besides", "shape"]
)
def test_damaged_weights(folder, adapter, damage):
    path = weights_of(folder, adapter)
    tensors = load_file(path)
    name = next(name for name in sorted(tensors) if tensors[name].ndim == 2)
    if damage == "pointer":
        path.write_text(POINTER)
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "cut off":
        path.write_bytes(path.read_bytes()[:-8])
    elif damage in ("folder", "gone"):
        path.unlink()
        if damage == "folder":
            path.mkdir()
    else:
        if damage == "nan":
            tensors[name][0, 0] = torch.nan
        elif damage == "lacks":
            del tensors[name]
        elif damage == "besides":
            tensors["transformer.more.lora_A.weight"] = tensors["transformer.more.lora_B.weight"] = torch.zeros(3, 3)
            tensors["transformer.more.lora_B.weight"] = torch.zeros(3, 3)
        else:
            tensors[name] = torch.zeros(2, 2)
        save_file(tensors, path)
    refusal(folder)


def test_a_damaged_config_of_the_transformer(intact, tmp_path):
    folder = shutil.copytree(intact[False], tmp_path / "student")
    path = folder / "config.json"
    content = json.loads(path.read_text())
    for broken in (
        POINTER,
        "",
        "[]",
        json.dumps(content | {"num_layers": "two"}),
        json.dumps(content | {"num_layers": 1}),
    ):
        path.write_text(broken)
        refusal(folder)
    path.write_text(json.dumps(content | {"_class_name": "FluxTransformer2DModel"}))
    assert "holds a FluxTransformer2DModel; the SD3Transformer2DModel of a finished run is needed" in refusal(folder)
    path.unlink()
    assert "config.json cannot be read" in refusal(folder)


def test_another_pipeline(folder, adapter, tiny_pipeline, tiny_flux, tmp_path):
    """One whose transformer an adapter does not fit, and one of another family; and it may have been moved."""
    moved = shutil.copytree(tiny_pipeline, tmp_path / "moved")
    sample.load_student(folder, device="cpu", pipeline=str(moved))
    with pytest.raises(ConfigError, match="is a FluxPipeline"):
        sample.load_student(folder, device="cpu", pipeline=str(tiny_flux))
    (moved / "vae/diffusion_pytorch_model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"vae.*it is empty"):
        sample.load_student(folder, device="cpu", pipeline=str(moved))


def test_an_adapter_on_other_weights(intact, tiny_pipeline, tmp_path, capsys):
    sample.load_student(intact[True], device="cpu")
    assert "warning" not in capsys.readouterr().err
    other = shutil.copytree(tiny_pipeline, tmp_path / "other")
    path = other / "transformer/diffusion_pytorch_model.safetensors"
    save_file({name: -tensor for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    sample.load_student(intact[True], device="cpu", pipeline=str(other))
    said = capsys.readouterr().err
    assert (
        f"warning: --student {intact[True]} is an adapter that was trained for other weights than those of {other}"
        in said
    )


def test_the_command_line_says_it_in_one_line(folder, capsys):
    (folder / STUDENT_FILE).write_text("[]")
    assert sample.main(["--student", str(folder), "--prompt", "a red ring"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
