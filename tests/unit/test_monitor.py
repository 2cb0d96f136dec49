"""The health monitor: schedule, hanging checks, forced rounds, readiness, and events."""

import asyncio
import random
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import datetime
from itertools import pairwise
from typing import Any, TypeGuard, cast

import pytest
from tests.manual_clock import ManualClock
from tests.unit.conftest import Releasable
from tests.unit.doubles import Act, ActingCheck, BrokenError

from viralfx.core.correlation import current_correlation_id
from viralfx.domain.health.check_runner import CheckCompleted, CheckRunner
from viralfx.domain.health.check_state import CheckTracker
from viralfx.domain.health.model import (
    CheckPolicy,
    CheckReport,
    Health,
    HealthCheck,
    HealthReport,
    Observation,
    Status,
    Transition,
)
from viralfx.domain.health.monitor import HealthMonitor, MonitorEvent

INTERVAL, TIMEOUT = 5.0, 2.0
POLICY = CheckPolicy(interval=INTERVAL, timeout=TIMEOUT)


class NoJitter(random.Random):
    """Makes the first wait a whole interval."""

    def uniform(self, a: float, b: float) -> float:  # noqa: ARG002 - random's signature
        """Return the upper end."""
        return b


def make(
    clock: ManualClock,
    checks: Mapping[str, tuple[HealthCheck, CheckPolicy]],
    *,
    fail_open_after: float = 0.0,
    history_size: int = 100,
) -> HealthMonitor:
    """Return a monitor with these checks, not started."""
    monitor = HealthMonitor(
        clock=clock, rng=NoJitter(), fail_open_after=fail_open_after, history_size=history_size
    )
    for name, (check, policy) in checks.items():
        monitor.register(name, check, policy)
    return monitor


@asynccontextmanager
async def running(
    clock: ManualClock, check: HealthCheck, policy: CheckPolicy = POLICY
) -> AsyncIterator[HealthMonitor]:
    """Run a monitor with one check called ``one``; a quick first attempt has ended."""
    monitor = make(clock, {"one": (check, policy)})
    monitor.start()
    await clock.settle()
    yield monitor
    await monitor.stop()


def verdict(monitor: HealthMonitor) -> tuple[Status, str | None]:
    """Return status and code of the check called ``one``."""
    report = monitor.report().checks["one"]
    return report.status, report.code


# -- schedule --------------------------------------------------------------------------------


async def test_check_is_pending_until_its_first_result(clock: ManualClock) -> None:
    """A check without a result is not healthy."""
    monitor = make(clock, {"one": (ActingCheck(), POLICY)})

    assert verdict(monitor) == (Status.FAIL, "pending")


async def test_the_first_attempt_starts_at_once(clock: ManualClock) -> None:
    """It does not wait for an interval."""
    async with running(clock, check := ActingCheck()) as monitor:
        assert check.attempts == 1
        assert verdict(monitor) == (Status.PASS, None)


async def test_interval_runs_from_the_end_of_an_attempt(clock: ManualClock) -> None:
    """A slow check does not run more often than the interval allows."""
    check = ActingCheck(Act.SLOW, clock=clock)
    check.seconds = 1.5
    began = clock.monotonic()
    async with running(clock, check):
        await clock.advance(14.0)

    assert [began, began + 6.5, began + 13.0] == check.begun_at


async def test_a_failing_check_runs_at_the_retry_interval(clock: ManualClock) -> None:
    """Once it passes, it runs at the interval again."""
    check = ActingCheck(Act.FAIL, clock=clock)
    began = clock.monotonic()
    policy = CheckPolicy(interval=30.0, retry_interval=5.0, timeout=1.0)
    async with running(clock, check, policy):
        await clock.advance(6.0)
        check.act = Act.PASS
        await clock.advance(40.0)

    assert [began, began + 5, began + 10, began + 40] == check.begun_at


async def test_instances_spread_over_the_whole_interval(clock: ManualClock) -> None:
    """Fifty instances that start together leave no tenth of the interval without an attempt."""
    checks = [ActingCheck(clock=clock) for _ in range(50)]
    monitors = []
    began = clock.monotonic()
    for seed, check in enumerate(checks):
        monitors.append(HealthMonitor(clock=clock, rng=random.Random(seed)))  # noqa: S311
        monitors[-1].register("one", check, POLICY)
        monitors[-1].start()
    await clock.advance(INTERVAL)
    for monitor in monitors:
        await monitor.stop()
    seconds = [check.begun_at[1] - began for check in checks]

    assert {int(10 * second / INTERVAL) for second in seconds} == set(range(10))


async def test_every_wait_has_jitter(clock: ManualClock) -> None:
    """No wait exceeds the interval, and none but the first is much shorter."""
    check = ActingCheck(clock=clock)
    monitor = HealthMonitor(clock=clock, rng=random.Random(1))  # noqa: S311
    monitor.register("one", check, POLICY)
    monitor.start()
    await clock.advance(10 * INTERVAL)
    await monitor.stop()
    waits = [second - first for first, second in pairwise(check.begun_at)]

    assert all(0.9 * INTERVAL <= wait <= INTERVAL for wait in waits[1:])
    assert len(set(waits)) == len(waits)


async def test_a_postponed_check_is_pending_until_the_next_start(clock: ManualClock) -> None:
    """Neither the schedule nor a forced round runs it before."""
    checks = {name: ActingCheck() for name in ("one", "other")}
    monitor = make(clock, {name: (check, POLICY) for name, check in checks.items()})
    monitor.start(postponed=("other",))
    await clock.advance(2 * INTERVAL)
    refreshed = asyncio.create_task(monitor.refresh())
    await clock.advance(INTERVAL)
    await refreshed
    before = monitor.report().checks["other"].code, checks["other"].attempts
    monitor.start()
    await clock.settle()
    attempts = checks["other"].attempts
    await monitor.stop()

    assert before == ("pending", 0)
    assert attempts == 1


async def test_checks_do_not_wait_for_each_other(
    clock: ManualClock, held: list[Releasable]
) -> None:
    """A hanging check does not delay another."""
    hung, quick = ActingCheck(Act.SWALLOW), ActingCheck(clock=clock)
    held.append(hung)
    monitor = make(clock, {"hung": (hung, POLICY), "quick": (quick, POLICY)})
    began = clock.monotonic()
    monitor.start()
    await clock.advance(10.0)
    await monitor.stop()

    assert [began, began + 5, began + 10] == quick.begun_at


async def test_a_second_start_does_nothing(clock: ManualClock) -> None:
    """There is only one schedule."""
    async with running(clock, check := ActingCheck()) as monitor:
        monitor.start()
        await clock.advance(INTERVAL)

    assert check.attempts == 2


async def test_each_attempt_has_its_own_correlation_id(clock: ManualClock) -> None:
    """The report has the id of the attempt's log lines."""
    seen: list[str | None] = []

    class Curious:
        async def check(self) -> Observation:
            seen.append(current_correlation_id())
            return Observation(status=Status.PASS, message="")

    async with running(clock, Curious()) as monitor:
        first = monitor.report().checks["one"].correlation_id
        await clock.advance(INTERVAL)
        second = monitor.report().checks["one"].correlation_id

    assert [first, second] == seen
    assert first != second
    assert current_correlation_id() is None


# -- failing and hanging checks --------------------------------------------------------------


@pytest.mark.parametrize(
    ("act", "code"),
    [
        (Act.RAISE, "error"),
        (Act.RETURN_NOTHING, "error"),
        (Act.CANCEL_ITSELF, "cancelled"),
        (Act.FAIL, "code-fail"),
    ],
)
async def test_an_invalid_check_fails(clock: ManualClock, act: Act, code: str) -> None:
    """Raising, cancelling itself or a wrong result is a failure, and the schedule goes on."""
    async with running(clock, check := ActingCheck(act)) as monitor:
        assert (Status.FAIL, code) == verdict(monitor)

        await clock.advance(INTERVAL)

        assert check.attempts == 2


async def test_exception_text_stays_out_of_the_report(clock: ManualClock) -> None:
    """The exception reaches the listeners' log, but no response."""
    events: list[MonitorEvent] = []
    monitor = make(clock, {"one": (ActingCheck(Act.RAISE), POLICY)})
    monitor.subscribe(events.append)
    monitor.start()
    await clock.settle()
    await monitor.stop()

    assert "hunter2" not in repr(monitor.report())
    errors = [event.error for event in events if isinstance(event, CheckCompleted)]
    assert [type(error) for error in errors] == [BrokenError]


async def test_slow_check_within_its_timeout_passes(clock: ManualClock) -> None:
    """An attempt may take its whole timeout."""
    check = ActingCheck(Act.SLOW, clock=clock)
    check.seconds = TIMEOUT - 0.01
    async with running(clock, check) as monitor:
        await clock.advance(TIMEOUT)

        assert verdict(monitor) == (Status.PASS, None)
        assert pytest.approx(monitor.report().checks["one"].response_time) == TIMEOUT - 0.01


@pytest.mark.parametrize("act", [Act.HANG, Act.SWALLOW])
async def test_a_hanging_check_fails_at_its_timeout(
    clock: ManualClock, held: list[Releasable], act: Act
) -> None:
    """It fails with code ``timeout`` after its timeout, not later."""
    held.append(check := ActingCheck(act))
    async with running(clock, check) as monitor:
        await clock.advance(TIMEOUT - 0.01)

        assert verdict(monitor) == (Status.FAIL, "pending")

        await clock.advance(0.01)

        assert verdict(monitor) == (Status.FAIL, "timeout")


@pytest.mark.parametrize("act", [Act.HANG, Act.SWALLOW])
async def test_check_that_begins_to_hang_fails_within_interval_and_timeout(
    clock: ManualClock, held: list[Releasable], act: Act
) -> None:
    """A healthy check that starts to hang is detected within one interval and one timeout."""
    held.append(check := ActingCheck())
    async with running(clock, check) as monitor:
        check.act = act
        await clock.advance(INTERVAL + TIMEOUT)

        assert verdict(monitor) == (Status.FAIL, "timeout")


async def test_a_cancelled_attempt_does_not_delay_the_next(
    clock: ManualClock,
) -> None:
    """The next attempt starts on schedule."""
    check = ActingCheck(Act.HANG, clock=clock)
    began = clock.monotonic()
    async with running(clock, check) as monitor:
        await clock.advance(TIMEOUT)
        check.act = Act.PASS
        await clock.advance(INTERVAL)

        assert [began, began + TIMEOUT + INTERVAL] == check.begun_at
        assert verdict(monitor) == (Status.PASS, None)


async def test_never_two_attempts_at_once(clock: ManualClock, held: list[Releasable]) -> None:
    """While an attempt suppresses its cancellation, no other starts."""
    held.append(check := ActingCheck(Act.SWALLOW))
    async with running(clock, check) as monitor:
        for _ in range(50):
            monitor.request_check("one")
            await clock.advance(INTERVAL)

        assert (check.attempts, check.most_outstanding) == (1, 1)
        assert verdict(monitor) == (Status.FAIL, "timeout")


async def test_the_message_of_a_hanging_check_has_its_duration(
    clock: ManualClock, held: list[Releasable]
) -> None:
    """The duration counts from the start of the hanging attempt."""
    held.append(check := ActingCheck(Act.SWALLOW))
    async with running(clock, check) as monitor:
        await clock.advance(TIMEOUT + INTERVAL + TIMEOUT)

        assert monitor.report().checks["one"].message == "one check has not answered for 9.0 s"


async def test_a_late_result_is_ignored(clock: ManualClock, held: list[Releasable]) -> None:
    """The result of an abandoned attempt is dropped, and a new attempt starts."""
    held.append(check := ActingCheck(Act.SWALLOW))
    async with running(clock, check) as monitor:
        await clock.advance(TIMEOUT)
        check.act = Act.FAIL
        check.release()
        await clock.settle()

        assert verdict(monitor) == (Status.FAIL, "timeout")

        await clock.advance(INTERVAL)

        assert verdict(monitor) == (Status.FAIL, "code-fail")


async def test_a_hanging_check_recovers_when_it_responds_again(
    clock: ManualClock, held: list[Releasable]
) -> None:
    """It passes within an interval and a timeout."""
    held.append(check := ActingCheck(Act.SWALLOW))
    async with running(clock, check) as monitor:
        await clock.advance(60.0)
        check.act = Act.PASS
        check.release()
        await clock.advance(INTERVAL + TIMEOUT)

        assert verdict(monitor) == (Status.PASS, None)


async def test_a_late_error_of_an_abandoned_attempt_is_ignored(
    clock: ManualClock,
) -> None:
    """It is not reported as an uncaught exception."""
    reported: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))

    class RaisesWhenCancelled:
        async def check(self) -> Observation:
            try:
                await clock.sleep(1000.0)
            except asyncio.CancelledError:
                raise BrokenError("on the way out") from None
            raise AssertionError

    async with running(clock, RaisesWhenCancelled()) as monitor:
        await clock.advance(3 * (INTERVAL + TIMEOUT))

        assert verdict(monitor) == (Status.FAIL, "timeout")

    assert reported == []


# -- forced rounds and requests --------------------------------------------------------------


async def test_refresh_makes_one_new_attempt(clock: ManualClock) -> None:
    """A forced round runs the check again and reports the new result."""
    async with running(clock, check := ActingCheck()) as monitor:
        await clock.advance(1.0)
        check.act = Act.FAIL
        report = await monitor.refresh()

        assert check.attempts == 2
        assert report.checks["one"].status is Status.FAIL


async def test_concurrent_refreshes_share_one_round(clock: ManualClock) -> None:
    """All callers get its report."""
    check = ActingCheck(Act.SLOW, clock=clock)
    async with running(clock, check) as monitor:
        await clock.advance(1.0)
        callers = [asyncio.create_task(monitor.refresh()) for _ in range(100)]
        await clock.advance(1.0)

        assert check.attempts == 2
        assert len({id(await caller) for caller in callers}) == 1


async def test_a_refresh_within_the_gap_returns_the_current_report(clock: ManualClock) -> None:
    """Rounds are at least ``refresh_gap`` apart."""
    async with running(clock, check := ActingCheck()) as monitor:
        await clock.advance(1.0)
        for seconds, attempts in ((0.0, 2), (0.0, 2), (0.99, 2), (0.01, 3)):
            await clock.advance(seconds)
            await monitor.refresh()

            assert check.attempts == attempts


async def test_a_refresh_keeps_the_gap_to_the_last_attempt(clock: ManualClock) -> None:
    """Attempts are at least ``refresh_gap`` apart, including scheduled ones."""
    async with running(clock, check := ActingCheck()) as monitor:
        asked = asyncio.create_task(monitor.refresh())
        await clock.advance(0.99)

        assert (check.attempts, asked.done()) == (1, False)

        check.act = Act.FAIL
        await clock.advance(0.01)

        assert check.attempts == 2
        assert (await asked).checks["one"].status is Status.FAIL


async def test_a_refresh_postpones_the_next_scheduled_attempt(clock: ManualClock) -> None:
    """It runs an interval after the forced one."""
    check = ActingCheck(clock=clock)
    began = clock.monotonic()
    async with running(clock, check) as monitor:
        await clock.advance(4.0)
        await monitor.refresh()
        await clock.advance(INTERVAL)

    assert [began, began + 4, began + 9] == check.begun_at


async def test_a_refresh_of_a_hanging_check_is_limited(
    clock: ManualClock, held: list[Releasable]
) -> None:
    """The round ends at the timeout and starts no second attempt."""
    held.append(check := ActingCheck(Act.SWALLOW))
    async with running(clock, check) as monitor:
        await clock.advance(TIMEOUT + 1.0)
        caller = asyncio.create_task(monitor.refresh())
        await clock.advance(TIMEOUT)

        assert caller.done()
        assert caller.result().checks["one"].code == "timeout"
        assert check.attempts == 1


async def test_a_refresh_waits_for_an_attempt_that_starts_later(
    clock: ManualClock,
) -> None:
    """The attempt in flight may have read an older state."""
    check = ActingCheck(Act.SLOW, clock=clock)
    check.seconds = 1.5
    began = clock.monotonic()
    async with running(clock, check) as monitor:
        await clock.advance(0.5)
        asked = asyncio.create_task(monitor.refresh())
        check.act = Act.FAIL
        await clock.advance(0.99)

        assert (check.attempts, asked.done()) == (1, False)

        await clock.advance(0.01)

        assert asked.done()
        assert asked.result().checks["one"].status is Status.FAIL
        assert [began, began + 1.5] == check.begun_at


async def test_a_refresh_during_an_attempt_keeps_the_gap(clock: ManualClock) -> None:
    """One attempt follows, ``refresh_gap`` after the start of the one in flight."""
    check = ActingCheck(Act.SLOW, clock=clock)
    check.seconds = 0.3
    began = clock.monotonic()
    async with running(clock, check) as monitor:
        await clock.advance(0.1)
        asked = asyncio.create_task(monitor.refresh())
        await clock.advance(1.2)

        assert asked.done()
        await clock.advance(INTERVAL)

    assert [began, began + 1.0, began + 1.3 + INTERVAL] == pytest.approx(check.begun_at)


@pytest.mark.parametrize(
    ("act", "status", "after"), [(Act.HANG, Status.PASS, 2.0), (Act.SWALLOW, Status.FAIL, 4.0)]
)
async def test_a_refresh_during_a_hanging_attempt_is_limited(
    clock: ManualClock, held: list[Releasable], act: Act, status: Status, after: float
) -> None:
    """Whether or not the hanging attempt ends after its cancellation."""
    held.append(check := ActingCheck(act))
    async with running(clock, check) as monitor:
        check.act = Act.PASS
        await clock.advance(0.5)
        asked = asyncio.create_task(monitor.refresh())
        await clock.advance(after - 0.5 - 0.01)

        assert not asked.done()

        await clock.advance(0.01)

        assert asked.done()
        assert asked.result().checks["one"].status is status


async def test_a_refresh_over_a_hanging_attempt_gets_the_next_one(
    clock: ManualClock, held: list[Releasable]
) -> None:
    """The turn that found the attempt hanging starts a new one afterwards."""
    held.append(check := ActingCheck(Act.SWALLOW))
    async with running(clock, check) as monitor:
        await clock.advance(TIMEOUT + INTERVAL + 1.0)
        asked = asyncio.create_task(monitor.refresh())
        await clock.settle()
        check.act = Act.WARN
        check.release()
        await clock.settle()

        assert asked.done()
        assert asked.result().checks["one"].status is Status.WARN
        assert check.attempts == 2


async def test_a_refresh_ends_at_its_limit(clock: ManualClock, held: list[Releasable]) -> None:
    """One attempt in flight, one that starts when it ends, and the end of the limit."""
    held.append(check := ActingCheck(Act.SWALLOW))
    async with running(clock, check) as monitor:
        asked = asyncio.create_task(monitor.refresh())
        await clock.advance(2 * TIMEOUT - 0.1)
        check.release()
        await clock.advance(1.09)

        assert (check.attempts, asked.done()) == (2, False)

        await clock.advance(0.01)

        assert asked.done()


async def test_abandon_cancels_all_waiting_callers(clock: ManualClock) -> None:
    """Those of the attempt in flight and those of the next one."""
    track = CheckTracker("one", POLICY, clock.now())
    check = ActingCheck(Act.HANG)
    runner = CheckRunner(check, track, clock=clock, completed=lambda _: None, gap=1.0)
    waiting = [runner.force()]
    schedule = asyncio.create_task(runner.run(NoJitter()))
    await clock.settle()
    waiting.append(runner.force())
    runner.abandon()
    schedule.cancel()
    await asyncio.wait({schedule})

    assert [future.cancelled() for future in waiting] == [True, True]


@asynccontextmanager
async def followed(
    clock: ManualClock, leader: HealthCheck, follower: HealthCheck
) -> AsyncIterator[HealthMonitor]:
    """Run a monitor in which ``two``, every 3 s, follows ``one``, every 5 s."""
    policy = CheckPolicy(interval=3.0, timeout=TIMEOUT, follows="one")
    monitor = make(clock, {"one": (leader, POLICY), "two": (follower, policy)})
    monitor.start()
    await clock.settle()
    yield monitor
    await monitor.stop()


async def test_a_round_runs_a_follower_after_the_check_it_follows(
    clock: ManualClock,
) -> None:
    """Otherwise the follower would use the previous result."""
    leader, follower = ActingCheck(clock=clock), ActingCheck(clock=clock)
    began = clock.monotonic()
    async with followed(clock, leader, follower) as monitor:
        await clock.advance(5.5)
        leader.act, leader.seconds = Act.SLOW, 0.2
        asked = asyncio.create_task(monitor.refresh())
        await clock.advance(1.49)

        assert not asked.done()

        follower.act = Act.FAIL
        await clock.advance(0.01)

        assert asked.done()
        assert asked.result().checks["two"].status is Status.FAIL

    assert [began, began + 5.0, began + 6.0] == leader.begun_at
    # The last but one is on schedule; the last starts after the result at 6.2 s, and the gap.
    assert [began, began + 3.0, began + 6.0, began + 7.0] == follower.begun_at


async def test_a_follower_runs_as_soon_as_the_followed_check_ends(
    clock: ManualClock,
) -> None:
    """It only waits for its own gap and the result of the other check."""
    leader, follower = ActingCheck(clock=clock), ActingCheck(clock=clock)
    began = clock.monotonic()
    async with followed(clock, leader, follower) as monitor:
        await clock.advance(1.5)
        leader.act, leader.seconds = Act.SLOW, 0.2
        asked = asyncio.create_task(monitor.refresh())
        await clock.advance(0.2)

        assert asked.done()

    assert [began, began + 1.5] == leader.begun_at
    assert [began, began + 1.7] == pytest.approx(follower.begun_at)


async def test_a_round_with_a_hanging_check_and_its_follower_is_limited(
    clock: ManualClock, held: list[Releasable]
) -> None:
    """The follower runs after the limit of the other check, with its own limit."""
    leader, follower = ActingCheck(Act.SWALLOW), ActingCheck(Act.SWALLOW)
    held += [leader, follower]
    async with followed(clock, leader, follower) as monitor:
        await clock.advance(1.0)
        asked = asyncio.create_task(monitor.refresh())
        await clock.advance(2 * (1.0 + 2 * TIMEOUT))

        assert asked.done()
        assert {check.code for check in asked.result().checks.values()} == {"timeout"}
        assert (leader.attempts, follower.attempts) == (1, 1)


async def test_a_check_can_only_follow_a_registered_check(clock: ManualClock) -> None:
    """It cannot follow itself, so there is no circular wait."""
    monitor = HealthMonitor(clock=clock)

    for other in ("one", "two"):
        with pytest.raises(ValueError, match=f"'one' follows '{other}', which is unknown"):
            monitor.register("one", ActingCheck(), CheckPolicy(follows=other))


async def test_cancelling_a_caller_does_not_cancel_the_round(clock: ManualClock) -> None:
    """The other callers get the report."""
    check = ActingCheck(Act.SLOW, clock=clock)
    async with running(clock, check) as monitor:
        await clock.advance(1.0)
        leaving = asyncio.create_task(monitor.refresh())
        staying = asyncio.create_task(monitor.refresh())
        await clock.settle()
        leaving.cancel()
        await clock.advance(1.0)

        assert leaving.cancelled()
        assert staying.done()


async def test_refresh_without_checks_returns() -> None:
    """Without checks there is nothing to wait for."""
    report = await HealthMonitor(clock=ManualClock()).refresh()

    assert report.checks == {}


async def test_request_brings_the_next_attempt_forward(clock: ManualClock) -> None:
    """If the last attempt is old enough, the next starts at once."""
    policy = CheckPolicy(interval=30.0, retry_interval=5.0)
    async with running(clock, check := ActingCheck(), policy) as monitor:
        await clock.advance(6.0)
        monitor.request_check("one")
        await clock.settle()

        assert check.attempts == 2


async def test_requests_are_limited_to_one_per_retry_interval(clock: ManualClock) -> None:
    """Many requests do not cause many attempts."""
    check = ActingCheck(clock=clock)
    began = clock.monotonic()
    async with running(clock, check, CheckPolicy(interval=30.0, retry_interval=5.0)) as monitor:
        for _ in range(1000):
            monitor.request_check("one")
            await clock.advance(0.01)

    assert [began, began + 5] == pytest.approx(check.begun_at[:2])
    assert check.attempts <= 3


async def test_request_never_delays_an_attempt(clock: ManualClock) -> None:
    """A request shortly before the due time does not change it."""
    check = ActingCheck(clock=clock)
    began = clock.monotonic()
    async with running(clock, check, CheckPolicy(interval=5.0, retry_interval=20.0)) as monitor:
        await clock.advance(4.0)
        monitor.request_check("one")
        await clock.advance(1.0)

    assert [began, began + 5] == check.begun_at


async def test_request_for_an_unknown_check_is_an_error(clock: ManualClock) -> None:
    """An unknown name raises ``KeyError``."""
    async with running(clock, ActingCheck()) as monitor:
        with pytest.raises(KeyError):
            monitor.request_check("two")


# -- readiness -------------------------------------------------------------------------------

GATE = CheckPolicy(required_for_readiness=True)
SHARED_GATE = CheckPolicy(required_for_readiness=True, shared=True)


async def test_a_monitor_without_checks_is_ready_and_healthy(clock: ManualClock) -> None:
    """It has started as well."""
    report = HealthMonitor(clock=clock).report()

    assert (report.started, report.ready, report.health) == (True, True, Health.HEALTHY)


@asynccontextmanager
async def failing_open(
    clock: ManualClock, **more: tuple[HealthCheck, CheckPolicy]
) -> AsyncIterator[tuple[HealthMonitor, ActingCheck]]:
    """Run a monitor that fails open after 60 s and whose shared check has just begun to fail."""
    database = ActingCheck()
    monitor = make(clock, {"database": (database, SHARED_GATE), **more}, fail_open_after=60.0)
    monitor.start()
    await clock.settle()
    await clock.advance(1.0)
    database.act = Act.FAIL
    await monitor.refresh()
    yield monitor, database
    await monitor.stop()


async def test_fails_open_exactly_after_the_time(clock: ManualClock) -> None:
    """Then the instance is ready again, and degraded."""
    async with failing_open(clock) as (monitor, _):
        await clock.advance(59.999)
        before = monitor.report()
        await clock.advance(0.001)
        after = monitor.report()

        assert (before.ready, before.fail_open) == (False, False)
        assert (after.ready, after.fail_open) == (True, True)
        assert after.failing_gates == ("database",)
        assert after.health is Health.DEGRADED


async def test_fail_open_ends_with_the_outage_and_starts_anew(clock: ManualClock) -> None:
    """The time counts from the start of each outage."""
    async with failing_open(clock) as (monitor, database):
        await clock.advance(61.0)
        database.act = Act.PASS
        recovered = await monitor.refresh()
        await clock.advance(1.0)
        database.act = Act.FAIL
        again = await monitor.refresh()

        assert (recovered.ready, recovered.fail_open) == (True, False)
        assert (again.ready, again.fail_open) == (False, False)


async def test_local_failure_does_not_fail_open(clock: ManualClock) -> None:
    """A failure of this instance alone keeps it unready, also during a shared outage."""
    disk = ActingCheck()
    async with failing_open(clock, disk=(disk, GATE)) as (monitor, _):
        disk.act = Act.FAIL
        await clock.advance(1000.0)

        assert not monitor.report().ready

        disk.act = Act.PASS
        await clock.advance(10.0)

        assert not monitor.report().ready

        await clock.advance(60.0)

        assert monitor.report().ready


async def test_zero_never_fails_open(clock: ManualClock) -> None:
    """By default a failing instance stays unready."""
    async with running(clock, check := ActingCheck(), SHARED_GATE) as monitor:
        check.act = Act.FAIL
        await clock.advance(1_000.0)

        assert not monitor.report().ready


# -- reading ---------------------------------------------------------------------------------


async def test_report_is_renewed_by_age_alone(clock: ManualClock) -> None:
    """A report is valid until ``valid_until`` and not longer."""
    policy = CheckPolicy(interval=30.0, max_age=8.0)
    async with running(clock, ActingCheck(), policy) as monitor:
        first = monitor.report()

        assert clock.monotonic() + 8.0 == first.valid_until

        await clock.advance(8.0)
        second = monitor.report()

        assert second is not first
        assert second is monitor.report()
        assert float("inf") == second.valid_until


async def test_a_held_report_does_not_change(clock: ManualClock) -> None:
    """The monitor goes on with other reports."""
    check = ActingCheck()
    async with running(clock, check) as monitor:
        kept = monitor.report()
        check.act = Act.FAIL
        await clock.advance(INTERVAL)

        assert monitor.report().checks["one"].status is Status.FAIL
        assert kept.checks["one"].status is Status.PASS


async def test_an_attempt_evaluates_only_its_own_check(
    clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cost of a result does not grow with the number of checks."""
    evaluated: list[str] = []
    evaluate = CheckTracker.evaluate

    def counting(
        self: CheckTracker, monotonic: float, at: datetime
    ) -> tuple[CheckReport, Transition | None]:
        evaluated.append(self.name)
        return evaluate(self, monotonic, at)

    quick = CheckPolicy(interval=1.0)
    slow = {f"slow-{number}": (ActingCheck(), POLICY) for number in range(100)}
    monitor = make(clock, {**slow, "quick": (ActingCheck(), quick)})
    monitor.start()
    await clock.settle()
    monkeypatch.setattr(CheckTracker, "evaluate", counting)
    for _ in range(4):
        await clock.advance(1.0)
        monitor.report()
    await monitor.stop()

    assert evaluated == ["quick"] * 4


async def test_simultaneous_transitions_are_in_order_of_registration(clock: ManualClock) -> None:
    """The ages of the checks do not matter."""
    received: list[str] = []
    ages = {"one": 8.0, "two": 7.0, "three": 9.0}
    monitor = make(
        clock,
        {
            name: (ActingCheck(), CheckPolicy(interval=60.0, max_age=age))
            for name, age in ages.items()
        },
    )
    monitor.start()
    await clock.settle()
    monitor.subscribe(lambda event: received.append(event.check) if _is_stale(event) else None)
    clock.jump(10.0)
    report = monitor.report()
    await monitor.stop()

    assert received == ["one", "two", "three"]
    assert {check.code for check in report.checks.values()} == {"stale"}


def _is_stale(event: MonitorEvent) -> TypeGuard[Transition]:
    return isinstance(event, Transition) and event.code == "stale"


# -- events ----------------------------------------------------------------------------------


async def test_attempts_of_one_turn_share_a_report(clock: ManualClock) -> None:
    """A hundred simultaneous results cause one report, after all their transitions."""
    received: list[MonitorEvent] = []
    monitor = make(clock, {f"check-{n}": (ActingCheck(), POLICY) for n in range(100)})
    monitor.subscribe(received.append)
    monitor.start()
    await clock.settle()
    await monitor.stop()

    assert [type(event) for event in received] == [CheckCompleted, Transition] * 100 + [
        HealthReport
    ]
    assert received[-1] is monitor.report()


async def test_a_report_is_published_after_its_transitions(
    clock: ManualClock,
) -> None:
    """Even if a listener reads the report during the transitions."""
    received: list[MonitorEvent] = []
    read: list[HealthReport] = []
    monitor = make(clock, {"one": (ActingCheck(), POLICY)})

    def read_report(event: MonitorEvent) -> None:
        if isinstance(event, Transition):
            read.append(monitor.report())

    monitor.subscribe(read_report)
    monitor.subscribe(received.append)
    monitor.start()
    await clock.settle()
    await monitor.stop()

    assert [type(event) for event in received] == [CheckCompleted, Transition, HealthReport]
    assert received[-1] is read[0]


async def test_a_report_is_published_once(clock: ManualClock) -> None:
    """By the read that builds it, or else by the loop."""
    received: list[MonitorEvent] = []
    check = ActingCheck()
    monitor = make(clock, {"one": (check, POLICY)})
    monitor.subscribe(received.append)
    monitor.start()
    await clock.settle()
    for _ in range(3):
        await clock.advance(INTERVAL)
        monitor.report()
        monitor.report()
    await monitor.stop()
    reports = [event for event in received if isinstance(event, HealthReport)]

    assert len(reports) == check.attempts == 4
    assert len({id(report) for report in reports}) == 4


async def test_each_transition_is_published_once_after_its_attempt(clock: ManualClock) -> None:
    """The report follows the transition."""
    check, events = ActingCheck(), list[MonitorEvent]()
    monitor = make(clock, {"one": (check, POLICY)})
    monitor.subscribe(events.append)
    monitor.start()
    await clock.advance(INTERVAL)
    check.act = Act.FAIL
    await clock.advance(INTERVAL)
    await monitor.stop()

    assert [
        *(CheckCompleted, Transition, HealthReport),
        *(CheckCompleted, HealthReport),
        *(CheckCompleted, Transition, HealthReport),
    ] == [type(event) for event in events]
    assert [(event.old, event.new) for event in events if isinstance(event, Transition)] == [
        (None, Status.PASS),
        (Status.PASS, Status.FAIL),
    ]


async def test_a_listener_error_does_not_affect_others(
    clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    """The error is logged; other listeners and the schedule go on."""
    check, received = ActingCheck(), list[MonitorEvent]()

    def broken(_: MonitorEvent) -> None:
        raise BrokenError("a listener")

    monitor = make(clock, {"one": (check, POLICY)})
    monitor.subscribe(broken)
    monitor.subscribe(received.append)
    monitor.start()
    await clock.advance(INTERVAL)
    await monitor.stop()

    assert check.attempts == 2
    assert len(received) == 5
    assert {"Event listener failed"} == {record.message for record in caplog.records}


async def test_a_listener_can_read_the_report(clock: ManualClock) -> None:
    """At a transition the report already has the new status."""
    seen: list[Status] = []
    monitor = make(clock, {"one": (ActingCheck(Act.WARN), POLICY)})

    def read_report(event: MonitorEvent) -> None:
        if isinstance(event, Transition):
            seen.append(monitor.report().checks["one"].status)

    monitor.subscribe(read_report)
    monitor.start()
    await clock.settle()
    await monitor.stop()

    assert seen == [Status.WARN]


async def test_history_is_bounded_and_counts_are_not(clock: ManualClock) -> None:
    """The oldest transitions are dropped; the counters go on."""
    check = ActingCheck()
    monitor = make(clock, {"one": (check, POLICY)}, history_size=3)
    monitor.start()
    for turn in range(10):
        check.act = Act.FAIL if turn % 2 else Act.PASS
        await clock.advance(INTERVAL)
    await monitor.stop()

    assert [event.new for event in monitor.history] == [Status.FAIL, Status.PASS, Status.FAIL]
    assert monitor.transition_counts == {"one": 10}


async def test_transition_counts_continue_over_a_restart(clock: ManualClock) -> None:
    """Counts of the previous process are added."""
    monitor = make(clock, {"one": (ActingCheck(), POLICY)})
    monitor.restore_transition_counts({"one": 41, "gone": 7})
    monitor.start()
    await clock.settle()
    await monitor.stop()

    assert monitor.transition_counts == {"one": 42, "gone": 7}


# -- registration and stop -------------------------------------------------------------------


async def test_a_name_can_be_registered_once(clock: ManualClock) -> None:
    """A second check with the same name is an error."""
    monitor = make(clock, {"one": (ActingCheck(), POLICY)})

    with pytest.raises(ValueError, match="'one' is registered already"):
        monitor.register("one", ActingCheck(), POLICY)


async def test_registering_while_running_is_rejected(clock: ManualClock) -> None:
    """Such a check would never run."""
    async with running(clock, ActingCheck()) as monitor:
        with pytest.raises(ValueError, match="'two' is registered too late"):
            monitor.register("two", ActingCheck(), POLICY)


async def test_stop_cancels_attempts_in_flight_and_the_schedule(clock: ManualClock) -> None:
    """Afterwards no attempt runs and no timer waits."""
    check = ActingCheck(Act.HANG)
    async with running(clock, check) as monitor:
        pass
    await clock.advance(100.0)

    assert (check.attempts, check.outstanding) == (1, 0)
    assert clock.sleeping == 0
    assert monitor.report().checks["one"].status is Status.FAIL


async def test_stop_does_not_wait_for_a_hanging_check(
    clock: ManualClock, held: list[Releasable]
) -> None:
    """An attempt that suppresses its cancellation is abandoned."""
    held.append(check := ActingCheck(Act.SWALLOW))
    monitor = make(clock, {"one": (check, POLICY)})
    monitor.start()
    await clock.advance(1.0)
    stop = asyncio.create_task(monitor.stop())
    await clock.settle()

    assert stop.done()
    assert check.outstanding == 1


async def test_stop_ends_a_round_in_flight(clock: ManualClock) -> None:
    """Its callers return."""
    monitor = make(clock, {"one": (ActingCheck(Act.HANG), POLICY)})
    monitor.start()
    caller = asyncio.create_task(monitor.refresh())
    await clock.advance(1.0)
    await monitor.stop()
    await clock.settle()

    assert caller.done()


async def test_stop_without_a_running_schedule_does_nothing(clock: ManualClock) -> None:
    """A second stop and a stop before the start are safe."""
    monitor = make(clock, {"one": (ActingCheck(), POLICY)})
    await monitor.stop()
    monitor.start()
    await clock.settle()
    await monitor.stop()
    await monitor.stop()

    assert monitor.report().checks["one"].status is Status.PASS


async def test_a_restart_starts_no_attempt_beside_an_abandoned_one(
    clock: ManualClock, held: list[Releasable]
) -> None:
    """There is still at most one attempt."""
    held.append(check := ActingCheck(Act.SWALLOW))
    async with running(clock, check) as monitor:
        await monitor.stop()
        monitor.start()
        await clock.advance(20.0)

        assert (check.attempts, check.most_outstanding) == (1, 1)


async def test_a_status_can_be_a_string(clock: ManualClock) -> None:
    """A check may return "pass"; an unknown word is a failure."""

    class Worded:
        word = "pass"

        async def check(self) -> Observation:
            return Observation(status=cast("Status", self.word), message="worded")

    check = Worded()
    monitor = make(clock, {"one": (check, POLICY)})
    monitor.start()
    await clock.advance(3 * INTERVAL)
    passing = monitor.report().checks["one"].status
    check.word = "fine"
    await clock.advance(INTERVAL)
    failing = monitor.report().checks["one"]
    await monitor.stop()

    assert (passing, failing.status, failing.code) == (Status.PASS, Status.FAIL, "error")


async def test_a_request_during_an_attempt_is_not_lost(clock: ManualClock) -> None:
    """It makes the next attempt start earlier."""
    check = ActingCheck(clock=clock)
    policy = CheckPolicy(interval=30.0, retry_interval=5.0, timeout=2.0)
    monitor = make(clock, {"one": (check, policy)})
    check.act, check.seconds = Act.SLOW, 1.5
    monitor.start()
    await clock.advance(1.0)
    monitor.request_check("one")
    await clock.advance(4.5)
    await monitor.stop()

    assert [b - a for a, b in pairwise(check.begun_at)] == [5.0]


async def test_failing_open_is_published_without_a_reader(clock: ManualClock) -> None:
    """Listeners get the report even if it is not read."""
    check, received = ActingCheck(Act.FAIL), list[MonitorEvent]()
    policy = CheckPolicy(interval=1.0, required_for_readiness=True, shared=True)
    monitor = HealthMonitor(clock=clock, fail_open_after=10.0)
    monitor.register("one", check, policy)
    monitor.subscribe(received.append)
    monitor.start()
    await clock.advance(13.0)
    await monitor.stop()

    assert sorted({event.fail_open for event in received if isinstance(event, HealthReport)}) == [
        False,
        True,
    ]


async def test_a_listener_cannot_end_the_schedule_by_cancelling(clock: ManualClock) -> None:
    """A CancelledError of a listener is its own error."""
    check = ActingCheck()

    def broken(_: MonitorEvent) -> None:
        raise asyncio.CancelledError

    monitor = make(clock, {"one": (check, POLICY)})
    monitor.subscribe(broken)
    monitor.start()
    await clock.advance(3 * INTERVAL)
    await monitor.stop()

    assert check.attempts == 4


async def test_refresh_of_a_stopped_monitor_returns_at_once(clock: ManualClock) -> None:
    """There is no round to wait for."""
    monitor = make(clock, {"one": (ActingCheck(), POLICY)})

    assert (await monitor.refresh()).started is False


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
async def test_a_check_cannot_end_the_process(
    clock: ManualClock, error: type[BaseException]
) -> None:
    """SystemExit and KeyboardInterrupt are failures of the check."""

    class Leaving:
        async def check(self) -> Observation:
            raise error

    monitor = make(clock, {"one": (Leaving(), POLICY)})
    monitor.start()
    await clock.advance(0.0)
    report = monitor.report().checks["one"]
    await monitor.stop()

    assert (report.status, report.code) == (Status.FAIL, "error")
