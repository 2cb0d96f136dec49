"""Runs pytest in this process, and records the result of each test.

    python -m tests.recorder FILE ARGUMENTS...    the results go to a file, as JSON

``tests.gate`` calls it for each attempt.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.gate import FAILED, HANGS_AFTER, INTERRUPTED, SETUP, Results, take_interrupts


class Recorder:
    """Records the results of each test, as a plugin of pytest."""

    def __init__(self) -> None:
        """Start without results."""
        self.results = Results()
        self._passed: dict[str, None] = {}
        self._selected: dict[str, None] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Record one phase of a test. A test that fails in any phase has failed."""
        results, test = self.results, report.nodeid
        if report.failed:
            phase = SETUP if report.when == "setup" else ""
            results.failed.setdefault(test, f"{phase}{_first_line(report)}")
        elif report.skipped:
            results.skipped[test] = _reason(report)
        elif report.when == "call":
            self._passed[test] = None

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Record a file whose tests cannot be collected."""
        if report.failed:
            self.results.failed.setdefault(report.nodeid, _last_line(str(report.longrepr)))

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Record the tests to run in this process."""
        self._selected |= dict.fromkeys(item.nodeid for item in session.items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: Sequence[str]) -> None:
        """Record the tests to run in other processes."""
        self._selected |= dict.fromkeys(ids)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_make_scheduler(self, config: pytest.Config, log: Any) -> Any:
        """Distribute the tests so that a killed process costs one test."""
        from tests.distribution import FileScheduling  # noqa: PLC0415 - pytest loads xdist first

        return FileScheduling(config, log)

    def finished(self, code: int) -> Results:
        """Return the results of a call that ended with this exit code."""
        results = self.results
        results.passed = [test for test in self._passed if test not in results.failed]
        if code in {0, FAILED}:
            for test in self._selected:
                if test not in self._passed and test not in results.skipped:
                    results.failed.setdefault(test, "did not run to its end")
        return results


def _first_line(report: pytest.TestReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = str(crash.message if crash else report.longrepr).strip().splitlines()
    return lines[0] if lines else "no message"


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "no message"


def _reason(report: pytest.TestReport) -> str:
    where = report.longrepr
    text = where[2] if isinstance(where, tuple | list) else str(where)
    return str(text).removeprefix("Skipped: ")


def record(path: Path, arguments: Sequence[str]) -> int:
    """Run pytest in this process, write its results to a file, and return its exit code."""
    recorder = Recorder()
    cut = ("-o", f"faulthandler_timeout={HANGS_AFTER}", "-o", "faulthandler_exit_on_timeout=true")
    code = FAILED
    try:
        code = int(pytest.main([*cut, *arguments], plugins=[recorder]))
    finally:  # a warning may become an error when all tests have run
        recorder.finished(code).write(path)
    return code


if __name__ == "__main__":
    take_interrupts()
    try:
        sys.exit(record(Path(sys.argv[1]), sys.argv[2:]))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
