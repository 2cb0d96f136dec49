"""The contract of ``JobLedger``: what is accepted and given to workers."""

import asyncio
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from tests.contracts.ledgers import ERROR, LONG, TURNS, Kept, cut, draft, later

from viralfx.domain.jobs.job import Claim, JobState, completed, retried
from viralfx.domain.jobs.ledger import JobLedger

FAR = datetime(9000, 1, 1, tzinfo=UTC)


# -- accept ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "payload", [b"null", b'{"b":1, "a" : [ "gr\xc3\xb6\xc3\x9fe" ]}\n', b'"\\u0000"', b"9" * 65536]
)
async def test_what_is_accepted_is_kept_as_it_came(kept: Kept, payload: bytes) -> None:
    """Every field comes back, to the byte."""
    asked = draft(
        "analytics", payload=payload, key="key", correlation_id="c-1", traceparent="00-1-2-01"
    )
    (accepted,) = await kept.ledger.accept([asked])
    job = accepted.job

    assert accepted.created
    assert await kept.ledger.get(asked.id) == job
    assert (job.id, job.queue, job.task, job.payload) == (asked.id, "analytics", "task", payload)
    assert (job.key, job.correlation_id, job.traceparent) == ("key", "c-1", "00-1-2-01")
    assert (job.state, job.attempts, job.crashes, job.claims) == (JobState.WAITING, 0, 0, 0)
    assert (job.asked_run_at, job.started_at, job.finished_at) == (None, None, None)
    assert (job.worker, job.result, job.error) == (None, None, None)
    assert job.run_at == job.created_at
    assert job.created_at.utcoffset() == UTC.utcoffset(None)
    assert abs((kept.now() - job.created_at).total_seconds()) < 5.0


async def test_many_are_accepted_at_once(ledger: JobLedger) -> None:
    """In the order in which they were given, under whatever queues; none is no error."""
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
async def test_a_key_keeps_one_job(ledger: JobLedger, key: str) -> None:
    """Whatever else is asked for under it: the first stays as it is, and says so."""
    first = draft(key=key)
    (accepted,) = await ledger.accept([first])
    (again,) = await ledger.accept([draft("other", payload=b"2", task="other", key=key)])
    (other,) = await ledger.accept([draft(key=f"{key}:")])

    assert (accepted.created, again.created, other.created) == (True, False, True)
    assert again.job == accepted.job
    assert again.job.comes_from(replace(first, id="any"))
    assert not again.job.comes_from(replace(first, payload=b"2"))


async def test_a_key_keeps_one_job_within_one_call(ledger: JobLedger) -> None:
    """Jobs without a key are never the same."""
    drafts = [draft(key="a"), draft(), draft(key="a"), draft(), draft(key="b")]
    accepted = await ledger.accept(drafts)

    assert [each.created for each in accepted] == [True, True, False, True, True]
    assert accepted[2].job == accepted[0].job
    assert (await ledger.counts())["default"].waiting == 4


async def test_a_key_keeps_one_job_of_many_at_once(ledger: JobLedger) -> None:
    """Of twenty callers one creates it, and all are given it."""
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        calls = [group.create_task(ledger.accept([draft(key="one")])) for _ in range(20)]
    accepted = [call.result()[0] for call in calls]

    assert [each.created for each in accepted].count(True) == 1
    assert len({each.job.id for each in accepted}) == 1
    assert (await ledger.counts())["default"].waiting == 1


async def test_a_key_is_kept_by_a_job_in_any_state(kept: Kept) -> None:
    """The answer is the job as it is by now."""
    for state in JobState:
        job = await kept.in_state(state, key=state, queue=state)
        (again,) = await kept.ledger.accept([draft(key=state)])

        assert (again.created, again.job) == (False, job)
        assert job.state is state


async def test_accepting_the_same_draft_again_is_harmless(kept: Kept) -> None:
    """Whoever did not hear the answer asks again, with a key or without."""
    for asked in (draft(), draft(key="key")):
        (first,) = await kept.ledger.accept([asked])
        (claim,) = await kept.claim()
        await kept.ledger.settle([completed(claim, b"1")])
        (again,) = await kept.ledger.accept([asked])

        assert (first.created, again.created) == (True, False)
        assert again.job == await kept.job(asked.id)
        assert again.job.state is JobState.COMPLETED
    assert (await kept.ledger.counts())["default"].waiting == 0


@pytest.mark.parametrize("turns", TURNS)
async def test_accepting_that_is_cancelled_keeps_a_job_or_none(kept: Kept, turns: int) -> None:
    """Cut at any moment; accepting again tells which, and there is one job then."""
    drafts = [draft(), draft()]
    await cut(kept.ledger.accept(drafts), turns)
    accepted = await kept.ledger.accept(drafts)

    assert len({each.created for each in accepted}) == 1
    assert (await kept.ledger.counts())["default"].waiting == 2


# -- when it is due --------------------------------------------------------------------------


async def test_a_job_is_given_when_it_is_due(kept: Kept) -> None:
    """Not before, neither by itself nor by its id."""
    moment = later(kept.now(), 3.000001)
    asked = draft(run_at=moment)
    (accepted,) = await kept.ledger.accept([asked])
    await kept.ledger.register("w", ["default"], LONG)
    early = [
        *await kept.ledger.claim("default", "w", 10),
        *await kept.ledger.claim("default", "w", 10, [asked.id]),
    ]
    assert kept.now() < moment
    (claim,) = await kept.until(lambda: kept.ledger.claim("default", "w", 10))

    assert early == []
    assert (accepted.job.run_at, accepted.job.asked_run_at) == (moment, moment)
    assert accepted.job.comes_from(asked)
    assert kept.now() >= moment
    assert 0 <= claim.due_since < 5


async def test_a_job_of_the_past_is_due_from_when_it_was_accepted(kept: Kept) -> None:
    """It does not go before those that wait for longer, and what was asked for is remembered."""
    asked = draft(run_at=later(kept.now(), -86400))
    (first,) = await kept.accept()
    await kept.pass_time()
    (accepted,) = await kept.ledger.accept([asked])
    claims = await kept.claim(2)

    assert accepted.job.run_at == accepted.job.created_at
    assert accepted.job.comes_from(asked)
    assert [claim.id for claim in claims] == [first.id, asked.id]
    assert all(claim.due_since < 5 for claim in claims)


async def test_a_job_may_be_for_a_far_future(kept: Kept) -> None:
    """It is in nobody's way."""
    (far,) = await kept.accept(run_at=FAR)
    (near,) = await kept.accept()
    (claim,) = await kept.claim()
    counts = (await kept.ledger.counts())["default"]

    assert far.run_at == FAR
    assert claim.id == near.id
    assert (counts.waiting, counts.scheduled, counts.active) == (0, 1, 1)


# -- claim -----------------------------------------------------------------------------------


async def test_a_claim_says_what_to_do(kept: Kept) -> None:
    """And the job says who does it."""
    (asked,) = await kept.accept(payload=b"[1]", correlation_id="c-1", traceparent="00-1-2-01")
    (claim,) = await kept.claim(worker="worker-1")
    job = await kept.job(asked.id)

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
        created_at=asked.created_at,
        due_since=claim.due_since,
    )
    assert 0 <= claim.due_since < 5
    assert (job.state, job.worker, job.claims) == (JobState.ACTIVE, "worker-1", 1)
    assert job.started_at is not None
    assert asked.created_at <= job.started_at <= kept.now()
    assert (job.attempts, job.finished_at, job.run_at) == (0, None, asked.run_at)


async def test_what_is_due_for_longest_is_given_first(kept: Kept) -> None:
    """At most so many as were asked for; what was given is not given again."""
    jobs = []
    for _ in range(5):
        jobs += await kept.accept()
        await kept.pass_time()
    await kept.ledger.register("w", ["default"], LONG)
    given = [
        [claim.id for claim in await kept.ledger.claim("default", "w", limit)]
        for limit in (0, 3, 3, 3)
    ]

    ids = [job.id for job in jobs]
    assert given == [[], ids[:3], ids[3:], []]


async def test_a_retry_goes_behind_those_due_before_it(kept: Kept) -> None:
    """Its place is that of the time at which it is due."""
    first, second = await kept.accept(2)
    (claim,) = await kept.claim()
    await kept.pass_time()
    await kept.ledger.settle([retried(claim, ERROR, 0.0)])
    claims = await kept.claim(2)

    assert claim.id == first.id
    assert [each.id for each in claims] == [second.id, first.id]


async def test_a_claim_is_of_one_queue(kept: Kept) -> None:
    """And a queue that nobody ever used has nothing."""
    await kept.accept(2, queue="analytics")
    (mine,) = await kept.accept()
    await kept.ledger.register("w", ["default"], LONG)

    assert [claim.id for claim in await kept.ledger.claim("default", "w", 10)] == [mine.id]
    assert list(await kept.ledger.claim("notifications", "w", 10)) == []


async def test_a_claim_by_ids_passes_over_what_is_not_to_be_had(kept: Kept) -> None:
    """Bells repeat, come late, and may hold anything."""
    active = await kept.accept_and_claim(worker="other")
    done = await kept.in_state(JobState.COMPLETED)
    (scheduled,) = await kept.accept(run_at=FAR)
    (elsewhere,) = await kept.accept(queue="analytics")
    wanted, unasked = await kept.accept(2)
    ids = [active.id, done.id, scheduled.id, elsewhere.id, wanted.id, wanted.id]
    nonsense = ["", "nonsense", "\x00", "\ud800", "x" * 10_000, draft().id]
    claims = await kept.ledger.claim("default", "w", 10, [*nonsense, *ids])

    assert [claim.id for claim in claims] == [wanted.id]
    assert list(await kept.ledger.claim("default", "w", 10, [])) == []
    assert list(await kept.ledger.claim("default", "w", 10, nonsense)) == []
    assert [claim.id for claim in await kept.claim()] == [unasked.id]


async def test_a_claim_by_ids_is_in_order_and_limited(kept: Kept) -> None:
    """As any other."""
    jobs = []
    for _ in range(4):
        jobs += await kept.accept()
        await kept.pass_time()
    ids = [job.id for job in jobs]
    await kept.ledger.register("w", ["default"], LONG)
    claims = await kept.ledger.claim("default", "w", 2, {ids[3], ids[2], ids[1]})

    assert [claim.id for claim in claims] == ids[1:3]
    assert list(await kept.ledger.claim("default", "w", 0, ids)) == []
    assert [claim.id for claim in await kept.claim(2)] == [ids[0], ids[3]]


@pytest.mark.parametrize("by_ids", [False, True])
async def test_no_job_is_given_twice(kept: Kept, *, by_ids: bool) -> None:
    """However many workers claim at once: each job is given to one of them."""
    accepted = await kept.ledger.accept([draft() for _ in range(200)])
    ids = [each.job.id for each in accepted]
    given: list[Claim] = []

    async def work(worker: str) -> None:
        await kept.ledger.register(worker, ["default"], LONG)
        while len(given) < len(ids):
            given.extend(await kept.ledger.claim("default", worker, 7, ids if by_ids else None))
            await asyncio.sleep(0)

    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        for number in range(10):
            group.create_task(work(f"worker-{number}"))

    assert sorted(claim.id for claim in given) == ids
    assert {claim.number for claim in given} == {1}
    for claim in given[:20]:
        assert (await kept.job(claim.id)).worker == claim.worker


@pytest.mark.parametrize("turns", TURNS)
async def test_a_claim_that_is_cancelled_loses_no_job(kept: Kept, turns: int) -> None:
    """Whether it was given is unknown then; the worker's leaving brings it back either way."""
    (job,) = await kept.accept()
    await kept.ledger.register("w", ["default"], LONG)
    await cut(kept.ledger.claim("default", "w", 10), turns)
    counts = (await kept.ledger.counts())["default"]
    await kept.ledger.leave("w")
    (claim,) = await kept.claim(worker="other")

    assert counts.waiting + counts.active == 1
    assert claim.id == job.id
