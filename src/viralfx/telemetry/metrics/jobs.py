"""The queues, as the last health check counted them, and the jobs that this process runs."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from time import perf_counter

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from viralfx.domain.jobs.job import Claim, JobDraft, JobState, Settlement
from viralfx.domain.jobs.ledger import Accepted, QueueCounts
from viralfx.telemetry.metrics.exemplars import Exemplar, no_exemplar

_UNKNOWN = "unknown"
_BUCKETS = (0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 300, 900, 3600)


class QueueMetrics(Collector):
    """How the queues stand. It asks nobody: a scrape must not cost the database a query."""

    def __init__(self, counts: Callable[[], Mapping[str, QueueCounts]]) -> None:
        """Take ``counts``, which returns what was counted last; nothing where that says nothing."""
        self._counts = counts

    def describe(self) -> Iterable[Metric]:
        """Name what there is."""
        return self._collect({})

    def collect(self) -> Iterator[Metric]:
        """Write out what was counted last."""
        return self._collect(self._counts())

    @staticmethod
    def _collect(counts: Mapping[str, QueueCounts]) -> Iterator[Metric]:
        jobs = GaugeMetricFamily(
            "viralfx_queue_jobs", "Jobs that are not finished.", labels=["queue", "state"]
        )
        finished = CounterMetricFamily(
            "viralfx_queue_finished_jobs",
            "Jobs that were finished, by anybody, by how.",
            labels=["queue", "state"],
        )
        oldest = GaugeMetricFamily(
            "viralfx_queue_oldest_due_seconds",
            "Time for which the longest waiting job has been due.",
            labels=["queue"],
        )
        consumers = GaugeMetricFamily(
            "viralfx_queue_consumers", "Workers that run the queue's jobs.", labels=["queue"]
        )
        for name, queue in counts.items():
            for state in ("waiting", "active", "scheduled"):
                jobs.add_metric([name, state], getattr(queue, state))
            for state in ("completed", "failed", "cancelled"):
                finished.add_metric([name, state], getattr(queue, state))
            oldest.add_metric([name], queue.oldest_due)
            consumers.add_metric([name], queue.consumers)
        yield from (jobs, finished, oldest, consumers)


class JobMetrics:
    """Counts what this process does with jobs; a :class:`JobObserver`."""

    def __init__(
        self,
        registry: CollectorRegistry,
        tasks: Mapping[str, str],
        queues: Iterable[str] = (),
        exemplar: Exemplar = no_exemplar,
    ) -> None:
        """``tasks`` are those that are declared here, with their queues; ``queues`` are all.

        Other tasks share the label ``unknown``: their names come from the ledger, and so from any
        version of the program.
        """
        labels = ("queue", "task")
        self._tasks = tasks
        self.exemplar = exemplar
        self._accepted = Counter(
            "viralfx_jobs_accepted_total",
            "Jobs that this process accepted, those included that were accepted before.",
            labels,
            registry=registry,
        )
        self.wait = Histogram(
            "viralfx_job_wait_seconds",
            "Time from when a job was due until a worker was given it.",
            labels,
            buckets=_BUCKETS,
            registry=registry,
        )
        self.duration = Histogram(
            "viralfx_job_duration_seconds",
            "Time that an execution of a job took, until its outcome was known.",
            labels,
            buckets=_BUCKETS,
            registry=registry,
        )
        self.executions = Counter(
            "viralfx_job_executions_total",
            "Executions of jobs, by what became of them.",
            (*labels, "outcome"),
            registry=registry,
        )
        self.attempts = Histogram(
            "viralfx_job_attempts",
            "Attempts that a job had taken when it was completed or given up.",
            labels,
            buckets=(1, 2, 3, 5, 10, 20),
            registry=registry,
        )
        # There from the start: of a counter that begins with its first event nobody sees it grow by
        # that. For what happened before the first scrape this does nothing: of a young process the
        # alert takes the whole counter.
        for task, queue in tasks.items():
            self.executions.labels(queue, task, "failed")
        for queue in queues:
            self.executions.labels(queue, _UNKNOWN, "failed")

    @contextmanager
    def accepting(self, draft: JobDraft) -> Iterator[JobDraft]:
        """Count a job once it is accepted."""
        yield draft
        self._accepted.labels(draft.queue, draft.task).inc()

    def storing(self, drafts: Sequence[JobDraft]) -> AbstractContextManager[None]:  # noqa: ARG002 - the port's
        """Measure nothing."""
        return nullcontext()

    def accepted(self, accepted: Accepted) -> None:
        """Do nothing: it is counted."""

    def executing(self, claim: Claim) -> "_Execution":
        """Time an execution."""
        task = claim.task if claim.task in self._tasks else _UNKNOWN
        return _Execution(self, claim, task)


class _Execution:
    """One execution, from its beginning to its outcome."""

    __slots__ = ("_began", "_claim", "_metrics", "_outcome", "_task")

    def __init__(self, metrics: JobMetrics, claim: Claim, task: str) -> None:
        self._metrics = metrics
        self._claim = claim
        self._task = task
        self._outcome = "abandoned"
        self._began = 0.0

    def __enter__(self) -> Callable[[Settlement | None], None]:
        self._metrics.wait.labels(self._claim.queue, self._task).observe(self._claim.due_since)
        self._began = perf_counter()
        return self._ended

    def __exit__(self, *_: object) -> None:
        seconds, metrics = perf_counter() - self._began, self._metrics
        labels = self._claim.queue, self._task
        metrics.duration.labels(*labels).observe(seconds, metrics.exemplar())
        metrics.executions.labels(*labels, self._outcome).inc()
        if self._outcome in {"completed", "failed"}:
            metrics.attempts.labels(*labels).observe(self._claim.attempt)

    def _ended(self, settlement: Settlement | None) -> None:
        self._outcome = _outcome(settlement)


def _outcome(settlement: Settlement | None) -> str:
    if settlement is None or settlement.state is JobState.COMPLETED:
        return "completed"
    if settlement.state is JobState.FAILED:
        return "failed"
    if settlement.spends_attempt:
        return "retried"
    return "handed_back" if settlement.error is None else "postponed"
