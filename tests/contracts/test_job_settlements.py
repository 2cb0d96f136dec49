"""The contract of ``JobLedger``: what becomes of claimed jobs, and who may say so."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
from tests.contracts.ledgers import EARLIER, ERROR, TURNS, Kept, cut, draft

from viralfx.domain.jobs.job import (
    Claim,
    JobError,
    JobState,
    Settlement,
    completed,
    failed,
    handed_back,
    postponed,
    retried,
)
from viralfx.domain.jobs.ledger import QueueCounts


@dataclass(frozen=True)
class Way:
    """A way to settle a job that has failed once before, and what must be of it then."""

    settle: Callable[[Claim], Settlement]
    state: JobState
    attempts: int
    error: JobError | None
    result: bytes | None = None
    moves: bool = True
    """Whether the job is due anew."""


WAYS = {
    "completed": Way(lambda c: completed(c, b'{"a": 1}'), JobState.COMPLETED, 1, None, b'{"a": 1}'),
    "failed": Way(lambda c: failed(c, ERROR), JobState.FAILED, 2, ERROR),
    "retried": Way(lambda c: retried(c, ERROR, 0.0), JobState.WAITING, 2, ERROR),
    "postponed": Way(lambda c: postponed(c, ERROR, 0.0), JobState.WAITING, 1, ERROR),
    "handed back": Way(handed_back, JobState.WAITING, 1, EARLIER, moves=False),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=list(WAYS))
async def test_a_job_becomes_what_its_settlement_says(kept: Kept, way: Way) -> None:
    """State, attempts, error and result; a crash is never counted, and claims are never fewer."""
    claim = await kept.second_claim()
    before = await kept.job(claim.id)
    await kept.pass_time()
    taken = await kept.ledger.settle([way.settle(claim)])
    job = await kept.job(claim.id)

    assert set(taken) == {claim.id}
    assert (job.state, job.attempts, job.error) == (way.state, way.attempts, way.error)
    assert (job.result, job.crashes, job.claims, job.worker) == (way.result, 0, 2, None)
    assert (job.created_at, job.started_at) == (before.created_at, before.started_at)
    assert (job.finished_at is not None) == job.state.final
    if job.finished_at and job.started_at:
        assert job.started_at <= job.finished_at <= kept.now()
    if not job.state.final:
        assert (job.run_at > before.run_at) == way.moves
        assert job.run_at <= kept.now()


@pytest.mark.parametrize(("way", "attempt"), [("retried", 3), ("postponed", 2), ("handed back", 2)])
async def test_what_waits_again_is_given_again(kept: Kept, way: str, attempt: int) -> None:
    """By a claim with a number of its own; only the task's own failure makes a new attempt."""
    claim = await kept.second_claim()
    await kept.ledger.settle([WAYS[way].settle(claim)])
    (again,) = await kept.claim(worker="other")

    assert (again.id, again.number, again.attempt) == (claim.id, 3, attempt)
    assert (again.worker, again.crashes, again.payload) == ("other", 0, claim.payload)


async def test_what_is_handed_back_keeps_its_place(kept: Kept) -> None:
    """It is given before those that came after it, as if it had never been claimed."""
    first = await kept.accept_and_claim()
    await kept.pass_time()
    (second,) = await kept.accept()
    await kept.ledger.settle([handed_back(first)])

    assert [claim.id for claim in await kept.claim(2)] == [first.id, second.id]


@pytest.mark.parametrize("settle", [retried, postponed])
async def test_a_delay_is_kept(
    kept: Kept, settle: Callable[[Claim, JobError, float], Settlement]
) -> None:
    """The job is not given before it is over."""
    claim = await kept.accept_and_claim()
    before = kept.now()
    await kept.ledger.settle([settle(claim, ERROR, 3.0)])
    counts = (await kept.ledger.counts())["default"]
    early = await kept.ledger.claim("default", "w", 1, [claim.id])
    assert (kept.now() - before).total_seconds() < 3.0
    (again,) = await kept.until(lambda: kept.ledger.claim("default", "w", 1))

    assert list(early) == []
    assert (counts.waiting, counts.scheduled, counts.active) == (0, 1, 0)
    assert again.id == claim.id
    assert (kept.now() - before).total_seconds() >= 3.0


@pytest.mark.parametrize(
    "result", [b"null", b'"gr\xc3\xb6\xc3\x9fe \\u0000"', b"[" + b"1," * 10**5 + b"1]"]
)
async def test_a_result_comes_back_as_it_was(kept: Kept, result: bytes) -> None:
    """To the byte."""
    claim = await kept.accept_and_claim()
    await kept.ledger.settle([completed(claim, result)])

    assert (await kept.job(claim.id)).result == result


@pytest.mark.parametrize("cause", ["", "größe €\n\u2028", "a\x00b", "a\ud800b", "x" * 100_000])
async def test_any_error_can_be_recorded(kept: Kept, cause: str) -> None:
    """A message may hold what a database cannot; the job is settled all the same."""
    others = [await kept.accept_and_claim() for _ in range(2)]
    claim = await kept.accept_and_claim()
    error = JobError(code="error", message=f"<{cause}>")
    settlements = [completed(others[0], b"1"), failed(claim, error), completed(others[1], b"2")]
    taken = await kept.ledger.settle(settlements)
    job = await kept.job(claim.id)

    assert set(taken) == {claim.id, *(other.id for other in others)}
    assert job.state is JobState.FAILED
    assert job.error is not None
    assert job.error.code == "error"
    assert job.error.message.startswith("<")


async def test_many_are_settled_in_one_step(kept: Kept) -> None:
    """Each in its own way, under whatever queues."""
    queues = [f"queue-{number}" for number in range(3)]
    claims: dict[str, list[Claim]] = {way: [] for way in WAYS}
    for _ in range(4):
        for way in WAYS:
            for queue in queues:
                await kept.accept(queue=queue)
                claims[way] += await kept.claim(queue=queue, worker=queue)
    mixed = [WAYS[way].settle(claims[way][place]) for place in range(12) for way in WAYS]
    taken = await kept.ledger.settle(mixed)
    counts = await kept.ledger.counts()

    assert set(taken) == {each.claim.id for each in mixed}
    for way, expected in WAYS.items():
        jobs = [await kept.job(claim.id) for claim in claims[way]]
        assert {job.state for job in jobs} == {expected.state}
    for queue in queues:
        assert replace(counts[queue], oldest_due=0.0) == QueueCounts(
            waiting=12, completed=4, failed=4, consumers=1
        )
    assert set(await kept.ledger.settle([])) == set()


# -- the fence -------------------------------------------------------------------------------


@pytest.mark.parametrize("second", WAYS.values(), ids=list(WAYS))
@pytest.mark.parametrize("first", WAYS.values(), ids=list(WAYS))
async def test_a_claim_is_settled_once(kept: Kept, first: Way, second: Way) -> None:
    """Again is harmless, whatever it says: the first stands."""
    claim = await kept.accept_and_claim()
    once = await kept.ledger.settle([first.settle(claim)])
    job = await kept.job(claim.id)
    twice = await kept.ledger.settle([second.settle(claim)])

    assert (set(once), set(twice)) == ({claim.id}, set())
    assert await kept.job(claim.id) == job


async def test_a_claim_is_settled_once_within_one_call(kept: Kept) -> None:
    """By either, and counted once."""
    claim = await kept.accept_and_claim()
    taken = await kept.ledger.settle([completed(claim, b"1"), failed(claim, ERROR)])
    counts = (await kept.ledger.counts())["default"]

    assert list(taken) == [claim.id]
    assert counts.completed + counts.failed == 1
    assert (counts.waiting, counts.active) == (0, 0)


async def test_a_claim_is_settled_once_by_many_at_once(kept: Kept) -> None:
    """Of ten one is taken."""
    claim = await kept.accept_and_claim()
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        calls = [
            group.create_task(kept.ledger.settle([completed(claim, b"%d" % number)]))
            for number in range(10)
        ]
    results = [bytes(str(number), "ascii") for number, call in enumerate(calls) if call.result()]

    assert results == [(await kept.job(claim.id)).result]
    assert (await kept.ledger.counts())["default"].completed == 1


@pytest.mark.parametrize("way", WAYS.values(), ids=list(WAYS))
@pytest.mark.parametrize("worker", ["w", "other"])
async def test_an_older_claim_is_refused(kept: Kept, worker: str, way: Way) -> None:
    """By the number alone: it may be the same worker's. What is in the same call is taken."""
    old = await kept.accept_and_claim()
    await kept.ledger.settle([handed_back(old)])
    (new,) = await kept.claim(worker=worker)
    beside = await kept.accept_and_claim()
    taken = await kept.ledger.settle([way.settle(old), completed(beside, b"1")])
    job = await kept.job(new.id)

    assert set(taken) == {beside.id}
    assert (job.state, job.worker, job.claims) == (JobState.ACTIVE, worker, 2)
    assert set(await kept.ledger.settle([completed(new, b"2")])) == {new.id}


async def test_a_claim_from_before_a_retry_is_refused(kept: Kept) -> None:
    """What is forgotten by a retry is not how often the job was given."""
    old = await kept.accept_and_claim()
    await kept.ledger.settle([failed(old, ERROR)])
    await kept.ledger.retry(old.id)
    while_waiting = await kept.ledger.settle([completed(old, b"1")])
    (new,) = await kept.claim()

    assert set(while_waiting) == set()
    assert (new.number, new.attempt) == (2, 1)
    assert set(await kept.ledger.settle([completed(old, b"1")])) == set()
    assert (await kept.job(new.id)).state is JobState.ACTIVE


async def test_a_claim_of_no_job_is_refused(kept: Kept) -> None:
    """Of one that was pruned, or that this ledger never had; others are taken."""
    pruned = await kept.accept_and_claim()
    await kept.ledger.settle([completed(pruned, b"1")])
    await kept.until(lambda: kept.ledger.prune(0.0))
    beside = await kept.accept_and_claim()
    never = replace(beside, id=draft().id)
    taken = await kept.ledger.settle([completed(each, b"2") for each in (pruned, never, beside)])

    assert set(taken) == {beside.id}
    assert await kept.ledger.get(pruned.id) is None


@pytest.mark.parametrize("turns", TURNS)
async def test_settling_that_is_cancelled_can_be_done_again(kept: Kept, turns: int) -> None:
    """Cut at any moment it happened entirely or not at all."""
    claims = [await kept.accept_and_claim() for _ in range(3)]
    settlements = [completed(claim, b"1") for claim in claims]
    await cut(kept.ledger.settle(settlements), turns)
    between = (await kept.ledger.counts())["default"]
    await kept.ledger.settle(settlements)
    after = (await kept.ledger.counts())["default"]

    assert (between.active, between.completed) in [(3, 0), (0, 3)]
    assert (after.active, after.completed) == (0, 3)
