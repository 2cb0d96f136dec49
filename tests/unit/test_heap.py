"""Heap reports where descriptors are many, or run out."""

import contextlib
import logging
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.system.service import wait_for

from viralfx.runner.heap import HeapReports

MANY = 1100
"""More descriptors than ``select`` can take."""


@contextlib.contextmanager
def descriptors_used_up() -> Iterator[list[int]]:
    """Open as many as there may be, which are a little more than a thousand; return them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (MANY, hard))
    opened: list[int] = []
    try:
        with contextlib.suppress(OSError):
            while True:
                opened.append(os.dup(0))
        yield opened
    finally:
        for descriptor in opened:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


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
        wait_for(lambda: last_message(caplog), seconds=60, what="the report")

    assert last_message(caplog) == "Heap report written"
    assert len(list(tmp_path.iterdir())) == 1
