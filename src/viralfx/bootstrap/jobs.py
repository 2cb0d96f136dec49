"""Wires the jobs of one process: ledger, notifications, worker, webhooks and alerts."""

import asyncio
import os
import secrets
import socket
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from viralfx.adapters.codec import MsgspecCodec
from viralfx.bootstrap.task_modules import (
    add_tasks,
    declared_tasks,
    load_tasks,
    registry_of,
    without_copies,
)
from viralfx.bootstrap.threaded import MakeService, ThreadedJobs
from viralfx.core.clock import Clock, supervised
from viralfx.core.errors import ConfigurationError, WorkLostError
from viralfx.core.events import Listener, Relay
from viralfx.core.loops import HomeLoop
from viralfx.domain.cache import SingleFlight
from viralfx.domain.health.model import HealthCheck
from viralfx.domain.health.monitor import HealthMonitor
from viralfx.domain.webhooks.delivery import (
    HostCircuits,
    WebhookDelivery,
    WebhookResponse,
    WebhookSender,
)
from viralfx.domain.webhooks.url import AllowList, Destination
from viralfx.jobs.alerts import HealthAlerts
from viralfx.jobs.codec import Codec
from viralfx.jobs.health import BacklogCheck
from viralfx.jobs.hooks import CombinedHooks, JobHooks, TaskHost, TaskMiddleware
from viralfx.jobs.ledger import Counts, JobLedger, LeaseStore, QueueCounts
from viralfx.jobs.memory import MemoryJobLedger, MemoryNotifier
from viralfx.jobs.notifier import BackgroundNotifier, JobNotifier
from viralfx.jobs.service import JobsApart, JobService
from viralfx.jobs.tasks import Task, TaskRegistry
from viralfx.jobs.worker import built_in_tasks
from viralfx.jobs.worker.calls import TaskCalls
from viralfx.jobs.worker.drain import drop_scheduled
from viralfx.jobs.worker.maintenance import Retention
from viralfx.jobs.worker.worker import JobWorker, WorkerConfig, drain_jobs
from viralfx.resilience.breaker import CircuitEvent
from viralfx.resilience.policy import BackoffPolicy
from viralfx.settings import Settings
from viralfx.settings.model import webhook_keys
from viralfx.telemetry.logging.events import JobLog, log_circuit
from viralfx.telemetry.logging.redaction import Redaction, secrets_of
from viralfx.telemetry.metrics import Metrics
from viralfx.telemetry.metrics.health import WebhookCircuitMetrics
from viralfx.telemetry.metrics.jobs import JobMetrics

if TYPE_CHECKING:
    from viralfx.adapters.redis import RedisClient
    from viralfx.postgres import PostgresDatabase
    from viralfx.telemetry.tracing.setup import Tracing


_NOTIFICATION_SHARE = 0.5
"""Share of the close budget for sending the waiting notifications."""


class JobRuntime:
    """The job runtime of a process: service, worker and alerts."""

    def __init__(
        self,
        *,
        service: JobService,
        tasks: TaskRegistry,
        codec: Codec,
        ledger: JobLedger,
        notifier: JobNotifier,
        background_notifier: BackgroundNotifier,
        counts: Counts,
        warn_after: float,
        alerts: HealthAlerts | None,
        clock: Clock,
        memory: MemoryJobLedger | None,
        make_worker: Callable[[Collection[str]], JobWorker],
        calls: TaskCalls,
        hosts: Mapping[int, TaskHost],
        load_late_tasks: Callable[[], bool],
    ) -> None:
        """Make the health check of the queues, and a worker if the jobs are in memory.

        ``counts`` counts for the health check; jobs that are due for longer than ``warn_after``
        seconds make it warn. ``memory`` is a ledger that ends with this process; None: it is
        durable. ``make_worker`` returns a worker for the given queues, or for all if none is given;
        ``calls`` calls its tasks. ``hosts`` are started and stopped with the worker.
        ``load_late_tasks`` adds tasks, and returns True if it did.
        """
        self.service = service
        self.tasks = tasks
        self.codec = codec
        self.ledger = ledger
        self.notifier = notifier
        self.background_notifier = background_notifier
        self.memory = memory
        self.in_memory = memory is not None
        """True if the jobs end with this process, so that no other process can run them."""
        self.check: HealthCheck = BacklogCheck(
            counts=self._count,
            warn_after=warn_after,
            remark=", in memory: their jobs end with this process" if self.in_memory else "",
            unrunnable=ledger.unrunnable,
            unrecorded=self._report_unrecorded,
        )
        self.alerts = alerts
        self.clock = clock
        self.calls = calls
        self._hosts = hosts
        self._starting: list[asyncio.Task[None]] = []
        self.follower = service.follower
        self.worker: JobWorker | None = None
        """The worker of this process; None if it runs no jobs."""
        self.alerting: asyncio.Task[None] | None = None
        self.make_worker = make_worker
        self._load_late_tasks = load_late_tasks
        self._count_ledger = counts
        self._counts: Mapping[str, QueueCounts] = {}
        self._counted_at = 0.0
        self.counted: Relay[Mapping[str, QueueCounts]] = Relay()
        if self.in_memory:
            self.enable_worker()
        tasks.load = self.load_late_tasks

    async def _count(self) -> Mapping[str, QueueCounts]:
        counts = self.service.every_queue(await self._count_ledger())
        self._counts, self._counted_at = counts, self.clock.monotonic()
        self.counted(counts)
        return counts

    def _report_unrecorded(self) -> Mapping[str, int]:
        return {} if self.worker is None else self.worker.report_unrecorded()

    @property
    def concurrency(self) -> Mapping[str, int]:
        """How many jobs of each queue this process runs at once; empty if it runs none."""
        return {} if self.worker is None else self.worker.concurrency

    @property
    def unrecorded(self) -> int:
        """How many outcomes this process has not recorded for longer than a lease."""
        return 0 if self.worker is None else self.worker.unrecorded

    @property
    def progress(self) -> Sequence[tuple[str, str, float]]:
        """Queue, task and progress from 0 to 1 of the running jobs that report a total."""
        return () if self.worker is None else self.worker.progress

    def counts_within(self, seconds: float) -> Mapping[str, QueueCounts]:
        """Return the last counts of the queues; nothing if they are older than ``seconds``.

        Old counts from an instance without database access must not override fresh ones from
        other instances.
        """
        return self._counts if self.clock.monotonic() - self._counted_at <= seconds else {}

    def enable_worker(self, queues: Collection[str] = ()) -> None:
        """Run the jobs of ``queues`` in this process, or of all queues if none is given.

        Raises :class:`ConfigurationError` if the settings do not allow it.
        """
        self.worker = self.make_worker(queues)

    def load_late_tasks(self) -> None:
        """Register tasks that modules have declared since this was wired.

        These are modules of TASK_MODULES, and that of the application. Call it once the application
        is imported. Raises :class:`ConfigurationError`.
        """
        if self._load_late_tasks() and self.worker is not None:
            self.enable_worker()

    def require_dependencies(self) -> None:
        """Raise :class:`ConfigurationError` if this process runs jobs of tasks it cannot call."""
        problems = [] if self.worker is None else list(self.calls.problems(self.tasks))
        if problems:
            raise ConfigurationError(problems)

    def disable_worker(self) -> None:
        """Run no jobs in this process."""
        self.worker = None

    def start(self) -> None:
        """Start the worker, if there is one, and the alerts; no task is added from now on."""
        self.tasks.load = None
        if self.worker is not None:
            if not self._starting:
                self._starting = [
                    supervised(host.start_worker(), "task-host") for host in self._hosts.values()
                ]
            self.worker.start()
        if self.alerts is not None and self.alerting is None:
            self.alerting = asyncio.create_task(self.alerts.run(), name="alerts")

    def stop_accepting(self) -> None:
        """End all job event streams, and accept no more jobs if they are in memory."""
        self.follower.end()
        if self.memory is not None:
            self.memory.close()

    async def drain(self, budget: float) -> None:
        """Drain the worker of this process, if it has one; raises as :func:`drain_jobs` does."""
        if self.worker is not None:
            try:
                await drain_jobs(self.worker, budget)
            finally:
                for host in self._hosts.values() if self._starting else ():
                    await host.stop_worker()
        elif self.in_memory and (lost := drop_scheduled(await self.ledger.counts())):
            raise WorkLostError(f"{lost} in-memory jobs were due and had no worker")

    async def stop_alerts(self, budget: float) -> None:
        """Submit the waiting alerts, then stop sending alerts.

        The memory ledger accepts no more jobs at this point, so its alerts are dropped at once.
        """
        if self.alerts is None or self.alerting is None:
            return
        try:
            if not self.in_memory:
                await self.alerts.drain(budget)
        finally:
            self.alerting.cancel()

    async def close_notifier(self, budget: float) -> None:
        """Send the waiting notifications within half of ``budget``, then close the notifier."""
        try:
            await self.background_notifier.close(budget * _NOTIFICATION_SHARE)
        finally:
            await self.notifier.close()


def wire_webhooks(
    settings: Settings,
    clock: Clock,
    *,
    listeners: tuple[Listener[CircuitEvent], ...] = (),
    tracing: "Tracing | None" = None,
) -> WebhookDelivery:
    """Wire the delivery of webhooks; the settings must be validated.

    The HTTP client is loaded with the first webhook. ``listeners`` receive the events of the
    receivers' circuit breakers.
    """
    if tracing is not None:
        listeners = (*listeners, tracing.on_circuit)
    allowed = AllowList(settings.webhook.allowed_hosts, also=alert_url(settings))
    return WebhookDelivery(
        allowed=allowed,
        keys=webhook_keys(settings),
        sender=_LateSender(lambda: _sender(settings, allowed, tracing)),
        circuits=HostCircuits(listeners=(log_circuit, *listeners), clock=clock),
        clock=clock,
    )


def alert_url(settings: Settings) -> str | None:
    """Return the address that alerts are sent to; None if there is none."""
    return None if settings.alert_webhook_url is None else settings.alert_webhook_url.value.strip()


def wire_alerts(
    settings: Settings, clock: Clock, service: JobService, monitor: HealthMonitor, instance: str
) -> HealthAlerts | None:
    """Subscribe alerts to the monitor; return None if no alert address is set.

    ``instance`` is this process's name. The caller runs ``run()`` in a task, and
    :meth:`JobRuntime.stop_alerts` ends it.
    """
    if settings.alert_webhook_url is None:
        return None
    alerts = HealthAlerts(
        service,
        clock=clock,
        instance=instance,
        environment=settings.environment,
        shared=lambda check: monitor.policy(check).shared,
        keys=webhook_keys(settings),
    )
    monitor.subscribe(alerts)
    return alerts


def _sender(settings: Settings, allowed: AllowList, tracing: "Tracing | None") -> WebhookSender:
    # Imported late: most processes send no webhook, and it costs as much as the rest of a start.
    from viralfx.adapters.http import HttpWebhookSender  # noqa: PLC0415

    sender = HttpWebhookSender(allowed.check_addresses, timeout=settings.webhook.timeout)
    return sender if tracing is None else tracing.webhooks(sender)


class _LateSender:
    """Makes the sender, in a thread, for the first webhook."""

    def __init__(self, make: Callable[[], WebhookSender]) -> None:
        self._make = make
        self._making = SingleFlight[WebhookSender]()
        self._sender: WebhookSender | None = None

    async def post(
        self, destination: Destination, headers: Mapping[str, str], body: bytes
    ) -> WebhookResponse:
        """Send a webhook, as :meth:`WebhookSender.post` does."""
        if self._sender is None:
            self._sender = await self._making.run("", lambda: asyncio.to_thread(self._make))
        return await self._sender.post(destination, headers, body)


_MIN_POOL_CONNECTIONS = 3
"""With fewer connections the tasks of a worker could block the renewal of its lease."""


def wire_jobs(
    settings: Settings,
    clock: Clock,
    monitor: HealthMonitor,
    *,
    database: "PostgresDatabase | None",
    redis: "RedisClient | None",
    functions: Sequence[object],
    own_tasks: Callable[[], Sequence[Task]] = tuple,
    middleware: Sequence[TaskMiddleware] = (),
    metrics: Metrics,
    instance: str,
    tracing: "Tracing | None" = None,
    counts: Counts | None = None,
    home: HomeLoop | None = None,
) -> JobRuntime:
    """Wire the jobs; nothing runs yet.

    ``functions`` are an application's own tasks, and ``middleware`` is around all tasks.
    ``own_tasks`` returns those that its module has declared so far; they are registered before the
    start.
    ``instance`` is this process's name. ``counts`` replaces the ledger's counts in the health
    check. ``home`` is the event loop of the services. Raises :class:`ConfigurationError`.
    """
    codec = MsgspecCodec()
    ledger, memory = _ledger(settings, database, redis, clock, home)
    receivers = WebhookCircuitMetrics(metrics.registry)
    retention = Retention(finished=settings.job.retention, failed=settings.job.retention_failed)
    built_in = built_in_tasks(
        ledger=ledger,
        monitor=monitor,
        clock=clock,
        delivery=wire_webhooks(settings, clock, listeners=(receivers,), tracing=tracing),
        alert_url=alert_url(settings),
        webhook_timeout=settings.webhook.timeout,
        retention=retention,
        instance=instance,
    )
    check = partial(add_tasks, queues=settings.queues, codec=codec, check_results=not middleware)
    tasks = _tasks(settings, functions, built_in, check)
    queue_of = {task.name: task.queue for task in tasks}
    hooks: JobHooks = JobMetrics(metrics.registry, queue_of, settings.queues, metrics.exemplar)
    if tracing is not None:
        hooks = CombinedHooks(tracing.jobs, hooks)
    hooks = JobLog(hooks)
    notifier = _notifier(settings, database, redis, clock)
    background_notifier = BackgroundNotifier(notifier, clock=clock)
    calls = TaskCalls(middleware, built_in={task.name for task in built_in})

    def make_service(
        ledger: JobLedger,
        background: BackgroundNotifier,
        home: HomeLoop | None,
        apart: JobsApart | None = None,
    ) -> JobService:
        return JobService(
            clock=clock,
            ledger=ledger,
            tasks=tasks,
            codec=codec,
            queues=settings.queues,
            notify=background.notify,
            hooks=hooks,
            max_payload_bytes=settings.job.max_result_bytes,
            home=home,
            apart=apart,
        )

    apart = _jobs_apart(settings, database, redis, clock, make_service)
    service = make_service(ledger, background_notifier, home, apart)

    def make_worker(queues: Collection[str]) -> JobWorker:
        job = settings.job
        if database is not None and settings.db.pool_max < _MIN_POOL_CONNECTIONS:
            problem = (
                f"DB_POOL_MAX: {settings.db.pool_max} is too few to run jobs: a transactional task,"
                " the claims and the outcomes need a connection each; set at least"
                f" {_MIN_POOL_CONNECTIONS}"
            )
            raise ConfigurationError([problem])
        config = WorkerConfig(
            name=instance,
            queues=settings.concurrency_of(queues or settings.queues),
            lease=job.lease,
            sweep_interval=job.sweep_interval,
            poll_interval=job.poll_interval,
            default_retry=BackoffPolicy(attempts=job.max_attempts),
            default_timeout=job.timeout,
            max_crashes=job.max_crashes,
            max_result_bytes=job.max_result_bytes,
            unknown_patience=job.unknown_patience,
            retention=retention,
            durable=database is not None,
        )
        return JobWorker(
            config,
            ledger=ledger,
            notifier=notifier,
            tasks=tasks,
            codec=codec,
            clock=clock,
            hooks=hooks,
            clean=Redaction(secrets_of(settings)).text,
            submit=service.submit,
            open_lease_store=None if database is None else partial(_lease_store, database),
            calls=calls,
        )

    hosts: dict[int, TaskHost] = {}

    def attach_hosts() -> None:
        found = [task.host for task in tasks if isinstance(task.host, TaskHost)]
        found += [each for each in functions if isinstance(each, TaskHost)]
        for host in found:
            if id(host) not in hosts:
                hosts[id(host)] = host
                host.attach(service, tasks)

    def load_late_tasks() -> bool:
        known = len(tasks.names)
        late, problems = load_tasks(settings)
        problems += check(tasks, late)
        own = without_copies(tasks, own_tasks())
        problems += [*check(tasks, own), *(settings.jobs_in_memory() if own else ())]
        if problems:
            raise ConfigurationError(problems)
        queue_of.update({task.name: task.queue for task in tasks})
        attach_hosts()
        return len(tasks.names) > known

    attach_hosts()
    return JobRuntime(
        service=service,
        tasks=tasks,
        codec=codec,
        ledger=ledger,
        notifier=notifier,
        background_notifier=background_notifier,
        counts=counts or ledger.counts,
        warn_after=settings.job.backlog_warn,
        alerts=wire_alerts(settings, clock, service, monitor, instance),
        clock=clock,
        memory=memory,
        make_worker=make_worker,
        calls=calls,
        hosts=hosts,
        load_late_tasks=load_late_tasks,
    )


def _tasks(
    settings: Settings,
    functions: Sequence[object],
    built_in: Sequence[Task],
    add: Callable[[TaskRegistry, Iterable[Task]], Iterable[str]],
) -> TaskRegistry:
    loaded, problems = load_tasks(settings)
    given, more = declared_tasks(functions)
    registry = registry_of(built_in, settings.queues)
    problems += [*more, *add(registry, [*loaded, *given])]
    if problems:
        raise ConfigurationError(problems)
    return registry


def _ledger(
    settings: Settings,
    database: "PostgresDatabase | None",
    redis: "RedisClient | None",
    clock: Clock,
    home: HomeLoop | None = None,
) -> tuple[JobLedger, MemoryJobLedger | None]:
    """Return the ledger, and the same again if it is in memory."""
    if database is None:
        memory = MemoryJobLedger(clock, max_unfinished=settings.job.memory_max_jobs, home=home)
        return memory, memory
    from viralfx.bootstrap.postgres import job_ledger  # noqa: PLC0415 - without a driver in memory

    return job_ledger(database, clock, notifies=redis is None), None


def _jobs_apart(
    settings: Settings,
    database: "PostgresDatabase | None",
    redis: "RedisClient | None",
    clock: Clock,
    make_service: MakeService,
) -> JobsApart | None:
    if database is None:
        return None

    def connect(
        database: "PostgresDatabase", redis: "RedisClient | None"
    ) -> tuple[JobLedger, JobNotifier]:
        ledger, _ = _ledger(settings, database, redis, clock)
        return ledger, _notifier(settings, database, redis, clock)

    return ThreadedJobs(database, redis, clock=clock, connect=connect, make_service=make_service)


def _lease_store(database: "PostgresDatabase") -> LeaseStore:
    from viralfx.bootstrap.postgres import lease_store  # noqa: PLC0415 - without a driver in memory

    return lease_store(database)


def _notifier(
    settings: Settings,
    database: "PostgresDatabase | None",
    redis: "RedisClient | None",
    clock: Clock,
) -> JobNotifier:
    # Only this process runs jobs in memory, so no other process needs the notifications.
    if database is None:
        return MemoryNotifier()
    if redis is None:
        from viralfx.bootstrap import postgres  # noqa: PLC0415 - without a driver in memory

        return postgres.notifier(settings, database, clock)
    from viralfx.adapters.taskiq import StreamNotifier  # noqa: PLC0415 - without taskiq otherwise

    return StreamNotifier(redis, clock=clock)


def instance_name() -> str:
    """Return a name for this process that is unique among all that share a ledger."""
    # Host and process id are for people; the random suffix makes the name unique.
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
