"""Clock port, system clock, jitter, waits with a time limit, and background tasks."""

import asyncio
import math
import random
import time
from collections.abc import Coroutine
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Protocol


class Clock(Protocol):
    """Port: the source of time. Tests pass a clock that they move."""

    def monotonic(self) -> float:
        """Return monotonic seconds, for ages, deadlines and durations."""
        ...

    def now(self) -> datetime:
        """Return the wall-clock time in UTC, for display only."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Return after ``seconds``. Zero or a negative number yields to the loop once."""
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


def default_rng() -> random.Random:
    """Return a generator for jitter: it spreads load, so its values need not be unpredictable."""
    return random.Random()  # noqa: S311 - no secret depends on it


def timestamp(moment: datetime) -> str:
    """Format a UTC time for responses and log lines: ``2026-01-06T12:00:00.000Z``."""
    # A float of a far time is less precise than a microsecond.
    second = _to_the_second(round(moment.timestamp() - moment.microsecond / 1e6))
    return f"{second}.{moment.microsecond // 1000:03d}Z"


@lru_cache(maxsize=8)
def _to_the_second(seconds: int) -> str:
    # Cached per second: this is the expensive part, and thousands of probes share one second.
    return datetime.fromtimestamp(seconds, UTC).isoformat()[:19]


async def finished_within(task: asyncio.Future[Any], seconds: float, clock: Clock) -> bool:
    """Wait until ``task`` is done, at most ``seconds``. Return whether it is done.

    On expiry the task is neither cancelled nor awaited; the caller decides what to do with it.
    ``asyncio.timeout`` and ``asyncio.wait_for`` wait for the task that they cancelled, so they
    hang if the task suppresses its cancellation.
    """
    if type(clock) is SystemClock:
        return await _finished_within(task, seconds)
    timer: asyncio.Future[Any] = asyncio.ensure_future(clock.sleep(seconds))
    try:
        await asyncio.wait({task, timer}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        timer.cancel()
    return task.done()


async def wait_for(event: asyncio.Event, seconds: float, clock: Clock) -> bool:
    """Wait until ``event`` is set, at most ``seconds``. Return whether it was set in time."""
    waiter = asyncio.ensure_future(event.wait())
    try:
        return await finished_within(waiter, seconds, clock)
    finally:
        waiter.cancel()


async def resolved_within(future: asyncio.Future[None], seconds: float, clock: Clock) -> None:
    """Wait until ``future`` is done; resolve it if that takes longer than ``seconds``.

    Cheaper than :func:`finished_within`. Use it only for a future that belongs to the caller. The
    wait may take up to 1 % longer: waits of similar length end together, which wakes the process
    less often.
    """
    if type(clock) is not SystemClock:
        await finished_within(future, seconds, clock)
        return
    loop = asyncio.get_running_loop()
    timer = loop.call_at(_on_grid(loop.time() + seconds, seconds), _resolve, future)
    try:
        await future
    finally:
        timer.cancel()


def _on_grid(moment: float, seconds: float) -> float:
    """Round a time up by at most 1 % of the wait, to a grid that waits of similar length share."""
    if seconds <= 0:
        return moment
    # A power of two, so that waits that differ a little have the same grid.
    grid = 2.0 ** math.floor(math.log2(seconds / 100))
    # The quotient of a tiny moment may round to 0, so the grid alone could end the wait early.
    return max(moment, math.ceil(moment / grid) * grid)


async def _finished_within(task: asyncio.Future[Any], seconds: float) -> bool:
    # Uses the loop's timer directly: a sleeping task and asyncio.wait would cost more than most of
    # the checks that wait here.
    if task.done():
        await asyncio.sleep(0)
        return True
    loop = asyncio.get_running_loop()
    waiter: asyncio.Future[None] = loop.create_future()

    def release(_: object) -> None:
        _resolve(waiter)

    timer = loop.call_later(max(0.0, seconds), _resolve, waiter)
    task.add_done_callback(release)
    try:
        await waiter
    finally:
        timer.cancel()
        task.remove_done_callback(release)
    return task.done()


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def supervised(coroutine: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
    """Start a background task; an error that ends it is reported at once.

    The report goes to the loop's exception handler, which treats it as an uncaught exception.
    Without it, asyncio reports the error only when the task is garbage-collected.
    """
    task = asyncio.create_task(coroutine, name=name)
    task.add_done_callback(report_crash)
    return task


def report_crash(task: asyncio.Task[Any]) -> None:
    """Pass the error of a finished task to the loop's exception handler, if it has one."""
    if task.cancelled() or (error := task.exception()) is None:
        return
    message = f"Background task {task.get_name()} failed"
    task.get_loop().call_exception_handler({"message": message, "exception": error, "future": task})


def ignore_error(task: asyncio.Future[Any]) -> None:
    """Mark the error of a finished task as handled, so that it is not reported as uncaught.

    Use it as a done callback for a task whose result is read elsewhere or not at all.
    """
    if not task.cancelled():
        task.exception()
