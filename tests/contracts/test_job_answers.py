"""The contract of ``JobLedger``: finding, retrying and cancelling jobs."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from tests.contracts.ledgers import ERROR, LONG_LEASE, LedgerCase, draft, ids, later, listed, totals

from viralfx.jobs.ledger import Found, JobLedger, QueueCounts
from viralfx.jobs.model import (
    JobFilter,
    JobNotFoundError,
    JobState,
    JobStateError,
    completed,
    correlation_id_of_job,
    retried,
)

NONSENSE = ["", "nonsense", "\x00", "\ud800", "x" * 10_000, "0" * 35, "'; --"]


# -- get and page ----------------------------------------------------------------------------


@pytest.mark.parametrize("job_id", NONSENSE)
async def test_a_malformed_id_is_not_found(ledger: JobLedger, job_id: str) -> None:
    """Clients may send any text."""
    await ledger.accept([draft()])

    assert await ledger.get(job_id) is None
    assert list(await ledger.page(JobFilter(before=job_id))) == []
    assert await ledger.find("order-17", JobFilter(before=job_id)) == Found(jobs=(), before=None)
    with pytest.raises(JobNotFoundError):
        await ledger.retry(job_id)
    with pytest.raises(JobNotFoundError):
        await ledger.cancel(job_id)


async def test_an_unknown_id_is_not_found(ledger: JobLedger) -> None:
    """Also while there are other jobs."""
    await ledger.accept([draft()])
    never = draft().id

    assert await ledger.get(never) is None
    with pytest.raises(JobNotFoundError):
        await ledger.retry(never)
    with pytest.raises(JobNotFoundError):
        await ledger.cancel(never)


async def test_pages_are_the_newest_first(case: LedgerCase) -> None:
    """Each continues after the last one, and only the last page may be empty."""
    jobs = await case.accept(7)
    pages: list[list[str]] = []
    before = None
    while not pages or pages[-1]:
        pages.append(ids(await case.ledger.page(JobFilter(before=before, limit=3))))
        before = pages[-1][-1] if pages[-1] else None

    assert [len(page) for page in pages] == [3, 3, 1, 0]
    assert [job_id for page in pages for job_id in page] == ids(jobs)[::-1]
    assert list(await case.ledger.page()) == [listed(job) for job in jobs[::-1]]


async def test_a_page_of_no_jobs_is_empty(ledger: JobLedger) -> None:
    """It is not an error."""
    assert list(await ledger.page()) == []
    wanted = JobFilter(queue="default", state=JobState.FAILED, before=draft().id)
    assert list(await ledger.page(wanted)) == []


async def test_pages_filter_by_queue_and_state(case: LedgerCase) -> None:
    """By one of them or both."""
    jobs = {
        (queue, state): [await case.in_state(state, queue=queue) for _ in range(3)]
        for state in (JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED, JobState.ACTIVE)
        for queue in ("default", "analytics")
    }
    for queue in ("default", "analytics"):
        jobs[queue, JobState.WAITING] = [await case.in_state(JobState.WAITING, queue=queue)]
        jobs[queue, JobState.WAITING] += await case.accept(
            run_at=later(case.now(), 99), queue=queue
        )

    async def page(**wanted: Any) -> Any:
        return await case.ledger.page(JobFilter(**wanted))

    for (queue, state), expected in jobs.items():
        shown = [listed(job) for job in expected]
        assert list(await page(queue=queue, state=state)) == shown[::-1]
        assert list(await page(queue=queue, state=state, limit=1)) == shown[:-2:-1]
        assert list(await page(queue=queue, state=state, before=shown[-1].id)) == shown[-2::-1]
        both = [job.id for (_, other), found in jobs.items() if other is state for job in found]
        assert ids(await page(state=state)) == sorted(both, reverse=True)
    assert len(await page(queue="analytics")) == 14
    assert list(await page(queue="notifications")) == []


async def test_no_list_has_payloads_and_results(case: LedgerCase) -> None:
    """A hundred results of a megabyte would take the memory of a process."""
    (job,) = await case.accept(payload=b'"large"', correlation_id="order-17")
    (claim,) = await case.claim()
    await case.ledger.settle([completed(claim, b'"huge"')])
    whole = await case.job(job.id)
    queue = JobFilter(queue="default")
    task = JobFilter(task="task")
    found = [
        *await case.ledger.page(),
        *await case.ledger.page(queue),
        *(await case.ledger.find("order-17")).jobs,
        *(await case.ledger.search(task)).jobs,
        *(await case.ledger.search(replace(task, queue="default"))).jobs,
    ]

    assert (whole.payload, whole.result) == (b'"large"', b'"huge"')
    assert found == [listed(whole)] * 5


async def test_a_page_continues_after_a_pruned_job(case: LedgerCase) -> None:
    """Other jobs may be accepted in between."""
    (oldest,) = await case.accept(run_at=later(case.now(), 99))
    done = await case.in_state(JobState.COMPLETED)
    (newest,) = await case.accept()
    first = await case.ledger.page(JobFilter(limit=2))
    await case.until(lambda: case.ledger.prune(0.0))
    await case.accept()
    second = await case.ledger.page(JobFilter(limit=2, before=first[-1].id))

    assert ids(first) == [newest.id, done.id]
    assert ids(second) == [oldest.id]


async def test_jobs_are_found_by_correlation_id(case: LedgerCase) -> None:
    """Newest first, in any state, over several pages."""
    first, second = await case.accept(2, correlation_id="order-17")
    await case.ledger.cancel(first.id)
    await case.accept(2, correlation_id="order-170")
    await case.accept()
    (third,) = await case.accept(correlation_id="order-17", queue="analytics")
    found = await case.ledger.find("order-17")
    pages: list[list[str]] = []
    before = None
    while not pages or before is not None:
        page = await case.ledger.find("order-17", JobFilter(before=before, limit=2))
        pages.append(ids(page.jobs))
        before = page.before

    assert ids(found.jobs) == [third.id, second.id, first.id]
    assert list(found.jobs) == [listed(await case.job(job.id)) for job in found.jobs]
    assert found.before is None
    assert pages == [[third.id, second.id], [first.id]]
    assert (await case.ledger.find("order-17", JobFilter(limit=3))).before is None
    assert list((await case.ledger.find("order-18")).jobs) == []


async def test_a_search_filters_by_queue_and_state(case: LedgerCase) -> None:
    """Also together, and before an id."""
    waiting, cancelled = await case.accept(2, correlation_id="order-17")
    await case.ledger.cancel(cancelled.id)
    (counted,) = await case.accept(correlation_id="order-17", queue="analytics")
    await case.accept(correlation_id="order-18")

    async def found(**more: Any) -> list[str]:
        return ids((await case.ledger.find("order-17", JobFilter(**more))).jobs)

    assert await found(queue="default") == [cancelled.id, waiting.id]
    assert await found(state=JobState.WAITING) == [counted.id, waiting.id]
    assert await found(queue="default", state=JobState.WAITING) == [waiting.id]
    assert await found(queue="notifications") == []
    assert await found(before=counted.id) == [cancelled.id, waiting.id]
    assert await found(before=draft().id, limit=1) == [counted.id]


async def test_a_job_without_a_request_is_found_by_its_own_correlation_id(case: LedgerCase) -> None:
    """Its id without dashes; a job with a correlation id is not found by that."""
    (own,) = await case.accept()
    (other,) = await case.accept(correlation_id="order-17")
    by_its_own = await case.ledger.find(correlation_id_of_job(own))
    by_its_id = await case.ledger.find(own.id)
    by_the_others = await case.ledger.find(other.id.replace("-", ""))

    assert ids(by_its_own.jobs) == [own.id]
    assert list(by_its_id.jobs) == list(by_the_others.jobs) == []


# -- retry and cancel ------------------------------------------------------------------------


async def test_a_failed_job_can_be_retried(case: LedgerCase) -> None:
    """It is due now with all its attempts; its number of claims stays."""
    claim = await case.second_claim()
    await case.expire()
    await case.ledger.sweep(1)
    (other,) = await case.accept()
    await case.pass_time()
    retried_job = await case.ledger.retry(claim.id)
    claims = await case.claim(2)

    assert retried_job.state is JobState.WAITING
    assert (retried_job.attempts, retried_job.crashes, retried_job.claims) == (0, 0, 2)
    assert (retried_job.finished_at, retried_job.worker) == (None, None)
    assert other.run_at < retried_job.run_at <= case.now()
    assert [(each.id, each.number, each.attempt, each.crashes) for each in claims] == [
        (other.id, 1, 1, 0),
        (claim.id, 3, 1, 0),
    ]


@pytest.mark.parametrize("state", [state for state in JobState if state is not JobState.FAILED])
async def test_only_a_failed_job_can_be_retried(case: LedgerCase, state: JobState) -> None:
    """The error names the state, and nothing changes."""
    job = await case.in_state(state)
    with pytest.raises(JobStateError) as caught:
        await case.ledger.retry(job.id)

    assert caught.value.state is state
    assert await case.job(job.id) == job


async def test_a_waiting_job_can_be_cancelled(case: LedgerCase) -> None:
    """Whether or not it is due or was retried; no worker claims it."""
    claim = await case.accept_and_claim()
    await case.ledger.settle([retried(claim, ERROR, 0.0)])
    due, left = await case.accept(2)
    # Accepted after the claim: on a busy machine it may be due at once.
    (later_job,) = await case.accept(run_at=later(case.now(), 0.5))
    cancelled = [await case.ledger.cancel(each) for each in (later_job.id, claim.id, due.id)]

    async def all_are_due() -> bool:
        return case.now() > later_job.run_at

    await case.until(all_are_due)
    await case.ledger.register("w", ["default"], LONG_LEASE)

    for job in cancelled:
        assert job.state is JobState.CANCELLED
        assert job.finished_at is not None
        assert await case.job(job.id) == job
        assert list(await case.ledger.claim("default", "w", 10, [job.id])) == []
    assert cancelled[1].attempts == 1
    assert [each.id for each in await case.ledger.claim("default", "w", 10)] == [left.id]
    assert await totals(case) == QueueCounts(active=1, cancelled=3)


@pytest.mark.parametrize("state", [state for state in JobState if state is not JobState.WAITING])
async def test_only_a_waiting_job_can_be_cancelled(case: LedgerCase, state: JobState) -> None:
    """The error names the state, and nothing changes."""
    job = await case.in_state(state)
    with pytest.raises(JobStateError) as caught:
        await case.ledger.cancel(job.id)

    assert caught.value.state is state
    assert await case.job(job.id) == job


async def test_a_job_is_either_cancelled_or_claimed(case: LedgerCase) -> None:
    """Concurrent calls never do both."""
    jobs = await case.accept(20)
    await case.ledger.register("w", ["default"], LONG_LEASE)
    cancelled: set[str] = set()

    async def cancel(job_id: str) -> None:
        try:
            await case.ledger.cancel(job_id)
        except JobStateError as refused:
            assert refused.state is JobState.ACTIVE  # noqa: PT017 - either may come first
        else:
            cancelled.add(job_id)

    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        for job in jobs[:10]:
            group.create_task(cancel(job.id))
        claiming = [group.create_task(case.ledger.claim("default", "w", 5)) for _ in range(4)]
        for job in jobs[10:]:
            group.create_task(cancel(job.id))
    given = [claim.id for call in claiming for claim in call.result()]
    given += [claim.id for claim in await case.ledger.claim("default", "w", 20)]

    assert sorted([*given, *cancelled]) == ids(jobs)


async def test_concurrent_retries_retry_a_job_once(case: LedgerCase) -> None:
    """The other callers get the error that it waits."""
    job = await case.in_state(JobState.FAILED)
    async with asyncio.timeout(20):
        results = await asyncio.gather(
            *(case.ledger.retry(job.id) for _ in range(8)), return_exceptions=True
        )
    refused = [each.state for each in results if isinstance(each, JobStateError)]

    assert refused == [JobState.WAITING] * 7
    assert await totals(case) == QueueCounts(waiting=1)
