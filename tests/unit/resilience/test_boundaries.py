"""Where resilience turns over: exactly at a limit, just past it, and at the very start."""

import contextlib
import math
from collections.abc import Callable
from types import TracebackType

import pytest
from tests.unit.resilience.scripted import BackendError, SkippingClock, state_of

from viralfx.domain.resilience.breaker import CircuitBreaker
from viralfx.domain.resilience.circuit import CircuitOpenError
from viralfx.domain.resilience.circuit_states import RollingWindow
from viralfx.domain.resilience.retry import Retrier, retry
from viralfx.domain.resilience.retry_decision import AttemptFailed, GaveUp, GiveUpReason, RetryEvent

MANY = 300  # so many that equal whole numbers are no longer one and the same object


class Constant:
    """A policy that always gives the same answer."""

    def __init__(self, delay: float | None) -> None:
        self.delay = delay

    def next_delay(self, attempt: int, error: Exception) -> float | None:  # noqa: ARG002 - the port
        """Return the answer."""
        return self.delay


class CountingClock(SkippingClock):
    """A clock that counts how often it is read."""

    reads = 0

    def monotonic(self) -> float:
        """Read the time."""
        self.reads += 1
        return super().monotonic()


class Turnstile:
    """In place of a lock: counts who enters, and does something before the first is in."""

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
    """Time that passes only when told."""
    return SkippingClock()


def call(
    breaker: CircuitBreaker, clock: SkippingClock, error: Exception | None = None, took: float = 0
) -> None:
    """Make one call that ends so after so many seconds."""
    with contextlib.suppress(BackendError), breaker.guard():
        clock.block(took)
        if error is not None:
            raise error


def opened(clock: SkippingClock, open_for: float = 60.0, permits: int = 1) -> CircuitBreaker:
    """Return a breaker that has just opened, with probes leased for ten seconds."""
    breaker = CircuitBreaker(
        1, open_for, probe_lease=10.0, half_open_max_calls=permits, clock=clock
    )
    call(breaker, clock, BackendError())
    return breaker


# -- the circuit ---------------------------------------------------------------------------------


def test_a_call_long_after_the_open_period_is_a_probe(clock: SkippingClock) -> None:
    """Not only one at the very moment at which it ends."""
    breaker = opened(clock)
    clock.block(61.0)
    call(breaker, clock)
    assert breaker.get_state() == {"state": "CLOSED", "failureCount": 0}


def test_an_open_circuit_rejects_without_its_lock(
    clock: SkippingClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Callers who are turned away do not queue for it."""
    breaker, lock = opened(clock), Turnstile()
    monkeypatch.setattr(breaker, "_lock", lock)
    with pytest.raises(CircuitOpenError):
        breaker.admit("charge")
    assert lock.entered == 0


def test_a_circuit_that_opened_between_the_two_looks_rejects(
    clock: SkippingClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A probe that fails meanwhile in another thread starts a whole open period."""
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
    """Also soon after the machine has started, when the lease is longer than the time so far."""
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
    """A lower threshold than before the restart leaves the circuit closed, until one failure."""
    breaker = CircuitBreaker(threshold)
    breaker.restore({"state": "CLOSED", "failureCount": 9, "remaining": 0.0})
    assert breaker.get_state() == {"state": "CLOSED", "failureCount": threshold - 1}


def test_a_closed_circuit_reads_no_clock_for_a_success() -> None:
    """Its calls need not ask, and so cost nothing."""
    clock = CountingClock()
    breaker = CircuitBreaker(clock=clock)
    with breaker.guard():
        pass
    assert clock.reads == 0


def test_a_large_threshold_is_reached(clock: SkippingClock) -> None:
    """At the failure that makes it full, no sooner and no later."""
    breaker = CircuitBreaker(MANY, clock=clock)
    for _ in range(MANY - 1):
        call(breaker, clock, BackendError())
    assert breaker.get_state() == {"state": "CLOSED", "failureCount": MANY - 1}
    call(breaker, clock, BackendError())
    assert breaker.get_state() == {"state": "OPEN", "failureCount": MANY}


# -- probes --------------------------------------------------------------------------------------


def test_as_many_probes_as_permits_and_not_one_more(clock: SkippingClock) -> None:
    """Of many permits, too, the last is given and the next is not."""
    breaker = opened(clock, permits=MANY)
    clock.block(60.0)
    for _ in range(MANY):
        breaker.admit("probe")
    with pytest.raises(CircuitOpenError):
        breaker.admit("one more")


def test_as_many_successes_as_permits_close(clock: SkippingClock) -> None:
    """Of many permits, too, the last success closes and none before it."""
    breaker = opened(clock, permits=MANY)
    clock.block(60.0)
    for _ in range(MANY - 1):
        call(breaker, clock)
    assert state_of(breaker) == "HALF_OPEN"
    call(breaker, clock)
    assert state_of(breaker) == "CLOSED"


def test_successes_and_probes_under_way_add_up(clock: SkippingClock) -> None:
    """Two that succeeded and one under way leave one permit of four."""
    breaker = opened(clock, permits=4)
    clock.block(60.0)
    call(breaker, clock)
    call(breaker, clock)
    breaker.admit("third")
    breaker.admit("fourth")
    with pytest.raises(CircuitOpenError):
        breaker.admit("fifth")


@pytest.mark.parametrize("seconds", [10.0, 11.0])
def test_a_lease_that_is_over_gives_its_permit_to_the_next(
    clock: SkippingClock, seconds: float
) -> None:
    """At the moment at which it ends, and at any later one."""
    breaker = opened(clock)
    clock.block(60.0)
    breaker.admit("hangs")
    clock.block(seconds)
    call(breaker, clock)
    assert state_of(breaker) == "CLOSED"


# -- windows -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("took", "state"), [(1.0, "CLOSED"), (2.0, "CLOSED"), (3.0, "OPEN")])
def test_a_probe_is_slow_only_beyond_the_limit(took: float, state: str) -> None:
    """Measured from its start, also when that is less than the limit after the machine's."""
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
def test_a_rate_is_a_share(name: str, rate: float) -> None:
    """Negative ones are refused like nothing and like more than all."""
    expected = f"{name} must be more than 0 and at most 1, got {rate!r}"
    rates = {"failure_rate": 0.5, "slow_rate": 1.0, name: rate}
    with pytest.raises(ValueError, match=expected):
        RollingWindow(failure_rate=rates["failure_rate"], slow_rate=rates["slow_rate"])


# -- retries -------------------------------------------------------------------------------------


async def attempt_once(retrier: Retrier, error: Exception) -> None:
    """Run what fails, and see the caller get its error."""

    async def fail() -> None:
        raise error

    with pytest.raises(type(error)):
        await retrier.execute(fail)


async def test_only_a_spent_budget_is_told_as_one(clock: SkippingClock) -> None:
    """A permanent error is told as given up, with no word of a budget."""
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
async def test_a_delay_without_end_is_none(
    clock: SkippingClock, caplog: pytest.LogCaptureFixture, delay: float
) -> None:
    """What a policy must not answer is logged and given up as permanent, not as too late."""
    events: list[RetryEvent] = []
    retrier = Retrier(Constant(delay), listeners=(events.append,), clock=clock)
    await attempt_once(retrier, BackendError())
    reasons = [event.reason for event in events if isinstance(event, GaveUp)]
    assert reasons == [GiveUpReason.PERMANENT]
    assert {record.message for record in caplog.records} == {"Retry policy gave no delay"}


async def test_an_attempt_has_no_delay_until_it_failed(clock: SkippingClock) -> None:
    """The loop's variable says so, before its block and after one that succeeded."""
    delays = []
    async for attempt in retry(base_delay=2.0, clock=clock):
        delays.append(attempt.delay)
        with attempt:
            pass
        delays.append(attempt.delay)
    assert delays == [0.0, 0.0]


async def test_an_attempt_that_succeeded_hides_nothing(clock: SkippingClock) -> None:
    """Whoever leaves it by hand is told that there was no error to hide."""
    async for attempt in retry(clock=clock):
        attempt.__enter__()
        assert attempt.__exit__(None, None, None) is False
