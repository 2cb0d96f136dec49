"""The contract of ``JobLedger``: cancellation of running jobs, attempts, progress, bulk changes."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from tests.contracts.ledgers import (
    EARLIER,
    ERROR,
    LONG_LEASE,
    LedgerCase,
    draft,
    ids,
    later,
    totals,
)

from viralfx.jobs.ledger import BulkStep, ProgressReport, QueueCounts
from viralfx.jobs.model import (
    MAX_HISTORY,
    MAX_TRACEBACKS,
    Claim,
    Job,
    JobError,
    JobFilter,
    JobNotFoundError,
    JobState,
    JobStateError,
    Settlement,
    cancelled,
    completed,
    failed,
    handed_back,
    postponed,
    refused,
    retried,
)

NO_JOB = "01991f3c-5a0e-7c3b-8a52-6f5d7c0e9b11"
OTHER = JobError(code="timeout", message="too late", traceback="Traceback: planted")


async def requested(case: LedgerCase) -> Claim:
    """Claim a new job and request its cancellation."""
    claim = await case.accept_and_claim()
    job = await case.ledger.cancel(claim.id, running=True)
    assert (job.state, job.cancel_requested, job.worker) == (JobState.ACTIVE, True, "w")
    return claim


async def count(steps: AsyncIterator[BulkStep]) -> int:
    """Return how many jobs a bulk change has changed."""
    return sum([step.count async for step in steps])


# -- cancellation of running jobs --------------------------------------------------------------


async def test_a_worker_learns_which_jobs_to_cancel(case: LedgerCase) -> None:
    """Only those of its latest claims; a waiting job is cancelled at once."""
    first = await requested(case)
    second = await case.accept_and_claim()
    (waiting,) = await case.accept()

    assert await case.ledger.cancel_requests("w") == {first.id: 1}
    assert await case.ledger.cancel_requests("other") == {}
    assert (await case.ledger.cancel(waiting.id, running=True)).state is JobState.CANCELLED
    again = await case.ledger.cancel(first.id, running=True)
    assert (again.state, again.cancel_requested) == (JobState.ACTIVE, True)
    assert not (await case.job(second.id)).cancel_requested
    await case.ledger.settle([cancelled(first)])
    assert await case.ledger.cancel_requests("w") == {}


@pytest.mark.parametrize(
    "state", [JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED], ids=str
)
async def test_a_final_job_cannot_be_cancelled(case: LedgerCase, state: JobState) -> None:
    """The error names the state, and nothing changes."""
    job = await case.in_state(state)
    with pytest.raises(JobStateError, match=f"is {state}; only one that is waiting or active"):
        await case.ledger.cancel(job.id, running=True)

    assert await case.job(job.id) == job


WAYS: dict[str, Callable[[Claim], Settlement]] = {
    "cancelled": cancelled,
    "failed": lambda claim: failed(claim, ERROR),
    "retried": lambda claim: retried(claim, ERROR, 3600.0),
    "postponed": lambda claim: postponed(claim, ERROR, 0.0),
    "refused": lambda claim: refused(claim, ERROR.message),
    "handed back": handed_back,
}


@pytest.mark.parametrize("way", WAYS)
async def test_a_requested_job_ends_cancelled(case: LedgerCase, way: str) -> None:
    """Unless it completes. It keeps its errors, and never waits again."""
    claim = await requested(case)
    settlement = WAYS[way](claim)
    settled = await case.ledger.settle([settlement])
    job = await case.job(claim.id)
    (attempt,) = job.history

    assert set(settled) == {claim.id}
    assert (job.state, job.worker, job.cancel_requested) == (JobState.CANCELLED, None, False)
    assert job.finished_at is not None
    assert job.error == settlement.error
    assert attempt.error == settlement.attempt_error
    assert job.attempts == settlement.spends_attempt
    assert list(await case.ledger.claim("default", "w", 10)) == []
    assert list(await case.ledger.settle([settlement, completed(claim, b"1")])) == []
    assert await totals(case) == QueueCounts(cancelled=1)


async def test_a_finished_effect_wins(case: LedgerCase) -> None:
    """A job that completes after the request is completed, also in a transaction."""
    first, second = await requested(case), await requested(case)

    async def effect(_: object) -> bytes:
        return b"2"

    assert set(await case.ledger.settle([completed(first, b"1")])) == {first.id}
    assert await case.ledger.settle_with_effect(second, effect)
    for claim, result in ((first, b"1"), (second, b"2")):
        job = await case.job(claim.id)
        assert (job.state, job.result) == (JobState.COMPLETED, result)
        assert not job.cancel_requested


async def test_a_cancelled_job_of_a_dead_worker_runs_no_more(case: LedgerCase) -> None:
    """The sweep cancels it; others are due again."""
    gone = await requested(case)
    other = await case.accept_and_claim()
    await case.expire()
    swept = await case.ledger.sweep(2)
    job = await case.job(gone.id)
    (attempt,) = job.history

    assert list(swept.cancelled) == [gone.id]
    assert {queue: list(each) for queue, each in swept.returned.items()} == {"default": [other.id]}
    assert (job.state, job.crashes, job.worker) == (JobState.CANCELLED, 1, None)
    assert (attempt.number, attempt.worker, attempt.error.code) == (1, "w", "crashed")
    assert [each.id for each in await case.claim(worker="x")] == [other.id]


async def test_a_requested_job_that_its_worker_released_is_cancelled(case: LedgerCase) -> None:
    """By the next sweep at the latest: it had not begun, so its worker does not report it."""
    assert list((await case.ledger.sweep(2)).cancelled) == []
    gone, other = await requested(case), await case.accept_and_claim()
    await case.ledger.register("w", ["default"], LONG_LEASE, [other.id], grace=0.0)
    await case.ledger.sweep(2)

    assert (await case.job(gone.id)).state is JobState.CANCELLED
    assert (await case.job(other.id)).state is JobState.ACTIVE


async def test_a_worker_that_leaves_cancels_requested_jobs(case: LedgerCase) -> None:
    """Jobs of abandoned tasks are handed back, and this one is cancelled."""
    gone, other = await requested(case), await case.accept_and_claim()
    returned = await case.ledger.deregister("w")

    assert {queue: list(each) for queue, each in returned.items()} == {"default": [other.id]}
    assert (await case.job(gone.id)).state is JobState.CANCELLED
    assert (await case.job(other.id)).state is JobState.WAITING


async def test_requests_race_with_outcomes(case: LedgerCase) -> None:
    """A job ends in one state, and no outcome of its worker is lost."""
    jobs = await case.accept(40)
    claims = await case.claim(40)

    async def cancel(job_id: str) -> None:
        try:
            await case.ledger.cancel(job_id, running=True)
        except JobStateError as refused_by:
            assert refused_by.state.final  # noqa: PT017 - either may come first

    async def settle(claim: Claim, number: int) -> None:
        way = [completed(claim, b"1"), failed(claim, ERROR), retried(claim, ERROR, 0.0)][number % 3]
        assert set(await case.ledger.settle([way])) == {claim.id}

    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        for number, claim in enumerate(claims):
            group.create_task(cancel(claim.id))
            group.create_task(settle(claim, number))
    ended = [(await case.job(job.id)) for job in jobs]

    assert {job.state for job in ended} <= {
        JobState.COMPLETED,
        JobState.FAILED,
        JobState.CANCELLED,
    }
    # Each third failed for good: cancelled, unless the request came too late.
    assert all(job.state is not JobState.WAITING for job in ended)
    assert await case.ledger.cancel_requests("w") == {}


# -- attempts ----------------------------------------------------------------------------------


async def test_executions_that_did_not_complete_a_job_are_kept(case: LedgerCase) -> None:
    """With worker, times and error; a retry keeps them, and a list does not have them."""
    before = case.now()
    (job,) = await case.accept()
    for settle in (
        lambda claim: retried(claim, OTHER, 0.0),
        handed_back,
        lambda claim: postponed(claim, EARLIER, 0.0),
        lambda claim: failed(claim, ERROR),
    ):
        (claim,) = await case.claim()
        await case.ledger.settle([settle(claim)])
    final = await case.job(job.id)
    first = final.history[0]

    assert [each.number for each in final.history] == [1, 2, 3, 4]
    assert {each.worker for each in final.history} == {"w"}
    assert [each.error.code for each in final.history] == [
        "timeout",
        "handed_back",
        "timeout",
        "error",
    ]
    assert first.error == OTHER
    assert final.error == ERROR
    assert first.started_at is not None
    assert later(before, -1.0) <= first.started_at <= first.ended_at <= case.now()
    assert (await case.ledger.retry(job.id)).history == final.history
    (listed,) = await case.ledger.page()
    assert listed.history == ()
    (claim,) = await case.claim()
    await case.ledger.settle([completed(claim, b"1")])
    assert (await case.job(job.id)).history == final.history


async def test_a_crash_is_kept(case: LedgerCase) -> None:
    """With the worker whose lease ran out."""
    claim = await case.accept_and_claim(worker="gone")
    await case.expire("gone")
    await case.ledger.sweep(5)
    (attempt,) = (await case.job(claim.id)).history

    assert (attempt.number, attempt.worker) == (1, "gone")
    assert attempt.error == JobError(code="crashed", message="the lease of worker gone ran out")


async def test_the_history_is_limited(case: LedgerCase) -> None:
    """The oldest entries are dropped, and the last ones have tracebacks."""
    (job,) = await case.accept()
    for _ in range(MAX_HISTORY + 2):
        (claim,) = await case.claim()
        await case.ledger.settle([retried(claim, OTHER, 0.0)])
    history = (await case.job(job.id)).history

    assert [each.number for each in history] == list(range(3, MAX_HISTORY + 3))
    kept = [each.number for each in history if each.error.traceback is not None]
    assert kept == list(range(MAX_HISTORY + 3 - MAX_TRACEBACKS, MAX_HISTORY + 3))


# -- progress ----------------------------------------------------------------------------------


async def test_the_progress_of_a_running_job_is_stored(case: LedgerCase) -> None:
    """The report of a lost claim is dropped; the last one stays after the end."""
    old = await case.accept_and_claim()
    await case.ledger.settle([retried(old, ERROR, 0.0)])
    (claim,) = await case.claim()
    other = await case.accept_and_claim()
    await case.ledger.report(
        [
            ProgressReport(claim=old, progress=b'{"current": 0}'),
            ProgressReport(claim=other, progress=b'{"current": 2}'),
        ]
    )
    await case.ledger.report([ProgressReport(claim=claim, progress=b'{"current": 1}')])
    running = await case.job(claim.id)
    (listed, _) = await case.ledger.page()
    await case.ledger.settle(
        [completed(claim, b"1"), failed(other, ERROR)._replace(progress=b'{"current": 3}')]
    )
    await case.ledger.report([ProgressReport(claim=claim, progress=b'{"current": 9}')])

    assert (running.progress, running.state) == (b'{"current": 1}', JobState.ACTIVE)
    assert listed.progress == b'{"current": 2}'
    assert (await case.job(claim.id)).progress == b'{"current": 1}'
    assert (await case.job(other.id)).progress == b'{"current": 3}'


async def test_an_outcome_carries_the_last_report(case: LedgerCase) -> None:
    """Alone, with others, and in a transaction."""
    claims = [await case.accept_and_claim() for _ in range(4)]

    async def effect(_: object) -> bytes:
        return b"1"

    report = b'{"current": 7}'
    await case.ledger.settle([completed(claims[0], b"1")._replace(progress=report)])
    await case.ledger.settle(
        [completed(claims[1], b"1")._replace(progress=report), failed(claims[2], ERROR)]
    )
    await case.ledger.settle_with_effect(claims[3], effect, lambda: report)
    jobs = [await case.job(claim.id) for claim in claims]

    assert [job.progress for job in jobs] == [report, report, None, report]
    assert [job.state for job in jobs] == [
        JobState.COMPLETED,
        JobState.COMPLETED,
        JobState.FAILED,
        JobState.COMPLETED,
    ]


# -- many jobs ---------------------------------------------------------------------------------


async def fail_all(case: LedgerCase, *jobs: Job, error: JobError = ERROR) -> None:
    """Fail waiting jobs."""
    await case.ledger.register("w", ["default", "analytics"], LONG_LEASE)
    for job in jobs:
        (claim,) = await case.ledger.claim(job.queue, "w", 1, [job.id])
        await case.ledger.settle([failed(claim, error)])


EDGES = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)

FILTERS: dict[str, tuple[Callable[[LedgerCase, list[Job]], JobFilter], set[int]]] = {
    "queue": (lambda _, __: JobFilter(queue="analytics"), {1}),
    "task": (lambda _, __: JobFilter(task="other"), {2, 3}),
    "code": (lambda _, __: JobFilter(code="timeout"), {3, 4}),
    "task and code": (lambda _, __: JobFilter(task="other", code="timeout"), {3}),
    "state": (lambda _, __: JobFilter(state=JobState.FAILED), {0, 1, 2, 3, 4}),
    "another state": (lambda _, __: JobFilter(state=JobState.COMPLETED), set()),
    "older than a job": (lambda _, jobs: JobFilter(before=jobs[2].id), {0, 1}),
    "older than a time": (lambda _, jobs: JobFilter(created_before=jobs[3].created_at), {0, 1, 2}),
    "older than the first time": (lambda _, __: JobFilter(created_before=EDGES[0]), set()),
    "older than the last time": (lambda _, __: JobFilter(created_before=EDGES[1]), {0, 1, 2, 3, 4}),
    "nothing": (lambda _, __: JobFilter(task="missing"), set()),
    "no task has a zero byte": (lambda _, __: JobFilter(task="task\0"), set()),
}


@pytest.mark.parametrize("name", FILTERS)
async def test_all_failed_jobs_that_match_are_retried(case: LedgerCase, name: str) -> None:
    """No others; some of their ids are returned, to be announced."""
    jobs = []
    all_options: Sequence[dict[str, Any]] = (
        {},
        {"queue": "analytics"},
        {"task": "other"},
        {"task": "other"},
        {},
    )
    for options in all_options:
        jobs += await case.accept(**options)
        await case.pass_time()
    await fail_all(case, *jobs[:3])
    await fail_all(case, *jobs[3:], error=replace(OTHER, traceback=None))
    done = await case.in_state(JobState.COMPLETED, task="other")
    make, expected = FILTERS[name]
    steps = [step async for step in case.ledger.retry_all(make(case, jobs))]
    waiting = [number for number, job in enumerate(jobs) if await _waits(case, job)]

    assert set(waiting) == expected
    assert sum(step.count for step in steps) == len(expected)
    announced = {job_id for step in steps for each in step.ids.values() for job_id in each}
    assert announced == {jobs[number].id for number in expected}
    assert (await case.job(done.id)).state is JobState.COMPLETED
    for number in expected:
        retried_job = await case.job(jobs[number].id)
        assert (retried_job.attempts, len(retried_job.history)) == (0, 1)
        assert retried_job.run_at <= case.now()


async def _waits(case: LedgerCase, job: Job) -> bool:
    return (await case.job(job.id)).state is JobState.WAITING


async def test_waiting_and_running_jobs_that_match_are_cancelled(case: LedgerCase) -> None:
    """Also those that are due later; the running ones are requested to end."""
    (running,) = await case.accept(task="other")
    (claim,) = await case.claim()
    waiting, timed, other = [
        *await case.accept(task="other"),
        *await case.accept(task="other", run_at=later(case.now(), 3600.0)),
        *await case.accept(),
    ]
    first = await count(case.ledger.cancel_all(JobFilter(task="other")))
    again = await count(case.ledger.cancel_all(JobFilter(task="other")))

    assert (first, again) == (3, 0)
    assert (await case.job(running.id)).cancel_requested
    for job in (waiting, timed):
        assert (await case.job(job.id)).state is JobState.CANCELLED
    assert (await case.job(other.id)).state is JobState.WAITING
    await case.ledger.settle([handed_back(claim)])
    assert await totals(case) == QueueCounts(waiting=1, cancelled=3)
    assert await count(case.ledger.cancel_all(JobFilter(state=JobState.ACTIVE))) == 0
    assert await count(case.ledger.cancel_all(JobFilter(state=JobState.WAITING))) == 1


async def test_a_bulk_retry_retries_each_job_once(case: LedgerCase) -> None:
    """Although it fails again before the change has ended."""
    jobs = await case.accept(30)
    await fail_all(case, *jobs)
    counted = 0
    async for step in case.ledger.retry_all(JobFilter(task="task")):
        counted += step.count
        await fail_all(case, *[job for job in jobs if await _waits(case, job)])

    assert counted == 30
    assert await totals(case) == QueueCounts(failed=30)


@pytest.mark.parametrize("most", [1, 3, 5, 6])
async def test_a_bulk_change_has_a_bound(case: LedgerCase, most: int) -> None:
    """Over all of its steps, queues and states; the next one goes on with the others."""
    jobs = []
    for queue in ("default", "analytics") * 3:
        jobs += await case.accept(queue=queue)
    await fail_all(case, *jobs)
    wanted = JobFilter(task="task")
    retries = [await count(case.ledger.retry_all(wanted, most)) for _ in range(2)]
    (running,) = await case.accept()
    assert await case.ledger.claim("default", "w", 1, [running.id])
    await case.accept(run_at=later(case.now(), 3600.0))
    cancellations = [await count(case.ledger.cancel_all(wanted, most)) for _ in range(2)]

    assert retries == [most, min(most, 6 - most)]
    first = min(most, sum(retries) + 2)
    assert cancellations == [first, min(most, sum(retries) + 2 - first)]


# -- one job, now ------------------------------------------------------------------------------


async def test_a_waiting_job_is_run_now(case: LedgerCase) -> None:
    """Before its time, also that of its next attempt; its other fields stay as they were."""
    soon, late = later(case.now(), 30.0), later(case.now(), 3600.0)
    timed = [*await case.accept(run_at=soon), *await case.accept(run_at=late, key="k")]
    tried = await case.accept_and_claim()
    await case.ledger.settle([retried(tried, ERROR, 3600.0)])
    assert await case.ledger.due(["default"]) == {}
    run = [await case.ledger.run(job_id) for job_id in (*ids(timed), tried.id)]
    (again,) = await case.ledger.accept([draft(run_at=late, key="k")])

    assert {job.state for job in run} == {JobState.WAITING}
    assert all(job.run_at <= case.now() for job in run)
    assert [job.asked_run_at for job in run] == [soon, late, None]
    assert (run[2].attempts, run[2].error) == (1, ERROR)
    assert (again.created, again.job.id) == (False, timed[1].id)
    assert await totals(case) == QueueCounts(waiting=3)
    assert ids(await case.claim(3)) == ids(run)


async def test_a_due_job_keeps_its_place(case: LedgerCase) -> None:
    """To run it now changes nothing."""
    first, second = await case.accept(2)
    await case.pass_time()

    assert await case.ledger.run(first.id) == first
    assert ids(await case.claim(2)) == [first.id, second.id]


@pytest.mark.parametrize(
    "state", [JobState.ACTIVE, JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED], ids=str
)
async def test_only_a_waiting_job_is_run_now(case: LedgerCase, state: JobState) -> None:
    """The error names the state, and nothing changes."""
    job = await case.in_state(state)
    with pytest.raises(JobStateError, match=f"is {state}; only one that is waiting can be run now"):
        await case.ledger.run(job.id)
    with pytest.raises(JobNotFoundError):
        await case.ledger.run(NO_JOB)

    assert await case.job(job.id) == job


# -- searches ----------------------------------------------------------------------------------


async def test_jobs_are_searched_by_task_and_code(case: LedgerCase) -> None:
    """With queue, state and cursor; the newest first."""
    jobs = await case.accept(6, task="other")
    others = await case.accept(2)
    await case.accept(1, queue="analytics", task="other")
    await fail_all(case, *jobs[:2], others[0])
    await fail_all(case, jobs[2], error=EARLIER)
    await fail_all(case, jobs[3])
    await case.ledger.retry(jobs[3].id)

    async def found(**wanted: Any) -> list[str]:
        filtered = JobFilter(**wanted)
        return [job.id for job in (await case.ledger.search(filtered)).jobs]

    newest = ids(jobs)[::-1]
    assert await found(task="other", queue="default") == newest
    assert len(await found(task="other")) == 7
    assert await found(task="other", state=JobState.FAILED) == [jobs[n].id for n in (2, 1, 0)]
    assert await found(code="timeout") == [jobs[2].id]
    # The job that waits again still shows its last error.
    assert await found(task="other", code="error") == [jobs[n].id for n in (3, 1, 0)]
    assert await found(task="other", before=jobs[1].id) == [jobs[0].id]
    assert await found(created_before=jobs[0].created_at, task="other") == []
    assert await found(task="no such task") == []
    assert await found(task="other", before="malformed") == []


async def test_a_search_has_pages(case: LedgerCase) -> None:
    """Each job is on one of them, and the last has no cursor."""
    wanted: list[str] = []
    for _ in range(5):
        wanted += ids(await case.accept(task="other"))
        await case.accept(2)
    narrower: Sequence[dict[str, Any]] = ({}, {"queue": "default"}, {"state": JobState.WAITING})
    for narrow in narrower:
        seen: list[str] = []
        before: str | None = None
        while True:
            page = await case.ledger.search(
                JobFilter(task="other", before=before, limit=2, **narrow)
            )
            seen += ids(page.jobs)
            before = page.before
            if before is None:
                break

        assert seen == wanted[::-1]


async def test_a_search_by_correlation_id_filters_as_well(case: LedgerCase) -> None:
    """By task, code and time."""
    mine = [
        *await case.accept(task="other", correlation_id="c"),
        *await case.accept(correlation_id="c"),
    ]
    await fail_all(case, mine[1])

    async def found(wanted: JobFilter) -> list[str]:
        return ids((await case.ledger.find("c", wanted)).jobs)

    assert await found(JobFilter(task="other")) == [mine[0].id]
    assert await found(JobFilter(code="error")) == [mine[1].id]
    assert await found(JobFilter(created_before=mine[0].created_at)) == []
