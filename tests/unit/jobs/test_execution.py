"""What becomes of a job by what its task does."""

import asyncio
import logging
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.doubles import swallow_cancellation
from tests.unit.jobs.fleet import Fleet
from tests.virtual_time import run_in_virtual_time

from viralfx.domain.correlation import current_correlation_id
from viralfx.domain.jobs.job import Job, JobState, LedgerUnavailableError
from viralfx.domain.jobs.tasks import JobContext, Task, TaskRegistry
from viralfx.domain.resilience.backoff import Backoff
from viralfx.domain.resilience.deadline import time_left
from viralfx.domain.resilience.retry_policy import BackoffPolicy

ONCE = BackoffPolicy(attempts=1)
QUICKLY = BackoffPolicy(attempts=3, backoff=Backoff(base=1.0))


async def run(fleet: Fleet, function: Any, payload: str = "0", **options: Any) -> Job:
    """Run one job of a task until it is final."""
    fleet.declare("it", function, **({"retry": ONCE} | options))
    fleet.start()
    job_id = await fleet.accept("it", payload)
    await fleet.final(job_id, within=4000.0)
    return await fleet.job(job_id)


async def test_a_task_gets_its_payload_by_type_and_its_result_is_kept(fleet: Fleet) -> None:
    """As JSON, both."""

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


async def test_a_task_knows_about_its_execution(fleet: Fleet) -> None:
    """Its id, attempt, conversation and how long it may take."""
    contexts: list[JobContext] = []

    async def look(_: object, context: JobContext) -> None:
        contexts.append(context)
        if context.attempt == 1:
            raise RuntimeError("again")

    job = await run(fleet, look, wants_context=True, timeout=25.0, retry=QUICKLY)

    first, second = contexts
    assert (first.id, first.attempt, second.attempt) == (job.id, 1, 2)
    assert first.created_at == job.created_at
    assert first.connection is None
    assert first.correlation_id == second.correlation_id == job.id.replace("-", "")
    assert job.attempts == 1
    assert job.error is None


async def test_the_conversation_goes_on_in_the_task(fleet: Fleet) -> None:
    """Its log lines and calls carry the id of the request that asked for the job."""
    seen: list[str | None] = []

    async def look(_: object) -> None:
        seen.append(current_correlation_id())

    fleet.declare("look", look)
    fleet.start()
    ids = [await fleet.accept("look", correlation_id=f"request-{n}") for n in range(3)]
    await fleet.final(*ids)

    assert sorted(map(str, seen)) == ["request-0", "request-1", "request-2"]
    assert current_correlation_id() is None


async def test_what_a_task_binds_ends_with_it(fleet: Fleet) -> None:
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


async def test_calls_inside_a_task_know_its_deadline(fleet: Fleet) -> None:
    """A retry does not begin a wait that ends after it."""
    left: list[float] = []

    async def look(_: object, context: JobContext) -> None:
        await asyncio.sleep(5.0)
        left.extend((time_left(), context.deadline.remaining()))

    await run(fleet, look, wants_context=True, timeout=25.0)

    assert left == [pytest.approx(20.0)] * 2


async def test_an_error_is_retried_by_the_task_s_policy(fleet: Fleet) -> None:
    """Then it fails, with what it raised."""
    times: list[float] = []

    async def fail(_: object) -> None:
        times.append(fleet.clock.monotonic())
        raise ValueError(f"number {len(times)}")

    job = await run(fleet, fail, retry=QUICKLY)

    assert job.state is JobState.FAILED
    assert job.error is not None
    assert (job.error.code, job.error.message, job.attempts) == ("error", "number 3", 3)
    assert [b - a for a, b in pairwise(times)] == pytest.approx([1.0, 2.0], abs=0.02)


async def test_a_task_without_a_policy_has_the_worker_s(fleet: Fleet) -> None:
    """Likewise its timeout."""
    fleet.declare("hang", fleet.sleep)
    fleet.start(default_retry=BackoffPolicy(attempts=2), default_timeout=7.0)
    job_id = await fleet.accept("hang", "100.0")
    took = await fleet.final(job_id)
    job = await fleet.job(job_id)

    assert took == pytest.approx(7.0 + 1.0 + 7.0, abs=0.1)
    assert job.error is not None
    assert (job.error.code, job.attempts) == ("timeout", 2)


async def test_a_task_that_takes_too_long_is_cut(fleet: Fleet) -> None:
    """Its code says so."""
    job = await run(fleet, fleet.sleep, "100.0", timeout=5.0)

    assert job.error is not None
    assert (job.error.code, job.error.message) == ("timeout", "the deadline of 5 s has passed")
    assert fleet.cancelled == [100.0]


async def test_a_timeout_of_the_task_s_own_is_an_error_like_any_other(fleet: Fleet) -> None:
    """Only that of the task as a whole is a timeout."""

    async def hurry(_: object) -> None:
        async with asyncio.timeout(1.0):
            await asyncio.sleep(10.0)

    job = await run(fleet, hurry, timeout=5.0)

    assert job.error is not None
    assert (job.error.code, job.error.message) == ("error", "TimeoutError")


async def test_a_task_that_ends_late_but_ends_is_done(fleet: Fleet) -> None:
    """What it did after its cancellation is done all the same."""

    async def finish(_: object) -> str:
        try:
            await asyncio.sleep(10.0)
        except asyncio.CancelledError:
            await asyncio.sleep(0.5)
        return "late"

    job = await run(fleet, finish, timeout=5.0)

    assert (job.state, job.result) == (JobState.COMPLETED, b'"late"')


async def test_tasks_that_ignore_their_cancellation_are_bounded(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    """At twice the slots their queue stands still, and no other; it goes on when they end."""
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
    told = [r for r in caplog.records if r.getMessage().startswith("Queue stands still")]
    assert [(r.__dict__["queue"], r.__dict__["running"]) for r in told] == [("default", 6)]

    released.set()
    await fleet.final(*ids)
    assert len(running) == 20
    assert [r.getMessage() for r in caplog.records].count("Queue has all its slots again") == 1


async def test_a_task_that_ignores_its_cancellation_is_left_behind(fleet: Fleet) -> None:
    """It has timed out, its slot is free, and what it comes to later is nothing."""
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


async def test_an_unknown_task_is_put_off_at_no_cost(fleet: Fleet) -> None:
    """Another worker may know it: a newer one, or an older."""
    job_id = await fleet.accept("new")
    fleet.start("old", tasks=TaskRegistry())
    await asyncio.sleep(5.0)
    job = await fleet.job(job_id)

    assert job.error is not None
    assert (job.state, job.error.code, job.attempts) == (JobState.WAITING, "unknown_task", 0)

    fleet.declare("new", fleet.note)
    fleet.start("young")

    # Whoever gets it: each claim of the old one is followed by ten seconds' pause.
    await fleet.final(job_id, within=300.0)
    job = await fleet.job(job_id)
    assert (job.state, job.attempts, job.error) == (JobState.COMPLETED, 0, None)


async def test_a_task_that_stays_unknown_fails_its_jobs(fleet: Fleet) -> None:
    """After an hour."""
    job_id = await fleet.accept("gone")
    fleet.start(look_interval=5.0)
    took = await fleet.final(job_id, within=4000.0)
    job = await fleet.job(job_id)

    assert took == pytest.approx(3600.0, abs=20.0)
    assert job.error is not None
    assert (job.error.code, job.error.message) == (
        "unknown_task",
        "there is no task named 'gone' here",
    )


async def test_a_job_that_was_scheduled_long_ago_may_wait_for_a_deploy(fleet: Fleet) -> None:
    """Its task is unknown for some minutes only, whenever it was accepted."""
    job_id = await fleet.accept("new", run_at=fleet.clock.now() + timedelta(hours=2))
    fleet.start(look_interval=30.0)
    await asyncio.sleep(2 * 3600 + 180)
    assert (await fleet.job(job_id)).state is JobState.WAITING
    fleet.declare("new", fleet.note)

    await fleet.final(job_id)
    assert (await fleet.job(job_id)).state is JobState.COMPLETED


async def test_a_payload_that_no_longer_fits_fails_at_once(fleet: Fleet) -> None:
    """Trying again would not help."""

    async def add(number: int) -> int:
        return number + 1

    job = await run(fleet, add, '"text"', payload_type=int, retry=QUICKLY)

    assert job.error is not None
    assert (job.state, job.error.code, job.claims) == (JobState.FAILED, "payload", 1)
    assert "int" in job.error.message


async def test_a_type_that_breaks_while_it_is_decoded_is_an_error(fleet: Fleet) -> None:
    """It is code of the task's."""

    @dataclass
    class Broken:
        number: int

        def __post_init__(self) -> None:
            raise LookupError("in the payload's own code")

    job = await run(fleet, fleet.note, '{"number": 1}', payload_type=Broken)

    assert job.error is not None
    assert (job.state, job.error.code) == (JobState.FAILED, "error")
    assert job.error.message == "in the payload's own code"


async def test_an_execution_that_is_cancelled_by_others_is_recovered(fleet: Fleet) -> None:
    """By the end of a loop, for example: the job is as if its claim had been lost."""
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


async def test_a_fault_of_the_worker_s_own_is_told_and_costs_no_slot(fleet: Fleet) -> None:
    """As an uncaught exception; the job is recovered."""

    class Faulty(TaskRegistry):
        broken = True

        def find(self, name: str) -> Task:
            if self.broken:
                self.broken = False
                raise ZeroDivisionError("a bug")
            return super().find(name)

    told: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    worker = fleet.start(tasks=Faulty(fleet.tasks), queues={"default": 1}, lease=10.0)
    job_id = await fleet.accept()
    await fleet.final(job_id)

    assert [str(context["exception"]) for context in told] == ["a bug"]
    assert (await fleet.job(job_id)).claims == 2
    assert worker.active == 0


async def test_a_result_that_is_no_json_is_an_error_of_the_task(fleet: Fleet) -> None:
    """Retried as any other, with a code of its own."""

    async def make(_: object) -> object:
        return object()

    job = await run(fleet, make, retry=QUICKLY)

    assert job.error is not None
    assert (job.state, job.error.code, job.attempts) == (JobState.FAILED, "result", 3)


@pytest.mark.parametrize("end", [SystemExit(3), KeyboardInterrupt()])
async def test_a_task_that_ends_programs_ends_its_job(fleet: Fleet, end: BaseException) -> None:
    """The worker goes on."""

    async def leave(_: object) -> None:
        raise end

    job = await run(fleet, leave)
    other = await fleet.submit()
    await fleet.final(other)

    assert job.error is not None
    assert job.error.code == "error"
    assert job.error.message.startswith(f"the task raised {type(end).__name__}")


async def test_a_task_that_raises_a_cancellation_has_failed(fleet: Fleet) -> None:
    """Nobody had cancelled it; what it waited for was."""

    async def wait(_: object) -> None:
        inner = asyncio.create_task(asyncio.sleep(10.0))
        asyncio.get_running_loop().call_later(1.0, inner.cancel)
        await inner

    job = await run(fleet, wait)

    assert job.error is not None
    assert job.error.code == "error"
    assert "CancelledError" in job.error.message


async def test_an_error_of_many_is_an_error(fleet: Fleet) -> None:
    """Groups too, and those that hold more than exceptions."""

    async def fail(_: object) -> None:
        raise BaseExceptionGroup("several", [ValueError("a"), SystemExit(1)])

    job = await run(fleet, fail)

    assert job.error is not None
    assert "several" in job.error.message


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
    ],
)
async def test_a_message_is_bounded_and_can_be_kept_everywhere(
    fleet: Fleet, error: Exception, message: str
) -> None:
    """Neither long, nor empty, nor of characters that are none."""

    async def fail(_: object) -> None:
        raise error

    job = await run(fleet, fail)

    assert job.error is not None
    assert job.error.message == message


@pytest.mark.parametrize("before", ["", "x" * 1990], ids=["short", "where it is cut"])
async def test_a_message_holds_no_secret(fleet: Fleet, before: str) -> None:
    """Neither does the part of one where it is cut."""

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
async def test_a_policy_that_fails_gives_up(fleet: Fleet, answer: object) -> None:
    """The job is not kept for ever."""

    async def fail(_: object) -> None:
        raise ValueError("the task's")

    job = await run(fleet, fail, retry=_BrokenPolicy(answer))

    assert job.error is not None
    assert (job.state, job.error.message) == (JobState.FAILED, "the task's")


async def test_failures_are_logged_with_what_was_raised(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    """A warning for each attempt that is followed by another, an error for the last."""

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


async def test_a_transactional_task_completes_with_its_effect(fleet: Fleet) -> None:
    """In one step of the ledger."""
    contexts: list[JobContext] = []

    async def write(payload: object, context: JobContext) -> object:
        contexts.append(context)
        return payload

    job = await run(fleet, write, '"written"', transactional=True)

    assert (job.state, job.result) == (JobState.COMPLETED, b'"written"')
    assert len(contexts) == 1
    assert (fleet.ledger.count("settle_with_effect"), fleet.ledger.count("settle")) == (1, 0)


async def test_a_transactional_task_that_fails_is_retried(fleet: Fleet) -> None:
    """By its policy, as any other."""

    async def fail(_: object, context: JobContext) -> None:
        raise ValueError(str(context.attempt))

    job = await run(fleet, fail, transactional=True, retry=QUICKLY)

    assert job.error is not None
    assert (job.state, job.error.message, job.attempts) == (JobState.FAILED, "3", 3)


async def test_a_transactional_task_times_out(fleet: Fleet) -> None:
    """And so does one that returns what is no JSON have its own code."""

    async def hang(_: object, __: JobContext) -> None:
        await asyncio.sleep(100.0)

    job = await run(fleet, hang, transactional=True, timeout=5.0)

    assert job.error is not None
    assert job.error.code == "timeout"


async def test_the_wait_for_a_transaction_is_not_the_task_s(fleet: Fleet) -> None:
    """Its time begins when it does."""
    fleet.ledger.seconds = {"settle_with_effect": 20.0}

    async def work(_: object, __: JobContext) -> None:
        await asyncio.sleep(4.0)

    job = await run(fleet, work, transactional=True, timeout=5.0)

    assert job.state is JobState.COMPLETED


@pytest.mark.parametrize("moment", ["before", "after"])
async def test_a_transaction_that_the_ledger_lost_costs_no_attempt(
    fleet: Fleet, moment: str
) -> None:
    """And when it had happened after all, the job stays completed."""
    runs: list[int] = []

    async def write(_: object, context: JobContext) -> None:
        runs.append(context.attempt)

    fleet.declare("write", write, transactional=True, retry=ONCE)
    steps = frozenset({"settle_with_effect"})
    if moment == "before":
        fleet.ledger.away = steps
    else:
        fleet.ledger.away_after = steps
    fleet.start()
    job_id = await fleet.accept("write")
    await fleet.until(lambda: fleet.ledger.count("settle_with_effect") == 1)
    await asyncio.sleep(0.1)
    fleet.ledger.away = fleet.ledger.away_after = frozenset()
    await fleet.final(job_id)
    job = await fleet.job(job_id)

    assert runs == [1]
    assert (job.state, job.attempts) == (JobState.COMPLETED, 0)


async def test_a_task_s_own_trouble_with_the_ledger_is_an_error(fleet: Fleet) -> None:
    """It asked for something else there, and its policy decides."""

    async def ask(_: object, __: JobContext) -> None:
        raise LedgerUnavailableError("while I accepted a job")

    job = await run(fleet, ask, transactional=True, retry=QUICKLY)

    assert job.error is not None
    assert (job.state, job.attempts) == (JobState.FAILED, 3)


async def test_an_effect_whose_job_was_taken_away_counts_for_nothing(fleet: Fleet) -> None:
    """The worker says so once, and goes on."""

    async def write(_: object, __: JobContext) -> None:
        await asyncio.sleep(10.0)

    fleet.declare("write", write, transactional=True)
    worker = fleet.start()
    job_id = await fleet.accept("write")
    await fleet.until(lambda: worker.active)
    await fleet.ledger.leave("w")
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
def test_whatever_tasks_do_every_job_becomes_final(acts: list[str], slots: int) -> None:
    """With as many attempts as its policy allows, and no slot is lost."""

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
            good = what == "return"
            assert job.state is (JobState.COMPLETED if good else JobState.FAILED)
            assert job.attempts == (0 if good else 2)
        assert worker.active == 0
        assert worker.abandoned == 2 * acts.count("ignore")
        await fleet.stop()

    run_in_virtual_time(main())


async def test_a_draft_of_no_conversation_has_one_in_its_task(fleet: Fleet) -> None:
    """It can be told from all others, and is the same in each attempt."""
    seen: list[str | None] = []

    async def look(_: object) -> None:
        seen.append(current_correlation_id())
        if len(seen) == 1:
            raise RuntimeError("again")

    job = await run(fleet, look, retry=QUICKLY)

    assert seen == [job.id.replace("-", "")] * 2
