"""benchmarks/gpu_tests.py, with a GPU made up and tests of its own."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import run_command

ROOT = Path(__file__).parents[2]


@pytest.fixture
def gpu_tests(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module("gpu_tests")
    sys.modules.pop("gpu_tests")


@pytest.fixture
def gpu(monkeypatch):
    """One that torch sees here, though not in the processes that are started."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    properties = SimpleNamespace(total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p machine -p record -p no:cacheprovider")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "tests"), *sys.path]))
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_XDIST_TESTRUNUID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DPDMD_COMMIT", "abc")


def test_without_a_gpu_nothing_is_written(gpu_tests, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu_tests.subprocess, "run", lambda *a, **k: pytest.fail("started pytest"))
    assert gpu_tests.main(["--output", str(tmp_path / "run.json")]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: torch sees no GPU here") and printed.err.count("\n") == 1
    assert not printed.out and not (tmp_path / "run.json").exists()


def test_what_cannot_be_asked_for(gpu_tests, gpu, monkeypatch, capsys):
    monkeypatch.setattr(gpu_tests.subprocess, "run", lambda *a, **k: pytest.fail("started pytest"))
    assert gpu_tests.main(["tests/kernels"]) == 2
    message = "error: tests/kernels: gpu_tests.json is for all tests; give --output FILE for some\n"
    assert capsys.readouterr().err == message


@pytest.mark.distributed
def test_failures_are_written_as_they_are(gpu_tests, gpu, tmp_path, capfd):
    (tmp_path / "test_one.py").write_text(
        "import os, pytest\n"
        "@pytest.mark.gpu\ndef test_passes():\n    assert os.environ['OMP_NUM_THREADS'] == '1'\n"
        "@pytest.mark.gpu\ndef test_fails():\n    assert False\n"
        "@pytest.mark.gpu\ndef test_skips():\n    pytest.skip('needs nvcc')\n"
        "def test_elsewhere():\n    pass\n"
    )
    output = tmp_path / "run.json"
    assert gpu_tests.main([str(tmp_path), "--output", str(output)]) == 1
    printed = capfd.readouterr().out
    assert "1 failed, 2 passed, 1 skipped, " in printed  # pytest's own closing line
    assert f"{output}: 2 of 3 tests marked gpu ran" in printed
    result = json.loads(output.read_text())
    assert result["commit"] == "abc" and result["machine"]["gpu"] == "NVIDIA H100 80GB HBM3"
    assert result["machine"]["gpu_memory_gib"] == 80 and result["packages"]["torch"] and result["python"]
    assert result["command"] == f"python benchmarks/gpu_tests.py {tmp_path} --output {output}"
    assert (result["status"], result["passed"], result["failed"], result["skipped"]) == (1, 2, 1, 1)
    assert result["gpu"] == {"passed": 1, "failed": 1, "skipped": 1} and result["seconds"] > 0
    ((failure, why),) = result["failures"].items()
    assert not list(tmp_path.glob("unfinished-*"))
    assert (
        failure.endswith("test_one.py::test_fails")
        and why == "assert False"
        and result["skipped_for"] == {"needs nvcc": 1}
    )
    (counts,) = result["files"].values()
    assert counts["passed"] == 2


def as_if(gpu_tests, monkeypatch, status, record):
    """pytest, which ends with the status and leaves the record."""

    def run(command, **options):
        assert command[:3] == [sys.executable, "-m", "pytest"] and options["cwd"] == ROOT
        if record is not None:
            Path(command[command.index("--record") + 1]).write_text(json.dumps(record))
        return SimpleNamespace(returncode=status)

    monkeypatch.setattr(gpu_tests.subprocess, "run", run)


GREEN = {"status": 0, "passed": 9, "failed": 0, "skipped": 1, "files": {"tests/test_x.py": {"passed": 9}}}


@pytest.mark.parametrize(
    ("status", "record", "returned", "written"),
    [
        (0, {**GREEN, "gpu": {"passed": 5, "failed": 0, "skipped": 0}}, 0, {"passed": 9}),
        (0, {**GREEN, "gpu": {"passed": 0, "failed": 0, "skipped": 5}}, 1, {"passed": 9}),  # nothing ran on the GPU
        (-9, None, 1, {"status": -9, "failures": {"pytest itself": "ended with status -9 before it finished"}}),
        # Cut off, it has told what it knew.
        (
            -9,
            {**GREEN, "status": None, "failures": {"tests/test_x.py::test_y": "assert 1 == 2"}},
            1,
            {
                **{"passed": 9, "status": -9},
                "failures": {
                    "tests/test_x.py::test_y": "assert 1 == 2",
                    "pytest itself": "ended with status -9 before it finished",
                },
            },
        ),
        (4, None, 2, None),  # pytest did not start
        (5, {"status": 5, "files": {}}, 2, None),
    ],
)
def test_what_becomes_of_it(gpu_tests, gpu, monkeypatch, tmp_path, capsys, status, record, returned, written):
    monkeypatch.setattr(gpu_tests, "STORED", tmp_path / "gpu_tests.json")
    as_if(gpu_tests, monkeypatch, status, record)
    (tmp_path / "gpu_tests.json").write_text("the last run's")
    assert gpu_tests.main([]) == returned
    if written is None:
        assert (tmp_path / "gpu_tests.json").read_text() == "the last run's"
        assert f"error: pytest ended with status {status} and ran no test" in capsys.readouterr().err
    else:
        result = json.loads((tmp_path / "gpu_tests.json").read_text())
        assert written.items() <= result.items() and result["command"] == "python benchmarks/gpu_tests.py"


def test_it_runs_what_make_test_runs(gpu_tests):
    assert f"python {' '.join(gpu_tests.PYTEST)} $(TESTS)\n" in (ROOT / "Makefile").read_text()
    assert gpu_tests.STORED == ROOT / "benchmarks" / "results" / "gpu_tests.json"


def test_a_run_that_is_cut_off_leaves_what_it_knew(gpu_tests, gpu, tmp_path):
    file = tmp_path / "record.json"
    # pytest hears of a failure after the next test has begun; that one ends it once it has written it down.
    (tmp_path / "test_one.py").write_text(
        "import os, pathlib, signal, time\n"
        "def test_fails():\n    assert 1 == 2\n"
        "def test_kills():\n"
        f"    while not pathlib.Path({str(file)!r}).exists():\n        time.sleep(0.01)\n"
        "    os.kill(os.getppid(), signal.SIGKILL)\n    signal.pause()\n"
    )
    run_command([sys.executable, "-m", "pytest", "-q", "-n", "1", "--record", str(file), str(tmp_path)], cwd=ROOT)
    record = json.loads(file.read_text())
    assert record["status"] is None and list(record["failures"].values()) == ["assert 1 == 2"]
