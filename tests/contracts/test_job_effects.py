"""The contract of ``JobLedger``: what a task writes and its job's completion are one step."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from tests.contracts.ledgers import ERROR, Kept, draft

from viralfx.domain.jobs.job import JobState, handed_back, retried


async def test_an_effect_completes_its_job(kept: Kept) -> None:
    """With what it returns, once; both are there."""
    claim = await kept.second_claim()

    async def effect(connection: Any) -> bytes:
        await kept.write(connection, "effect")
        assert (await kept.job(claim.id)).state is JobState.ACTIVE
        return b'"done"'

    async with asyncio.timeout(20):
        taken = await kept.ledger.settle_with_effect(claim, effect)
        again = await kept.ledger.settle_with_effect(claim, effect)
    job = await kept.job(claim.id)

    assert (taken, again) == (True, False)
    assert (job.state, job.result, job.error) == (JobState.COMPLETED, b'"done"', None)
    assert (job.attempts, job.worker) == (1, None)
    assert job.finished_at is not None
    assert list(await kept.written()) == ["effect"]
    assert (await kept.ledger.counts())["default"].completed == 1


async def test_an_effect_that_raises_leaves_its_job_to_be_settled(kept: Kept) -> None:
    """Its error comes through, and nothing that it wrote stays."""
    claim = await kept.accept_and_claim()

    async def effect(connection: Any) -> bytes:
        await kept.write(connection, "effect")
        raise KeyError("of the task")

    async with asyncio.timeout(20):
        with pytest.raises(KeyError, match="of the task"):
            await kept.ledger.settle_with_effect(claim, effect)
    job = await kept.job(claim.id)

    assert (job.state, job.worker, job.attempts) == (JobState.ACTIVE, "w", 0)
    assert list(await kept.written()) == ([] if kept.undoes else ["effect"])
    assert set(await kept.ledger.settle([retried(claim, ERROR, 0.0)])) == {claim.id}


async def test_an_effect_that_is_cancelled_leaves_its_job_to_be_settled(kept: Kept) -> None:
    """Nothing that it wrote stays, and it can be run again."""
    claim = await kept.accept_and_claim()
    began = asyncio.Event()

    async def endless(connection: Any) -> bytes:
        await kept.write(connection, "endless")
        began.set()
        await asyncio.Event().wait()
        return b"1"

    async def short(connection: Any) -> bytes:
        await kept.write(connection, "short")
        return b"2"

    async with asyncio.timeout(20):
        task = asyncio.create_task(kept.ledger.settle_with_effect(claim, endless))
        await began.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        between = await kept.job(claim.id)
        taken = await kept.ledger.settle_with_effect(claim, short)

    assert (between.state, between.worker) == (JobState.ACTIVE, "w")
    assert taken
    assert (await kept.job(claim.id)).result == b"2"
    assert list(await kept.written()) == (["short"] if kept.undoes else ["endless", "short"])


async def test_no_effect_of_a_claim_that_is_lost(kept: Kept) -> None:
    """Whether or not another worker has the job by now."""
    old = await kept.accept_and_claim()
    await kept.ledger.settle([handed_back(old)])

    async def effect(connection: Any) -> bytes:
        await kept.write(connection, "effect")
        return b"1"

    async with asyncio.timeout(20):
        while_waiting = await kept.ledger.settle_with_effect(old, effect)
        (new,) = await kept.claim(worker="other")
        while_active = await kept.ledger.settle_with_effect(old, effect)
        nobodys = await kept.ledger.settle_with_effect(replace(old, id=draft().id), effect)

    assert (while_waiting, while_active, nobodys) == (False, False, False)
    assert list(await kept.written()) == []
    assert (await kept.job(new.id)).state is JobState.ACTIVE


async def test_a_claim_that_is_lost_during_its_effect(kept: Kept) -> None:
    """Either it is kept until the effect is over, or everything that this wrote is undone.

    A sweep may pass such a job over; it must not wait for it.
    """
    claim = await kept.accept_and_claim()
    swept: list[str] = []

    async def effect(connection: Any) -> bytes:
        await kept.write(connection, "effect")
        await kept.expire()
        swept.extend((await kept.ledger.sweep(5)).returned.get("default", ()))
        return b"1"

    async with asyncio.timeout(20):
        taken = await kept.ledger.settle_with_effect(claim, effect)
    job = await kept.job(claim.id)

    assert taken == (swept == [])
    assert job.state is (JobState.COMPLETED if taken else JobState.WAITING)
    assert list(await kept.written()) == (["effect"] if taken or not kept.undoes else [])


async def test_of_two_effects_at_once_one_completes(kept: Kept) -> None:
    """Nothing that the other wrote stays."""
    claim = await kept.accept_and_claim()

    async def effect(connection: Any) -> bytes:
        await kept.write(connection, "effect")
        await asyncio.sleep(0)
        return b"1"

    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        calls = [group.create_task(kept.ledger.settle_with_effect(claim, effect)) for _ in range(2)]

    assert sorted(call.result() for call in calls) == [False, True]
    assert (await kept.job(claim.id)).state is JobState.COMPLETED
    assert len(await kept.written()) == (1 if kept.undoes else 2)
