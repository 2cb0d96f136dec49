"""Workers run scheduled tasks once for each time."""

import asyncio
import logging
from collections.abc import Sequence
from datetime import datetime, timedelta
from itertools import pairwise
from typing import Any

import pytest
from docs.examples.reports import daily_report
from tests.unit.jobs.fleet import FaultyLedger, Fleet
from tests.virtual_time import LoopClock

from viralfx.jobs.ledger import Registration
from viralfx.jobs.model import Job, JobDraft, JobFilter, JobState
from viralfx.jobs.schedule import Schedule, ScheduledAcceptance
from viralfx.jobs.tasks import declared_task

EACH_MINUTE, EACH_SECOND = "* * * * *", "* * * * * *"
SLOW: dict[str, Any] = {"lease": 600.0, "sweep_interval": 600.0, "poll_interval": 600.0}
"""Options of workers for tests of hours."""


class SkewedClock(LoopClock):
    """A clock of a worker whose wall clock is wrong."""

    def __init__(self, hours: float) -> None:
        self._skew = timedelta(hours=hours)

    def now(self) -> datetime:
        """Return the wrong time."""
        return super().now() + self._skew


async def jobs(fleet: Fleet, task: str | None = None) -> Sequence[Job]:
    """Return all jobs of a task, the oldest first."""
    found = await fleet.memory_ledger.page(JobFilter(limit=10_000))
    return [job for job in reversed(found) if task in (None, job.task)]


async def times(fleet: Fleet, task: str = "tick") -> list[datetime]:
    """Return the times for which jobs of a task were accepted, in the order of acceptance."""
    return [job.asked_run_at for job in await jobs(fleet, task) if job.asked_run_at is not None]


def gaps(found: Sequence[datetime]) -> set[float]:
    """Return the distances of neighbouring times, in seconds."""
    return {(later - earlier).total_seconds() for earlier, later in pairwise(found)}


def ticking(fleet: Fleet, cron: str = EACH_MINUTE, **options: Any) -> None:
    """Declare a task that records the times at which it runs."""

    async def tick(_: None) -> None:
        fleet.done.append(fleet.clock.now())

    fleet.declare("tick", tick, payload_type=None, cron=cron, **options)


async def test_a_scheduled_task_runs_once_for_each_time(fleet: Fleet) -> None:
    """Over all workers, at the time, and with one call for it."""
    ticking(fleet)
    for name in ("a", "b", "c"):
        fleet.start(name, poll_interval=10_000.0)
    await asyncio.sleep(1200.0)

    assert len(fleet.done) == 20
    assert gaps(await times(fleet)) == {60.0}
    assert all(job.state is JobState.COMPLETED for job in await jobs(fleet))
    late = [seen - asked for seen, asked in zip(fleet.done, await times(fleet), strict=True)]
    assert max(late) < timedelta(seconds=0.5)
    assert fleet.ledger.count("accept_scheduled") <= 22
    assert fleet.ledger.count("schedules") <= 2 * 20


async def test_the_first_start_runs_no_time_of_the_past(fleet: Fleet) -> None:
    """A new schedule waits for its first time."""
    ticking(fleet, "0 * * * *")
    fleet.start()
    await asyncio.sleep(120.0)

    assert fleet.done == []
    (state,) = await fleet.memory_ledger.schedules()
    assert state.last_run_at is None


async def test_workers_whose_clocks_differ_agree(fleet: Fleet) -> None:
    """Time is the ledger's."""
    ticking(fleet, EACH_SECOND)
    for name, hours in (("a", -2.0), ("b", 0.0), ("c", 30.0)):
        fleet.start(name, clock=SkewedClock(hours))
    await asyncio.sleep(600.5)
    found = await times(fleet)

    assert gaps(found) == {1.0}
    assert len(found) in (600, 601)
    assert (fleet.clock.now() - found[-1]).total_seconds() < 2.0


@pytest.mark.parametrize(
    ("begin", "expected"),
    [
        ("2026-03-28T23:30:00Z", ["2026-03-29T01:00"]),
        ("2026-10-24T23:30:00Z", ["2026-10-25T00:30"]),
    ],
)
async def test_the_example_runs_once_in_the_nights_of_a_clock_change(
    begin: str, expected: list[str]
) -> None:
    """The example of the guide: half past two in Berlin, which does not exist, or comes twice."""
    example = declared_task(daily_report)
    assert example is not None
    ahead = datetime.fromisoformat(begin) - LoopClock().now()
    fleet = Fleet(SkewedClock(ahead / timedelta(hours=1)))
    fleet.tasks.add(example)
    fleet.start(**SLOW)
    await asyncio.sleep(3 * 3600.0)
    done = [await fleet.job(job.id) for job in await jobs(fleet)]
    await fleet.stop()

    assert [f"{job.asked_run_at:%Y-%m-%dT%H:%M}" for job in done] == expected
    assert [job.result for job in done] == [
        f'"The report of job {job.id}"'.encode() for job in done
    ]


async def test_times_during_the_death_of_workers_run_once(fleet: Fleet) -> None:
    """Also those of the seconds in which no worker noticed."""
    ticking(fleet, EACH_SECOND)

    class Cut(FaultyLedger):
        """A ledger that a worker cannot reach any more."""

        dead = False

        async def _step(self, name: str, about: object) -> None:
            if self.dead:
                await asyncio.Event().wait()
            await super()._step(name, about)

    ledgers = [Cut(fleet.memory_ledger) for _ in range(4)]
    for number, ledger in enumerate(ledgers):
        fleet.start(f"w{number}", ledger=ledger)
    await asyncio.sleep(20.0)
    for ledger in ledgers[:3]:
        ledger.dead = True
        await asyncio.sleep(40.0)
    found = await times(fleet)

    assert gaps(found) == {1.0}
    assert (fleet.clock.now() - found[-1]).total_seconds() < 2.0
    for ledger in ledgers:
        ledger.dead = False


@pytest.mark.parametrize(("catch_up", "made_up"), [(True, 1), (False, 0)])
async def test_the_latest_time_without_a_worker_is_made_up_for(
    fleet: Fleet, made_up: int, *, catch_up: bool
) -> None:
    """Once, with ``catch_up``; later times run as usual."""
    ticking(fleet, "0 * * * *", catch_up=catch_up)
    worker = fleet.start("first", **SLOW)
    await asyncio.sleep(2 * 3600.0)
    await worker.drain(1.0)
    before = len(fleet.done)
    await asyncio.sleep(9 * 3600.0)
    fleet.start("second", **SLOW)
    await asyncio.sleep(60.0)
    after = len(fleet.done)
    await asyncio.sleep(3600.0)

    assert (before, after - before, len(fleet.done) - after) == (2, made_up, 1)
    assert len(set(await times(fleet))) == len(fleet.done)


async def test_a_short_stop_misses_no_time(fleet: Fleet) -> None:
    """Under a minute, as with a deployment of the only worker, also without ``catch_up``."""
    ticking(fleet, EACH_SECOND)
    worker = fleet.start("first")
    await asyncio.sleep(30.0)
    await worker.drain(1.0)
    await asyncio.sleep(40.0)
    fleet.start("second")
    await asyncio.sleep(30.0)

    assert gaps(await times(fleet)) == {1.0}


async def test_a_restarted_worker_repeats_no_time(fleet: Fleet) -> None:
    """The ledger knows the last one, also once its job is deleted."""
    ticking(fleet)
    for number in range(10):
        worker = fleet.start(f"life-{number}")
        await asyncio.sleep(13.0)
        await worker.drain(1.0)
        await fleet.memory_ledger.prune(0.0)

    assert len(fleet.done) == len({each.minute for each in fleet.done}) in (2, 3)


async def test_a_time_runs_after_an_outage_of_the_ledger(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    """As soon as the ledger is back, and once although responses were lost."""
    caplog.set_level(logging.INFO)
    ticking(fleet)
    fleet.start()
    await asyncio.sleep(1.0)
    fleet.ledger.unavailable = frozenset({"accept_scheduled"})
    await asyncio.sleep(90.0)
    assert fleet.done == []
    fleet.ledger.unavailable = frozenset()
    fleet.ledger.failing_after = frozenset({"accept_scheduled"})
    await asyncio.sleep(10.0)
    fleet.ledger.failing_after = frozenset()
    await asyncio.sleep(110.0)

    assert gaps(await times(fleet)) == {60.0}
    messages = [record.getMessage() for record in caplog.records]
    assert messages == ["Job ledger unavailable", "Job ledger available again"]


async def test_a_refused_job_of_a_schedule_does_not_stop_the_others(fleet: Fleet) -> None:
    """It is tried again."""

    class Fussy(FaultyLedger):
        async def accept_scheduled(self, draft: JobDraft) -> ScheduledAcceptance | None:
            if draft.task == "fussy":
                raise ValueError("not this one")
            return await super().accept_scheduled(draft)

    fleet.ledger = Fussy(fleet.memory_ledger)
    fleet.declare("fussy", fleet.note, cron=EACH_SECOND)
    ticking(fleet)
    fleet.start()
    await asyncio.sleep(180.0)

    assert len(fleet.done) == 3


async def test_the_job_of_a_schedule_has_its_concurrency_key(fleet: Fleet) -> None:
    """A function of the payload, which is null; its missing field is the empty key."""
    limited: dict[str, Any] = {"cron": "* * * * *", "concurrency": 1}
    fleet.declare("all", fleet.note, concurrency_key=lambda payload: f"for {payload}", **limited)
    fleet.declare("field", fleet.note, concurrency_key="customer", **limited)
    fleet.start()
    await asyncio.sleep(61.0)

    found = [(job.task, job.concurrency_key) for job in await fleet.ledger.page()]
    assert sorted(found, key=str) == [("all", "for None"), ("field", "")]


async def test_each_worker_runs_the_schedules_that_it_knows(fleet: Fleet) -> None:
    """During a deployment, with a leader of the old version that does not know the new one."""
    ticking(fleet, "*/5 * * * *")
    fleet.start("old", tasks=type(fleet.tasks)(task for task in fleet.tasks), **SLOW)
    fleet.declare("new", fleet.note, cron="0 * * * *")
    fleet.start("young", **SLOW)
    fleet.start("younger", **SLOW)
    await asyncio.sleep(4 * 3600.0)

    assert gaps(await times(fleet)) == {300.0}
    assert gaps(await times(fleet, "new")) == {3600.0}
    late = [
        (job.created_at - job.asked_run_at).total_seconds()
        for job in await jobs(fleet, "new")
        if job.asked_run_at is not None
    ]
    assert late[0] < 11.0
    assert max(late[1:]) < 0.5  # the worker that noticed submits the later ones


async def test_versions_with_different_times_run_each_of_them_once(fleet: Fleet) -> None:
    """A time that both have runs once; afterwards the new times run alone."""
    ticking(fleet, "*/10 * * * *")
    old = type(fleet.tasks)(task for task in fleet.tasks)
    fleet.tasks = type(fleet.tasks)()
    ticking(fleet, "*/15 * * * *", catch_up=True)
    first = fleet.start("old", tasks=old, **SLOW)
    await asyncio.sleep(1800.0)
    fleet.start("young", **SLOW)
    await asyncio.sleep(3600.0)
    await first.drain(1.0)
    await asyncio.sleep(7200.0)
    minutes = [time.minute for time in await times(fleet)]

    assert len(set(await times(fleet))) == len(minutes)
    assert set(minutes[:3]) <= {0, 10, 20, 30, 40, 50}
    assert {15, 45, 10, 20} <= set(minutes[3:-8])
    assert set(minutes[-8:]) == {0, 15, 30, 45}


async def test_a_schedule_removed_while_due_runs_no_more(fleet: Fleet) -> None:
    """Nothing submits it."""
    ticking(fleet, "0 * * * *")
    fleet.declare("other", fleet.note, cron="30 * * * *")
    everything = fleet.tasks
    worker = fleet.start("old", **SLOW)
    await asyncio.sleep(3 * 3600.0)
    await worker.drain(1.0)
    before = len(await times(fleet))
    fleet.tasks = type(everything)(task for task in everything if task.name != "tick")
    fleet.start("young", **SLOW)
    await asyncio.sleep(2 * 3600.0)

    assert len(await times(fleet)) == before
    assert len(await times(fleet, "other")) == 5


@pytest.mark.parametrize("first", ["other", "same"])
async def test_a_run_missed_for_days_is_made_up_for_beside_other_workers(
    fleet: Fleet, first: str
) -> None:
    """Workers with other schedules do not end it, whichever kind is back first."""
    ticking(fleet, "0 3 * * *", catch_up=True)
    own = fleet.tasks
    fleet.tasks = type(own)()
    fleet.declare("other", fleet.note, cron="30 * * * *")
    nightly = fleet.start("nightly", tasks=own, **SLOW)
    await asyncio.sleep(60.0)
    await nightly.drain(1.0)
    await asyncio.sleep(60 * 3600.0)
    for name in (first, "nightly"):
        fleet.start(name, tasks=fleet.tasks if name == "other" else own, **SLOW)
        await asyncio.sleep(60.0)
    (missed,) = await times(fleet)

    assert missed.hour == 3
    assert fleet.clock.now() - missed < timedelta(days=1)


async def test_a_schedule_deleted_by_hand_is_declared_again(fleet: Fleet) -> None:
    """By the worker that needs it, from then on."""
    ticking(fleet)
    fleet.start()
    await asyncio.sleep(130.0)
    await fleet.memory_ledger.declare_schedules([Schedule(task="x", cron="0 0 1 1 *")], 0.0)
    assert [each.task for each in await fleet.memory_ledger.schedules()] == ["x"]
    await asyncio.sleep(240.0)

    assert gaps(await times(fleet)) == {60.0}


@pytest.mark.parametrize("catch_up", [True, False])
async def test_the_times_of_a_pause_are_skipped(fleet: Fleet, *, catch_up: bool) -> None:
    """By every worker at once, also by one that starts meanwhile; none is made up for."""
    ticking(fleet, catch_up=catch_up)
    for name in ("a", "b"):
        fleet.start(name, **SLOW)
    await asyncio.sleep(150.0)
    await fleet.memory_ledger.pause_schedule("tick")
    before = len(await times(fleet))
    fleet.ledger.calls.clear()
    await asyncio.sleep(600.0)
    fleet.start("c", **SLOW)
    await asyncio.sleep(600.0)
    calls = fleet.ledger.count("accept_scheduled"), fleet.ledger.count("schedules")
    during = len(await times(fleet))
    await fleet.memory_ledger.resume_schedule("tick")
    await asyncio.sleep(30.0)
    resumed = len(await times(fleet))
    await asyncio.sleep(270.0)
    after = await times(fleet)

    assert during == resumed == before
    assert gaps(after[:before]) | gaps(after[before:]) == {60.0}
    assert len(after) in (before + 4, before + 5)
    assert max(calls) <= 2 * 20 + 3


async def test_a_time_before_a_pause_that_no_worker_took_is_skipped(fleet: Fleet) -> None:
    """A worker that comes late finds it within a minute, and the ledger refuses it."""
    ticking(fleet, "0 * * * *", catch_up=True)
    worker = fleet.start("first", **SLOW)
    await asyncio.sleep(2 * 3600.0)
    await worker.drain(1.0)
    before = len(fleet.done)
    now = fleet.clock.now()
    due = now.replace(minute=0, second=0, microsecond=0) + timedelta(hours=1)
    await asyncio.sleep((due - now).total_seconds() + 10.0)
    await fleet.memory_ledger.pause_schedule("tick")
    await fleet.memory_ledger.resume_schedule("tick")
    fleet.start("second", **SLOW)
    await asyncio.sleep(1800.0)
    skipped = len(fleet.done)
    await asyncio.sleep(3600.0)

    assert (before, skipped, len(fleet.done)) == (2, 2, 3)


async def test_a_draining_worker_submits_nothing(fleet: Fleet) -> None:
    """Another worker does."""
    ticking(fleet, EACH_SECOND)
    worker = fleet.start()
    await fleet.accept("sleep", "1000.0")
    await fleet.until(lambda: fleet.running)
    await asyncio.sleep(5.0)
    before = fleet.ledger.count("accept_scheduled")
    await worker.drain(300.0)

    assert fleet.ledger.count("accept_scheduled") == before


async def test_the_time_of_the_ledger_is_known_between_two_renewals(fleet: Fleet) -> None:
    """A slow answer does not change it; a clock that was set does."""
    fleet.declare("tick", fleet.note, cron="0 0 1 1 *")
    worker = fleet.worker()
    heartbeat = worker._roles.heartbeat
    began = fleet.clock.now()

    def renewed(seconds: float, answered: float, now: float) -> float:
        """Renew with a request at a monotonic time; return how far the estimate is ahead."""
        ends = began + timedelta(seconds=answered + 30.0)
        heartbeat.on_renewed(seconds, Registration(lease_until=ends))
        found = heartbeat.ledger_time(now)
        assert found is not None
        return (found - began).total_seconds() - (now - base)

    base = fleet.clock.monotonic()
    assert heartbeat.ledger_time(base) is None
    assert renewed(base, 0.0, base) == pytest.approx(0.0, abs=0.001)
    await asyncio.sleep(10.0)  # the request took 9 of these seconds, its answer the tenth
    assert renewed(base, 9.0, base + 10.0) == pytest.approx(0.0, abs=0.001)
    assert renewed(base + 10.0, 3610.0, base + 10.0) == pytest.approx(3600.0, abs=0.001)
