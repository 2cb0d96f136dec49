"""The contract of ``JobLedger``: workers live by their leases, and what they leave is not lost."""

import pytest
from tests.contracts.ledgers import LONG, SHORT, TURNS, Kept, cut, later

from viralfx.domain.jobs.job import Claim, JobState, completed
from viralfx.domain.jobs.ledger import JobLedger


async def _consumers(ledger: JobLedger) -> dict[str, int]:
    counts = await ledger.counts()
    return {name: it.consumers for name, it in counts.items() if it.consumers}


# -- consumers -------------------------------------------------------------------------------


async def test_a_worker_counts_for_the_queues_it_consumes(ledger: JobLedger) -> None:
    """Also where no job ever was; what it says last counts."""
    await ledger.register("a", ["default", "analytics"], LONG)
    await ledger.register("b", ["default"], LONG)
    first = await _consumers(ledger)
    await ledger.register("a", ["notifications"], LONG)
    second = await _consumers(ledger)
    await ledger.leave("b")

    assert first == {"default": 2, "analytics": 1}
    assert second == {"default": 1, "notifications": 1}
    assert await _consumers(ledger) == {"notifications": 1}


async def test_a_worker_counts_while_its_lease_is_good(kept: Kept) -> None:
    """By itself, before any sweep, and again when it registers again."""
    await kept.ledger.register("a", ["default"], LONG)
    await kept.ledger.register("b", ["default"], SHORT)

    async def one() -> bool:
        return await _consumers(kept.ledger) == {"default": 1}

    await kept.until(one)
    await kept.ledger.register("b", ["default"], LONG)

    assert await _consumers(kept.ledger) == {"default": 2}


# -- what a worker holds ---------------------------------------------------------------------


async def test_a_claim_whose_answer_was_lost_is_no_trap(kept: Kept) -> None:
    """A worker that renews its lease says what it holds: the rest waits again, without a cost."""
    lost, known = [await kept.accept_and_claim() for _ in range(2)]
    before = await kept.job(lost.id)

    async def returned() -> bool:
        await kept.ledger.register("w", ["default"], SHORT, [known.id])
        return (await kept.job(lost.id)).state is JobState.WAITING

    await kept.until(returned)
    job = await kept.job(lost.id)
    waited = (kept.now() - before.created_at).total_seconds()

    assert waited > SHORT
    assert (job.attempts, job.crashes, job.claims, job.worker) == (0, 0, 1, None)
    assert (job.run_at, job.error) == (before.run_at, None)
    assert (await kept.job(known.id)).state is JobState.ACTIVE
    assert set(await kept.ledger.settle([completed(lost, b"1"), completed(known, b"1")])) == {
        known.id
    }
    assert [claim.id for claim in await kept.claim()] == [lost.id]


async def test_a_claim_whose_answer_is_on_its_way_is_kept(kept: Kept) -> None:
    """A worker may say what it holds while it is being given more."""
    claim = await kept.accept_and_claim()
    others = await kept.accept_and_claim(worker="other")
    await kept.ledger.register("w", ["default"], LONG, [])
    await kept.ledger.register("w", ["default"], LONG)

    assert (await kept.job(claim.id)).state is JobState.ACTIVE
    assert (await kept.job(others.id)).state is JobState.ACTIVE


async def test_what_a_worker_holds_is_its_own(kept: Kept) -> None:
    """Nobody else's job is touched, nor any by somebody who does not say what it holds."""
    silent = await kept.accept_and_claim(worker="silent")
    claim = await kept.accept_and_claim(worker="w")

    async def returned() -> bool:
        await kept.ledger.register("silent", ["default"], SHORT)
        await kept.ledger.register("w", ["default"], SHORT, [silent.id, "nonsense", "\x00"])
        return (await kept.job(claim.id)).state is JobState.WAITING

    await kept.until(returned)

    assert (await kept.job(silent.id)).state is JobState.ACTIVE


# -- leave -----------------------------------------------------------------------------------


async def test_who_leaves_hands_back_what_it_has(kept: Kept) -> None:
    """At no cost, whatever the queue, in the old places; what others have stays theirs."""
    queues = {"default": ["leaver", "leaver", "other"], "analytics": ["leaver"]}
    claims: list[Claim] = []
    for queue, workers in queues.items():
        for worker in workers:
            await kept.accept(queue=queue)
            claims += await kept.claim(worker=worker, queue=queue)
    await kept.ledger.settle([completed(claims[0], b"1")])
    await kept.pass_time()
    await kept.accept()
    returned = await kept.ledger.leave("leaver")
    job = await kept.job(claims[1].id)

    assert {queue: list(ids) for queue, ids in returned.items()} == {
        "default": [claims[1].id],
        "analytics": [claims[3].id],
    }
    assert (job.state, job.worker, job.attempts, job.crashes) == (JobState.WAITING, None, 0, 0)
    assert (job.claims, job.finished_at) == (1, None)
    assert (await kept.job(claims[2].id)).state is JobState.ACTIVE
    assert [claim.id for claim in await kept.claim()] == [claims[1].id]


async def test_leaving_again_or_unknown_is_harmless(kept: Kept) -> None:
    """It has nothing to hand back, and no sweep finds anything either."""
    claim = await kept.accept_and_claim(worker="leaver")
    await kept.ledger.leave("leaver")
    (new,) = await kept.claim(worker="other")

    assert dict(await kept.ledger.leave("leaver")) == {}
    assert dict(await kept.ledger.leave("stranger")) == {}
    assert dict((await kept.ledger.sweep(5)).returned) == {}
    assert set(await kept.ledger.settle([completed(claim, b"1")])) == set()
    assert (await kept.job(new.id)).worker == "other"


@pytest.mark.parametrize("turns", TURNS)
async def test_leaving_that_is_cancelled_can_be_done_again(kept: Kept, turns: int) -> None:
    """Cut at any moment, no job is kept."""
    claims = [await kept.accept_and_claim() for _ in range(3)]
    await cut(kept.ledger.leave("w"), turns)
    await kept.ledger.leave("w")

    assert {(await kept.job(claim.id)).state for claim in claims} == {JobState.WAITING}
    assert await _consumers(kept.ledger) == {}


async def test_who_registers_is_told_when_the_lease_ends(kept: Kept) -> None:
    """By the ledger's time, each time anew, whether or not it says what it has."""
    says: list[list[str] | None] = [None, [], None]
    for holding in says:
        before = kept.now()
        ends = await kept.ledger.register("w", ["default"], LONG, holding)

        assert later(before, LONG) <= ends <= later(kept.now(), LONG)
        await kept.pass_time()
