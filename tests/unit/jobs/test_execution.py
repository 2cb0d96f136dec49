"""The settlement of a job by the behaviour of its task."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from itertools import pairwise
from typing import Any, cast

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.doubles import swallow_cancellation
from tests.unit.jobs.fleet import FaultyLedger, Fleet
from tests.unit.unreadable import ERRORS, POLICIES, Answers, DisguisedError
from tests.virtual_time import run_in_virtual_time

from viralfx.core.correlation import current_correlation_id
from viralfx.core.errors import LedgerUnavailableError
from viralfx.jobs.model import Claim, Job, JobState
from viralfx.jobs.tasks import (
    Discard,
    HandBackError,
    JobContext,
    Snooze,
    Task,
    TaskRegistry,
    declared_task,
    task,
)
from viralfx.resilience.deadline import Deadline, time_left
from viralfx.resilience.policy import Backoff, BackoffPolicy

ONCE = BackoffPolicy(attempts=1)
QUICKLY = BackoffPolicy(attempts=3, backoff=Backoff(base=1.0))


async def run(
    fleet: Fleet,
    function: Any,
    payload: str = "0",
    *,
    max_attempts: int | None = None,
    **options: Any,
) -> Job:
    """Run one job of a task until it is final."""
    fleet.declare("it", function, **({"retry": ONCE} | options))
    fleet.start()
    job_id = await fleet.accept("it", payload, max_attempts=max_attempts)
    await fleet.final(job_id, within=4000.0)
    return await fleet.job(job_id)


@pytest.mark.parametrize(
    ("most", "attempts"), [(1, 1), (2, 2), (5, 5), (None, 3)], ids=["1", "2", "5", "usual"]
)
async def test_a_job_has_its_own_number_of_attempts(
    fleet: Fleet, most: int | None, attempts: int
) -> None:
    """In place of that of the policy, with the same back-off; a retry grants them again."""

    async def fail(_: int) -> None:
        fleet.done.append(fleet.clock.now())
        raise ValueError("planted")

    fleet.declare("fail", fail, retry=QUICKLY)
    fleet.start()
    job_id = await fleet.accept("fail", max_attempts=most)
    for round_ in (1, 2):
        if round_ > 1:
            await fleet.ledger.retry(job_id)
        await fleet.final(job_id, within=4000.0)
        job = await fleet.job(job_id)

        assert (job.state, job.attempts, job.max_attempts) == (JobState.FAILED, attempts, most)
        assert len(fleet.done) == round_ * attempts
    gaps = [round((b - a).total_seconds()) for a, b in pairwise(fleet.done[:attempts])]
    assert gaps == [1, 2, 4, 8][: attempts - 1]


@pytest.mark.parametrize(("most", "attempts"), [(1, 1), (3, 2)])
async def test_a_policy_of_an_application_decides_up_to_the_attempts_of_a_job(
    fleet: Fleet, most: int, attempts: int
) -> None:
    """Its own end holds, too, since it may depend on the error."""

    class Twice:
        def next_delay(self, attempt: int, _: Exception) -> float | None:
            return 0.5 if attempt < 2 else None

    async def fail(_: int) -> None:
        raise ValueError("planted")

    fleet.declare("fail", fail, retry=Twice())
    fleet.start()
    job_id = await fleet.accept("fail", max_attempts=most)
    await fleet.final(job_id)

    assert (await fleet.job(job_id)).attempts == attempts


@pytest.mark.parametrize(("most", "attempts"), [(2, 2), (4, 3)])
async def test_a_policy_with_parameters_of_its_own_keeps_its_attempts(
    fleet: Fleet, most: int, attempts: int
) -> None:
    """Up to those of the job, since the worker cannot make another such policy."""

    class Three(BackoffPolicy):
        def __init__(self) -> None:
            super().__init__(attempts=3)

    async def fail(_: int) -> None:
        raise ValueError("planted")

    fleet.declare("fail", fail, retry=Three())
    fleet.start()
    job_id = await fleet.accept("fail", max_attempts=most)
    await fleet.final(job_id)
    job = await fleet.job(job_id)

    assert (job.state, job.attempts, job.crashes) == (JobState.FAILED, attempts, 0)


async def test_payloads_are_decoded_and_results_encoded(fleet: Fleet) -> None:
    """Both as JSON, by the task's types."""

    @dataclass
    class Order:
        number: int
        items: list[str]

    async def ship(order: Order) -> dict[str, object]:
        return {"shipped": order.number, "count": len(order.items)}

    job = await run(fleet, ship, '{"number": 7, "items": ["a", "b"]}', payload_type=Order)

    assert job.state is JobState.COMPLETED
    assert job.result == b'{"shipped":7,"count":2}'
    assert (job.error, job.attempts, job.worker) == (None, 0, None)


async def test_the_context_describes_the_execution(fleet: Fleet) -> None:
    """With id, attempt, correlation id and deadline."""
    contexts: list[JobContext] = []

    async def record(_: object, context: JobContext) -> None:
        contexts.append(context)
        if context.attempt == 1:
            raise RuntimeError("again")

    job = await run(fleet, record, wants_context=True, timeout=25.0, retry=QUICKLY)

    first, second = contexts
    assert (first.id, first.attempt, second.attempt) == (job.id, 1, 2)
    assert (first.fence, second.fence) == (1, 2)
    assert first.created_at == job.created_at
    assert first.connection is None
    assert first.correlation_id == second.correlation_id == job.id.replace("-", "")
    assert job.attempts == 1
    assert job.error is None


async def test_a_task_runs_with_the_correlation_id_of_its_request(fleet: Fleet) -> None:
    """Its log lines and calls carry the id."""
    seen: list[str | None] = []

    async def record(_: object) -> None:
        seen.append(current_correlation_id())

    fleet.declare("record", record)
    fleet.start()
    ids = [await fleet.accept("record", correlation_id=f"request-{n}") for n in range(3)]
    await fleet.final(*ids)

    assert sorted(map(str, seen)) == ["request-0", "request-1", "request-2"]
    assert current_correlation_id() is None


async def test_context_variables_end_with_the_task(fleet: Fleet) -> None:
    """Each execution has a context of its own."""
    bound: ContextVar[int] = ContextVar("bound", default=0)
    seen: list[int] = []

    async def bind(payload: int) -> None:
        seen.append(bound.get())
        bound.set(payload)

    fleet.declare("bind", bind)
    fleet.start()
    await fleet.final(*[await fleet.accept("bind", str(n)) for n in range(1, 4)])

    assert seen == [0, 0, 0]


async def test_the_deadline_applies_inside_a_task(fleet: Fleet) -> None:
    """A retry starts no wait that ends after it."""
    left: list[float] = []

    async def record(_: object, context: JobContext) -> None:
        await asyncio.sleep(5.0)
        left.extend((time_left(), context.deadline.remaining()))

    await run(fleet, record, wants_context=True, timeout=25.0)

    assert left == [pytest.approx(20.0)] * 2


async def test_an_error_is_retried_by_the_tasks_policy(fleet: Fleet) -> None:
    """After the last attempt the job fails with the error."""
    times: list[float] = []

    async def fail(_: object) -> None:
        times.append(fleet.clock.monotonic())
        raise ValueError(f"number {len(times)}")

    job = await run(fleet, fail, retry=QUICKLY)

    assert job.state is JobState.FAILED
    assert job.error is not None
    assert (job.error.code, job.error.message, job.attempts) == ("error", "number 3", 3)
    assert [b - a for a, b in pairwise(times)] == pytest.approx([1.0, 2.0], abs=0.02)


async def test_a_task_without_a_policy_uses_the_workers_default(fleet: Fleet) -> None:
    """The default timeout works the same way."""
    fleet.declare("hang", fleet.sleep)
    fleet.start(default_retry=BackoffPolicy(attempts=2), default_timeout=7.0)
    job_id = await fleet.accept("hang", "100.0")
    took = await fleet.final(job_id)
    job = await fleet.job(job_id)

    assert took == pytest.approx(7.0 + 1.0 + 7.0, abs=0.1)
    assert job.error is not None
    assert (job.error.code, job.attempts) == ("timeout", 2)


async def test_a_task_is_cancelled_at_its_timeout(fleet: Fleet) -> None:
    """The code is ``timeout``."""
    job = await run(fleet, fleet.sleep, "100.0", timeout=5.0)

    assert job.error is not None
    assert (job.error.code, job.error.message) == ("timeout", "the deadline of 5 s has passed")
    assert fleet.cancelled == [100.0]


async def test_a_timeout_inside_a_task_is_an_error(fleet: Fleet) -> None:
    """Only the timeout of the whole task has the code ``timeout``."""

    async def hurry(_: object) -> None:
        async with asyncio.timeout(1.0):
            await asyncio.sleep(10.0)

    job = await run(fleet, hurry, timeout=5.0)

    assert job.error is not None
    assert (job.error.code, job.error.message) == ("error", "TimeoutError")


async def test_a_task_that_returns_after_its_cancellation_completes(fleet: Fleet) -> None:
    """Its result is recorded."""

    async def finish(_: object) -> str:
        try:
            await asyncio.sleep(10.0)
        except asyncio.CancelledError:
            await asyncio.sleep(0.5)
        return "late"

    job = await run(fleet, finish, timeout=5.0)

    assert (job.state, job.result) == (JobState.COMPLETED, b'"late"')


async def test_abandoned_tasks_are_bounded(fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    """At twice the slots their queue is blocked until they end; other queues continue."""
    caplog.set_level(logging.INFO, "viralfx.jobs")
    released = asyncio.Event()
    running: list[object] = []

    async def ignore(payload: object) -> None:
        running.append(payload)
        await swallow_cancellation(released)

    fleet.declare("ignore", ignore, timeout=5.0, retry=ONCE)
    worker = fleet.start(queues={"default": 3, "other": 1})
    ids = [await fleet.accept("ignore") for _ in range(20)]
    await fleet.until(lambda: worker.abandoned == 6)
    await asyncio.sleep(600.0)
    other = await fleet.accept(queue="other")
    await fleet.final(other)

    assert (len(running), worker.abandoned, worker.active) == (6, 6, 0)
    reported = [r for r in caplog.records if r.getMessage().startswith("Queue is blocked")]
    assert [(r.__dict__["queue"], r.__dict__["running"]) for r in reported] == [("default", 6)]

    released.set()
    await fleet.final(*ids)
    assert len(running) == 20
    assert [r.getMessage() for r in caplog.records].count("Queue has all its slots again") == 1


async def test_a_task_that_ignores_its_timeout_is_abandoned(fleet: Fleet) -> None:
    """The attempt times out, the slot is free, and its later outcome is dropped."""
    released = asyncio.Event()

    async def ignore(_: object) -> str:
        await swallow_cancellation(released)
        return "much later"

    fleet.declare("ignore", ignore, timeout=5.0, retry=ONCE)
    worker = fleet.start(queues={"default": 1})
    ids = [await fleet.accept("ignore"), await fleet.accept()]
    took = await fleet.final(*ids)
    first, second = [await fleet.job(job_id) for job_id in ids]

    assert 6.0 <= took <= 7.1
    assert first.error is not None
    assert (first.error.code, first.attempts) == ("timeout", 1)
    assert second.state is JobState.COMPLETED
    assert (worker.abandoned, worker.active) == (1, 0)

    released.set()
    await asyncio.sleep(1.0)
    assert (await fleet.job(ids[0])) == first
    assert worker.fenced == 0


async def test_the_job_of_an_abandoned_task_is_held_until_it_is_recorded(fleet: Fleet) -> None:
    """In each turn of the loop: a renewal would make a job due again that is not held."""
    released, held = asyncio.Event(), []

    class Watching:
        def next_delay(self, _: int, __: BaseException) -> float | None:
            """Look in the next turn, as the answer to a renewal may."""
            asyncio.get_running_loop().call_soon(lambda: held.append(worker.active))
            return None

    async def ignore(_: object) -> None:
        await swallow_cancellation(released)

    fleet.declare("ignore", ignore, timeout=5.0, retry=Watching())
    worker = fleet.start()
    await fleet.final(await fleet.accept("ignore"))
    released.set()

    assert held == [1]


async def test_a_job_with_an_unknown_task_waits_for_a_worker_that_knows_it(fleet: Fleet) -> None:
    """No other worker touches it."""
    job_id = await fleet.accept("new")
    fleet.start("old", tasks=TaskRegistry())
    await asyncio.sleep(5.0)
    job = await fleet.job(job_id)

    assert (job.state, job.claims, job.error) == (JobState.WAITING, 0, None)

    fleet.declare("new", fleet.note)
    fleet.start("young")

    assert await fleet.final(job_id) < 2.0
    job = await fleet.job(job_id)
    assert (job.state, job.attempts, job.error) == (JobState.COMPLETED, 0, None)


async def test_a_scheduled_job_with_an_unknown_task_waits_for_a_deployment(fleet: Fleet) -> None:
    """Its age alone does not fail it."""
    job_id = await fleet.accept("new", run_at=fleet.clock.now() + timedelta(hours=2))
    await asyncio.sleep(2 * 3600)
    fleet.start(poll_interval=30.0)
    await asyncio.sleep(180)
    assert (await fleet.job(job_id)).state is JobState.WAITING
    fleet.declare("new", fleet.note)

    await fleet.final(job_id)
    assert (await fleet.job(job_id)).state is JobState.COMPLETED


async def test_a_payload_of_another_type_waits_for_another_worker(fleet: Fleet) -> None:
    """Each worker tries once; it fails after an hour in which none could decode it."""

    async def add(number: int) -> int:
        return number + 1

    fleet.declare("add", add, payload_type=int, retry=QUICKLY)
    job_id = await fleet.accept("add", '"text"')
    for name in ("one", "two"):
        fleet.start(name)
    await asyncio.sleep(60.0)
    job = await fleet.job(job_id)

    assert job.error is not None
    assert (job.state, job.error.code, job.claims) == (JobState.WAITING, "payload", 2)
    assert "int" in job.error.message
    took = await fleet.final(job_id, within=4000.0)
    assert took == pytest.approx(3570.0, abs=50.0)
    assert (await fleet.job(job_id)).error == job.error


async def test_a_payload_type_that_raises_is_a_task_error(fleet: Fleet) -> None:
    """It is code of the task."""

    @dataclass
    class Broken:
        number: int

        def __post_init__(self) -> None:
            raise LookupError("in the payload's own code")

    job = await run(fleet, fleet.note, '{"number": 1}', payload_type=Broken)

    assert job.error is not None
    assert (job.state, job.error.code) == (JobState.FAILED, "error")
    assert job.error.message == "in the payload's own code"


async def test_a_job_whose_execution_is_cancelled_runs_again(fleet: Fleet) -> None:
    """As after a lost claim response."""
    fleet.start(lease=10.0)
    job_id = await fleet.accept("sleep", "5.0")
    await fleet.until(lambda: fleet.running)
    (runner,) = [task for task in asyncio.all_tasks() if task.get_name() == job_id]
    runner.cancel()
    await fleet.until(lambda: fleet.cancelled)
    assert (await fleet.job(job_id)).state is JobState.ACTIVE

    await fleet.final(job_id)
    job = await fleet.job(job_id)
    assert (job.state, job.claims, job.attempts, job.crashes) == (JobState.COMPLETED, 2, 0, 0)


async def test_a_cancellation_from_outside_is_not_one_that_the_job_withdrew(fleet: Fleet) -> None:
    """The job's own deadline has passed, and the clean-up after it is cancelled from outside."""

    async def clean_up(_: object) -> None:
        fleet.running += 1
        async with Deadline(1.0, clock=fleet.clock):
            try:
                await asyncio.sleep(5.0)
            finally:
                fleet.cancelled.append("its deadline")
                await asyncio.sleep(5.0)

    fleet.declare("it", clean_up, retry=ONCE)
    fleet.start(lease=10.0)
    job_id = await fleet.accept("it")
    await fleet.until(lambda: fleet.cancelled)
    (runner,) = [task for task in asyncio.all_tasks() if task.get_name() == job_id]
    runner.cancel()
    await asyncio.wait([runner])
    job = await fleet.job(job_id)

    assert (job.state, job.attempts) == (JobState.ACTIVE, 0)


async def test_a_defect_of_the_worker_is_reported_and_frees_the_slot(fleet: Fleet) -> None:
    """As an uncaught exception; the job runs again."""

    class Faulty(TaskRegistry):
        broken = True

        def find(self, name: str) -> Task:
            if self.broken:
                self.broken = False
                raise ZeroDivisionError("a bug")
            return super().find(name)

    reported: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
    worker = fleet.start(tasks=Faulty(fleet.tasks), queues={"default": 1}, lease=10.0)
    job_id = await fleet.accept()
    await fleet.final(job_id)

    assert [str(context["exception"]) for context in reported] == ["a bug"]
    assert (await fleet.job(job_id)).claims == 2
    assert worker.active == 0


async def test_a_result_without_json_fails_the_job(fleet: Fleet) -> None:
    """At once: the task has done its work, and another attempt would do it again."""

    async def make(_: object) -> object:
        return object()

    job = await run(fleet, make, retry=QUICKLY)

    assert job.error is not None
    assert (job.state, job.error.code, job.attempts) == (JobState.FAILED, "result", 1)


class HostileTextError(BaseException):
    """Its text is code of the task that would end the process."""

    def __str__(self) -> str:
        raise SystemExit(4)


async def test_a_cancelled_error_of_the_task_is_a_failure(fleet: Fleet) -> None:
    """The task awaited something that was cancelled."""

    async def wait(_: object) -> None:
        inner = asyncio.create_task(asyncio.sleep(10.0))
        asyncio.get_running_loop().call_later(1.0, inner.cancel)
        await inner

    job = await run(fleet, wait)

    assert job.error is not None
    assert job.error.code == "error"
    assert "CancelledError" in job.error.message


class _TextlessError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text either")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("x" * 10_000), "x" * 2000),
        (ValueError("a\0b"), "a\\0b"),
        (ValueError("a\udc80b"), "a\\udc80b"),
        (ValueError(), "ValueError"),
        (_TextlessError(), "_TextlessError"),
        (SystemExit(3), "the task raised SystemExit(3)"),
        (KeyboardInterrupt(), "the task raised KeyboardInterrupt(KeyboardInterrupt)"),
        (GeneratorExit(), "the task raised GeneratorExit(GeneratorExit)"),
        (HostileTextError(), "the task raised HostileTextError(HostileTextError)"),
        (
            BaseExceptionGroup("several", [ValueError("a"), SystemExit(1)]),
            "the task raised BaseExceptionGroup(several (2 sub-exceptions))",
        ),
    ],
)
async def test_an_error_fails_its_job_alone_with_a_storable_message(
    fleet: Fleet, error: BaseException, message: str
) -> None:
    """The message is never empty or long and has valid characters only; the worker continues."""

    async def fail(_: object) -> None:
        raise error

    job = await run(fleet, fail)
    other = await fleet.submit()
    await fleet.final(other)

    assert job.error is not None
    assert (job.error.code, job.error.message) == ("error", message)


@pytest.mark.parametrize("before", ["", "x" * 1990], ids=["short", "where it is cut"])
async def test_an_error_message_has_its_secrets_redacted(fleet: Fleet, before: str) -> None:
    """Also a secret at the end of the shortened message."""

    async def fail(_: object) -> None:
        raise ConnectionError(f"{before} planted-secret refused")

    fleet.declare("it", fail, retry=ONCE)
    fleet.start(clean=lambda text: text.replace("planted-secret", "***"))
    job_id = await fleet.accept("it")
    await fleet.final(job_id)
    job = await fleet.job(job_id)

    assert job.error is not None
    assert job.error.message == f"{before} *** refused"[:2000]


class _BrokenPolicy:
    def __init__(self, answer: object) -> None:
        self._answer = answer

    def next_delay(self, _attempt: int, _error: Exception) -> float | None:
        if isinstance(self._answer, Exception):
            raise self._answer
        return cast("float", self._answer)


@pytest.mark.parametrize("answer", [RuntimeError("a policy"), float("nan"), float("inf"), -1.0])
async def test_a_policy_that_raises_fails_the_job(fleet: Fleet, answer: object) -> None:
    """The job does not stay active forever."""

    async def fail(_: object) -> None:
        raise ValueError("the task's")

    job = await run(fleet, fail, retry=_BrokenPolicy(answer))

    assert job.error is not None
    assert (job.state, job.error.message) == (JobState.FAILED, "the task's")


async def test_failures_are_logged_with_their_exception(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    """A warning for each retried attempt, an error for the last one."""

    async def fail(_: object) -> None:
        raise ValueError("why")

    await run(fleet, fail, retry=BackoffPolicy(attempts=2))

    lines = [(r.levelno, r.getMessage(), r.__dict__["code"]) for r in caplog.records]
    assert lines == [
        (logging.WARNING, "Job attempt failed", "error"),
        (logging.ERROR, "Job failed", "error"),
    ]
    assert all(record.exc_info for record in caplog.records)


# -- transactional tasks -------------------------------------------------------------------------


async def test_a_transactional_task_completes_in_its_transaction(fleet: Fleet) -> None:
    """With one call to the ledger."""
    contexts: list[JobContext] = []

    async def write(payload: object, context: JobContext) -> object:
        contexts.append(context)
        return payload

    job = await run(fleet, write, '"written"', transactional=True)

    assert (job.state, job.result) == (JobState.COMPLETED, b'"written"')
    assert len(contexts) == 1
    assert (fleet.ledger.count("settle_with_effect"), fleet.ledger.count("settle")) == (1, 0)


async def test_a_transaction_that_ends_slowly_is_not_abandoned(fleet: Fleet) -> None:
    """Its task has ended, late but before it was abandoned: the commit decides."""
    released = asyncio.Event()

    class SlowCommit(FaultyLedger):
        async def settle_with_effect(
            self,
            claim: Claim,
            effect: Callable[[Any], Awaitable[bytes]],
            progress: Callable[[], bytes | None] = lambda: None,
        ) -> bool:
            async def and_commit(connection: Any) -> bytes:
                result = await effect(connection)
                await asyncio.sleep(5.0)
                return result

            return await super().settle_with_effect(claim, and_commit, progress)

    async def ignore(_: object, __: JobContext) -> str:
        await swallow_cancellation(released)
        return "late"

    fleet.declare("ignore", ignore, transactional=True, timeout=4.5, retry=ONCE)
    worker = fleet.start(ledger=SlowCommit(fleet.memory_ledger))
    job_id = await fleet.accept("ignore")
    await fleet.until(lambda: worker.active == 1)
    await asyncio.sleep(5.3)
    released.set()
    await fleet.final(job_id)
    job = await fleet.job(job_id)

    assert (job.state, job.result) == (JobState.COMPLETED, b'"late"')
    assert (worker.abandoned, worker.fenced) == (0, 0)


async def test_a_transactional_task_times_out(fleet: Fleet) -> None:
    """A result without JSON has its own code here, too."""

    async def hang(_: object, __: JobContext) -> None:
        await asyncio.sleep(100.0)

    job = await run(fleet, hang, transactional=True, timeout=5.0)

    assert job.error is not None
    assert job.error.code == "timeout"


async def test_the_wait_for_a_transaction_does_not_count_for_the_timeout(fleet: Fleet) -> None:
    """The timeout starts with the task."""
    fleet.ledger.seconds = {"settle_with_effect": 20.0}

    async def work(_: object, __: JobContext) -> None:
        await asyncio.sleep(4.0)

    job = await run(fleet, work, transactional=True, timeout=5.0)

    assert job.state is JobState.COMPLETED


@pytest.mark.parametrize("moment", ["before", "after"])
async def test_a_transaction_lost_by_the_ledger_spends_no_attempt(
    fleet: Fleet, moment: str
) -> None:
    """If it was committed, the job stays completed."""
    runs: list[int] = []

    async def write(_: object, context: JobContext) -> None:
        runs.append(context.attempt)

    fleet.declare("write", write, transactional=True, retry=ONCE)
    steps = frozenset({"settle_with_effect"})
    if moment == "before":
        fleet.ledger.unavailable = steps
    else:
        fleet.ledger.failing_after = steps
    fleet.start()
    job_id = await fleet.accept("write")
    await fleet.until(lambda: fleet.ledger.count("settle_with_effect") == 1)
    await asyncio.sleep(0.1)
    fleet.ledger.unavailable = fleet.ledger.failing_after = frozenset()
    await fleet.final(job_id)
    job = await fleet.job(job_id)

    assert runs == [1]
    assert (job.state, job.attempts) == (JobState.COMPLETED, 0)


class _LosesTransactions(FaultyLedger):
    def __init__(self, fleet: Fleet, loses: Callable[[], bool]) -> None:
        super().__init__(fleet.memory_ledger)
        self._loses = loses

    async def settle_with_effect(
        self,
        claim: Claim,
        effect: Callable[[Any], Awaitable[bytes]],
        progress: Callable[[], bytes | None] = lambda: None,
    ) -> bool:
        async def and_lose(connection: Any) -> bytes:
            result = await effect(connection)
            if self._loses():
                raise LedgerUnavailableError("planted")
            return result

        return await super().settle_with_effect(claim, and_lose, progress)


@pytest.mark.parametrize("waits", ["snoozed", "retried"])
async def test_a_lost_transaction_of_an_old_job_spends_no_attempt(fleet: Fleet, waits: str) -> None:
    """However often it ran before, for other reasons."""
    runs: list[int] = []

    async def write(_: object, context: JobContext) -> None:
        runs.append(context.attempt)
        if len(runs) <= 40 and waits == "snoozed":
            raise Snooze(1.0)
        if len(runs) <= 40:
            raise ValueError("planted")

    fleet.declare("write", write, transactional=True, retry=ONCE)
    fleet.start(ledger=_LosesTransactions(fleet, lambda: len(runs) in (41, 42)))
    job_id = await fleet.accept("write")
    for _ in range(40 if waits == "retried" else 0):
        await fleet.final(job_id)
        await fleet.ledger.retry(job_id)
    await fleet.final(job_id, within=600.0)
    job = await fleet.job(job_id)

    assert (job.state, job.attempts, len(runs)) == (JobState.COMPLETED, 0, 43)


async def test_a_task_that_always_loses_its_transaction_fails(fleet: Fleet) -> None:
    """It may end the connection itself. A snooze begins the count anew."""
    runs: list[int] = []

    async def write(_: object, context: JobContext) -> None:
        runs.append(context.attempt)
        if len(runs) == 11:
            raise Snooze(1.0)

    fleet.declare("write", write, transactional=True, retry=BackoffPolicy(attempts=2))
    fleet.start(ledger=_LosesTransactions(fleet, lambda: True))
    job_id = await fleet.accept("write")
    await fleet.final(job_id, within=600.0)
    job = await fleet.job(job_id)

    assert job.error is not None
    assert (job.state, job.error.message, job.attempts) == (JobState.FAILED, "planted", 2)
    assert runs == [1] * 42 + [2]


@pytest.mark.parametrize("seconds", [2.0, 0.0, None])
async def test_a_job_that_is_put_off_spends_no_attempt(fleet: Fleet, seconds: float | None) -> None:
    """It runs again when it is due, not with the next poll; one that is handed back at once."""
    times: list[float] = []

    async def later(_: object) -> int:
        times.append(asyncio.get_running_loop().time())
        if len(times) == 1:
            raise HandBackError("not here") if seconds is None else Snooze(seconds)
        return len(times)

    job = await run(fleet, later)

    assert (job.state, job.result, job.attempts, job.claims) == (JobState.COMPLETED, b"2", 0, 2)
    if seconds is not None:
        assert seconds <= times[1] - times[0] < seconds + 1.0


async def test_a_discarded_job_has_failed_for_good(fleet: Fleet) -> None:
    """Its policy is not asked, and the reason is the message of its error."""

    async def refuse(_: object) -> None:
        raise Discard("there is no such customer")

    job = await run(fleet, refuse, retry=QUICKLY)

    assert job.error is not None
    assert (job.state, job.attempts) == (JobState.FAILED, 1)
    assert (job.error.code, job.error.message) == ("discarded", "there is no such customer")
    assert [each.error.code for each in job.history] == ["discarded"]


@pytest.mark.parametrize("postpones", [True, False])
async def test_a_delay_beyond_all_years_is_cut(fleet: Fleet, *, postpones: bool) -> None:
    """A row with such a time could not be read."""

    async def later(_: object) -> None:
        raise Snooze(1e15) if postpones else ValueError("planted")

    backoff = Backoff(base=1e15, cap=1e15)
    fleet.declare("it", later, retry=BackoffPolicy(attempts=2, backoff=backoff))
    fleet.start()
    job_id = await fleet.accept("it")
    await asyncio.sleep(5.0)
    job = await fleet.job(job_id)

    assert (job.state, job.claims) == (JobState.WAITING, 1)
    assert job.run_at - job.created_at == pytest.approx(timedelta(days=3650), abs=timedelta(days=1))


@pytest.mark.parametrize(
    ("seconds", "kind"), [(timedelta(seconds=5), TypeError), (-1, ValueError), ("5", TypeError)]
)
def test_a_task_snoozes_for_seconds(seconds: Any, kind: type[Exception]) -> None:
    """Anything else is an error of the task, which names the reason."""
    with pytest.raises(kind, match="seconds must be"):
        Snooze(seconds)


async def test_the_context_has_any_position(fleet: Fleet) -> None:
    """Also that of a keyword."""

    @task("first")
    async def first(context: JobContext, payload: int) -> list[int]:
        return [context.attempt, payload]

    @task("named")
    async def named(payload: int, limit: int = 3, *, context: JobContext) -> list[int]:
        return [context.attempt, payload, limit]

    for each in (declared_task(first), declared_task(named)):
        assert each is not None
        fleet.tasks.add(each)
    fleet.start()
    ids = [await fleet.accept(name, "7") for name in ("first", "named")]
    for job_id in ids:
        await fleet.final(job_id)

    assert [(await fleet.job(each)).result for each in ids] == [b"[1,7]", b"[1,7,3]"]


async def test_a_ledger_error_raised_by_the_task_is_a_task_error(fleet: Fleet) -> None:
    """The task called the ledger itself, and its policy decides."""

    async def ask(_: object, __: JobContext) -> None:
        raise LedgerUnavailableError("while I accepted a job")

    job = await run(fleet, ask, transactional=True, retry=QUICKLY)

    assert job.error is not None
    assert (job.state, job.attempts) == (JobState.FAILED, 3)


async def test_the_effect_of_a_fenced_job_is_rolled_back(fleet: Fleet) -> None:
    """The worker logs it once and continues."""

    async def write(_: object, __: JobContext) -> None:
        await asyncio.sleep(10.0)

    fleet.declare("write", write, transactional=True)
    worker = fleet.start()
    job_id = await fleet.accept("write")
    await fleet.until(lambda: worker.active)
    await fleet.ledger.deregister("w")
    await fleet.ledger.register("other", ["default"], 60.0)
    await fleet.ledger.claim("default", "other", 1, [job_id])
    await asyncio.sleep(11.0)

    assert (worker.fenced, worker.active) == (1, 0)
    assert (await fleet.job(job_id)).worker == "other"


@settings(max_examples=settings().max_examples // 3)
@given(
    acts=st.lists(
        st.sampled_from(["return", "raise", "hang", "exit", "object", "cancel", "ignore"]),
        min_size=1,
        max_size=8,
    ),
    slots=st.integers(1, 3),
)
def test_every_job_becomes_final_with_random_tasks(acts: list[str], slots: int) -> None:
    """With the attempts that its policy allows, and all slots are free again."""

    async def main() -> None:
        fleet = Fleet()

        async def act(what: str) -> object:
            match what:
                case "raise":
                    raise ValueError(what)
                case "hang":
                    await asyncio.sleep(1000.0)
                case "exit":
                    raise SystemExit
                case "object":
                    return object()
                case "cancel":
                    raise asyncio.CancelledError
                case "ignore":
                    released = asyncio.Event()
                    asyncio.get_running_loop().call_later(20.0, released.set)
                    await swallow_cancellation(released)
            return what

        fleet.declare("act", act, timeout=3.0, retry=BackoffPolicy(attempts=2))
        worker = fleet.start(queues={"default": slots})
        ids = [await fleet.accept("act", f'"{what}"') for what in acts]
        await fleet.final(*ids, within=300.0)
        for what, job_id in zip(acts, ids, strict=True):
            job = await fleet.job(job_id)
            state = JobState.COMPLETED if what == "return" else JobState.FAILED
            assert (job.state, job.attempts) == (state, {"return": 0, "object": 1}.get(what, 2))
        assert worker.active == 0
        assert worker.abandoned == 2 * acts.count("ignore")
        await fleet.stop()

    run_in_virtual_time(main())


def _cancel_this_task() -> None:
    current = asyncio.current_task()
    assert current is not None
    current.cancel()


@pytest.mark.parametrize("transactional", [False, True])
async def test_a_task_that_cancels_itself_fails_alone(fleet: Fleet, *, transactional: bool) -> None:
    """As one that raises ``CancelledError``; its slot is free again."""

    async def cancel(_: object, __: object = None) -> None:
        _cancel_this_task()
        await asyncio.sleep(1.0)

    job = await run(fleet, cancel, transactional=transactional)
    beside = await fleet.accept()
    took = await fleet.final(beside)

    assert (job.state, job.error and job.error.code) == (JobState.FAILED, "error")
    assert (job.attempts, job.claims, job.crashes) == (1, 1, 0)
    assert took < 10.0


@pytest.mark.parametrize("transactional", [False, True])
@pytest.mark.parametrize("by", ["timer", "task", "deadline"])
async def test_a_task_that_its_own_helper_cancels_fails_alone(
    fleet: Fleet, by: str, *, transactional: bool
) -> None:
    """Libraries for timeouts do so. It would otherwise run again after each lease, without end."""
    helpers = []

    async def cancel(_: object, __: object = None) -> None:
        current = asyncio.current_task()
        assert current is not None

        async def cancel_later() -> None:
            await asyncio.sleep(1.0)
            current.cancel()

        async def watch() -> None:
            async with Deadline(1.0, clock=fleet.clock):
                await current

        if by == "timer":
            asyncio.get_running_loop().call_later(1.0, current.cancel)
        else:
            helpers.append(asyncio.create_task(watch() if by == "deadline" else cancel_later()))
        await asyncio.sleep(5.0)

    job = await run(fleet, cancel, transactional=transactional)

    assert (job.state, job.error and job.error.code) == (JobState.FAILED, "error")
    assert (job.attempts, job.claims, job.crashes) == (1, 1, 0)
    await asyncio.gather(*helpers, return_exceptions=True)


@pytest.mark.parametrize("ending", ["returns", "raises"])
async def test_a_task_that_handled_the_cancellation_by_its_timer_is_settled(
    fleet: Fleet, ending: str
) -> None:
    """Also if it did not withdraw the cancellation, which older libraries do not."""

    async def handle(payload: object) -> object:
        current = asyncio.current_task()
        assert current is not None
        asyncio.get_running_loop().call_later(1.0, current.cancel)
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(5.0)
        if ending == "raises":
            await asyncio.sleep(5.0)
        return payload

    job = await run(fleet, handle, "7", timeout=3.0)

    assert job.state is (JobState.FAILED if ending == "raises" else JobState.COMPLETED)
    assert (job.attempts, job.claims, job.crashes) == (int(ending == "raises"), 1, 0)


class _Cancelling(msgspec.Struct):
    """A payload that cancels the asyncio task which decodes it."""

    def __post_init__(self) -> None:
        _cancel_this_task()


@pytest.mark.parametrize("transactional", [False, True])
async def test_a_payload_that_cancels_its_task_fails_alone(
    fleet: Fleet, *, transactional: bool
) -> None:
    """The job would otherwise run again after each lease, without end."""

    async def wait(_: _Cancelling, __: object = None) -> None:
        await asyncio.sleep(1.0)

    job = await run(fleet, wait, "{}", payload_type=_Cancelling, transactional=transactional)

    assert (job.state, job.error and job.error.code) == (JobState.FAILED, "error")
    assert (job.attempts, job.claims, job.crashes) == (1, 1, 0)


@pytest.mark.parametrize("transactional", [False, True])
async def test_a_result_that_cancels_its_task_is_recorded(
    fleet: Fleet, *, transactional: bool
) -> None:
    """The task has ended, so the cancellation by the result's type is withdrawn."""

    @dataclass
    class Cancelling:
        number: int = 7

        def __getattribute__(self, name: str) -> object:
            if name == "number":
                _cancel_this_task()
            return object.__getattribute__(self, name)

    async def act(_: object, __: object = None) -> object:
        return Cancelling()

    job = await run(fleet, act, transactional=transactional)

    assert (job.state, job.result, job.claims) == (JobState.COMPLETED, b'{"number":7}', 1)


async def test_a_cancellation_that_the_task_leaves_behind_is_withdrawn(fleet: Fleet) -> None:
    """It ended before it was raised, so the job completes."""

    async def leave(payload: object) -> object:
        _cancel_this_task()
        return payload

    job = await run(fleet, leave, "7")

    assert (job.state, job.result, job.claims) == (JobState.COMPLETED, b"7", 1)


@pytest.mark.parametrize("transactional", [False, True])
async def test_a_helper_that_a_task_leaves_behind_cannot_cancel_its_record(
    fleet: Fleet, *, transactional: bool
) -> None:
    """The outcome is recorded, however often the helper tries."""
    helpers = []

    async def leave(payload: object, _: object = None) -> object:
        current = asyncio.current_task()
        assert current is not None

        async def cancel_without_end() -> None:
            while not current.done():
                current.cancel()
                await asyncio.sleep(0)

        helpers.append(asyncio.create_task(cancel_without_end()))
        return payload

    job = await run(fleet, leave, "7", transactional=transactional)

    assert (job.state, job.result, job.claims) == (JobState.COMPLETED, b"7", 1)


def test_a_loop_that_ends_without_a_drain_settles_nothing() -> None:
    """The job is not to blame: it runs again once the lease of its worker has ended."""
    fleet = Fleet()

    async def main() -> str:
        fleet.start()
        job_id = await fleet.accept("sleep", "60")
        await fleet.until(lambda: fleet.running)
        return job_id

    job_id = run_in_virtual_time(main())
    job = asyncio.run(fleet.memory_ledger.get(job_id))

    assert fleet.cancelled == [60]
    assert job is not None
    assert (job.state, job.attempts, job.history) == (JobState.ACTIVE, 0, ())


async def test_a_job_without_a_request_has_a_correlation_id_in_its_task(fleet: Fleet) -> None:
    """It is unique and the same in each attempt."""
    seen: list[str | None] = []

    async def record(_: object) -> None:
        seen.append(current_correlation_id())
        if len(seen) == 1:
            raise RuntimeError("again")

    job = await run(fleet, record, retry=QUICKLY)

    assert seen == [job.id.replace("-", "")] * 2


@pytest.mark.parametrize(
    ("error", "policy"),
    [
        *((each, ONCE) for each in ERRORS.values()),
        *((lambda: ValueError("planted"), each) for each in POLICIES.values()),
    ],
    ids=[*ERRORS, *POLICIES],
)
async def test_code_that_fails_while_its_job_is_settled_fails_the_job(
    fleet: Fleet, error: Callable[[], BaseException], policy: Any
) -> None:
    """An attempt is spent, and the worker runs the next job."""

    async def fail(_: int) -> None:
        raise error()

    async def succeed(_: int) -> str:
        return "done"

    fleet.declare("other", succeed)
    job = await run(fleet, fail, retry=policy)
    other = await fleet.accept("other")
    await fleet.final(other)

    assert (job.state, job.attempts, job.crashes) == (JobState.FAILED, 1, 0)
    assert job.error is not None
    assert (job.error.code, type(job.error.message)) == ("error", str)
    assert job.error.message
    assert (await fleet.job(other)).state is JobState.COMPLETED


@pytest.mark.parametrize("delay", [Decimal("0.5"), 1, True], ids=str)
async def test_a_delay_is_a_plain_number(fleet: Fleet, delay: Any) -> None:
    """Of any number that the policy returns: the clock and the ledger take nothing else."""

    async def fail(_: int) -> None:
        fleet.done.append(fleet.clock.now())
        raise ValueError("planted")

    job = await run(fleet, fail, retry=Answers(delay), max_attempts=2)

    assert (job.state, job.attempts) == (JobState.FAILED, 2)
    (gap,) = [(b - a).total_seconds() for a, b in pairwise(fleet.done)]
    assert gap == pytest.approx(float(delay), abs=0.1)


async def test_an_error_in_disguise_does_not_keep_a_job_from_being_handed_back(
    fleet: Fleet,
) -> None:
    """Its class is not asked for after the outcome, either."""
    began = asyncio.Event()

    async def fail(_: int) -> None:
        began.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise DisguisedError from None

    fleet.declare("it", fail)
    worker = fleet.start()
    job_id = await fleet.accept("it")
    await began.wait()
    report = await worker.drain(1.0)

    assert (report.handed_back, report.unrecorded) == (1, 0)
    assert (await fleet.job(job_id)).attempts == 0
