"""``viralfx serve``: puts an application, its servers and the operations layer into a process."""

import gc
import logging
import os
from functools import partial

import msgspec

from viralfx.domain.errors import ConfigurationError
from viralfx.runner.heap import HeapReports
from viralfx.runner.http import HttpServer
from viralfx.runner.process import Process
from viralfx.runner.signals import SignalWatch
from viralfx.runner.sockets import listen
from viralfx.settings import Settings, read_settings
from viralfx.telemetry.logs import own_logging
from viralfx.telemetry.redaction import Redaction, secrets_of
from viralfx.web.gate import Gate
from viralfx.web.load import find_application

_logger = logging.getLogger("viralfx.serve")


def serve(
    signals: SignalWatch,
    *,
    app: str | None,
    host: str | None,
    port: int | None,
    worker: bool | None = None,
) -> int:
    """Serve until told to stop; returns the exit code.

    ``host`` and ``port`` override HOST and PORT. ``worker`` says whether jobs are run here, too;
    None: only where nobody else could, because they are in memory. Raises
    :class:`ConfigurationError` and :class:`StartupError` before anything runs.
    """
    settings = read_settings(os.environ, with_api=app is None)
    signals.force_timeout = settings.shutdown_force_timeout / 1000
    secrets = {*secrets_of(settings)}
    own_logging(
        level=settings.log_level,
        console=settings.log_format == "console",
        redaction=Redaction(secrets),
    )
    application, plugin = find_application(settings, app)
    # Again, for its settings may hold other secrets.
    reclaim_log = own_logging(
        level=settings.log_level,
        console=settings.log_format == "console",
        redaction=Redaction({*secrets, *secrets_of(plugin.settings)}),
    )
    # The application may have brought settings of its own; where to listen is the caller's word.
    settings = msgspec.structs.replace(
        plugin.settings,
        host=plugin.settings.host if host is None else host,
        port=plugin.settings.port if port is None else port,
    )
    signals.force_timeout = settings.shutdown_force_timeout / 1000
    if problems := list(settings.contradictions()):
        raise ConfigurationError(problems)
    _warn_of_memory(settings)
    jobs = plugin.assembly.jobs
    if worker is True:
        jobs.employ()
    elif worker is False:
        jobs.dismiss()

    listener = listen("PORT", settings.host, settings.port)
    management = None
    if settings.management_port is not None:
        management = listen("MANAGEMENT_PORT", settings.host, settings.management_port)
    if (tracing := plugin.assembly.tracing) is not None:
        tracing.make_global()
    gate = Gate(plugin.answers, plugin.traced(application), plugin.watch())
    HeapReports(settings.heap_snapshot_dir).install()
    process = Process(
        operations=plugin.operations,
        signals=signals,
        reclaim_log=reclaim_log,
        server=partial(HttpServer, gate, listener, lifespan=True),
        gate=gate,
        management=(
            partial(HttpServer, Gate(plugin.answers), management, lifespan=False)
            if management is not None
            else None
        ),
        shutdown_on_uncaught=settings.shutdown_on_uncaught,
        stall_threshold=settings.loop_stall_threshold / 1000,
        queues=settings.queues if jobs.worker is not None else (),
    )
    # What was made until here stays for good: no collection need look at it ever again.
    gc.freeze()
    gc.enable()
    return process.run()


def _warn_of_memory(settings: Settings) -> None:
    in_memory = [
        *(["database", "jobs"] if settings.database_url is None else []),
        *(["cache"] if not settings.redis.in_use else []),
    ]
    if in_memory:
        _logger.warning(
            "Data in memory ends with this process", extra={"inMemory": ", ".join(in_memory)}
        )
