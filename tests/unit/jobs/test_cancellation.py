"""The cancellation of running jobs: how their tasks end, and how their jobs do."""

import asyncio
import logging
from typing import Any, cast

import pytest
from tests.unit.doubles import swallow_cancellation
from tests.unit.jobs.fleet import Fleet
from tests.virtual_time import VirtualTimeLoop

from viralfx.jobs.model import Job, JobState
from viralfx.jobs.tasks import JobContext
from viralfx.resilience.policy import BackoffPolicy

MAX_SECONDS = 2.0
"""From the request until the task sees it."""
QUICKLY = BackoffPolicy(attempts=3)


async def cancel(fleet: Fleet, function: Any, *, after: float = 5.0, **options: Any) -> Job:
    """Run a job of a function, cancel it after some seconds, and wait until it is final."""
    defaults: dict[str, Any] = {"retry": QUICKLY, "timeout": 60.0}
    fleet.declare("it", function, **(defaults | options))
    fleet.start()
    job_id = await fleet.accept("it")
    await asyncio.sleep(after)
    asked = await fleet.ledger.cancel(job_id, running=True)
    assert (asked.state, asked.cancel_requested) == (JobState.ACTIVE, True)
    await fleet.final(job_id, within=100.0)
    return await fleet.job(job_id)


async def test_a_task_is_cancelled_on_request(fleet: Fleet, caplog: Any) -> None:
    """Within two seconds; its clean-up runs, its attempt is unspent, and the log says so."""
    caplog.set_level(logging.INFO)
    seen: list[float] = []
    cleaned: list[bool] = []

    async def sleep(_: object, context: JobContext) -> None:
        try:
            await asyncio.sleep(50.0)
        except asyncio.CancelledError:
            seen.append(60.0 - context.deadline.remaining())
            cleaned.append(context.cancelled.is_set())
            await asyncio.sleep(3.0)
            raise

    job = await cancel(fleet, sleep, wants_context=True)
    (attempt,) = job.history

    assert job.state is JobState.CANCELLED
    assert (job.attempts, job.error, job.worker) == (0, None, None)
    assert (attempt.worker, attempt.error.code) == ("w", "cancelled")
    assert cleaned == [True]
    assert 5.0 <= seen[0] <= 5.0 + MAX_SECONDS
    assert [record.message for record in caplog.records].count("Job cancelled") == 1
    await asyncio.sleep(100.0)
    assert len(seen) == 1


async def test_a_task_that_finishes_nevertheless_completes(fleet: Fleet) -> None:
    """A finished effect wins."""

    async def finish(_: object) -> str:
        try:
            await asyncio.sleep(50.0)
        except asyncio.CancelledError:
            await asyncio.sleep(10.0)
        return "whole"

    job = await cancel(fleet, finish)

    assert (job.state, job.result, job.cancel_requested) == (JobState.COMPLETED, b'"whole"', False)


async def test_an_error_after_the_request_is_kept(fleet: Fleet) -> None:
    """The job is cancelled instead of retried."""

    async def fail(_: object) -> None:
        try:
            await asyncio.sleep(50.0)
        finally:
            raise RuntimeError("the clean-up failed")

    job = await cancel(fleet, fail)

    assert (job.state, job.attempts) == (JobState.CANCELLED, 0)
    assert job.error is not None
    assert (job.error.code, job.error.message) == ("error", "the clean-up failed")


async def test_a_task_that_ignores_the_request_is_abandoned_at_its_deadline(fleet: Fleet) -> None:
    """Its slot is free then; the job does not run again."""
    release = asyncio.Event()

    async def ignore(_: object) -> None:
        await swallow_cancellation(release)

    job = await cancel(fleet, ignore, timeout=20.0)
    assert job.started_at is not None
    assert job.finished_at is not None
    took = (job.finished_at - job.started_at).total_seconds()
    release.set()

    assert job.state is JobState.CANCELLED
    assert 20.0 <= took <= 23.0
    assert job.error is not None
    assert job.error.message == "the task ignored its cancellation after 20 s"


async def test_a_task_that_blocks_is_cancelled_after_it(fleet: Fleet) -> None:
    """No request reaches it before; then it is cancelled at its next wait."""
    unblocked: list[float] = []

    async def block(_: object, context: JobContext) -> None:
        await fleet.ledger.cancel(context.id, running=True)
        cast("VirtualTimeLoop", asyncio.get_running_loop()).jump(20.0)
        unblocked.append(fleet.clock.monotonic())
        await asyncio.sleep(50.0)

    fleet.declare("block", block, wants_context=True)
    fleet.start()
    job_id = await fleet.accept("block")
    await fleet.until(lambda: unblocked)

    assert await fleet.final(job_id) >= 0
    assert fleet.clock.monotonic() - unblocked[0] <= MAX_SECONDS
    assert (await fleet.job(job_id)).state is JobState.CANCELLED


async def test_a_transactional_task_is_rolled_back(fleet: Fleet) -> None:
    """The ledger in memory has nothing to roll back; the job is cancelled."""

    async def write(_: object, __: JobContext) -> None:
        await asyncio.sleep(50.0)

    job = await cancel(fleet, write, transactional=True)

    assert job.state is JobState.CANCELLED


async def test_a_task_that_has_not_begun_is_cancelled(fleet: Fleet) -> None:
    """A transactional one may wait for a connection, and no other job need run."""
    fleet.ledger.seconds["settle_with_effect"] = 50.0
    began = fleet.clock.monotonic()
    job = await cancel(fleet, fleet.note, transactional=True, after=1.0)

    assert job.state is JobState.CANCELLED
    assert fleet.clock.monotonic() - began <= 1.0 + MAX_SECONDS


async def test_only_the_requested_job_is_cancelled(fleet: Fleet) -> None:
    """Its neighbours go on."""
    fleet.start()
    first, *others = [await fleet.accept("sleep", "30") for _ in range(4)]
    await asyncio.sleep(3.0)
    await fleet.ledger.cancel(first, running=True)
    await fleet.final(first, *others)

    assert fleet.cancelled == [30]
    assert fleet.done == [30, 30, 30]


async def test_requests_are_asked_for_only_while_jobs_run(fleet: Fleet) -> None:
    """Once a second; an idle worker does not ask."""
    fleet.start()
    await asyncio.sleep(60.0)
    idle = fleet.ledger.count("cancel_requests")
    await fleet.final(await fleet.submit("sleep", "30"))
    busy = fleet.ledger.count("cancel_requests")

    assert idle == 0
    assert 28 <= busy <= 31


async def test_a_drain_after_the_request_hands_nothing_back(fleet: Fleet) -> None:
    """The job is cancelled; one that only the drain ends is handed back."""

    async def slow(_: object) -> None:
        try:
            await asyncio.sleep(500.0)
        except asyncio.CancelledError:
            await asyncio.sleep(0.1)
            raise

    fleet.declare("slow", slow)
    worker = fleet.start()
    asked, other = await fleet.accept("slow"), await fleet.accept("slow")
    await asyncio.sleep(1.0)
    await fleet.ledger.cancel(asked, running=True)
    report = await worker.drain(10.0)

    assert (await fleet.job(asked)).state is JobState.CANCELLED
    assert (await fleet.job(other)).state is JobState.WAITING
    assert (report.finished, report.handed_back) == (1, 1)


async def test_a_request_during_an_outage_is_seen_after_it(fleet: Fleet) -> None:
    """The task goes on until then."""
    fleet.start()
    job_id = await fleet.submit("sleep", "100")
    await asyncio.sleep(2.0)
    fleet.ledger.unavailable = frozenset({"cancel_requests"})
    await fleet.ledger.cancel(job_id, running=True)
    await asyncio.sleep(30.0)
    assert (await fleet.job(job_id)).state is JobState.ACTIVE
    fleet.ledger.unavailable = frozenset()

    assert await fleet.final(job_id) <= MAX_SECONDS + 3.0
    assert (await fleet.job(job_id)).state is JobState.CANCELLED


# -- past executions ---------------------------------------------------------------------------


async def test_tracebacks_begin_at_the_task_and_hold_no_secret(fleet: Fleet) -> None:
    """With the causes of the error; the worker's own frames are left out."""

    def broken() -> None:
        raise KeyError("hunter2")

    async def fail(_: object) -> None:
        try:
            broken()
        except KeyError as error:
            raise RuntimeError("no password hunter2") from error

    fleet.declare("it", fail, retry=BackoffPolicy(attempts=1))
    fleet.start(clean=lambda text: text.replace("hunter2", "***"))
    job_id = await fleet.accept("it")
    await fleet.final(job_id)
    (attempt,) = (await fleet.job(job_id)).history
    traceback = attempt.error.traceback

    assert traceback is not None
    assert traceback.startswith("Traceback (most recent call last):\n")
    assert traceback.endswith("RuntimeError: no password ***")
    assert "in broken" in traceback
    assert "in fail" in traceback
    assert "KeyError: '***'" in traceback
    assert "viralfx/jobs/worker" not in traceback


@pytest.mark.parametrize(
    "message", ["x" * 10**6, "\0\ud800" * 3000, "line\n" * 10**5], ids=["long", "odd", "lines"]
)
async def test_a_traceback_is_short_and_storable(fleet: Fleet, message: str) -> None:
    """Its end is kept."""

    async def fail(_: object) -> None:
        raise RuntimeError(message)

    fleet.declare("it", fail, retry=BackoffPolicy(attempts=1))
    fleet.start()
    job_id = await fleet.accept("it")
    await fleet.final(job_id)
    traceback = (await fleet.job(job_id)).history[0].error.traceback

    assert traceback is not None
    assert len(traceback.encode()) < 64 * 1024
    assert "\0" not in traceback


async def test_a_job_of_a_broken_error_has_no_traceback(fleet: Fleet) -> None:
    """The error's own code may raise."""

    class BrokenTextError(Exception):
        def __str__(self) -> str:
            raise SystemExit(1)

    async def fail(_: object) -> None:
        raise BrokenTextError

    fleet.declare("it", fail, retry=BackoffPolicy(attempts=1))
    fleet.start()
    job_id = await fleet.accept("it")
    await fleet.final(job_id)
    (attempt,) = (await fleet.job(job_id)).history

    assert attempt.error.message == "BrokenTextError"
