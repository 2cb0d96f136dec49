"""Every panel of the dashboard shows something: a real Prometheus scrapes a service in trouble."""

import math
import time
from collections.abc import Iterator

import pytest
from tests.observability.dashboards import Target, targets
from tests.observability.scene import Scene, scene
from tests.servers.fixtures import or_skip
from tests.servers.prometheus import Series

# It may have to fetch Prometheus, and waits for scrapes.
pytestmark = pytest.mark.timeout(600)

MOST_TIMES = 3
"""On a busy machine something may be over before it is scraped; then all of it happens again."""


class Seen:
    """What the queries of the dashboard returned."""

    def __init__(self, on: Scene) -> None:
        self._on = on
        self._began = time.time()
        self.series: dict[Target, list[Series]] = {}

    def ask(self, query: str) -> list[Series]:
        """Ask for everything since the beginning."""
        prometheus = self._on.prometheus
        return prometheus.range(query, begin=self._began, end=time.time(), step=prometheus.seconds)

    def query(self, target: Target) -> str:
        """Return what Grafana makes of a query."""
        return target.query(scraped=self._on.prometheus.seconds)

    def look(self) -> list[str]:
        """Ask again what had nothing to show yet; return what still has not."""
        for target in targets():
            if not moved(self.series.get(target, [])):
                self.series[target] = self.ask(self.query(target))
        return [str(target) for target, series in self.series.items() if not moved(series)]


def moved(series: list[Series]) -> bool:
    """Tell whether there is a sample that is a number above zero."""
    return any(math.isfinite(value) and value > 0 for each in series for value in each.values)


@pytest.fixture(scope="module")
def seen() -> Iterator[Seen]:
    """Return what the dashboard shows, after everything happened."""
    with or_skip(), scene() as on:
        found = Seen(on)
        for _ in range(MOST_TIMES):
            on.act()
            if not found.look():
                break
        yield found


@pytest.mark.parametrize("target", targets(), ids=str)
def test_a_query_returns_samples(seen: Seen, target: Target) -> None:
    """With a number above zero among them, and a name for each series."""
    series = seen.series[target]

    assert series, "no data"
    assert moved(series), [each.values for each in series]
    names = [target.name(each.labels) for each in series]
    assert all(name.strip() for name in names)
    assert len(set(names)) == len(names), "two series have the same name"


@pytest.mark.parametrize("code", ["4..", "5.."])
def test_no_errors_are_a_line_at_zero(seen: Seen, code: str) -> None:
    """And not a panel without data, which could mean anything."""
    (target,) = [t for t in targets() if t.panel == "Errors" and code in t.expression]
    (series,) = seen.ask(seen.query(target).replace(code, "nothing"))

    assert set(series.values) == {0.0}


def test_what_waits_for_redis_is_no_slow_command(seen: Seen) -> None:
    """Workers wait for their streams for seconds, by a command that they are not slow by."""
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
