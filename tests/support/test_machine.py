"""How tests share a machine: workers, memory of the GPU, caches, workers that die."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import machine
import pytest
import torch
from processes import run_command, running
from slots import Slots

TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("cores", "host", "gpu", "workers"),
    [
        (16, 125.8, 79.1, 9),  # one H100
        (16, 125.8, 139.8, 16),  # one H200
        (16, 125.8, 23.5, 2),
        (16, 125.8, 6.0, 1),
        (2, 23.4, None, 2),
        (8, 15.5, None, 3),
        (1, 3.8, None, 1),
    ],
)
def test_as_many_workers_as_there_is_memory_for(cores, host, gpu, workers):
    assert machine.num_workers(cores, host, gpu) == workers


@pytest.mark.parametrize("workers", [9, 10])
def test_the_largest_tests_run_on_an_h100(workers):
    marker = re.compile(r"^ *@pytest\.mark\.gpu_memory\((\d+)\)", re.MULTILINE)
    asked = [int(gib) for file in TESTS.rglob("test_*.py") for gib in marker.findall(file.read_text())]
    assert len(asked) > 5 and min(asked) > machine.GPU_GIB_HELD and max(asked) <= machine.shared_gib(79.1, workers)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """Slots of this test's own, and a GPU of which all is free."""
    monkeypatch.setattr(machine.tempfile, "gettempdir", lambda: str(tmp_path))
    made = Slots("gpu")
    monkeypatch.setattr(machine, "slots", lambda name: made)
    monkeypatch.setattr(machine, "free_gib", lambda: 1000.0)
    return made


def held(gpu):
    return sorted(gpu._mine)


@contextlib.contextmanager
def others_hold(numbers, folder):
    """A process that has these slots."""
    code = f"import sys; from slots import slots; print(all(slots('gpu').take(n) for n in {numbers}), flush=True)"
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "TMPDIR": str(folder)}
    with running(sys.executable, "-c", f"{code}; sys.stdin.read()", env=environment) as process:
        assert process.stdout.readline() == "True\n"
        yield process


def test_gpu_memory_is_taken_and_given_back(gpu):
    with machine.share(20, total=43):
        assert len(held(gpu)) == 20 and machine.ASKING not in held(gpu)
        assert machine._take(gpu, 24, 43) == [] and len(held(gpu)) == 20  # all or nothing
        more = machine._take(gpu, 23, 43)
        assert len(more) == 23
        for slot in more:
            gpu.give_back(slot)
    assert held(gpu) == []
    with pytest.raises(RuntimeError, match="out of memory"), machine.share(20, total=43):
        raise RuntimeError("CUDA out of memory")
    assert held(gpu) == []


def test_gpu_memory_is_waited_for(gpu, monkeypatch, tmp_path):
    with others_hold(range(1, 31), tmp_path) as other:
        asked = []

        def sleep(seconds):
            asked.append(held(gpu))
            if len(asked) == 2:
                other.kill()
                other.wait()

        monkeypatch.setattr(machine, "time", SimpleNamespace(sleep=sleep, monotonic=time.monotonic))
        with machine.share(20, total=43):
            assert len(held(gpu)) == 20 and asked == [[], []]


def test_gpu_memory_that_never_comes_says_what_was_waited_for(gpu, monkeypatch, tmp_path):
    message = "waited 0 s for memory of the GPU: other tests have the 20 GiB"
    with others_hold(range(1, 31), tmp_path), pytest.raises(pytest.fail.Exception, match=message):  # noqa: SIM117
        with machine.share(20, total=43, limit=0):
            pass
    monkeypatch.setattr(machine, "free_gib", lambda: 12.34)
    message = "waited 0 s for memory of the GPU: of the 20 GiB 12.3 are free, others have the rest"
    with pytest.raises(pytest.fail.Exception, match=message), machine.share(20, total=43, limit=0):
        pass
    assert held(gpu) == []


def test_a_gpu_that_is_too_small_is_a_reason_to_skip(gpu):
    message = "needs 20 GiB of the GPU's memory, and the workers leave 15 GiB; -n 1 leaves most"
    with pytest.raises(pytest.skip.Exception, match=message), machine.share(20, total=15):
        pass


def test_what_a_failed_test_held_is_let_go(monkeypatch):
    """pytest keeps its traceback, which would keep the tensors of its frames."""
    emptied, kept = [], []

    def fails():
        tensor = torch.zeros(3)
        kept.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError("tried to allocate")

    try:
        try:
            fails()
        except torch.OutOfMemoryError as error:
            raise RuntimeError("it failed") from error
    except RuntimeError as error:
        monkeypatch.setattr(sys, "last_value", error, raising=False)
    assert kept[0]() is not None
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(kept[0]()))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 2**20)
    machine.let_go(everything=False)
    assert kept[0]() is None and emptied == []
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 2**31)
    machine.let_go(everything=False)
    machine.let_go(everything=True)
    assert emptied == [None, None]


def run_pytest(folder, *options, **variables):
    """pytest with this plugin on tests of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]), **variables}
    for name in ("ADDOPTS", "XDIST_WORKER", "XDIST_WORKER_COUNT", "XDIST_TESTRUNUID", "CURRENT_TEST"):
        environment.pop(f"PYTEST_{name}", None)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "machine",
        "-p",
        "record",
        "-p",
        "no:cacheprovider",
        "-ra",
        *options,
        folder,
    ]
    return run_command(command, env=environment, cwd=folder)


@pytest.mark.distributed
def test_a_worker_that_is_killed_is_seen(tmp_path):
    """And what was being tested, which is not run again; the others are."""
    (tmp_path / "test_killed.py").write_text("import os\ndef test_dies():\n    os.kill(os.getpid(), 9)\n")
    (tmp_path / "test_other.py").write_text("def test_passes():\n    pass\n")
    done = run_pytest(tmp_path, "-n", "2", "--dist", "loadfile", "--record", tmp_path / "record.json")
    assert done.returncode == 1
    assert "crashed while running 'test_killed.py::test_dies'" in done.stdout
    assert re.search(r"\d+ processes of this machine were killed for want of memory since the tests began", done.stdout)
    assert "1 failed, 1 passed, 1 skipped in " in done.stdout and "the worker that ran it has died" in done.stdout
    record = json.loads((tmp_path / "record.json").read_text())
    assert list(record["failures"]) == ["test_killed.py::test_dies"] and (record["passed"], record["failed"]) == (1, 1)


def test_processes_killed_for_memory_are_counted(monkeypatch):
    counts = iter((3, 5))
    monkeypatch.setattr(machine, "killed_for_memory", lambda: next(counts))
    config = type("Config", (), {"stash": {machine.KILLED: machine.killed_for_memory()}})
    report = type("Report", (), {"longrepr": "worker 'gw0' crashed while running 'test'"})
    machine.pytest_handlecrashitem(report, type("Schedule", (), {"config": config}))
    assert report.longrepr.startswith(
        "worker 'gw0' crashed while running 'test'\n2 processes of this machine were killed"
    )


@pytest.mark.distributed
def test_caches_are_the_runs_own(tmp_path):
    """Shared by its workers, gone with it; and a home that cannot be written to is none of the tests' business."""
    (tmp_path / "test_caches.py").write_text(
        "import os, pathlib, pytest, machine\n"
        "@pytest.mark.parametrize('i', range(4))\n"
        "def test_them(i):\n"
        "    folders = {name: pathlib.Path(os.environ[name]) for name in machine.CACHES}\n"
        "    assert str(folders.pop('TRITON_CACHE_DIR')) == '/somewhere'\n"
        "    for folder in folders.values():\n"
        "        folder.mkdir(exist_ok=True)\n"
        "    with open('seen', 'a') as seen:\n"
        "        seen.write(f'{folder.parent}\\n')\n"
    )
    variables = {**dict.fromkeys(machine.CACHES, ""), "TRITON_CACHE_DIR": "/somewhere", "HOME": "/nonexistent"}
    done = run_pytest(tmp_path, "-n", "2", **variables)
    assert done.returncode == 0, done.stdout[-3000:]
    (folder,) = set((tmp_path / "seen").read_text().split())
    assert Path(folder).name.startswith("dpdmd-tests-") and not Path(folder).exists()


@pytest.mark.distributed
def test_a_default_device_is_for_every_function():
    with torch.device("meta"):
        assert torch.linspace(0, 1, 2).is_meta and torch.ones(1).is_meta


def test_a_records_outcomes(tmp_path):
    (tmp_path / "test_one.py").write_text(
        "import pytest\n"
        "@pytest.fixture\n"
        "def breaks():\n"
        "    yield\n"
        "    assert False\n"
        "def test_passes():\n    pass\n"
        "def test_fails():\n    assert False\n"
        "def test_breaks(breaks):\n    pass\n"
        "@pytest.mark.gpu\ndef test_on_gpu():\n    pass\n"
        "@pytest.mark.gpu\n@pytest.mark.skipif(True, reason='needs another GPU')\ndef test_skipped():\n    pass\n"
        "@pytest.mark.gpu\ndef test_skips():\n    pytest.skip('needs nvcc')\n"
    )
    (tmp_path / "test_two.py").write_text("import no_such_module\n")
    for workers in ("0", "2"):
        done = run_pytest(tmp_path, "-n", workers, "--record", "record.json", "--continue-on-collection-errors")
        assert done.returncode == 1, done.stdout
        record = json.loads((tmp_path / "record.json").read_text())
        assert {name: record[name] for name in ("status", "passed", "failed", "skipped")} == {
            "status": 1, "passed": 2, "failed": 3, "skipped": 2,
        }  # fmt: skip
        assert record["gpu"] == {"passed": 1, "failed": 0, "skipped": 2}
        assert list(record["failures"]) == ["test_one.py::test_breaks", "test_one.py::test_fails", "test_two.py"]
        assert record["skipped_for"] == {"needs another GPU": 1, "needs nvcc": 1}
        one = record["files"]["test_one.py"]
        assert one.pop("seconds") >= 0 and one == {"passed": 2, "failed": 2, "skipped": 2}
        assert record["files"]["test_two.py"] == {"passed": 0, "failed": 1, "skipped": 0, "seconds": 0.0}
