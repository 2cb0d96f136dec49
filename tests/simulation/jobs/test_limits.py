"""Workers that keep the limits of tasks and pause queues, in virtual time."""

import asyncio
from collections import Counter
from datetime import timedelta
from typing import Any

from tests.unit.jobs.fleet import Fleet

from viralfx.jobs.tasks import declared_task, task

WORKERS = 8


class Counted:
    """Runs a task for a time, and counts how many run at once, by key, and when they started."""

    def __init__(self, fleet: Fleet, seconds: float) -> None:
        self._fleet = fleet
        self._seconds = seconds
        self.running: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.starts: list[float] = []

    def declare(self, name: str, **options: Any) -> None:
        """Declare it as a task of the fleet."""

        @task(name, **options)
        async def run(payload: dict[str, str]) -> None:
            key = payload.get("key", "")
            self.starts.append(self._fleet.clock.monotonic())
            self.running[key] += 1
            self.most[key] = max(self.most[key], self.running[key])
            try:
                await asyncio.sleep(self._seconds)
            finally:
                self.running[key] -= 1

        declared = declared_task(run)
        assert declared is not None
        self._fleet.tasks.add(declared)


def start(fleet: Fleet, **options: Any) -> None:
    """Start the workers."""
    for number in range(WORKERS):
        fleet.start(f"w{number}", queues={"default": 10, "other": 10}, **options)


async def test_eight_workers_keep_a_limit_and_run_others_at_full_rate(fleet: Fleet) -> None:
    """The task counts itself; a freed place is used at once, and no worker asks all the time."""
    counted = Counted(fleet, 0.5)
    counted.declare("report", concurrency=3)
    limited = [await fleet.accept("report", "{}") for _ in range(30)]
    beside = [await fleet.accept("sleep", "0.5") for _ in range(160)]
    other = [await fleet.accept("sleep", "0.5", queue="other") for _ in range(80)]
    start(fleet)

    assert await fleet.final(*other) <= 1.2
    assert await fleet.final(*beside) <= 2.5
    assert await fleet.final(*limited) <= 6.5
    assert counted.most[""] == 3
    # Each worker looks once a second, and once for each job that ends.
    assert fleet.ledger.count("claim") <= 8 * 2 * 10 + 270 + 60


async def test_a_crash_and_a_drain_free_their_places(fleet: Fleet) -> None:
    """The places of a drained worker are free at once, those of a lost one after its lease."""
    counted = Counted(fleet, 1000.0)
    counted.declare("report", concurrency=2)
    jobs = [await fleet.accept("report", "{}") for _ in range(4)]
    first = fleet.start("a", lease=30.0)
    await fleet.until(lambda: len(counted.starts) == 2)
    fleet.start("b", lease=30.0)
    await asyncio.sleep(5.0)
    assert len(counted.starts) == 2
    await first.drain(0.5)
    await fleet.until(lambda: len(counted.starts) == 4, within=3.0)

    assert {(await fleet.job(job_id)).worker for job_id in jobs} == {"b", None}


async def test_each_key_has_its_limit(fleet: Fleet) -> None:
    """A key with many jobs holds up no other."""
    counted = Counted(fleet, 0.5)
    counted.declare("sync", concurrency=1, concurrency_key="key")
    many = [await fleet.accept("sync", '{"key": "big"}', concurrency_key="big") for _ in range(10)]
    small = [
        await fleet.accept("sync", f'{{"key": "{key}"}}', concurrency_key=str(key))
        for key in range(40)
    ]
    start(fleet)

    assert await fleet.final(*small) <= 1.7
    assert await fleet.final(*many) <= 8.0
    assert set(counted.most.values()) == {1}


async def test_a_rate_holds_over_all_workers(fleet: Fleet) -> None:
    """In no second more than ten start, and hardly fewer."""
    counted = Counted(fleet, 0.01)
    counted.declare("mail", rate_limit="10/s")
    jobs = [await fleet.accept("mail", "{}") for _ in range(60)]
    start(fleet)
    took = await fleet.final(*jobs)

    starts = sorted(counted.starts)
    assert all(later - earlier >= 0.99 for earlier, later in zip(starts, starts[10:], strict=False))
    assert 4.9 <= took <= 6.0


async def test_a_rate_that_is_used_up_for_a_day_holds_up_no_other_task(fleet: Fleet) -> None:
    """Jobs that are not announced are found by the usual polls."""
    counted = Counted(fleet, 0.01)
    counted.declare("digest", rate_limit="1/d")
    digests = [await fleet.accept("digest", "{}") for _ in range(2)]
    later = fleet.clock.now() + timedelta(seconds=30)
    other = await fleet.accept("note", "1", run_at=later)
    start(fleet, poll_interval=5.0)

    await fleet.final(digests[0], within=1.0)
    assert await fleet.final(other, within=40.0) <= 36.0
    assert await fleet.final(await fleet.accept("note", "2"), within=40.0) <= 6.0
    assert len(counted.starts) == 1


async def test_a_paused_queue_stands_still_until_it_is_resumed(fleet: Fleet) -> None:
    """Running jobs end, jobs are accepted, and workers do not ask all the time."""
    running = [await fleet.submit("sleep", "3.0") for _ in range(4)]
    start(fleet, poll_interval=5.0)
    await fleet.until(lambda: fleet.running == 4)
    await fleet.ledger.pause("default")
    waiting = [await fleet.submit("note", str(number)) for number in range(200)]
    other = await fleet.submit("note", "0", queue="other")

    assert await fleet.final(*running, other) <= 3.1
    calls = fleet.ledger.count("claim")
    await asyncio.sleep(60.0)
    assert fleet.ledger.count("claim") - calls <= WORKERS
    assert (await fleet.ledger.counts())["default"].waiting == 200

    await fleet.ledger.resume("default")
    # Without an announcement: at the next poll of a worker.
    assert await fleet.final(*waiting, within=10.0) <= 10.0
