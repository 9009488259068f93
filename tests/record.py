"""pytest --record FILE: what became of the tests, by file, as JSON. A plugin for tests/conftest.py; with -n it counts for
all workers. It is written again and again while they run, so that a run that is cut off has told what it knew."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path

import pytest


def pytest_addoption(parser):
    parser.addoption("--record", metavar="FILE", help="write to FILE, as JSON, what became of the tests of each file")


def pytest_configure(config):
    if config.option.record and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Record(Path(config.option.record).absolute()))


class Record:
    def __init__(self, file: Path):
        self._file = file
        self._outcomes: dict[str, str] = {}  # by test
        self._seconds: dict[str, float] = defaultdict(float)  # by file
        self._of_the_gpu: set[str] = set()
        self._reasons: Counter[str] = Counter()  # for which tests were skipped
        self._failures: dict[str, str] = {}  # by test: why, in a line
        self._unwritten = 0

    def pytest_runtest_logreport(self, report):
        self._seconds[_file_of(report.nodeid)] += report.duration
        if "gpu" in report.keywords:
            self._of_the_gpu.add(report.nodeid)
        self._note(report)
        self._unwritten += 1
        if report.failed or self._unwritten >= EVERY:
            self._write(None)

    def pytest_collectreport(self, report):
        if not report.passed:  # a file that cannot be imported, or is skipped as a whole
            self._note(report)

    def _note(self, report):
        """What failed stays failed, whatever its other phases say."""
        before = self._outcomes.get(report.nodeid)
        if report.failed or before is None or (before == "passed" and report.skipped):
            self._outcomes[report.nodeid] = report.outcome
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            message = crash.message if crash is not None else str(report.longrepr)
            self._failures.setdefault(report.nodeid, _shortened(" ".join(message.split())))
        if report.skipped:
            said = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self._reasons[said.removeprefix("Skipped: ")] += 1

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, exitstatus):
        self._write(int(exitstatus))

    def _write(self, status: int | None):
        """status: pytest's; None while it runs."""
        self._unwritten = 0
        files: dict[str, Counter[str]] = defaultdict(Counter)
        for test, outcome in self._outcomes.items():
            files[_file_of(test)][outcome] += 1
        gpu = Counter(self._outcomes[test] for test in self._of_the_gpu)
        outcomes = Counter(self._outcomes.values())
        record = {
            "status": status,
            **_counts(outcomes),
            "gpu": _counts(gpu),
            "failures": dict(sorted(self._failures.items())),
            "skipped_for": dict(sorted(self._reasons.items())),
            "files": {
                name: {**_counts(files[name]), "seconds": round(self._seconds[name], 1)} for name in sorted(files)
            },
        }
        # One that is killed while it writes leaves the file before.
        new = self._file.with_name(f"{self._file.name}.new")
        new.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        new.replace(self._file)


EVERY = 300  # reports, three of each test


def _file_of(test: str) -> str:
    return test.partition("::")[0]


def _shortened(message: str) -> str:
    """The beginning, and more of the end: of a program that failed, that is where it says why."""
    return message if len(message) <= 1000 else f"{message[:250]} ... {message[-750:]}"


def _counts(outcomes: Counter[str]) -> dict[str, int]:
    return {outcome: outcomes[outcome] for outcome in ("passed", "failed", "skipped")}
