"""How the watch over the event loop ends; what it tells is in the tests of the system."""

import asyncio
import logging
import threading
from collections.abc import Callable

import pytest
from tests.servers.waiting import wait_until

from viralfx.runner.stalls import StallDetector

THRESHOLD = 0.02


def is_watched() -> bool:
    """Tell whether a thread still asks a loop."""
    return any(thread.name == "loop-watch" for thread in threading.enumerate())


def test_the_watch_over_a_loop_that_is_closed_is_over() -> None:
    """Also where nobody said so, and without an error."""
    loop = asyncio.new_event_loop()
    loop.close()
    StallDetector(loop, THRESHOLD).start()

    wait_until(lambda: not is_watched(), what="the end of the watch")


class Heard(logging.Handler):
    """Keeps records."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Take one."""
        self.records.append(record)


def block(loop: asyncio.AbstractEventLoop, until: Callable[[], object]) -> None:
    """Block a loop until something is so."""

    def wait() -> None:
        try:
            wait_until(until, what="what the loop is blocked for")
        finally:
            loop.stop()

    loop.call_soon(wait)
    loop.run_forever()


def test_a_watch_that_fails_says_so_once_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the error: it ends no process, which an error of a thread that nobody takes does."""
    uncaught: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", uncaught.append)
    heard, failures = Heard(), []

    def fail(record: logging.LogRecord) -> bool:
        failures.append(record)
        raise RuntimeError("planted")

    logger, process = logging.getLogger("viralfx.loop"), logging.getLogger("viralfx.process")
    loop = asyncio.new_event_loop()
    # Longer than a busy machine holds up the watch, which would ask whether the process ran.
    detector = StallDetector(loop, 0.2)
    logger.addHandler(heard)
    process.addHandler(heard)
    logger.addFilter(fail)
    try:
        detector.start()
        block(loop, lambda: len(failures) > 2)
        logger.removeFilter(fail)
        block(loop, lambda: len(heard.records) > 1)
    finally:
        logger.removeFilter(fail)
        logger.removeHandler(heard)
        process.removeHandler(heard)
        detector.stop()
        wait_until(lambda: not is_watched(), what="the end of the watch")
        loop.close()
    error, *others = heard.records

    assert uncaught == []
    assert error.name == "viralfx.process"
    assert error.getMessage() == "Watch over the event loop failed"
    assert error.exc_info is not None
    assert str(error.exc_info[1]) == "planted"
    assert {other.name for other in others} == {"viralfx.loop"}
