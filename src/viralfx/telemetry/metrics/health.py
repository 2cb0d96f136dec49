"""Metrics of checks, lifecycle, shutdown and event loop, and of circuit breakers and retries."""

import asyncio
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from viralfx.core.clock import Clock
from viralfx.domain.health.check_runner import CheckCompleted
from viralfx.domain.health.circuits import BreakerRegistry
from viralfx.domain.health.model import State, Status, Transition
from viralfx.domain.health.monitor import MonitorEvent
from viralfx.domain.operations import Operations
from viralfx.domain.shutdown import ShutdownEvent, StageFinished
from viralfx.resilience.breaker import CallRejected, CircuitEvent, StateChanged
from viralfx.resilience.breaker_states import CircuitState
from viralfx.resilience.policy import RetryBudget
from viralfx.resilience.retry import Retrier
from viralfx.resilience.retry_decision import AttemptFailed, GaveUp, RetryEvent
from viralfx.telemetry.logging.writer import lost_lines
from viralfx.telemetry.metrics.series import BoundedNames

_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 5)


class HealthMetrics:
    """Metrics of the monitor, the lifecycle and the shutdown."""

    def __init__(self, registry: CollectorRegistry, operations: Operations) -> None:
        self._duration = Histogram(
            "viralfx_check_duration_seconds",
            "Duration of the attempts of a health check.",
            ("check",),
            buckets=_BUCKETS,
            registry=registry,
        )
        self._attempts = Counter(
            "viralfx_check_attempts_total",
            "Attempts of a health check, by result.",
            ("check", "status"),
            registry=registry,
        )
        # The look-up by labels takes a lock and costs more than the increase.
        self._series: dict[tuple[str, Status], tuple[Histogram, Counter]] = {}
        self._transitions = Counter(
            "viralfx_check_transitions_total",
            "Changes of a health check's status, by the new status.",
            ("check", "status"),
            registry=registry,
        )
        self._stages = Gauge(
            "viralfx_shutdown_stage_duration_seconds",
            "Duration of a shutdown stage, by outcome.",
            ("phase", "stage", "outcome"),
            registry=registry,
        )
        build = Gauge(
            "viralfx_build_info",
            "Always 1; the labels are the version and the environment.",
            ("version", "environment"),
            registry=registry,
        )
        build.labels(operations.version, operations.environment).set(1)
        for check in operations.monitor.checks:
            # Created at the start: Prometheus does not see the first increase of a new series.
            for status in Status:
                self._attempts.labels(check, str(status))
                self._transitions.labels(check, str(status))
        registry.register(_HealthReport(operations, operations.clock))
        operations.monitor.subscribe(self._on_health)
        operations.shutdown.subscribe(self._on_shutdown)

    def _on_health(self, event: MonitorEvent) -> None:
        if isinstance(event, CheckCompleted):
            key = event.check, event.observation.status
            series = self._series.get(key)
            if series is None:
                series = self._series[key] = (
                    self._duration.labels(event.check),
                    self._attempts.labels(event.check, str(event.observation.status)),
                )
            duration, attempts = series
            duration.observe(event.response_time)
            attempts.inc()
        elif isinstance(event, Transition):
            self._transitions.labels(event.check, str(event.new)).inc()

    def _on_shutdown(self, event: ShutdownEvent) -> None:
        if isinstance(event, StageFinished):
            stage = event.report
            labels = str(event.phase), stage.name, str(stage.outcome)
            self._stages.labels(*labels).set(stage.duration)


class _HealthReport(Collector):
    """Reads the health report at each scrape, so that ages are current."""

    def __init__(self, operations: Operations, clock: Clock) -> None:
        self._operations = operations
        self._clock = clock

    def describe(self) -> Iterable[Metric]:
        return self._families().values()

    def _families(self) -> dict[str, GaugeMetricFamily]:
        return {
            name: GaugeMetricFamily(f"viralfx_{name}", text, labels=labels)
            for name, text, labels in (
                ("check_status", "1 for the current status of a check.", ["check", "status"]),
                ("check_age_seconds", "Time since the last attempt of a check ended.", ["check"]),
                ("ready", "1 if the process is ready, else 0.", []),
                ("lifecycle_state", "1 for the current state of the process.", ["state"]),
                ("uptime_seconds", "Time since the process started.", []),
                ("shutdown_seconds_left", "Time until the shutdown is forced.", []),
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


_PERIOD = 0.5
"""Time between two samples; each costs about ten microseconds."""

_MAX_ADDED_SAMPLES = 600
"""Limit of the samples that one delay adds. Adding this many takes a millisecond; a process that
was suspended for hours would otherwise add many more."""

_DELAY_BUCKETS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class LossMetrics(Collector):
    """Log lines and spans that did not leave the process."""

    def __init__(self, spans: Callable[[], int] | None) -> None:
        """``spans`` returns the number of lost spans; None: this process sends no traces."""
        self._spans = spans

    def describe(self) -> Iterable[Metric]:
        """Return the metrics without samples."""
        return self._counters()

    def collect(self) -> Iterator[Metric]:
        """Return the numbers so far."""
        lines, spans = self._counters()
        lines.add_metric([], lost_lines())
        yield lines
        if self._spans is not None:
            spans.add_metric([], self._spans())
            yield spans

    @staticmethod
    def _counters() -> tuple[CounterMetricFamily, CounterMetricFamily]:
        return (
            CounterMetricFamily(
                "viralfx_log_lines_lost", "Log lines that could not be written to the output."
            ),
            CounterMetricFamily(
                "viralfx_spans_lost", "Spans that were recorded and not accepted by the collector."
            ),
        )


class LoopLag:
    """Measures by how much the event loop runs a timer too late.

    Further samples would have been due while the loop was blocked, each late by the rest of the
    delay. They are added afterwards; otherwise a loop that is blocked for a third of the time by
    single long calls would show one late sample in a hundred.

    Nothing runs before :meth:`start`.
    """

    def __init__(self, registry: CollectorRegistry, period: float = _PERIOD) -> None:
        """``period`` is the time between two samples in seconds."""
        self._period = period
        self._lag = Histogram(
            "viralfx_event_loop_lag_seconds",
            "Delay of a timer of the event loop.",
            buckets=_DELAY_BUCKETS,
            registry=registry,
        )
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Start sampling on the running loop; further calls have no effect."""
        if self._timer is None:
            self._wait(asyncio.get_running_loop())

    def stop(self) -> None:
        """Stop sampling; :meth:`start` may follow."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _wait(self, loop: asyncio.AbstractEventLoop) -> None:
        due = loop.time() + self._period
        self._timer = loop.call_at(due, self._sample, loop, due)

    def _sample(self, loop: asyncio.AbstractEventLoop, due: float) -> None:
        # The loop's clock may be coarser than its timers, so the difference can be negative.
        lag = max(0.0, loop.time() - due)
        for missed in range(min(int(lag / self._period) + 1, _MAX_ADDED_SAMPLES)):
            self._lag.observe(lag - missed * self._period)
        self._wait(loop)


class CircuitMetrics(Collector):
    """The states of circuit breakers, read at each scrape, and their changes and rejections."""

    def __init__(self, registry: CollectorRegistry, breakers: BreakerRegistry) -> None:
        self._breakers = breakers
        self._changes = Counter(
            "viralfx_circuit_changes_total",
            "Changes of a circuit's state, by the new state.",
            ("circuit", "state"),
            registry=registry,
        )
        self._rejected = Counter(
            "viralfx_circuit_rejected_calls_total",
            "Calls that were rejected because the circuit was open.",
            ("circuit",),
            registry=registry,
        )
        breakers.subscribe(self._on_event)
        registry.register(self)

    def describe(self) -> Iterable[Metric]:
        """Return the metrics without samples."""
        return (self._family(),)

    def collect(self) -> Iterator[Metric]:
        """Read the state of every circuit."""
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
            "1 for the current state of a circuit.",
            labels=["circuit", "state"],
        )

    def _on_event(self, event: CircuitEvent) -> None:
        if isinstance(event, StateChanged):
            self._changes.labels(event.name, str(event.new)).inc()
        elif isinstance(event, CallRejected):
            self._rejected.labels(event.name).inc()


class WebhookCircuitMetrics:
    """Counts events of the circuit breakers of all webhook receivers together.

    The receivers' hosts are not a label, because they come from jobs and are unlimited in number.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._changes = Counter(
            "viralfx_webhook_circuit_changes_total",
            "Changes of the state of webhook receivers' circuits, by the new state.",
            ("state",),
            registry=registry,
        )
        self._rejected = Counter(
            "viralfx_webhook_rejected_calls_total",
            "Webhooks that were postponed because their receiver's circuit was open.",
            registry=registry,
        )
        for state in CircuitState:
            self._changes.labels(str(state))

    def __call__(self, event: CircuitEvent) -> None:
        """Count one event of a receiver's breaker."""
        if isinstance(event, StateChanged):
            self._changes.labels(str(event.new)).inc()
        elif isinstance(event, CallRejected):
            self._rejected.inc()


_DELAYS = (0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60)


class RetryMetrics(Collector):
    """Counts failed attempts, waits between attempts, and operations that failed for good.

    A listener of retriers; an operation has the name of its retrier. Operations that succeed at the
    first attempt are not counted, because that would add a cost to every call.
    """

    def __init__(self, registry: CollectorRegistry, clock: Clock) -> None:
        self._clock = clock
        self._names = BoundedNames()
        self._budgets: dict[str, RetryBudget] = {}
        self._failed = Counter(
            "viralfx_retry_failed_attempts_total",
            "Failed attempts of retried operations.",
            ("operation",),
            registry=registry,
        )
        self._delay = Histogram(
            "viralfx_retry_delay_seconds",
            "Wait between a failed attempt and the next one.",
            ("operation",),
            buckets=_DELAYS,
            registry=registry,
        )
        self._gave_up = Counter(
            "viralfx_retry_gave_up_total",
            "Operations that failed for good, by the reason for not retrying.",
            ("operation", "reason"),
            registry=registry,
        )
        registry.register(self)

    def add(self, retrier: Retrier) -> None:
        """Count the events of a named retrier, and expose its budget."""
        retrier.subscribe(self)
        if retrier.budget is not None:
            self._budgets[str(retrier.name)] = retrier.budget

    def __call__(self, event: RetryEvent) -> None:
        """Count one event of a retrier."""
        if isinstance(event, AttemptFailed):
            name = self._names(event.name)
            self._failed.labels(name).inc()
            if event.delay is not None:
                self._delay.labels(name).observe(event.delay)
        elif isinstance(event, GaveUp):
            self._gave_up.labels(self._names(event.name), str(event.reason)).inc()

    def describe(self) -> Iterable[Metric]:
        """Return the metrics without samples."""
        return (self._family(),)

    def collect(self) -> Iterator[Metric]:
        """Read every budget."""
        family, now = self._family(), self._clock.monotonic()
        for name, budget in self._budgets.items():
            family.add_metric([name], budget.available(now))
        yield family

    @staticmethod
    def _family() -> GaugeMetricFamily:
        return GaugeMetricFamily(
            "viralfx_retry_budget_available",
            "Retries that an operation's budget currently allows.",
            labels=["operation"],
        )
