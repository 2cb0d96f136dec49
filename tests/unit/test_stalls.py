"""How the watch over the event loop ends; what it tells is in the tests of the system."""

import asyncio
import logging
import threading
import time

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


def test_a_watch_that_fails_is_heard_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the error: it must not look as if nothing had ever blocked the loop."""
    heard: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", heard.append)

    def fail(_record: logging.LogRecord) -> bool:
        raise RuntimeError("planted")

    logger = logging.getLogger("viralfx.loop")
    logger.addFilter(fail)
    loop = asyncio.new_event_loop()
    try:
        StallDetector(loop, THRESHOLD).start()
        loop.call_soon(time.sleep, 10 * THRESHOLD)
        loop.call_later(11 * THRESHOLD, loop.stop)
        loop.run_forever()
        wait_until(lambda: not is_watched(), what="the end of the watch")
    finally:
        logger.removeFilter(fail)
        loop.close()
    (error,) = heard

    assert str(error.exc_value) == "planted"
