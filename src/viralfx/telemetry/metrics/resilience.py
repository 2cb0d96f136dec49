"""Circuits: their states, and what they did with calls."""

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from viralfx.domain.resilience.circuit import CallRejected, CircuitEvent, StateChanged
from viralfx.domain.resilience.circuit_states import CircuitState
from viralfx.domain.resilience.circuits import BreakerRegistry


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


class ReceiverCircuits:
    """Counts what the breakers of webhooks' receivers do, all under one name.

    The receivers' hosts come from jobs, so that they are no label.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._changes = Counter(
            "viralfx_webhook_circuit_changes_total",
            "Changes of state of the circuits of webhooks' receivers, by the new one.",
            ("state",),
            registry=registry,
        )
        self._rejected = Counter(
            "viralfx_webhook_rejected_calls_total",
            "Webhooks that were put off because their receiver's circuit was open.",
            registry=registry,
        )
        for state in CircuitState:
            self._changes.labels(str(state))

    def __call__(self, event: CircuitEvent) -> None:
        """Take in one event of one of them."""
        if isinstance(event, StateChanged):
            self._changes.labels(str(event.new)).inc()
        elif isinstance(event, CallRejected):
            self._rejected.inc()
