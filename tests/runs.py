"""A training run of seconds, for the tests of what becomes of runs: a plugin of pytest, for tests/conftest.py."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from processes import run_script
from safetensors.torch import load_file

DRIVER = Path(__file__).parent / "drivers" / "train_with.py"
TRAIN = Path(__file__).parents[1] / "dpdmd" / "train.py"
# The demo's teacher, nine updates (three of the student).
SHORT = (
    *("engine.device=cpu", "engine.batch_size=1", "engine.accumulation=2", "evaluation.enabled=false"),
    *(
        "distill.critic_updates=2",
        "distill.teacher_steps=6",
        "distill.anchor=2",
        "run.iterations=9",
        "run.tensorboard=false",
    ),
    *("student_optimizer.lr=1e-3", "critic_optimizer.lr=1e-3", "run.sample_every=0", "run.checkpoint_every=0"),
)


@pytest.fixture(scope="session")
def options(tmp_path_factory) -> tuple[str, ...]:
    """Its settings, with prompts of its own."""
    folder = tmp_path_factory.mktemp("shared")
    prompts = folder / "prompts.txt"
    prompts.write_text("a red ring\na blue square\na big green cross\na yellow circle\n")
    return (*SHORT, f"prompts.file={prompts}", f"prompts.cache_dir={folder / 'embeddings'}")


@pytest.fixture(scope="session")
def straight(options, tmp_path_factory) -> Path:
    """Folder of such a run from its beginning to its end, in one process. Not to be written to."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    done = checked(run_script(0, TRAIN, *options, f"run.output_dir={folder}"))
    assert "starting at iteration 0\n" in done.stdout
    return folder


def checked(done: subprocess.CompletedProcess, status: int = 0) -> subprocess.CompletedProcess:
    assert done.returncode == status, done.stdout[-3000:] + done.stderr[-3000:]
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    return done


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = (folder / "student").glob("*.safetensors")
    return load_file(file)


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return sum(float((a[name].double() - b[name].double()).square().sum()) for name in a) ** 0.5
