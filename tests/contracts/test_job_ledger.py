"""The contract of ``JobLedger``: accepting and claiming jobs."""

import asyncio
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from tests.contracts.ledgers import (
    ERROR,
    LONG_LEASE,
    TURNS,
    LedgerCase,
    cancelled_after,
    draft,
    later,
)

from viralfx.jobs.ledger import JobLedger
from viralfx.jobs.model import Claim, JobState, completed, retried

FAR = datetime(9000, 1, 1, tzinfo=UTC)


# -- accept ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "payload", [b"null", b'{"b":1, "a" : [ "gr\xc3\xb6\xc3\x9fe" ]}\n', b'"\\u0000"', b"9" * 65536]
)
async def test_a_job_is_stored_unchanged(case: LedgerCase, payload: bytes) -> None:
    """Every field, to the byte."""
    asked = draft(
        "analytics", payload=payload, key="key", correlation_id="c-1", traceparent="00-1-2-01"
    )
    (accepted,) = await case.ledger.accept([asked])
    job = accepted.job

    assert accepted.created
    assert await case.ledger.get(asked.id) == job
    assert (job.id, job.queue, job.task, job.payload) == (asked.id, "analytics", "task", payload)
    assert (job.key, job.correlation_id, job.traceparent) == ("key", "c-1", "00-1-2-01")
    assert (job.state, job.attempts, job.crashes, job.claims) == (JobState.WAITING, 0, 0, 0)
    assert (job.asked_run_at, job.started_at, job.finished_at) == (None, None, None)
    assert (job.worker, job.result, job.error) == (None, None, None)
    assert job.run_at == job.created_at
    assert job.created_at.utcoffset() == UTC.utcoffset(None)
    assert abs((case.now() - job.created_at).total_seconds()) < 5.0


async def test_many_jobs_are_accepted_in_one_call(ledger: JobLedger) -> None:
    """In the order of the drafts, in any queues; an empty call is allowed."""
    drafts = [draft(f"queue-{number % 3}") for number in range(300)]
    accepted = await ledger.accept(drafts)

    assert [each.job.id for each in accepted] == [asked.id for asked in drafts]
    assert all(each.created for each in accepted)
    assert {name: it.waiting for name, it in (await ledger.counts()).items()} == {
        "queue-0": 100,
        "queue-1": 100,
        "queue-2": 100,
    }
    assert list(await ledger.accept([])) == []


@pytest.mark.parametrize("key", ["", "k", "größe €", "k" * 255, "'; --"])
async def test_a_key_has_one_job(ledger: JobLedger, key: str) -> None:
    """A repeated key returns the first job unchanged."""
    first = draft(key=key)
    (accepted,) = await ledger.accept([first])
    (again,) = await ledger.accept([draft("other", payload=b"2", task="other", key=key)])
    (other,) = await ledger.accept([draft(key=f"{key}:")])

    assert (accepted.created, again.created, other.created) == (True, False, True)
    assert again.job == accepted.job
    assert again.job.comes_from(replace(first, id="any"))
    assert again.job.comes_from(replace(first, payload=b" %s\n" % first.payload))
    assert not again.job.comes_from(replace(first, payload=b"2"))


async def test_a_key_has_one_job_within_one_call(ledger: JobLedger) -> None:
    """Jobs without a key are always new."""
    drafts = [draft(key="a"), draft(), draft(key="a"), draft(), draft(key="b")]
    accepted = await ledger.accept(drafts)

    assert [each.created for each in accepted] == [True, True, False, True, True]
    assert accepted[2].job == accepted[0].job
    assert (await ledger.counts())["default"].waiting == 4


async def test_concurrent_calls_with_one_key_create_one_job(ledger: JobLedger) -> None:
    """All callers get it."""
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        calls = [group.create_task(ledger.accept([draft(key="one")])) for _ in range(20)]
    accepted = [call.result()[0] for call in calls]

    assert [each.created for each in accepted].count(True) == 1
    assert len({each.job.id for each in accepted}) == 1
    assert (await ledger.counts())["default"].waiting == 1


async def test_a_key_is_reserved_in_every_state_of_its_job(case: LedgerCase) -> None:
    """The result is the job in its current state."""
    for state in JobState:
        job = await case.in_state(state, key=state, queue=state)
        (again,) = await case.ledger.accept([draft(key=state)])

        assert (again.created, again.job) == (False, job)
        assert job.state is state


async def test_accepting_the_same_draft_again_returns_its_job(case: LedgerCase) -> None:
    """With a key or without, after a lost response."""
    for asked in (draft(), draft(key="key")):
        (first,) = await case.ledger.accept([asked])
        (claim,) = await case.claim()
        await case.ledger.settle([completed(claim, b"1")])
        (again,) = await case.ledger.accept([asked])

        assert (first.created, again.created) == (True, False)
        assert again.job == await case.job(asked.id)
        assert again.job.state is JobState.COMPLETED
    assert (await case.ledger.counts())["default"].waiting == 0


@pytest.mark.parametrize("turns", TURNS)
async def test_a_cancelled_accept_is_atomic(case: LedgerCase, turns: int) -> None:
    """Repeating it leads to one job."""
    drafts = [draft(), draft()]
    await cancelled_after(case.ledger.accept(drafts), turns)
    accepted = await case.ledger.accept(drafts)

    assert len({each.created for each in accepted}) == 1
    assert (await case.ledger.counts())["default"].waiting == 2


# -- when it is due --------------------------------------------------------------------------


async def test_a_job_can_be_claimed_once_it_is_due(case: LedgerCase) -> None:
    """Not earlier, not even by its id."""
    moment = later(case.now(), 3.000001)
    asked = draft(run_at=moment)
    (accepted,) = await case.ledger.accept([asked])
    await case.ledger.register("w", ["default"], LONG_LEASE)
    early = [
        *await case.ledger.claim("default", "w", 10),
        *await case.ledger.claim("default", "w", 10, [asked.id]),
    ]
    assert case.now() < moment
    (claim,) = await case.until(lambda: case.ledger.claim("default", "w", 10))

    assert early == []
    assert (accepted.job.run_at, accepted.job.asked_run_at) == (moment, moment)
    assert accepted.job.comes_from(asked)
    assert case.now() >= moment
    assert 0 <= claim.due_since < 5


async def test_a_job_with_a_past_run_at_is_due_from_its_acceptance(case: LedgerCase) -> None:
    """It does not overtake jobs that wait longer, and the requested time is stored."""
    asked = draft(run_at=later(case.now(), -86400))
    (first,) = await case.accept()
    await case.pass_time()
    (accepted,) = await case.ledger.accept([asked])
    claims = await case.claim(2)

    assert accepted.job.run_at == accepted.job.created_at
    assert accepted.job.comes_from(asked)
    assert [claim.id for claim in claims] == [first.id, asked.id]
    assert all(claim.due_since < 5 for claim in claims)


async def test_a_job_may_be_scheduled_far_in_the_future(case: LedgerCase) -> None:
    """It does not delay other jobs."""
    (far,) = await case.accept(run_at=FAR)
    (near,) = await case.accept()
    (claim,) = await case.claim()
    counts = (await case.ledger.counts())["default"]

    assert far.run_at == FAR
    assert claim.id == near.id
    assert (counts.waiting, counts.scheduled, counts.active) == (0, 1, 1)


# -- claim -----------------------------------------------------------------------------------


async def test_a_claim_describes_the_job(case: LedgerCase) -> None:
    """And the job names its worker."""
    (asked,) = await case.accept(payload=b"[1]", correlation_id="c-1", traceparent="00-1-2-01")
    (claim,) = await case.claim(worker="worker-1")
    job = await case.job(asked.id)

    assert claim == Claim(
        id=asked.id,
        queue="default",
        task="task",
        payload=b"[1]",
        worker="worker-1",
        number=1,
        attempt=1,
        crashes=0,
        correlation_id="c-1",
        traceparent="00-1-2-01",
        user_id=None,
        created_at=asked.created_at,
        due_since=claim.due_since,
    )
    assert 0 <= claim.due_since < 5
    assert (job.state, job.worker, job.claims) == (JobState.ACTIVE, "worker-1", 1)
    assert job.started_at is not None
    assert asked.created_at <= job.started_at <= case.now()
    assert (job.attempts, job.finished_at, job.run_at) == (0, None, asked.run_at)


async def test_the_longest_due_jobs_are_claimed_first(case: LedgerCase) -> None:
    """At most ``limit`` jobs, and each once."""
    jobs = []
    for _ in range(5):
        jobs += await case.accept()
        await case.pass_time()
    await case.ledger.register("w", ["default"], LONG_LEASE)
    given = [
        [claim.id for claim in await case.ledger.claim("default", "w", limit)]
        for limit in (0, 3, 3, 3)
    ]

    ids = [job.id for job in jobs]
    assert given == [[], ids[:3], ids[3:], []]


async def test_a_retry_is_ordered_by_its_due_time(case: LedgerCase) -> None:
    """Jobs that are due earlier come first."""
    first, second = await case.accept(2)
    (claim,) = await case.claim()
    await case.pass_time()
    await case.ledger.settle([retried(claim, ERROR, 0.0)])
    claims = await case.claim(2)

    assert claim.id == first.id
    assert [each.id for each in claims] == [second.id, first.id]


async def test_a_claim_takes_jobs_of_one_queue(case: LedgerCase) -> None:
    """An unknown queue has none."""
    await case.accept(2, queue="analytics")
    (mine,) = await case.accept()
    await case.ledger.register("w", ["default"], LONG_LEASE)

    assert [claim.id for claim in await case.ledger.claim("default", "w", 10)] == [mine.id]
    assert list(await case.ledger.claim("notifications", "w", 10)) == []


async def test_a_claim_by_ids_ignores_unavailable_jobs(case: LedgerCase) -> None:
    """Notifications repeat, come late, and may contain anything."""
    active = await case.accept_and_claim(worker="other")
    done = await case.in_state(JobState.COMPLETED)
    (scheduled,) = await case.accept(run_at=FAR)
    (elsewhere,) = await case.accept(queue="analytics")
    wanted, unasked = await case.accept(2)
    ids = [active.id, done.id, scheduled.id, elsewhere.id, wanted.id, wanted.id]
    nonsense = ["", "nonsense", "\x00", "\ud800", "x" * 10_000, draft().id]
    claims = await case.ledger.claim("default", "w", 10, [*nonsense, *ids])

    assert [claim.id for claim in claims] == [wanted.id]
    assert list(await case.ledger.claim("default", "w", 10, [])) == []
    assert list(await case.ledger.claim("default", "w", 10, nonsense)) == []
    assert [claim.id for claim in await case.claim()] == [unasked.id]


async def test_a_claim_by_ids_is_in_order_and_limited(case: LedgerCase) -> None:
    """Like any claim."""
    jobs = []
    for _ in range(4):
        jobs += await case.accept()
        await case.pass_time()
    ids = [job.id for job in jobs]
    await case.ledger.register("w", ["default"], LONG_LEASE)
    claims = await case.ledger.claim("default", "w", 2, {ids[3], ids[2], ids[1]})

    assert [claim.id for claim in claims] == ids[1:3]
    assert list(await case.ledger.claim("default", "w", 0, ids)) == []
    assert [claim.id for claim in await case.claim(2)] == [ids[0], ids[3]]


@pytest.mark.parametrize("by_ids", [False, True])
async def test_no_job_is_claimed_twice(case: LedgerCase, *, by_ids: bool) -> None:
    """With any number of concurrent workers."""
    accepted = await case.ledger.accept([draft() for _ in range(200)])
    ids = [each.job.id for each in accepted]
    given: list[Claim] = []

    async def work(worker: str) -> None:
        await case.ledger.register(worker, ["default"], LONG_LEASE)
        while len(given) < len(ids):
            given.extend(await case.ledger.claim("default", worker, 7, ids if by_ids else None))
            await asyncio.sleep(0)

    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        for number in range(10):
            group.create_task(work(f"worker-{number}"))

    assert sorted(claim.id for claim in given) == ids
    assert {claim.number for claim in given} == {1}
    for claim in given[:20]:
        assert (await case.job(claim.id)).worker == claim.worker


@pytest.mark.parametrize("turns", TURNS)
async def test_a_cancelled_claim_loses_no_job(case: LedgerCase, turns: int) -> None:
    """Deregistering the worker hands back a job that was claimed."""
    (job,) = await case.accept()
    await case.ledger.register("w", ["default"], LONG_LEASE)
    await cancelled_after(case.ledger.claim("default", "w", 10), turns)
    counts = (await case.ledger.counts())["default"]
    await case.ledger.deregister("w")
    (claim,) = await case.claim(worker="other")

    assert counts.waiting + counts.active == 1
    assert claim.id == job.id
