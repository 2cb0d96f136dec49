"""The end and the errors of the loop monitor; the system tests cover its log lines."""

import asyncio
import logging
import threading
from collections.abc import Callable
from contextlib import suppress

import pytest
from tests.servers.waiting import wait_until

from viralfx.runner.diagnostics import BlockedLoopDetector

THRESHOLD = 0.02
JOB = "01a214b8-8af2-7a9b-8393-0890f8feb712"


def is_running() -> bool:
    """Return True while the thread of a monitor runs."""
    return any(thread.name == "loop-watch" for thread in threading.enumerate())


def test_the_monitor_of_a_closed_loop_ends() -> None:
    """It ends by itself and without an error."""
    loop = asyncio.new_event_loop()
    loop.close()
    BlockedLoopDetector(loop, THRESHOLD).start()

    wait_until(lambda: not is_running(), what="the end of the monitor")


class RecordHandler(logging.Handler):
    """Collects log records."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Store a record."""
        self.records.append(record)


def block(loop: asyncio.AbstractEventLoop, until: Callable[[], object]) -> None:
    """Block a loop, a second at a time, until a condition holds.

    A monitor that a busy machine delays takes the process for suspended, and waits for the loop.
    """

    def block_once() -> bool:
        loop.call_soon(wait)
        loop.run_forever()
        return bool(until())

    def wait() -> None:
        with suppress(AssertionError):
            wait_until(until, seconds=1)
        loop.stop()

    wait_until(block_once, what="the condition")


def test_a_monitor_that_fails_logs_one_error_and_continues(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error does not reach ``threading.excepthook``, which would end the process."""
    uncaught: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", uncaught.append)
    handler, failures = RecordHandler(), []

    def fail(record: logging.LogRecord) -> bool:
        failures.append(record)
        raise RuntimeError("planted")

    logger, process = logging.getLogger("viralfx.loop"), logging.getLogger("viralfx.process")
    loop = asyncio.new_event_loop()
    # Longer than the delay of a busy machine, after which the monitor would log another message.
    detector = BlockedLoopDetector(loop, 0.2)
    logger.addHandler(handler)
    process.addHandler(handler)
    logger.addFilter(fail)
    try:
        detector.start()
        block(loop, lambda: len(failures) > 2)
        logger.removeFilter(fail)
        block(loop, lambda: len(handler.records) > 1)
    finally:
        logger.removeFilter(fail)
        logger.removeHandler(handler)
        process.removeHandler(handler)
        detector.stop()
        wait_until(lambda: not is_running(), what="the end of the monitor")
        loop.close()
    error, *others = handler.records

    assert uncaught == []
    assert error.name == "viralfx.process"
    assert error.getMessage() == "Event loop monitor failed"
    assert error.exc_info is not None
    assert str(error.exc_info[1]) == "planted"
    assert {other.name for other in others} == {"viralfx.loop"}


def test_the_job_that_blocks_is_named() -> None:
    """By its asyncio task; another task has no such name."""
    handler, logger = RecordHandler(), logging.getLogger("viralfx.loop")
    loop = asyncio.new_event_loop()
    detector = BlockedLoopDetector(loop, 0.05)

    async def block(lines: int) -> None:
        wait_until(lambda: len(handler.records) >= lines, what="the warning")

    async def main() -> None:
        await asyncio.create_task(block(1), name=JOB)
        await asyncio.create_task(block(2), name="Task-1")

    logger.addHandler(handler)
    try:
        detector.start()
        loop.run_until_complete(main())
    finally:
        logger.removeHandler(handler)
        detector.stop()
        loop.close()

    first, second = handler.records[:2]
    assert getattr(first, "job", None) == JOB
    assert not hasattr(second, "job")
