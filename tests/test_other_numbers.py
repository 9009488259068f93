"""A run that goes on on another number of processes."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
from processes import run_script
from runs import DRIVER, TRAIN, checked, distance, weights
from safetensors.torch import load_file

from dpdmd import command
from dpdmd.worlds.demo import TEACHER


def through_other_numbers(options, folder: Path, expected: Path, numbers: tuple[int, ...], gpu: bool = False) -> None:
    """A run that is ended and resumed on one number of processes after the other, against one that is not."""
    run = functools.partial(run_script, gpu=gpu)
    mine = [option for option in options if not option.startswith("engine.accumulation")]
    mine += ["engine.accumulation=4", f"run.output_dir={folder}", "ema={decay: 0.5}", "critic_optimizer.state=bfloat16"]
    checked(run(numbers[0], TRAIN, *mine, f"run.output_dir={expected}"))
    checked(run(numbers[0], DRIVER, "SIGTERM-0-1", folder.parent, *mine), command.ENDED)
    for index, processes in enumerate(numbers[1:-1]):
        signalled = f"SIGTERM-1-{3 + 2 * index}"
        done = checked(run(processes, DRIVER, signalled, folder.parent, *mine, "--resume"), command.ENDED)
        assert f"engine.accumulation = {4 // processes}, so that an update stays one of 4 samples" in done.stdout
    checked(run(numbers[-1], TRAIN, *mine, "--resume"))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    others = [json.loads(line) for line in (expected / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == list(range(9))
    for line, other in zip(lines, others, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-2) and line["lr"] == other["lr"]
    found, start = weights(folder), load_file(next(Path(TEACHER).glob("transformer/*.safetensors")))
    moved = distance(weights(expected), start)
    assert moved > 0 and distance(found, weights(expected)) < 0.05 * moved


@pytest.mark.distributed
def test_other_numbers_of_processes(options, tmp_path):
    """1 -> 2 -> 4 -> 1: the accumulation follows, and the result is the straight run's within rounding."""
    folder = tmp_path / "run"
    through_other_numbers(options, folder, tmp_path / "straight", (1, 2, 4, 1))
    mine = [*options, "engine.accumulation=4", f"run.output_dir={folder}", "ema={decay: 0.5}"]
    mine += ["critic_optimizer.state=bfloat16", "run.iterations=12", "--resume"]
    done = checked(run_script(3, TRAIN, *mine), 2)
    assert (
        "the run's updates are of 4 samples, and 3 processes with engine.batch_size = 1 take 3 at a time" in done.stderr
    )


@pytest.mark.gpu
@pytest.mark.distributed
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_other_numbers_of_gpus(options, tmp_path):
    numbers = (1, 2, 4, 1) if torch.cuda.device_count() >= 4 else (1, 2, 1)
    options = [*options, "engine.device=cuda", "model.dtype=float32"]
    through_other_numbers(options, tmp_path / "run", tmp_path / "straight", numbers, gpu=True)
