"""Requests: what is counted under which labels, and what never becomes one."""

import tracemalloc

import pytest
from prometheus_client import CollectorRegistry
from tests.unit.metrics.reading import series, value

from viralfx.telemetry.metrics.requests import RequestMetrics

COUNT = "http_server_request_duration_seconds_count"
SUM = "http_server_request_duration_seconds_sum"


@pytest.fixture
def registry() -> CollectorRegistry:
    """Return an empty registry."""
    return CollectorRegistry()


def labels(method: str, route: str, status: str) -> dict[str, str]:
    """Return the labels of a request."""
    return {
        "http_request_method": method,
        "http_route": route,
        "http_response_status_code": status,
    }


def test_a_request_is_counted_by_method_route_and_status(registry: CollectorRegistry) -> None:
    """Rate, errors and durations of each can be told apart."""
    metrics = RequestMetrics(registry)
    metrics.observe("GET", "/users/{id}", 200, 0.25)
    metrics.observe("GET", "/users/{id}", 200, 0.5)
    metrics.observe("GET", "/users/{id}", 500, 1.0)

    assert value(registry, COUNT, **labels("GET", "/users/{id}", "200")) == 2
    assert value(registry, SUM, **labels("GET", "/users/{id}", "200")) == 0.75
    assert value(registry, COUNT, **labels("GET", "/users/{id}", "500")) == 1


def test_what_no_route_is_for_shares_one_label(registry: CollectorRegistry) -> None:
    """A scanner's paths are one series."""
    metrics = RequestMetrics(registry)
    for _ in range(3):
        metrics.observe("GET", None, 404, 0.001)

    assert value(registry, COUNT, **labels("GET", "unmatched", "404")) == 3


def test_a_request_without_an_answer_is_counted_apart(registry: CollectorRegistry) -> None:
    """It has no status, and its duration says nothing."""
    RequestMetrics(registry).observe("GET", "/", None, 3.0)

    assert value(registry, "viralfx_requests_cut_total") == 1
    assert value(registry, COUNT, **labels("GET", "/", "None")) is None


def test_what_is_under_way_is_asked_for_at_each_scrape(registry: CollectorRegistry) -> None:
    """Nothing is counted up and down beside what the gate knows."""
    metrics, under_way = RequestMetrics(registry), [1, 2]
    metrics.count_active(under_way.__len__)

    assert value(registry, "http_server_active_requests") == 2
    under_way.clear()
    assert value(registry, "http_server_active_requests") == 0


def test_ten_thousand_methods_are_one_series_and_no_memory(registry: CollectorRegistry) -> None:
    """Clients make methods up; what is known stays known beside them."""
    metrics = RequestMetrics(registry)
    metrics.observe("GET", "/", 200, 0.01)
    metrics.observe("X0", "/", 405, 0.01)
    before = series(registry)
    tracemalloc.start()
    try:
        began = tracemalloc.take_snapshot()
        for number in range(1, 10_001):
            metrics.observe(f"X{number}", "/", 405, 0.01)
        grown = sum(s.size_diff for s in tracemalloc.take_snapshot().compare_to(began, "filename"))
    finally:
        tracemalloc.stop()

    assert series(registry) == before
    assert value(registry, COUNT, **labels("_OTHER", "/", "405")) == 10_001
    assert grown < 200_000
