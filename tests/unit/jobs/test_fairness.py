"""Under steady load nothing that is due is left alone, however it came to be due."""

import asyncio
from datetime import timedelta

import pytest
from tests.unit.jobs.fleet import Fleet


async def _ring_steadily(fleet: Fleet, pause: float) -> None:
    number = 0
    while True:
        await fleet.submit("note", str(number))
        number += 1
        await asyncio.sleep(pause)


@pytest.mark.parametrize("slots", [10, 100])
async def test_bells_that_never_end_do_not_keep_a_worker_from_looking(
    fleet: Fleet, slots: int
) -> None:
    """A job whose bell was lost, and one whose time comes, run within an interval all the same."""
    # In the time of a claim there are new bells, and never as many as there are slots.
    fleet.ledger.seconds = {"claim": 0.003, "settle": 0.003}
    fleet.start(queues={"default": slots}, look_interval=1.0)
    await asyncio.sleep(1.0)
    ringing = asyncio.create_task(_ring_steadily(fleet, 0.002))
    await asyncio.sleep(1.0)
    silent = await fleet.accept("note", '"its bell was lost"')
    scheduled = await fleet.accept(
        "note", '"scheduled"', run_at=fleet.clock.now() + timedelta(seconds=5)
    )

    assert await fleet.final(silent) < 1.1
    assert await fleet.final(scheduled) < 6.1
    assert len(fleet.done) > 2000
    ringing.cancel()
