"""Waits with a limit, on the system clock and on other clocks, and background tasks."""

import asyncio
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tests.virtual_time import LoopClock

from viralfx.core.clock import (
    Clock,
    SystemClock,
    _on_grid,
    finished_within,
    ignore_error,
    resolved_within,
    supervised,
    timestamp,
    wait_for,
)

LONG = 60.0

clocks = pytest.mark.parametrize("clock", [SystemClock(), LoopClock()], ids=["system", "other"])


@clocks
async def test_finished_within_returns_true_when_the_task_ends_in_time(clock: Clock) -> None:
    """The wait ends when the task ends, not at the limit."""
    assert await finished_within(asyncio.create_task(asyncio.sleep(0)), LONG, clock)


@clocks
async def test_finished_within_does_not_cancel_a_late_task(clock: Clock) -> None:
    """On expiry the task is neither cancelled nor awaited."""
    done = asyncio.Event()
    task = asyncio.create_task(done.wait())

    assert not await finished_within(task, 0.001, clock)
    assert not task.done()

    done.set()

    assert await task


@clocks
@pytest.mark.parametrize("seconds", [0.0, -1.0])
async def test_a_wait_without_time_yields_to_the_loop_once(clock: Clock, seconds: float) -> None:
    """A loop around the wait cannot keep the other tasks from running."""
    turns = 0

    async def count() -> None:
        nonlocal turns
        turns += 1

    other = asyncio.create_task(count())
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    assert not await finished_within(done, seconds, clock)
    assert turns == 1

    done.set_result(None)
    other = asyncio.create_task(count())

    assert await finished_within(done, seconds, clock)
    assert turns == 2
    await other


@clocks
async def test_finished_within_leaves_the_error_to_the_caller(clock: Clock) -> None:
    """A failed task counts as finished; ``task.exception()`` still returns its error."""

    async def fail() -> None:
        raise ValueError

    task = asyncio.create_task(fail())

    assert await finished_within(task, LONG, clock)
    assert isinstance(task.exception(), ValueError)


@clocks
async def test_cancelling_the_wait_does_not_cancel_the_task(clock: Clock) -> None:
    """The task may end at any later time; no callback of the wait is left on it."""
    task: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    waiting = asyncio.create_task(finished_within(task, LONG, clock))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait({waiting})

    assert waiting.cancelled()
    assert not task.done()

    task.set_result(None)
    await asyncio.sleep(0)


@clocks
async def test_resolved_within_resolves_the_future_early_or_on_time(clock: Clock) -> None:
    """The wait ends when the owner resolves the future, or when the time is over."""
    loop = asyncio.get_running_loop()
    early: asyncio.Future[None] = loop.create_future()
    loop.call_soon(early.set_result, None)
    await resolved_within(early, LONG, clock)
    late: asyncio.Future[None] = loop.create_future()
    await resolved_within(late, 0.001, clock)

    assert early.done()


@clocks
async def test_wait_for_returns_whether_the_event_was_set_in_time(clock: Clock) -> None:
    """The result is True for an event that is set in time, and False at the limit."""
    event = asyncio.Event()

    assert not await wait_for(event, 0.001, clock)

    asyncio.get_running_loop().call_soon(event.set)

    assert await wait_for(event, LONG, clock)


async def _fail() -> None:
    raise ValueError


@pytest.mark.parametrize("error", [True, False])
async def test_a_crash_of_a_supervised_task_reaches_the_exception_handler(*, error: bool) -> None:
    """The handler gets the error and the task; a normal end is not reported."""
    loop = asyncio.get_running_loop()
    reports: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: reports.append(context))
    task = supervised(_fail() if error else asyncio.sleep(0), "worker")
    await asyncio.wait({task})
    await asyncio.sleep(0)

    assert [(r["message"], r["future"]) for r in reports] == (
        [("Background task worker failed", task)] if error else []
    )


async def test_an_ignored_error_is_not_reported_as_uncaught() -> None:
    """The loop's exception handler gets nothing when the failed task is collected."""
    loop = asyncio.get_running_loop()
    reports: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: reports.append(context))
    task = asyncio.create_task(_fail())
    task.add_done_callback(ignore_error)
    cancelled = asyncio.create_task(asyncio.sleep(LONG))
    cancelled.add_done_callback(ignore_error)
    cancelled.cancel()
    await asyncio.wait({task, cancelled})
    await asyncio.sleep(0)
    del task, cancelled

    assert reports == []


@example(moment=5e-324, seconds=200.0)
@given(moment=st.floats(0, 1e7), seconds=st.floats(0.001, 86_400))
def test_a_wait_is_prolonged_by_at_most_one_percent(moment: float, seconds: float) -> None:
    """It never ends early."""
    assert moment <= _on_grid(moment, seconds) <= moment + seconds / 100 + 1e-6


def test_waits_of_similar_length_end_together() -> None:
    """A thousand checks of 5 s wake the process 32 times a second, not 200 times."""
    ends = {_on_grid(100 + number / 200, 5 - number / 1e6) for number in range(1000)}

    assert len(ends) <= 5 * 32 + 1
    assert _on_grid(100.0, 0.0) == 100.0


@given(st.datetimes(timezones=st.just(UTC)))
@example(datetime.min.replace(tzinfo=UTC))
@example(datetime.max.replace(tzinfo=UTC))
def test_a_timestamp_is_the_time_down_to_the_millisecond(moment: datetime) -> None:
    """Of each year that there is."""
    assert timestamp(moment) == moment.isoformat(timespec="milliseconds")[:23] + "Z"
