"""The contract of ``JobLedger``: each job counts in one state, also after it was pruned."""

import asyncio

import pytest
from tests.contracts.ledgers import TURNS, Kept, cut, draft, ids, later, totals

from viralfx.domain.jobs.job import JobNotFoundError, JobState, completed
from viralfx.domain.jobs.ledger import JobLedger, QueueCounts


async def test_an_empty_ledger_counts_nothing(ledger: JobLedger) -> None:
    """Not even queues."""
    assert dict(await ledger.counts()) == {}


async def test_jobs_are_counted_by_state(kept: Kept) -> None:
    """Each in one, those that wait for their time apart, each queue by itself."""
    wanted = {JobState.COMPLETED: 4, JobState.FAILED: 3, JobState.CANCELLED: 2, JobState.ACTIVE: 1}
    for state, count in wanted.items():
        for _ in range(count):
            await kept.in_state(state)
    await kept.accept(5)
    await kept.accept(6, run_at=later(kept.now(), 99))
    await kept.accept(queue="analytics")

    assert await totals(kept) == QueueCounts(
        waiting=5, scheduled=6, active=1, completed=4, failed=3, cancelled=2
    )
    assert await totals(kept, "analytics") == QueueCounts(waiting=1)
    assert set(await kept.ledger.counts()) == {"default", "analytics"}


async def test_a_scheduled_job_counts_as_waiting_when_it_is_due(kept: Kept) -> None:
    """By itself."""
    await kept.accept(run_at=later(kept.now(), 3.0))
    before = await totals(kept)

    async def due() -> bool:
        return await totals(kept) == QueueCounts(waiting=1)

    await kept.until(due)

    assert before == QueueCounts(scheduled=1)


async def test_the_longest_wait_is_told(kept: Kept) -> None:
    """Of those that are due; none where none is."""
    await kept.accept(run_at=later(kept.now(), 99))
    nothing = (await kept.ledger.counts())["default"].oldest_due
    (oldest,) = await kept.accept()

    async def a_while() -> bool:
        return (kept.now() - oldest.run_at).total_seconds() > 0.2

    await kept.until(a_while)
    await kept.accept()
    waited = (await kept.ledger.counts())["default"].oldest_due
    most = (kept.now() - oldest.run_at).total_seconds()
    await kept.claim()
    left = (await kept.ledger.counts())["default"].oldest_due

    assert nothing == 0.0
    assert 0.2 < waited <= most
    assert left < waited


async def test_a_job_counts_in_the_state_it_has(kept: Kept) -> None:
    """One that failed, was retried and completed is completed, and nothing else."""
    job = await kept.in_state(JobState.FAILED)
    once_failed = await totals(kept)
    await kept.ledger.retry(job.id)
    once_retried = await totals(kept)
    (claim,) = await kept.claim()
    await kept.ledger.settle([completed(claim, b"1")])

    assert once_failed == QueueCounts(failed=1)
    assert once_retried == QueueCounts(waiting=1)
    assert await totals(kept) == QueueCounts(completed=1)


# -- prune -----------------------------------------------------------------------------------


async def test_what_is_final_for_long_is_pruned(kept: Kept) -> None:
    """And forgotten, but for the counts; what is not final, or not for so long, stays."""
    final = [await kept.in_state(state) for state in JobState if state.final]
    active = await kept.in_state(JobState.ACTIVE)
    await kept.pass_time()
    (waiting,) = await kept.accept()
    too_early = await kept.ledger.prune(60.0)

    async def a_while() -> bool:
        return (kept.now() - waiting.created_at).total_seconds() > 1.0

    await kept.until(a_while)
    await kept.claim()
    recent = await kept.in_state(JobState.COMPLETED)
    pruned = await kept.ledger.prune((kept.now() - waiting.created_at).total_seconds())
    expected = QueueCounts(active=2, completed=2, failed=1, cancelled=1)

    assert (too_early, pruned) == (0, 3)
    assert await totals(kept) == expected
    assert [await kept.ledger.get(job.id) for job in final] == [None] * 3
    assert ids(await kept.ledger.page()) == [recent.id, waiting.id, active.id]
    for job in final:
        with pytest.raises(JobNotFoundError):
            await kept.ledger.retry(job.id)


async def test_a_prune_is_limited(kept: Kept) -> None:
    """Those go first that are final for longest, whatever their age; the next takes the rest."""
    claims = [await kept.accept_and_claim() for _ in range(5)]
    for claim in reversed(claims):
        await kept.ledger.settle([completed(claim, b"1")])
        await kept.pass_time()
    await kept.pass_time()
    first = await kept.ledger.prune(0.0, 3)
    left = ids(await kept.ledger.page())
    rest = [await kept.ledger.prune(0.0, 3), await kept.ledger.prune(0.0, 3)]

    assert (first, rest) == (3, [2, 0])
    assert left == [claims[1].id, claims[0].id]
    assert await totals(kept) == QueueCounts(completed=5)


async def test_a_retried_job_is_not_pruned(kept: Kept) -> None:
    """Neither while it waits nor for its first end, once it ended again."""
    job = await kept.in_state(JobState.FAILED)
    await kept.pass_time()
    await kept.ledger.retry(job.id)
    while_waiting = await kept.ledger.prune(0.0)
    (claim,) = await kept.claim()
    while_active = await kept.ledger.prune(0.0)
    await kept.ledger.settle([completed(claim, b"1")])

    assert (while_waiting, while_active) == (0, 0)
    assert await kept.ledger.prune(60.0) == 0
    assert await kept.until(lambda: kept.ledger.prune(0.0)) == 1


async def test_a_pruned_key_is_free(kept: Kept) -> None:
    """A key is kept as long as its job."""
    await kept.in_state(JobState.COMPLETED, key="key")
    await kept.until(lambda: kept.ledger.prune(0.0))
    (accepted,) = await kept.ledger.accept([draft(key="key")])

    assert accepted.created
    assert await totals(kept) == QueueCounts(waiting=1, completed=1)


@pytest.mark.parametrize("turns", TURNS)
async def test_pruning_that_is_cancelled_keeps_the_counts(kept: Kept, turns: int) -> None:
    """Cut at any moment; the next prunes what is left."""
    for _ in range(3):
        await kept.in_state(JobState.COMPLETED)
    await kept.pass_time()
    await cut(kept.ledger.prune(0.0), turns)
    left = len(await kept.ledger.page())
    between = await totals(kept)
    pruned = await kept.ledger.prune(0.0)

    assert left == pruned
    assert left in (0, 3)
    assert between == await totals(kept) == QueueCounts(completed=3)


async def test_prunes_at_once_count_each_job_once(kept: Kept) -> None:
    """Several workers do it at the same time."""
    for _ in range(20):
        await kept.in_state(JobState.COMPLETED)
    await kept.pass_time()
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        calls = [group.create_task(kept.ledger.prune(0.0)) for _ in range(4)]
    rest = await kept.ledger.prune(0.0)

    assert sum(call.result() for call in calls) + rest == 20
    assert await totals(kept) == QueueCounts(completed=20)
