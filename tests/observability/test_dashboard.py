"""Every panel of the dashboard shows data: a real Prometheus scrapes a service with faults."""

import math
import time
from collections.abc import Iterator

import pytest
from tests.observability.dashboards import Target, targets
from tests.observability.scene import Scene, scene
from tests.servers.fixtures import or_skip
from tests.servers.prometheus import Series

# The first test may download Prometheus, and all wait for scrapes.
pytestmark = pytest.mark.timeout(600)

MAX_ATTEMPTS = 3
"""On a busy machine a fault may end before a scrape sees it; then all faults are repeated."""


class Seen:
    """The results of the dashboard's queries."""

    def __init__(self, on: Scene) -> None:
        self._on = on
        self._began = time.time()
        self.series: dict[Target, list[Series]] = {}

    def ask(self, query: str) -> list[Series]:
        """Run all queries for the time since the start."""
        prometheus = self._on.prometheus
        return prometheus.range(query, begin=self._began, end=time.time(), step=prometheus.seconds)

    def query(self, target: Target) -> str:
        """Return the query as Grafana builds it."""
        return target.query(scraped=self._on.prometheus.seconds)

    def retry_empty(self) -> list[str]:
        """Repeat the queries without data; return those that still have none."""
        for target in targets():
            if not moved(self.series.get(target, [])):
                self.series[target] = self.ask(self.query(target))
        return [str(target) for target, series in self.series.items() if not moved(series)]


def moved(series: list[Series]) -> bool:
    """Return whether a sample is above zero."""
    return any(math.isfinite(value) and value > 0 for each in series for value in each.values)


@pytest.fixture(scope="module")
def seen() -> Iterator[Seen]:
    """Return the dashboard's data after all faults."""
    with or_skip(), scene() as on:
        found = Seen(on)
        for _ in range(MAX_ATTEMPTS):
            on.act()
            if not found.retry_empty():
                break
        yield found


@pytest.mark.parametrize("target", targets(), ids=str)
def test_a_query_returns_samples(seen: Seen, target: Target) -> None:
    """A sample is above zero, and each series has a legend."""
    series = seen.series[target]

    assert series, "no data"
    assert moved(series), [each.values for each in series]
    names = [target.name(each.labels) for each in series]
    assert all(name.strip() for name in names)
    assert len(set(names)) == len(names), "two series have the same name"


@pytest.mark.parametrize("code", ["4..", "5.."])
def test_no_errors_are_a_line_at_zero(seen: Seen, code: str) -> None:
    """A panel without data would be ambiguous."""
    (target,) = [t for t in targets() if t.panel == "Errors" and code in t.expression]
    (series,) = seen.ask(seen.query(target).replace(code, "nothing"))

    assert set(series.values) == {0.0}


def test_blocking_reads_of_redis_are_not_slow_commands(seen: Seen) -> None:
    """Workers wait for their streams for seconds with a blocking command."""
    (waiting,) = seen.ask(
        'sum(db_client_operation_duration_seconds_sum{db_operation_name="XREADGROUP"})'
    )
    (shown,) = (
        series
        for target, (series, *_) in seen.series.items()
        if target.panel == "Redis request time" and target.legend == "p99"
    )

    assert max(waiting.values) > 5
    assert min(value for value in shown.values if math.isfinite(value)) < 0.5
