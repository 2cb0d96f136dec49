"""The threads that run plain functions."""

import asyncio
import ctypes
import threading
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from tests.servers.waiting import until, wait_until

from viralfx.core.clock import SystemClock
from viralfx.jobs.worker.calls import JobThread, JobThreads
from viralfx.resilience.deadline import Cancellation, Deadline


@pytest.fixture
def threads() -> Iterator[JobThreads]:
    """Threads that end with the test."""
    made = JobThreads(2)
    yield made
    made.close()


def names() -> list[str]:
    """Return the names of the threads that exist."""
    return sorted(each.name for each in threading.enumerate() if isinstance(each, JobThread))


def raise_it(error: BaseException) -> None:
    """Raise an error."""
    raise error


async def test_a_function_runs_in_a_thread_of_its_own(threads: JobThreads) -> None:
    """The future gets its result."""
    result, error = await threads.start(threading.current_thread)
    assert isinstance(result, JobThread)
    assert result.daemon
    assert error is None


@pytest.mark.parametrize(
    "error", [ValueError("v"), SystemExit(3), KeyboardInterrupt(), StopIteration(), GeneratorExit()]
)
async def test_any_exception_is_an_outcome(threads: JobThreads, error: BaseException) -> None:
    """The thread survives it."""
    assert await threads.start(partial(raise_it, error)) == (None, error)
    assert await threads.start(lambda: 1) == (1, None)


async def test_an_idle_thread_is_used_again(threads: JobThreads) -> None:
    """And more threads are started only for concurrent functions."""
    first, _ = await threads.start(threading.current_thread)
    second, _ = await threads.start(threading.current_thread)
    assert first is second
    barrier = threading.Barrier(3)
    await asyncio.gather(*(threads.start(partial(barrier.wait, 10.0)) for _ in range(3)))
    wait_until(lambda: len(names()) == 2, what="the end of the thread that is one too many")


class BehindClock(SystemClock):
    """A clock by which every timer fires early."""

    def monotonic(self) -> float:
        """Return 99 % of the time."""
        return time.monotonic() * 0.99


async def test_a_timer_that_fires_early_does_not_leave_its_function(threads: JobThreads) -> None:
    """As that of uvloop does, which rounds times: the caller waits for the function."""
    release = threading.Event()

    async def limited() -> None:
        deadline = Deadline(0.1, clock=BehindClock())
        function = partial(release.wait, 10.0)
        async with deadline:
            await threads.run(
                function, Cancellation(deadline), deadline, is_abandoned=lambda: False
            )

    running = asyncio.create_task(limited())
    try:
        await until(lambda: running.cancelling() > 0)
        await asyncio.wait({running}, timeout=0.05)
        assert not running.done()
    finally:
        release.set()
    with pytest.raises(TimeoutError, match=r"the deadline of 0\.1 s has passed"):
        await running


async def test_an_exception_planted_in_a_thread_ends_its_call(
    threads: JobThreads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not reach ``threading.excepthook``, and the next function runs."""
    uncaught: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", uncaught.append)

    def plant() -> None:
        ident = ctypes.c_ulong(threading.get_ident())
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(SystemExit))
        while True:
            pass

    _, error = await threads.start(plant)
    assert isinstance(error, SystemExit)
    assert await threads.start(lambda: 1) == (1, None)
    assert not uncaught


async def test_busy_threads_end_after_the_close(threads: JobThreads) -> None:
    """Idle ones end at once."""
    release = threading.Event()
    busy = threads.start(release.wait)
    await threads.start(lambda: None)
    threads.close()
    wait_until(lambda: len(names()) == 1, what="the end of the idle thread")
    release.set()
    await busy
    wait_until(lambda: not names(), what="the end of the busy thread")


def test_a_function_that_outlives_its_loop_harms_nothing(threads: JobThreads) -> None:
    """Its outcome is dropped, and its thread ends."""
    release = threading.Event()

    async def leave() -> None:
        _ = threads.start(release.wait)

    asyncio.run(leave())
    assert len(names()) == 1
    release.set()
    wait_until(lambda: not names(), what="the end of the thread")
