"""Run the tests on a GPU and record the results, so that everybody sees when they last passed there.

    python benchmarks/gpu_tests.py                                all tests: benchmarks/results/gpu_tests.json
    python benchmarks/gpu_tests.py tests/kernels --output mine.json      some tests

Runs pytest with the options of `make test`. The file holds the commit, machine and versions, the numbers of passed, failed and
skipped tests (in all, by file, and of those marked gpu), and the reason of each failure. If this script is killed,
unfinished-FILE stays beside it. Exit status: 0 if all tests passed and some of those marked gpu ran, 1 if not, 2 without a
GPU or if pytest ran no test.
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
    parser = argparse.ArgumentParser(prog="python benchmarks/gpu_tests.py", description=__doc__.split("\n")[0])
    parser.add_argument("tests", nargs="*", help="files and folders (default: all tests)")
    file_help = "file to write (default, for all tests: benchmarks/results/gpu_tests.json)"
    parser.add_argument("--output", type=command.new_file, default=str(STORED), help=file_help)
    options = parser.parse_args(arguments)
    output = options.output.absolute()
    if not torch.cuda.is_available():
        raise ConfigError("torch sees no GPU here, and this script records a run on one; make test runs without a GPU")
    if options.tests and output == STORED:
        raise ConfigError(f"{shlex.join(options.tests)}: {STORED.name} is for all tests; give --output FILE for some")
    made_by = provenance(shlex.join(["python", "benchmarks/gpu_tests.py", *arguments]))
    begin = time.monotonic()
    unfinished = output.with_name(f"unfinished-{output.name}")  # tests/record.py writes it while the tests run
    unfinished.unlink(missing_ok=True)
    tests = [os.path.join(os.getcwd(), each) for each in options.tests]
    pytest = [sys.executable, *PYTEST, "--record", str(unfinished), *tests]
    status = subprocess.run(pytest, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode
    record = json.loads(unfinished.read_text(encoding="utf-8")) if unfinished.exists() else {}
    if status > 0 and not record.get("files"):
        raise ConfigError(f"pytest ended with status {status} and ran no test; its output is above")
    if record.get("status") is None:  # pytest was killed
        reason = f"ended with status {status} before it finished"
        record = {**record, "status": status, "failures": {**record.get("failures", {}), "pytest itself": reason}}
    write_json(output, {**made_by, "seconds": round(time.monotonic() - begin, 1), **record})
    unfinished.unlink(missing_ok=True)
    gpu = record.get("gpu", {})
    ran = gpu.get("passed", 0) + gpu.get("failed", 0)
    print(f"{output}: {ran} of {sum(gpu.values())} tests marked gpu ran")
    return int(status != 0 or ran == 0)


if __name__ == "__main__":
    sys.exit(main())
