"""The thread that renews a lease, in real time."""

import asyncio
import gc
import logging
import threading
import time
from collections.abc import Collection
from contextlib import asynccontextmanager
from typing import Any

import pytest
from tests.servers.waiting import wait_until

from viralfx.core.clock import SystemClock
from viralfx.core.errors import LedgerUnavailableError
from viralfx.core.ids import new_job_id
from viralfx.jobs.worker.lease import LeaseThread, WorkerView

LEASE = 0.6
LIMIT = 20.0
"""Seconds after which a wait of a test fails."""


class Store:
    """A store that records its renewals, and fails or hangs on demand."""

    def __init__(self) -> None:
        self.renewals: list[tuple[float, Collection[str] | None]] = []
        """Monotonic time and ids of the jobs, for each renewal."""
        self.error: BaseException | None = None
        self.hanging = False
        self.closed = False

    async def renew(self, holding: Collection[str] | None) -> None:
        """Record a renewal."""
        self.renewals.append((time.monotonic(), holding))
        if self.error is not None:
            raise self.error
        if self.hanging:
            await asyncio.sleep(LIMIT)

    async def close(self) -> None:
        """Record the end."""
        self.closed = True


class Owner:
    """A worker that has one job."""

    def __init__(self) -> None:
        self.job = new_job_id()
        self.busy_until = 0.0
        self.renewed = 0
        self.errors: list[Exception] = []

    def view(self) -> WorkerView:
        """Return the job."""
        return WorkerView(holding=[self.job], busy_until=self.busy_until)

    async def register(self, store: Any, view: WorkerView | None) -> str:
        """Renew in the store."""
        await store.renew(None if view is None else view.holding)
        return "answer"

    def on_renewed(self, began: float, answer: str) -> None:
        """Count a renewal."""
        assert began <= time.monotonic()
        assert answer == "answer"
        self.renewed += 1

    def on_failed(self, error: Exception) -> None:
        """Record an error."""
        self.errors.append(error)


def is_running() -> bool:
    """Return True while a lease thread runs."""
    return any(thread.name == "job-lease" for thread in threading.enumerate())


def made(owner: Owner, store: Store) -> "LeaseThread[str]":
    """Return a thread that is not started."""
    return LeaseThread(
        owner,
        lambda: store,  # type: ignore[arg-type, return-value]  # the owner above calls it
        lease=LEASE,
        retry_delay=lambda _: 0.01,
        clock=SystemClock(),
    )


@asynccontextmanager
async def running(owner: Owner, store: Store) -> Any:
    """Run a lease thread; it has ended after the block."""
    thread = made(owner, store)
    task = asyncio.create_task(thread.run(), name="test-lease")
    try:
        yield thread
    finally:
        task.cancel()
        await asyncio.wait({task}, timeout=LIMIT)
        assert task.cancelled()
        assert store.closed
        wait_until(lambda: not is_running(), what="the end of the thread")


async def until(condition: Any) -> None:
    """Wait until a condition holds."""
    async with asyncio.timeout(LIMIT):
        while not condition():  # noqa: ASYNC110 - any condition, and threads change it
            await asyncio.sleep(0.01)


async def test_the_lease_is_renewed_with_the_jobs() -> None:
    """Each third of the lease, and the event loop gets the answers."""
    owner, store = Owner(), Store()
    async with running(owner, store):
        await until(lambda: owner.renewed >= 3)
    times = [at for at, _ in store.renewals]
    assert all(holding == [owner.job] for _, holding in store.renewals)
    assert times[2] - times[0] >= LEASE / 3
    assert not owner.errors


async def test_the_lease_is_renewed_while_the_loop_is_blocked(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Without the jobs, which only the loop knows; one warning names the job that blocks."""
    owner, store = Owner(), Store()
    owner.busy_until = time.monotonic() + LIMIT

    async def block(seconds: float) -> tuple[float, float]:
        began = time.monotonic()
        time.sleep(seconds)  # noqa: ASYNC251 - this is the fault
        return began, time.monotonic()

    async with running(owner, store):
        await until(lambda: owner.renewed >= 1)
        began, ended = await asyncio.create_task(block(4 * LEASE), name=owner.job)
        before = owner.renewed
        blocked = [(at, holding) for at, holding in store.renewals if began < at < ended]
        await until(lambda: owner.renewed > before + len(blocked))
    assert len(blocked) >= 6
    assert all(holding is None for _, holding in blocked[1:])
    assert store.renewals[-1][1] == [owner.job]
    warnings = [r for r in caplog.records if "renews the job lease" in r.message]
    assert [getattr(record, "job", None) for record in warnings] == [owner.job]


async def test_a_worker_that_is_stuck_for_good_loses_its_lease(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A lease after the last deadline; the lease is renewed again once the loop answers."""
    caplog.set_level(logging.INFO)
    owner, store = Owner(), Store()
    async with running(owner, store) as thread:
        await until(lambda: owner.renewed >= 1)
        began = time.monotonic()
        thread.covers(began + LEASE)
        time.sleep(5 * LEASE)  # noqa: ASYNC251 - this is the fault
        ended, last = time.monotonic(), store.renewals[-1][0]
        assert began + LEASE < last < ended - LEASE
        count = len(store.renewals)
        await until(lambda: len(store.renewals) > count)
        assert store.renewals[-1][1] == [owner.job]
    assert [r.message for r in caplog.records if r.levelno == logging.ERROR] == [
        "Job lease is not renewed: the event loop is blocked beyond every deadline"
    ]
    assert "Event loop answers again: the job lease is renewed" in caplog.messages


async def test_a_failed_renewal_is_tried_again() -> None:
    """The loop gets the error."""
    owner, store = Owner(), Store()
    store.error = LedgerUnavailableError("down")
    async with running(owner, store):
        await until(lambda: len(owner.errors) >= 2)
        store.error = None
        await until(lambda: owner.renewed >= 1)
    assert set(map(str, owner.errors)) == {"down"}


async def test_a_renewal_that_hangs_fails_after_half_a_lease() -> None:
    """The next one begins in time."""
    owner, store = Owner(), Store()
    store.hanging = True
    async with running(owner, store):
        await until(lambda: owner.errors)
        assert isinstance(owner.errors[0], LedgerUnavailableError)
        store.hanging = False
        await until(lambda: owner.renewed >= 1)


async def test_no_renewal_follows_the_end() -> None:
    """Even if one hangs: it is cancelled first."""
    owner, store = Owner(), Store()
    store.hanging = True
    async with running(owner, store):
        await until(lambda: store.renewals)
        began = time.monotonic()
    assert time.monotonic() - began < LIMIT / 2  # the one that hangs takes LIMIT
    assert len(store.renewals) == 1


async def test_an_error_that_ends_the_thread_is_raised() -> None:
    """It must not leave the worker without a lease unnoticed."""

    def fail() -> Any:
        raise OSError("no certificates")

    thread = LeaseThread(
        Owner(), fail, lease=LEASE, retry_delay=lambda _: 0.01, clock=SystemClock()
    )
    with pytest.raises(OSError, match="no certificates"):
        await thread.run()
    wait_until(lambda: not is_running(), what="the end of the thread")


def test_the_thread_of_a_closed_loop_ends(caplog: pytest.LogCaptureFixture) -> None:
    """A process that stops without a drain keeps no lease."""
    owner, store = Owner(), Store()
    loop = asyncio.new_event_loop()
    task = loop.create_task(made(owner, store).run())
    loop.run_until_complete(until(lambda: owner.renewed))
    assert not task.done()
    loop.close()
    wait_until(lambda: not is_running(), what="the end of the thread")
    assert store.closed
    # asyncio reports the destroyed task: here, not in the log of a later test.
    del task, loop
    gc.collect()
    assert any("Task was destroyed" in message for message in caplog.messages)
