"""The states of the process: forward only once it leaves."""

import pytest
from tests.manual_clock import ManualClock
from tests.unit.doubles import BrokenError

from viralfx.domain.health import Health, HealthReport
from viralfx.domain.lifecycle import Lifecycle, NotReadyReason, State, StateChanged


def report(*failing: str, started: bool = True, fail_open: bool = False) -> HealthReport:
    """Make a report that says so much about readiness."""
    return HealthReport(
        checks={},
        health=Health.HEALTHY,
        started=started,
        failing_gates=failing,
        fail_open=fail_open,
        valid_until=float("inf"),
    )


@pytest.fixture
def lifecycle(clock: ManualClock) -> Lifecycle:
    """Return a lifecycle whose application has started."""
    lifecycle = Lifecycle(clock)
    lifecycle.application_ready()
    return lifecycle


def test_begins_starting(clock: ManualClock) -> None:
    """A new process is starting and does not stop."""
    lifecycle = Lifecycle(clock)

    assert State.STARTING is lifecycle.state
    assert not lifecycle.stopping


def test_passing_checks_do_not_replace_the_applications_start(clock: ManualClock) -> None:
    """Until the application's own start-up is over, readiness says starting."""
    lifecycle = Lifecycle(clock)

    assert NotReadyReason.STARTING is lifecycle.follow(report())
    assert State.STARTING is lifecycle.state


def test_application_alone_is_not_ready(lifecycle: Lifecycle) -> None:
    """Until the checks have started, readiness says starting."""
    assert NotReadyReason.STARTING is lifecycle.follow(report(started=False))
    assert State.STARTING is lifecycle.state


def test_follows_the_checks_both_ways(lifecycle: Lifecycle) -> None:
    """While it runs, the process goes between ready and not ready as the gates do."""
    answers = [lifecycle.follow(report(*failing)) for failing in ([], ["database"], [])]

    assert answers == [None, NotReadyReason.FAILING, None]
    assert [e.new for e in lifecycle.history] == [State.READY, State.NOT_READY, State.READY]
    assert lifecycle.history[1].reason == "failing: database"


def test_first_ready_may_be_not_ready(lifecycle: Lifecycle) -> None:
    """Checks that started and fail since are seen at the first look."""
    assert NotReadyReason.FAILING is lifecycle.follow(report("database"))
    assert State.NOT_READY is lifecycle.state


def test_failing_open_is_ready_and_says_why(lifecycle: Lifecycle) -> None:
    """A long shared outage leads back to ready with its own reason."""
    lifecycle.follow(report("database"))

    assert lifecycle.follow(report("database", fail_open=True)) is None
    assert (lifecycle.state, lifecycle.history[-1].reason) == (State.READY, "fail_open")


def test_standing_still_is_no_event(lifecycle: Lifecycle) -> None:
    """The same state again is told to nobody."""
    events: list[StateChanged] = []
    lifecycle.subscribe(events.append)
    for _ in range(3):
        lifecycle.follow(report())

    assert len(events) == 1


@pytest.mark.parametrize("state", [State.LAME_DUCK, State.DRAINING, State.STOPPED])
def test_shutdown_is_sticky(lifecycle: Lifecycle, state: State) -> None:
    """Once leaving, neither checks nor a second start bring the process back."""
    lifecycle.advance(state, "SIGTERM")
    lifecycle.application_ready()
    reason = lifecycle.follow(report())

    assert NotReadyReason.DRAINING is reason
    assert state is lifecycle.state
    assert lifecycle.stopping


def test_shutdown_goes_forward_only(lifecycle: Lifecycle) -> None:
    """Going back or standing still does nothing."""
    for state in (State.DRAINING, State.LAME_DUCK, State.DRAINING, State.STOPPED, State.DRAINING):
        lifecycle.advance(state, "SIGTERM")

    assert [event.new for event in lifecycle.history] == [State.DRAINING, State.STOPPED]


def test_shutdown_may_come_while_starting(clock: ManualClock) -> None:
    """A process told to stop before it was ready leaves at once."""
    lifecycle = Lifecycle(clock)
    lifecycle.advance(State.LAME_DUCK, "SIGTERM")
    event = lifecycle.history[0]

    assert (event.old, event.new, event.reason) == (State.STARTING, State.LAME_DUCK, "SIGTERM")
    assert clock.now() == event.at


async def test_uptime_is_monotonic_time(lifecycle: Lifecycle, clock: ManualClock) -> None:
    """Uptime counts from the beginning of the process, through the shutdown too."""
    await clock.advance(5.0)
    lifecycle.advance(State.STOPPED, "SIGTERM")
    await clock.advance(0.5)

    assert lifecycle.uptime == 5.5


def test_history_is_bounded(lifecycle: Lifecycle) -> None:
    """A flapping check does not fill the memory."""
    for turn in range(1000):
        lifecycle.follow(report(*(["database"] if turn % 2 else [])))

    assert len(lifecycle.history) == 100
    assert State.NOT_READY is lifecycle.history[-1].new


def test_listener_that_raises_does_not_hold_up_the_shutdown(
    lifecycle: Lifecycle, caplog: pytest.LogCaptureFixture
) -> None:
    """A listener's error is logged, and the state is entered all the same."""

    def broken(_: StateChanged) -> None:
        raise BrokenError("a listener")

    lifecycle.subscribe(broken)
    lifecycle.advance(State.LAME_DUCK, "SIGTERM")

    assert State.LAME_DUCK is lifecycle.state
    assert [record.message for record in caplog.records] == ["Event listener failed"]
