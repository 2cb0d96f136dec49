"""The rolling-window mode of the breaker, and its counters."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.resilience.scripted import BackendError, SkippingClock, state_of

from viralfx.resilience.breaker import CircuitBreaker, CircuitOpenError
from viralfx.resilience.breaker_states import RollingCounts, RollingWindow


@pytest.fixture
def clock() -> SkippingClock:
    """Return a clock that only the test moves."""
    return SkippingClock()


def breaker_with(clock: SkippingClock, window: RollingWindow) -> CircuitBreaker:
    """Return a breaker in rolling-window mode."""
    return CircuitBreaker(open_for=60.0, window=window, clock=clock)


def call(breaker: CircuitBreaker, clock: SkippingClock, outcome: str, seconds: float = 0) -> None:
    """Make one call with this outcome and duration."""
    errors = {"fail": BackendError(), "neutral": CircuitOpenError("other", "", 1.0)}
    with contextlib.suppress(BackendError, CircuitOpenError), breaker.guard():
        clock.block(seconds)
        if outcome in errors:
            raise errors[outcome]


def test_the_failure_rate_opens_after_the_minimum_of_calls(clock: SkippingClock) -> None:
    """Half of ten calls, not before there are ten."""
    breaker = breaker_with(clock, RollingWindow(failure_rate=0.5, minimum_calls=10))
    for outcome in ["fail", "ok"] * 4 + ["fail"]:
        call(breaker, clock, outcome)
    assert breaker.get_state() == {"state": "CLOSED", "failureCount": 5}
    call(breaker, clock, "fail")
    assert breaker.get_state() == {"state": "OPEN", "failureCount": 6}


def test_the_circuit_stays_closed_below_the_failure_rate(clock: SkippingClock) -> None:
    """Exactly at the rate it opens."""
    breaker = breaker_with(clock, RollingWindow(failure_rate=0.5, minimum_calls=3))
    for outcome in ("ok", "ok", "fail"):
        call(breaker, clock, outcome)
    assert state_of(breaker) == "CLOSED"
    call(breaker, clock, "fail")
    assert state_of(breaker) == "OPEN"


def test_neutral_calls_are_not_counted(clock: SkippingClock) -> None:
    """Neither as calls nor as failures."""
    breaker = breaker_with(clock, RollingWindow(failure_rate=0.1, minimum_calls=2))
    for outcome in ("neutral", "neutral", "fail"):
        call(breaker, clock, outcome)
    assert breaker.get_state() == {"state": "CLOSED", "failureCount": 1}


def test_outcomes_older_than_the_window_do_not_count(clock: SkippingClock) -> None:
    """Failures of ten seconds ago are not added to current ones."""
    breaker = breaker_with(clock, RollingWindow(seconds=10.0, minimum_calls=3))
    for _ in range(2):
        call(breaker, clock, "fail")
    clock.block(10.0)
    assert breaker.get_state() == {"state": "CLOSED", "failureCount": 0}
    call(breaker, clock, "fail")
    assert breaker.get_state() == {"state": "CLOSED", "failureCount": 1}


def test_slow_calls_open_by_their_own_rate(clock: SkippingClock) -> None:
    """Slow successes count as slow, never as failures."""
    window = RollingWindow(minimum_calls=4, slow_after=2.0, slow_rate=0.75)
    breaker = breaker_with(clock, window)
    for seconds in (2.0, 2.1, 2.1, 2.1):
        assert state_of(breaker) == "CLOSED"
        call(breaker, clock, "ok", seconds)
    assert breaker.get_state() == {"state": "OPEN", "failureCount": 0}


def test_the_circuit_stays_closed_below_the_slow_rate(clock: SkippingClock) -> None:
    """The rate is a share of the calls."""
    window = RollingWindow(minimum_calls=4, slow_after=2.0, slow_rate=0.5)
    breaker = breaker_with(clock, window)
    for seconds in (0.0, 0.0, 0.0, 2.1, 2.1):
        call(breaker, clock, "ok", seconds)
        assert state_of(breaker) == "CLOSED"
    call(breaker, clock, "ok", 2.1)
    assert state_of(breaker) == "OPEN"


def test_a_slow_failure_counts_in_both_rates(clock: SkippingClock) -> None:
    """It is one call."""
    window = RollingWindow(minimum_calls=2, failure_rate=1.0, slow_after=2.0, slow_rate=1.0)
    breaker = breaker_with(clock, window)
    call(breaker, clock, "fail", 3.0)
    assert breaker.get_state() == {"state": "CLOSED", "failureCount": 1}
    call(breaker, clock, "ok", 3.0)
    assert state_of(breaker) == "OPEN"


def test_a_fast_failure_is_not_slow(clock: SkippingClock) -> None:
    """It counts in the failure rate only."""
    window = RollingWindow(minimum_calls=1, failure_rate=1.0, slow_after=2.0, slow_rate=0.1)
    breaker = breaker_with(clock, window)
    call(breaker, clock, "ok", 1.0)
    call(breaker, clock, "fail", 1.0)
    assert breaker.get_state() == {"state": "CLOSED", "failureCount": 1}


def test_a_cancelled_timed_call_is_neutral(clock: SkippingClock) -> None:
    """Even if it was slow."""
    window = RollingWindow(minimum_calls=1, slow_after=2.0, slow_rate=0.1)
    breaker = breaker_with(clock, window)
    guard = breaker.guard()
    guard.__enter__()
    clock.block(9.0)
    guard.__exit__(GeneratorExit, GeneratorExit(), None)
    assert breaker.get_state() == {"state": "CLOSED", "failureCount": 0}


@pytest.mark.parametrize(("seconds", "state"), [(2.0, "CLOSED"), (2.1, "OPEN")])
def test_a_slow_probe_opens_again(clock: SkippingClock, seconds: float, state: str) -> None:
    """A dependency that is still slow has not recovered."""
    breaker = breaker_with(clock, RollingWindow(minimum_calls=1, slow_after=2.0))
    call(breaker, clock, "fail")
    clock.block(60.0)
    call(breaker, clock, "ok", seconds)
    assert state_of(breaker) == state


def test_a_closed_window_starts_empty(clock: SkippingClock) -> None:
    """After a recovery or a restart, earlier calls do not count."""
    breaker = breaker_with(clock, RollingWindow(minimum_calls=2))
    call(breaker, clock, "fail")
    breaker.restore(breaker.snapshot())
    assert breaker.get_state() == {"state": "CLOSED", "failureCount": 0}


@given(st.lists(st.tuples(st.floats(0, 30), st.booleans()), max_size=200))
def test_totals_are_those_of_the_last_ten_slices(steps: list[tuple[float, bool]]) -> None:
    """Compared with a plain list of additions."""
    counts, now, added = RollingCounts(10.0, kinds=2), 0.0, list[tuple[int, int]]()
    for seconds, second_kind in steps:
        now += seconds
        counts.add(now, int(second_kind))
        added.append((int(now), int(second_kind)))
        recent = [kind for at, kind in added if at > int(now) - 10]
        assert counts.totals == [recent.count(0), recent.count(1)]


def test_an_earlier_time_counts_in_the_current_slice(caplog: pytest.LogCaptureFixture) -> None:
    """Threads may report out of order."""
    counts = RollingCounts(10.0, kinds=1)
    for now in (25.0, 24.0, 3.0, 25.5):
        counts.add(now, 0)
    assert counts.totals == [4]
    counts.forget(35.0)
    assert counts.totals == [0]
    assert not caplog.records
