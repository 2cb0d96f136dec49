"""Named breakers: listed, commanded by hand, saved and restored, shared by threads."""

import dataclasses
import json
import math
import pickle
import threading
from collections.abc import Mapping
from typing import Any

import pytest
from tests.unit.resilience.scripted import BackendError, Scripted, SkippingClock, state_of

from viralfx.domain.health import HealthCheck, Observation, Status
from viralfx.domain.resilience.breaker import CircuitBreaker, circuit_breaker
from viralfx.domain.resilience.bulkhead import BulkheadFull
from viralfx.domain.resilience.circuit import (
    CallRejected,
    CircuitEvent,
    CircuitOpenError,
    StateChanged,
)
from viralfx.domain.resilience.circuit_states import CircuitState, RollingWindow
from viralfx.domain.resilience.circuits import BreakerRegistry
from viralfx.domain.resilience.fallback import FallbackUsed
from viralfx.domain.resilience.retry_decision import AttemptFailed, BudgetExhausted, GaveUp


@pytest.fixture
def clock() -> SkippingClock:
    """Time that passes only when told."""
    return SkippingClock()


def tripped(clock: SkippingClock, name: str = "redis") -> CircuitBreaker:
    """Return a breaker that has just opened for 60 s."""
    breaker = CircuitBreaker(1, 60.0, name=name, clock=clock)
    with pytest.raises(BackendError), breaker.guard():
        raise BackendError
    return breaker


async def test_the_circuits_check_warns_while_one_is_open(clock: SkippingClock) -> None:
    """It names it; half open it passes again, since an unused dependency may stay so."""
    registry = BreakerRegistry()
    check: HealthCheck = registry
    registry.add(CircuitBreaker(name="database", clock=clock))
    healthy = {"state": "CLOSED", "failureCount": 0}
    assert await check.check() == Observation(
        status=Status.PASS, message="No circuit is open", details={"database": healthy}
    )
    registry.add(tripped(clock))
    assert await check.check() == Observation(
        status=Status.WARN,
        message="Open: redis",
        details={"database": healthy, "redis": {"state": "OPEN", "failureCount": 1}},
        code="circuit_open",
    )
    clock.block(60.0)
    assert (await check.check()).status is Status.PASS


def test_names_are_unique_and_found(clock: SkippingClock) -> None:
    """A second breaker of a name would hide the other."""
    registry = BreakerRegistry()
    breaker = registry.add(CircuitBreaker(name="redis", clock=clock))
    assert registry["redis"] is breaker
    assert list(registry) == [breaker]
    assert len(registry) == 1
    with pytest.raises(ValueError, match="'redis' is registered already"):
        registry.add(CircuitBreaker(name="redis"))
    with pytest.raises(KeyError):
        registry["other"]


def test_a_listener_hears_of_breakers_to_come(clock: SkippingClock) -> None:
    """One subscription serves the telemetry of the whole process."""
    registry, events = BreakerRegistry(), list[CircuitEvent]()
    registry.add(CircuitBreaker(name="early", clock=clock))
    registry.subscribe(events.append)
    registry.add(CircuitBreaker(name="late", clock=clock))
    for breaker in registry:
        breaker.open()
    assert [event.name for event in events] == ["early", "late"]


def test_an_open_breaker_stays_open_for_its_remaining_time(clock: SkippingClock) -> None:
    """Through a restart, whose duration no monotonic clock knows; the state is plain JSON."""
    before = BreakerRegistry()
    before.add(tripped(clock))
    clock.block(18.0)
    saved = json.loads(json.dumps(before.snapshot()))
    assert saved == {"redis": {"state": "OPEN", "failureCount": 1, "remaining": 42.0}}
    restarted, after = SkippingClock(), BreakerRegistry()
    restarted.block(-900.0)
    after.restore(saved)
    breaker = after.add(CircuitBreaker(1, 60.0, name="redis", clock=restarted))
    restarted.block(41.9)
    assert state_of(breaker) == "OPEN"
    restarted.block(0.2)
    assert state_of(breaker) == "HALF_OPEN"


def test_what_was_restored_but_not_made_yet_is_saved_again(clock: SkippingClock) -> None:
    """Two restarts in a row lose nothing; a breaker's own state replaces what was saved."""
    registry = BreakerRegistry()
    saved = {"redis": {"state": "OPEN", "failureCount": 1, "remaining": 42.0}}
    registry.restore(saved)
    assert registry.snapshot() == saved
    registry.add(CircuitBreaker(name="redis", clock=clock)).close()
    closed = {"redis": {"state": "CLOSED", "failureCount": 0, "remaining": 0.0}}
    assert registry.snapshot() == closed


def test_a_running_breaker_can_be_restored_too(clock: SkippingClock) -> None:
    """Listeners hear of it as of any change."""
    registry, events = BreakerRegistry(), list[CircuitEvent]()
    registry.subscribe(events.append)
    registry.add(CircuitBreaker(name="redis", clock=clock))
    registry.restore({"redis": {"state": "OPEN", "failureCount": 7, "remaining": 5}})
    opened = StateChanged(
        name="redis", old=CircuitState.CLOSED, new=CircuitState.OPEN, failure_count=7
    )
    assert events == [opened]


def test_no_restored_breaker_is_open_longer_than_configured(clock: SkippingClock) -> None:
    """What was saved under another configuration does not outlive this one."""
    breaker = CircuitBreaker(3, 60.0, clock=clock)
    breaker.restore({"state": "OPEN", "failureCount": 1, "remaining": 3600})
    assert breaker.snapshot()["remaining"] == 60.0
    breaker.restore({"state": "CLOSED", "failureCount": 99, "remaining": 0})
    assert breaker.get_state() == {"state": "CLOSED", "failureCount": 2}
    breaker.restore({"state": "HALF_OPEN", "failureCount": 3, "remaining": 0.0})
    assert breaker.get_state() == {"state": "HALF_OPEN", "failureCount": 3}


@pytest.mark.parametrize(
    "saved",
    [
        {},
        {"state": "AJAR", "failureCount": 0, "remaining": 0},
        {"state": [], "failureCount": 0, "remaining": 0},
        {"state": "OPEN", "failureCount": -1, "remaining": 0},
        {"state": "OPEN", "failureCount": "1", "remaining": 0},
        {"state": "OPEN", "failureCount": 1, "remaining": -1},
        {"state": "OPEN", "failureCount": 1, "remaining": math.nan},
        {"state": "OPEN", "failureCount": 1, "remaining": "soon"},
    ],
    ids=range(8),
)
def test_what_is_no_snapshot_is_ignored_and_said(
    saved: Mapping[str, object], clock: SkippingClock, caplog: pytest.LogCaptureFixture
) -> None:
    """A breaker alone refuses it; a registry logs it, and the process starts."""
    breaker = CircuitBreaker(name="redis", clock=clock)
    with pytest.raises(ValueError, match="not a snapshot of a circuit breaker"):
        breaker.restore(saved)
    registry = BreakerRegistry()
    registry.add(breaker)
    registry.restore({"redis": saved, "database": "nonsense"})
    assert breaker.get_state() == {"state": "CLOSED", "failureCount": 0}
    assert caplog.messages == ["Saved circuit state ignored"] * 2
    assert [getattr(record, "circuit", None) for record in caplog.records] == ["redis", "database"]


async def test_a_breaker_held_open_by_hand_stays_so_until_closed(clock: SkippingClock) -> None:
    """However long it takes, and through a restart; its rejection promises no time."""
    breaker = CircuitBreaker(name="redis", clock=clock)
    breaker.open()
    clock.block(1e6)
    with pytest.raises(CircuitOpenError) as rejected:
        await breaker.execute(Scripted(None))
    assert str(rejected.value) == "circuit redis is open"
    saved = breaker.snapshot()
    assert saved == {"state": "OPEN", "failureCount": 0, "remaining": None}
    breaker.close()
    assert await breaker.execute(Scripted("fine")) == "fine"
    breaker.restore(saved)
    assert state_of(breaker) == "OPEN"
    breaker.reset()
    assert state_of(breaker) == "CLOSED"


def test_closing_by_hand_forgets_the_count(clock: SkippingClock) -> None:
    """And is no event where the state stays the same."""
    events: list[CircuitEvent] = []
    breaker = CircuitBreaker(2, listeners=(events.append,), clock=clock)
    with pytest.raises(BackendError), breaker.guard():
        raise BackendError
    breaker.reset()
    assert breaker.get_state() == {"state": "CLOSED", "failureCount": 0}
    assert events == []


def test_each_decorated_function_has_a_breaker_of_its_own(clock: SkippingClock) -> None:
    """Named after it, unless the decorator says otherwise."""
    decorate = circuit_breaker(1, clock=clock)
    broken, healthy = decorate(Scripted(BackendError()).sync), decorate(Scripted(1).sync)
    with pytest.raises(BackendError):
        broken()
    with pytest.raises(CircuitOpenError, match=r"circuit Scripted\.sync is open"):
        broken()
    assert healthy() == 1
    named = circuit_breaker(1, name="backend", clock=clock)(Scripted(BackendError()).sync)
    with pytest.raises(BackendError):
        named()
    with pytest.raises(CircuitOpenError, match="circuit backend is open"):
        named()


def test_a_rejection_travels_between_processes() -> None:
    """It is pickled and rebuilt with everything it says."""
    error = pickle.loads(pickle.dumps(CircuitOpenError("redis", "get", 4.0)))  # noqa: S301 - our own
    assert (error.circuit, error.operation, error.retry_after) == ("redis", "get", 4.0)
    assert str(error) == "get rejected: circuit redis is open, next try in 4.0 s"


def test_threads_share_a_breaker(clock: SkippingClock) -> None:
    """Of many threads that meet a half-open circuit, one probes; no failure is lost."""
    breaker = CircuitBreaker(8, 60.0, clock=clock)
    start, entered, leave = threading.Barrier(8), list[int](), threading.Event()

    def fail() -> None:
        start.wait()
        with pytest.raises(BackendError), breaker.guard():
            raise BackendError

    def probe(number: int) -> None:
        start.wait()
        try:
            with breaker.guard():
                entered.append(number)
                leave.wait(5)
        except CircuitOpenError:
            rejected.release()

    rejected = threading.Semaphore(0)
    for target in ([fail] * 8, [lambda n=n: probe(n) for n in range(8)]):
        threads = [threading.Thread(target=run) for run in target]
        for thread in threads:
            thread.start()
        if target[0] is not fail:
            for _ in range(7):
                assert rejected.acquire(timeout=5)
            assert len(entered) == 1
            leave.set()
        for thread in threads:
            thread.join()
        if target[0] is fail:
            assert breaker.get_state() == {"state": "OPEN", "failureCount": 8}
            clock.block(60.0)
    assert state_of(breaker) == "CLOSED"


def test_an_open_period_that_is_over_has_nothing_remaining(clock: SkippingClock) -> None:
    """However long ago it ended."""
    breaker = tripped(clock)
    clock.block(100.0)
    over = {"state": "HALF_OPEN", "failureCount": 1, "remaining": 0.0}
    assert breaker.snapshot() == over
    breaker.restore(over)
    assert breaker.snapshot() == over


@pytest.mark.parametrize(
    "kind",
    [
        AttemptFailed,
        BudgetExhausted,
        BulkheadFull,
        CallRejected,
        FallbackUsed,
        GaveUp,
        RollingWindow,
        StateChanged,
    ],
)
def test_events_and_settings_are_values(kind: Any) -> None:
    """Nobody who gets one can change it for the next, or mix up its fields."""
    assert kind.__dataclass_params__.frozen
    assert kind.__slots__ == tuple(field.name for field in dataclasses.fields(kind))
    assert all(field.kw_only for field in dataclasses.fields(kind))
