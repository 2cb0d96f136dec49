"""The bulkhead: a limit on concurrent calls."""

import asyncio

import pytest
from tests.unit.resilience.scripted import BackendError, Gate, Scripted, settle

from viralfx.resilience.bulkhead import Bulkhead, BulkheadFull, BulkheadFullError


async def test_calls_beyond_limit_and_queue_are_rejected() -> None:
    """Calls run in order of arrival; a rejection causes an event."""
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


async def test_every_outcome_releases_the_permit() -> None:
    """Return, error and cancellation, in each form of use."""
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
    """Another caller can use its place, and the permit goes to a waiting caller."""
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


def test_a_second_event_loop_is_refused() -> None:
    """A permit released in one loop cannot wake a caller in another one."""
    bulkhead = Bulkhead(1, queue=1, name="pdf")
    with asyncio.Runner() as first, asyncio.Runner() as second:
        first.run(bulkhead.execute(Scripted("first")))
        with pytest.raises(RuntimeError, match="bulkhead pdf belongs to another event loop"):
            second.run(bulkhead.execute(Scripted("second")))


def test_a_bulkhead_outlives_a_closed_event_loop() -> None:
    """A program may call ``asyncio.run`` repeatedly."""
    bulkhead, gate = Bulkhead(1), Gate()

    async def leave_a_call() -> None:
        task = asyncio.create_task(bulkhead.execute(gate))
        await settle()
        assert not task.done()

    asyncio.run(leave_a_call())
    assert asyncio.run(bulkhead.execute(Scripted("next"))) == "next"
