"""The limits of the ledger in memory, and the cost of its searches."""

import gc
import sys
from collections import deque
from collections.abc import Awaitable
from dataclasses import replace
from types import FrameType
from typing import TypeVar

import pytest
from tests.manual_clock import ManualClock

from viralfx.core.errors import LedgerFullError
from viralfx.core.ids import new_job_id
from viralfx.jobs.limits import Limit, Rate
from viralfx.jobs.memory.ledger import MAX_EXAMINED_JOBS, MemoryJobLedger
from viralfx.jobs.model import Job, JobDraft, JobFilter, JobState, completed

T = TypeVar("T")


def drafts(
    number: int, *, payload: bytes = b"1", correlation_id: str | None = None
) -> list[JobDraft]:
    """Return drafts of jobs."""
    return [
        JobDraft(
            id=new_job_id(),
            queue="default",
            task="t",
            payload=payload,
            correlation_id=correlation_id,
        )
        for _ in range(number)
    ]


async def run(ledger: MemoryJobLedger, number: int, result: bytes = b"1") -> None:
    """Run the longest waiting jobs."""
    await ledger.register("w", ["default"], 600.0)
    for claim in await ledger.claim("default", "w", number):
        assert await ledger.settle([completed(claim, result)]) == {claim.id}


async def test_a_full_ledger_refuses_jobs_until_some_have_finished(clock: ManualClock) -> None:
    """All drafts of a call or none; known jobs are found even if it is full."""
    ledger = MemoryJobLedger(clock, max_unfinished=3)
    kept = drafts(2)
    await ledger.accept(kept)
    with pytest.raises(LedgerFullError, match="2 jobs wait or run, and JOB_MEMORY_MAX_JOBS=3"):
        await ledger.accept(drafts(2))
    assert len(await ledger.page()) == 2
    await ledger.accept(drafts(1))
    with pytest.raises(LedgerFullError):
        await ledger.accept(drafts(1))
    again = await ledger.accept(kept)
    await run(ledger, 1)
    await ledger.accept(drafts(1))

    assert [accepted.created for accepted in again] == [False, False]
    with pytest.raises(LedgerFullError):
        await ledger.accept(drafts(1))


async def test_final_jobs_are_dropped_for_the_payloads_of_new_ones(clock: ManualClock) -> None:
    """Unfinished jobs are kept, and new ones are refused."""
    ledger = MemoryJobLedger(clock, max_bytes=1000)
    (old,) = await ledger.accept(drafts(1, payload=b"x" * 400))
    await run(ledger, 1, b"1" * 400)
    assert await ledger.get(old.job.id) is not None
    (first,) = await ledger.accept(drafts(1, payload=b"x" * 600))
    assert await ledger.get(old.job.id) is None
    with pytest.raises(LedgerFullError, match="1 jobs that wait or run take 600 of 1000 bytes"):
        await ledger.accept(drafts(1, payload=b"x" * 401))
    await ledger.accept(drafts(1, payload=b"x" * 400))

    assert await ledger.get(first.job.id) is not None


async def test_results_count_towards_the_byte_limit(clock: ManualClock) -> None:
    """Large results leave the newest jobs that fit."""
    ledger = MemoryJobLedger(clock, max_bytes=1000)
    for _ in range(10):
        await ledger.accept(drafts(1))
        await run(ledger, 1, b"1" * 300)

    assert len(await ledger.page()) == 3
    assert (await ledger.counts())["default"].completed == 10


async def test_a_search_examines_a_limited_number_of_jobs(clock: ManualClock) -> None:
    """It returns the id to continue from."""
    ledger = MemoryJobLedger(clock)
    oldest, *_ = drafted = drafts(2 * MAX_EXAMINED_JOBS + 10, correlation_id="order-17")
    await ledger.accept(drafted)
    await ledger.cancel(oldest.id)
    found: list[Job] = []
    steps, before = 0, None
    while not steps or before is not None:
        page = await ledger.find("order-17", JobFilter(state=JobState.CANCELLED, before=before))
        found += page.jobs
        steps, before = steps + 1, page.before

    assert [job.id for job in found] == [oldest.id]
    assert steps == 3


@pytest.mark.parametrize("what", ["state", "queue", "correlation id"])
async def test_the_cost_of_a_search_does_not_depend_on_other_jobs(
    what: str, clock: ManualClock
) -> None:
    """Counted in Python calls, not in time."""

    async def cost(others: int) -> int:
        ledger = MemoryJobLedger(clock, max_unfinished=others + 1)
        (wanted,) = drafts(1, correlation_id="order-17")
        await ledger.accept([wanted, *drafts(others)])
        await ledger.cancel(wanted.id)
        if what == "correlation id":
            calls, found = await counted(ledger.find("order-17"))
            jobs = list(found.jobs)
        elif what == "state":
            calls, page = await counted(ledger.page(JobFilter(state=JobState.CANCELLED)))
            jobs = list(page)
        else:
            calls, page = await counted(ledger.page(JobFilter(queue="analytics")))
            assert page == []
            return calls
        assert [job.id for job in jobs] == [wanted.id]
        return calls

    assert await cost(1000) == await cost(50)


@pytest.mark.parametrize(
    "limit", [None, Limit(concurrency=1), Limit(concurrency=1, keyed=True)], ids=str
)
async def test_the_cost_of_a_claim_does_not_depend_on_the_backlog(
    limit: Limit | None, clock: ManualClock
) -> None:
    """Neither if it takes the first job, nor if a limit keeps all of them back."""
    limits = {} if limit is None else {"t": limit}

    async def cost(backlog: int) -> tuple[int, int]:
        ledger = MemoryJobLedger(clock)
        await ledger.accept(drafts(backlog))
        first, claims = await counted(ledger.claim("default", "w", 1, limits=limits))
        second, more = await counted(ledger.claim("default", "w", 1, limits=limits))
        assert (len(claims), len(more)) == (1, 1 if limit is None else 0)
        return first, second

    assert await cost(1000) == await cost(50)


async def test_jobs_of_a_task_with_keys_start_beside_a_steady_load(clock: ManualClock) -> None:
    """The other task always has a job that is due."""
    ledger = MemoryJobLedger(clock)
    limits = {"keyed": Limit(concurrency=1, keyed=True)}
    others = [replace(each, task="keyed", concurrency_key="a") for each in drafts(3)]
    await ledger.accept([*drafts(5), *others])
    started = []
    for _ in range(10):
        await clock.advance(1.0)
        await ledger.accept(drafts(2))
        claims = await ledger.claim("default", "w", 2, limits=limits)
        started += [claim.task for claim in claims]
        await ledger.settle([completed(claim, b"1") for claim in claims])

    assert started.count("keyed") == 3


async def test_the_starts_of_keys_are_forgotten(clock: ManualClock) -> None:
    """A rate for each user keeps no record of users whose period has ended."""
    ledger = MemoryJobLedger(clock, max_finished=10)
    limits = {"t": Limit(rate=Rate(5, 60.0), keyed=True)}
    before = kept()
    for number in range(600):
        (draft,) = drafts(1)
        await ledger.accept([replace(draft, concurrency_key=f"user {number}")])
        claims = await ledger.claim("default", "w", 1, limits=limits)
        await ledger.settle([completed(claim, b"1") for claim in claims])
        await clock.advance(1.0)

    assert kept() - before <= 130


def kept() -> int:
    """Return how many deques there are."""
    return sum(type(each) is deque for each in gc.get_objects())


async def counted(work: Awaitable[T]) -> tuple[int, T]:
    """Await ``work``; return how many Python functions were entered, and its result."""
    calls = 0

    def count(_frame: FrameType, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        result = await work
    finally:
        sys.setprofile(before)
    return calls, result
