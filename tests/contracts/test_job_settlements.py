"""The contract of ``JobLedger``: recording the outcomes of claimed jobs."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
from tests.contracts.ledgers import EARLIER, ERROR, TURNS, LedgerCase, cancelled_after, draft

from viralfx.core.errors import UnstorableError
from viralfx.jobs.codec import ResultError
from viralfx.jobs.ledger import QueueCounts
from viralfx.jobs.model import (
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


@dataclass(frozen=True)
class Way:
    """A way to settle a job that has failed once, and the expected result."""

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
async def test_a_settlement_determines_the_job(case: LedgerCase, way: Way) -> None:
    """State, attempts, error and result; crashes and claims do not change."""
    claim = await case.second_claim()
    before = await case.job(claim.id)
    await case.pass_time()
    taken = await case.ledger.settle([way.settle(claim)])
    job = await case.job(claim.id)

    assert set(taken) == {claim.id}
    assert (job.state, job.attempts, job.error) == (way.state, way.attempts, way.error)
    assert (job.result, job.crashes, job.claims, job.worker) == (way.result, 0, 2, None)
    assert (job.created_at, job.started_at) == (before.created_at, before.started_at)
    assert (job.finished_at is not None) == job.state.final
    if job.finished_at and job.started_at:
        assert job.started_at <= job.finished_at <= case.now()
    if not job.state.final:
        assert (job.run_at > before.run_at) == way.moves
        assert job.run_at <= case.now()


@pytest.mark.parametrize(("way", "attempt"), [("retried", 3), ("postponed", 2), ("handed back", 2)])
async def test_a_waiting_job_is_claimed_again(case: LedgerCase, way: str, attempt: int) -> None:
    """With a new number; only a failure of the task counts an attempt."""
    claim = await case.second_claim()
    await case.ledger.settle([WAYS[way].settle(claim)])
    (again,) = await case.claim(worker="other")

    assert (again.id, again.number, again.attempt) == (claim.id, 3, attempt)
    assert (again.worker, again.crashes, again.payload) == ("other", 0, claim.payload)


async def test_a_handed_back_job_keeps_its_place(case: LedgerCase) -> None:
    """It is claimed before later jobs."""
    first = await case.accept_and_claim()
    await case.pass_time()
    (second,) = await case.accept()
    await case.ledger.settle([handed_back(first)])

    assert [claim.id for claim in await case.claim(2)] == [first.id, second.id]


@pytest.mark.parametrize("settle", [retried, postponed])
async def test_a_delayed_job_waits(
    case: LedgerCase, settle: Callable[[Claim, JobError, float], Settlement]
) -> None:
    """It is not claimed before the delay has passed."""
    claim = await case.accept_and_claim()
    before = case.now()
    await case.ledger.settle([settle(claim, ERROR, 3.0)])
    counts = (await case.ledger.counts())["default"]
    early = await case.ledger.claim("default", "w", 1, [claim.id])
    assert (case.now() - before).total_seconds() < 3.0
    (again,) = await case.until(lambda: case.ledger.claim("default", "w", 1))

    assert list(early) == []
    assert (counts.waiting, counts.scheduled, counts.active) == (0, 1, 0)
    assert again.id == claim.id
    assert (case.now() - before).total_seconds() >= 3.0


@pytest.mark.parametrize(
    "result", [b"null", b'"gr\xc3\xb6\xc3\x9fe \\u0000"', b"[" + b"1," * 10**5 + b"1]"]
)
async def test_a_result_is_stored_unchanged(case: LedgerCase, result: bytes) -> None:
    """To the byte."""
    claim = await case.accept_and_claim()
    await case.ledger.settle([completed(claim, result)])

    assert (await case.job(claim.id)).result == result


@pytest.mark.parametrize("cause", ["", "größe €\n\u2028", "a\x00b", "a\ud800b", "x" * 100_000])
async def test_any_error_can_be_recorded(case: LedgerCase, cause: str) -> None:
    """A message may contain characters that a database cannot store."""
    others = [await case.accept_and_claim() for _ in range(2)]
    claim = await case.accept_and_claim()
    error = JobError(code="error", message=f"<{cause}>")
    settlements = [completed(others[0], b"1"), failed(claim, error), completed(others[1], b"2")]
    taken = await case.ledger.settle(settlements)
    job = await case.job(claim.id)

    assert set(taken) == {claim.id, *(other.id for other in others)}
    assert job.state is JobState.FAILED
    assert job.error is not None
    assert job.error.code == "error"
    assert job.error.message.startswith("<")


async def test_many_jobs_are_settled_in_one_call(case: LedgerCase) -> None:
    """Each in its own way, in any queues."""
    queues = [f"queue-{number}" for number in range(3)]
    claims: dict[str, list[Claim]] = {way: [] for way in WAYS}
    for _ in range(4):
        for way in WAYS:
            for queue in queues:
                await case.accept(queue=queue)
                claims[way] += await case.claim(queue=queue, worker=queue)
    mixed = [WAYS[way].settle(claims[way][place]) for place in range(12) for way in WAYS]
    taken = await case.ledger.settle(mixed)
    counts = await case.ledger.counts()

    assert set(taken) == {each.claim.id for each in mixed}
    for way, expected in WAYS.items():
        jobs = [await case.job(claim.id) for claim in claims[way]]
        assert {job.state for job in jobs} == {expected.state}
    for queue in queues:
        assert replace(counts[queue], oldest_due=0.0) == QueueCounts(
            waiting=12, completed=4, failed=4, consumers=1
        )
    assert set(await case.ledger.settle([])) == set()


UNSTORABLE = {
    "not JSON": b"nonsense",
    "empty": b"",
    "NaN": b'{"a": NaN}',
    "not UTF-8": b'"\xff"',
    "NUL": b'"\x00"',
    "deep": b"[" * 100_000 + b"]" * 100_000,
}


@pytest.mark.parametrize("result", UNSTORABLE.values(), ids=list(UNSTORABLE))
async def test_a_refused_result_is_reported_and_nothing_recorded(
    case: LedgerCase, result: bytes
) -> None:
    """Then the caller can record the others, and a failure in place of the result."""
    claims = [await case.accept_and_claim() for _ in range(3)]
    settlements = [
        completed(claims[0], b"1"),
        completed(claims[1], result),
        failed(claims[2], ERROR),
    ]
    with pytest.raises(UnstorableError):
        await case.ledger.settle(settlements)
    between = (await case.ledger.counts())["default"]
    with pytest.raises(UnstorableError):
        await case.ledger.settle([settlements[1]])
    settlements[1] = failed(claims[1], ERROR)
    taken = await case.ledger.settle(settlements)

    assert (between.active, between.completed, between.failed) == (3, 0, 0)
    assert set(taken) == {claim.id for claim in claims}


@pytest.mark.parametrize("result", UNSTORABLE.values(), ids=list(UNSTORABLE))
async def test_a_refused_result_of_an_effect_undoes_it(case: LedgerCase, result: bytes) -> None:
    """The job stays with the worker, which settles it otherwise."""
    claim = await case.accept_and_claim()

    async def effect(connection: object) -> bytes:
        await case.write(connection, "written")
        return result

    with pytest.raises(ResultError):
        await case.ledger.settle_with_effect(claim, effect)
    taken = await case.ledger.settle([failed(claim, ERROR)])

    assert set(taken) == {claim.id}
    assert list(await case.written()) == ([] if case.undoes else ["written"])


# -- fencing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("second", WAYS.values(), ids=list(WAYS))
@pytest.mark.parametrize("first", WAYS.values(), ids=list(WAYS))
async def test_a_claim_is_settled_once(case: LedgerCase, first: Way, second: Way) -> None:
    """The first settlement stands."""
    claim = await case.accept_and_claim()
    once = await case.ledger.settle([first.settle(claim)])
    job = await case.job(claim.id)
    twice = await case.ledger.settle([second.settle(claim)])

    assert (set(once), set(twice)) == ({claim.id}, set())
    assert await case.job(claim.id) == job


async def test_a_claim_is_settled_once_within_one_call(case: LedgerCase) -> None:
    """And counts once."""
    claim = await case.accept_and_claim()
    taken = await case.ledger.settle([completed(claim, b"1"), failed(claim, ERROR)])
    counts = (await case.ledger.counts())["default"]

    assert list(taken) == [claim.id]
    assert counts.completed + counts.failed == 1
    assert (counts.waiting, counts.active) == (0, 0)


async def test_concurrent_settlements_settle_a_claim_once(case: LedgerCase) -> None:
    """One of ten is recorded."""
    claim = await case.accept_and_claim()
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        calls = [
            group.create_task(case.ledger.settle([completed(claim, b"%d" % number)]))
            for number in range(10)
        ]
    results = [bytes(str(number), "ascii") for number, call in enumerate(calls) if call.result()]

    assert results == [(await case.job(claim.id)).result]
    assert (await case.ledger.counts())["default"].completed == 1


@pytest.mark.parametrize("way", WAYS.values(), ids=list(WAYS))
@pytest.mark.parametrize("worker", ["w", "other"])
async def test_an_older_claim_is_fenced(case: LedgerCase, worker: str, way: Way) -> None:
    """By its number alone, even for the same worker; other settlements of the call are recorded."""
    old = await case.accept_and_claim()
    await case.ledger.settle([handed_back(old)])
    (new,) = await case.claim(worker=worker)
    beside = await case.accept_and_claim()
    taken = await case.ledger.settle([way.settle(old), completed(beside, b"1")])
    job = await case.job(new.id)

    assert set(taken) == {beside.id}
    assert (job.state, job.worker, job.claims) == (JobState.ACTIVE, worker, 2)
    assert set(await case.ledger.settle([completed(new, b"2")])) == {new.id}


async def test_a_claim_from_before_a_retry_is_fenced(case: LedgerCase) -> None:
    """A retry does not reset the number of claims."""
    old = await case.accept_and_claim()
    await case.ledger.settle([failed(old, ERROR)])
    await case.ledger.retry(old.id)
    while_waiting = await case.ledger.settle([completed(old, b"1")])
    (new,) = await case.claim()

    assert set(while_waiting) == set()
    assert (new.number, new.attempt) == (2, 1)
    assert set(await case.ledger.settle([completed(old, b"1")])) == set()
    assert (await case.job(new.id)).state is JobState.ACTIVE


async def test_a_claim_of_an_unknown_job_is_skipped(case: LedgerCase) -> None:
    """Pruned or never accepted; other settlements are recorded."""
    pruned = await case.accept_and_claim()
    await case.ledger.settle([completed(pruned, b"1")])
    await case.until(lambda: case.ledger.prune(0.0))
    beside = await case.accept_and_claim()
    never = beside._replace(id=draft().id)
    taken = await case.ledger.settle([completed(each, b"2") for each in (pruned, never, beside)])

    assert set(taken) == {beside.id}
    assert await case.ledger.get(pruned.id) is None


@pytest.mark.parametrize("turns", TURNS)
async def test_a_cancelled_settlement_can_be_repeated(case: LedgerCase, turns: int) -> None:
    """It is atomic."""
    claims = [await case.accept_and_claim() for _ in range(3)]
    settlements = [completed(claim, b"1") for claim in claims]
    await cancelled_after(case.ledger.settle(settlements), turns)
    between = (await case.ledger.counts())["default"]
    await case.ledger.settle(settlements)
    after = (await case.ledger.counts())["default"]

    assert (between.active, between.completed) in [(3, 0), (0, 3)]
    assert (after.active, after.completed) == (0, 3)
