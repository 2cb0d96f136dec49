"""An assembly with all metrics, and their descriptions."""

from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client import ProcessCollector
from prometheus_client.core import Metric
from prometheus_client.metrics import MetricWrapperBase

from viralfx.bootstrap import Assembly, assemble
from viralfx.resilience.breaker import CircuitBreaker
from viralfx.resilience.policy import RetryBudget
from viralfx.resilience.retry import retry
from viralfx.settings import read_settings


@dataclass(frozen=True, order=True)
class Described:
    """One metric with its query name."""

    name: str
    type: str
    labels: tuple[str, ...]
    meaning: str

    @property
    def series(self) -> frozenset[str]:
        """The names of its series."""
        if self.type == "histogram":
            return frozenset(f"{self.name}_{part}" for part in ("bucket", "sum", "count"))
        return frozenset({self.name})

    @property
    def series_labels(self) -> frozenset[str]:
        """Return the labels of its series, without those that a scrape adds."""
        return frozenset(self.labels) | ({"le"} if self.type == "histogram" else set())


def wired() -> Assembly:
    """Wire all metrics without connecting to any server."""
    settings = read_settings({"DATABASE_URL": "postgresql://u:p@localhost/d", "REDIS_HOST": "r"})
    return assemble(
        settings,
        breakers=[CircuitBreaker(name="users")],
        retriers=[retry(name="users", budget=RetryBudget())],
    )


def described(assembly: Assembly) -> list[Described]:
    """Return every metric, sorted by name."""
    return sorted(_described(assembly))


def _described(assembly: Assembly) -> Iterator[Described]:
    registry = assembly.metrics.registry
    for collector in tuple(registry._collector_to_names):
        if isinstance(collector, ProcessCollector):
            yield from (_of(metric, ()) for metric in collector.collect())
        elif isinstance(collector, MetricWrapperBase):
            (metric,) = collector.describe()
            yield _of(metric, tuple(collector._labelnames))
        else:
            for metric in collector.describe():  # type: ignore[attr-defined]  # all collectors of this project have it
                yield _of(metric, tuple(metric._labelnames))


def _of(metric: Metric, labels: tuple[str, ...]) -> Described:
    name = f"{metric.name}_total" if metric.type == "counter" else metric.name
    return Described(name, metric.type, labels, metric.documentation)
