"""Alerts: each change of health told once, few enough to be read, never in the monitor's way."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
from tests.manual_clock import ManualClock
from tests.unit.doubles import Act, ActingCheck
from tests.unit.webhooks.scripted import ScriptedSender, delivery_to

from viralfx.adapters.codec import MsgspecCodec
from viralfx.adapters.memory import MemoryJobLedger
from viralfx.domain.clock import timestamp
from viralfx.domain.health import CheckPolicy, Status, Transition
from viralfx.domain.jobs.alerts import HealthAlerts, StopAlerts
from viralfx.domain.jobs.job import Job, JobDraft, LedgerUnavailableError
from viralfx.domain.jobs.ledger import Accepted
from viralfx.domain.jobs.service import JobService
from viralfx.domain.jobs.tasks import Task, TaskRegistry, declared_task
from viralfx.domain.monitor import HealthMonitor
from viralfx.worker.notifications import send_webhook

WINDOW = 300.0
PASS, WARN, FAIL = Status.PASS, Status.WARN, Status.FAIL


class AwayLedger(MemoryJobLedger):
    """A ledger that can be away, hang, or break."""

    def __init__(self, clock: ManualClock) -> None:
        super().__init__(clock)
        self.trouble: BaseException | None = None
        self.held: asyncio.Event | None = None
        """While it is set to one, whoever asks waits for that."""
        self.asked = 0
        self.accepted: list[Job] = []
        """In the order of their acceptance; their ids only tell the millisecond."""

    async def accept(self, drafts: Sequence[JobDraft]) -> Sequence[Accepted]:
        """Accept, unless it is told not to."""
        self.asked += 1
        if self.held is not None:
            await self.held.wait()
        if self.trouble is not None:
            raise self.trouble
        answers = await super().accept(drafts)
        self.accepted += [answer.job for answer in answers if answer.created]
        return answers


def the_task(clock: ManualClock) -> Task:
    """Return the built-in one."""
    delivery = delivery_to("*.example.com", sender=ScriptedSender(200), clock=clock)
    task = declared_task(send_webhook(delivery, alert_url=None, timeout=10.0))
    assert task is not None
    return task


class Instance:
    """One process with alerts, on a ledger that others may share."""

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
        """Let the monitor tell of a change."""
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

    async def told(self) -> list[tuple[str, str]]:
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
    """With all that a reader needs, and nothing of where it goes."""
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


async def test_the_first_result_is_told_where_it_is_bad(clock: ManualClock) -> None:
    """A start that goes well is no news."""
    async with instances(clock) as (one,):
        one.becomes(PASS, "memory")
        one.becomes(WARN, "queues")
        one.becomes(FAIL, "database")
        assert await one.told() == [("queues", "warn"), ("database", "fail")]


async def test_loss_and_recovery_are_both_told(clock: ManualClock) -> None:
    """In order, and again when they come again later."""
    async with instances(clock) as (one,):
        for _ in range(2):
            one.becomes(FAIL)
            await clock.advance(10)
            one.becomes(PASS)
            await clock.advance(2 * WINDOW)
        assert await one.told() == [("database", "fail"), ("database", "pass")] * 2


async def test_instances_tell_of_what_they_share_once(clock: ManualClock) -> None:
    """And of what is their own each for itself."""
    async with instances(clock, 3) as (one, two, three):
        for instance in (one, two, three):
            instance.becomes(FAIL, "database")
            instance.becomes(WARN, "memory")
            await clock.advance(2)
        told = await one.told()
        assert sorted(told) == [("database", "fail"), *[("memory", "warn")] * 3]
        assert all(instance.alerts.dropped == 0 for instance in (one, two, three))


async def test_flapping_is_bounded_and_its_end_is_told(clock: ManualClock) -> None:
    """Once per status and window, however often it changes; the last word is what is true."""
    async with instances(clock) as (one,):
        for _ in range(50):
            one.becomes(FAIL)
            await clock.advance(1)
            one.becomes(PASS)
            await clock.advance(1)
        one.becomes(FAIL)
        assert await one.told() == [("database", "fail"), ("database", "pass")]

        await clock.advance(WINDOW)

        assert await one.told() == [
            ("database", "fail"),
            ("database", "pass"),
            ("database", "fail"),
        ]
        await clock.advance(10 * WINDOW)
        assert len(await one.told()) == 3


async def test_flapping_that_ends_as_it_was_last_told_needs_no_word_more(
    clock: ManualClock,
) -> None:
    """Also where it flapped for many windows: at most two alerts in each."""
    async with instances(clock) as (one,):
        for _ in range(300):
            one.becomes(FAIL)
            await clock.advance(5)
            one.becomes(PASS)
            await clock.advance(5)
        told = await one.told()
        windows = 300 * 10 / WINDOW
        assert windows <= len(told) <= 2 * windows + 2
        await clock.advance(10 * WINDOW)
        assert (await one.told())[-1] == ("database", "pass")
        assert len(await one.told()) <= 2 * windows + 3


@pytest.mark.parametrize("trouble", ["away", "hangs"])
async def test_alerts_wait_for_the_ledger(clock: ManualClock, trouble: str) -> None:
    """The loss of a database is told when it is back, before the recovery; nobody hammers it."""
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
        # Nothing piles up: the tasks left behind were cancelled.
        assert len(asyncio.all_tasks()) < 8
        one.becomes(PASS)
        one.ledger.trouble = None
        if one.ledger.held is not None:
            one.ledger.held.set()

        await clock.advance(60)

        assert await one.told() == [("database", "fail"), ("database", "pass")]
        times = [content(job)["data"]["at"] for job in one.ledger.accepted]
        assert times == sorted(times)
        assert one.alerts.waiting == 0


async def test_those_that_wait_are_bounded(
    clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    """The oldest is dropped, which is logged and counted."""
    async with instances(clock) as (one,):
        one.ledger.trouble = LedgerUnavailableError("gone")
        for number in range(8):
            one.becomes(FAIL, f"check-{number}")
            await clock.settle()
        assert (one.alerts.waiting, one.alerts.dropped) == (5, 3)
        assert caplog.messages.count("Alert dropped") == 3
        one.ledger.trouble = None
        await clock.advance(60)
        assert await one.told() == [(f"check-{number}", "fail") for number in range(3, 8)]


async def test_one_that_is_dropped_on_its_way_takes_no_other_along(clock: ManualClock) -> None:
    """It may still arrive; what comes after it does."""
    async with instances(clock) as (one,):
        one.ledger.held = asyncio.Event()
        for number in range(6):
            one.becomes(FAIL, f"check-{number}")
            await clock.settle()
        assert (one.alerts.waiting, one.alerts.dropped) == (5, 1)
        one.ledger.held.set()
        assert await one.told() == [(f"check-{number}", "fail") for number in range(6)]


async def test_each_outage_begins_with_a_short_wait(clock: ManualClock) -> None:
    """However long the one before was."""
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


async def test_an_error_drops_one_alert_and_no_other(
    clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    """What time does not mend is not tried for ever."""
    async with instances(clock) as (one,):
        one.ledger.trouble = RuntimeError("a bug")
        one.becomes(FAIL, "first")
        await clock.settle()
        one.ledger.trouble = None
        one.becomes(FAIL, "second")
        assert await one.told() == [("second", "fail")]
        assert one.alerts.dropped == 1
        assert "Alert dropped" in caplog.messages


async def test_other_events_are_passed_over(clock: ManualClock) -> None:
    """The monitor tells of attempts and reports, too; here with the real one."""
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
        assert await one.told() == [("database", "fail"), ("database", "pass")]


async def test_the_stop_waits_for_alerts_that_are_on_their_way(clock: ManualClock) -> None:
    """But not for a ledger that is away."""
    async with instances(clock) as (one,):
        stage = StopAlerts(one.alerts, clock, patience=2.0)
        await asyncio.create_task(stage.run(10.0))
        one.becomes(FAIL)
        await asyncio.create_task(stage.run(10.0))
        assert len(one.ledger.accepted) == 1

        one.ledger.trouble = LedgerUnavailableError("gone")
        one.becomes(PASS)
        began = clock.monotonic()
        stopping = asyncio.create_task(stage.run(10.0))
        await clock.advance(1.9)
        assert not stopping.done()
        await clock.advance(0.1)
        assert stopping.done()
        assert clock.monotonic() - began == pytest.approx(2.0)
        assert one.alerts.waiting == 1
