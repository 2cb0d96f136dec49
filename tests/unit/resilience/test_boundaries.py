"""Behaviour at limits: exactly at a limit, just past it, and at the start of the machine."""

import contextlib
import math
from collections.abc import Callable
from types import TracebackType

import pytest
from tests.unit.resilience.scripted import BackendError, SkippingClock, state_of

from viralfx.resilience import retry_decision
from viralfx.resilience.breaker import CircuitBreaker, CircuitOpenError
from viralfx.resilience.breaker_states import RollingWindow
from viralfx.resilience.retry import Retrier, retry
from viralfx.resilience.retry_decision import (
    AttemptFailed,
    GaveUp,
    GiveUpReason,
    RetryEvent,
    listen_to_retries,
)

MANY = 300  # large enough that equal integers are different objects


class Constant:
    """A policy that always returns the same delay."""

    def __init__(self, delay: float | None) -> None:
        self.delay = delay

    def next_delay(self, attempt: int, error: Exception) -> float | None:  # noqa: ARG002 - the port
        """Return the delay."""
        return self.delay


class CountingClock(SkippingClock):
    """A clock that counts its readings."""

    reads = 0

    def monotonic(self) -> float:
        """Return the time."""
        self.reads += 1
        return super().monotonic()


class Turnstile:
    """Replaces a lock: counts entries, and runs a function before the first one."""

    def __init__(self, first: Callable[[], object] = object) -> None:
        self.entered = 0
        self._first = first

    def __enter__(self) -> None:
        self.entered += 1
        if self.entered == 1:
            self._first()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Let out."""


@pytest.fixture
def clock() -> SkippingClock:
    """Return a clock that only the test moves."""
    return SkippingClock()


def call(
    breaker: CircuitBreaker, clock: SkippingClock, error: Exception | None = None, took: float = 0
) -> None:
    """Make one call with this outcome and duration."""
    with contextlib.suppress(BackendError), breaker.guard():
        clock.block(took)
        if error is not None:
            raise error


def opened(clock: SkippingClock, open_for: float = 60.0, permits: int = 1) -> CircuitBreaker:
    """Return a breaker that has just opened, with a probe lease of ten seconds."""
    breaker = CircuitBreaker(
        1, open_for, probe_lease=10.0, half_open_max_calls=permits, clock=clock
    )
    call(breaker, clock, BackendError())
    return breaker


# -- the circuit ---------------------------------------------------------------------------------


def test_a_call_long_after_the_open_period_is_a_probe(clock: SkippingClock) -> None:
    """Not only a call at the moment when the period ends."""
    breaker = opened(clock)
    clock.block(61.0)
    call(breaker, clock)
    assert breaker.get_state() == {"state": "CLOSED", "failureCount": 0}


def test_an_open_circuit_rejects_without_its_lock(
    clock: SkippingClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rejected callers do not wait for the lock."""
    breaker, lock = opened(clock), Turnstile()
    monkeypatch.setattr(breaker, "_lock", lock)
    with pytest.raises(CircuitOpenError):
        breaker.admit("charge")
    assert lock.entered == 0


def test_a_circuit_that_opens_during_admission_rejects(
    clock: SkippingClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failed probe in another thread starts a new open period."""
    breaker = opened(clock)
    clock.block(60.0)
    probe = breaker.admit("probe")
    lock = Turnstile(lambda: breaker.failed(probe, BackendError()))
    monkeypatch.setattr(breaker, "_lock", lock)
    with pytest.raises(CircuitOpenError) as caught:
        breaker.admit("late")
    assert caught.value.retry_after == 60.0
    assert state_of(breaker) == "OPEN"


def test_retry_after_of_a_rejected_probe_is_a_difference_of_times() -> None:
    """Also if the lease is longer than the uptime of the machine."""
    clock = SkippingClock(monotonic=1.0)
    breaker = opened(clock, open_for=1.0)
    clock.block(1.0)
    breaker.admit("probe")
    clock.block(1.0)
    with pytest.raises(CircuitOpenError) as caught:
        breaker.admit("other")
    assert caught.value.retry_after == 9.0


@pytest.mark.parametrize("threshold", [2, 4, 5])
def test_a_restored_count_is_one_below_the_threshold_at_most(threshold: int) -> None:
    """With a lower threshold than before, the circuit stays closed until the next failure."""
    breaker = CircuitBreaker(threshold)
    breaker.restore({"state": "CLOSED", "failureCount": 9, "remaining": 0.0})
    assert breaker.get_state() == {"state": "CLOSED", "failureCount": threshold - 1}


def test_a_closed_circuit_reads_no_clock_for_a_success() -> None:
    """Its calls are not gated."""
    clock = CountingClock()
    breaker = CircuitBreaker(clock=clock)
    with breaker.guard():
        pass
    assert clock.reads == 0


def test_a_large_threshold_is_reached(clock: SkippingClock) -> None:
    """Exactly at the last failure."""
    breaker = CircuitBreaker(MANY, clock=clock)
    for _ in range(MANY - 1):
        call(breaker, clock, BackendError())
    assert breaker.get_state() == {"state": "CLOSED", "failureCount": MANY - 1}
    call(breaker, clock, BackendError())
    assert breaker.get_state() == {"state": "OPEN", "failureCount": MANY}


# -- probes --------------------------------------------------------------------------------------


def test_the_number_of_probes_equals_the_permits(clock: SkippingClock) -> None:
    """The last permit is issued, and no further one."""
    breaker = opened(clock, permits=MANY)
    clock.block(60.0)
    for _ in range(MANY):
        breaker.admit("probe")
    with pytest.raises(CircuitOpenError):
        breaker.admit("one more")


def test_the_last_permitted_success_closes(clock: SkippingClock) -> None:
    """None before it does."""
    breaker = opened(clock, permits=MANY)
    clock.block(60.0)
    for _ in range(MANY - 1):
        call(breaker, clock)
    assert state_of(breaker) == "HALF_OPEN"
    call(breaker, clock)
    assert state_of(breaker) == "CLOSED"


def test_successes_and_running_probes_use_permits(clock: SkippingClock) -> None:
    """Two successes and one running probe leave one permit of four."""
    breaker = opened(clock, permits=4)
    clock.block(60.0)
    call(breaker, clock)
    call(breaker, clock)
    breaker.admit("third")
    breaker.admit("fourth")
    with pytest.raises(CircuitOpenError):
        breaker.admit("fifth")


@pytest.mark.parametrize("seconds", [10.0, 11.0])
def test_an_expired_lease_frees_its_permit(clock: SkippingClock, seconds: float) -> None:
    """At the moment when it ends, and later."""
    breaker = opened(clock)
    clock.block(60.0)
    breaker.admit("hangs")
    clock.block(seconds)
    call(breaker, clock)
    assert state_of(breaker) == "CLOSED"


# -- windows -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("took", "state"), [(1.0, "CLOSED"), (2.0, "CLOSED"), (3.0, "OPEN")])
def test_a_probe_is_slow_only_beyond_the_limit(took: float, state: str) -> None:
    """Measured from its start, also shortly after the start of the machine."""
    clock = SkippingClock(monotonic=1.0)
    window = RollingWindow(minimum_calls=1, slow_after=2.0)
    breaker = CircuitBreaker(open_for=1.0, window=window, clock=clock)
    call(breaker, clock, BackendError())
    clock.block(1.0)
    call(breaker, clock, took=took)
    assert state_of(breaker) == state


@pytest.mark.parametrize("error", [None, BackendError()])
def test_a_call_that_takes_exactly_the_limit_is_not_slow(
    clock: SkippingClock, error: Exception | None
) -> None:
    """Neither a success nor a failure."""
    window = RollingWindow(minimum_calls=2, failure_rate=1.0, slow_after=2.0, slow_rate=0.5)
    breaker = CircuitBreaker(window=window, clock=clock)
    call(breaker, clock)
    call(breaker, clock, error, took=2.0)
    call(breaker, clock)
    assert state_of(breaker) == "CLOSED"


def test_a_share_of_slow_calls_above_the_rate_trips(clock: SkippingClock) -> None:
    """Three slow calls of three are more than half."""
    window = RollingWindow(minimum_calls=3, slow_after=2.0, slow_rate=0.5)
    breaker = CircuitBreaker(window=window, clock=clock)
    for _ in range(3):
        assert state_of(breaker) == "CLOSED"
        call(breaker, clock, took=3.0)
    assert state_of(breaker) == "OPEN"


@pytest.mark.parametrize("name", ["failure_rate", "slow_rate"])
@pytest.mark.parametrize("rate", [-0.5, 0.0, 1.1])
def test_a_rate_is_between_zero_and_one(name: str, rate: float) -> None:
    """Zero, negative values and values above one are rejected."""
    expected = f"{name} must be more than 0 and at most 1, got {rate!r}"
    rates = {"failure_rate": 0.5, "slow_rate": 1.0, name: rate}
    with pytest.raises(ValueError, match=expected):
        RollingWindow(failure_rate=rates["failure_rate"], slow_rate=rates["slow_rate"])


# -- retries -------------------------------------------------------------------------------------


async def attempt_once(retrier: Retrier, error: Exception) -> None:
    """Run a failing operation and check that the caller gets its error."""

    async def fail() -> None:
        raise error

    with pytest.raises(type(error)):
        await retrier.execute(fail)


async def test_only_an_exhausted_budget_is_reported(clock: SkippingClock) -> None:
    """A permanent error has no budget event."""
    events: list[RetryEvent] = []
    retrier = Retrier(Constant(None), name="load", listeners=(events.append,), clock=clock)
    error = BackendError()
    await attempt_once(retrier, error)
    reason = GiveUpReason.PERMANENT
    assert events == [
        AttemptFailed(name="load", attempt=1, delay=None, error=error),
        GaveUp(name="load", attempts=1, elapsed=0.0, reason=reason, error=error),
    ]


@pytest.mark.parametrize("delay", [float("inf"), math.nan, -1.0])
async def test_an_infinite_delay_gives_up(
    clock: SkippingClock, caplog: pytest.LogCaptureFixture, delay: float
) -> None:
    """It is logged, and the reason is ``permanent``, not ``deadline``."""
    events: list[RetryEvent] = []
    retrier = Retrier(Constant(delay), listeners=(events.append,), clock=clock)
    await attempt_once(retrier, BackendError())
    reasons = [event.reason for event in events if isinstance(event, GaveUp)]
    assert reasons == [GiveUpReason.PERMANENT]
    assert {record.message for record in caplog.records} == {"Retry policy gave no delay"}


async def test_a_listener_of_all_retriers_gets_each_event_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It gets those of earlier and later retriers, timed from the start of the call."""
    monkeypatch.setattr(retry_decision, "_global_listeners", ())
    events: list[RetryEvent] = []
    listener, clock = events.append, SkippingClock()

    async def fail() -> None:
        await clock.sleep(2.0)
        raise BackendError

    earlier = Retrier(Constant(None), name="earlier", clock=clock)
    listen_to_retries(listener)
    listen_to_retries(listener)
    later = Retrier(Constant(None), name="later", clock=clock)
    for retrier in (earlier, later):
        with pytest.raises(BackendError):
            await retrier.execute(fail)

    assert [(type(event), event.name) for event in events] == [
        (AttemptFailed, "earlier"),
        (GaveUp, "earlier"),
        (AttemptFailed, "later"),
        (GaveUp, "later"),
    ]
    assert [event.elapsed for event in events if isinstance(event, GaveUp)] == [2.0, 2.0]


async def test_an_attempt_has_no_delay_until_it_failed(clock: SkippingClock) -> None:
    """Neither before its block nor after a success."""
    delays = []
    async for attempt in retry(base_delay=2.0, clock=clock):
        delays.append(attempt.delay)
        with attempt:
            pass
        delays.append(attempt.delay)
    assert delays == [0.0, 0.0]


async def test_a_successful_attempt_suppresses_no_error(clock: SkippingClock) -> None:
    """``__exit__`` returns False."""
    async for attempt in retry(clock=clock):
        attempt.__enter__()
        assert attempt.__exit__(None, None, None) is False
