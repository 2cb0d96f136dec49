"""Settings in, wired services out."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from viralfx.adapters.memory import (
    FileStateStore,
    MemoryCacheStore,
    MemoryDatabase,
    MemoryRedis,
    MemoryStateStore,
    ProcessMemory,
)
from viralfx.bootstrap.backend import Backend
from viralfx.bootstrap.checks import policy_of, problems_with_names, problems_with_retriers
from viralfx.bootstrap.job_system import CloseBells, DrainWorker, EndAlerts, JobSystem
from viralfx.bootstrap.jobs import instance_name, wire_jobs
from viralfx.bootstrap.measuring import measure
from viralfx.bootstrap.tracing import trace, wire_tracing
from viralfx.domain.cache import Cache, CacheStore
from viralfx.domain.clock import Clock, SystemClock
from viralfx.domain.errors import ConfigurationError
from viralfx.domain.health import HealthCheck, HealthReport
from viralfx.domain.jobs.ledger import Counts
from viralfx.domain.lifecycle import Lifecycle, State
from viralfx.domain.monitor import HealthMonitor, StopChecking
from viralfx.domain.operations import Operations
from viralfx.domain.resilience.breaker import CircuitBreaker
from viralfx.domain.resilience.circuits import BreakerRegistry
from viralfx.domain.resilience.retry import Retrier
from viralfx.domain.sequence import ShutdownSequence
from viralfx.domain.shutdown import Phase, ShutdownStage
from viralfx.domain.state import SaveState, StateStore
from viralfx.settings import Settings
from viralfx.telemetry.import_guard import without_opentelemetry
from viralfx.telemetry.metrics import Metrics
from viralfx.telemetry.metrics.exemplars import current_exemplar
from viralfx.telemetry.metrics.loop import LoopLag
from viralfx.telemetry.observed import HealthLog, log_circuit, log_lifecycle, log_shutdown

if TYPE_CHECKING:
    from viralfx.adapters.postgres import PostgresDatabase
    from viralfx.adapters.redis import RedisClient
    from viralfx.telemetry.tracing.wiring import Tracing


@dataclass(frozen=True, slots=True, kw_only=True)
class Assembly:
    """Everything that was wired. ``database`` and ``redis`` are None where memory stands in."""

    operations: Operations
    database: "PostgresDatabase | None"
    redis: "RedisClient | None"
    cache: Cache
    jobs: JobSystem
    metrics: Metrics
    tracing: "Tracing | None" = None


def assemble(
    settings: Settings,
    *,
    checks: Mapping[str, HealthCheck] | None = None,
    stages: Mapping[Phase, Mapping[str, ShutdownStage]] | None = None,
    breakers: Iterable[CircuitBreaker] = (),
    retriers: Sequence[Retrier] = (),
    tasks: Sequence[object] = (),
    clock: Clock | None = None,
) -> Assembly:
    """Wire the operations layer and what it looks after; nothing runs or connects yet.

    ``checks``, ``stages``, ``breakers``, ``retriers`` and ``tasks`` are an application's own,
    beside the built-in ones. Raises :class:`ConfigurationError` for a name that is taken or
    missing, a setting that names no check, and tasks that cannot be had.
    """
    clock = clock or SystemClock()
    memory = ProcessMemory()
    circuits = BreakerRegistry()
    lifecycle = Lifecycle(clock)
    monitor = HealthMonitor(clock=clock, fail_open_after=settings.readiness_fail_open_after / 1000)
    database, counts, database_backend = _database(settings, clock, monitor)
    redis, cache_store, redis_backend = _redis(settings, clock, monitor)
    # In the order in which they are left.
    backends = {"redis": redis_backend, "database": database_backend}
    own = dict(checks or {})
    problems = list(problems_with_names(own, settings))
    for breaker in breakers:
        try:
            circuits.add(breaker)
        except ValueError as error:
            problems.append(f"OperationsConfig.breakers: {error}")
    problems += problems_with_retriers(retriers)
    metrics = Metrics(current_exemplar)
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
            metrics=metrics,
            instance=instance,
            tracing=tracing,
            counts=counts,
        )
    except ConfigurationError as error:
        raise ConfigurationError([*problems, *error.problems]) from None
    if problems:
        raise ConfigurationError(problems)

    built_in: dict[str, HealthCheck] = {
        "database": backends["database"].check,
        "redis": backends["redis"].check,
        "memory": memory,
        "queues": jobs.check,
        "circuits": circuits,
    }
    for name, check in {**built_in, **own}.items():
        monitor.register(name, check, policy_of(name, settings))
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
        on_ready=(jobs.start, lag.start),
    )
    _register_stages(operations, jobs, stages or {}, backends)
    connections = {name: name.capitalize() for name, b in backends.items() if b.close is not None}
    monitor.subscribe(HealthLog(connections))
    monitor.subscribe(
        lambda event: lifecycle.follow(event) if isinstance(event, HealthReport) else None
    )
    lifecycle.subscribe(lambda event: jobs.leave() if event.new is State.DRAINING else None)
    lifecycle.subscribe(lambda event: lag.stop() if event.new is State.STOPPED else None)
    lifecycle.subscribe(log_lifecycle)
    shutdown.subscribe(log_shutdown)
    circuits.subscribe(log_circuit)
    measure(metrics, operations, jobs, retriers, database=database, redis=redis)
    if tracing is not None:
        trace(tracing, operations, database=database, redis=redis)
    return Assembly(
        metrics=metrics,
        tracing=tracing,
        operations=operations,
        database=database,
        redis=redis,
        cache=Cache(cache_store),
        jobs=jobs,
    )


def _register_stages(
    operations: Operations,
    jobs: JobSystem,
    own: Mapping[Phase, Mapping[str, ShutdownStage]],
    backends: Mapping[str, Backend],
) -> None:
    shutdown = operations.shutdown
    shutdown.register(Phase.DRAIN, "jobs", DrainWorker(jobs))
    shutdown.register(Phase.DRAIN, "alerts", EndAlerts(jobs))
    shutdown.register(
        Phase.SAVE_STATE, "state", SaveState(operations.state_store, operations.state_to_save)
    )
    for phase, named in own.items():
        for name, stage in named.items():
            shutdown.register(phase, name, stage)
    # After the last health was saved, and before anything that is checked gets closed.
    shutdown.register(Phase.SAVE_STATE, "health checks", StopChecking(operations.monitor))
    if not jobs.in_memory:
        shutdown.register(Phase.CLOSE, "bells", CloseBells(jobs))
    for name, backend in backends.items():
        if backend.close is not None:
            shutdown.register(Phase.CLOSE, name, backend.close)


def _database(
    settings: Settings, clock: Clock, monitor: HealthMonitor
) -> "tuple[PostgresDatabase | None, Counts | None, Backend]":
    if settings.database_url is None:
        return None, None, Backend(check=MemoryDatabase(clock))
    # Not at the top: a process without Postgres starts a good deal sooner without its driver.
    from viralfx.bootstrap.postgres import wire_postgres  # noqa: PLC0415

    return wire_postgres(settings, clock, lambda: monitor.request_check("database"))


def _redis(
    settings: Settings, clock: Clock, monitor: HealthMonitor
) -> "tuple[RedisClient | None, CacheStore, Backend]":
    if not settings.redis.in_use:
        return None, MemoryCacheStore(clock), Backend(check=MemoryRedis(clock))
    with without_opentelemetry():
        from viralfx.bootstrap.redis import cache_store, wire_redis  # noqa: PLC0415 - likewise

    client, backend = wire_redis(settings, clock, lambda: monitor.request_check("redis"))
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
