"""Metrics of the database pool, of Redis, and of the duration of their operations."""

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from viralfx.telemetry.metrics.series import BoundedNames, Exemplar, no_exemplar

# The bounds that OpenTelemetry's semantic conventions recommend for this metric.
_BUCKETS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10)


class Pool(Protocol):
    """A pool of connections to the database, with its counters."""

    @property
    def total_connections(self) -> int:
        """Open connections."""
        ...

    @property
    def idle_connections(self) -> int:
        """Open connections that are not in use."""
        ...

    @property
    def waiting(self) -> int:
        """Callers that wait for a connection."""
        ...

    @property
    def failed_connections(self) -> int:
        """Attempts to connect that failed, since the start."""
        ...

    @property
    def slow_queries(self) -> int:
        """Slow queries since the start."""
        ...


class Traffic(Protocol):
    """Counters of the requests to Redis."""

    @property
    def successful(self) -> int:
        """Requests that Redis answered, since the start."""
        ...

    @property
    def failed(self) -> int:
        """Requests that failed after their retries, since the start."""
        ...


class OperationMetrics:
    """Duration of database operations, named after OpenTelemetry's semantic conventions."""

    def __init__(self, registry: CollectorRegistry, exemplar: Exemplar = no_exemplar) -> None:
        self._exemplar = exemplar
        self._duration = Histogram(
            "db_client_operation_duration_seconds",
            "Time from sending a statement or command to its result or error.",
            ("db_system_name", "db_operation_name"),
            buckets=_BUCKETS,
            registry=registry,
        )
        self._errors = Counter(
            "viralfx_db_client_errors_total",
            "Statements and commands that ended with an error.",
            ("db_system_name", "error_type"),
            registry=registry,
        )
        self._names = BoundedNames()
        # A cache, because the library's lookup by labels takes longer than the rest.
        self._series: dict[tuple[str, str], Histogram] = {}

    def observe(
        self, system: str, operation: str, seconds: float, error: BaseException | None
    ) -> None:
        """Record an operation: ``system`` as ``postgresql``, ``operation`` as ``SELECT``."""
        series = self._series.get((system, operation))
        if series is None:
            # Code that generates names of operations could create any number of them.
            name = self._names(operation)
            series = self._duration.labels(system, name)
            if name == operation:
                self._series[system, operation] = series
        series.observe(seconds, self._exemplar())
        if error is not None:
            self._errors.labels(system, type(error).__name__).inc()


class PoolMetrics(Collector):
    """The state of the database pool, read at each scrape."""

    def __init__(self, pool: Pool, max_connections: int) -> None:
        """``max_connections`` is the size limit of the pool."""
        self._pool = pool
        self._max_connections = max_connections

    def describe(self) -> Iterable[Metric]:
        """Return the metrics without samples."""
        return (*self._families().values(), _counter(*_FAILURES), _counter(*_SLOW))

    def collect(self) -> Iterator[Metric]:
        """Read the pool."""
        pool, families = self._pool, self._families()
        idle = pool.idle_connections
        families["connections"].add_metric(["idle"], idle)
        families["connections"].add_metric(["active"], pool.total_connections - idle)
        families["connections_max"].add_metric([], self._max_connections)
        families["waiting_requests"].add_metric([], pool.waiting)
        yield from families.values()
        yield _counter(*_FAILURES, pool.failed_connections)
        yield _counter(*_SLOW, pool.slow_queries)

    @staticmethod
    def _families() -> dict[str, GaugeMetricFamily]:
        return {
            name: GaugeMetricFamily(f"viralfx_database_pool_{name}", text, labels=labels)
            for name, text, labels in (
                ("connections", "Open connections of the pool.", ["state"]),
                ("connections_max", "Maximum number of connections, DB_POOL_MAX.", []),
                ("waiting_requests", "Callers that wait for a connection of the pool.", []),
            )
        }


class Vacuum(Protocol):
    """Transactions and dead rows of the database, as its statistics report them."""

    @property
    def oldest_transaction(self) -> float:
        """Seconds for which the oldest transaction has been open."""
        ...

    @property
    def dead_job_rows(self) -> int:
        """Dead rows in the table of unfinished jobs."""
        ...


class VacuumMetrics(Collector):
    """Causes of slow claims, from the last health check: a scrape does not query the database."""

    def __init__(self, vacuum: Callable[[], Vacuum | None]) -> None:
        """``vacuum`` returns the last report of the database; None if there is none."""
        self._vacuum = vacuum

    def describe(self) -> Iterable[Metric]:
        """Return the metrics without samples."""
        return self._gauges()

    def collect(self) -> Iterator[Metric]:
        """Return the last report."""
        transaction, rows = gauges = self._gauges()
        if (vacuum := self._vacuum()) is not None:
            transaction.add_metric([], vacuum.oldest_transaction)
            rows.add_metric([], vacuum.dead_job_rows)
        yield from gauges

    @staticmethod
    def _gauges() -> tuple[GaugeMetricFamily, GaugeMetricFamily]:
        return (
            GaugeMetricFamily(
                "viralfx_database_oldest_transaction_seconds",
                "Time for which the oldest transaction of the database has been open.",
            ),
            GaugeMetricFamily(
                "viralfx_database_dead_job_rows",
                "Dead rows in the table of unfinished jobs, not yet vacuumed.",
            ),
        )


class MemoryUse(Protocol):
    """The memory of Redis as reported by the server, in bytes."""

    @property
    def used(self) -> int:
        """Used memory."""
        ...

    @property
    def limit(self) -> int | None:
        """The server's ``maxmemory``; None if it is unlimited."""
        ...


class RedisMetrics(Collector):
    """Redis from the client's point of view, read at each scrape."""

    def __init__(
        self,
        traffic: Traffic,
        *,
        available: Callable[[], bool],
        memory: Callable[[], MemoryUse | None],
    ) -> None:
        """``memory`` returns the last report of Redis; None if there is none."""
        self._traffic = traffic
        self._available = available
        self._memory = memory

    def describe(self) -> Iterable[Metric]:
        """Return the metrics without samples."""
        return (*self._gauges().values(), _counter(*_ANSWERED), _counter(*_FAILED))

    def collect(self) -> Iterator[Metric]:
        """Read the client."""
        gauges = self._gauges()
        gauges["connected"].add_metric([], float(self._available()))
        if (memory := self._memory()) is not None:
            gauges["memory_used_bytes"].add_metric([], memory.used)
            if memory.limit is not None:
                gauges["memory_limit_bytes"].add_metric([], memory.limit)
        yield from gauges.values()
        yield _counter(*_ANSWERED, self._traffic.successful)
        yield _counter(*_FAILED, self._traffic.failed)

    @staticmethod
    def _gauges() -> dict[str, GaugeMetricFamily]:
        return {
            name: GaugeMetricFamily(f"viralfx_redis_{name}", text)
            for name, text in (
                ("connected", "1 if Redis answers, else 0."),
                ("memory_used_bytes", "Memory in use, as reported by Redis."),
                ("memory_limit_bytes", "The maxmemory of Redis, if it is set."),
            )
        }


_FAILURES = (
    "viralfx_database_connection_failures",
    "Failed attempts to connect to the database.",
)
_SLOW = (
    "viralfx_database_slow_queries",
    "Queries that took longer than DB_SLOW_QUERY_THRESHOLD.",
)
_ANSWERED = ("viralfx_redis_requests", "Requests that Redis answered.")
_FAILED = ("viralfx_redis_failed_requests", "Requests to Redis that failed after their retries.")


def _counter(name: str, text: str, value: int = 0) -> CounterMetricFamily:
    family = CounterMetricFamily(name, text)
    family.add_metric([], value)
    return family
