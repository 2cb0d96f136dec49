"""Tests of the metrics of circuit breakers."""

import pytest
from prometheus_client import CollectorRegistry
from tests.manual_clock import ManualClock
from tests.unit.metrics.reading import series, value

from viralfx.domain.health.circuits import BreakerRegistry
from viralfx.resilience.breaker import CircuitBreaker, CircuitOpenError
from viralfx.telemetry.metrics.health import CircuitMetrics, WebhookCircuitMetrics


async def fail() -> None:
    """Fail."""
    raise ConnectionError


async def break_open(breaker: CircuitBreaker) -> None:
    """Open a circuit by its first failure and have a call rejected."""
    with pytest.raises(ConnectionError):
        await breaker.execute(fail)
    with pytest.raises(CircuitOpenError):
        await breaker.execute(fail)


async def test_state_and_changes_of_a_circuit_are_exposed(clock: ManualClock) -> None:
    """Breakers that are registered later are included."""
    registry, breakers = CollectorRegistry(), BreakerRegistry()
    CircuitMetrics(registry, breakers)
    breaker = breakers.add(CircuitBreaker(1, 60.0, name="users", clock=clock))
    closed = value(registry, "viralfx_circuit_state", circuit="users", state="CLOSED")
    await break_open(breaker)
    states = {
        state: value(registry, "viralfx_circuit_state", circuit="users", state=state)
        for state in ("CLOSED", "OPEN", "HALF_OPEN")
    }

    assert closed == 1
    assert states == {"CLOSED": 0, "OPEN": 1, "HALF_OPEN": 0}
    assert value(registry, "viralfx_circuit_changes_total", circuit="users", state="OPEN") == 1
    assert value(registry, "viralfx_circuit_rejected_calls_total", circuit="users") == 1


async def test_webhook_receivers_are_not_a_label(clock: ManualClock) -> None:
    """Jobs determine the hosts, so their number is unlimited."""
    registry = CollectorRegistry()
    listener = WebhookCircuitMetrics(registry)
    before = series(registry)
    for number in range(1000):
        name = f"host{number}.example"
        await break_open(CircuitBreaker(1, 60.0, name=name, listeners=(listener,), clock=clock))

    assert series(registry) == before
    assert value(registry, "viralfx_webhook_circuit_changes_total", state="OPEN") == 1000
    assert value(registry, "viralfx_webhook_rejected_calls_total") == 1000
