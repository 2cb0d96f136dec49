"""The registries of an application beside that of the package, and what left the process."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, ProcessCollector
from prometheus_client.core import Metric
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families
from tests.unit.metrics.reading import value

from viralfx import ConfigurationError
from viralfx.bootstrap import assemble
from viralfx.settings import Settings
from viralfx.telemetry.logging.writer import lost_lines
from viralfx.telemetry.metrics import Metrics
from viralfx.telemetry.metrics.health import LossMetrics

OPENMETRICS = "application/openmetrics-text; version=1.0.0"


class Failing:
    """A registry whose collector fails until it is repaired."""

    def __init__(self) -> None:
        self.repaired = False

    def collect(self) -> Iterator[Metric]:
        """Yield one metric, and fail."""
        yield Metric("half", "Half of it.", "gauge")
        if not self.repaired:
            raise RuntimeError("planted")


def scraped(metrics: Metrics, accept: str = OPENMETRICS) -> dict[str, Metric]:
    """Return the metrics of a scrape by name; a strict parser refuses an invalid one."""
    body = metrics.render(accept)[0].decode()
    parse: Any = openmetrics.text_string_to_metric_families
    if accept != OPENMETRICS:
        parse = text_string_to_metric_families
    families: list[Metric] = list(parse(body))
    assert len({family.name for family in families}) == len(families)
    return {family.name: family for family in families}


@pytest.mark.parametrize("accept", [OPENMETRICS, "text/plain"])
def test_metrics_of_an_application_are_shown(accept: str) -> None:
    """Those of several registries, in both formats."""
    first, second = CollectorRegistry(), CollectorRegistry()
    Counter("shop_orders", "Orders.", registry=first).inc(3)
    Gauge("shop_stock", "Stock.", ("item",), registry=second).labels("tea").set(7)
    found = scraped(Metrics(registries=[first, second]), accept)

    assert found["shop_orders"].samples[0].value == 3.0
    assert found["shop_stock"].samples[0].labels == {"item": "tea"}
    assert "http_server_active_requests" in found


def test_of_two_metrics_with_one_name_the_first_is_shown() -> None:
    """The library's global registry has metrics of the process, too."""
    first, second = CollectorRegistry(), CollectorRegistry()
    ProcessCollector(registry=first)
    for number, registry in enumerate((first, second)):
        Gauge("shop_stock", "Stock.", registry=registry).set(number)
        Gauge("http_server_active_requests", "Another.", registry=registry).set(99)
    found = scraped(Metrics(registries=[first, second]))

    assert found["shop_stock"].samples[0].value == 0
    assert found["http_server_active_requests"].samples[0].value == 0
    assert "process_open_fds" in found


def test_a_registry_that_cannot_be_read_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    """The others are shown, and each outage is one line."""
    failing, working = Failing(), CollectorRegistry()
    Gauge("shop_stock", "Stock.", registry=working)
    metrics = Metrics(registries=[failing, working])
    with caplog.at_level(logging.WARNING, "viralfx.metrics"):
        for failing.repaired in (False, False, True, False):
            found = scraped(metrics)
            assert ("half" in found) is failing.repaired
            assert "shop_stock" in found

    assert caplog.messages == ["A registry cannot be read: planted"] * 2


@pytest.mark.parametrize("registries", [5, [5], [CollectorRegistry], CollectorRegistry(), [None]])
def test_a_value_that_is_no_registry_is_a_problem(registries: Any) -> None:
    """It is found before the first scrape."""
    with pytest.raises(ConfigurationError) as raised:
        assemble(Settings(), registries=registries)

    assert raised.value.problems[0].startswith("OperationsConfig.registries: ")


def test_losses_are_counted() -> None:
    """Without traces there is no metric of them."""
    registry = CollectorRegistry()
    registry.register(LossMetrics(lambda: 7))
    without = CollectorRegistry()
    without.register(LossMetrics(None))

    assert value(registry, "viralfx_spans_lost_total") == 7
    assert value(registry, "viralfx_log_lines_lost_total") == lost_lines()
    assert without.get_sample_value("viralfx_spans_lost_total") is None
