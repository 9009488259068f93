"""Which kernel `attention` takes on a GPU; the measuring itself is for a GPU, the choosing is not."""

import contextlib
import json
import math
import multiprocessing
import os
import stat
from pathlib import Path

import pytest
import torch
from processes import LIMIT

from dpdmd.kernels import attention
from dpdmd.kernels.attention import choice


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


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Another GPU, with nothing in the user's cache: what is measured on it, in order."""
    calls = []

    def measure(attention, index, head_dim, length):
        calls.append((head_dim, length))
        cudnn = 1.0 if head_dim == 64 else 3.0
        return {"forward": {"cudnn": cudnn, "triton": 2.0}, "training": {"cudnn": 2.0, "triton": 1.0}}

    monkeypatch.setattr(choice, "measure", measure)
    monkeypatch.setattr(choice, "gpu_name", lambda index: "NVIDIA B200 / 180 GB")
    monkeypatch.setattr(choice, "_chosen", {})
    monkeypatch.setattr(choice, "_agreed", None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    torch.use_deterministic_algorithms(False)  # which the tests' poisoned memory needs, and which has a say
    choice._measured.cache_clear()
    yield calls
    choice._measured.cache_clear()


@pytest.fixture
def another_process():
    def forget():
        choice._measured.cache_clear()
        choice._chosen.clear()

    return forget


def cache_file(tmp_path):
    (file,) = (tmp_path / "dpdmd" / "attention").iterdir()
    return file


def test_unknown_gpu_is_measured_once(measured, another_process, monkeypatch):
    for _ in range(2):  # the second time from the file
        another_process()
        assert choice.fastest(attention, 0, 64, 4429, 4429, False) == "cudnn"
        assert choice.fastest(attention, 0, 64, 4429, 4500, True) == "triton"
        assert choice.fastest(attention, 0, 72, 4429, 4429, False) == "triton"
    assert measured == [(64, 4429), (96, 4429)]
    another_process()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choice.fastest(attention, 0, 64, 4429, 4429, False) == "auto"


TIMES = {"forward": {"flash": 1.0}, "training": {"flash": 2}}
DAMAGED = {
    "empty": b"",
    "half": b'{"64,4429": {"forward": {"cudnn": 1.0',
    "bytes": bytes(range(128, 256)),
    "nested": b"[" * 100_000,
    "a list": b"[1, 2]",
    "a number": b"7",
    "no times": b'{"64,4429": null}',
    "a pass missing": b'{"64,4429": {"forward": {"flash": 1.0}}}',
    "another backend": b'{"64,4429": {"forward": {"fa9": 1.0}, "training": {"fa9": 1.0}}}',
    "text": b'{"64,4429": {"forward": {"flash": "1.0"}, "training": {"flash": 1.0}}}',
    "true": b'{"64,4429": {"forward": {"flash": true}, "training": {"flash": 1.0}}}',
    "not a number": b'{"64,4429": {"forward": {"flash": NaN}, "training": {"flash": 1.0}}}',
    "nothing": b'{"64,4429": {"forward": {"flash": 0}, "training": {"flash": -1.0}}}',
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_cache_is_measured_anew(measured, another_process, tmp_path, content):
    choice.fastest(attention, 0, 64, 4429, 4429, False)
    file = cache_file(tmp_path)
    file.write_bytes(content)
    for _ in range(2):
        another_process()
        assert choice.fastest(attention, 0, 64, 4429, 4429, False) == "cudnn"
    assert len(measured) == 2 and choice._read(file).keys() == {"64,4429"}


def test_what_else_a_cache_holds_stays(measured, another_process, tmp_path):
    choice.fastest(attention, 0, 64, 4429, 4429, False)
    kept = {"128,64": TIMES}
    cache_file(tmp_path).write_text(json.dumps({"64,4429": 3, "x,y": TIMES, "64": TIMES, "0,64": TIMES, **kept}))
    another_process()
    choice.fastest(attention, 0, 64, 4429, 4429, False)
    table = json.loads(cache_file(tmp_path).read_text())
    assert table.keys() == {"128,64", "64,4429"} and table["128,64"] == TIMES


@pytest.mark.parametrize("obstacle", ["a folder", "a file", "no rights"])
def test_a_cache_that_cannot_be_used(measured, another_process, tmp_path, monkeypatch, obstacle):
    choice.fastest(attention, 0, 64, 4429, 4429, False)
    file = cache_file(tmp_path)
    file.unlink()
    if obstacle == "a folder":
        file.mkdir()
    elif obstacle == "a file":
        file.parent.rmdir()
        file.parent.touch()
    else:

        def refused(*_, **__):
            raise PermissionError(13, "Permission denied")

        for name in ("read_text", "write_text", "exists"):
            monkeypatch.setattr(Path, name, refused)
    another_process()
    assert choice.fastest(attention, 0, 64, 4429, 4429, False) == "cudnn"
    assert len(measured) == 2
    assert not list(tmp_path.rglob("*.tmp"))


def test_the_cache_follows_the_umask(measured, tmp_path):
    before = os.umask(0o027)
    try:
        choice.fastest(attention, 0, 64, 4429, 4429, False)
    finally:
        os.umask(before)
    assert stat.S_IMODE(cache_file(tmp_path).stat().st_mode) == 0o640


def _write_often(file, first):
    for length in range(first, first + 200):
        choice._write(file, choice._read(file) | {f"64,{length}": TIMES})
        assert choice._read(file), "never half a file"


def test_two_processes_write_the_cache(tmp_path):
    file, context = tmp_path / "attention" / "gpu.json", multiprocessing.get_context("fork")
    processes = [context.Process(target=_write_often, args=(file, first)) for first in (1, 1001)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(LIMIT)
        process.kill()
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert list(file.parent.iterdir()) == [file]
    assert all(times == TIMES for times in json.loads(file.read_text()).values())


# One table for several processes


def test_known_times_of_an_unknown_gpu(measured, another_process):
    shapes = [(64, 4429), (64, 4600), (72, 1024)]
    table = choice.known_times(attention, 0, shapes)
    assert table["gpu"] == "NVIDIA B200 / 180 GB" and table["times"].keys() == {"64,4429", "64,4608", "96,1024"}
    assert measured == [(64, 4429), (64, 4608), (96, 1024)]
    assert json.loads(json.dumps(table)) == table and choice.is_table(table)
    another_process()
    assert choice.known_times(attention, 0, shapes) == table and len(measured) == 3


def test_known_times_of_a_shipped_gpu(measured, monkeypatch):
    monkeypatch.setattr(choice, "gpu_name", lambda index: "H100")
    table = choice.known_times(attention, 0, [(64, 4429)])
    assert table == {"gpu": "H100", "times": json.loads(choice.SHIPPED.read_text())["H100"]}
    assert choice.is_table(table) and not measured


def test_every_choice_is_the_tables(measured):
    """On every device, whatever was chosen before, and nothing is measured any more."""
    assert choice.fastest(attention, 0, 64, 4429, 4429, False) == "cudnn"
    choice.agree_on({"gpu": "another", "times": {"64,4429": TIMES, "64,1024": {"forward": {}, "training": {}}}})
    measured.clear()
    for device in (0, 1):
        assert choice.fastest(attention, device, 64, 4429, 4429, False) == "flash"
        assert choice.fastest(attention, device, 64, 9000, 9000, True) == "flash"
        assert choice.fastest(attention, device, 64, 1000, 1000, True) == "auto"
        assert choice.fastest(attention, device, 128, 4429, 4429, False) == "auto"
    assert not measured
    choice.agree_on(None)
    assert choice.fastest(attention, 0, 64, 4429, 4429, False) == "cudnn"


@pytest.mark.parametrize(
    "table",
    [
        {},
        [],
        {"gpu": "a"},
        {"gpu": 3, "times": {}},
        {"gpu": "a", "times": []},
        {"gpu": "a", "times": {}, "more": 1},
        {"gpu": "a", "times": {"64,0": TIMES}},
        {"gpu": "a", "times": {64: TIMES}},
        {"gpu": "a", "times": {"64,64": {**TIMES, "more": {}}}},
        {"gpu": "a", "times": {"64,64": {"forward": {"flash": math.inf}, "training": {}}}},
    ],
)
def test_other_tables_are_refused(measured, table):
    with pytest.raises(ValueError, match="table is not one of known_times"):
        choice.agree_on(table)
    assert choice._agreed is None


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
    assert set(times["forward"]) == set(times["training"]) - {"triton+cudnn"}
    assert all(time > 0 for of_way in times.values() for time in of_way.values())


def test_what_is_measured(monkeypatch):
    """The median of what lies between events, after two calls to warm up; a forward pass alone, and one with its
    backward. (Events and tensors stand in for a GPU's.)"""
    clock, calls = [0.0], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = clock[0]

        def elapsed_time(self, later):
            return later.at - self.at

    def attention(q, k, v, backend):
        if backend == "flash":
            raise RuntimeError("it does not serve this GPU")
        calls.append(backend)
        clock[0] += 50.0 if len(calls) % 9 < 3 else 2.0  # ms: two calls to warm up, and one that is slow
        out = q + k + v
        if out.requires_grad:
            out.register_hook(lambda gradient: clock.__setitem__(0, clock[0] + 3.0))
        return out

    randn = torch.randn
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "randn", lambda shape, device, **options: randn((2, 3), **options))
    assert choice.measure(attention, 0, 64, 4429) == {
        "forward": {"triton": 2000.0, "cudnn": 2000.0},
        "training": {"triton": 5000.0, "triton+cudnn": 5000.0, "cudnn": 5000.0},
    }
