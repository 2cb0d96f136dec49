"""The database's pool, Redis, and how long both take to answer."""

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from viralfx.telemetry.metrics.exemplars import Exemplar, no_exemplar
from viralfx.telemetry.metrics.names import BoundedNames

# The bounds that OpenTelemetry's semantic conventions advise for this very metric.
_BUCKETS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10)


class Pool(Protocol):
    """A pool of connections to the database, with its counters."""

    @property
    def total_connections(self) -> int:
        """Connections that are open."""
        ...

    @property
    def idle_connections(self) -> int:
        """Those of them that wait to be used."""
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
    """What became of the requests to Redis."""

    @property
    def successful(self) -> int:
        """Requests that were answered, since the start."""
        ...

    @property
    def failed(self) -> int:
        """Those that were given up."""
        ...


class OperationTimes:
    """How long databases take, under the name of OpenTelemetry's semantic conventions."""

    def __init__(self, registry: CollectorRegistry, exemplar: Exemplar = no_exemplar) -> None:
        self._exemplar = exemplar
        self._duration = Histogram(
            "db_client_operation_duration_seconds",
            "Time from a statement's or command's sending to its answer or error.",
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
        # A look-up by labels takes longer than all the rest.
        self._series: dict[tuple[str, str], Histogram] = {}

    def observe(
        self, system: str, operation: str, seconds: float, error: BaseException | None
    ) -> None:
        """Count one, by its ``system`` (``postgresql``, ``redis``) and what it did (``SELECT``)."""
        series = self._series.get((system, operation))
        if series is None:
            # Code that makes names of operations has no end of them.
            name = self._names(operation)
            series = self._duration.labels(system, name)
            if name == operation:
                self._series[system, operation] = series
        series.observe(seconds, self._exemplar())
        if error is not None:
            self._errors.labels(system, type(error).__name__).inc()


class PoolMetrics(Collector):
    """The database's pool, read when somebody asks."""

    def __init__(self, pool: Pool, most: int) -> None:
        """``most`` is how many connections the pool may have."""
        self._pool = pool
        self._most = most

    def describe(self) -> Iterable[Metric]:
        """Name what there is, without looking at the pool."""
        return (*self._families().values(), _counter(*_FAILURES), _counter(*_SLOW))

    def collect(self) -> Iterator[Metric]:
        """Look at the pool."""
        pool, families = self._pool, self._families()
        idle = pool.idle_connections
        families["connections"].add_metric(["idle"], idle)
        families["connections"].add_metric(["active"], pool.total_connections - idle)
        families["connections_max"].add_metric([], self._most)
        families["waiting_requests"].add_metric([], pool.waiting)
        yield from families.values()
        yield _counter(*_FAILURES, pool.failed_connections)
        yield _counter(*_SLOW, pool.slow_queries)

    @staticmethod
    def _families() -> dict[str, GaugeMetricFamily]:
        return {
            name: GaugeMetricFamily(f"viralfx_database_pool_{name}", text, labels=labels)
            for name, text, labels in (
                ("connections", "Connections of the pool that are open.", ["state"]),
                ("connections_max", "Connections that the pool may have: DB_POOL_MAX.", []),
                ("waiting_requests", "Callers that wait for a connection of the pool.", []),
            )
        }


class MemoryUse(Protocol):
    """What Redis said about its memory, in bytes."""

    @property
    def used(self) -> int:
        """What it uses."""
        ...

    @property
    def limit(self) -> int | None:
        """What it may use; None: it has no limit of its own."""
        ...


class RedisMetrics(Collector):
    """Redis as its client sees it, read when somebody asks."""

    def __init__(
        self,
        traffic: Traffic,
        *,
        available: Callable[[], bool],
        memory: Callable[[], MemoryUse | None],
    ) -> None:
        """``memory`` returns what Redis said last, None where it did not say."""
        self._traffic = traffic
        self._available = available
        self._memory = memory

    def describe(self) -> Iterable[Metric]:
        """Name what there is, without looking at the client."""
        return (*self._gauges().values(), _counter(*_ANSWERED), _counter(*_FAILED))

    def collect(self) -> Iterator[Metric]:
        """Look at the client."""
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
                ("connected", "Whether Redis answers."),
                ("memory_used_bytes", "Memory that Redis uses, as it says itself."),
                (
                    "memory_limit_bytes",
                    "Memory that Redis may use, where it has a maxmemory.",
                ),
            )
        }


_FAILURES = (
    "viralfx_database_connection_failures",
    "Attempts to connect to the database that failed.",
)
_SLOW = (
    "viralfx_database_slow_queries",
    "Queries that took longer than DB_SLOW_QUERY_THRESHOLD.",
)
_ANSWERED = ("viralfx_redis_requests", "Requests to Redis that were answered.")
_FAILED = ("viralfx_redis_failed_requests", "Requests to Redis that were given up.")


def _counter(name: str, text: str, value: int = 0) -> CounterMetricFamily:
    family = CounterMetricFamily(name, text)
    family.add_metric([], value)
    return family
