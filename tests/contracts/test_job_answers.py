"""The contract of ``JobLedger``: what it answers about jobs, and what people may do with them."""

import asyncio
from typing import Any

import pytest
from tests.contracts.ledgers import ERROR, LONG, Kept, draft, ids, later, totals

from viralfx.domain.jobs.job import (
    JobNotFoundError,
    JobState,
    JobStateError,
    conversation_of,
    retried,
)
from viralfx.domain.jobs.ledger import Found, JobLedger, QueueCounts

NONSENSE = ["", "nonsense", "\x00", "\ud800", "x" * 10_000, "0" * 35, "'; --"]


# -- get and page ----------------------------------------------------------------------------


@pytest.mark.parametrize("job_id", NONSENSE)
async def test_what_is_no_id_is_no_job(ledger: JobLedger, job_id: str) -> None:
    """A client may send anything."""
    await ledger.accept([draft()])

    assert await ledger.get(job_id) is None
    assert list(await ledger.page(before=job_id)) == []
    assert await ledger.find("order-17", before=job_id) == Found(jobs=(), before=None)
    with pytest.raises(JobNotFoundError):
        await ledger.retry(job_id)
    with pytest.raises(JobNotFoundError):
        await ledger.cancel(job_id)


async def test_an_id_of_no_job_is_no_job(ledger: JobLedger) -> None:
    """Also while there are others."""
    await ledger.accept([draft()])
    never = draft().id

    assert await ledger.get(never) is None
    with pytest.raises(JobNotFoundError):
        await ledger.retry(never)
    with pytest.raises(JobNotFoundError):
        await ledger.cancel(never)


async def test_pages_are_the_newest_first(kept: Kept) -> None:
    """Each goes on where the last one ended, and none is empty but the last."""
    jobs = await kept.accept(7)
    pages: list[list[str]] = []
    before = None
    while not pages or pages[-1]:
        pages.append(ids(await kept.ledger.page(before=before, limit=3)))
        before = pages[-1][-1] if pages[-1] else None

    assert [len(page) for page in pages] == [3, 3, 1, 0]
    assert [job_id for page in pages for job_id in page] == ids(jobs)[::-1]
    assert list(await kept.ledger.page()) == jobs[::-1]
    assert list(await kept.ledger.page(limit=0)) == []


async def test_no_jobs_make_no_page(ledger: JobLedger) -> None:
    """And no error."""
    assert list(await ledger.page()) == []
    assert list(await ledger.page(queue="default", state=JobState.FAILED, before=draft().id)) == []


async def test_pages_hold_what_was_asked_for(kept: Kept) -> None:
    """By queue, by state, and by both; each job as it is."""
    jobs = {
        (queue, state): [await kept.in_state(state, queue=queue) for _ in range(3)]
        for state in (JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED, JobState.ACTIVE)
        for queue in ("default", "analytics")
    }
    for queue in ("default", "analytics"):
        jobs[queue, JobState.WAITING] = [await kept.in_state(JobState.WAITING, queue=queue)]
        jobs[queue, JobState.WAITING] += await kept.accept(
            run_at=later(kept.now(), 99), queue=queue
        )
    page = kept.ledger.page

    for (queue, state), expected in jobs.items():
        assert list(await page(queue=queue, state=state)) == expected[::-1]
        assert list(await page(queue=queue, state=state, limit=1)) == expected[:-2:-1]
        assert (
            list(await page(queue=queue, state=state, before=expected[-1].id)) == (expected[-2::-1])
        )
        both = [job.id for (_, other), found in jobs.items() if other is state for job in found]
        assert ids(await page(state=state)) == sorted(both, reverse=True)
    assert len(await page(queue="analytics")) == 14
    assert list(await page(queue="notifications")) == []


async def test_a_page_goes_on_after_what_is_gone(kept: Kept) -> None:
    """Between two pages a job may be pruned, and others may come."""
    (oldest,) = await kept.accept(run_at=later(kept.now(), 99))
    done = await kept.in_state(JobState.COMPLETED)
    (newest,) = await kept.accept()
    first = await kept.ledger.page(limit=2)
    await kept.until(lambda: kept.ledger.prune(0.0))
    await kept.accept()
    second = await kept.ledger.page(limit=2, before=first[-1].id)

    assert ids(first) == [newest.id, done.id]
    assert ids(second) == [oldest.id]


async def test_the_jobs_of_a_conversation_are_found(kept: Kept) -> None:
    """The newest first, in any state, among those of others; all of them from page to page."""
    first, second = await kept.accept(2, correlation_id="order-17")
    await kept.ledger.cancel(first.id)
    await kept.accept(2, correlation_id="order-170")
    await kept.accept()
    (third,) = await kept.accept(correlation_id="order-17", queue="analytics")
    found = await kept.ledger.find("order-17")
    pages: list[list[str]] = []
    before = None
    while not pages or before is not None:
        page = await kept.ledger.find("order-17", before=before, limit=2)
        pages.append(ids(page.jobs))
        before = page.before

    assert ids(found.jobs) == [third.id, second.id, first.id]
    assert list(found.jobs) == [await kept.job(job.id) for job in found.jobs]
    assert found.before is None
    assert pages == [[third.id, second.id], [first.id]]
    assert (await kept.ledger.find("order-17", limit=3)).before is None
    assert list((await kept.ledger.find("order-18")).jobs) == []


async def test_a_conversation_can_be_looked_for_in_a_queue_or_a_state(kept: Kept) -> None:
    """Both, alone and together; and before an id, of whatever job."""
    waiting, cancelled = await kept.accept(2, correlation_id="order-17")
    await kept.ledger.cancel(cancelled.id)
    (counted,) = await kept.accept(correlation_id="order-17", queue="analytics")
    await kept.accept(correlation_id="order-18")

    async def found(**more: Any) -> list[str]:
        return ids((await kept.ledger.find("order-17", **more)).jobs)

    assert await found(queue="default") == [cancelled.id, waiting.id]
    assert await found(state=JobState.WAITING) == [counted.id, waiting.id]
    assert await found(queue="default", state=JobState.WAITING) == [waiting.id]
    assert await found(queue="notifications") == []
    assert await found(before=counted.id) == [cancelled.id, waiting.id]
    assert await found(before=draft().id, limit=1) == [counted.id]


async def test_a_job_that_nobody_asked_for_is_found_by_the_id_of_its_lines(kept: Kept) -> None:
    """Which is its own, without dashes; of a job that has one, that is none."""
    (own,) = await kept.accept()
    (other,) = await kept.accept(correlation_id="order-17")
    by_its_own = await kept.ledger.find(conversation_of(own))
    by_its_id = await kept.ledger.find(own.id)
    by_the_others = await kept.ledger.find(other.id.replace("-", ""))

    assert ids(by_its_own.jobs) == [own.id]
    assert list(by_its_id.jobs) == list(by_the_others.jobs) == []


# -- retry and cancel ------------------------------------------------------------------------


async def test_a_failed_job_can_be_retried(kept: Kept) -> None:
    """It is due now, with all its attempts; how often it was given is not forgotten."""
    claim = await kept.second_claim()
    await kept.expire()
    await kept.ledger.sweep(1)
    (other,) = await kept.accept()
    await kept.pass_time()
    retried_job = await kept.ledger.retry(claim.id)
    claims = await kept.claim(2)

    assert retried_job.state is JobState.WAITING
    assert (retried_job.attempts, retried_job.crashes, retried_job.claims) == (0, 0, 2)
    assert (retried_job.finished_at, retried_job.worker) == (None, None)
    assert other.run_at < retried_job.run_at <= kept.now()
    assert [(each.id, each.number, each.attempt, each.crashes) for each in claims] == [
        (other.id, 1, 1, 0),
        (claim.id, 3, 1, 0),
    ]


@pytest.mark.parametrize("state", [state for state in JobState if state is not JobState.FAILED])
async def test_only_a_failed_job_can_be_retried(kept: Kept, state: JobState) -> None:
    """The error says what it is, and nothing changes."""
    job = await kept.in_state(state)
    with pytest.raises(JobStateError) as caught:
        await kept.ledger.retry(job.id)

    assert caught.value.state is state
    assert await kept.job(job.id) == job


async def test_a_waiting_job_can_be_cancelled(kept: Kept) -> None:
    """Due or not, retried or not; nobody is given it any more."""
    claim = await kept.accept_and_claim()
    await kept.ledger.settle([retried(claim, ERROR, 0.0)])
    due, left = await kept.accept(2)
    # After what is claimed: it may be due at once on a busy machine.
    (later_job,) = await kept.accept(run_at=later(kept.now(), 0.5))
    cancelled = [await kept.ledger.cancel(each) for each in (later_job.id, claim.id, due.id)]

    async def all_are_due() -> bool:
        return kept.now() > later_job.run_at

    await kept.until(all_are_due)
    await kept.ledger.register("w", ["default"], LONG)

    for job in cancelled:
        assert job.state is JobState.CANCELLED
        assert job.finished_at is not None
        assert await kept.job(job.id) == job
        assert list(await kept.ledger.claim("default", "w", 10, [job.id])) == []
    assert cancelled[1].attempts == 1
    assert [each.id for each in await kept.ledger.claim("default", "w", 10)] == [left.id]
    assert await totals(kept) == QueueCounts(active=1, cancelled=3)


@pytest.mark.parametrize("state", [state for state in JobState if state is not JobState.WAITING])
async def test_only_a_waiting_job_can_be_cancelled(kept: Kept, state: JobState) -> None:
    """The error says what it is, and nothing changes."""
    job = await kept.in_state(state)
    with pytest.raises(JobStateError) as caught:
        await kept.ledger.cancel(job.id)

    assert caught.value.state is state
    assert await kept.job(job.id) == job


async def test_a_job_is_cancelled_or_given(kept: Kept) -> None:
    """Never both, however close."""
    jobs = await kept.accept(20)
    await kept.ledger.register("w", ["default"], LONG)
    cancelled: set[str] = set()

    async def cancel(job_id: str) -> None:
        try:
            await kept.ledger.cancel(job_id)
        except JobStateError as refused:
            assert refused.state is JobState.ACTIVE  # noqa: PT017 - either may come first
        else:
            cancelled.add(job_id)

    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        for job in jobs[:10]:
            group.create_task(cancel(job.id))
        claiming = [group.create_task(kept.ledger.claim("default", "w", 5)) for _ in range(4)]
        for job in jobs[10:]:
            group.create_task(cancel(job.id))
    given = [claim.id for call in claiming for claim in call.result()]
    given += [claim.id for claim in await kept.ledger.claim("default", "w", 20)]

    assert sorted([*given, *cancelled]) == ids(jobs)


async def test_a_job_is_retried_once_by_many_at_once(kept: Kept) -> None:
    """The others are told that it waits."""
    job = await kept.in_state(JobState.FAILED)
    async with asyncio.timeout(20):
        results = await asyncio.gather(
            *(kept.ledger.retry(job.id) for _ in range(8)), return_exceptions=True
        )
    refused = [each.state for each in results if isinstance(each, JobStateError)]

    assert refused == [JobState.WAITING] * 7
    assert await totals(kept) == QueueCounts(waiting=1)
