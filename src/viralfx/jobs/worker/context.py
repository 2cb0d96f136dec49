"""The dependencies that all parts of a worker share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from viralfx.core.clock import Clock
from viralfx.jobs.ledger import JobLedger
from viralfx.jobs.tasks import TaskRegistry
from viralfx.jobs.worker.availability import LedgerAvailability
from viralfx.jobs.worker.running import BegunJobs


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerContext:
    """Shared dependencies of all parts of one worker."""

    worker: str
    """The worker's name in the ledger."""
    tasks: TaskRegistry
    """The tasks that the worker knows; it claims jobs of no others."""
    ledger: JobLedger
    availability: LedgerAvailability
    clock: Clock
    notify: Callable[[str, Sequence[str]], None]
    """Announces due jobs, by queue and ids, to all workers; neither waits nor raises."""
    begun: BegunJobs = field(default_factory=BegunJobs)

    def has_limits(self, queue: str | None) -> bool:
        """Return True if tasks that declare a queue have limits; None: any queue.

        A submission may set another queue for its job.
        """
        return any(queue in (None, self.tasks.find(name).queue) for name in self.tasks.limits)
