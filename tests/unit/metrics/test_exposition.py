"""Tests of the rendered metrics: formats, exemplars, and two applications in one process."""

from collections.abc import Iterable

import pytest
from prometheus_client.core import Metric
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families
from tests.unit.metrics.reading import text, value

from viralfx.bootstrap import assemble
from viralfx.settings import Settings
from viralfx.telemetry.metrics import Metrics

OPENMETRICS = "application/openmetrics-text; version=1.0.0"


def parsed(scraped: str) -> Iterable[Metric]:
    """Parse OpenMetrics."""
    families: Iterable[Metric] = openmetrics.text_string_to_metric_families(scraped)  # type: ignore[no-untyped-call]  # it has no types
    return families


TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def test_the_accept_header_selects_openmetrics() -> None:
    """Other clients get the older text format; both formats can be parsed."""
    metrics = assemble(Settings()).metrics
    metrics.requests.observe("GET", "/", 200, 0.1)
    plain, media_type = metrics.render("text/html, */*")
    newer, newer_type = metrics.render(OPENMETRICS)
    names = {family.name for family in text_string_to_metric_families(plain.decode())}
    newer_names = {family.name for family in parsed(newer.decode())}

    assert media_type.startswith("text/plain; version=")
    assert newer_type.startswith("application/openmetrics-text; version=1.0.0")
    assert newer.endswith(b"# EOF\n")
    assert newer_names >= {"viralfx_ready", "http_server_request_duration_seconds"}
    assert names >= newer_names


@pytest.mark.parametrize(
    "accept",
    [
        "application/openmetrics-text; version=abc",
        "application/openmetrics-text; version=1..0",
        "application/openmetrics-text; version=\N{SUPERSCRIPT TWO}",
        "text/plain; version=1.0.0abc",
    ],
)
def test_an_unknown_version_selects_the_text_format(accept: str) -> None:
    """An invalid header is not an error of the service."""
    metrics = Metrics()
    _, usual = metrics.render("")
    body, media_type = metrics.render(accept)
    names = {family.name for family in text_string_to_metric_families(body.decode())}

    assert media_type == usual
    assert "process_open_fds" in names


def test_an_exemplar_has_the_trace_of_its_measurement() -> None:
    """OpenMetrics shows it at the measurement's bucket."""
    metrics = Metrics()
    metrics.requests.observe("GET", "/", 200, 0.03, (TRACE, SPAN))
    families = parsed(text(metrics, OPENMETRICS))
    exemplars = [
        (sample.labels["le"], sample.exemplar.labels, sample.exemplar.value)
        for family in families
        for sample in family.samples
        if sample.exemplar is not None
    ]

    assert exemplars == [("0.05", {"trace_id": TRACE, "span_id": SPAN}, 0.03)]
    assert TRACE not in text(metrics)


def test_untraced_measurements_have_no_exemplar() -> None:
    """The exemplar is absent, not empty."""
    metrics = Metrics()
    metrics.requests.observe("GET", "/", 200, 0.03)

    assert " # {" not in text(metrics, OPENMETRICS)


def test_two_applications_in_one_process_do_not_clash() -> None:
    """Each has its own registry and counts."""
    one, two = assemble(Settings()).metrics, assemble(Settings()).metrics
    one.requests.observe("GET", "/", 200, 0.1)
    labels = {"http_request_method": "GET", "http_route": "/", "http_response_status_code": "200"}
    count = "http_server_request_duration_seconds_count"

    assert value(one.registry, count, **labels) == 1
    assert value(two.registry, count, **labels) is None
