"""The contract of ``JobLedger``: a sweep takes the jobs of dead workers, each once."""

import asyncio
from collections import Counter

import pytest
from tests.contracts.ledgers import (
    LONG_LEASE,
    SHORT_LEASE,
    TURNS,
    LedgerCase,
    cancelled_after,
    later,
)

from viralfx.jobs.model import Claim, JobState, completed


async def test_a_sweep_takes_the_jobs_of_dead_workers(case: LedgerCase) -> None:
    """In every queue; they keep their places, the crash counts and no attempt is spent."""
    queues = {"default": ["dead", "dead", "alive"], "analytics": ["dead"]}
    claims: list[Claim] = []
    for queue, workers in queues.items():
        for worker in workers:
            await case.accept(queue=queue)
            claims += await case.claim(worker=worker, queue=queue)
    await case.pass_time()
    (behind,) = await case.accept()
    await case.expire("dead")
    before = [await case.job(claim.id) for claim in claims]
    swept = await case.ledger.sweep(5)
    after = [await case.job(claim.id) for claim in claims]

    assert {queue: sorted(ids) for queue, ids in swept.returned.items()} == {
        "default": [claims[0].id, claims[1].id],
        "analytics": [claims[3].id],
    }
    assert list(swept.crashed) == []
    assert after[2] == before[2]
    for old, new in zip(before, after, strict=True):
        if old.worker == "dead":
            assert (new.state, new.worker, new.crashes) == (JobState.WAITING, None, 1)
            assert (new.attempts, new.claims, new.run_at) == (0, 1, old.run_at)
            assert new.finished_at is None
    again = await case.claim(3)
    assert [claim.id for claim in again] == [claims[0].id, claims[1].id, behind.id]
    assert [(claim.number, claim.attempt, claim.crashes) for claim in again[:2]] == [(2, 1, 1)] * 2


async def test_a_sweep_without_dead_workers_does_nothing(case: LedgerCase) -> None:
    """Waiting and final jobs do not change."""
    await case.accept_and_claim()
    await case.in_state(JobState.FAILED)
    await case.accept()
    before = await case.ledger.page()
    swept = [await case.ledger.sweep(1) for _ in range(3)]

    assert [(dict(each.returned), list(each.crashed)) for each in swept] == [({}, [])] * 3
    assert await case.ledger.page() == before


async def test_a_renewed_lease_keeps_all_jobs(case: LedgerCase) -> None:
    """For longer than one lease."""
    claims = [await case.accept_and_claim(lease=SHORT_LEASE) for _ in range(3)]
    until = case.now().timestamp() + 3 * SHORT_LEASE
    swept = []

    async def renewed_for_long() -> bool:
        await case.ledger.register("w", ["default"], LONG_LEASE)
        swept.append(await case.ledger.sweep(5))
        return case.now().timestamp() > until

    await case.until(renewed_for_long)

    assert not any(each.returned or each.crashed for each in swept)
    assert set(await case.ledger.settle([completed(claim, b"1") for claim in claims])) == {
        claim.id for claim in claims
    }


async def test_a_lease_renewed_before_the_sweep_is_valid(case: LedgerCase) -> None:
    """A worker that was late loses nothing."""
    claim = await case.accept_and_claim()
    await case.expire()
    await case.ledger.register("w", ["default"], LONG_LEASE)
    swept = await case.ledger.sweep(5)

    assert (dict(swept.returned), list(swept.crashed)) == ({}, [])
    assert (await case.job(claim.id)).state is JobState.ACTIVE


async def test_a_late_worker_may_settle_until_the_sweep(case: LedgerCase) -> None:
    """Afterwards the ledger skips its settlements."""
    first, second = [await case.accept_and_claim() for _ in range(2)]
    await case.expire()
    before = await case.ledger.settle([completed(first, b"1")])
    swept = await case.ledger.sweep(5)
    after = await case.ledger.settle([completed(second, b"2")])

    assert (set(before), set(after)) == ({first.id}, set())
    assert {queue: list(ids) for queue, ids in swept.returned.items()} == {"default": [second.id]}
    assert (await case.job(second.id)).state is JobState.WAITING


async def test_registering_after_the_sweep_returns_no_jobs(case: LedgerCase) -> None:
    """The next claim gets them."""
    old = await case.accept_and_claim()
    await case.expire()
    await case.ledger.sweep(5)
    (new,) = await case.claim()

    assert set(await case.ledger.settle([completed(old, b"1")])) == set()
    assert set(await case.ledger.settle([completed(new, b"2")])) == {new.id}
    assert (await case.job(new.id)).crashes == 1


async def test_an_unregistered_worker_is_swept_at_once(case: LedgerCase) -> None:
    """It has no lease that could expire."""
    (job,) = await case.accept()
    claims = await case.ledger.claim("default", "stranger", 1)
    swept = await case.ledger.sweep(5)

    assert [job_id for ids in swept.returned.values() for job_id in ids] == [
        claim.id for claim in claims
    ]
    assert (await case.job(job.id)).state is JobState.WAITING


async def test_a_job_that_crashes_workers_fails(case: LedgerCase) -> None:
    """At ``max_crashes``; until then it is due again, its attempt unspent."""
    (job,) = await case.accept()
    seen = []
    for number in range(3):
        (claim,) = await case.claim(worker=f"worker-{number}")
        seen.append((claim.number, claim.attempt, claim.crashes))
        await case.expire(f"worker-{number}")
        swept = await case.ledger.sweep(3)
        assert [*swept.returned.get("default", ()), *swept.crashed] == [job.id]
        assert list(swept.crashed) == ([job.id] if number == 2 else [])
    given_up = await case.job(job.id)
    counts = (await case.ledger.counts())["default"]

    assert seen == [(1, 1, 0), (2, 1, 1), (3, 1, 2)]
    assert (given_up.state, given_up.crashes, given_up.attempts) == (JobState.FAILED, 3, 0)
    assert given_up.error is not None
    assert given_up.error.code == "crashed"
    assert given_up.error.message == (
        "the lease of 3 workers ran out while they ran it; the last was worker-2"
    )
    assert given_up.finished_at is not None
    assert (given_up.worker, given_up.result) == (None, None)
    assert (counts.waiting, counts.active, counts.failed) == (0, 0, 1)


async def test_crashes_count_for_each_job(case: LedgerCase) -> None:
    """Jobs of one sweep may end differently."""
    old = await case.accept_and_claim(worker="first")
    await case.expire("first")
    await case.ledger.sweep(2)
    await case.claim(worker="second")
    new = await case.accept_and_claim(worker="second")
    await case.expire("second")
    swept = await case.ledger.sweep(2)

    assert {queue: list(ids) for queue, ids in swept.returned.items()} == {"default": [new.id]}
    assert list(swept.crashed) == [old.id]


async def test_concurrent_sweeps_count_each_crash_once(case: LedgerCase) -> None:
    """One of them returns each job."""
    claims = [await case.accept_and_claim() for _ in range(20)]
    await case.expire()
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        calls = [group.create_task(case.ledger.sweep(5)) for _ in range(8)]
    returned = Counter(
        job_id for call in calls for ids in call.result().returned.values() for job_id in ids
    )

    assert returned == Counter(claim.id for claim in claims)
    assert {(await case.job(claim.id)).crashes for claim in claims} == {1}


async def test_a_concurrent_sweep_and_settlement_agree(case: LedgerCase) -> None:
    """A job is either settled or due again, as both results say."""
    claims = [await case.accept_and_claim() for _ in range(20)]
    await case.expire()
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        settling = [group.create_task(case.ledger.settle([completed(c, b"1")])) for c in claims]
        sweeping = group.create_task(case.ledger.sweep(5))
    done = {job_id for call in settling for job_id in call.result()}
    # A sweep may skip a job that is being settled; the next sweep takes it.
    swept = [*sweeping.result().returned.get("default", ())]
    swept += (await case.ledger.sweep(5)).returned.get("default", ())

    assert sorted([*done, *swept]) == [claim.id for claim in claims]
    for claim in claims:
        state = JobState.COMPLETED if claim.id in done else JobState.WAITING
        assert (await case.job(claim.id)).state is state


@pytest.mark.parametrize("turns", TURNS)
async def test_a_cancelled_sweep_counts_a_crash_at_most_once(case: LedgerCase, turns: int) -> None:
    """The next one takes the rest."""
    claims = [await case.accept_and_claim() for _ in range(3)]
    await case.expire()
    await cancelled_after(case.ledger.sweep(5), turns)
    await case.ledger.sweep(5)
    jobs = [await case.job(claim.id) for claim in claims]

    assert [(job.state, job.crashes) for job in jobs] == [(JobState.WAITING, 1)] * 3


async def test_a_sweep_after_its_deadline_does_nothing(case: LedgerCase) -> None:
    """Before it, it works as usual."""
    claim = await case.accept_and_claim()
    ends = (await case.ledger.register("sweeper", ["default"], LONG_LEASE)).lease_until
    await case.expire()
    begun = case.now()
    late = [await case.ledger.sweep(5, moment) for moment in (begun, later(begun, -LONG_LEASE))]
    untouched = await case.job(claim.id)
    in_time = await case.ledger.sweep(5, ends)

    assert [(dict(each.returned), list(each.crashed)) for each in late] == [({}, [])] * 2
    assert (untouched.state, untouched.worker, untouched.crashes) == (JobState.ACTIVE, "w", 0)
    assert {queue: list(ids) for queue, ids in in_time.returned.items()} == {"default": [claim.id]}
