"""The contract of ``JobLedger``: options of jobs, unique jobs, and batches of all or none."""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import pytest
from tests.contracts.ledgers import ERROR, LONG_LEASE, LedgerCase, draft, ids

from viralfx.jobs.ledger import Accepted, JobLedger
from viralfx.jobs.model import (
    MAX_PRIORITY,
    MIN_PRIORITY,
    Claim,
    JobDraft,
    JobState,
    JobStateError,
    Unique,
    completed,
    failed,
    handed_back,
    retried,
)


def unique_draft(unique: Unique = Unique.UNFINISHED, **more: Any) -> JobDraft:
    """Return a draft whose twin must not be accepted."""
    return draft(unique=unique, unique_key="digest", **more)


async def accept_twin(ledger: JobLedger, unique: Unique = Unique.UNFINISHED) -> Accepted:
    """Accept another job with the same task and payload."""
    (accepted,) = await ledger.accept([unique_draft(unique)])
    return accepted


async def test_the_options_of_a_job_are_stored(case: LedgerCase) -> None:
    """Its claim has the user, and the most attempts, which the finished job still has."""
    options: dict[str, Any] = {"concurrency_key": "tenant-7", "max_attempts": 7}
    asked = draft(user_id="größe", priority=MAX_PRIORITY, **options)
    plain = draft(priority=MIN_PRIORITY)
    accepted = await case.ledger.accept([asked, plain])
    claims = await case.claim(2)
    job, other = [await case.job(each.job.id) for each in accepted]

    assert (job.user_id, job.priority, job.concurrency_key) == ("größe", 100, "tenant-7")
    assert (other.user_id, other.priority, other.concurrency_key) == (None, -100, None)
    assert [each.job.priority for each in accepted] == [100, -100]
    assert {claim.id: claim.user_id for claim in claims} == {asked.id: "größe", plain.id: None}
    assert {claim.id: claim.max_attempts for claim in claims} == {asked.id: 7, plain.id: None}
    assert [each.job.max_attempts for each in accepted] == [7, None]
    await case.ledger.settle([failed(claim, ERROR) for claim in claims])
    await case.ledger.retry(asked.id)
    again, *_ = await case.claim()
    await case.ledger.settle([completed(again, b"1")])
    assert again.max_attempts == (await case.job(asked.id)).max_attempts == 7
    assert (await case.job(plain.id)).max_attempts is None


@pytest.mark.parametrize("unique", list(Unique))
async def test_a_waiting_unique_job_has_no_twin(ledger: JobLedger, unique: Unique) -> None:
    """Also with a key of its own, and one that is due later counts as waiting."""
    (first,) = await ledger.accept([unique_draft(unique)])
    twins = [
        await accept_twin(ledger, unique),
        *await ledger.accept([unique_draft(unique, key="another")]),
    ]
    (other,) = await ledger.accept([draft(unique=unique, unique_key="other")])

    assert (first.created, other.created) == (True, True)
    assert [(twin.created, twin.job) for twin in twins] == [(False, first.job)] * 2
    assert (await ledger.counts())["default"].waiting == 2


async def test_the_first_claim_frees_a_job_that_is_unique_while_it_waits(case: LedgerCase) -> None:
    """Its retry may wait beside its twin."""
    (first,) = await case.ledger.accept([unique_draft(Unique.WAITING)])
    (claim,) = await case.claim()
    twin = await accept_twin(case.ledger, Unique.WAITING)
    await case.ledger.settle([retried(claim, ERROR, 0.0)])
    third = await accept_twin(case.ledger, Unique.WAITING)
    claims = await case.claim(2)

    assert (twin.created, third.created) == (True, False)
    assert third.job.id == twin.job.id
    assert sorted(ids(claims)) == [first.job.id, twin.job.id]


@pytest.mark.parametrize("end", [JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED])
async def test_an_unfinished_unique_job_has_no_twin(case: LedgerCase, end: JobState) -> None:
    """While it waits, runs, is tried again or handed back; its end frees it."""
    (first,) = await case.ledger.accept([unique_draft()])
    twins = [await accept_twin(case.ledger)]
    for settlement in (lambda c: retried(c, ERROR, 0.0), handed_back):
        (claim,) = await case.claim()
        twins.append(await accept_twin(case.ledger))
        await case.ledger.settle([settlement(claim)])
        twins.append(await accept_twin(case.ledger))
    if end is JobState.CANCELLED:
        await case.ledger.cancel(first.job.id)
    else:
        (claim,) = await case.claim()
        done = completed(claim, b"1") if end is JobState.COMPLETED else failed(claim, ERROR)
        await case.ledger.settle([done])
    after = await accept_twin(case.ledger)

    assert {twin.job.id for twin in twins} == {first.job.id}
    assert not any(twin.created for twin in twins)
    assert after.created


async def test_a_request_to_cancel_frees_a_unique_job(case: LedgerCase) -> None:
    """The job still runs, but will not be completed for the twin that is submitted now."""
    (first,) = await case.ledger.accept([unique_draft()])
    (claim,) = await case.claim()
    await case.ledger.cancel(first.job.id, running=True)
    twin = await accept_twin(case.ledger)
    await case.ledger.settle([handed_back(claim)])
    await case.ledger.sweep(5)
    third = await accept_twin(case.ledger)

    assert twin.created
    assert (third.created, third.job.id) == (False, twin.job.id)


async def test_a_crash_frees_a_unique_job_only_if_it_fails(case: LedgerCase) -> None:
    """The sweep does not meet the twin that came in between."""
    (first,) = await case.ledger.accept([unique_draft()])
    await case.claim(worker="dead")
    await case.expire("dead")
    await case.ledger.sweep(2)
    returned = await accept_twin(case.ledger)
    await case.claim(worker="dead")
    await case.expire("dead")
    crashed = await case.until(lambda: _crashed(case))
    twin = await accept_twin(case.ledger)

    assert (returned.created, returned.job.id) == (False, first.job.id)
    assert crashed == [first.job.id]
    assert twin.created


async def _crashed(case: LedgerCase) -> Sequence[str]:
    return list((await case.ledger.sweep(2)).crashed)


async def test_a_retried_unique_job_meets_its_twin(case: LedgerCase) -> None:
    """Both run: a retry does not make the job unique again."""
    (first,) = await case.ledger.accept([unique_draft()])
    (claim,) = await case.claim()
    await case.ledger.settle([failed(claim, ERROR)])
    twin = await accept_twin(case.ledger)
    retried_job = await case.ledger.retry(first.job.id)
    third = await accept_twin(case.ledger)
    claims = await case.claim(2)
    await case.ledger.settle([completed(each, b"1") for each in claims])

    assert retried_job.state is JobState.WAITING
    assert third.job.id == twin.job.id
    assert (await accept_twin(case.ledger)).created


async def test_a_key_belongs_to_the_job_that_it_created(case: LedgerCase) -> None:
    """A key that came with a twin is free after the end of the unique job."""
    (first,) = await case.ledger.accept([unique_draft()])
    (twin,) = await case.ledger.accept([unique_draft(key="k")])
    await case.ledger.cancel(first.job.id)
    again = [(await case.ledger.accept([unique_draft(key="k")]))[0] for _ in range(2)]
    await case.ledger.cancel(again[0].job.id)
    (kept,) = await case.ledger.accept([unique_draft(key="k")])

    assert (twin.created, twin.job.id) == (False, first.job.id)
    assert [each.created for each in again] == [True, False]
    assert (kept.created, kept.job.id) == (False, again[0].job.id)


async def test_twins_in_one_call_are_one_job(ledger: JobLedger) -> None:
    """The first of them, with keys or without."""
    drafts = [unique_draft(), draft(), unique_draft(), unique_draft(key="k")]
    accepted = await ledger.accept(drafts)
    found = [each.job.id for each in accepted]

    assert [each.created for each in accepted] == [True, True, False, False]
    assert found == [drafts[0].id, drafts[1].id, drafts[0].id, drafts[0].id]


async def test_concurrent_twins_are_one_job(ledger: JobLedger) -> None:
    """All callers get it."""
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        calls = [group.create_task(ledger.accept([draft(), unique_draft()])) for _ in range(20)]
    twins = [call.result()[1] for call in calls]

    assert [twin.created for twin in twins].count(True) == 1
    assert len({twin.job.id for twin in twins}) == 1
    assert (await ledger.counts())["default"].waiting == 21


async def _end(ledger: JobLedger, claim: Claim, way: int) -> bool:
    """Settle a claim in one of several ways; return True if the job is completed."""
    if way == 0:
        await ledger.settle([retried(claim, ERROR, 0.0)])
    elif way == 1:
        await ledger.settle([failed(claim, ERROR)])
        with suppress(JobStateError):
            await ledger.retry(claim.id)
    else:
        await ledger.settle([completed(claim, b"1")])
    return way > 1


@pytest.mark.parametrize("unique", list(Unique))
async def test_twins_of_all_states_never_collide(case: LedgerCase, unique: Unique) -> None:
    """While jobs are submitted, claimed, retried and ended by many at once."""
    ledger = case.ledger
    for name in ("w0", "w1", "w2"):
        await ledger.register(name, ["default"], LONG_LEASE)
    created: set[str] = set()
    ended: list[str] = []

    async def submit() -> None:
        for _ in range(20):
            (accepted,) = await ledger.accept([unique_draft(unique)])
            if accepted.created:
                created.add(accepted.job.id)

    async def work(name: str) -> None:
        for turn in range(20):
            claims = await ledger.claim("default", name, 2)
            ended.extend([each.id for each in claims if await _end(ledger, each, turn % 4)])

    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        for name in ("w0", "w1", "w2"):
            group.create_task(work(name))
            group.create_task(submit())
    left = await ledger.claim("default", "w0", 100)
    await ledger.settle([completed(claim, b"1") for claim in left])
    ended.extend(ids(left))

    assert set(ended) == created
    assert len(ended) == len(created)
    assert (await ledger.accept([unique_draft(unique)]))[0].created


async def test_a_failed_check_stores_nothing(case: LedgerCase) -> None:
    """It sees the jobs of the whole call; keys and unique keys stay free."""
    (known,) = await case.accept(key="known")
    drafts = [draft(), draft(key="known"), draft(key="new"), unique_draft()]
    seen: list[bool] = []

    def refuse(accepted: Sequence[Accepted]) -> None:
        seen.extend(each.created for each in accepted)
        raise KeyError("planted")

    with pytest.raises(KeyError, match="planted"):
        await case.ledger.accept(drafts, check=refuse)
    counts = (await case.ledger.counts())["default"]
    found = [await case.ledger.get(each.id) for each in drafts]
    accepted = await case.ledger.accept(drafts, check=lambda _: None)

    assert seen == [True, False, True, True]
    assert (counts.waiting, found) == (1, [None] * 4)
    assert [each.created for each in accepted] == seen
    assert accepted[1].job == known
