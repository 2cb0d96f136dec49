"""Tests of the metrics of the pool, of Redis, and of the duration of operations."""

from dataclasses import dataclass

import pytest
from prometheus_client import CollectorRegistry
from tests.unit.metrics.reading import series, value

from viralfx.adapters.redis.client import MemoryUse
from viralfx.telemetry.metrics.backends import (
    OperationMetrics,
    PoolMetrics,
    RedisMetrics,
    VacuumMetrics,
)

DURATION = "db_client_operation_duration_seconds_count"


@dataclass
class Numbers:
    """The counters of a pool and of a Redis client."""

    total_connections: int = 5
    idle_connections: int = 2
    waiting: int = 4
    failed_connections: int = 6
    slow_queries: int = 7
    oldest_transaction: float = 1.5
    dead_job_rows: int = 9
    successful: int = 30
    failed: int = 3


@pytest.fixture
def registry() -> CollectorRegistry:
    """Return an empty registry."""
    return CollectorRegistry()


def test_the_pool_is_read_at_each_scrape(registry: CollectorRegistry) -> None:
    """The metrics show open connections by state, their maximum, and waiting callers."""
    pool = Numbers()
    registry.register(PoolMetrics(pool, 10))

    assert value(registry, "viralfx_database_pool_connections", state="active") == 3
    assert value(registry, "viralfx_database_pool_connections", state="idle") == 2
    assert value(registry, "viralfx_database_pool_connections_max") == 10
    assert value(registry, "viralfx_database_pool_waiting_requests") == 4
    assert value(registry, "viralfx_database_connection_failures_total") == 6
    assert value(registry, "viralfx_database_slow_queries_total") == 7
    pool.idle_connections = 5
    assert value(registry, "viralfx_database_pool_connections", state="active") == 0


def test_the_vacuum_is_read_at_each_scrape(registry: CollectorRegistry) -> None:
    """Without a report there is no sample, which would hide those of other instances."""
    reports: list[Numbers | None] = [Numbers(), None]
    registry.register(VacuumMetrics(lambda: reports[0]))
    names = ("viralfx_database_oldest_transaction_seconds", "viralfx_database_dead_job_rows")

    assert [value(registry, name) for name in names] == [1.5, 9]
    reports.pop(0)
    assert [registry.get_sample_value(name) for name in names] == [None, None]


@pytest.mark.parametrize(
    ("memory", "used", "limit"),
    [
        (None, None, None),
        (MemoryUse(used=100, limit=None), 100, None),
        (MemoryUse(used=100, limit=1000), 100, 1000),
    ],
)
def test_redis_is_read_at_each_scrape(
    registry: CollectorRegistry, memory: MemoryUse | None, used: int | None, limit: int | None
) -> None:
    """The metrics show availability, requests, and memory if Redis reported it."""
    registry.register(RedisMetrics(Numbers(), available=lambda: True, memory=lambda: memory))

    assert value(registry, "viralfx_redis_connected") == 1
    assert value(registry, "viralfx_redis_requests_total") == 30
    assert value(registry, "viralfx_redis_failed_requests_total") == 3
    assert value(registry, "viralfx_redis_memory_used_bytes") == used
    assert value(registry, "viralfx_redis_memory_limit_bytes") == limit


def test_an_unavailable_redis_is_zero(registry: CollectorRegistry) -> None:
    """An alert compares the value with zero."""
    registry.register(RedisMetrics(Numbers(), available=lambda: False, memory=lambda: None))

    assert value(registry, "viralfx_redis_connected") == 0


def test_names_are_registered_before_the_first_scrape(registry: CollectorRegistry) -> None:
    """A duplicate collector is rejected when it is wired, not at a scrape."""
    registry.register(PoolMetrics(Numbers(), 10))

    with pytest.raises(ValueError, match="viralfx_database_pool_connections"):
        registry.register(PoolMetrics(Numbers(), 10))


def test_operations_are_timed_by_system_and_name(registry: CollectorRegistry) -> None:
    """Errors are counted separately, by type."""
    times = OperationMetrics(registry)
    times.observe("postgresql", "SELECT", 0.02, None)
    times.observe("postgresql", "SELECT", 0.02, TimeoutError("hunter2"))
    times.observe("redis", "GET", 0.001, None)
    select = {"db_system_name": "postgresql", "db_operation_name": "SELECT"}

    assert value(registry, DURATION, **select) == 2
    assert value(registry, DURATION, db_system_name="redis", db_operation_name="GET") == 1
    errors = {"db_system_name": "postgresql", "error_type": "TimeoutError"}
    assert value(registry, "viralfx_db_client_errors_total", **errors) == 1


def test_names_of_operations_are_limited(registry: CollectorRegistry) -> None:
    """Only the first 64 names have their own series."""
    times = OperationMetrics(registry)
    for number in range(64):
        times.observe("redis", f"CMD{number}", 0.001, None)
    times.observe("redis", "CMD64", 0.001, None)
    before = series(registry)
    for number in range(10_000):
        times.observe("redis", f"CMD{number}", 0.001, None)

    assert series(registry) == before
    assert value(registry, DURATION, db_system_name="redis", db_operation_name="CMD63") == 2
    other = {"db_system_name": "redis", "db_operation_name": "_OTHER"}
    assert value(registry, DURATION, **other) == 1 + 10_000 - 64
