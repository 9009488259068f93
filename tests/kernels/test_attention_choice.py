"""Which kernel `attention` takes on a GPU; the measuring itself is for a GPU, the choosing is not."""

import json

import pytest
import torch

from dpdmd.kernels import _attention_choice as choice
from dpdmd.kernels import attention


@pytest.mark.parametrize(
    ("times", "deterministic", "expected"),
    [
        ({"triton": 90.0, "cudnn": 100.0, "flash": 150.0}, False, "triton"),
        ({"triton": 104.0, "cudnn": 100.0}, False, "cudnn"),
        ({"triton": 102.0, "cudnn": 100.0}, False, "triton"),  # a tie goes to what repeats
        ({"triton": 104.0, "triton+cudnn": 100.0, "cudnn": 102.0}, False, "triton"),
        ({"triton": 106.0, "triton+cudnn": 100.0, "cudnn": 105.0}, False, "triton+cudnn"),
        ({"triton": 140.0, "cudnn": 100.0, "flash": 130.0}, True, "flash"),
        ({"cudnn": 100.0}, True, "cudnn"),  # nothing else serves
        ({}, False, "auto"),
    ],
)
def test_pick(times, deterministic, expected):
    assert choice.pick(times, deterministic) == expected


def test_nearest():
    table = {f"{D},{S}": {"D": D, "S": S} for D in (64, 128) for S in (256, 4096)}
    assert choice.nearest(table, 64, 4429) == {"D": 64, "S": 4096}
    assert choice.nearest(table, 64, 1000) == {"D": 64, "S": 256}  # by ratio
    assert choice.nearest(table, 64, 1025) == {"D": 64, "S": 4096}
    assert choice.nearest(table, 104, 1) == {"D": 128, "S": 256}
    assert choice.nearest(table, 256, 1) == {"D": 128, "S": 256}
    assert choice.nearest(table, 32, 1) == choice.NOTHING_KNOWN
    assert choice.nearest({}, 64, 1) == choice.NOTHING_KNOWN


def test_shipped_table():
    table = json.loads(choice.SHIPPED.read_text())
    assert set(table) == {"H100", "H200"}
    for gpu in table:
        for head_dim in choice.HEAD_DIMS:
            for length in choice.LENGTHS:
                times = table[gpu][f"{head_dim},{length}"]
                assert set(times["forward"]) == {"triton", "cudnn", "flash"}
                assert set(times["training"]) == {"triton", "triton+cudnn", "cudnn", "flash"}
                assert all(0 < times["forward"][name] < times["training"][name] for name in times["forward"])


def test_unknown_gpu_is_measured_once(monkeypatch, tmp_path):
    measured = []

    def measure(attention, index, head_dim, length):
        measured.append((head_dim, length))
        cudnn = 1.0 if head_dim == 64 else 3.0
        return {"forward": {"cudnn": cudnn, "triton": 2.0}, "training": {"cudnn": 2.0, "triton": 1.0}}

    monkeypatch.setattr(choice, "measure", measure)
    monkeypatch.setattr(choice, "_gpu", lambda index: "NVIDIA B200")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    torch.use_deterministic_algorithms(False)  # which the tests' poisoned memory needs, and which has a say
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for _ in range(2):  # the second time as another process: from the file
        choice._measured.cache_clear()
        monkeypatch.setattr(choice, "_chosen", {})
        assert choice.fastest(attention, 0, 64, 4429, 4429, False) == "cudnn"
        assert choice.fastest(attention, 0, 64, 4429, 4500, True) == "triton"
        assert choice.fastest(attention, 0, 72, 4429, 4429, False) == "triton"
    choice._measured.cache_clear()
    assert measured == [(64, 4429), (96, 4429)]
    monkeypatch.setattr(choice, "_chosen", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choice.fastest(attention, 0, 64, 4429, 4429, False) == "auto"


def test_environment_overrides_auto(monkeypatch):
    q = torch.randn(1, 3, 1, 8)
    monkeypatch.setenv("DPDMD_ATTENTION", "cudnn")
    with pytest.raises(RuntimeError, match="backend='cudnn' needs CUDA tensors"):
        attention(q, q, q)
    attention(q, q, q, backend="sdpa")  # asked for by name
    monkeypatch.setenv("DPDMD_ATTENTION", "fast")
    with pytest.raises(ValueError, match="DPDMD_ATTENTION='fast' in the environment; it takes one of auto, reference"):
        attention(q, q, q)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_measure():
    times = choice.measure(attention, torch.cuda.current_device(), 64, 256)
    assert set(times["training"]) >= {"triton", "cudnn", "flash"}
    assert all(0 < times["forward"][name] < times["training"][name] for name in times["forward"])
