"""The composition root: wires services from settings."""

import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from viralfx.adapters.codec import MsgspecCodec
from viralfx.adapters.memory import (
    FileStateStore,
    MemoryCacheStore,
    MemoryDatabase,
    MemoryRedis,
    MemoryStateStore,
)
from viralfx.adapters.process_memory import ProcessMemory
from viralfx.bootstrap.audit import wire_audit
from viralfx.bootstrap.doctor import ConfigurationSource
from viralfx.bootstrap.fleet import wire_fleet
from viralfx.bootstrap.jobs import JobRuntime, instance_name, wire_jobs
from viralfx.core.clock import Clock, SystemClock
from viralfx.core.errors import ConfigurationError, suggest
from viralfx.core.extras import MissingExtraError, missing
from viralfx.core.loops import HomeLoop
from viralfx.domain.cache import Cache, CacheStore
from viralfx.domain.fleet import FleetReporter, FleetStore
from viralfx.domain.health.check_runner import AnyCheck, CheckConfig, prepare_checks
from viralfx.domain.health.circuits import BreakerRegistry
from viralfx.domain.health.model import AnyHealthCheck, CheckPolicy, HealthReport, Lifecycle, State
from viralfx.domain.health.monitor import HealthMonitor
from viralfx.domain.operations import Backend, Operations, StateStore, save_state
from viralfx.domain.shutdown import AnyStage, Phase, ShutdownSequence
from viralfx.jobs.hooks import TaskMiddleware
from viralfx.jobs.ledger import Counts
from viralfx.jobs.tasks import Task
from viralfx.resilience.breaker import CircuitBreaker
from viralfx.resilience.retry import Retrier
from viralfx.resilience.retry_decision import listen_to_retries
from viralfx.settings import CredentialsCallable, Settings, prefixed
from viralfx.telemetry import hide_opentelemetry
from viralfx.telemetry.logging.events import (
    HealthLog,
    log_circuit,
    log_lifecycle,
    log_settings,
    log_shutdown,
)
from viralfx.telemetry.logging.redaction import Redaction, secrets_of
from viralfx.telemetry.metrics import Metrics, MetricsRegistry, problems_with_registries
from viralfx.telemetry.metrics.backends import (
    OperationMetrics,
    PoolMetrics,
    RedisMetrics,
    VacuumMetrics,
)
from viralfx.telemetry.metrics.health import (
    CircuitMetrics,
    HealthMetrics,
    LoopLag,
    LossMetrics,
    RetryMetrics,
)
from viralfx.telemetry.metrics.jobs import ProgressMetrics, QueueMetrics, unrecorded_outcomes
from viralfx.telemetry.metrics.series import current_exemplar
from viralfx.telemetry.tracing import start_tracing

if TYPE_CHECKING:
    from viralfx.adapters.redis import RedisClient
    from viralfx.postgres import PostgresDatabase
    from viralfx.telemetry.tracing.setup import Tracing


BUILT_IN = ("database", "redis", "memory", "queues", "circuits")

# An outage of one of these affects all instances at once.
_SHARED = frozenset({"database", "redis", "queues"})

# One query of the database serves both checks.
_FOLLOWS = {"queues": "database"}

_CHECK_NAME = re.compile(r"[a-z][a-z0-9_-]*").fullmatch
# These are paths below /health already.
_RESERVED = frozenset(
    {
        "group",
        "live",
        "ready",
        "startup",
        "detailed",
        "info",
        "tasks",
        "shutdown",
        "loggers",
        "ui",
        "events",
    }
)


def _is_name(name: object) -> bool:
    return isinstance(name, str) and _CHECK_NAME(name) is not None


def problems_with_names(own: Collection[str], settings: Settings) -> Iterator[str]:
    """Yield problems with the names of an application's checks, also in settings."""
    for name in BUILT_IN:
        if name in own:
            yield f"OperationsConfig.checks: {name!r} is a built-in check; choose another name"
    for name in own:
        if name in _RESERVED or not _is_name(name):
            yield (
                f"OperationsConfig.checks: {name!r} cannot be a check's name; use small letters,"
                f" digits, - and _, and none of {', '.join(sorted(_RESERVED))}"
            )
    every_check = (*own, *BUILT_IN)
    yield from _unknown_checks("HEALTH_CRITICAL", settings.health_critical, every_check)
    yield from _unknown_checks("READINESS_REQUIRES", settings.readiness_requires, every_check)


def problems_with_groups(
    groups: Mapping[str, Sequence[str]], checks: Collection[str]
) -> Iterator[str]:
    """Yield problems with the names of an application's groups, and of the checks in them."""
    for name, members in groups.items():
        where = f"OperationsConfig.groups: {name!r}"
        if not _is_name(name):
            yield f"{where} cannot be a group's name; use small letters, digits, - and _"
        given: object = members
        if isinstance(given, str) or not isinstance(given, Collection) or not given:
            yield f"{where} must be a list of at least one check"
        else:
            yield from _unknown_checks(where, members, checks)


def problems_with_retriers(own: Sequence[Retrier]) -> Iterator[str]:
    """Yield problems with the names of an application's retriers."""
    names = [retrier.name for retrier in own]
    if None in names:
        yield 'OperationsConfig.retriers: one has no name; make it with retry(name="...")'
    for name in sorted({name for name in names if name is not None and names.count(name) > 1}):
        yield f"OperationsConfig.retriers: a retrier named {name!r} is registered already"


def policy_of(name: str, settings: Settings, own: CheckConfig | None = None) -> CheckPolicy:
    """Return interval, timeout and thresholds of a check; those of ``own`` come first."""
    interval = settings.health_check_interval
    if own is not None:
        return CheckPolicy(
            interval=own.interval or interval,
            retry_interval=min(own.interval or interval, interval),
            timeout=own.timeout or settings.health_check_timeout,
            failure_threshold=own.failure_threshold or settings.health_failure_threshold,
            recovery_threshold=own.recovery_threshold or settings.health_recovery_threshold,
            critical=name in settings.health_critical,
            required_for_readiness=own.required or name in settings.readiness_requires,
            shared=own.shared,
        )
    # Memory usage has short peaks: one sample above the limit does not change the status.
    minimum = 2 if name == "memory" else 1
    return CheckPolicy(
        interval=settings.db.health_check_interval if name == "database" else interval,
        retry_interval=interval,
        timeout=settings.health_check_timeout,
        failure_threshold=max(minimum, settings.health_failure_threshold),
        recovery_threshold=max(minimum, settings.health_recovery_threshold),
        critical=name in settings.health_critical,
        required_for_readiness=name in settings.readiness_requires,
        shared=name in _SHARED,
        follows=_FOLLOWS.get(name),
    )


def _unknown_checks(variable: str, names: Iterable[str], checks: Collection[str]) -> Iterator[str]:
    for name in names:
        if name not in checks:
            hint = suggest(str(name), checks) or f"there are {', '.join(checks)}"
            yield f"{variable}: there is no check named {name!r}; {hint}"


def measure(
    metrics: Metrics,
    operations: Operations,
    jobs: JobRuntime,
    retriers: Iterable[Retrier],
    lost_spans: Callable[[], int] | None = None,
    *,
    database: "PostgresDatabase | None",
    redis: "RedisClient | None",
) -> None:
    """Register metrics of all wired services. ``retriers`` are those of the application."""
    registry = metrics.registry
    HealthMetrics(registry, operations)
    CircuitMetrics(registry, operations.breakers)
    retries = RetryMetrics(registry, operations.clock)
    for retrier in retriers:
        retries.add(retrier)
    # The same limit as for the result of a check.
    max_age = operations.monitor.policy("queues").oldest_allowed
    registry.register(QueueMetrics(lambda: jobs.counts_within(max_age)))
    registry.register(LossMetrics(lost_spans))
    registry.register(ProgressMetrics(lambda: jobs.progress))
    unrecorded_outcomes(registry).set_function(lambda: jobs.unrecorded)
    times = OperationMetrics(registry, metrics.exemplar)
    if database is not None:
        registry.register(PoolMetrics(database, database.config.settings.pool_max))
        registry.register(VacuumMetrics(lambda: database.vacuum))
        database.queries.observe = partial(times.observe, "postgresql")
        database.retries.subscribe(retries)
    if redis is not None:
        registry.register(
            RedisMetrics(
                redis.traffic,
                available=lambda: redis.available,
                memory=lambda: redis.memory.usage if redis.available else None,
            )
        )
        redis.traffic.observe = partial(times.observe, "redis")


def wire_tracing(settings: Settings, instance: str) -> "Tracing | None":
    """Start tracing; None if no endpoint is set. ``instance`` is the name of this process.

    Raises :class:`ConfigurationError` for invalid values of ``OTEL_*``.
    """
    clean_sql = None
    if settings.database_url is not None:
        # Imported late: a process without Postgres does not need the driver.
        from viralfx.bootstrap.postgres import clean_statement  # noqa: PLC0415

        clean_sql = clean_statement
    return start_tracing(
        instance=instance,
        environment=settings.environment,
        clean=Redaction(secrets_of(settings)).text,
        clean_sql=clean_sql,
    )


def trace(
    tracing: "Tracing",
    operations: Operations,
    *,
    database: "PostgresDatabase | None",
    redis: "RedisClient | None",
) -> None:
    """Enable tracing of all wired services."""
    if database is not None:
        tracing.asyncpg()
    if redis is not None:
        tracing.redis(redis.redis)
    operations.breakers.subscribe(tracing.on_circuit)
    listen_to_retries(tracing.on_retry)
    operations.shutdown.subscribe(tracing.on_shutdown)
    # Last, so that the trace contains the runner's own stages.
    operations.shutdown.register(Phase.CLOSE, "telemetry", tracing.flush, last=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Assembly:
    """All wired services. ``database`` and ``redis`` are None if memory adapters are used."""

    operations: Operations
    database: "PostgresDatabase | None"
    redis: "RedisClient | None"
    cache: Cache
    jobs: JobRuntime
    metrics: Metrics
    fleet: FleetStore
    source: ConfigurationSource
    tracing: "Tracing | None" = None


def assemble(
    settings: Settings,
    *,
    checks: Mapping[str, AnyCheck] | None = None,
    groups: Mapping[str, Sequence[str]] | None = None,
    registries: Sequence[MetricsRegistry] = (),
    stages: Mapping[Phase, Mapping[str, AnyStage]] | None = None,
    breakers: Iterable[CircuitBreaker] = (),
    retriers: Sequence[Retrier] = (),
    tasks: Sequence[object] = (),
    own_tasks: Callable[[], Sequence[Task]] = tuple,
    task_middleware: Sequence[TaskMiddleware] = (),
    database_password: CredentialsCallable | None = None,
    redis_credentials: CredentialsCallable | None = None,
    env_prefix: str = "",
    clock: Clock | None = None,
) -> Assembly:
    """Wire the operations layer and its services; nothing runs or connects yet.

    ``checks``, ``groups``, ``stages``, ``breakers``, ``retriers`` and ``tasks`` are those of the
    application, in addition to the built-in ones; ``task_middleware`` is around all tasks.
    ``own_tasks`` returns the tasks that its module has declared so far.
    ``database_password`` and ``redis_credentials`` are called for each connection. ``env_prefix``
    is that of the variables. Raises :class:`ConfigurationError` for a duplicate or missing name, a
    setting that names an unknown check, tasks that cannot be loaded, and jobs of the application
    that production would keep in memory; and :class:`MissingExtraError`, which is one, for extras
    that the settings need.
    """
    clock = clock or SystemClock()
    log_settings(settings)
    if absent := missing(settings.needs):
        raise MissingExtraError(prefixed(line, env_prefix) for line in absent)
    memory = ProcessMemory()
    circuits, lifecycle, home = BreakerRegistry(), Lifecycle(clock), HomeLoop()
    monitor = HealthMonitor(clock=clock, fail_open_after=settings.readiness_fail_open_after)
    database, counts, database_backend = _database(settings, clock, monitor, database_password)
    redis, cache_store, redis_backend = _redis(settings, clock, monitor, redis_credentials, home)
    # In the order of shutdown.
    backends = {"redis": redis_backend, "database": database_backend}
    own, problems = prepare_checks(checks or {})
    problems = [
        *problems_with_names(checks or {}, settings),
        *problems,
        *problems_with_groups(groups or {}, (*(checks or {}), *BUILT_IN)),
        *problems_with_registries(registries),
    ]
    if tasks or settings.task_modules:
        problems += settings.jobs_in_memory()
    for breaker in breakers:
        try:
            circuits.add(breaker)
        except ValueError as error:
            problems.append(f"OperationsConfig.breakers: {error}")
    problems += problems_with_retriers(retriers)
    metrics = Metrics(current_exemplar, () if problems else registries)
    lag = LoopLag(metrics.registry)
    instance = instance_name()
    tracing = wire_tracing(settings, instance)
    try:
        jobs = wire_jobs(
            settings,
            clock,
            monitor,
            database=database,
            redis=redis,
            functions=tasks,
            own_tasks=own_tasks,
            middleware=task_middleware,
            metrics=metrics,
            instance=instance,
            tracing=tracing,
            counts=counts,
            home=home if database is None else database.home,
        )
    except ConfigurationError as error:
        raise ConfigurationError([*problems, *error.problems]) from None
    if problems:
        raise ConfigurationError(problems)

    built_in: dict[str, AnyHealthCheck] = {
        "database": backends["database"].check,
        "redis": backends["redis"].check,
        "memory": memory,
        "queues": jobs.check,
        "circuits": circuits,
    }
    for name, check in built_in.items():
        monitor.register(name, check, policy_of(name, settings))
    for name, (check, limits) in own.items():
        monitor.register(name, check, policy_of(name, settings, limits))
    shutdown = ShutdownSequence(budgets=settings.shutdown_budgets, lifecycle=lifecycle, clock=clock)
    operations = Operations(
        version=version("viralfx"),
        environment=settings.environment,
        clock=clock,
        lifecycle=lifecycle,
        monitor=monitor,
        shutdown=shutdown,
        breakers=circuits,
        state_store=_state_store(settings, database),
        usage=lambda: memory.usage,
        resources=tuple(b.resource for b in backends.values() if b.resource is not None),
        checks_of_state=("circuits",),
        home=home,
        audit=wire_audit(settings, clock, instance=instance, metrics=metrics, database=database),
        checks_of_application=tuple(own),
        on_ready=(jobs.start, lag.start),
        instance=instance,
        revision=settings.revision,
        adapters=_adapters(settings, database, redis),
    )
    operations.resources = (*operations.resources, operations.audit)
    fleet, reporter = wire_fleet(operations, jobs, database)
    _register_stages(operations, jobs, stages or {}, backends, reporter)
    connections = {name: name.capitalize() for name, b in backends.items() if b.close is not None}
    monitor.subscribe(HealthLog(connections))
    monitor.subscribe(
        lambda event: lifecycle.follow(event) if isinstance(event, HealthReport) else None
    )
    lifecycle.subscribe(
        lambda event: jobs.stop_accepting() if event.new is State.DRAINING else None
    )
    lifecycle.subscribe(lambda event: lag.stop() if event.new is State.STOPPED else None)
    lifecycle.subscribe(log_lifecycle)
    shutdown.subscribe(log_shutdown)
    circuits.subscribe(log_circuit)
    spans = None if tracing is None or tracing.joined else lambda: tracing.lost_spans
    measure(metrics, operations, jobs, retriers, spans, database=database, redis=redis)
    if tracing is not None:
        trace(tracing, operations, database=database, redis=redis)
    return Assembly(
        metrics=metrics,
        tracing=tracing,
        operations=operations,
        database=database,
        redis=redis,
        cache=Cache(cache_store, MsgspecCodec(), home=home),
        jobs=jobs,
        fleet=fleet,
        source=ConfigurationSource(env_prefix, redis_credentials, database_password),
    )


def _register_stages(
    operations: Operations,
    jobs: JobRuntime,
    own: Mapping[Phase, Mapping[str, AnyStage]],
    backends: Mapping[str, Backend],
    reporter: FleetReporter,
) -> None:
    shutdown, audit = operations.shutdown, operations.audit
    operations.lifecycle.subscribe(
        lambda event: audit.stop() if event.new is State.STOPPED else None
    )
    shutdown.register(Phase.DRAIN, "jobs", jobs.drain)
    shutdown.register(Phase.DRAIN, "alerts", jobs.stop_alerts)
    shutdown.register(
        Phase.SAVE_STATE,
        "state",
        lambda _: save_state(operations.state_store, operations.state_to_save),
    )
    for phase, named in own.items():
        for name, stage in named.items():
            shutdown.register(phase, name, stage)
    # After the last health report was saved, and before checked connections are closed.
    shutdown.register(Phase.SAVE_STATE, "health checks", lambda _: operations.monitor.stop())
    if not jobs.in_memory:
        shutdown.register(Phase.CLOSE, "fleet", reporter.close)
        shutdown.register(Phase.CLOSE, "notifications", jobs.close_notifier)
        shutdown.register(Phase.CLOSE, "audit", audit.close)
    for name, backend in backends.items():
        if backend.close is not None:
            shutdown.register(Phase.CLOSE, name, backend.close)


def _adapters(
    settings: Settings, database: "PostgresDatabase | None", redis: "RedisClient | None"
) -> dict[str, str]:
    """Return the technology of each port, as :mod:`viralfx.bootstrap` chooses it."""
    stored = "memory" if database is None else "postgres"
    return {
        "database": stored,
        "cache": "memory" if redis is None else "redis",
        "jobs": stored,
        "notifications": stored if database is None or redis is None else "taskiq",
        "state": stored if settings.state_dir is None else "file",
        "fleet": stored,
        "audit": stored,
    }


def _database(
    settings: Settings,
    clock: Clock,
    monitor: HealthMonitor,
    ask_password: CredentialsCallable | None,
) -> "tuple[PostgresDatabase | None, Counts | None, Backend]":
    if settings.database_url is None:
        return None, None, Backend(check=MemoryDatabase(clock))
    # Imported late: a process without Postgres starts faster without the driver.
    from viralfx.bootstrap.postgres import wire_postgres  # noqa: PLC0415

    suspect = partial(monitor.request_check, "database")
    return wire_postgres(settings, clock, suspect, ask_password)


def _redis(
    settings: Settings,
    clock: Clock,
    monitor: HealthMonitor,
    credentials: CredentialsCallable | None,
    home: HomeLoop,
) -> "tuple[RedisClient | None, CacheStore, Backend]":
    if not settings.redis.in_use:
        return None, MemoryCacheStore(clock), Backend(check=MemoryRedis(clock))
    with hide_opentelemetry():
        from viralfx.bootstrap.redis import cache_store, wire_redis  # noqa: PLC0415 - as above

    suspect = partial(monitor.request_check, "redis")
    client, backend = wire_redis(settings, clock, suspect, credentials, home)
    return client, cache_store(client), backend


def _state_store(settings: Settings, database: "PostgresDatabase | None") -> StateStore:
    if settings.state_dir is None and database is not None:
        from viralfx.bootstrap.postgres import state_store  # noqa: PLC0415

        return state_store(database)
    if settings.state_dir is None:
        return MemoryStateStore()
    folder = Path(settings.state_dir)
    if not folder.is_dir():
        raise ConfigurationError([f"STATE_DIR: {folder} is not a folder; create it"])
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigurationError([f"STATE_DIR: {folder} is not writable for this user"])
    return FileStateStore(folder)
