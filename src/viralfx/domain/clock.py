"""Time as an argument: the clock port, the real clock, and waiting with a limit."""

import asyncio
import time
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Protocol


class Clock(Protocol):
    """Where the domain gets time from; tests pass one they can move by hand."""

    def monotonic(self) -> float:
        """Seconds that never go backwards: for ages, deadlines and durations."""
        ...

    def now(self) -> datetime:
        """Wall-clock time in UTC: for display only."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Return after ``seconds``; zero or less yields once to the loop."""
        ...


class SystemClock:
    """The machine's clock and the running event loop's timers."""

    def monotonic(self) -> float:
        """Read CLOCK_MONOTONIC."""
        return time.monotonic()

    def now(self) -> datetime:
        """Read the wall clock."""
        return datetime.now(UTC)

    async def sleep(self, seconds: float) -> None:
        """Sleep on the running loop."""
        await asyncio.sleep(max(0.0, seconds))


def timestamp(moment: datetime) -> str:
    """Format a UTC moment as every answer and log line does: ``2026-01-06T12:00:00.000Z``."""
    second = _to_the_second(int(moment.timestamp()))
    return f"{second}.{moment.microsecond // 1000:03d}Z"


@lru_cache(maxsize=8)
def _to_the_second(seconds: int) -> str:
    # Thousands of probes share a second, and this is the dear part of formatting.
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")


async def finished_within(task: asyncio.Future[Any], seconds: float, clock: Clock) -> bool:
    """Wait until ``task`` is done, at most ``seconds``; tell whether it is.

    The task is neither cancelled nor awaited on expiry. ``asyncio.timeout`` and ``wait_for`` wait
    for the task they cancelled and so hang with one that swallows cancellation; whoever calls
    this decides what to do with a task that is late.
    """
    timer: asyncio.Future[Any] = asyncio.ensure_future(clock.sleep(seconds))
    try:
        await asyncio.wait({task, timer}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        timer.cancel()
    return task.done()
