"""Retries: what failed, how long was waited, and what is left of their budgets."""

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from viralfx.domain.clock import Clock
from viralfx.domain.resilience.budget import RetryBudget
from viralfx.domain.resilience.retry import Retrier
from viralfx.domain.resilience.retry_decision import AttemptFailed, GaveUp, RetryEvent
from viralfx.telemetry.metrics.names import BoundedNames

_DELAYS = (0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60)


class RetryMetrics(Collector):
    """Counts failed attempts, the waits between them, and when it was given up: a listener.

    An operation is named as its retrier is. One that succeeds at once is counted nowhere: that
    would cost every call.
    """

    def __init__(self, registry: CollectorRegistry, clock: Clock) -> None:
        self._clock = clock
        self._names = BoundedNames()
        self._budgets: dict[str, RetryBudget] = {}
        self._failed = Counter(
            "viralfx_retry_failed_attempts_total",
            "Attempts of retried operations that failed.",
            ("operation",),
            registry=registry,
        )
        self._delay = Histogram(
            "viralfx_retry_delay_seconds",
            "Time from a failed attempt to the next one.",
            ("operation",),
            buckets=_DELAYS,
            registry=registry,
        )
        self._gave_up = Counter(
            "viralfx_retry_gave_up_total",
            "Operations that failed for good, by why they were not tried again.",
            ("operation", "reason"),
            registry=registry,
        )
        registry.register(self)

    def add(self, retrier: Retrier) -> None:
        """Count what happens in a retrier that has a name, and show its budget."""
        retrier.subscribe(self)
        if retrier.budget is not None:
            self._budgets[str(retrier.name)] = retrier.budget

    def __call__(self, event: RetryEvent) -> None:
        """Take in one event of a retrier."""
        if isinstance(event, AttemptFailed):
            name = self._names(event.name)
            self._failed.labels(name).inc()
            if event.delay is not None:
                self._delay.labels(name).observe(event.delay)
        elif isinstance(event, GaveUp):
            self._gave_up.labels(self._names(event.name), str(event.reason)).inc()

    def describe(self) -> Iterable[Metric]:
        """Name what there is."""
        return (self._family(),)

    def collect(self) -> Iterator[Metric]:
        """Look at every budget."""
        family, now = self._family(), self._clock.monotonic()
        for name, budget in self._budgets.items():
            family.add_metric([name], budget.available(now))
        yield family

    @staticmethod
    def _family() -> GaugeMetricFamily:
        return GaugeMetricFamily(
            "viralfx_retry_budget_available",
            "Retries that an operation's budget allows at the moment.",
            labels=["operation"],
        )
