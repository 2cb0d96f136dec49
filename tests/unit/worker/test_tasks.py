"""The built-in tasks: declared, run, and periodic."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest
from tests.manual_clock import ManualClock
from tests.unit.doubles import Act, ActingCheck
from tests.unit.webhooks.scripted import ScriptedSender, delivery_to

from viralfx.adapters.codec import MsgspecCodec
from viralfx.core.ids import new_job_id
from viralfx.domain.health.model import CheckPolicy, CheckReport, Status, Transition
from viralfx.domain.health.monitor import HealthMonitor
from viralfx.jobs.memory import MemoryJobLedger
from viralfx.jobs.model import JobDraft, JobError, JobFilter, JobState, completed, failed
from viralfx.jobs.tasks import JobContext, Task
from viralfx.jobs.worker import built_in_tasks
from viralfx.jobs.worker.builtin import seconds_in_each
from viralfx.jobs.worker.maintenance import PAUSE_SECONDS, Retention
from viralfx.resilience.deadline import Deadline

NOON = datetime(2026, 1, 6, 12, tzinfo=UTC)


def tasks(
    clock: ManualClock,
    *,
    ledger: MemoryJobLedger | None = None,
    monitor: HealthMonitor | None = None,
    retention: float = 3600.0,
    retention_failed: float = 3600.0,
) -> dict[str, Task]:
    """Return the built-in tasks by name."""
    made = built_in_tasks(
        ledger=ledger or MemoryJobLedger(clock),
        monitor=monitor or HealthMonitor(clock=clock),
        clock=clock,
        delivery=delivery_to("*.example.com", sender=ScriptedSender(200), clock=clock),
        alert_url=None,
        webhook_timeout=10.0,
        retention=Retention(finished=retention, failed=retention_failed),
        instance="worker-1",
    )
    return {each.name: each for each in made}


def context(clock: ManualClock, seconds: float = 120.0) -> JobContext:
    """Return the context of a first attempt."""
    return JobContext(
        id="job-1",
        attempt=1,
        deadline=Deadline(seconds, clock=clock),
        correlation_id="c",
        created_at=clock.now(),
    )


def test_two_of_the_three_built_in_tasks_have_a_schedule(clock: ManualClock) -> None:
    """Each has its queue, and scheduled ones a payload that may be null."""
    found = tasks(clock)
    assert {name: each.queue for name, each in found.items()} == {
        "notifications.webhook": "notifications",
        "analytics.rollup_health": "analytics",
        "default.prune": "default",
    }
    scheduled = {name: each for name, each in found.items() if each.schedule is not None}
    for each in scheduled.values():
        MsgspecCodec().decode(b"null", each.payload_type)
    assert {name: each.cron for name, each in scheduled.items()} == {
        "analytics.rollup_health": "0 * * * *",
        "default.prune": "0 * * * *",
    }


# -- default.prune ---------------------------------------------------------------------------------


async def finished(ledger: MemoryJobLedger, count: int, error: JobError | None = None) -> None:
    """Add completed jobs to the ledger; with an error, failed ones."""
    await ledger.register("w", ["default"], 30.0)
    await ledger.accept(
        [JobDraft(id=new_job_id(), queue="default", task="t", payload=b"0") for _ in range(count)]
    )
    claims = await ledger.claim("default", "w", count)
    assert len(claims) == count
    await ledger.settle(
        [failed(claim, error) if error else completed(claim, b"0") for claim in claims]
    )


async def pruned(clock: ManualClock, prune: Task) -> int:
    """Run the task, with the pauses between its batches; return how many jobs it deleted."""
    running = asyncio.create_task(prune.function(None, context(clock)))
    while not running.done():
        await clock.advance(PAUSE_SECONDS)
    result = await running
    assert result.keys() == {"pruned"}
    return int(result["pruned"])


async def test_jobs_older_than_the_retention_are_pruned(clock: ManualClock) -> None:
    """In any number of batches."""
    ledger = MemoryJobLedger(clock)
    prune = tasks(clock, ledger=ledger)["default.prune"]
    await finished(ledger, 2500)
    await clock.advance(3000)
    await finished(ledger, 3)
    assert await pruned(clock, prune) == 0
    await clock.advance(601)
    assert await pruned(clock, prune) == 2500
    assert len(await ledger.page(JobFilter(limit=100))) == 3


class SlowLedger(MemoryJobLedger):
    """Takes half a second to delete a batch."""

    def __init__(self, clock: ManualClock) -> None:
        super().__init__(clock)
        self.batches: list[float] = []

    async def prune(
        self, older_than: float, limit: int = 1000, *, failed: bool | None = None
    ) -> int:
        """Note the start, and take half a second."""
        self.batches.append(self._clock.monotonic())
        await self._clock.sleep(0.5)
        return await super().prune(older_than, limit, failed=failed)


async def test_pruning_takes_at_most_half_of_a_connection(clock: ManualClock) -> None:
    """After a slow batch it pauses for as long as the batch took."""
    ledger = SlowLedger(clock)
    prune = tasks(clock, ledger=ledger, retention_failed=0.0)["default.prune"]
    await finished(ledger, 2500)
    await clock.advance(3601)
    assert await pruned(clock, prune) == 2500
    first, second, third = ledger.batches
    assert 1.0 <= second - first < 1.1
    assert 1.0 <= third - second < 1.1


async def test_failed_jobs_have_a_retention_of_their_own(clock: ManualClock) -> None:
    """Longer or shorter than that of the others."""
    for retention, kept in ((3000.0, JobState.FAILED), (9000.0, JobState.COMPLETED)):
        ledger = MemoryJobLedger(clock)
        made = tasks(clock, ledger=ledger, retention=retention, retention_failed=6000.0)
        await finished(ledger, 1)
        await finished(ledger, 1, error=JobError(code="error", message="the task raised"))
        await clock.advance(min(retention, 6000.0) + 1)
        assert await pruned(clock, made["default.prune"]) == 1
        (left,) = await ledger.page()
        assert left.state is kept


async def test_zero_retention_keeps_jobs_without_limit(clock: ManualClock) -> None:
    """Zero turns pruning off."""
    ledger = MemoryJobLedger(clock)
    await finished(ledger, 3)
    await clock.advance(1e7)
    prune = tasks(clock, ledger=ledger, retention=0.0, retention_failed=0.0)["default.prune"]
    assert await pruned(clock, prune) == 0
    assert len(await ledger.page(JobFilter(limit=100))) == 3


async def test_pruning_stops_before_its_timeout(clock: ManualClock) -> None:
    """No batch starts that the timeout could interrupt."""

    class Slow(MemoryJobLedger):
        async def prune(
            self, older_than: float, limit: int = 1000, *, failed: bool | None = None
        ) -> int:
            clock.jump(25.0)
            return await super().prune(older_than, limit, failed=failed)

    ledger = Slow(clock)
    await finished(ledger, 5000)
    await clock.advance(7200)
    prune = tasks(clock, ledger=ledger)["default.prune"]
    # Each batch of 25 s, and a pause as long; the third would end after the timeout.
    assert [await pruned(clock, prune) for _ in range(3)] == [2000, 2000, 1000]


# -- analytics.rollup_health -----------------------------------------------------------------------


async def test_the_rollup_reports_each_check(clock: ManualClock) -> None:
    """Its status, its transitions, and the seconds in each status of the last hour."""
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
    """Time before the first result does not count."""
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
