"""The contract of ``JobLedger``: the effect of a task and the completion of its job are atomic."""

import asyncio
from typing import Any

import pytest
from tests.contracts.ledgers import ERROR, LedgerCase, draft

from viralfx.jobs.ledger import WatchedTransaction
from viralfx.jobs.model import JobState, handed_back, retried


async def test_an_effect_completes_its_job(case: LedgerCase) -> None:
    """With its result, once."""
    claim = await case.second_claim()

    async def effect(connection: Any) -> bytes:
        await case.write(connection, "effect")
        assert (await case.job(claim.id)).state is JobState.ACTIVE
        return b'"done"'

    async with asyncio.timeout(20):
        taken = await case.ledger.settle_with_effect(claim, effect)
        again = await case.ledger.settle_with_effect(claim, effect)
    job = await case.job(claim.id)

    assert (taken, again) == (True, False)
    assert (job.state, job.result, job.error) == (JobState.COMPLETED, b'"done"', None)
    assert (job.attempts, job.worker) == (1, None)
    assert job.finished_at is not None
    assert list(await case.written()) == ["effect"]
    assert (await case.ledger.counts())["default"].completed == 1


async def test_a_failing_effect_is_rolled_back(case: LedgerCase) -> None:
    """Its error is raised, and the job stays active."""
    claim = await case.accept_and_claim()

    async def effect(connection: Any) -> bytes:
        await case.write(connection, "effect")
        raise KeyError("of the task")

    async with asyncio.timeout(20):
        with pytest.raises(KeyError, match="of the task"):
            await case.ledger.settle_with_effect(claim, effect)
    job = await case.job(claim.id)

    assert (job.state, job.worker, job.attempts) == (JobState.ACTIVE, "w", 0)
    assert list(await case.written()) == ([] if case.undoes else ["effect"])
    assert set(await case.ledger.settle([retried(claim, ERROR, 0.0)])) == {claim.id}


async def test_a_cancelled_effect_is_rolled_back(case: LedgerCase) -> None:
    """The job stays active and can run again."""
    claim = await case.accept_and_claim()
    began = asyncio.Event()

    async def endless(connection: Any) -> bytes:
        await case.write(connection, "endless")
        began.set()
        await asyncio.Event().wait()
        return b"1"

    async def short(connection: Any) -> bytes:
        await case.write(connection, "short")
        return b"2"

    async with asyncio.timeout(20):
        task = asyncio.create_task(case.ledger.settle_with_effect(claim, endless))
        await began.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        between = await case.job(claim.id)
        taken = await case.ledger.settle_with_effect(claim, short)

    assert (between.state, between.worker) == (JobState.ACTIVE, "w")
    assert taken
    assert (await case.job(claim.id)).result == b"2"
    assert list(await case.written()) == (["short"] if case.undoes else ["endless", "short"])


async def test_a_lost_claim_has_no_effect(case: LedgerCase) -> None:
    """Whether or not another worker has claimed the job."""
    old = await case.accept_and_claim()
    await case.ledger.settle([handed_back(old)])

    async def effect(connection: Any) -> bytes:
        await case.write(connection, "effect")
        return b"1"

    async with asyncio.timeout(20):
        while_waiting = await case.ledger.settle_with_effect(old, effect)
        (new,) = await case.claim(worker="other")
        while_active = await case.ledger.settle_with_effect(old, effect)
        unknown = await case.ledger.settle_with_effect(old._replace(id=draft().id), effect)

    assert (while_waiting, while_active, unknown) == (False, False, False)
    assert list(await case.written()) == []
    assert (await case.job(new.id)).state is JobState.ACTIVE


async def test_a_claim_that_is_lost_during_its_effect(case: LedgerCase) -> None:
    """Either the job stays with its worker until the effect ends, or the effect is rolled back.

    A sweep may skip such a job; it must not wait for it.
    """
    claim = await case.accept_and_claim()
    swept: list[str] = []

    async def effect(connection: Any) -> bytes:
        await case.write(connection, "effect")
        await case.expire()
        swept.extend((await case.ledger.sweep(5)).returned.get("default", ()))
        return b"1"

    async with asyncio.timeout(20):
        taken = await case.ledger.settle_with_effect(claim, effect)
    job = await case.job(claim.id)

    assert taken == (swept == [])
    assert job.state is (JobState.COMPLETED if taken else JobState.WAITING)
    assert list(await case.written()) == (["effect"] if taken or not case.undoes else [])


async def test_one_of_two_concurrent_effects_completes(case: LedgerCase) -> None:
    """The other one is rolled back."""
    claim = await case.accept_and_claim()

    async def effect(connection: Any) -> bytes:
        await case.write(connection, "effect")
        await asyncio.sleep(0)
        return b"1"

    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        calls = [group.create_task(case.ledger.settle_with_effect(claim, effect)) for _ in range(2)]

    assert sorted(call.result() for call in calls) == [False, True]
    assert (await case.job(claim.id)).state is JobState.COMPLETED
    assert len(await case.written()) == (1 if case.undoes else 2)


@pytest.mark.parametrize("end", ["completes", "fails", "loses its claim"])
async def test_the_jobs_of_an_effect_exist_if_it_completes(case: LedgerCase, end: str) -> None:
    """No claim finds them earlier; a repeated key in the same effect finds its job."""
    claim = await case.accept_and_claim()
    followers = [draft(key="next"), draft()]
    again = draft(key="next")
    called: list[str] = []

    async def effect(connection: Any) -> bytes:
        watched = WatchedTransaction(connection, called_after_commit)
        accepted = await case.ledger.accept_in(
            watched, followers, on_commit=lambda jobs: called.extend(each.job.id for each in jobs)
        )
        (repeated,) = await case.ledger.accept_in(watched, [again], on_commit=lambda _: None)
        assert [each.created for each in accepted] == [True, True]
        assert (repeated.job.id, repeated.created) == (followers[0].id, False)
        assert await case.ledger.claim("default", "w", 5) == ()
        assert await case.ledger.get(followers[0].id) is None
        if end == "fails":
            raise KeyError("of the task")
        if end == "loses its claim":
            await case.ledger.settle([handed_back(claim)])
        return b"1"

    called_after_commit: list[Any] = []
    taken = False
    async with asyncio.timeout(20):
        if end == "fails":
            with pytest.raises(KeyError):
                await case.ledger.settle_with_effect(claim, effect)
        else:
            taken = await case.ledger.settle_with_effect(claim, effect)
    for call in called_after_commit:
        call()
    found = [await case.ledger.get(each.id) for each in followers]

    assert taken is (end == "completes")
    assert [job is not None for job in found] == [taken, taken]
    assert not taken or called == [each.id for each in followers]
    waiting = await case.ledger.claim("default", "w", 5)
    mine = {claim.id} if end == "loses its claim" else set()
    assert {each.id for each in waiting} == ({each.id for each in followers} if taken else mine)
