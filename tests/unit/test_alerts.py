"""Alerts: one for each status change, with limits, and without blocking the monitor."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
from tests.manual_clock import ManualClock
from tests.unit.doubles import Act, ActingCheck
from tests.unit.webhooks.scripted import ScriptedSender, delivery_to

from viralfx.adapters.codec import MsgspecCodec
from viralfx.core.clock import timestamp
from viralfx.core.errors import LedgerUnavailableError
from viralfx.domain.health.model import CheckPolicy, Status, Transition
from viralfx.domain.health.monitor import HealthMonitor
from viralfx.jobs.alerts import HealthAlerts
from viralfx.jobs.ledger import Accepted, Check
from viralfx.jobs.memory import MemoryJobLedger
from viralfx.jobs.model import Job, JobDraft
from viralfx.jobs.service import JobService
from viralfx.jobs.tasks import Task, TaskRegistry, declared_task
from viralfx.jobs.worker.builtin import send_webhook

WINDOW = 300.0
PASS, WARN, FAIL = Status.PASS, Status.WARN, Status.FAIL


class AwayLedger(MemoryJobLedger):
    """A ledger that can be unavailable, hang, or raise."""

    def __init__(self, clock: ManualClock) -> None:
        super().__init__(clock)
        self.trouble: BaseException | None = None
        self.held: asyncio.Event | None = None
        """Callers wait for this event while it is set."""
        self.asked = 0
        self.accepted: list[Job] = []
        """Jobs in order of acceptance; their ids only have a resolution of a millisecond."""

    async def accept(
        self, drafts: Sequence[JobDraft], *, check: Check | None = None
    ) -> Sequence[Accepted]:
        """Accept the job, or fail as the test asks."""
        self.asked += 1
        if self.held is not None:
            await self.held.wait()
        if self.trouble is not None:
            raise self.trouble
        answers = await super().accept(drafts, check=check)
        self.accepted += [answer.job for answer in answers if answer.created]
        return answers


def the_task(clock: ManualClock) -> Task:
    """Return the built-in task."""
    delivery = delivery_to("*.example.com", sender=ScriptedSender(200), clock=clock)
    task = declared_task(send_webhook(delivery, alert_url=None, timeout=10.0))
    assert task is not None
    return task


class Instance:
    """One process with alerts, on a ledger that other instances may share."""

    def __init__(self, clock: ManualClock, ledger: AwayLedger, name: str = "a") -> None:
        self.ledger = ledger
        self._clock = clock
        self._last: dict[str, Status | None] = {}
        service = JobService(
            ledger=ledger,
            tasks=TaskRegistry([the_task(clock)]),
            codec=MsgspecCodec(),
            queues=["notifications"],
        )
        self.alerts = HealthAlerts(
            service,
            clock=clock,
            instance=name,
            environment="test",
            shared=lambda check: check == "database",
            window=WINDOW,
            capacity=5,
        )
        self.running = asyncio.create_task(self.alerts.run())

    def becomes(self, new: Status, check: str = "database", code: str | None = None) -> None:
        """Publish a transition to this status."""
        self.alerts(
            Transition(
                check=check,
                old=self._last.get(check),
                new=new,
                code=code,
                message=f"{check} is a {new}",
                at=self._clock.now(),
                correlation_id=f"attempt-{new}",
            )
        )
        self._last[check] = new

    async def sent(self) -> list[tuple[str, str]]:
        """Return the checks and statuses of all alerts in the ledger, oldest first."""
        await self._clock.settle()
        contents = map(content, self.ledger.accepted)
        return [(each["data"]["check"], each["data"]["status"]) for each in contents]


def content(job: Job) -> dict[str, dict[str, str]]:
    """Return a job's payload."""
    decoded: dict[str, dict[str, str]] = json.loads(job.payload)
    return decoded


@asynccontextmanager
async def instances(clock: ManualClock, count: int = 1) -> AsyncIterator[list[Instance]]:
    """Run several instances on one ledger."""
    ledger = AwayLedger(clock)
    made = [Instance(clock, ledger, name) for name in "abcdef"[:count]]
    await clock.settle()
    try:
        yield made
    finally:
        for instance in made:
            assert not instance.running.done()
            instance.running.cancel()
        await asyncio.wait([instance.running for instance in made])


async def test_a_change_becomes_a_job(clock: ManualClock) -> None:
    """The job contains what a reader needs, and not the URL."""
    async with instances(clock) as (one,):
        at = clock.now()
        one.becomes(PASS)
        one.becomes(FAIL, code="timeout")
        await clock.settle()

        (job,) = one.ledger.accepted

        assert (job.task, job.queue) == ("notifications.webhook", "notifications")
        assert job.correlation_id == "attempt-fail"
        assert json.loads(job.payload) == {
            "alert": True,
            "type": "health.changed",
            "data": {
                "check": "database",
                "status": "fail",
                "previous": "pass",
                "code": "timeout",
                "message": "database is a fail",
                "at": timestamp(at),
                "correlationId": "attempt-fail",
                "environment": "test",
                "instance": "a",
            },
        }
        assert one.alerts.waiting == 0


async def test_a_bad_first_result_causes_an_alert(clock: ManualClock) -> None:
    """A good first result does not."""
    async with instances(clock) as (one,):
        one.becomes(PASS, "memory")
        one.becomes(WARN, "queues")
        one.becomes(FAIL, "database")
        assert await one.sent() == [("queues", "warn"), ("database", "fail")]


async def test_failure_and_recovery_both_cause_alerts(clock: ManualClock) -> None:
    """In order, and again when they happen again later."""
    async with instances(clock) as (one,):
        for _ in range(2):
            one.becomes(FAIL)
            await clock.advance(10)
            one.becomes(PASS)
            await clock.advance(2 * WINDOW)
        assert await one.sent() == [("database", "fail"), ("database", "pass")] * 2


async def test_instances_send_one_alert_for_a_shared_check(clock: ManualClock) -> None:
    """A check that is not shared causes one alert in each instance."""
    async with instances(clock, 3) as (one, two, three):
        for instance in (one, two, three):
            instance.becomes(FAIL, "database")
            instance.becomes(WARN, "memory")
            await clock.advance(2)
        sent = await one.sent()
        assert sorted(sent) == [("database", "fail"), *[("memory", "warn")] * 3]
        assert all(instance.alerts.dropped == 0 for instance in (one, two, three))


async def test_flapping_is_limited_and_its_last_status_is_sent(clock: ManualClock) -> None:
    """One alert per status and window; the last alert shows the current status."""
    async with instances(clock) as (one,):
        for _ in range(50):
            one.becomes(FAIL)
            await clock.advance(1)
            one.becomes(PASS)
            await clock.advance(1)
        one.becomes(FAIL)
        assert await one.sent() == [("database", "fail"), ("database", "pass")]

        await clock.advance(WINDOW)

        assert await one.sent() == [
            ("database", "fail"),
            ("database", "pass"),
            ("database", "fail"),
        ]
        await clock.advance(10 * WINDOW)
        assert len(await one.sent()) == 3


async def test_flapping_back_to_the_sent_status_causes_no_alert(
    clock: ManualClock,
) -> None:
    """Flapping for many windows causes at most two alerts in each."""
    async with instances(clock) as (one,):
        for _ in range(300):
            one.becomes(FAIL)
            await clock.advance(5)
            one.becomes(PASS)
            await clock.advance(5)
        sent = await one.sent()
        windows = 300 * 10 / WINDOW
        assert windows <= len(sent) <= 2 * windows + 2
        await clock.advance(10 * WINDOW)
        assert (await one.sent())[-1] == ("database", "pass")
        assert len(await one.sent()) <= 2 * windows + 3


@pytest.mark.parametrize("trouble", ["away", "hangs"])
async def test_alerts_wait_for_the_ledger(clock: ManualClock, trouble: str) -> None:
    """A failure is sent after the outage, before the recovery, with back-off between attempts."""
    async with instances(clock) as (one,):
        if trouble == "away":
            one.ledger.trouble = LedgerUnavailableError("gone")
        else:
            one.ledger.held = asyncio.Event()
        one.becomes(PASS)
        one.becomes(FAIL)
        await clock.advance(600)
        assert one.alerts.waiting == 1
        assert one.ledger.asked <= 25
        # The abandoned tasks were cancelled, so they do not accumulate.
        assert len(asyncio.all_tasks()) < 8
        one.becomes(PASS)
        one.ledger.trouble = None
        if one.ledger.held is not None:
            one.ledger.held.set()

        await clock.advance(60)

        assert await one.sent() == [("database", "fail"), ("database", "pass")]
        times = [content(job)["data"]["at"] for job in one.ledger.accepted]
        assert times == sorted(times)
        assert one.alerts.waiting == 0


async def test_waiting_alerts_are_limited(
    clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    """The oldest is dropped, logged and counted."""
    async with instances(clock) as (one,):
        one.ledger.trouble = LedgerUnavailableError("gone")
        for number in range(8):
            one.becomes(FAIL, f"check-{number}")
            await clock.settle()
        assert (one.alerts.waiting, one.alerts.dropped) == (5, 3)
        assert caplog.messages.count("Alert dropped") == 3
        one.ledger.trouble = None
        await clock.advance(60)
        assert await one.sent() == [(f"check-{number}", "fail") for number in range(3, 8)]


async def test_dropping_a_submitted_alert_keeps_the_next_ones(clock: ManualClock) -> None:
    """The dropped alert may still arrive; the next ones do."""
    async with instances(clock) as (one,):
        one.ledger.held = asyncio.Event()
        for number in range(6):
            one.becomes(FAIL, f"check-{number}")
            await clock.settle()
        assert (one.alerts.waiting, one.alerts.dropped) == (5, 1)
        one.ledger.held.set()
        assert await one.sent() == [(f"check-{number}", "fail") for number in range(6)]


async def test_back_off_starts_anew_with_each_outage(clock: ManualClock) -> None:
    """The length of the previous outage does not matter."""
    async with instances(clock) as (one,):
        for number in range(2):
            one.ledger.trouble = LedgerUnavailableError("gone")
            one.becomes(FAIL, f"check-{number}")
            await clock.advance(100)
            one.ledger.trouble = None
            await clock.advance(30)
            assert one.alerts.waiting == 0
        one.ledger.trouble = LedgerUnavailableError("gone")
        one.becomes(FAIL, "check-2")
        await clock.settle()
        one.ledger.trouble = None
        await clock.advance(1.0)
        assert one.alerts.waiting == 0


async def test_a_permanent_error_drops_one_alert(
    clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    """The next alerts are sent."""
    async with instances(clock) as (one,):
        one.ledger.trouble = RuntimeError("a bug")
        one.becomes(FAIL, "first")
        await clock.settle()
        one.ledger.trouble = None
        one.becomes(FAIL, "second")
        assert await one.sent() == [("second", "fail")]
        assert one.alerts.dropped == 1
        assert "Alert dropped" in caplog.messages


async def test_other_events_are_ignored(clock: ManualClock) -> None:
    """The monitor also publishes attempts and reports."""
    async with instances(clock) as (one,):
        check = ActingCheck(Act.PASS)
        monitor = HealthMonitor(clock=clock)
        monitor.register("database", check, CheckPolicy(interval=5.0, timeout=2.0))
        monitor.subscribe(one.alerts)
        monitor.start()
        await clock.advance(60)
        check.act = Act.FAIL
        await clock.advance(60)
        check.act = Act.PASS
        await clock.advance(60)
        await monitor.stop()
        assert await one.sent() == [("database", "fail"), ("database", "pass")]


async def test_the_drain_waits_two_seconds_for_the_ledger(clock: ManualClock) -> None:
    """It returns at once when the ledger accepts the alerts, and after 2 s when it does not."""
    async with instances(clock) as (one,):
        await asyncio.create_task(one.alerts.drain(10.0))
        one.becomes(FAIL)
        await asyncio.create_task(one.alerts.drain(10.0))
        assert len(one.ledger.accepted) == 1

        one.ledger.trouble = LedgerUnavailableError("gone")
        one.becomes(PASS)
        began = clock.monotonic()
        stopping = asyncio.create_task(one.alerts.drain(10.0))
        await clock.advance(1.9)
        assert not stopping.done()
        await clock.advance(0.1)
        assert stopping.done()
        assert clock.monotonic() - began == pytest.approx(2.0)
        assert one.alerts.waiting == 1
