"""Tasks that are plain functions: their outcome, their limits and their end."""

import asyncio
import json
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from tests.servers.waiting import wait_until
from tests.unit.jobs.fleet import Fleet

from viralfx.adapters.codec import MsgspecCodec
from viralfx.core.clock import SystemClock
from viralfx.core.correlation import bind_user_id, current_correlation_id
from viralfx.jobs.model import Job, JobState, correlation_id_of_job
from viralfx.jobs.service import JobService
from viralfx.jobs.tasks import JobContext, declared_task, task
from viralfx.jobs.worker.calls import JobThread
from viralfx.resilience.deadline import Cancellation
from viralfx.resilience.policy import BackoffPolicy

ONCE = BackoffPolicy(attempts=1)
LONG = 60.0
"""Seconds that no test waits for."""


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    """Return a ledger and a notifier in real time."""
    fleet = Fleet(SystemClock())
    yield fleet
    await fleet.stop()


def declare(fleet: Fleet, function: Callable[..., Any], name: str = "it", **options: Any) -> None:
    """Declare a task as an application does."""
    declared = declared_task(task(name, **({"retry": ONCE} | options))(function))
    assert declared is not None
    fleet.tasks.add(declared)


async def outcome(fleet: Fleet, function: Callable[..., Any], **options: Any) -> Job:
    """Run one job of a function until it is final."""
    declare(fleet, function, **options)
    fleet.start()
    job_id = await fleet.accept("it", "3")
    await fleet.final(job_id, within=20.0)
    return await fleet.job(job_id)


async def test_a_plain_function_completes_its_job(fleet: Fleet) -> None:
    """With the context and the correlation id of a coroutine function."""
    seen: list[Any] = []

    def double(payload: int, context: JobContext) -> int:
        here = threading.current_thread()
        seen.append((context.id, context.attempt, current_correlation_id(), type(here)))
        return 2 * payload

    job = await outcome(fleet, double)

    assert (job.state, job.result) == (JobState.COMPLETED, b"6")
    assert seen == [(job.id, 1, job.id.replace("-", ""), JobThread)]


async def test_a_plain_function_submits_a_job(fleet: Fleet) -> None:
    """On the event loop of its worker, with the correlation id and the user of its job."""
    service = JobService(
        ledger=fleet.ledger, tasks=fleet.tasks, codec=MsgspecCodec(), queues=["default"]
    )

    def submit(payload: int, context: JobContext) -> str:
        accepted = asyncio.run(context.submit("note", payload))
        return accepted.job.id

    declare(fleet, submit)
    fleet.start(submit=service.submit)
    bind_user_id("ada")
    parent = (await service.submit("it", 3)).job
    await fleet.final(parent.id, within=20.0)
    child = await fleet.job(json.loads((await fleet.job(parent.id)).result or b""))

    assert (child.task, child.payload, child.user_id) == ("note", b"3", "ada")
    assert child.correlation_id == correlation_id_of_job(parent)


async def test_plain_functions_run_in_as_many_threads_as_slots(fleet: Fleet) -> None:
    """The event loop runs other jobs meanwhile."""
    barrier, release = threading.Barrier(3), threading.Event()

    def meet(_: int) -> None:
        barrier.wait(LONG)
        release.wait(LONG)

    declare(fleet, meet)
    worker = fleet.start(queues={"default": 2, "other": 1})
    ids = [await fleet.accept("it") for _ in range(3)]
    try:
        await fleet.until(lambda: barrier.n_waiting == 2)
        (beside,) = [await fleet.accept("note", queue="other")]
        await fleet.final(beside)
        await fleet.until(lambda: worker.active == 2)  # a slot is free soon after its job is final
        assert barrier.n_waiting == 2
    finally:
        release.set()
        barrier.abort()
    await fleet.final(*ids)


def _exit(_: int) -> None:
    sys.exit(3)


def _interrupt(_: int) -> None:
    raise KeyboardInterrupt


def _generator_exit(_: int) -> None:
    raise GeneratorExit


def _cancel(_: int) -> None:
    raise asyncio.CancelledError


def _stop_iteration(_: int) -> None:
    raise StopIteration


def _coroutine(_: int) -> Any:
    return asyncio.sleep(0)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (_exit, "SystemExit"),
        (_interrupt, "KeyboardInterrupt"),
        (_generator_exit, "GeneratorExit"),
        (_cancel, "CancelledError"),
        (_stop_iteration, "StopIteration"),
        (_coroutine, "returned an awaitable; declare it with async def"),
    ],
)
async def test_an_exit_of_the_function_fails_its_job_alone(
    fleet: Fleet, function: Callable[..., Any], reason: str
) -> None:
    """The worker runs the next job."""
    job = await outcome(fleet, function)
    assert (job.state, job.attempts) == (JobState.FAILED, 1)
    assert job.error is not None
    assert job.error.code == "error"
    assert reason in job.error.message
    await fleet.final(await fleet.accept())


async def test_a_function_that_reads_cancelled_ends_at_its_timeout(fleet: Fleet) -> None:
    """With code ``timeout``, even if it returns a result then."""

    def wait(_: int, context: JobContext) -> str:
        context.cancelled.wait()
        return "partial"

    job = await outcome(fleet, wait, timeout=0.2)

    assert job.error is not None
    assert (job.state, job.error.code) == (JobState.FAILED, "timeout")
    assert "the deadline of 0.2 s has passed" in job.error.message


async def test_a_function_that_ignores_its_timeout_is_abandoned(fleet: Fleet) -> None:
    """Its job fails with code ``timeout`` while it still runs, and its slot is free."""
    release = threading.Event()

    def ignore(_: int) -> None:
        release.wait(LONG)

    declare(fleet, ignore, timeout=0.1)
    worker = fleet.start(queues={"default": 1})
    job_id = await fleet.accept("it")
    try:
        await fleet.final(job_id, within=20.0)
        job = await fleet.job(job_id)
        assert job.error is not None
        assert (job.error.code, worker.abandoned) == ("timeout", 1)
        await fleet.final(await fleet.accept())
    finally:
        release.set()


async def test_a_function_ends_on_request(fleet: Fleet) -> None:
    """It reads cancelled, and its partial result is dropped."""
    began = threading.Event()

    def wait(_: int, context: JobContext) -> str:
        began.set()
        context.report(current=1, total=4)
        context.cancelled.wait(LONG)
        return "partial"

    declare(fleet, wait)
    fleet.start()
    job_id = await fleet.accept("it")
    await fleet.until(began.is_set)
    await fleet.ledger.cancel(job_id, running=True)
    await fleet.final(job_id, within=20.0)
    job = await fleet.job(job_id)

    assert (job.state, job.attempts, job.result) == (JobState.CANCELLED, 0, None)
    assert job.progress == b'{"current": 1, "total": 4, "message": null}'


async def test_a_function_that_never_asks_completes_after_a_request(fleet: Fleet) -> None:
    """A finished effect wins, also in a thread."""
    began, release = threading.Event(), threading.Event()

    def work(_: int) -> str:
        began.set()
        release.wait(LONG)
        return "whole"

    declare(fleet, work)
    fleet.start()
    job_id = await fleet.accept("it")
    await fleet.until(began.is_set)
    await fleet.ledger.cancel(job_id, running=True)
    (running,) = [each for each in asyncio.all_tasks() if each.get_name() == job_id]
    await fleet.until(lambda: running.cancelling() > 0)
    release.set()
    await fleet.final(job_id, within=20.0)
    job = await fleet.job(job_id)

    assert (job.state, job.result) == (JobState.COMPLETED, b'"whole"')


async def test_a_drain_hands_back_a_function_that_reads_cancelled(fleet: Fleet) -> None:
    """Its attempt is unspent."""
    began = threading.Event()

    def wait(_: int, context: JobContext) -> str:
        began.set()
        while not context.cancelled.wait(0.01):
            pass
        return "partial"

    declare(fleet, wait)
    worker = fleet.start()
    job_id = await fleet.accept("it")
    await fleet.until(began.is_set)
    report = await worker.drain(1.0)
    job = await fleet.job(job_id)

    assert (report.handed_back, report.ignoring, report.unrecorded) == (1, 0, 0)
    assert (job.state, job.attempts, job.crashes) == (JobState.WAITING, 0, 0)


async def test_a_result_that_comes_during_the_drain_counts(fleet: Fleet) -> None:
    """If the function never asked whether it is cancelled."""
    began, release = threading.Event(), threading.Event()

    def work(_: int) -> str:
        began.set()
        release.wait(LONG)
        return "whole"

    declare(fleet, work)
    worker = fleet.start()
    job_id = await fleet.accept("it")
    await fleet.until(began.is_set)
    # The last two seconds of the budget are for recording and deregistering.
    draining = asyncio.create_task(worker.drain(5.0))
    (running,) = [each for each in asyncio.all_tasks() if each.get_name() == job_id]
    await fleet.until(lambda: running.cancelling() > 0)
    release.set()
    report = await draining
    job = await fleet.job(job_id)

    assert (report.finished, report.handed_back, report.ignoring) == (1, 0, 0)
    assert (job.state, job.result) == (JobState.COMPLETED, b'"whole"')


async def test_a_drain_does_not_wait_for_a_function_that_ignores_it(fleet: Fleet) -> None:
    """Its job is handed back."""
    began, release = threading.Event(), threading.Event()

    def ignore(_: int) -> None:
        began.set()
        release.wait(LONG)

    declare(fleet, ignore)
    worker = fleet.start()
    job_id = await fleet.accept("it")
    await fleet.until(began.is_set)
    try:
        report = await worker.drain(0.5)
        job = await fleet.job(job_id)
    finally:
        release.set()

    assert (report.ignoring, report.unrecorded) == (1, 0)
    assert (job.state, job.attempts) == (JobState.WAITING, 0)


@pytest.mark.parametrize("timeout", [0.1, LONG])
def test_an_event_loop_ends_while_a_function_runs(timeout: float) -> None:
    """Its owner cancels all tasks and waits for them, as asyncio's runner and uvicorn do."""
    began, release = threading.Event(), threading.Event()
    before = set(threading.enumerate())

    def ignore(_: int) -> None:
        began.set()
        release.wait(LONG)

    async def main() -> None:
        fleet = Fleet(SystemClock())
        declare(fleet, ignore, timeout=timeout)
        worker = fleet.start()
        await fleet.accept("it")
        await fleet.until(began.is_set)
        await fleet.until(lambda: timeout == LONG or worker.abandoned == 1)

    started = time.monotonic()
    try:
        asyncio.run(main())
    finally:
        release.set()
    assert time.monotonic() - started < LONG / 2
    wait_until(
        lambda: not any(map(is_job_thread, set(threading.enumerate()) - before)), what="its end"
    )


def is_job_thread(thread: threading.Thread) -> bool:
    """Return True for a thread of a worker."""
    return isinstance(thread, JobThread)


def _fork(_: int) -> int:
    return os.fork()


async def _fork_on_the_loop(_: int) -> int:
    return os.fork()


@pytest.mark.parametrize("function", [_fork, _fork_on_the_loop])
async def test_a_forked_child_does_not_return_into_the_worker(
    fleet: Fleet, function: Callable[..., Any]
) -> None:
    """It exits; the parent's outcome counts."""
    job = await outcome(fleet, function)

    assert job.state is JobState.COMPLETED
    assert job.result is not None
    _, status = await asyncio.to_thread(os.waitpid, int(job.result), 0)
    assert os.waitstatus_to_exitcode(status) == 0


def test_a_waiting_thread_sees_the_cancellation() -> None:
    """It need not poll."""
    cancelled, seen = Cancellation(), list[bool]()
    thread = threading.Thread(target=lambda: seen.append(cancelled.wait()))
    thread.start()
    cancelled.set()
    thread.join(10.0)
    assert seen == [True]
