"""Helpers that read metrics as a scraper does."""

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric

from viralfx.telemetry.metrics import Metrics


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    """Return the value of a series; None if it does not exist."""
    return registry.get_sample_value(name, labels)


def series(registry: CollectorRegistry) -> int:
    """Return the number of all series."""
    return sum(len(metric.samples) for metric in registry.collect())


def family(registry: CollectorRegistry, name: str) -> Metric:
    """Return a metric by name."""
    return next(metric for metric in registry.collect() if metric.name == name)


def text(metrics: Metrics, accept: str = "") -> str:
    """Return the rendered metrics."""
    return metrics.render(accept)[0].decode()
