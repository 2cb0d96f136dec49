"""Wires the jobs: their ledger, what tells of them, who runs them, and who may ask for them."""

import os
import secrets
import socket
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from viralfx.adapters.codec import MsgspecCodec
from viralfx.adapters.memory import MemoryBell, MemoryJobLedger
from viralfx.bootstrap.job_system import JobSystem
from viralfx.bootstrap.modules import declared_tasks, load_tasks, registry_of
from viralfx.bootstrap.webhooks import alert_url, wire_alerts, wire_webhooks
from viralfx.domain.clock import Clock
from viralfx.domain.errors import ConfigurationError
from viralfx.domain.jobs.backlog import BacklogCheck
from viralfx.domain.jobs.ledger import Counts, JobLedger, QueueCounts
from viralfx.domain.jobs.observing import JobObserver, Observers
from viralfx.domain.jobs.ringing import Ringer
from viralfx.domain.jobs.service import JobService
from viralfx.domain.jobs.tasks import Task, TaskRegistry
from viralfx.domain.jobs.transport import JobTransport
from viralfx.domain.jobs.worker import JobWorker
from viralfx.domain.monitor import HealthMonitor
from viralfx.domain.resilience.retry_policy import BackoffPolicy
from viralfx.settings import Settings
from viralfx.telemetry.job_log import JobLog
from viralfx.telemetry.metrics import Metrics
from viralfx.telemetry.metrics.jobs import JobMetrics
from viralfx.telemetry.metrics.resilience import ReceiverCircuits
from viralfx.telemetry.redaction import Redaction, secrets_of
from viralfx.worker import built_in_periodic, built_in_tasks

if TYPE_CHECKING:
    from viralfx.adapters.postgres import PostgresDatabase
    from viralfx.adapters.redis import RedisClient
    from viralfx.telemetry.tracing.wiring import Tracing

_LEAST_POOL = 3
"""Connections without which a worker could lose its jobs to its own tasks."""


def wire_jobs(
    settings: Settings,
    clock: Clock,
    monitor: HealthMonitor,
    *,
    database: "PostgresDatabase | None",
    redis: "RedisClient | None",
    functions: Sequence[object],
    metrics: Metrics,
    instance: str,
    tracing: "Tracing | None" = None,
    counts: Counts | None = None,
) -> JobSystem:
    """Wire the jobs; nothing runs yet.

    ``functions`` are an application's own tasks. ``instance`` is this process's name. ``counts``
    is how the health check counts, if not at the ledger. Raises :class:`ConfigurationError`.
    """
    codec = MsgspecCodec()
    ledger = _ledger(database, clock)
    receivers = ReceiverCircuits(metrics.registry)
    built_in = built_in_tasks(
        ledger=ledger,
        monitor=monitor,
        clock=clock,
        delivery=wire_webhooks(settings, clock, listeners=(receivers,), tracing=tracing),
        alert_url=alert_url(settings),
        webhook_timeout=settings.webhook.timeout / 1000,
        retention=settings.job.retention / 1000,
        instance=instance,
    )
    tasks = _tasks(settings, functions, built_in, codec)
    observer: JobObserver = JobMetrics(
        metrics.registry,
        {task.name: task.queue for task in tasks},
        settings.queues,
        metrics.exemplar,
    )
    if tracing is not None:
        observer = Observers(tracing.jobs, observer)
    observer = JobLog(observer)
    transport = _transport(database, redis, clock)
    ringer = Ringer(transport, clock=clock)
    service = JobService(
        ledger=ledger,
        tasks=tasks,
        codec=codec,
        queues=settings.queues,
        ring=ringer.ring,
        observer=observer,
    )

    def make_worker(queues: Collection[str]) -> JobWorker:
        job = settings.job
        if database is not None and settings.db.pool_max < _LEAST_POOL:
            problem = (
                f"DB_POOL_MAX: {settings.db.pool_max} is too few to run jobs: a transactional task,"
                " the claims and the outcomes need a connection each; set at least"
                f" {_LEAST_POOL}"
            )
            raise ConfigurationError([problem])
        return JobWorker(
            ledger=ledger,
            transport=transport,
            tasks=tasks,
            codec=codec,
            queues=dict.fromkeys(queues or settings.queues, job.concurrency),
            worker=instance,
            lease=job.lease / 1000,
            sweep_interval=job.sweep_interval / 1000,
            look_interval=job.look_interval / 1000,
            default_retry=BackoffPolicy(attempts=job.max_attempts),
            default_timeout=job.timeout / 1000,
            max_crashes=job.max_crashes,
            clock=clock,
            periodic=built_in_periodic(),
            durable=database is not None,
            observer=observer,
            clean=Redaction(secrets_of(settings)).text,
        )

    count = counts or ledger.counts

    async def count_every_queue() -> Mapping[str, QueueCounts]:
        counted = service.every_queue(await count())
        system.counted(counted)
        return counted

    system = JobSystem(
        service=service,
        tasks=tasks,
        ledger=ledger,
        transport=transport,
        ringer=ringer,
        check=BacklogCheck(
            counts=count_every_queue,
            warn_after=settings.job.backlog_warn / 1000,
            remark="" if database is not None else ", in memory: their jobs end with this process",
        ),
        alerts=wire_alerts(settings, clock, service, monitor, instance),
        clock=clock,
        make_worker=make_worker,
    )
    return system


def _tasks(
    settings: Settings,
    functions: Sequence[object],
    built_in: Sequence[Task],
    codec: MsgspecCodec,
) -> TaskRegistry:
    loaded, problems = load_tasks(settings)
    given, more = declared_tasks(functions)
    registry, wrong = registry_of([*loaded, *given], built_in, settings.queues, codec)
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


def instance_name() -> str:
    """Make the name of this process, among all that share a ledger."""
    # The host and the process are for people; the rest makes it a name that nobody ever had.
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
