"""Fairness: under steady load every due job runs, announced or not."""

import asyncio
from datetime import timedelta

import pytest
from tests.soak import SOAK
from tests.unit.jobs.fleet import Fleet


async def _notify_steadily(fleet: Fleet, pause: float) -> None:
    number = 0
    while True:
        await fleet.submit("note", str(number))
        number += 1
        await asyncio.sleep(pause)


@pytest.mark.soak
@pytest.mark.parametrize("slots", [10, *([100] if SOAK else [])])
async def test_a_worker_polls_while_notifications_never_stop(fleet: Fleet, slots: int) -> None:
    """A job without a notification and a job that becomes due run within one interval."""
    # New notifications arrive during each claim, and never as many as there are slots.
    fleet.ledger.seconds = {"claim": 0.003, "settle": 0.003}
    fleet.start(queues={"default": slots}, poll_interval=1.0)
    await asyncio.sleep(1.0)
    notifying = asyncio.create_task(_notify_steadily(fleet, 0.002))
    await asyncio.sleep(1.0)
    silent = await fleet.accept("note", '"not announced"')
    scheduled = await fleet.accept(
        "note", '"scheduled"', run_at=fleet.clock.now() + timedelta(seconds=5)
    )

    assert await fleet.final(silent) < 1.1
    assert await fleet.final(scheduled) < 6.1
    assert len(fleet.done) > 2000
    notifying.cancel()
