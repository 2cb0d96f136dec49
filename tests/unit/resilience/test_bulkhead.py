"""Bounded concurrency."""

import asyncio

import pytest
from tests.unit.resilience.scripted import BackendError, Gate, Scripted, settle

from viralfx.domain.resilience.bulkhead import Bulkhead, BulkheadFull, BulkheadFullError


async def test_as_many_run_as_allowed_and_as_many_wait_as_allowed() -> None:
    """In order of arrival; one beyond is rejected at once and told to the listeners."""
    events: list[BulkheadFull] = []
    gate, bulkhead = Gate(), Bulkhead(2, queue=1, name="pdf", listeners=(events.append,))
    tasks = [asyncio.create_task(bulkhead.execute(gate, f"op{n}")) for n in range(4)]
    await settle()
    assert len(gate.calls) == 2
    with pytest.raises(BulkheadFullError, match="bulkhead pdf is full"):
        await tasks[3]
    assert events == [BulkheadFull(name="pdf", operation="op3")]
    gate.calls[0].set_result("first")
    await settle()
    assert len(gate.calls) == 3
    for call in gate.calls[1:]:
        call.set_result("later")
    assert [await task for task in tasks[:3]] == ["first", "later", "later"]


async def test_a_permit_comes_back_however_the_call_ends() -> None:
    """By return, error or cancellation, in each form of use."""
    bulkhead, gate = Bulkhead(1), Gate()

    @bulkhead
    async def decorated() -> object:
        return await gate()

    async def block() -> object:
        async with bulkhead:
            return await gate()

    for form in (decorated, block, lambda: bulkhead.execute(gate)):
        for end in ("return", "error", "cancel"):
            task = asyncio.create_task(form())
            await settle()
            call = gate.calls.pop()
            if end == "return":
                call.set_result(None)
            elif end == "error":
                call.set_exception(BackendError())
            else:
                task.cancel()
            await asyncio.wait([task])
    assert await bulkhead.execute(Scripted("fine")) == "fine"


async def test_a_cancelled_waiter_leaves_the_queue() -> None:
    """Its place is free for another, and the permit goes to one who still waits."""
    bulkhead, gate = Bulkhead(1, queue=1), Gate()
    running = asyncio.create_task(bulkhead.execute(gate))
    waiting = asyncio.create_task(bulkhead.execute(gate))
    await settle()
    waiting.cancel()
    await asyncio.wait([waiting])
    another = asyncio.create_task(bulkhead.execute(gate))
    await settle()
    gate.calls[0].set_result("one")
    await settle()
    gate.calls[1].set_result("two")
    assert (await running, await another) == ("one", "two")
