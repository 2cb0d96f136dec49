"""Wires the metrics: what is counted, and what is read when somebody asks."""

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING

from viralfx.bootstrap.job_system import JobSystem
from viralfx.domain.operations import Operations
from viralfx.domain.resilience.retry import Retrier
from viralfx.telemetry.metrics import Metrics
from viralfx.telemetry.metrics.backends import OperationTimes, PoolMetrics, RedisMetrics
from viralfx.telemetry.metrics.health import HealthMetrics
from viralfx.telemetry.metrics.jobs import QueueMetrics
from viralfx.telemetry.metrics.resilience import CircuitMetrics
from viralfx.telemetry.metrics.retries import RetryMetrics

if TYPE_CHECKING:
    from viralfx.adapters.postgres import PostgresDatabase
    from viralfx.adapters.redis import RedisClient


def measure(
    metrics: Metrics,
    operations: Operations,
    jobs: JobSystem,
    retriers: Iterable[Retrier],
    *,
    database: "PostgresDatabase | None",
    redis: "RedisClient | None",
) -> None:
    """Have everything counted that was wired. ``retriers`` are an application's own."""
    registry = metrics.registry
    HealthMetrics(registry, operations)
    CircuitMetrics(registry, operations.breakers)
    retries = RetryMetrics(registry, operations.clock)
    for retrier in retriers:
        retries.add(retrier)
    # As old as what a check found may be, before it says nothing any more.
    oldest = operations.monitor.policy("queues").oldest_allowed
    registry.register(QueueMetrics(lambda: jobs.counts_within(oldest)))
    times = OperationTimes(registry, metrics.exemplar)
    if database is not None:
        registry.register(PoolMetrics(database, database.config.pool_max))
        database.queries.observe = partial(times.observe, "postgresql")
        database.retries.subscribe(retries)
    if redis is not None:
        registry.register(
            RedisMetrics(
                redis.traffic,
                available=lambda: redis.available,
                memory=lambda: redis.memory.answer if redis.available else None,
            )
        )
        redis.traffic.observe = partial(times.observe, "redis")
