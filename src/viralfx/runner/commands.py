"""``viralfx serve`` and ``viralfx worker``: assemble their parts and run the process."""

import gc
import logging
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from functools import partial

import msgspec

from viralfx.bootstrap import assemble
from viralfx.core.errors import ConfigurationError, suggest
from viralfx.jobs.hooks import TaskHost
from viralfx.runner.applications import find_application, find_worker_application, module_of
from viralfx.runner.diagnostics import HeapReports
from viralfx.runner.process import Process
from viralfx.runner.signals import SignalWatch
from viralfx.server.http_server import http_server, lacking_parts, listen
from viralfx.server.interface import ASGIApp
from viralfx.server.lifespan import ApplicationLifespan
from viralfx.server.limits import HttpLimits, raise_descriptor_limit
from viralfx.settings import Settings, read_settings
from viralfx.telemetry.logging.handler import enforce_logging
from viralfx.telemetry.logging.redaction import Redaction, secrets_of
from viralfx.telemetry.tracing import require_packages, tracing_of
from viralfx.web.auth import AccessPolicy
from viralfx.web.client_address import TrustedProxies
from viralfx.web.endpoints import OperationsEndpoints
from viralfx.web.gate import Gate
from viralfx.web.layer import refuse_layers

_logger = logging.getLogger("viralfx.serve")

_COLLECT_AFTER_OBJECTS = 2_000
"""New objects after which the garbage collector looks for cycles among them: the default of Python
3.13. That of 3.11 is 700, the objects of a few jobs, and a busy worker spends an eighth of its time
in collections. A higher number would keep large contents in cycles for longer."""

_WITHOUT_APPLICATION = (
    "Tasks cannot use an OperationsPlugin of TASK_MODULES; name its application with --app"
)


def serve(
    signals: SignalWatch,
    *,
    app: str | None,
    host: str | None,
    port: int | None,
    worker: bool | None = None,
) -> int:
    """Serve until a stop signal, and return the exit code.

    ``host`` and ``port`` override HOST and PORT. ``worker`` decides whether this process also runs
    jobs. None: only if the ledger is in memory, where no other process could run them. Raises
    :class:`ConfigurationError` or :class:`StartupError` before the process serves.
    """
    settings, refused = _first_settings(app, with_api=app is None)
    require_packages(os.environ)
    signals.force_timeout = settings.shutdown_force_timeout
    secrets = {*secrets_of(settings)}
    enforce_logging(
        level=settings.log_level,
        console=settings.log_format == "console",
        redaction=Redaction(secrets),
    )
    application, plugin = find_application(settings, app, refused)
    if app is None and refuse_layers(but=plugin):
        _logger.warning(_WITHOUT_APPLICATION)
    # The application's settings win, except the address, which the command line sets.
    settings = msgspec.structs.replace(
        plugin.settings,
        host=plugin.settings.host if host is None else host,
        port=plugin.settings.port if port is None else port,
    )
    # Again, because these settings may contain other secrets.
    reclaim_log = enforce_logging(
        level=settings.log_level,
        console=settings.log_format == "console",
        redaction=Redaction({*secrets, *secrets_of(settings)}),
    )
    signals.force_timeout = settings.shutdown_force_timeout
    serves_jobs = app is None or plugin.config.jobs_api
    authorizes = plugin.config.authorize is not None
    problems = list(
        settings.contradictions(with_api=serves_jobs, listens=True, authorizes=authorizes)
    )
    if settings.console == "management" and settings.management_port is None:
        problems.append("CONSOLE: management needs MANAGEMENT_PORT; set it, or unset CONSOLE")
    if problems:
        raise ConfigurationError(problems)
    raise_descriptor_limit()
    _warn_about_memory(settings)
    jobs = plugin.assembly.jobs
    if worker is True:
        jobs.enable_worker()
    elif worker is False:
        jobs.disable_worker()
    jobs.require_dependencies()

    listener = listen("PORT", settings.listen_host, settings.port)
    management = None
    if settings.management_port is not None:
        management = listen("MANAGEMENT_PORT", settings.listen_host, settings.management_port)
    if (tracing := plugin.assembly.tracing) is not None:
        tracing.make_global()
    gate = plugin.gate(application)
    HeapReports(settings.heap_snapshot_dir).install()
    http, lacking = plugin.assembly.metrics.http, lacking_parts()
    process = Process(
        operations=plugin.operations,
        signals=signals,
        reclaim_log=reclaim_log,
        server=partial(
            http_server,
            gate,
            listener,
            lacking=lacking,
            lifespan=True,
            limits=HttpLimits.for_api(settings.http, other_descriptors=_pool_descriptors(settings)),
            metrics=http,
        ),
        gate=gate,
        management=(
            partial(
                http_server,
                Gate(plugin.endpoints.at_management_port(settings)),
                management,
                lacking=lacking,
                lifespan=False,
                limits=HttpLimits.for_management(settings.http),
                name="management",
                websockets=False,
                metrics=http,
            )
            if management is not None
            else None
        ),
        feed=plugin.endpoints.feed,
        shutdown_on_uncaught=settings.shutdown_on_uncaught,
        stall_threshold=settings.loop_stall_threshold,
        queues=settings.queues if jobs.worker is not None else (),
        runs_jobs=jobs.worker is not None,
    )
    _enable_collections()
    return process.run()


def _first_settings(app: str | None, *, with_api: bool = False) -> tuple[Settings, Sequence[str]]:
    """Return the settings until the application is loaded, and the problems of the environment.

    The layer of the application may read other names, which begin with its prefix. So the problems
    end the start here only if there is no application.
    """
    try:
        return read_settings(os.environ, strict=True, with_api=with_api), ()
    except ConfigurationError as error:
        if app is None:
            raise
        problems = error.problems
    with suppress(ConfigurationError):
        return read_settings(os.environ), problems
    return Settings(), problems


def _pool_descriptors(settings: Settings) -> int:
    """Return the most descriptors for connections to Postgres, some of them beside the pool."""
    return 0 if settings.database_url is None else settings.db.pool_max + 4


def _warn_about_memory(settings: Settings) -> None:
    in_memory = [
        *(["database", "jobs"] if settings.database_url is None else []),
        *(["cache"] if not settings.redis.in_use else []),
    ]
    if in_memory:
        _logger.warning(
            "Data in memory is lost when this process ends",
            extra={"inMemory": ", ".join(in_memory)},
        )


def work(signals: SignalWatch, *, app: str | None = None, queues: Sequence[str]) -> int:
    """Run jobs until a stop signal, and return the exit code.

    ``app``: the application whose lifespan surrounds the jobs, and whose tasks and dependencies
    they use; its routes are not served. It may also be a :class:`TaskHost`, such as
    ``LedgerBroker``, whose tasks the worker runs. ``queues``: the queues to work on; empty: all.
    Raises :class:`ConfigurationError` or :class:`StartupError` before the worker starts.
    """
    settings, refused = _first_settings(app)
    require_packages(os.environ)
    signals.force_timeout = settings.shutdown_force_timeout
    secrets = {*secrets_of(settings)}
    reclaim_log = enforce_logging(
        level=settings.log_level,
        console=settings.log_format == "console",
        redaction=Redaction(secrets),
    )
    application: ASGIApp | None = None
    found = None if app is None else find_worker_application(settings, app, refused)
    if found is None or isinstance(found, TaskHost):
        if problems := list(_problems(settings, queues)):
            raise ConfigurationError(problems)
        with tracing_of(module_of(app)):
            assembly = assemble(settings, tasks=() if found is None else (found,))
        if found is not None and not tuple(found.declared_tasks()):
            problem = f"--app: {app} declares no task; name the modules of its tasks in"
            raise ConfigurationError([f"{problem} TASK_MODULES"])
        if refuse_layers():
            _logger.warning(_WITHOUT_APPLICATION)
        endpoints = OperationsEndpoints(
            assembly.operations,
            AccessPolicy.from_settings(settings),
            assembly.metrics,
            proxies=TrustedProxies.from_settings(settings),
        )
        endpoints.add_console(assembly, settings)
    else:
        application, plugin = found
        settings, assembly, endpoints = plugin.settings, plugin.assembly, plugin.endpoints
        # As in `serve`.
        reclaim_log = enforce_logging(
            level=settings.log_level,
            console=settings.log_format == "console",
            redaction=Redaction({*secrets, *secrets_of(settings)}),
        )
        signals.force_timeout = settings.shutdown_force_timeout
        if problems := [*settings.contradictions(), *_problems(settings, queues)]:
            raise ConfigurationError(problems)
    raise_descriptor_limit()
    assembly.operations.role = "worker"
    assembly.jobs.enable_worker(queues)
    assembly.jobs.require_dependencies()
    if assembly.tracing is not None:
        assembly.tracing.make_global()

    listener = listen("MANAGEMENT_PORT", settings.listen_host, settings.worker_management_port)
    gate = Gate(endpoints.at_management_port(settings))
    HeapReports(settings.heap_snapshot_dir).install()
    process = Process(
        operations=assembly.operations,
        signals=signals,
        reclaim_log=reclaim_log,
        server=None,
        application=None if application is None else partial(ApplicationLifespan, application),
        gate=gate,
        management=partial(
            http_server,
            gate,
            listener,
            lacking=lacking_parts(),
            lifespan=False,
            limits=HttpLimits.for_management(settings.http),
            name="management",
            websockets=False,
            metrics=assembly.metrics.http,
        ),
        feed=endpoints.feed,
        shutdown_on_uncaught=settings.shutdown_on_uncaught,
        stall_threshold=settings.loop_stall_threshold,
        queues=tuple(dict.fromkeys(queues or settings.queues)),
        runs_jobs=True,
    )
    _enable_collections()
    return process.run()


def _problems(settings: Settings, queues: Collection[str]) -> Iterator[str]:
    if settings.database_url is None:
        yield (
            "DATABASE_URL: not set, so each process keeps its jobs in its own memory, where a"
            " separate worker cannot find them; set it, or run jobs in `viralfx serve`"
        )
    for name in queues:
        if name not in settings.queues:
            hint = suggest(name, settings.queues) or f"QUEUES={','.join(settings.queues)}"
            yield f"--queue: there is no queue named {name!r}; {hint}"


def _enable_collections() -> None:
    """Enable the garbage collector again, for new objects and less often."""
    # All objects so far live until the end, so the collector can skip them.
    gc.freeze()
    first, *others = gc.get_threshold()
    if first:  # 0: the application collects by itself
        gc.set_threshold(max(first, _COLLECT_AFTER_OBJECTS), *others)
    gc.enable()
