"""Runs the tests on a GPU and records what became of them, so that everybody sees when they last passed there.

    python benchmarks/gpu_tests.py                                all of them: benchmarks/results/gpu_tests.json
    python benchmarks/gpu_tests.py tests/kernels --output mine.json      some of them

Runs pytest of this interpreter, with the options of `make test`; needs nothing installed beyond what the tests need. The
file holds the commit, the machine and the versions, how many tests passed, failed and were skipped (of those marked gpu
apart, and by file), and the names of failures. It is written whatever came of the tests. The exit status is pytest's; 1
where none of the tests marked gpu ran, 2 where there is no GPU or pytest does not start.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from dpdmd.provenance import provenance

ROOT = Path(__file__).parents[1]
STORED = ROOT / "benchmarks" / "results" / "gpu_tests.json"
PYTEST = ("-m", "pytest", "-q", "-n", "auto", "--dist", "loadfile", "--no-loadscope-reorder")  # as in the Makefile


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description="Run the tests on a GPU and record what became of them.")
    parser.add_argument("tests", nargs="*", help="files and folders; all tests without")
    parser.add_argument("--output", type=Path, help="where to write; benchmarks/results/gpu_tests.json for all tests")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        return _refused(
            "torch sees no GPU here, and this records a run of the tests on one; make test runs them without"
        )
    if options.tests and options.output is None:
        return _refused(f"{shlex.join(options.tests)}: {STORED.name} is for all tests; give --output FILE for some")
    output = (options.output or STORED).absolute()
    if not output.parent.is_dir():
        return _refused(f"--output {output}: there is no folder {output.parent}")
    made_by = provenance(shlex.join(["python", "benchmarks/gpu_tests.py", *arguments]))
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "record.json"
        command = [sys.executable, *PYTEST, "--record", str(file), *options.tests]
        status = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode
        record = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if status > 0 and not record.get("files"):
        return _refused(f"pytest ended with status {status} and ran no test; what it said stands above")
    if not record:  # pytest was killed, and what it had found went with it
        record = {"status": status, "failures": [f"pytest itself, which ended with status {status}"]}
    seconds = round(time.monotonic() - begin, 1)
    output.write_text(json.dumps({**made_by, "seconds": seconds, **record}, indent=1) + "\n", encoding="utf-8")
    gpu = record.get("gpu", {})
    ran = gpu.get("passed", 0) + gpu.get("failed", 0)
    print(f"{output}: {ran} of {sum(gpu.values())} tests marked gpu ran", flush=True)
    return status if status > 0 else int(status < 0 or ran == 0)


def _refused(reason: str) -> int:
    print(f"error: {reason}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
