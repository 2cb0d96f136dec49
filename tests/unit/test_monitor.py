"""The health monitor: schedule, hung checks, forced rounds, readiness, and who is told."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any, cast

import pytest
from tests.manual_clock import ManualClock
from tests.unit.conftest import Releasable
from tests.unit.doubles import Act, ActingCheck, BrokenError

from viralfx.domain.attempts import CheckCompleted, CheckRunner
from viralfx.domain.correlation import current_correlation_id
from viralfx.domain.health import (
    CheckPolicy,
    Health,
    HealthCheck,
    HealthReport,
    Observation,
    Status,
    Transition,
)
from viralfx.domain.monitor import HealthMonitor, MonitorEvent
from viralfx.domain.tracking import CheckTrack

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
    """Make a monitor with these checks; nothing runs."""
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
    """Run a monitor with one check called ``one``, its first attempt behind it if it is quick."""
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
    """Never ran is not healthy."""
    monitor = make(clock, {"one": (ActingCheck(), POLICY)})

    assert verdict(monitor) == (Status.FAIL, "pending")


async def test_first_attempt_is_at_once(clock: ManualClock) -> None:
    """Starting does not wait an interval."""
    async with running(clock, check := ActingCheck()) as monitor:
        assert check.attempts == 1
        assert verdict(monitor) == (Status.PASS, None)


async def test_interval_runs_from_the_end_of_an_attempt(clock: ManualClock) -> None:
    """A slow check is not asked more often than a fast one has time to answer."""
    check = ActingCheck(Act.SLOW, clock=clock)
    check.seconds = 1.5
    began = clock.monotonic()
    async with running(clock, check):
        await clock.advance(14.0)

    assert [began, began + 6.5, began + 13.0] == check.begun_at


async def test_failing_check_is_asked_at_the_retry_interval(clock: ManualClock) -> None:
    """A check that does not pass is looked at more often, and slowly again once it passes."""
    check = ActingCheck(Act.FAIL, clock=clock)
    began = clock.monotonic()
    policy = CheckPolicy(interval=30.0, retry_interval=5.0, timeout=1.0)
    async with running(clock, check, policy):
        await clock.advance(6.0)
        check.act = Act.PASS
        await clock.advance(40.0)

    assert [began, began + 5, began + 10, began + 40] == check.begun_at


@pytest.mark.parametrize("seed", range(5))
async def test_second_attempt_comes_early_by_chance(clock: ManualClock, seed: int) -> None:
    """Instances started together drift apart: the first wait is half an interval to a whole."""
    check = ActingCheck(clock=clock)
    monitor = HealthMonitor(clock=clock, rng=random.Random(seed))  # noqa: S311
    monitor.register("one", check, POLICY)
    monitor.start()
    await clock.advance(INTERVAL)
    await monitor.stop()
    first, second = check.begun_at[:2]

    assert INTERVAL / 2 <= second - first <= INTERVAL


async def test_checks_do_not_wait_for_each_other(
    clock: ManualClock, held: list[Releasable]
) -> None:
    """A hung check delays no other."""
    hung, quick = ActingCheck(Act.SWALLOW), ActingCheck(clock=clock)
    held.append(hung)
    monitor = make(clock, {"hung": (hung, POLICY), "quick": (quick, POLICY)})
    began = clock.monotonic()
    monitor.start()
    await clock.advance(10.0)
    await monitor.stop()

    assert [began, began + 5, began + 10] == quick.begun_at


async def test_start_twice_is_harmless(clock: ManualClock) -> None:
    """Starting again starts no second schedule."""
    async with running(clock, check := ActingCheck()) as monitor:
        monitor.start()
        await clock.advance(INTERVAL)

    assert check.attempts == 2


async def test_attempts_run_under_a_correlation_id_of_their_own(clock: ManualClock) -> None:
    """The id in a check's report is the one its log lines carry, and it is new each time."""
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


# -- what a check may do wrong ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("act", "code"),
    [
        (Act.RAISE, "error"),
        (Act.RETURN_NOTHING, "error"),
        (Act.CANCEL_ITSELF, "cancelled"),
        (Act.FAIL, "code-fail"),
    ],
)
async def test_misbehaviour_is_a_failure(clock: ManualClock, act: Act, code: str) -> None:
    """Raising, cancelling itself or returning nonsense fails, and the schedule goes on."""
    async with running(clock, check := ActingCheck(act)) as monitor:
        assert (Status.FAIL, code) == verdict(monitor)

        await clock.advance(INTERVAL)

        assert check.attempts == 2


async def test_exception_text_stays_out_of_the_report(clock: ManualClock) -> None:
    """What was raised reaches the listeners' log and nothing that is shown."""
    events: list[MonitorEvent] = []
    monitor = make(clock, {"one": (ActingCheck(Act.RAISE), POLICY)})
    monitor.subscribe(events.append)
    monitor.start()
    await clock.settle()
    await monitor.stop()

    assert "hunter2" not in repr(monitor.report())
    errors = [event.error for event in events if isinstance(event, CheckCompleted)]
    assert [type(error) for error in errors] == [BrokenError]


def _raises_at_once() -> Coroutine[Any, Any, Observation]:
    raise BrokenError("before the first await")


def _is_not_async() -> Coroutine[Any, Any, Observation]:
    return Observation(status=Status.PASS, message="")  # type: ignore[return-value]


@pytest.mark.parametrize("function", [_raises_at_once, _is_not_async])
async def test_check_that_is_no_coroutine_function_fails(
    clock: ManualClock, function: Callable[[], Coroutine[Any, Any, Observation]]
) -> None:
    """A synchronous error or answer is the check's failure, not the monitor's."""

    class Wrong:
        def check(self) -> Coroutine[Any, Any, Observation]:
            return function()

    async with running(clock, Wrong()) as monitor:
        assert verdict(monitor) == (Status.FAIL, "error")


async def test_slow_check_within_its_timeout_passes(clock: ManualClock) -> None:
    """An attempt may take all its time."""
    check = ActingCheck(Act.SLOW, clock=clock)
    check.seconds = TIMEOUT - 0.01
    async with running(clock, check) as monitor:
        await clock.advance(TIMEOUT)

        assert verdict(monitor) == (Status.PASS, None)
        assert pytest.approx(monitor.report().checks["one"].response_time) == TIMEOUT - 0.01


@pytest.mark.parametrize("act", [Act.HANG, Act.SWALLOW])
async def test_hung_check_fails_at_its_timeout(
    clock: ManualClock, held: list[Releasable], act: Act
) -> None:
    """A check that does not answer fails with code ``timeout`` after its timeout, not later."""
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
    """A healthy check that hangs for ever is found out within one interval and one timeout."""
    held.append(check := ActingCheck())
    async with running(clock, check) as monitor:
        check.act = act
        await clock.advance(INTERVAL + TIMEOUT)

        assert verdict(monitor) == (Status.FAIL, "timeout")


async def test_abandoned_attempt_that_honours_cancellation_frees_the_slot(
    clock: ManualClock,
) -> None:
    """After a cancelled attempt the next one starts on schedule."""
    check = ActingCheck(Act.HANG, clock=clock)
    began = clock.monotonic()
    async with running(clock, check) as monitor:
        await clock.advance(TIMEOUT)
        check.act = Act.PASS
        await clock.advance(INTERVAL)

        assert [began, began + TIMEOUT + INTERVAL] == check.begun_at
        assert verdict(monitor) == (Status.PASS, None)


async def test_never_two_attempts_at_once(clock: ManualClock, held: list[Releasable]) -> None:
    """While an attempt that swallows cancellation lives, none other is started."""
    held.append(check := ActingCheck(Act.SWALLOW))
    async with running(clock, check) as monitor:
        for _ in range(50):
            monitor.request_check("one")
            await clock.advance(INTERVAL)

        assert (check.attempts, check.most_outstanding) == (1, 1)
        assert verdict(monitor) == (Status.FAIL, "timeout")


async def test_stuck_check_says_for_how_long(clock: ManualClock, held: list[Releasable]) -> None:
    """The message of a stuck check counts from the beginning of the stuck attempt."""
    held.append(check := ActingCheck(Act.SWALLOW))
    async with running(clock, check) as monitor:
        await clock.advance(TIMEOUT + INTERVAL + TIMEOUT)

        assert monitor.report().checks["one"].message == "one check has not answered for 9.0 s"


async def test_late_answer_is_not_believed(clock: ManualClock, held: list[Releasable]) -> None:
    """What an abandoned attempt says after all is thrown away, and a new attempt is made."""
    held.append(check := ActingCheck(Act.SWALLOW))
    async with running(clock, check) as monitor:
        await clock.advance(TIMEOUT)
        check.act = Act.FAIL
        check.release()
        await clock.settle()

        assert verdict(monitor) == (Status.FAIL, "timeout")

        await clock.advance(INTERVAL)

        assert verdict(monitor) == (Status.FAIL, "code-fail")


async def test_hung_check_recovers_when_it_answers_again(
    clock: ManualClock, held: list[Releasable]
) -> None:
    """A check that comes back passes within an interval and a timeout."""
    held.append(check := ActingCheck(Act.SWALLOW))
    async with running(clock, check) as monitor:
        await clock.advance(60.0)
        check.act = Act.PASS
        check.release()
        await clock.advance(INTERVAL + TIMEOUT)

        assert verdict(monitor) == (Status.PASS, None)


async def test_late_error_of_an_abandoned_attempt_is_nobodys_exception(
    clock: ManualClock,
) -> None:
    """An abandoned attempt that raises in the end does not look like an uncaught exception."""
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
    """A forced round looks again and reports what it saw."""
    async with running(clock, check := ActingCheck()) as monitor:
        await clock.advance(1.0)
        check.act = Act.FAIL
        report = await monitor.refresh()

        assert check.attempts == 2
        assert report.checks["one"].status is Status.FAIL


async def test_refresh_is_single_flight(clock: ManualClock) -> None:
    """Callers that come together share one round."""
    check = ActingCheck(Act.SLOW, clock=clock)
    async with running(clock, check) as monitor:
        await clock.advance(1.0)
        callers = [asyncio.create_task(monitor.refresh()) for _ in range(100)]
        await clock.advance(1.0)

        assert check.attempts == 2
        assert len({id(await caller) for caller in callers}) == 1


async def test_refresh_within_the_gap_is_the_report_that_is_there(clock: ManualClock) -> None:
    """Rounds are at least ``refresh_gap`` apart, however often they are asked for."""
    async with running(clock, check := ActingCheck()) as monitor:
        await clock.advance(1.0)
        for seconds, attempts in ((0.0, 2), (0.0, 2), (0.99, 2), (0.01, 3)):
            await clock.advance(seconds)
            await monitor.refresh()

            assert check.attempts == attempts


async def test_refresh_soon_after_an_attempt_waits_for_the_next(clock: ManualClock) -> None:
    """Attempts are at least ``refresh_gap`` apart, the scheduled ones included."""
    async with running(clock, check := ActingCheck()) as monitor:
        asked = asyncio.create_task(monitor.refresh())
        await clock.advance(0.99)

        assert (check.attempts, asked.done()) == (1, False)

        check.act = Act.FAIL
        await clock.advance(0.01)

        assert check.attempts == 2
        assert (await asked).checks["one"].status is Status.FAIL


async def test_refresh_puts_the_schedule_off(clock: ManualClock) -> None:
    """The next attempt is an interval after the forced one."""
    check = ActingCheck(clock=clock)
    began = clock.monotonic()
    async with running(clock, check) as monitor:
        await clock.advance(4.0)
        await monitor.refresh()
        await clock.advance(INTERVAL)

    assert [began, began + 4, began + 9] == check.begun_at


async def test_refresh_of_a_hung_check_is_bounded(
    clock: ManualClock, held: list[Releasable]
) -> None:
    """A round over a stuck check ends with its timeout and starts no second attempt."""
    held.append(check := ActingCheck(Act.SWALLOW))
    async with running(clock, check) as monitor:
        await clock.advance(TIMEOUT + 1.0)
        caller = asyncio.create_task(monitor.refresh())
        await clock.advance(TIMEOUT)

        assert caller.done()
        assert caller.result().checks["one"].code == "timeout"
        assert check.attempts == 1


async def test_refresh_does_not_take_an_attempt_in_flight_for_an_answer(
    clock: ManualClock,
) -> None:
    """What it sees may have changed before the round was asked for: another one follows it."""
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


async def test_refresh_during_a_short_attempt_keeps_the_gap(clock: ManualClock) -> None:
    """The attempt that answers begins ``refresh_gap`` after the one in flight, and only one."""
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
async def test_refresh_over_an_attempt_that_hangs_is_bounded(
    clock: ManualClock, held: list[Releasable], act: Act, status: Status, after: float
) -> None:
    """Whether another attempt can begin once the one in flight is late, or none can."""
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


async def test_refresh_that_waits_for_a_stuck_attempt_is_answered_by_the_next(
    clock: ManualClock, held: list[Releasable]
) -> None:
    """A turn that found an attempt stuck when it was asked begins its own after that."""
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


async def test_refresh_ends_at_its_bound_whatever_the_attempts_do(
    clock: ManualClock, held: list[Releasable]
) -> None:
    """One in flight, one that could begin only when that one ended, and the end of patience."""
    held.append(check := ActingCheck(Act.SWALLOW))
    async with running(clock, check) as monitor:
        asked = asyncio.create_task(monitor.refresh())
        await clock.advance(2 * TIMEOUT - 0.1)
        check.release()
        await clock.advance(1.09)

        assert (check.attempts, asked.done()) == (2, False)

        await clock.advance(0.01)

        assert asked.done()


async def test_abandoning_cancels_everyone_who_waits(clock: ManualClock) -> None:
    """For the attempt under way, and for the one after it."""
    track = CheckTrack("one", POLICY, clock.now())
    check = ActingCheck(Act.HANG)
    runner = CheckRunner(check, track, clock=clock, completed=lambda _: None, gap=1.0)
    waiting = [runner.force()]
    schedule = asyncio.create_task(runner.run(1.0))
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


async def test_a_forced_round_looks_at_a_follower_after_the_one_it_follows(
    clock: ManualClock,
) -> None:
    """Although the follower might be looked at first: it would see what was found out before."""
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
    # The last but one on schedule. The last once the other had answered, at 6.2 s, and the gap.
    assert [began, began + 3.0, began + 6.0, began + 7.0] == follower.begun_at


async def test_a_follower_is_looked_at_as_soon_as_the_one_it_follows_was(
    clock: ManualClock,
) -> None:
    """Nothing but the gap between its own attempts and the other's answer is waited for."""
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


async def test_a_round_over_a_stuck_check_and_its_follower_is_bounded(
    clock: ManualClock, held: list[Releasable]
) -> None:
    """The follower has its own turn once the other's time is over, and its own bound."""
    leader, follower = ActingCheck(Act.SWALLOW), ActingCheck(Act.SWALLOW)
    held += [leader, follower]
    async with followed(clock, leader, follower) as monitor:
        await clock.advance(1.0)
        asked = asyncio.create_task(monitor.refresh())
        await clock.advance(2 * (1.0 + 2 * TIMEOUT))

        assert asked.done()
        assert {check.code for check in asked.result().checks.values()} == {"timeout"}
        assert (leader.attempts, follower.attempts) == (1, 1)


async def test_a_check_can_follow_only_one_that_is_there(clock: ManualClock) -> None:
    """Nor itself; so nothing is ever waited for in a circle."""
    monitor = HealthMonitor(clock=clock)

    for other in ("one", "two"):
        with pytest.raises(ValueError, match=f"'one' follows '{other}': there is none"):
            monitor.register("one", ActingCheck(), CheckPolicy(follows=other))


async def test_caller_that_leaves_does_not_cancel_the_round(clock: ManualClock) -> None:
    """A client that hangs up takes the round from nobody else."""
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
    """No checks is no reason to wait."""
    report = await HealthMonitor(clock=ManualClock()).refresh()

    assert report.checks == {}


async def test_request_brings_the_next_attempt_forward(clock: ManualClock) -> None:
    """Doubt leads to an attempt at once when the last one is old enough."""
    policy = CheckPolicy(interval=30.0, retry_interval=5.0)
    async with running(clock, check := ActingCheck(), policy) as monitor:
        await clock.advance(6.0)
        monitor.request_check("one")
        await clock.settle()

        assert check.attempts == 2


async def test_requests_are_limited_to_one_per_retry_interval(clock: ManualClock) -> None:
    """A storm of doubt makes no storm of checks."""
    check = ActingCheck(clock=clock)
    began = clock.monotonic()
    async with running(clock, check, CheckPolicy(interval=30.0, retry_interval=5.0)) as monitor:
        for _ in range(1000):
            monitor.request_check("one")
            await clock.advance(0.01)

    assert [began, began + 5] == pytest.approx(check.begun_at[:2])
    assert check.attempts <= 3


async def test_request_never_delays_an_attempt(clock: ManualClock) -> None:
    """A request shortly before the due time leaves the due time alone."""
    check = ActingCheck(clock=clock)
    began = clock.monotonic()
    async with running(clock, check, CheckPolicy(interval=5.0, retry_interval=20.0)) as monitor:
        await clock.advance(4.0)
        monitor.request_check("one")
        await clock.advance(1.0)

    assert [began, began + 5] == check.begun_at


async def test_request_for_an_unknown_check_is_an_error(clock: ManualClock) -> None:
    """A name nobody registered is a mistake of the caller."""
    async with running(clock, ActingCheck()) as monitor:
        with pytest.raises(KeyError):
            monitor.request_check("two")


# -- readiness -------------------------------------------------------------------------------

GATE = CheckPolicy(gates_readiness=True)
SHARED_GATE = CheckPolicy(gates_readiness=True, shared=True)


@pytest.mark.parametrize("act", [Act.PASS, Act.WARN])
async def test_gate_that_passes_or_warns_is_open(clock: ManualClock, act: Act) -> None:
    """A warning is no reason to turn traffic away."""
    async with running(clock, ActingCheck(act), GATE) as monitor:
        assert monitor.report().ready


async def test_failing_gate_closes(clock: ManualClock) -> None:
    """A failing check that gates readiness takes the instance out, by name."""
    async with running(clock, check := ActingCheck(), GATE) as monitor:
        await clock.advance(1.0)
        check.act = Act.FAIL
        report = await monitor.refresh()

        assert report.failing_gates == ("one",)
        assert not report.ready


async def test_failure_without_a_gate_leaves_it_ready(clock: ManualClock) -> None:
    """A check that gates nothing cannot make the instance unready."""
    async with running(clock, ActingCheck(Act.FAIL)) as monitor:
        report = monitor.report()

        assert (report.ready, report.health) == (True, Health.DEGRADED)


async def test_gate_that_gets_stale_closes(clock: ManualClock) -> None:
    """A gate whose result is too old fails, though nothing was recorded."""
    check = ActingCheck()
    policy = CheckPolicy(interval=30.0, max_age=8.0, gates_readiness=True)
    async with running(clock, check, policy) as monitor:
        assert monitor.report().ready

        await clock.advance(8.0)

        assert monitor.report().checks["one"].code == "stale"
        assert not monitor.report().ready


async def test_started_needs_every_check_to_report(
    clock: ManualClock, held: list[Releasable]
) -> None:
    """One check that has not reported keeps start-up from ending, even without a gate."""
    held.append(slow := ActingCheck(Act.SWALLOW))
    monitor = make(clock, {"one": (ActingCheck(), GATE), "slow": (slow, CheckPolicy(timeout=2))})
    monitor.start()
    await clock.settle()

    assert not monitor.report().started

    await clock.advance(2.0)

    assert monitor.report().started

    await monitor.stop()


async def test_started_needs_the_gates_to_pass_once(clock: ManualClock) -> None:
    """A gate that fails from the beginning keeps start-up from ending until it passes."""
    async with running(clock, check := ActingCheck(Act.FAIL), GATE) as monitor:
        assert not monitor.report().started

        await clock.advance(1.0)
        check.act = Act.PASS

        assert (await monitor.refresh()).started


async def test_started_never_goes_back(clock: ManualClock) -> None:
    """Later failures are readiness's business, not the start-up probe's."""
    async with running(clock, check := ActingCheck(), GATE) as monitor:
        await clock.advance(1.0)
        check.act = Act.FAIL
        report = await monitor.refresh()

        assert (report.started, report.ready) == (True, False)


async def test_empty_registry_is_started_ready_and_healthy(clock: ManualClock) -> None:
    """Without checks nothing speaks against traffic."""
    report = HealthMonitor(clock=clock).report()

    assert (report.started, report.ready, report.health) == (True, True, Health.HEALTHY)


@asynccontextmanager
async def failing_open(
    clock: ManualClock, **more: tuple[HealthCheck, CheckPolicy]
) -> AsyncIterator[tuple[HealthMonitor, ActingCheck]]:
    """Run a monitor that opens after 60 s and whose shared gate just began to fail."""
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
    """Failing on a shared gate alone for so long makes the instance ready again, degraded."""
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
    """The time counts from the beginning of each outage."""
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
    """What only this instance has wrong keeps it out, beside a shared outage too."""
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


async def test_never_fails_open_before_it_was_started(clock: ManualClock) -> None:
    """An instance that has never been ready is not made ready by an outage."""
    monitor = make(clock, {"one": (ActingCheck(Act.FAIL), SHARED_GATE)}, fail_open_after=60.0)
    monitor.start()
    await clock.advance(600.0)

    assert not monitor.report().ready

    await monitor.stop()


async def test_zero_never_fails_open(clock: ManualClock) -> None:
    """The default keeps a failing instance out for ever."""
    async with running(clock, check := ActingCheck(), SHARED_GATE) as monitor:
        check.act = Act.FAIL
        await clock.advance(10_000.0)

        assert not monitor.report().ready


@pytest.mark.parametrize(
    ("first", "second", "health"),
    [
        (Act.PASS, Act.PASS, Health.HEALTHY),
        (Act.PASS, Act.WARN, Health.DEGRADED),
        (Act.PASS, Act.FAIL, Health.DEGRADED),
        (Act.WARN, Act.PASS, Health.DEGRADED),
        (Act.FAIL, Act.PASS, Health.UNHEALTHY),
        (Act.FAIL, Act.FAIL, Health.UNHEALTHY),
    ],
)
async def test_overall_health(clock: ManualClock, first: Act, second: Act, health: Health) -> None:
    """Only a failing critical check is unhealthy; anything else that is not pass degrades."""
    monitor = make(
        clock,
        {
            "critical": (ActingCheck(first), CheckPolicy(critical=True)),
            "other": (ActingCheck(second), CheckPolicy()),
        },
    )
    monitor.start()
    await clock.settle()

    assert health is monitor.report().health

    await monitor.stop()


# -- reading ---------------------------------------------------------------------------------


async def test_reading_starts_no_check(clock: ManualClock) -> None:
    """A thousand probes cause no more checks than none."""
    async with running(clock, check := ActingCheck()) as monitor:
        for _ in range(1000):
            monitor.report()
        await clock.settle()

        assert check.attempts == 1


async def test_report_is_the_same_object_until_something_changes(clock: ManualClock) -> None:
    """An encoded answer can be kept for as long as the report is the same."""
    async with running(clock, ActingCheck()) as monitor:
        first = monitor.report()
        await clock.advance(INTERVAL - 0.01)

        assert monitor.report() is first

        await clock.advance(0.01)

        assert monitor.report() is not first


async def test_report_is_renewed_by_age_alone(clock: ManualClock) -> None:
    """A report holds until ``valid_until`` and not a moment longer."""
    policy = CheckPolicy(interval=30.0, max_age=8.0)
    async with running(clock, ActingCheck(), policy) as monitor:
        first = monitor.report()

        assert clock.monotonic() + 8.0 == first.valid_until

        await clock.advance(8.0)
        second = monitor.report()

        assert second is not first
        assert second is monitor.report()
        assert float("inf") == second.valid_until


# -- telling ---------------------------------------------------------------------------------


async def test_each_transition_is_told_once_after_its_attempt(clock: ManualClock) -> None:
    """Listeners get every attempt, the transition it caused, and the report that follows."""
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


async def test_listener_that_raises_harms_nobody(
    clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    """A listener's error is logged; the other listeners and the schedule go on."""
    check, told = ActingCheck(), list[MonitorEvent]()

    def broken(_: MonitorEvent) -> None:
        raise BrokenError("a listener")

    monitor = make(clock, {"one": (check, POLICY)})
    monitor.subscribe(broken)
    monitor.subscribe(told.append)
    monitor.start()
    await clock.advance(INTERVAL)
    await monitor.stop()

    assert check.attempts == 2
    assert len(told) == 5
    assert {"Event listener failed"} == {record.message for record in caplog.records}


async def test_listener_may_read_the_report(clock: ManualClock) -> None:
    """At a transition the report already says the new status."""
    seen: list[Status] = []
    monitor = make(clock, {"one": (ActingCheck(Act.WARN), POLICY)})

    def look(event: MonitorEvent) -> None:
        if isinstance(event, Transition):
            seen.append(monitor.report().checks["one"].status)

    monitor.subscribe(look)
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
    """Counts restored from the previous process are added to."""
    monitor = make(clock, {"one": (ActingCheck(), POLICY)})
    monitor.restore_transition_counts({"one": 41, "gone": 7})
    monitor.start()
    await clock.settle()
    await monitor.stop()

    assert monitor.transition_counts == {"one": 42, "gone": 7}


# -- wiring and the end ----------------------------------------------------------------------


async def test_name_can_be_registered_once(clock: ManualClock) -> None:
    """Two checks of one name are a mistake."""
    monitor = make(clock, {"one": (ActingCheck(), POLICY)})

    with pytest.raises(ValueError, match="'one' is registered already"):
        monitor.register("one", ActingCheck(), POLICY)


async def test_registering_while_running_is_refused(clock: ManualClock) -> None:
    """A check that would never be scheduled is refused instead of pending for ever."""
    async with running(clock, ActingCheck()) as monitor:
        with pytest.raises(ValueError, match="'two' comes too late"):
            monitor.register("two", ActingCheck(), POLICY)


async def test_stop_ends_the_schedule_and_cancels_what_is_in_flight(clock: ManualClock) -> None:
    """After the stop no attempt runs and nothing sleeps."""
    check = ActingCheck(Act.HANG)
    async with running(clock, check) as monitor:
        pass
    await clock.advance(100.0)

    assert (check.attempts, check.outstanding) == (1, 0)
    assert clock.sleeping == 0
    assert monitor.report().checks["one"].status is Status.FAIL


async def test_stop_does_not_wait_for_a_hung_check(
    clock: ManualClock, held: list[Releasable]
) -> None:
    """An attempt that swallows cancellation is left behind."""
    held.append(check := ActingCheck(Act.SWALLOW))
    monitor = make(clock, {"one": (check, POLICY)})
    monitor.start()
    await clock.advance(1.0)
    stop = asyncio.create_task(monitor.stop())
    await clock.settle()

    assert stop.done()
    assert check.outstanding == 1


async def test_stop_releases_who_waits_for_a_round(clock: ManualClock) -> None:
    """A forced round in flight ends with the stop."""
    monitor = make(clock, {"one": (ActingCheck(Act.HANG), POLICY)})
    monitor.start()
    caller = asyncio.create_task(monitor.refresh())
    await clock.advance(1.0)
    await monitor.stop()
    await clock.settle()

    assert caller.done()


async def test_stop_twice_and_before_start_is_harmless(clock: ManualClock) -> None:
    """Stopping what does not run does nothing."""
    monitor = make(clock, {"one": (ActingCheck(), POLICY)})
    await monitor.stop()
    monitor.start()
    await clock.settle()
    await monitor.stop()
    await monitor.stop()

    assert monitor.report().checks["one"].status is Status.PASS


async def test_restart_respects_an_attempt_that_was_left_behind(
    clock: ManualClock, held: list[Releasable]
) -> None:
    """Starting after a stop does not add an attempt to one that still hangs."""
    held.append(check := ActingCheck(Act.SWALLOW))
    async with running(clock, check) as monitor:
        await monitor.stop()
        monitor.start()
        await clock.advance(20.0)

        assert (check.attempts, check.most_outstanding) == (1, 1)


async def test_a_status_may_be_given_by_its_word(clock: ManualClock) -> None:
    """A check in code without types may say "pass"; another word is a failure, not a crash."""

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


async def test_doubt_during_an_attempt_is_not_lost(clock: ManualClock) -> None:
    """A request that comes while an attempt is under way brings the next one forward."""
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


async def test_failing_open_is_told_without_a_reader(clock: ManualClock) -> None:
    """Listeners get the report that opens, whether anybody asks for it or not."""
    check, told = ActingCheck(Act.FAIL), list[MonitorEvent]()
    policy = CheckPolicy(interval=1.0, gates_readiness=True, shared=True)
    monitor = HealthMonitor(clock=clock, fail_open_after=10.0)
    monitor.register("one", check, policy)
    monitor.subscribe(told.append)
    monitor.start()
    await clock.advance(13.0)
    await monitor.stop()

    assert sorted({event.fail_open for event in told if isinstance(event, HealthReport)}) == [
        False,
        True,
    ]


async def test_a_listener_cannot_end_the_schedule_by_cancelling(clock: ManualClock) -> None:
    """A CancelledError that a listener raises is its own error."""
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
    """There is nobody to wait for."""
    monitor = make(clock, {"one": (ActingCheck(), POLICY)})

    assert (await monitor.refresh()).started is False


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
async def test_a_check_cannot_end_the_process(
    clock: ManualClock, error: type[BaseException]
) -> None:
    """What would go through the event loop is a failure like any other."""

    class Leaving:
        async def check(self) -> Observation:
            raise error

    monitor = make(clock, {"one": (Leaving(), POLICY)})
    monitor.start()
    await clock.advance(0.0)
    report = monitor.report().checks["one"]
    await monitor.stop()

    assert (report.status, report.code) == (Status.FAIL, "error")
