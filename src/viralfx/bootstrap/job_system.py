"""The jobs of one process: who accepts and who runs them, when they begin and how they are left."""

import asyncio
from collections.abc import Callable, Collection, Mapping

from viralfx.adapters.memory import MemoryJobLedger
from viralfx.domain.clock import Clock
from viralfx.domain.errors import WorkLostError
from viralfx.domain.health import HealthCheck
from viralfx.domain.jobs.alerts import HealthAlerts, StopAlerts
from viralfx.domain.jobs.ledger import JobLedger, QueueCounts
from viralfx.domain.jobs.ringing import Ringer
from viralfx.domain.jobs.service import JobService
from viralfx.domain.jobs.tasks import TaskRegistry
from viralfx.domain.jobs.transport import JobTransport
from viralfx.domain.jobs.watch import JobWatch
from viralfx.domain.jobs.worker import DrainJobs, JobWorker

_BELL_SHARE = 0.5
"""Part of the budget for closing that the last bells may take."""


class JobSystem:
    """Everything about jobs in one process."""

    def __init__(
        self,
        *,
        service: JobService,
        tasks: TaskRegistry,
        ledger: JobLedger,
        transport: JobTransport,
        ringer: Ringer,
        check: HealthCheck,
        alerts: HealthAlerts | None,
        clock: Clock,
        make_worker: Callable[[Collection[str]], JobWorker],
    ) -> None:
        """``make_worker`` makes who runs the jobs of some queues, or of all where none is named."""
        self.service = service
        self.tasks = tasks
        self.ledger = ledger
        self.transport = transport
        self.ringer = ringer
        self.check = check
        self.alerts = alerts
        self.clock = clock
        self.watch = JobWatch(service.get, clock)
        self.worker: JobWorker | None = None
        """Who runs jobs in this process; None: others do."""
        self.alerting: asyncio.Task[None] | None = None
        self._make_worker = make_worker
        self._counts: Mapping[str, QueueCounts] = {}
        self._counted_at = 0.0
        if self.in_memory:
            self.employ()

    @property
    def in_memory(self) -> bool:
        """Whether the jobs end with this process, so that nobody else could run them."""
        return isinstance(self.ledger, MemoryJobLedger)

    def counted(self, counts: Mapping[str, QueueCounts]) -> None:
        """Keep how the queues stand now."""
        self._counts, self._counted_at = counts, self.clock.monotonic()

    def counts_within(self, seconds: float) -> Mapping[str, QueueCounts]:
        """Return how the queues stood when they were counted last; nothing if that is longer ago.

        What somebody remembers who has lost the database must not outvote those who have not.
        """
        return self._counts if self.clock.monotonic() - self._counted_at <= seconds else {}

    def employ(self, queues: Collection[str] = ()) -> None:
        """Have this process run the jobs of ``queues``, or of all where none is named.

        Raises :class:`ConfigurationError` where it could not.
        """
        self.worker = self._make_worker(queues)

    def dismiss(self) -> None:
        """Have this process run no jobs."""
        self.worker = None

    def start(self) -> None:
        """Begin to run jobs, if that is this process's work, and to send alerts."""
        if self.worker is not None:
            self.worker.start()
        if self.alerts is not None and self.alerting is None:
            self.alerting = asyncio.create_task(self.alerts.run(), name="alerts")

    def leave(self) -> None:
        """Let nobody wait for news, and in memory take no job that could not be run any more."""
        self.watch.end()
        if isinstance(self.ledger, MemoryJobLedger):
            self.ledger.close()


class DrainWorker:
    """Shutdown stage: lets the worker of this process leave, if there is one."""

    def __init__(self, jobs: JobSystem) -> None:
        self._jobs = jobs

    async def run(self, budget: float) -> None:
        """Finish what can be, hand back the rest; raises as :class:`DrainJobs` does."""
        if self._jobs.worker is not None:
            await DrainJobs(self._jobs.worker).run(budget)
        elif self._jobs.in_memory:
            counts = (await self._jobs.ledger.counts()).values()
            if lost := sum(queue.waiting + queue.scheduled for queue in counts):
                raise WorkLostError(f"{lost} in-memory jobs were run by nobody")


class EndAlerts:
    """Shutdown stage: hands over the alerts that wait, and sends no more."""

    def __init__(self, jobs: JobSystem) -> None:
        self._jobs = jobs

    async def run(self, budget: float) -> None:
        """Wait for the ledger a little; one in memory takes no alert any more."""
        jobs = self._jobs
        if jobs.alerts is None or jobs.alerting is None:
            return
        try:
            if not jobs.in_memory:
                await StopAlerts(jobs.alerts, jobs.clock).run(budget)
        finally:
            jobs.alerting.cancel()


class CloseBells:
    """Shutdown stage: rings what is still to be rung, and lets go of the transport."""

    def __init__(self, jobs: JobSystem) -> None:
        self._jobs = jobs

    async def run(self, budget: float) -> None:
        """Close both."""
        try:
            await self._jobs.ringer.close(budget * _BELL_SHARE)
        finally:
            await self._jobs.transport.close()
