"""The contract of ``JobLedger``: each job counts in one state, also after it was pruned."""

import asyncio

import pytest
from tests.contracts.ledgers import TURNS, LedgerCase, cancelled_after, draft, ids, later, totals

from viralfx.jobs.ledger import JobLedger, QueueCounts
from viralfx.jobs.model import JobNotFoundError, JobState, completed


async def test_an_empty_ledger_has_no_counts(ledger: JobLedger) -> None:
    """Not even for queues."""
    assert dict(await ledger.counts()) == {}


async def test_jobs_are_counted_by_state(case: LedgerCase) -> None:
    """Each in one state of its queue; scheduled jobs are counted separately."""
    wanted = {JobState.COMPLETED: 4, JobState.FAILED: 3, JobState.CANCELLED: 2, JobState.ACTIVE: 1}
    for state, count in wanted.items():
        for _ in range(count):
            await case.in_state(state)
    await case.accept(5)
    await case.accept(6, run_at=later(case.now(), 99))
    await case.accept(queue="analytics")

    assert await totals(case) == QueueCounts(
        waiting=5, scheduled=6, active=1, completed=4, failed=3, cancelled=2
    )
    assert await totals(case, "analytics") == QueueCounts(waiting=1)
    assert set(await case.ledger.counts()) == {"default", "analytics"}


async def test_a_scheduled_job_counts_as_waiting_when_it_is_due(case: LedgerCase) -> None:
    """Without any call."""
    await case.accept(run_at=later(case.now(), 3.0))
    before = await totals(case)

    async def due() -> bool:
        return await totals(case) == QueueCounts(waiting=1)

    await case.until(due)

    assert before == QueueCounts(scheduled=1)


async def test_oldest_due_is_the_longest_wait(case: LedgerCase) -> None:
    """Of due jobs; zero if none is due."""
    await case.accept(run_at=later(case.now(), 99))
    nothing = (await case.ledger.counts())["default"].oldest_due
    (oldest,) = await case.accept()

    async def a_while() -> bool:
        return (case.now() - oldest.run_at).total_seconds() > 0.2

    await case.until(a_while)
    (next_one,) = await case.accept()
    waited = (await case.ledger.counts())["default"].oldest_due
    most = (case.now() - oldest.run_at).total_seconds()
    await case.claim()
    left = (await case.ledger.counts())["default"].oldest_due

    assert nothing == 0.0
    assert 0.2 < waited <= most
    assert left <= (case.now() - next_one.run_at).total_seconds()


async def test_a_retried_job_counts_in_its_final_state(case: LedgerCase) -> None:
    """A failed job that is retried and completes counts as completed only."""
    job = await case.in_state(JobState.FAILED)
    once_failed = await totals(case)
    await case.ledger.retry(job.id)
    once_retried = await totals(case)
    (claim,) = await case.claim()
    await case.ledger.settle([completed(claim, b"1")])

    assert once_failed == QueueCounts(failed=1)
    assert once_retried == QueueCounts(waiting=1)
    assert await totals(case) == QueueCounts(completed=1)


# -- prune -----------------------------------------------------------------------------------


async def test_old_final_jobs_are_pruned(case: LedgerCase) -> None:
    """The counts stay, and so do other jobs."""
    final = [await case.in_state(state) for state in JobState if state.final]
    active = await case.in_state(JobState.ACTIVE)
    await case.pass_time()
    (waiting,) = await case.accept()
    too_early = await case.ledger.prune(60.0)

    async def a_while() -> bool:
        return (case.now() - waiting.created_at).total_seconds() > 1.0

    await case.until(a_while)
    await case.claim()
    recent = await case.in_state(JobState.COMPLETED)
    pruned = await case.ledger.prune((case.now() - waiting.created_at).total_seconds())
    expected = QueueCounts(active=2, completed=2, failed=1, cancelled=1)

    assert (too_early, pruned) == (0, 3)
    assert await totals(case) == expected
    assert [await case.ledger.get(job.id) for job in final] == [None] * 3
    assert ids(await case.ledger.page()) == [recent.id, waiting.id, active.id]
    for job in final:
        with pytest.raises(JobNotFoundError):
            await case.ledger.retry(job.id)


async def test_a_prune_is_limited(case: LedgerCase) -> None:
    """It takes the jobs that have been final for longest; the next call takes the rest."""
    claims = [await case.accept_and_claim() for _ in range(5)]
    for claim in reversed(claims):
        await case.ledger.settle([completed(claim, b"1")])
        await case.pass_time()
    await case.pass_time()
    first = await case.ledger.prune(0.0, 3)
    left = ids(await case.ledger.page())
    rest = [await case.ledger.prune(0.0, 3), await case.ledger.prune(0.0, 3)]

    assert (first, rest) == (3, [2, 0])
    assert left == [claims[1].id, claims[0].id]
    assert await totals(case) == QueueCounts(completed=5)


@pytest.mark.parametrize("failed", [True, False])
async def test_failed_jobs_are_pruned_apart(case: LedgerCase, *, failed: bool) -> None:
    """The others stay, and so do the counts."""
    final = [await case.in_state(state) for state in JobState if state.final]
    before = await totals(case)
    await case.pass_time()
    pruned = await case.until(lambda: case.ledger.prune(0.0, failed=failed))
    kept = [job for job in final if (job.state is JobState.FAILED) is not failed]

    assert pruned == len(final) - len(kept)
    assert ids(await case.ledger.page()) == ids(kept)[::-1]
    assert await totals(case) == before


async def test_a_retried_job_is_not_pruned(case: LedgerCase) -> None:
    """Its age starts when it becomes final again."""
    job = await case.in_state(JobState.FAILED)
    await case.pass_time()
    await case.ledger.retry(job.id)
    while_waiting = await case.ledger.prune(0.0)
    (claim,) = await case.claim()
    while_active = await case.ledger.prune(0.0)
    await case.ledger.settle([completed(claim, b"1")])

    assert (while_waiting, while_active) == (0, 0)
    assert await case.ledger.prune(60.0) == 0
    assert await case.until(lambda: case.ledger.prune(0.0)) == 1


async def test_a_pruned_key_is_free(case: LedgerCase) -> None:
    """A key is reserved as long as its job exists."""
    await case.in_state(JobState.COMPLETED, key="key")
    await case.until(lambda: case.ledger.prune(0.0))
    (accepted,) = await case.ledger.accept([draft(key="key")])

    assert accepted.created
    assert await totals(case) == QueueCounts(waiting=1, completed=1)


@pytest.mark.parametrize("turns", TURNS)
async def test_a_cancelled_prune_keeps_the_counts(case: LedgerCase, turns: int) -> None:
    """The next call prunes the rest."""
    for _ in range(3):
        await case.in_state(JobState.COMPLETED)
    await case.pass_time()
    await cancelled_after(case.ledger.prune(0.0), turns)
    left = len(await case.ledger.page())
    between = await totals(case)
    pruned = await case.ledger.prune(0.0)

    assert left == pruned
    assert left in (0, 3)
    assert between == await totals(case) == QueueCounts(completed=3)


async def test_concurrent_prunes_count_each_job_once(case: LedgerCase) -> None:
    """Several workers may prune at the same time."""
    for _ in range(20):
        await case.in_state(JobState.COMPLETED)
    await case.pass_time()
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        calls = [group.create_task(case.ledger.prune(0.0)) for _ in range(4)]
    rest = await case.ledger.prune(0.0)

    assert sum(call.result() for call in calls) + rest == 20
    assert await totals(case) == QueueCounts(completed=20)
