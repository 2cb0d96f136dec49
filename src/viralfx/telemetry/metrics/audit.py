"""Metrics of the audit trail."""

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from viralfx.domain.audit import AuditEvent, AuditOutcome


class AuditMetrics(Collector):
    """Counts the events of the audit trail, and those that were not stored; a listener of it."""

    def __init__(self, registry: CollectorRegistry, *, lost: Callable[[], int]) -> None:
        """``lost`` returns how many events were not stored."""
        self._lost = lost
        self._events = Counter(
            "viralfx_audit_events_total",
            "Events of the audit trail, by outcome.",
            ("outcome",),
            registry=registry,
        )
        for outcome in AuditOutcome:
            self._events.labels(str(outcome))
        registry.register(self)

    def __call__(self, event: AuditEvent) -> None:
        """Count one event."""
        self._events.labels(event.outcome).inc()

    def describe(self) -> Iterable[Metric]:
        """Return the metric without a sample."""
        return (self._family(),)

    def collect(self) -> Iterator[Metric]:
        """Return the number so far."""
        family = self._family()
        family.add_metric([], self._lost())
        yield family

    @staticmethod
    def _family() -> CounterMetricFamily:
        return CounterMetricFamily(
            "viralfx_audit_events_lost", "Events of the audit trail that were not stored."
        )
