"""Wires the jobs: their ledger, what tells of them, who runs them, and who may ask for them."""

import os
import secrets
import socket
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

from viralfx.adapters.codec import MsgspecCodec
from viralfx.adapters.memory import MemoryBell, MemoryJobLedger
from viralfx.bootstrap.modules import declared_tasks, load_tasks, registry_of
from viralfx.domain.clock import Clock
from viralfx.domain.errors import ConfigurationError
from viralfx.domain.health import HealthCheck
from viralfx.domain.jobs.backlog import BacklogCheck
from viralfx.domain.jobs.ledger import JobLedger
from viralfx.domain.jobs.ringing import Ringer
from viralfx.domain.jobs.service import JobService
from viralfx.domain.jobs.tasks import TaskRegistry
from viralfx.domain.jobs.transport import JobTransport
from viralfx.domain.jobs.watch import JobWatch
from viralfx.domain.jobs.worker import DrainJobs, JobWorker
from viralfx.domain.resilience.retry_policy import BackoffPolicy
from viralfx.settings import Settings

if TYPE_CHECKING:
    from viralfx.adapters.postgres import PostgresDatabase
    from viralfx.adapters.redis import RedisClient

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
        clock: Clock,
        make_worker: Callable[[Collection[str]], JobWorker],
    ) -> None:
        self.service = service
        self.tasks = tasks
        self.ledger = ledger
        self.transport = transport
        self.ringer = ringer
        self.check = check
        self.watch = JobWatch(service.get, clock)
        self.worker: JobWorker | None = None
        """Who runs jobs in this process; None: others do."""
        self._make_worker = make_worker
        if self.in_memory:
            self.employ(())

    @property
    def in_memory(self) -> bool:
        """Whether the jobs end with this process, so that nobody else could run them."""
        return isinstance(self.ledger, MemoryJobLedger)

    def employ(self, queues: Collection[str]) -> None:
        """Have this process run the jobs of ``queues``, or of all where there are none given."""
        self.worker = self._make_worker(queues)

    def dismiss(self) -> None:
        """Have this process run no jobs."""
        self.worker = None

    def start(self) -> None:
        """Begin to run jobs, if that is this process's work."""
        if self.worker is not None:
            self.worker.start()

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


def wire_jobs(
    settings: Settings,
    clock: Clock,
    *,
    database: "PostgresDatabase | None",
    redis: "RedisClient | None",
    functions: Sequence[object],
) -> JobSystem:
    """Wire the jobs; nothing runs yet.

    ``functions`` are an application's own tasks. Raises :class:`ConfigurationError`.
    """
    codec = MsgspecCodec()
    tasks = _tasks(settings, functions, codec)
    ledger = _ledger(database, clock)
    transport = _transport(database, redis, clock)
    ringer = Ringer(transport, clock=clock)
    service = JobService(
        ledger=ledger, tasks=tasks, codec=codec, queues=settings.queues, ring=ringer.ring
    )
    check = BacklogCheck(
        counts=service.counts,
        warn_after=settings.job.backlog_warn / 1000,
        remark="" if database is not None else ", in memory: their jobs end with this process",
    )

    def make_worker(queues: Collection[str]) -> JobWorker:
        job = settings.job
        return JobWorker(
            ledger=ledger,
            transport=transport,
            tasks=tasks,
            codec=codec,
            queues=dict.fromkeys(queues or settings.queues, job.concurrency),
            worker=_worker_name(),
            lease=job.lease / 1000,
            sweep_interval=job.sweep_interval / 1000,
            look_interval=job.look_interval / 1000,
            default_retry=BackoffPolicy(attempts=job.max_attempts),
            default_timeout=job.timeout / 1000,
            max_crashes=job.max_crashes,
            clock=clock,
            durable=database is not None,
        )

    return JobSystem(
        service=service,
        tasks=tasks,
        ledger=ledger,
        transport=transport,
        ringer=ringer,
        check=check,
        clock=clock,
        make_worker=make_worker,
    )


def _tasks(settings: Settings, functions: Sequence[object], codec: MsgspecCodec) -> TaskRegistry:
    loaded, problems = load_tasks(settings.task_modules)
    given, more = declared_tasks(functions)
    registry, wrong = registry_of([*loaded, *given], (), settings.queues, codec)
    if problems or more or wrong:
        raise ConfigurationError([*problems, *more, *wrong])
    return registry


def _ledger(database: "PostgresDatabase | None", clock: Clock) -> JobLedger:
    if database is None:
        return MemoryJobLedger(clock)
    from viralfx.bootstrap.postgres import job_ledger  # noqa: PLC0415 - without a driver in memory

    return job_ledger(database, clock)


def _transport(
    database: "PostgresDatabase | None", redis: "RedisClient | None", clock: Clock
) -> JobTransport:
    # A job in memory is nobody else's, so nobody else need hear of it.
    if database is None or redis is None:
        return MemoryBell(complete=database is None)
    from viralfx.bootstrap.bells import stream_transport  # noqa: PLC0415 - likewise

    return stream_transport(redis, clock)


def _worker_name() -> str:
    # The host and the process are for people; the rest makes it a name that nobody ever had.
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
