"""Runs the tests on a GPU and records what became of them, so that everybody sees when they last passed there.

    python benchmarks/gpu_tests.py                                all of them: benchmarks/results/gpu_tests.json
    python benchmarks/gpu_tests.py tests/kernels --output mine.json      some of them

Runs pytest of this interpreter, with the options of `make test`; needs nothing installed beyond what the tests need. The
file holds the commit, the machine and the versions, how many tests passed, failed and were skipped (of those marked gpu
apart, and by file), and why each that failed did. It is written whatever came of the tests; of a run that is cut off the
file unfinished-... beside it stays. The exit status is 0 where all passed and some of those marked gpu ran, 1 where not, 2
where there is no GPU or pytest runs no test.
"""

from __future__ import annotations

from dpdmd import command  # isort: skip  first: the others take seconds, in which a user may interrupt

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from dpdmd.command import ConfigError
from dpdmd.files import write_json
from dpdmd.run.provenance import provenance

ROOT = Path(__file__).parents[1]
STORED = ROOT / "benchmarks" / "results" / "gpu_tests.json"
PYTEST = ("-m", "pytest", "-q", "-n", "auto", "--dist", "loadfile", "--no-loadscope-reorder")  # as in the Makefile


def main(arguments: Sequence[str] | None = None) -> int:
    return command.run(_main, list(sys.argv[1:] if arguments is None else arguments))


def _main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/gpu_tests.py", description="Runs the tests on a GPU and records what became of them."
    )
    parser.add_argument("tests", nargs="*", help="files and folders; all tests without")
    parser.add_argument(
        "--output",
        type=command.new_file,
        default=str(STORED),
        help="where to write; benchmarks/results/gpu_tests.json for all tests",
    )
    options = parser.parse_args(arguments)
    output = options.output.absolute()
    _check(options.tests, output)
    made_by = provenance(shlex.join(["python", "benchmarks/gpu_tests.py", *arguments]))
    begin = time.monotonic()
    # Of a run that is cut off this is what stays.
    unfinished = output.with_name(f"unfinished-{output.name}")
    unfinished.unlink(missing_ok=True)
    status = _run([each if Path(each).is_absolute() else str(Path.cwd() / each) for each in options.tests], unfinished)
    record = json.loads(unfinished.read_text(encoding="utf-8")) if unfinished.exists() else {}
    if status > 0 and not record.get("files"):
        raise ConfigError(f"pytest ended with status {status} and ran no test; what it said stands above")
    if record.get("status") is None:  # pytest was killed
        reason = f"ended with status {status} before it was through"
        record = {**record, "status": status, "failures": {**record.get("failures", {}), "pytest itself": reason}}
    write_json(output, {**made_by, "seconds": round(time.monotonic() - begin, 1), **record})
    unfinished.unlink(missing_ok=True)
    gpu = record.get("gpu", {})
    ran = gpu.get("passed", 0) + gpu.get("failed", 0)
    print(f"{output}: {ran} of {sum(gpu.values())} tests marked gpu ran")
    return int(status != 0 or ran == 0)


def _check(tests: Sequence[str], output: Path) -> None:
    """What can be known before the tests take their time."""
    if not torch.cuda.is_available():
        raise ConfigError("torch sees no GPU here, and this is the record of a run on one; make test runs without one")
    if tests and output == STORED:
        raise ConfigError(f"{shlex.join(tests)}: {STORED.name} is for all tests; give --output FILE for some")


def _run(tests: Sequence[str], file: Path) -> int:
    """pytest's status; tests/record.py writes to `file`, while they run too."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *PYTEST, "--record", str(file), *tests], cwd=ROOT, env=environment
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
