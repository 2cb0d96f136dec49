"""The contract of ``JobLedger``: the jobs of workers that died are swept up, each once."""

import asyncio
from collections import Counter

import pytest
from tests.contracts.ledgers import LONG, SHORT, TURNS, Kept, cut, later

from viralfx.domain.jobs.job import Claim, JobState, completed


async def test_a_sweep_takes_the_jobs_of_who_died(kept: Kept) -> None:
    """Of every queue; they wait in their old places, the crash counted and no attempt spent."""
    queues = {"default": ["dead", "dead", "alive"], "analytics": ["dead"]}
    claims: list[Claim] = []
    for queue, workers in queues.items():
        for worker in workers:
            await kept.accept(queue=queue)
            claims += await kept.claim(worker=worker, queue=queue)
    await kept.pass_time()
    (behind,) = await kept.accept()
    await kept.expire("dead")
    before = [await kept.job(claim.id) for claim in claims]
    swept = await kept.ledger.sweep(5)
    after = [await kept.job(claim.id) for claim in claims]

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
    again = await kept.claim(3)
    assert [claim.id for claim in again] == [claims[0].id, claims[1].id, behind.id]
    assert [(claim.number, claim.attempt, claim.crashes) for claim in again[:2]] == [(2, 1, 1)] * 2


async def test_a_sweep_does_nothing_where_nobody_died(kept: Kept) -> None:
    """However often; what waits or is done is none of its business."""
    await kept.accept_and_claim()
    await kept.in_state(JobState.FAILED)
    await kept.accept()
    before = await kept.ledger.page()
    swept = [await kept.ledger.sweep(1) for _ in range(3)]

    assert [(dict(each.returned), list(each.crashed)) for each in swept] == [({}, [])] * 3
    assert await kept.ledger.page() == before


async def test_a_renewed_lease_keeps_all_jobs(kept: Kept) -> None:
    """Longer than the lease itself, as long as it is renewed."""
    claims = [await kept.accept_and_claim(lease=SHORT) for _ in range(3)]
    until = kept.now().timestamp() + 3 * SHORT
    swept = []

    async def renewed_for_long() -> bool:
        await kept.ledger.register("w", ["default"], LONG)
        swept.append(await kept.ledger.sweep(5))
        return kept.now().timestamp() > until

    await kept.until(renewed_for_long)

    assert not any(each.returned or each.crashed for each in swept)
    assert set(await kept.ledger.settle([completed(claim, b"1") for claim in claims])) == {
        claim.id for claim in claims
    }


async def test_a_lease_that_is_renewed_before_the_sweep_is_good(kept: Kept) -> None:
    """A worker that was late, not dead, loses nothing."""
    claim = await kept.accept_and_claim()
    await kept.expire()
    await kept.ledger.register("w", ["default"], LONG)
    swept = await kept.ledger.sweep(5)

    assert (dict(swept.returned), list(swept.crashed)) == ({}, [])
    assert (await kept.job(claim.id)).state is JobState.ACTIVE


async def test_who_is_late_may_settle_until_the_sweep(kept: Kept) -> None:
    """Its work counts as long as nobody else was told to do it, and no longer."""
    first, second = [await kept.accept_and_claim() for _ in range(2)]
    await kept.expire()
    before = await kept.ledger.settle([completed(first, b"1")])
    swept = await kept.ledger.sweep(5)
    after = await kept.ledger.settle([completed(second, b"2")])

    assert (set(before), set(after)) == ({first.id}, set())
    assert {queue: list(ids) for queue, ids in swept.returned.items()} == {"default": [second.id]}
    assert (await kept.job(second.id)).state is JobState.WAITING


async def test_registering_after_the_sweep_brings_nothing_back(kept: Kept) -> None:
    """What was swept belongs to whoever claims it next."""
    old = await kept.accept_and_claim()
    await kept.expire()
    await kept.ledger.sweep(5)
    (new,) = await kept.claim()

    assert set(await kept.ledger.settle([completed(old, b"1")])) == set()
    assert set(await kept.ledger.settle([completed(new, b"2")])) == {new.id}
    assert (await kept.job(new.id)).crashes == 1


async def test_who_never_registered_is_swept_at_once(kept: Kept) -> None:
    """Nobody would notice its death."""
    (job,) = await kept.accept()
    claims = await kept.ledger.claim("default", "stranger", 1)
    swept = await kept.ledger.sweep(5)

    assert [job_id for ids in swept.returned.values() for job_id in ids] == [
        claim.id for claim in claims
    ]
    assert (await kept.job(job.id)).state is JobState.WAITING


async def test_a_job_that_kills_workers_is_given_up(kept: Kept) -> None:
    """At the bound; until then it is given again, and no attempt is spent by any crash."""
    (job,) = await kept.accept()
    seen = []
    for number in range(3):
        (claim,) = await kept.claim(worker=f"worker-{number}")
        seen.append((claim.number, claim.attempt, claim.crashes))
        await kept.expire(f"worker-{number}")
        swept = await kept.ledger.sweep(3)
        assert [*swept.returned.get("default", ()), *swept.crashed] == [job.id]
        assert list(swept.crashed) == ([job.id] if number == 2 else [])
    given_up = await kept.job(job.id)
    counts = (await kept.ledger.counts())["default"]

    assert seen == [(1, 1, 0), (2, 1, 1), (3, 1, 2)]
    assert (given_up.state, given_up.crashes, given_up.attempts) == (JobState.FAILED, 3, 0)
    assert given_up.error is not None
    assert given_up.error.code == "crashed"
    assert given_up.error.message
    assert given_up.finished_at is not None
    assert (given_up.worker, given_up.result) == (None, None)
    assert (counts.waiting, counts.active, counts.failed) == (0, 0, 1)


async def test_each_job_has_its_own_crashes(kept: Kept) -> None:
    """Those of one sweep may end differently."""
    old = await kept.accept_and_claim(worker="first")
    await kept.expire("first")
    await kept.ledger.sweep(2)
    await kept.claim(worker="second")
    new = await kept.accept_and_claim(worker="second")
    await kept.expire("second")
    swept = await kept.ledger.sweep(2)

    assert {queue: list(ids) for queue, ids in swept.returned.items()} == {"default": [new.id]}
    assert list(swept.crashed) == [old.id]


async def test_many_sweeps_at_once_count_each_crash_once(kept: Kept) -> None:
    """Each job is returned by one of them."""
    claims = [await kept.accept_and_claim() for _ in range(20)]
    await kept.expire()
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        calls = [group.create_task(kept.ledger.sweep(5)) for _ in range(8)]
    returned = Counter(
        job_id for call in calls for ids in call.result().returned.values() for job_id in ids
    )

    assert returned == Counter(claim.id for claim in claims)
    assert {(await kept.job(claim.id)).crashes for claim in claims} == {1}


async def test_a_sweep_and_a_settlement_at_once_agree(kept: Kept) -> None:
    """Each job is either done or waits, as those who did it were told."""
    claims = [await kept.accept_and_claim() for _ in range(20)]
    await kept.expire()
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        settling = [group.create_task(kept.ledger.settle([completed(c, b"1")])) for c in claims]
        sweeping = group.create_task(kept.ledger.sweep(5))
    done = {job_id for call in settling for job_id in call.result()}
    # A sweep may pass over what is just being settled; whatever is left is the next one's.
    swept = [*sweeping.result().returned.get("default", ())]
    swept += (await kept.ledger.sweep(5)).returned.get("default", ())

    assert sorted([*done, *swept]) == [claim.id for claim in claims]
    for claim in claims:
        state = JobState.COMPLETED if claim.id in done else JobState.WAITING
        assert (await kept.job(claim.id)).state is state


@pytest.mark.parametrize("turns", TURNS)
async def test_a_sweep_that_is_cancelled_counts_a_crash_at_most_once(
    kept: Kept, turns: int
) -> None:
    """Cut at any moment; the next does what is left."""
    claims = [await kept.accept_and_claim() for _ in range(3)]
    await kept.expire()
    await cut(kept.ledger.sweep(5), turns)
    await kept.ledger.sweep(5)
    jobs = [await kept.job(claim.id) for claim in claims]

    assert [(job.state, job.crashes) for job in jobs] == [(JobState.WAITING, 1)] * 3


async def test_a_sweep_that_comes_too_late_does_nothing(kept: Kept) -> None:
    """Before the moment it was given it does its work, from then on it takes nobody's job."""
    claim = await kept.accept_and_claim()
    ends = await kept.ledger.register("sweeper", ["default"], LONG)
    await kept.expire()
    begun = kept.now()
    late = [await kept.ledger.sweep(5, moment) for moment in (begun, later(begun, -LONG))]
    untouched = await kept.job(claim.id)
    in_time = await kept.ledger.sweep(5, ends)

    assert [(dict(each.returned), list(each.crashed)) for each in late] == [({}, [])] * 2
    assert (untouched.state, untouched.worker, untouched.crashes) == (JobState.ACTIVE, "w", 0)
    assert {queue: list(ids) for queue, ids in in_time.returned.items()} == {"default": [claim.id]}
