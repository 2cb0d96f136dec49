"""Waits on conditions with a deadline."""

import asyncio
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from viralfx.domain.health.model import HealthCheck, Observation

T = TypeVar("T")


def _pause(waited: float) -> float:
    """Return the seconds until the next poll: the longer a wait, the more seldom it polls."""
    return min(max(0.01, waited / 20), 0.2)


def wait_until(
    poll: Callable[[], T | None],
    *,
    seconds: float = 20.0,
    what: Callable[[], str] | str = "condition",
) -> T:
    """Poll until the result is true, and return it; fail with ``what`` after ``seconds``.

    A poll may be a request to the process under test, so a long wait polls more seldom.
    """
    began, pause = time.monotonic(), threading.Event()
    while True:
        if seen := poll():
            return seen
        waited = time.monotonic() - began
        if waited > seconds:
            description = what if isinstance(what, str) else what()
            raise AssertionError(f"not within {seconds:g} s: {description}")
        pause.wait(_pause(waited))


async def until(condition: Callable[[], object], *, seconds: float = 20.0) -> None:
    """Poll until the condition is true while the event loop runs; fail after ``seconds``."""
    began = time.monotonic()
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - a condition of any kind sets no event
            await asyncio.sleep(min(_pause(time.monotonic() - began), 0.05))


async def wait_for_code(
    check: HealthCheck, code: str | None, *, seconds: float = 20.0
) -> Observation:
    """Run the check until its observation has the code, and return that."""
    began = time.monotonic()
    async with asyncio.timeout(seconds):
        while True:
            if (observation := await check.check()).code == code:
                return observation
            await asyncio.sleep(min(_pause(time.monotonic() - began), 0.05))
