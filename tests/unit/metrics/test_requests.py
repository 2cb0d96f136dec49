"""Tests of the labels and values of request metrics."""

import pytest
from prometheus_client import CollectorRegistry
from tests.unit.metrics.reading import value

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
    """Rate, errors and durations are available for each combination."""
    metrics = RequestMetrics(registry)
    metrics.observe("GET", "/users/{id}", 200, 0.25)
    metrics.observe("GET", "/users/{id}", 200, 0.5)
    metrics.observe("GET", "/users/{id}", 500, 1.0)

    assert value(registry, COUNT, **labels("GET", "/users/{id}", "200")) == 2
    assert value(registry, SUM, **labels("GET", "/users/{id}", "200")) == 0.75
    assert value(registry, COUNT, **labels("GET", "/users/{id}", "500")) == 1


def test_a_request_without_response_is_counted_separately(registry: CollectorRegistry) -> None:
    """It has no status, and its duration is meaningless."""
    RequestMetrics(registry).observe("GET", "/", None, 3.0)

    assert value(registry, "viralfx_requests_cut_total") == 1
    assert value(registry, COUNT, **labels("GET", "/", "None")) is None


def test_requests_in_flight_are_read_at_each_scrape(registry: CollectorRegistry) -> None:
    """The gauge reads the counter of the gate."""
    metrics, under_way = RequestMetrics(registry), [1, 2]
    metrics.count_active(under_way.__len__)

    assert value(registry, "http_server_active_requests") == 2
    under_way.clear()
    assert value(registry, "http_server_active_requests") == 0
