"""The contract of ``JobLedger``: leases of workers, and the jobs that they hand back."""

import math

import pytest
from tests.contracts.ledgers import (
    LONG_LEASE,
    SHORT_LEASE,
    TURNS,
    LedgerCase,
    cancelled_after,
    later,
)

from viralfx.jobs.ledger import JobLedger
from viralfx.jobs.model import Claim, JobState, completed


async def _consumers(ledger: JobLedger) -> dict[str, int]:
    counts = await ledger.counts()
    return {name: it.consumers for name, it in counts.items() if it.consumers}


# -- consumers -------------------------------------------------------------------------------


async def test_consumers_whose_event_loop_is_blocked_are_counted(case: LedgerCase) -> None:
    """Until their next renewal without a block."""
    await case.ledger.register("w", ["default"], LONG_LEASE, eligible=False)
    await case.ledger.register("v", ["default"], LONG_LEASE)
    blocked = (await case.ledger.counts())["default"]
    await case.ledger.register("w", ["default"], LONG_LEASE)
    free = (await case.ledger.counts())["default"]

    assert (blocked.consumers, blocked.blocked) == (2, 1)
    assert (free.consumers, free.blocked) == (2, 0)


async def test_a_worker_counts_for_the_queues_it_consumes(ledger: JobLedger) -> None:
    """Also if a queue never had a job; the last registration counts."""
    await ledger.register("a", ["default", "analytics"], LONG_LEASE)
    await ledger.register("b", ["default"], LONG_LEASE)
    first = await _consumers(ledger)
    await ledger.register("a", ["notifications"], LONG_LEASE)
    second = await _consumers(ledger)
    await ledger.deregister("b")

    assert first == {"default": 2, "analytics": 1}
    assert second == {"default": 1, "notifications": 1}
    assert await _consumers(ledger) == {"notifications": 1}


async def test_a_worker_counts_while_its_lease_is_valid(case: LedgerCase) -> None:
    """Without a sweep, and again after it registers again."""
    await case.ledger.register("a", ["default"], LONG_LEASE)
    await case.ledger.register("b", ["default"], SHORT_LEASE)

    async def one() -> bool:
        return await _consumers(case.ledger) == {"default": 1}

    await case.until(one)
    await case.ledger.register("b", ["default"], LONG_LEASE)

    assert await _consumers(case.ledger) == {"default": 2}


# -- place among the workers ------------------------------------------------------------------


async def test_the_smallest_name_leads(ledger: JobLedger) -> None:
    """In the order of code points; each learns it at its own registration."""
    for name, others, leads in (("b", 0, True), ("B", 1, True), ("é", 2, False), ("b", 2, False)):
        found = await ledger.register(name, ["default"], LONG_LEASE)
        assert (found.workers, found.leader) == (1 + others, leads), name
    await ledger.deregister("B")

    assert (await ledger.register("b", ["default"], LONG_LEASE)).leader


async def test_only_workers_that_share_a_queue_count(ledger: JobLedger) -> None:
    """The leader leads all of them."""
    await ledger.register("a", ["default", "analytics"], LONG_LEASE)
    await ledger.register("b", ["other"], LONG_LEASE)
    found = {
        name: await ledger.register(name, queues, LONG_LEASE)
        for name, queues in {"c": ["analytics", "third"], "d": ["other"], "e": ["alone"]}.items()
    }

    assert {name: each.workers for name, each in found.items()} == {"c": 2, "d": 2, "e": 1}
    assert not any(each.leader for each in found.values())


async def test_a_worker_that_is_not_eligible_does_not_lead(ledger: JobLedger) -> None:
    """It counts as a worker, and leads again once it is eligible."""
    await ledger.register("a", ["default"], LONG_LEASE)
    first = await ledger.register("a", ["default"], LONG_LEASE, eligible=False)
    second = await ledger.register("b", ["default"], LONG_LEASE)
    third = await ledger.register("a", ["default"], LONG_LEASE)

    assert [(each.workers, each.leader) for each in (first, second, third)] == [
        (1, False),
        (2, True),
        (2, True),
    ]


async def test_a_worker_without_a_valid_lease_does_not_lead(case: LedgerCase) -> None:
    """Nor does it count."""
    await case.expire("a")
    found = await case.ledger.register("b", ["default"], LONG_LEASE)

    assert (found.workers, found.leader, found.leader_for) == (1, True, math.inf)


async def test_a_worker_learns_when_the_lease_of_the_leader_ends(ledger: JobLedger) -> None:
    """Then it leads itself, without another registration."""
    await ledger.register("a", ["default"], 30.0)
    await ledger.register("b", ["default"], 20.0)
    await ledger.register("c", ["default"], 10.0, eligible=False)
    third = await ledger.register("d", ["default"], 10.0)
    blocked = await ledger.register("a", ["default"], 30.0, eligible=False)

    assert (third.leader, blocked.leader) == (False, False)
    assert third.leader_for == pytest.approx(30.0, abs=5.0)
    assert blocked.leader_for == pytest.approx(20.0, abs=5.0)


# -- jobs of a worker ------------------------------------------------------------------------


async def test_a_job_of_a_lost_claim_response_is_returned(case: LedgerCase) -> None:
    """A renewal lists the jobs that the worker has; others are due again at no cost."""
    lost, known = [await case.accept_and_claim() for _ in range(2)]
    before = await case.job(lost.id)

    async def returned() -> bool:
        await case.ledger.register("w", ["default"], SHORT_LEASE, [known.id])
        return (await case.job(lost.id)).state is JobState.WAITING

    await case.until(returned)
    job = await case.job(lost.id)
    waited = (case.now() - before.created_at).total_seconds()

    assert waited > SHORT_LEASE
    assert (job.attempts, job.crashes, job.claims, job.worker) == (0, 0, 1, None)
    assert (job.run_at, job.error) == (before.run_at, None)
    assert (await case.job(known.id)).state is JobState.ACTIVE
    assert set(await case.ledger.settle([completed(lost, b"1"), completed(known, b"1")])) == {
        known.id
    }
    assert [claim.id for claim in await case.claim()] == [lost.id]


async def test_a_recent_claim_survives_a_renewal(case: LedgerCase) -> None:
    """The response to it may still be under way."""
    claim = await case.accept_and_claim()
    others = await case.accept_and_claim(worker="other")
    await case.ledger.register("w", ["default"], LONG_LEASE, [])
    await case.ledger.register("w", ["default"], LONG_LEASE)

    assert (await case.job(claim.id)).state is JobState.ACTIVE
    assert (await case.job(others.id)).state is JobState.ACTIVE


async def test_a_worker_releases_all_other_jobs_at_once(case: LedgerCase) -> None:
    """Without a grace: from every queue, at no cost, in their old places. None without a list."""
    await case.accept(3)
    await case.accept(queue="analytics")
    (cancelled,) = await case.accept()
    claims = await case.claim(4)
    (elsewhere,) = await case.claim(queue="analytics")
    others = await case.accept_and_claim(worker="other")
    await case.ledger.cancel(cancelled.id, running=True)
    await case.ledger.register("w", ["default"], LONG_LEASE, grace=0.0)
    assert [(await case.job(claim.id)).state for claim in claims] == [JobState.ACTIVE] * 4
    kept, *released, _ = claims
    before = await case.job(released[0].id)
    await case.ledger.register("w", ["default"], LONG_LEASE, [kept.id], grace=0.0)
    job = await case.job(released[0].id)

    assert (job.state, job.worker, job.history) == (JobState.WAITING, None, ())
    assert (job.attempts, job.crashes, job.claims) == (0, 0, 1)
    assert (job.run_at, job.error) == (before.run_at, None)
    assert (await case.job(elsewhere.id)).state is JobState.WAITING
    assert (await case.job(kept.id)).state is JobState.ACTIVE
    assert (await case.job(others.id)).state is JobState.ACTIVE
    await case.ledger.sweep(5)
    assert (await case.job(cancelled.id)).state is JobState.CANCELLED
    late = [completed(claim, b"1") for claim in claims]
    assert set(await case.ledger.settle(late)) == {kept.id}
    again = await case.claim(2, worker="other")
    assert [(claim.id, claim.number, claim.attempt) for claim in again] == [
        (claim.id, 2, 1) for claim in released
    ]


async def test_a_renewal_affects_the_workers_own_jobs_only(case: LedgerCase) -> None:
    """And none at all without a list of jobs."""
    silent = await case.accept_and_claim(worker="silent")
    claim = await case.accept_and_claim(worker="w")

    async def returned() -> bool:
        await case.ledger.register("silent", ["default"], SHORT_LEASE)
        await case.ledger.register("w", ["default"], SHORT_LEASE, [silent.id, "nonsense", "\x00"])
        return (await case.job(claim.id)).state is JobState.WAITING

    await case.until(returned)

    assert (await case.job(silent.id)).state is JobState.ACTIVE


# -- deregister ------------------------------------------------------------------------------


async def test_deregistering_hands_back_all_jobs(case: LedgerCase) -> None:
    """From every queue, in their old places; jobs of other workers stay."""
    queues = {"default": ["leaver", "leaver", "other"], "analytics": ["leaver"]}
    claims: list[Claim] = []
    for queue, workers in queues.items():
        for worker in workers:
            await case.accept(queue=queue)
            claims += await case.claim(worker=worker, queue=queue)
    await case.ledger.settle([completed(claims[0], b"1")])
    await case.pass_time()
    await case.accept()
    returned = await case.ledger.deregister("leaver")
    job = await case.job(claims[1].id)

    assert {queue: list(ids) for queue, ids in returned.items()} == {
        "default": [claims[1].id],
        "analytics": [claims[3].id],
    }
    assert (job.state, job.worker, job.attempts, job.crashes) == (JobState.WAITING, None, 0, 0)
    assert (job.claims, job.finished_at) == (1, None)
    assert (await case.job(claims[2].id)).state is JobState.ACTIVE
    assert [claim.id for claim in await case.claim()] == [claims[1].id]


async def test_deregistering_twice_or_unknown_does_nothing(case: LedgerCase) -> None:
    """No sweep finds anything afterwards."""
    claim = await case.accept_and_claim(worker="leaver")
    await case.ledger.deregister("leaver")
    (new,) = await case.claim(worker="other")

    assert dict(await case.ledger.deregister("leaver")) == {}
    assert dict(await case.ledger.deregister("stranger")) == {}
    assert dict((await case.ledger.sweep(5)).returned) == {}
    assert set(await case.ledger.settle([completed(claim, b"1")])) == set()
    assert (await case.job(new.id)).worker == "other"


@pytest.mark.parametrize("turns", TURNS)
async def test_a_cancelled_deregistration_can_be_repeated(case: LedgerCase, turns: int) -> None:
    """It loses no job."""
    claims = [await case.accept_and_claim() for _ in range(3)]
    await cancelled_after(case.ledger.deregister("w"), turns)
    await case.ledger.deregister("w")

    assert {(await case.job(claim.id)).state for claim in claims} == {JobState.WAITING}
    assert await _consumers(case.ledger) == {}


async def test_registering_returns_the_end_of_the_lease(case: LedgerCase) -> None:
    """By the ledger's time, at each renewal."""
    variants: list[list[str] | None] = [None, [], None]
    for holding in variants:
        before = case.now()
        found = await case.ledger.register("w", ["default"], LONG_LEASE, holding)
        ends = found.lease_until

        assert later(before, LONG_LEASE) <= ends <= later(case.now(), LONG_LEASE)
        await case.pass_time()
