"""``viralfx worker``: puts a worker of jobs and its management server into a process."""

import difflib
import gc
import os
from collections.abc import Collection, Iterator, Sequence
from functools import partial

from viralfx.bootstrap import assemble
from viralfx.domain.errors import ConfigurationError
from viralfx.runner.heap import HeapReports
from viralfx.runner.http import HttpServer
from viralfx.runner.process import Process
from viralfx.runner.signals import SignalWatch
from viralfx.runner.sockets import listen
from viralfx.settings import Settings, read_settings
from viralfx.telemetry.logs import own_logging
from viralfx.telemetry.redaction import Redaction, secrets_of
from viralfx.web.access import AccessPolicy
from viralfx.web.answers import OperationsAnswers
from viralfx.web.gate import Gate


def work(signals: SignalWatch, *, queues: Sequence[str]) -> int:
    """Run jobs until told to stop; returns the exit code.

    ``queues`` are those whose jobs are run; none named: all. Raises :class:`ConfigurationError`
    and :class:`StartupError` before anything runs.
    """
    settings = read_settings(os.environ)
    signals.force_timeout = settings.shutdown_force_timeout / 1000
    reclaim_log = own_logging(
        level=settings.log_level,
        console=settings.log_format == "console",
        redaction=Redaction(secrets_of(settings)),
    )
    if problems := list(_problems(settings, queues)):
        raise ConfigurationError(problems)
    assembly = assemble(settings)
    assembly.jobs.employ(queues)
    if assembly.tracing is not None:
        assembly.tracing.make_global()

    listener = listen("MANAGEMENT_PORT", settings.host, settings.worker_management_port)
    answers = OperationsAnswers(
        assembly.operations, AccessPolicy.from_settings(settings), assembly.metrics
    )
    gate = Gate(answers)
    HeapReports(settings.heap_snapshot_dir).install()
    process = Process(
        operations=assembly.operations,
        signals=signals,
        reclaim_log=reclaim_log,
        server=None,
        gate=gate,
        management=partial(HttpServer, gate, listener, lifespan=False),
        shutdown_on_uncaught=settings.shutdown_on_uncaught,
        stall_threshold=settings.loop_stall_threshold / 1000,
        queues=tuple(dict.fromkeys(queues or settings.queues)),
    )
    gc.freeze()  # as for serve
    gc.enable()
    return process.run()


def _problems(settings: Settings, queues: Collection[str]) -> Iterator[str]:
    if settings.database_url is None:
        yield (
            "DATABASE_URL: not set, so each process keeps its jobs in its own memory and nobody"
            " could give a worker any; set it, or run jobs in `viralfx serve`"
        )
    for name in queues:
        if name not in settings.queues:
            close = difflib.get_close_matches(name, settings.queues, n=1)
            hint = f"did you mean {close[0]}?" if close else f"QUEUES={','.join(settings.queues)}"
            yield f"--queue: there is no queue named {name!r}; {hint}"
