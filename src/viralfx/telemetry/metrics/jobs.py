"""The queues, as the last health check counted them, and the jobs that this process runs."""

from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from viralfx.domain.jobs.ledger import QueueCounts


class QueueMetrics(Collector):
    """How the queues stand. It asks nobody: a scrape must not cost the database a query."""

    def __init__(self, counts: Callable[[], Mapping[str, QueueCounts]]) -> None:
        """Take ``counts``, which returns what was counted last, and nothing before that."""
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
