"""Polls of idle workers: one for all queues, fewer the more workers live, and one sweeper."""

import asyncio
from datetime import timedelta

import pytest
from tests.unit.jobs.fleet import Fleet

from viralfx.jobs.worker.worker import WorkerState

QUEUES = {"default": 10, "other": 10, "third": 10}


async def idle_rates(fleet: Fleet, workers: int, **options: float) -> dict[str, float]:
    """Return the calls of the ledger in a second, by name, while so many workers are idle."""
    for number in range(workers):
        fleet.start(f"w{number:02}", queues=QUEUES, **options)
    await asyncio.sleep(60.0)
    calls = {name: fleet.ledger.count(name) for name in ("due", "register", "sweep", "claim")}
    await asyncio.sleep(60.0)
    return {name: (fleet.ledger.count(name) - calls[name]) / 60 for name in calls}


async def test_ten_workers_without_notifications_share_the_polls(fleet: Fleet) -> None:
    """Renewals and sweeps included, they leave at least three transactions a second for checks."""
    fleet.notifier.disconnected = True
    rates = await idle_rates(fleet, 10)

    assert 4.5 <= rates["due"] <= 5.0
    assert sum(rates.values()) <= 6.5


@pytest.mark.parametrize("disconnected", [True, False])
async def test_many_workers_poll_no_more_than_a_few(fleet: Fleet, *, disconnected: bool) -> None:
    """At most ten polls a second in all, whether notifications arrive or not."""
    fleet.notifier.disconnected = disconnected
    rates = await idle_rates(fleet, 100)

    assert 9.0 <= rates["due"] <= 10.0
    assert 9.0 <= rates["register"] <= 11.0
    assert rates["sweep"] <= 0.4
    assert rates["claim"] == 0.0


async def test_workers_whose_share_is_the_interval_poll_no_more_than_it(fleet: Fleet) -> None:
    """The random part of a pause does not shorten the share of five workers."""
    rates = await idle_rates(fleet, 5, poll_interval=1.0)

    assert rates["due"] == pytest.approx(5.0, abs=0.1)


async def test_many_workers_find_an_unannounced_job_together(fleet: Fleet) -> None:
    """As soon as one of them polls."""
    for number in range(100):
        fleet.start(f"w{number:02}", queues=QUEUES)
    await asyncio.sleep(60.0)

    assert await fleet.final(await fleet.accept()) <= 2.0


async def test_a_worker_polls_for_a_queue_whose_slots_are_taken(fleet: Fleet) -> None:
    """It claims the job when a slot is free."""
    fleet.start(queues={"default": 2}, poll_interval=1.0)
    first = [await fleet.submit("sleep", "5.0") for _ in range(2)]
    await fleet.until(lambda: fleet.running == 2)
    second = await fleet.accept()

    await fleet.final(*first)
    assert await fleet.final(second) <= 5.1


async def test_polls_fail_and_go_on(fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    """The outage is logged once, and so is its end."""
    caplog.set_level("INFO", "viralfx.jobs")
    fleet.start(poll_interval=1.0)
    await asyncio.sleep(5.0)
    fleet.ledger.unavailable = frozenset({"due"})
    job_id = await fleet.accept()
    await asyncio.sleep(20.0)
    fleet.ledger.unavailable = frozenset()
    await fleet.final(job_id, within=3.0)

    messages = [record.getMessage() for record in caplog.records]
    assert messages.count("Job ledger unavailable") == 1
    assert messages.count("Job ledger available again") == 1


async def test_a_worker_without_a_lease_does_not_poll(fleet: Fleet) -> None:
    """It polls at once when its lease is renewed."""
    fleet.start(lease=9.0, poll_interval=1.0)
    await asyncio.sleep(5.0)
    fleet.ledger.unavailable = frozenset({"register"})
    await asyncio.sleep(12.0)
    polls = fleet.ledger.count("due")
    job_id = await fleet.accept()
    await asyncio.sleep(10.0)
    assert fleet.ledger.count("due") == polls

    fleet.ledger.unavailable = frozenset()
    await fleet.until(lambda: fleet.ledger.count("due") > polls, within=2.1)
    await fleet.final(job_id, within=0.1)


async def test_one_worker_sweeps(fleet: Fleet) -> None:
    """The one with the smallest name; after its end, the next one."""
    sweeps: dict[str, int] = {}
    leader = fleet.start("a", sweep_interval=5.0)
    fleet.start("b", sweep_interval=5.0)
    await asyncio.sleep(60.0)
    sweeps["both"] = fleet.ledger.count("sweep")
    await leader.drain(1.0)
    await asyncio.sleep(60.0)
    sweeps["one"] = fleet.ledger.count("sweep") - sweeps["both"]

    assert leader.state is WorkerState.STOPPED
    # An interval is half to all of sweep_interval; a new worker waits for half a lease first.
    assert 6 <= sweeps["both"] <= 24
    assert 6 <= sweeps["one"] <= 24


async def test_the_jobs_of_a_dead_leader_are_found_as_soon_as_those_of_others(fleet: Fleet) -> None:
    """Within its lease and one sweep: the others know when its lease ends."""
    fleet.start("b", lease=9.0, sweep_interval=1.0)
    await asyncio.sleep(20.0)
    for _ in range(10):
        await fleet.memory_ledger.register("a", ["default"], 9.0)
        job_id = await fleet.accept()
        await fleet.memory_ledger.claim("default", "a", 1, [job_id])
        assert await fleet.final(job_id) <= 10.1
        await asyncio.sleep(1.3)


@pytest.mark.parametrize("workers", [1, 20])
async def test_a_scheduled_job_starts_when_it_is_due(fleet: Fleet, workers: int) -> None:
    """A poll knows it in advance, though polls are rare."""
    for number in range(workers):
        fleet.start(f"w{number:02}", poll_interval=5.0)
    await asyncio.sleep(30.0)
    ids = [
        await fleet.accept(run_at=fleet.clock.now() + timedelta(seconds=seconds))
        for seconds in (8.0, 9.2, 11.3, 20.0)
    ]
    await fleet.final(*ids)

    for job_id in ids:
        job = await fleet.job(job_id)
        assert job.started_at is not None
        assert 0.0 <= (job.started_at - job.run_at).total_seconds() < 0.05


async def test_polls_are_frequent_once_notifications_stop(fleet: Fleet) -> None:
    """Within a second, though the next poll was later."""
    fleet.start(poll_interval=60.0)
    await asyncio.sleep(130.0)
    polls = fleet.ledger.count("due")
    fleet.notifier.disconnected = True
    await asyncio.sleep(5.0)

    assert fleet.ledger.count("due") - polls >= 15
