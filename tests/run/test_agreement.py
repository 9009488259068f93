"""Processes that would choose different attention kernels take the same ones, and those again when a run goes on."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import run_script

from dpdmd.config import ConfigError, parse_config
from dpdmd.run.agreement import check_kernels, check_settings

DRIVER = Path(__file__).parents[1] / "drivers" / "attention_agreement.py"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The driver's results in each of two processes."""
    done = run_script(2, DRIVER, tmp_path_factory.mktemp("caches"))
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(lines[0].removeprefix("RESULT "))


@pytest.mark.distributed
def test_processes_choose_alike(ranks):
    """By the main process's times, which the other does not measure; torch's order for a shape that is not the run's."""
    first, second = (results["by itself"]["chosen"] for results in ranks)
    assert first == ["cudnn"] * 3 and second == ["triton"] * 3
    main, other = (results["together"] for results in ranks)
    assert main["chosen"] == other["chosen"] == ["cudnn", "cudnn", "auto"]
    assert main["table"] == other["table"] and main["table"]["gpu"] == "NVIDIA B200"
    assert main["table"]["times"].keys() == {"64,1024", "64,4429"}
    assert other["measured"] == [] and main["said"] == other["said"] == ""


@pytest.mark.distributed
@pytest.mark.parametrize("case", ["resumed", "resumed beside another gpu"])
def test_a_checkpoints_choice_is_taken_again(ranks, case):
    for results in ranks:
        assert results[case] == {**results["together"], "measured": []}


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("case", "gpu", "words"),
    [
        (
            "resumed on another gpu",
            "NVIDIA B300",
            "by times of NVIDIA B300; those of the checkpoint are of NVIDIA B200",
        ),
        ("resumed from a damaged one", "NVIDIA B200", "by times of NVIDIA B200; the checkpoint's are damaged"),
    ],
)
def test_another_gpu_is_measured_and_said(ranks, case, gpu, words):
    main, other = (results[case] for results in ranks)
    assert main["chosen"] == other["chosen"] == ["triton", "triton", "auto"]
    assert main["table"] == other["table"] and main["table"]["gpu"] == gpu
    assert main["said"].count("\n") == 1 and words in main["said"]
    assert main["measured"] == [1024, 4429] and other["measured"] == [] and other["said"] == ""


@pytest.mark.distributed
def test_on_the_cpu_there_is_nothing_to_agree_on(ranks):
    assert [results["on the cpu"] for results in ranks] == [{"table": None, "agreed": None}] * 2


def test_processes_with_other_kernels_are_refused(monkeypatch):
    """A machine without nvcc beside one with: the others' last bits would differ."""
    from dpdmd.config import ConfigError
    from dpdmd.run.agreement import check_alike

    found = []

    def gather(mine):
        found.append(mine)
        return [mine, {**mine, "cuda kernels": True}]

    world = SimpleNamespace(device=torch.device("cpu"), rank=0, size=2, gather=gather)
    with pytest.raises(
        ConfigError, match=r"cuda kernels = True in process 1 and False in process 0: all machines of a run"
    ):
        check_alike(world)
    assert found[0].keys() == {"torch", "DPDMD_KERNELS", "DPDMD_ATTENTION", "cuda kernels", "triton kernels"}
    world.gather = lambda mine: [mine, mine]
    check_alike(world)


def test_processes_with_other_settings_are_refused():
    """One with --resume waited for the other for ever; one with another rate trained along without a word."""

    def world(**differences):
        return SimpleNamespace(rank=0, size=2, gather=lambda mine: [mine, {**mine, **differences}])

    config = parse_config({"prompts": {"file": "p"}})
    check_settings(world(), config, ["a"], resume=True)
    for differences, message in (
        ({"student_optimizer.lr": "0.001"}, "student_optimizer.lr = 0.001 in process 1 and 1e-05 in process 0"),
        ({"--resume": "False"}, "--resume = False in process 1 and True in process 0"),
        ({"the content of prompts.file": "x"}, "the content of prompts.file = x in process 1"),
        ({"lora.rank": "4"}, "lora.rank = 4 in process 1 and None in process 0"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            check_settings(world(**differences), config, ["a"], resume=True)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("DPDMD_KERNELS", "fast", "DPDMD_KERNELS='fast' in the environment; it takes one of auto, reference"),
        ("DPDMD_KERNELS", "cuda", "DPDMD_KERNELS = cuda in the environment: "),
        ("DPDMD_ATTENTION", "fast", "DPDMD_ATTENTION='fast' in the environment; it takes one of "),
        ("DPDMD_ATTENTION", "cudnn", "backend='cudnn' needs CUDA tensors and q is on cpu"),
        ("DPDMD_ATTENTION", "math", None),
        ("DPDMD_KERNELS", "reference", None),
    ],
)
def test_kernels_that_are_not_to_be_had(monkeypatch, name, value, words):
    monkeypatch.setenv(name, value)
    backbone = SimpleNamespace(attention_shapes=lambda: [(16, 64)])
    expected = contextlib.nullcontext() if words is None else pytest.raises(ConfigError, match=re.escape(words))
    with expected:
        check_kernels(torch.device("cpu"), torch.float32, backbone)
