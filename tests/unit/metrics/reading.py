"""Reads metrics as who scrapes them does."""

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric

from viralfx.telemetry.metrics import Metrics


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    """Return the value of a series, None where there is none."""
    return registry.get_sample_value(name, labels)


def series(registry: CollectorRegistry) -> int:
    """Count the series of everything."""
    return sum(len(metric.samples) for metric in registry.collect())


def family(registry: CollectorRegistry, name: str) -> Metric:
    """Return a metric by its name."""
    return next(metric for metric in registry.collect() if metric.name == name)


def text(metrics: Metrics, accept: str = "") -> str:
    """Return what is scraped."""
    return metrics.render(accept)[0].decode()
