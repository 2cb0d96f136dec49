"""The breaker registry: health check, manual control, saved and restored state."""

import dataclasses
import json
import math
import pickle
from collections.abc import Mapping
from typing import Any

import pytest
from tests.unit.resilience.scripted import BackendError, Scripted, SkippingClock, state_of

from viralfx.domain.health.circuits import BreakerRegistry
from viralfx.domain.health.model import HealthCheck, Observation, Status
from viralfx.resilience.breaker import (
    CallRejected,
    CircuitBreaker,
    CircuitEvent,
    CircuitOpenError,
    StateChanged,
    circuit_breaker,
)
from viralfx.resilience.breaker_states import CircuitState, RollingWindow
from viralfx.resilience.bulkhead import BulkheadFull
from viralfx.resilience.fallback import FallbackUsed
from viralfx.resilience.retry_decision import AttemptFailed, BudgetExhausted, GaveUp


@pytest.fixture
def clock() -> SkippingClock:
    """Return a clock that only the test moves."""
    return SkippingClock()


def tripped(clock: SkippingClock, name: str = "redis") -> CircuitBreaker:
    """Return a breaker that has just opened for 60 s."""
    breaker = CircuitBreaker(1, 60.0, name=name, clock=clock)
    with pytest.raises(BackendError), breaker.guard():
        raise BackendError
    return breaker


async def test_the_circuits_check_warns_while_one_is_open(clock: SkippingClock) -> None:
    """The message names the circuit; a half-open one passes."""
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


def test_breaker_names_are_unique(clock: SkippingClock) -> None:
    """A breaker can be found by its name."""
    registry = BreakerRegistry()
    breaker = registry.add(CircuitBreaker(name="redis", clock=clock))
    assert registry["redis"] is breaker
    assert list(registry) == [breaker]
    assert len(registry) == 1
    with pytest.raises(ValueError, match="'redis' is registered already"):
        registry.add(CircuitBreaker(name="redis"))
    with pytest.raises(KeyError):
        registry["other"]


def test_a_listener_gets_events_of_later_breakers(clock: SkippingClock) -> None:
    """One subscription covers the process."""
    registry, events = BreakerRegistry(), list[CircuitEvent]()
    registry.add(CircuitBreaker(name="early", clock=clock))
    registry.subscribe(events.append)
    registry.add(CircuitBreaker(name="late", clock=clock))
    for breaker in registry:
        breaker.open()
    assert [event.name for event in events] == ["early", "late"]


def test_an_open_breaker_stays_open_for_its_remaining_time(clock: SkippingClock) -> None:
    """Over a restart, with a state that is plain JSON."""
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


def test_restored_states_without_a_breaker_are_saved_again(clock: SkippingClock) -> None:
    """Two restarts in a row lose nothing; a breaker's own state replaces the saved one."""
    registry = BreakerRegistry()
    saved = {"redis": {"state": "OPEN", "failureCount": 1, "remaining": 42.0}}
    registry.restore(saved)
    assert registry.snapshot() == saved
    registry.add(CircuitBreaker(name="redis", clock=clock)).close()
    closed = {"redis": {"state": "CLOSED", "failureCount": 0, "remaining": 0.0}}
    assert registry.snapshot() == closed


def test_a_running_breaker_can_be_restored(clock: SkippingClock) -> None:
    """Listeners get the change."""
    registry, events = BreakerRegistry(), list[CircuitEvent]()
    registry.subscribe(events.append)
    registry.add(CircuitBreaker(name="redis", clock=clock))
    registry.restore({"redis": {"state": "OPEN", "failureCount": 7, "remaining": 5}})
    opened = StateChanged(
        name="redis", old=CircuitState.CLOSED, new=CircuitState.OPEN, failure_count=7
    )
    assert events == [opened]


def test_no_restored_breaker_is_open_longer_than_configured(clock: SkippingClock) -> None:
    """Even if the saved state has a longer period."""
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
def test_an_invalid_snapshot_is_logged_and_ignored(
    saved: Mapping[str, object], clock: SkippingClock, caplog: pytest.LogCaptureFixture
) -> None:
    """A breaker rejects it; a registry logs it, and the process starts."""
    breaker = CircuitBreaker(name="redis", clock=clock)
    with pytest.raises(ValueError, match="not a snapshot of a circuit breaker"):
        breaker.restore(saved)
    registry = BreakerRegistry()
    registry.add(breaker)
    registry.restore({"redis": saved, "database": "nonsense"})
    assert breaker.get_state() == {"state": "CLOSED", "failureCount": 0}
    assert caplog.messages == ["Saved circuit state ignored"] * 2
    assert [getattr(record, "circuit", None) for record in caplog.records] == ["redis", "database"]


async def test_a_manually_opened_breaker_stays_open_until_closed(clock: SkippingClock) -> None:
    """Also over a restart; its rejection has no time."""
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


def test_closing_manually_resets_the_count(clock: SkippingClock) -> None:
    """There is no event if the state does not change."""
    events: list[CircuitEvent] = []
    breaker = CircuitBreaker(2, listeners=(events.append,), clock=clock)
    with pytest.raises(BackendError), breaker.guard():
        raise BackendError
    breaker.reset()
    assert breaker.get_state() == {"state": "CLOSED", "failureCount": 0}
    assert events == []


def test_each_decorated_function_has_a_breaker_of_its_own(clock: SkippingClock) -> None:
    """It has the name of the function, unless the decorator gives another."""
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


def test_a_rejection_can_be_pickled() -> None:
    """It keeps all its attributes."""
    error = pickle.loads(pickle.dumps(CircuitOpenError("redis", "get", 4.0)))  # noqa: S301 - our own
    assert (error.circuit, error.operation, error.retry_after) == ("redis", "get", 4.0)
    assert str(error) == "get rejected: circuit redis is open, next try in 4.0 s"


def test_nothing_remains_of_an_ended_open_period(clock: SkippingClock) -> None:
    """Even long after its end."""
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
def test_events_and_settings_are_immutable(kind: Any) -> None:
    """Their fields are keyword-only."""
    assert kind.__dataclass_params__.frozen
    assert kind.__slots__ == tuple(field.name for field in dataclasses.fields(kind))
    assert all(field.kw_only for field in dataclasses.fields(kind))
