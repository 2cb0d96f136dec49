"""Metrics of the queues, from the last health check, and of the jobs that this process runs."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from time import perf_counter

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from viralfx.jobs.ledger import Accepted, QueueCounts
from viralfx.jobs.model import Claim, JobDraft, JobState, Settlement
from viralfx.telemetry.metrics.series import (
    Exemplar,
    HistogramSeries,
    LoopHistogram,
    no_exemplar,
)

_UNKNOWN = "unknown"
_BUCKETS = (0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 300, 900, 3600)


class QueueMetrics(Collector):
    """The state of the queues, from the last count: a scrape does not query the database."""

    def __init__(self, counts: Callable[[], Mapping[str, QueueCounts]]) -> None:
        """Read ``counts`` at each scrape: the last counts by queue, empty if they are outdated."""
        self._counts = counts

    def describe(self) -> Iterable[Metric]:
        """Return the metrics without samples."""
        return self._collect({})

    def collect(self) -> Iterator[Metric]:
        """Return the last counts."""
        return self._collect(self._counts())

    @staticmethod
    def _collect(counts: Mapping[str, QueueCounts]) -> Iterator[Metric]:
        jobs = GaugeMetricFamily(
            "viralfx_queue_jobs", "Unfinished jobs, by state.", labels=["queue", "state"]
        )
        finished = CounterMetricFamily(
            "viralfx_queue_finished_jobs",
            "Finished jobs of all workers, by final state.",
            labels=["queue", "state"],
        )
        oldest = GaugeMetricFamily(
            "viralfx_queue_oldest_due_seconds",
            "Time since the oldest waiting job became due.",
            labels=["queue"],
        )
        consumers = GaugeMetricFamily(
            "viralfx_queue_consumers", "Workers that consume the queue.", labels=["queue"]
        )
        blocked = GaugeMetricFamily(
            "viralfx_queue_consumers_blocked",
            "Workers that consume the queue and whose event loop is blocked.",
            labels=["queue"],
        )
        paused = GaugeMetricFamily(
            "viralfx_queue_paused", "1 while no worker claims jobs of the queue.", labels=["queue"]
        )
        for name, queue in counts.items():
            for state in ("waiting", "active", "scheduled"):
                jobs.add_metric([name, state], getattr(queue, state))
            for state in ("completed", "failed", "cancelled"):
                finished.add_metric([name, state], getattr(queue, state))
            oldest.add_metric([name], queue.oldest_due)
            consumers.add_metric([name], queue.consumers)
            blocked.add_metric([name], queue.blocked)
            paused.add_metric([name], queue.paused)
        yield from (jobs, finished, oldest, consumers, blocked, paused)


def unrecorded_outcomes(registry: CollectorRegistry) -> Gauge:
    """Return the gauge of the outcomes that the ledger has not recorded for longer than a lease."""
    return Gauge(
        "viralfx_jobs_unrecorded",
        "Outcomes of jobs that this process has not recorded for longer than a lease.",
        registry=registry,
    )


class ProgressMetrics(Collector):
    """The progress of the running jobs, by task: a series for each job would be too many."""

    def __init__(self, progress: Callable[[], Iterable[tuple[str, str, float]]]) -> None:
        """Read ``progress`` at each scrape: queue, task and ratio of each job that has one."""
        self._progress = progress

    def describe(self) -> Iterable[Metric]:
        """Return the metric without samples."""
        return self._collect(())

    def collect(self) -> Iterator[Metric]:
        """Return the means of the moment."""
        return self._collect(self._progress())

    @staticmethod
    def _collect(progress: Iterable[tuple[str, str, float]]) -> Iterator[Metric]:
        ratio = GaugeMetricFamily(
            "viralfx_job_progress_ratio",
            "Mean progress of the running jobs of this process that report a total.",
            labels=["queue", "task"],
        )
        ratios: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
        for queue, task, each in progress:
            ratios[queue, task].append(each)
        for names, found in ratios.items():
            ratio.add_metric(names, sum(found) / len(found))
        yield ratio


class JobMetrics:
    """Counts and measures the jobs that this process accepts and runs; a :class:`JobHooks`."""

    def __init__(
        self,
        registry: CollectorRegistry,
        tasks: Mapping[str, str],
        queues: Iterable[str] = (),
        exemplar: Exemplar = no_exemplar,
    ) -> None:
        """``tasks`` maps the declared tasks to their queues; ``queues`` are all queues.

        Other tasks share the label ``unknown``, because their names come from the ledger and other
        versions of the program may have written any number of them.
        """
        labels = ("queue", "task")
        self._tasks = tasks
        self.exemplar = exemplar
        self._accepted_series: dict[tuple[str, str], Counter] = {}
        self._execution_series: dict[tuple[str, str], _ExecutionSeries] = {}
        self._accepted = Counter(
            "viralfx_jobs_accepted_total",
            "Jobs that this process accepted, including repetitions of an idempotency key and jobs"
            " whose transaction was rolled back later.",
            labels,
            registry=registry,
        )
        self.wait = LoopHistogram(
            "viralfx_job_wait_seconds",
            "Time from the due time of a job to its claim by a worker.",
            labels,
            _BUCKETS,
        )
        self.duration = LoopHistogram(
            "viralfx_job_duration_seconds",
            "Duration of an execution of a job, until its outcome was known.",
            labels,
            _BUCKETS,
        )
        self.executions = Counter(
            "viralfx_job_executions_total",
            "Executions of jobs, by outcome.",
            (*labels, "outcome"),
            registry=registry,
        )
        self.attempts = LoopHistogram(
            "viralfx_job_attempts",
            "Attempts of a job when it was completed or failed for good.",
            labels,
            (1, 2, 3, 5, 10, 20),
        )
        for histogram in (self.wait, self.duration, self.attempts):
            registry.register(histogram)
        # Created at the start: Prometheus does not see the first increase of a new series. Failures
        # before the first scrape stay invisible to increase(), so for a young process the alert
        # uses the counter's value.
        for task, queue in tasks.items():
            self.executions.labels(queue, task, "failed")
        for queue in queues:
            self.executions.labels(queue, _UNKNOWN, "failed")

    def accepting(self, draft: JobDraft) -> AbstractContextManager[JobDraft]:
        """Return a context that does nothing: :meth:`accepted` counts the job."""
        return nullcontext(draft)

    def storing(self, drafts: Sequence[JobDraft]) -> AbstractContextManager[None]:  # noqa: ARG002 - the port's
        """Return an empty context: storing is not measured."""
        return nullcontext()

    def accepted(self, accepted: Accepted) -> None:
        """Count an accepted job."""
        names = accepted.job.queue, accepted.job.task
        counter = self._accepted_series.get(names)
        if counter is None:
            counter = self._accepted_series[names] = self._accepted.labels(*names)
        counter.inc()

    def executing(self, claim: Claim) -> "_MeasuredExecution":
        """Measure an execution and count its outcome."""
        names = claim.queue, claim.task if claim.task in self._tasks else _UNKNOWN
        series = self._execution_series.get(names)
        if series is None:
            series = self._execution_series[names] = _ExecutionSeries(self, names)
        return _MeasuredExecution(series, claim, self.exemplar)


class _ExecutionSeries:
    """The series of one queue and task. The library's lookup by labels takes longer than the rest.

    A series exists from its first value on.
    """

    __slots__ = ("_attempts", "_executions", "_names", "_outcomes", "duration", "wait")

    def __init__(self, metrics: JobMetrics, names: tuple[str, str]) -> None:
        self._names = names
        self._attempts = metrics.attempts
        self._executions = metrics.executions
        self.wait = metrics.wait.series(*names)
        self.duration = metrics.duration.series(*names)
        self._outcomes: dict[str, tuple[Counter, HistogramSeries | None]] = {}

    def count(self, outcome: str, attempt: int) -> None:
        """Count an execution by its outcome, and the attempts of a finished job."""
        found = self._outcomes.get(outcome)
        if found is None:
            is_final = outcome in {"completed", "failed"}
            found = self._outcomes[outcome] = (
                self._executions.labels(*self._names, outcome),
                self._attempts.series(*self._names) if is_final else None,
            )
        executions, attempts = found
        executions.inc()
        if attempts is not None:
            attempts.observe(attempt)


class _MeasuredExecution:
    """One execution, from its beginning to its outcome."""

    __slots__ = ("_began", "_claim", "_exemplar", "_outcome", "_series")

    def __init__(self, series: _ExecutionSeries, claim: Claim, exemplar: Exemplar) -> None:
        self._series = series
        self._claim = claim
        self._exemplar = exemplar
        self._outcome = "abandoned"
        self._began = 0.0

    def __enter__(self) -> Callable[[Settlement | None], None]:
        self._series.wait.observe(self._claim.due_since)
        self._began = perf_counter()
        return self._ended

    def __exit__(self, *_: object) -> None:
        seconds = perf_counter() - self._began
        self._series.duration.observe(seconds, self._exemplar())
        self._series.count(self._outcome, self._claim.attempt)

    def _ended(self, settlement: Settlement | None) -> None:
        self._outcome = _outcome(settlement)


def _outcome(settlement: Settlement | None) -> str:
    if settlement is None or settlement.state is JobState.COMPLETED:
        return "completed"
    if settlement.state in (JobState.FAILED, JobState.CANCELLED):
        return str(settlement.state)
    if settlement.spends_attempt:
        return "retried"
    return "handed_back" if settlement.error is None else "postponed"
