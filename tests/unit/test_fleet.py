"""The report of a process to the fleet, and the history of its checks."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from tests.manual_clock import ManualClock
from tests.unit.doubles import Act, ActingCheck

from viralfx.adapters.memory import MemoryFleetStore
from viralfx.domain.fleet import (
    BEAT_SECONDS,
    MAX_BUFFERED_CHANGES,
    SILENT_AFTER_SECONDS,
    UNKNOWN,
    CheckChange,
    FleetReporter,
    FleetUnavailableError,
    Instance,
    InstanceReport,
    histories,
    predecessors,
)
from viralfx.domain.health.model import CheckPolicy, Lifecycle, State
from viralfx.domain.health.monitor import HealthMonitor

NOON = datetime(2026, 1, 6, 12, tzinfo=UTC)
REPORT = InstanceReport(
    instance="pod-1-17-ab",
    host="pod-1",
    role="api",
    version="1.0.0",
    environment="test",
    started_at=NOON,
    state="ready",
    reason="",
    health="healthy",
    checks={"redis": "pass"},
)


class FailingStore(MemoryFleetStore):
    """A store that fails while a test wants it to."""

    def __init__(self, clock: ManualClock) -> None:
        super().__init__(clock)
        self.fails = False
        self.hangs = False
        self.reports = 0
        self._clock_of_test = clock

    async def report(self, report: InstanceReport, changes: Sequence[CheckChange] = ()) -> None:
        """Fail, hang or keep the report."""
        if self.hangs:
            await self._clock_of_test.sleep(1e9)
        if self.fails:
            raise FleetUnavailableError("down")
        self.reports += 1
        await super().report(report, changes)


class Process:
    """A process with a check and a reporter, in manual time."""

    def __init__(self, clock: ManualClock) -> None:
        self.clock = clock
        self.store = FailingStore(clock)
        self.check = ActingCheck()
        self.monitor = HealthMonitor(clock=clock)
        self.monitor.register("redis", self.check, CheckPolicy(interval=1.0))
        self.lifecycle = Lifecycle(clock)
        self.reporter = FleetReporter(
            self.store,
            describe=lambda: replace(REPORT, state=str(self.lifecycle.state)),
            monitor=self.monitor,
            lifecycle=self.lifecycle,
            clock=clock,
        )

    async def start(self) -> None:
        """Start the reporter and the check."""
        await self.reporter.open()
        self.monitor.start()
        await self.clock.settle()

    async def stop(self) -> None:
        """Stop both."""
        await self.reporter.close(1.0)
        await self.monitor.stop()

    async def state(self) -> str:
        """Return the state that the store shows."""
        (found,) = (await self.store.fleet()).instances
        return found.state


@pytest.fixture
def process(clock: ManualClock) -> Process:
    """Return a process that has not started."""
    return Process(clock)


async def test_a_process_reports_at_its_start_with_each_beat_and_at_its_end(
    process: Process, clock: ManualClock
) -> None:
    """A process that says nothing for three beats is silent; a stopped one stays stopped."""
    await process.start()
    assert process.store.reports >= 1
    await clock.advance(BEAT_SECONDS)
    before = process.store.reports
    await clock.advance(10 * BEAT_SECONDS)
    assert 9 <= process.store.reports - before <= 11

    process.store.hangs = True
    await clock.advance(SILENT_AFTER_SECONDS + BEAT_SECONDS)
    assert await process.state() == "silent"

    process.store.hangs = False
    await process.stop()
    assert await process.state() == State.STOPPED
    await clock.advance(2 * SILENT_AFTER_SECONDS)
    assert await process.state() == State.STOPPED


async def test_a_change_is_reported_at_once(process: Process, clock: ManualClock) -> None:
    """A change of the state or of a check does not wait for the beat."""
    await process.start()
    await clock.advance(BEAT_SECONDS)
    process.lifecycle.advance(State.LAME_DUCK, "SIGTERM")
    await clock.advance(0.5)
    assert await process.state() == State.LAME_DUCK

    process.check.act = Act.FAIL
    await clock.advance(1.5)
    assert [(each.old, each.new) for each in await process.store.changes(check="redis")][:2] == [
        ("pass", "fail"),
        (None, "pass"),
    ]
    await process.stop()


async def test_changes_during_an_outage_are_written_after_it(
    process: Process, clock: ManualClock
) -> None:
    """None is lost or repeated, and their times are those of the changes."""
    await process.start()
    await clock.advance(BEAT_SECONDS)
    process.store.fails = True
    began = clock.now()
    for act in (Act.FAIL, Act.PASS, Act.FAIL):
        process.check.act = act
        await clock.advance(2.0)
    assert process.reporter.buffered == 3
    process.store.fails = False
    await clock.advance(BEAT_SECONDS)

    changes = await process.store.changes(check="redis")
    assert [each.new for each in changes[:3]] == ["fail", "pass", "fail"]
    assert all(began <= each.at <= began + timedelta(seconds=6) for each in changes[:3])
    assert process.reporter.buffered == 0
    await process.stop()


async def test_the_buffer_is_bounded(process: Process, clock: ManualClock) -> None:
    """The oldest changes are dropped, and memory stays flat."""
    await process.start()
    process.store.fails = True
    for turn in range(MAX_BUFFERED_CHANGES + 20):
        process.check.act = Act.FAIL if turn % 2 else Act.PASS
        await clock.advance(1.1)
    assert process.reporter.buffered == MAX_BUFFERED_CHANGES
    await process.stop()


async def test_a_stop_does_not_wait_for_a_store_that_hangs(
    process: Process, clock: ManualClock
) -> None:
    """The stage ends within two seconds, and does not raise."""
    await process.start()
    process.store.hangs = True
    before = clock.monotonic()
    closing = process.reporter.close(15.0)
    task = asyncio.ensure_future(closing)
    await clock.advance(2.0)
    await task

    assert clock.monotonic() - before <= 2.0
    await process.monitor.stop()


# -- history ---------------------------------------------------------------------------------


def instance(name: str, started: float, seen: float, **changes: object) -> Instance:
    """Return an instance; times are hours after noon."""
    report = replace(REPORT, instance=name, started_at=NOON + timedelta(hours=started))
    return Instance(
        report=replace(report, **changes),  # type: ignore[arg-type]  # of a test
        seen_at=NOON + timedelta(hours=seen),
        age=0.0,
    )


def change(name: str, number: int, hour: float, new: str) -> CheckChange:
    """Return a change of the check redis, some hours after noon."""
    at = NOON + timedelta(hours=hour)
    return CheckChange(
        instance=name, number=number, check="redis", at=at, old=None, new=new, code=None
    )


def test_earlier_runs_are_those_of_the_same_host_and_role_one_after_the_other() -> None:
    """A process beside it, on another host or in another role is no earlier run."""
    mine = instance("mine", 10, 11)
    before = instance("before", 5, 9)
    first = instance("first", 1, 4)
    others = [
        instance("beside", 3, 9.5),
        instance("other host", 1, 4, host="pod-2"),
        instance("other role", 1, 4, role="worker"),
        instance("later", 10.5, 12),
    ]
    found = predecessors([mine, first, *others[1:], before], mine.report)
    assert [each.report.instance for each in found] == ["first", "before"]


def test_a_history_joins_the_runs_and_shows_the_gap_between_them() -> None:
    """The uptime counts known time only."""
    runs = [instance("one", 0, 2), instance("two", 4, 6)]
    changes = [
        change("one", 1, -5, "pass"),
        change("one", 2, 1, "fail"),
        change("two", 1, 4, "pass"),
        change("two", 2, 4.5, "pass"),
    ]
    found = histories(runs, changes, NOON, NOON + timedelta(hours=6))["redis"]

    assert [((each.at - NOON).total_seconds() / 3600, each.status) for each in found.segments] == [
        (0, "pass"),
        (1, "fail"),
        (2, UNKNOWN),
        (4, "pass"),
    ]
    assert found.uptime == pytest.approx(3 / 4)


def test_a_history_without_changes_is_empty() -> None:
    """Nothing is known, so there is no uptime."""
    assert histories([instance("one", 0, 2)], [], NOON, NOON + timedelta(hours=1)) == {}
