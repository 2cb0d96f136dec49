"""Heap reports without free descriptors or threads, and with SIGCHLD ignored."""

import logging
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from tests.process.shortages import descriptors_used_up, needs_many, no_more_threads
from tests.system.service import ROOT

from viralfx.runner.diagnostics import HeapReports


def test_a_failure_without_free_descriptors_is_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each attempt logs the failure, and raises no exception in the signal handler."""
    reports = HeapReports(str(tmp_path))
    with descriptors_used_up():
        reports.make()
        reports.make()

    assert caplog.messages == ["Heap report failed"] * 2


def report_of_a_small_process(folder: Path, statements: str) -> list[str]:
    """Run statements in a new interpreter, which has few objects to report; return its log.

    A report of the tests' own process would take half a minute.
    """
    program = f"""
import contextlib, logging, os, signal, sys, threading
from tests.process.shortages import descriptors_used_up
from viralfx.runner.diagnostics import HeapReports

logging.basicConfig(format="%(message)s", stream=sys.stdout)
reports = HeapReports({str(folder)!r})

def wait() -> None:
    for thread in threading.enumerate():
        if thread.name == "heap-report":
            thread.join(60)

{statements}
"""
    ran = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=80,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()


@needs_many
def test_a_report_works_with_descriptors_above_1023(tmp_path: Path) -> None:
    """A thousand clients use up all smaller descriptors."""
    logged = report_of_a_small_process(
        tmp_path,
        """
with descriptors_used_up() as opened:
    for _ in range(20):
        os.close(opened.pop())
    reports.make()
    wait()
""",
    )

    assert logged == ["Heap report written"]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_report_works_if_the_kernel_reaps_children(tmp_path: Path) -> None:
    """An error of ``waitpid`` does not fail the report."""
    logged = report_of_a_small_process(
        tmp_path,
        """
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
reports.make()
wait()
""",
    )

    assert logged == ["Heap report written"]


def test_a_failure_without_free_threads_is_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each attempt logs the failure; no child and no descriptor is left."""
    caplog.set_level(logging.WARNING)
    reports = HeapReports(str(tmp_path))
    process = psutil.Process()
    before = process.num_fds(), process.children()
    with no_more_threads():
        reports.make()
        reports.make()

    assert caplog.messages == ["Heap report failed"] * 2
    assert (process.num_fds(), process.children()) == before
    assert list(tmp_path.iterdir()) == []
