"""The four uses of retry and breaker in docs/operations.md, on a clock that skips waits."""

import pytest
from tests.unit.resilience.scripted import BackendError, Scripted, SkippingClock

from viralfx.resilience.breaker import CircuitBreaker, CircuitOpenError, circuit_breaker
from viralfx.resilience.fallback import with_fallback
from viralfx.resilience.policy import BackoffPolicy
from viralfx.resilience.retry import Retrier, retry


async def test_automatic_retry_decorator() -> None:
    """Example 1: ``@Retry(3, 1000)``, at once, after one second, after two."""
    clock = SkippingClock()
    http = Scripted(BackendError(), BackendError(), {"id": "42"})

    class ExternalApiService:
        @retry(attempts=3, base_delay=1.0, clock=clock)
        async def fetch_user_data(self, user_id: str) -> object:
            assert user_id == "42"
            return await http()

    assert await ExternalApiService().fetch_user_data("42") == {"id": "42"}
    assert clock.slept == [1.0, 2.0]


async def test_circuit_breaker_decorator() -> None:
    """Example 2, option 1: rejected after five failures, half open after 60 s."""
    clock = SkippingClock()
    dependency = Scripted(*[BackendError()] * 5, "fine")

    @circuit_breaker(5, 60.0, clock=clock)
    async def critical_operation() -> object:
        return await dependency()

    for _ in range(5):
        with pytest.raises(BackendError):
            await critical_operation()
    with pytest.raises(CircuitOpenError):
        await critical_operation()
    assert dependency.calls == 5
    await clock.advance(60.0)
    assert await critical_operation() == "fine"


async def test_circuit_breaker_directly() -> None:
    """Example 2, option 2: execute with a name, and read the state."""
    breaker = CircuitBreaker(5, 60.0)
    external_service = Scripted("data")
    assert await breaker.execute(external_service, "ExternalService.getData") == "data"
    assert breaker.get_state() == {"state": "CLOSED", "failureCount": 0}


async def test_database_operations_with_retry() -> None:
    """Example 3: a policy of the technology that retries connection errors only."""
    clock = SkippingClock()
    database = Retrier(BackoffPolicy(attempts=3, retry_on=ConnectionError), clock=clock)
    query = Scripted(ConnectionResetError(), ["user"])
    assert await database.execute(query) == ["user"]
    with pytest.raises(ValueError, match="syntax"):
        await database.execute(Scripted(ValueError("syntax")))
    assert clock.slept == [1.0]


async def test_redis_operations_with_graceful_degradation() -> None:
    """Example 4: the fallback value when Redis is down."""
    redis = Scripted(ConnectionError(), "cached")
    assert await with_fallback(redis, None, on=ConnectionError) is None
    assert await with_fallback(redis, None, on=ConnectionError) == "cached"
