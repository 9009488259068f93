"""pytest --record FILE: what became of the tests, by file, as JSON. A plugin for tests/conftest.py; with -n it counts for
all workers."""

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

    def pytest_runtest_logreport(self, report):
        self._seconds[_file_of(report.nodeid)] += report.duration
        if "gpu" in report.keywords:
            self._of_the_gpu.add(report.nodeid)
        self._note(report)

    def pytest_collectreport(self, report):
        if not report.passed:  # a file that cannot be imported, or is skipped as a whole
            self._note(report)

    def _note(self, report):
        """What failed stays failed, whatever its other phases say."""
        before = self._outcomes.get(report.nodeid)
        if report.failed or before is None or (before == "passed" and report.skipped):
            self._outcomes[report.nodeid] = report.outcome
        if report.skipped:
            said = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self._reasons[said.removeprefix("Skipped: ")] += 1

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, exitstatus):
        files: dict[str, Counter[str]] = defaultdict(Counter)
        for test, outcome in self._outcomes.items():
            files[_file_of(test)][outcome] += 1
        gpu = Counter(self._outcomes[test] for test in self._of_the_gpu)
        outcomes = Counter(self._outcomes.values())
        record = {
            "status": int(exitstatus),
            **_counts(outcomes),
            "gpu": _counts(gpu),
            "failures": sorted(test for test, outcome in self._outcomes.items() if outcome == "failed"),
            "skipped_for": dict(sorted(self._reasons.items())),
            "files": {
                name: {**_counts(files[name]), "seconds": round(self._seconds[name], 1)} for name in sorted(files)
            },
        }
        self._file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _file_of(test: str) -> str:
    return test.partition("::")[0]


def _counts(outcomes: Counter[str]) -> dict[str, int]:
    return {outcome: outcomes[outcome] for outcome in ("passed", "failed", "skipped")}
