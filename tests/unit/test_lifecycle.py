"""The states of the process, which only move forward once shutdown has begun."""

import pytest
from tests.manual_clock import ManualClock
from tests.unit.doubles import BrokenError

from viralfx.domain.health.model import (
    Health,
    HealthReport,
    Lifecycle,
    NotReadyReason,
    State,
    StateChanged,
)


def report(*failing: str, started: bool = True, fail_open: bool = False) -> HealthReport:
    """Return a report with this readiness."""
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


def test_the_first_state_is_starting(clock: ManualClock) -> None:
    """A new process is starting, and shutdown has not begun."""
    lifecycle = Lifecycle(clock)

    assert State.STARTING is lifecycle.state
    assert not lifecycle.stopping


def test_passing_checks_do_not_end_the_start_of_the_application(clock: ManualClock) -> None:
    """Until the application has started, readiness answers ``starting``."""
    lifecycle = Lifecycle(clock)

    assert NotReadyReason.STARTING is lifecycle.follow(report())
    assert State.STARTING is lifecycle.state


def test_a_started_application_waits_for_its_checks(lifecycle: Lifecycle) -> None:
    """Until the checks have started, readiness answers ``starting``."""
    assert NotReadyReason.STARTING is lifecycle.follow(report(started=False))
    assert State.STARTING is lifecycle.state


def test_readiness_follows_the_checks_in_both_directions(lifecycle: Lifecycle) -> None:
    """The state alternates between ready and not ready."""
    answers = [lifecycle.follow(report(*failing)) for failing in ([], ["database"], [])]

    assert answers == [None, NotReadyReason.FAILING, None]
    assert [e.new for e in lifecycle.history] == [State.READY, State.NOT_READY, State.READY]
    assert lifecycle.history[1].reason == "failing: database"


def test_the_first_state_after_start_up_may_be_not_ready(lifecycle: Lifecycle) -> None:
    """A check that fails after start-up shows in the first report."""
    assert NotReadyReason.FAILING is lifecycle.follow(report("database"))
    assert State.NOT_READY is lifecycle.state


def test_failing_open_has_its_own_reason(lifecycle: Lifecycle) -> None:
    """A long outage of a shared dependency makes the process ready again."""
    lifecycle.follow(report("database"))

    assert lifecycle.follow(report("database", fail_open=True)) is None
    assert (lifecycle.state, lifecycle.history[-1].reason) == (State.READY, "fail_open")


def test_an_unchanged_state_causes_no_event(lifecycle: Lifecycle) -> None:
    """Listeners get nothing."""
    events: list[StateChanged] = []
    lifecycle.subscribe(events.append)
    for _ in range(3):
        lifecycle.follow(report())

    assert len(events) == 1


@pytest.mark.parametrize("state", [State.LAME_DUCK, State.DRAINING, State.STOPPED])
def test_shutdown_cannot_be_undone(lifecycle: Lifecycle, state: State) -> None:
    """Neither checks nor a second start make the process ready again."""
    lifecycle.advance(state, "SIGTERM")
    lifecycle.application_ready()
    reason = lifecycle.follow(report())

    assert NotReadyReason.DRAINING is reason
    assert state is lifecycle.state
    assert lifecycle.stopping


def test_shutdown_states_only_move_forward(lifecycle: Lifecycle) -> None:
    """Moving backward, or to the same state, does nothing."""
    for state in (State.DRAINING, State.LAME_DUCK, State.DRAINING, State.STOPPED, State.DRAINING):
        lifecycle.advance(state, "SIGTERM")

    assert [event.new for event in lifecycle.history] == [State.DRAINING, State.STOPPED]


def test_shutdown_can_begin_during_start_up(clock: ManualClock) -> None:
    """A process that is stopped before it was ready goes to its shutdown states."""
    lifecycle = Lifecycle(clock)
    lifecycle.advance(State.LAME_DUCK, "SIGTERM")
    event = lifecycle.history[0]

    assert (event.old, event.new, event.reason) == (State.STARTING, State.LAME_DUCK, "SIGTERM")
    assert clock.now() == event.at


async def test_uptime_is_monotonic_time(lifecycle: Lifecycle, clock: ManualClock) -> None:
    """Uptime counts from the start of the process, also during shutdown."""
    await clock.advance(5.0)
    lifecycle.advance(State.STOPPED, "SIGTERM")
    await clock.advance(0.5)

    assert lifecycle.uptime == 5.5


def test_history_is_bounded(lifecycle: Lifecycle) -> None:
    """A flapping check does not use more and more memory."""
    for turn in range(1000):
        lifecycle.follow(report(*(["database"] if turn % 2 else [])))

    assert len(lifecycle.history) == 100
    assert State.NOT_READY is lifecycle.history[-1].new


def test_a_listener_error_does_not_block_a_state_change(
    lifecycle: Lifecycle, caplog: pytest.LogCaptureFixture
) -> None:
    """The error is logged, and the state changes."""

    def broken(_: StateChanged) -> None:
        raise BrokenError("a listener")

    lifecycle.subscribe(broken)
    lifecycle.advance(State.LAME_DUCK, "SIGTERM")

    assert State.LAME_DUCK is lifecycle.state
    assert [record.message for record in caplog.records] == ["Event listener failed"]
