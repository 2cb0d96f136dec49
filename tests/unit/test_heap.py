"""Heap reports where descriptors, threads or children are not what they usually are."""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from tests.servers.waiting import wait_until
from tests.unit.shortages import descriptors_used_up, no_more_threads

from viralfx.runner.heap import HeapReports


@contextlib.contextmanager
def children_that_nobody_waits_for() -> Iterator[None]:
    """Have the kernel forget each child that ends, as who started us may have said."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)


def is_followed() -> bool:
    """Tell whether a thread still waits for a report."""
    return any(thread.name == "heap-report" for thread in threading.enumerate())


def last_message(caplog: pytest.LogCaptureFixture) -> str:
    """Return what was logged last."""
    return caplog.messages[-1] if caplog.messages else ""


def test_a_report_without_a_descriptor_is_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is asked for by a signal, in the midst of anything; each time anew."""
    reports = HeapReports(str(tmp_path))
    with descriptors_used_up():
        reports.make()
        reports.make()

    assert caplog.messages == ["Heap report failed"] * 2


def test_a_report_is_made_beside_a_thousand_clients(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whose descriptors leave none below 1024."""
    caplog.set_level(logging.WARNING)
    with descriptors_used_up() as opened:
        for _ in range(20):
            os.close(opened.pop())
        HeapReports(str(tmp_path)).make()
        wait_until(lambda: last_message(caplog), seconds=60, what="the report")

    assert last_message(caplog) == "Heap report written"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_report_is_made_where_children_are_waited_for_by_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Who is told that there is no such child is not the one to fail for it."""
    caplog.set_level(logging.WARNING)
    with children_that_nobody_waits_for():
        HeapReports(str(tmp_path)).make()
        wait_until(lambda: not is_followed(), seconds=60, what="the end of the report")

    assert caplog.messages == ["Heap report written"]


def test_a_report_without_a_thread_is_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each time anew; no child and no descriptor is left."""
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
