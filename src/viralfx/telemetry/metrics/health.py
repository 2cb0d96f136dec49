"""The checks, the process's state and its shutdown, as they are when somebody asks."""

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from viralfx.domain.attempts import CheckCompleted
from viralfx.domain.clock import Clock
from viralfx.domain.health import Status, Transition
from viralfx.domain.lifecycle import State
from viralfx.domain.monitor import MonitorEvent
from viralfx.domain.operations import Operations
from viralfx.domain.shutdown import ShutdownEvent, StageFinished

_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 5)


class HealthMetrics:
    """What the monitor, the lifecycle and the shutdown say, counted or read."""

    def __init__(self, registry: CollectorRegistry, operations: Operations) -> None:
        self._duration = Histogram(
            "viralfx_check_duration_seconds",
            "Time that attempts of a health check took.",
            ("check",),
            buckets=_BUCKETS,
            registry=registry,
        )
        self._attempts = Counter(
            "viralfx_check_attempts_total",
            "Attempts of a health check, by what they saw.",
            ("check", "status"),
            registry=registry,
        )
        self._transitions = Counter(
            "viralfx_check_transitions_total",
            "Changes of a health check's state, by the new one.",
            ("check", "status"),
            registry=registry,
        )
        self._stages = Gauge(
            "viralfx_shutdown_stage_duration_seconds",
            "Time that a stage of the shutdown took, by how it ended.",
            ("phase", "stage", "outcome"),
            registry=registry,
        )
        build = Gauge(
            "viralfx_build_info",
            "1, labelled with the version and the environment that it runs in.",
            ("version", "environment"),
            registry=registry,
        )
        build.labels(operations.version, operations.environment).set(1)
        for check in operations.monitor.checks:
            # There from the start: a counter that begins with its first event hides it.
            for status in Status:
                self._attempts.labels(check, str(status))
                self._transitions.labels(check, str(status))
        registry.register(_HealthNow(operations, operations.clock))
        operations.monitor.subscribe(self._on_health)
        operations.shutdown.subscribe(self._on_shutdown)

    def _on_health(self, event: MonitorEvent) -> None:
        if isinstance(event, CheckCompleted):
            self._duration.labels(event.check).observe(event.response_time)
            self._attempts.labels(event.check, str(event.observation.status)).inc()
        elif isinstance(event, Transition):
            self._transitions.labels(event.check, str(event.new)).inc()

    def _on_shutdown(self, event: ShutdownEvent) -> None:
        if isinstance(event, StageFinished):
            stage = event.report
            labels = str(event.phase), stage.name, str(stage.outcome)
            self._stages.labels(*labels).set(stage.duration)


class _HealthNow(Collector):
    """Reads the report when somebody asks, so that ages are right."""

    def __init__(self, operations: Operations, clock: Clock) -> None:
        self._operations = operations
        self._clock = clock

    def describe(self) -> Iterable[Metric]:
        return self._families().values()

    def _families(self) -> dict[str, GaugeMetricFamily]:
        return {
            name: GaugeMetricFamily(f"viralfx_{name}", text, labels=labels)
            for name, text, labels in (
                ("check_status", "1 for the state that a health check is in.", ["check", "status"]),
                ("check_age_seconds", "Time since the last attempt of a check ended.", ["check"]),
                ("ready", "Whether readiness is granted.", []),
                ("lifecycle_state", "1 for the state that the process is in.", ["state"]),
                ("uptime_seconds", "Time since the process began.", []),
                ("shutdown_seconds_left", "Time until a shutdown is forced.", []),
            )
        }

    def collect(self) -> Iterator[Metric]:
        operations, families = self._operations, self._families()
        report, now = operations.monitor.report(), self._clock.now()
        reason = operations.lifecycle.follow(report)
        for name, check in report.checks.items():
            for status in Status:
                value = float(check.status is status)
                families["check_status"].add_metric([name, str(status)], value)
            if check.checked_at is not None:
                age = (now - check.checked_at).total_seconds()
                families["check_age_seconds"].add_metric([name], max(0.0, age))
        for state in State:
            value = float(operations.lifecycle.state is state)
            families["lifecycle_state"].add_metric([str(state)], value)
        families["ready"].add_metric([], float(reason is None))
        families["uptime_seconds"].add_metric([], operations.lifecycle.uptime)
        if operations.shutdown.triggered:
            families["shutdown_seconds_left"].add_metric([], operations.shutdown.remaining())
        return iter(families.values())
