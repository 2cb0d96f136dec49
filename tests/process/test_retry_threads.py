"""Retries of plain functions in a thread beside the event loop."""

import asyncio

from tests.unit.resilience.scripted import BackendError, Scripted, SkippingClock

from viralfx.resilience.retry import Retrier, retry


async def test_rule_14_a_plain_function_in_a_thread_is_retried_with_waits() -> None:
    """The wait blocks that thread, not the loop."""
    clock = SkippingClock()
    operation = Scripted(BackendError(), "done")
    guarded = Retrier(retry(), clock=clock, block=clock.block)(operation.sync)

    assert await asyncio.to_thread(guarded) == "done"
    assert (operation.calls, clock.slept) == (2, [1.0])
