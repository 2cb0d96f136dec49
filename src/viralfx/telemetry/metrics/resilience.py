"""Circuits and retries: their states, and what they did with calls."""

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from viralfx.domain.resilience.circuit import CallRejected, CircuitEvent, StateChanged
from viralfx.domain.resilience.circuit_states import CircuitState
from viralfx.domain.resilience.circuits import BreakerRegistry
from viralfx.domain.resilience.retry_decision import AttemptFailed, GaveUp, RetryEvent

_DELAYS = (0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60)


class CircuitMetrics(Collector):
    """The circuits' states when somebody asks, and their changes and rejections."""

    def __init__(self, registry: CollectorRegistry, breakers: BreakerRegistry) -> None:
        self._breakers = breakers
        self._changes = Counter(
            "viralfx_circuit_changes_total",
            "Changes of a circuit's state, by the new one.",
            ("circuit", "state"),
            registry=registry,
        )
        self._rejected = Counter(
            "viralfx_circuit_rejected_calls_total",
            "Calls that were not made because the circuit was open.",
            ("circuit",),
            registry=registry,
        )
        breakers.subscribe(self._on_event)
        registry.register(self)

    def describe(self) -> Iterable[Metric]:
        """Name what there is."""
        return (self._family(),)

    def collect(self) -> Iterator[Metric]:
        """Look at every circuit."""
        family = self._family()
        for breaker in self._breakers:
            now = breaker.get_state()["state"]
            for state in CircuitState:
                family.add_metric([breaker.name, str(state)], float(now == state))
        yield family

    @staticmethod
    def _family() -> GaugeMetricFamily:
        return GaugeMetricFamily(
            "viralfx_circuit_state",
            "1 for the state that a circuit is in.",
            labels=["circuit", "state"],
        )

    def _on_event(self, event: CircuitEvent) -> None:
        if isinstance(event, StateChanged):
            self._changes.labels(event.name, str(event.new)).inc()
        elif isinstance(event, CallRejected):
            self._rejected.labels(event.name).inc()


class RetryMetrics:
    """Counts failed attempts, the waits between them, and when it was given up: a listener."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._failed = Counter(
            "viralfx_retry_failed_attempts_total",
            "Attempts of retried operations that failed.",
            ("operation",),
            registry=registry,
        )
        self._delay = Histogram(
            "viralfx_retry_delay_seconds",
            "Time until the next attempt.",
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

    def __call__(self, event: RetryEvent) -> None:
        """Take in one event of a retrier."""
        if isinstance(event, AttemptFailed):
            self._failed.labels(event.name).inc()
            if event.delay is not None:
                self._delay.labels(event.name).observe(event.delay)
        elif isinstance(event, GaveUp):
            self._gave_up.labels(event.name, str(event.reason)).inc()
