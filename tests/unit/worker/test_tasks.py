"""The built-in tasks as a worker has them: found, run, and once per period."""

from datetime import UTC, datetime, timedelta

import pytest
from tests.manual_clock import ManualClock
from tests.unit.doubles import Act, ActingCheck
from tests.unit.webhooks.scripted import ScriptedSender, delivery_to

from viralfx.adapters.codec import MsgspecCodec
from viralfx.adapters.memory import MemoryJobLedger
from viralfx.domain.health import CheckPolicy, CheckReport, Status, Transition
from viralfx.domain.jobs.job import JobDraft, completed, new_job_id
from viralfx.domain.jobs.tasks import JobContext, Task, TaskRegistry
from viralfx.domain.monitor import HealthMonitor
from viralfx.domain.resilience.deadline import Deadline
from viralfx.worker import built_in_periodic, built_in_tasks
from viralfx.worker.analytics import seconds_in_each

NOON = datetime(2026, 1, 6, 12, tzinfo=UTC)


def tasks(
    clock: ManualClock,
    *,
    ledger: MemoryJobLedger | None = None,
    monitor: HealthMonitor | None = None,
    retention: float = 3600.0,
) -> dict[str, Task]:
    """Return the built-in tasks by name."""
    made = built_in_tasks(
        ledger=ledger or MemoryJobLedger(clock),
        monitor=monitor or HealthMonitor(clock=clock),
        clock=clock,
        delivery=delivery_to("*.example.com", sender=ScriptedSender(200), clock=clock),
        alert_url=None,
        webhook_timeout=10.0,
        retention=retention,
        instance="worker-1",
    )
    return {each.name: each for each in made}


def context(clock: ManualClock, seconds: float = 120.0) -> JobContext:
    """Return that of a first attempt."""
    return JobContext(
        id="job-1",
        attempt=1,
        deadline=Deadline(seconds, clock=clock),
        correlation_id="c",
        created_at=clock.now(),
    )


def test_there_are_three_and_two_of_them_are_periodic(clock: ManualClock) -> None:
    """Each in its queue; what the periodic ones are given is what they take."""
    found = tasks(clock)
    assert {name: each.queue for name, each in found.items()} == {
        "notifications.webhook": "notifications",
        "analytics.rollup_health": "analytics",
        "default.prune": "default",
    }
    registry, codec = TaskRegistry(found.values()), MsgspecCodec()
    for each in built_in_periodic():
        assert each.every == 3600.0
        codec.decode(each.payload, registry.find(each.task).payload_type)
    assert [each.task for each in built_in_periodic()] == [
        "analytics.rollup_health",
        "default.prune",
    ]


# -- default.prune ---------------------------------------------------------------------------------


async def finished(ledger: MemoryJobLedger, count: int) -> None:
    """Put completed jobs into the ledger."""
    await ledger.register("w", ["default"], 30.0)
    await ledger.accept(
        [JobDraft(id=new_job_id(), queue="default", task="t", payload=b"0") for _ in range(count)]
    )
    claims = await ledger.claim("default", "w", count)
    assert len(claims) == count
    await ledger.settle([completed(claim, b"0") for claim in claims])


async def test_jobs_are_forgotten_when_they_are_old_enough(clock: ManualClock) -> None:
    """Those that finished longer ago than the retention, in however many batches."""
    ledger = MemoryJobLedger(clock)
    prune = tasks(clock, ledger=ledger)["default.prune"].function
    await finished(ledger, 2500)
    await clock.advance(3000)
    await finished(ledger, 3)
    assert await prune(None, context(clock)) == {"pruned": 0}
    await clock.advance(601)
    assert await prune(None, context(clock)) == {"pruned": 2500}
    assert len(await ledger.page(limit=100)) == 3


async def test_no_retention_keeps_jobs_for_ever(clock: ManualClock) -> None:
    """Zero is no time at all only for other settings."""
    ledger = MemoryJobLedger(clock)
    await finished(ledger, 3)
    await clock.advance(1e7)
    prune = tasks(clock, ledger=ledger, retention=0.0)["default.prune"].function
    assert await prune(None, context(clock)) == {"pruned": 0}
    assert len(await ledger.page(limit=100)) == 3


async def test_what_does_not_fit_into_the_time_is_left(clock: ManualClock) -> None:
    """A batch is not begun that the timeout might cut."""

    class Slow(MemoryJobLedger):
        async def prune(self, older_than: float, limit: int = 1000) -> int:
            clock.jump(25.0)
            return await super().prune(older_than, limit)

    ledger = Slow(clock)
    await finished(ledger, 5000)
    await clock.advance(7200)
    prune = tasks(clock, ledger=ledger)["default.prune"].function
    assert await prune(None, context(clock)) == {"pruned": 4000}
    assert await prune(None, context(clock)) == {"pruned": 1000}


# -- analytics.rollup_health -----------------------------------------------------------------------


async def test_the_rollup_says_how_this_process_has_been(clock: ManualClock) -> None:
    """Each check's status, its changes, and how long it had which status in the last hour."""
    check = ActingCheck(Act.PASS)
    monitor = HealthMonitor(clock=clock)
    monitor.register("database", check, CheckPolicy(interval=10.0, timeout=2.0))
    rollup = tasks(clock, monitor=monitor)["analytics.rollup_health"].function
    monitor.start()
    await clock.advance(7200)
    check.act = Act.FAIL
    await clock.advance(600)
    check.act = Act.WARN
    await clock.advance(600)
    result = await rollup(None)
    await monitor.stop()

    database = result["checks"]["database"]
    seconds = database.pop("seconds")
    assert database == {"status": "warn", "transitions": 3}
    assert {name: round(value, -2) for name, value in seconds.items()} == {
        "pass": 2400.0,
        "fail": 600.0,
        "warn": 600.0,
    }
    assert sum(seconds.values()) == pytest.approx(3600.0)
    assert (result["instance"], result["health"]) == ("worker-1", "degraded")
    assert result["to"] > result["from"]
    assert MsgspecCodec().encode(result)


def change(minutes: float, old: Status | None, new: Status) -> Transition:
    """Return a change of a check so many minutes after noon."""
    return Transition(
        check="c",
        old=old,
        new=new,
        code=None,
        message="",
        at=NOON + timedelta(minutes=minutes),
        correlation_id=None,
    )


@pytest.mark.parametrize(
    ("recent", "now", "expected"),
    [
        ([], Status.PASS, {"pass": 3600.0, "warn": 0.0, "fail": 0.0}),
        ([(20, Status.PASS, Status.FAIL)], Status.FAIL, {"pass": 1200.0, "fail": 2400.0}),
        ([(20, None, Status.WARN)], Status.WARN, {"warn": 2400.0}),
        (
            [(20, Status.FAIL, Status.PASS), (30, Status.PASS, Status.FAIL)],
            Status.FAIL,
            {"pass": 600.0, "fail": 3000.0},
        ),
    ],
)
def test_seconds_in_each_status(
    recent: list[tuple[float, Status | None, Status]], now: Status, expected: dict[str, float]
) -> None:
    """Time before the first result is nobody's."""
    check = CheckReport(
        name="c",
        status=now,
        message="",
        details={},
        code=None,
        correlation_id=None,
        response_time=None,
        checked_at=None,
        since=NOON,
        policy=CheckPolicy(),
    )
    found = seconds_in_each(
        check, [change(*each) for each in recent], NOON, change(60, None, now).at
    )
    assert found == {"pass": 0.0, "warn": 0.0, "fail": 0.0, **expected}
