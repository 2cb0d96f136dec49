"""The process: start-up, shutdown triggers, the staged shutdown and the exit code.

The shutdown stages of the HTTP servers are here, too.
"""

import asyncio
import concurrent.futures
import contextlib
import functools
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from viralfx.bootstrap.task_modules import in_one_line
from viralfx.core.clock import Clock
from viralfx.core.errors import StartupError, WorkLostError
from viralfx.domain.operations import Operations
from viralfx.domain.shutdown import (
    Phase,
    ShutdownEvent,
    ShutdownReport,
    ShutdownTriggered,
    UncancelledTask,
)
from viralfx.jobs.worker.calls import JobChildTask, JobThread, current_job, make_task
from viralfx.runner.diagnostics import BlockedLoopDetector
from viralfx.runner.signals import SignalWatch
from viralfx.server.http_server import AnyServer
from viralfx.server.lifespan import ApplicationLifespan
from viralfx.telemetry import stacks_of_tasks
from viralfx.web.console.feed import Feed
from viralfx.web.gate import Gate

T = TypeVar("T")

_ANSWERING_SECONDS = 0.02
"""Interval at which the drain looks for responses that clients have not read."""


async def stop_listening(server: AnyServer, gate: Gate) -> None:
    """Close the listeners and idle connections, and notify the clients of streams.

    WebSockets are closed with code 1012; event streams get the event ``shutdown``.
    """
    await server.stop_listening()
    gate.requests.announce_shutdown()


async def drain_requests(server: AnyServer, gate: Gate, clock: Clock, budget: float) -> None:
    """Wait for the requests in flight, including those still arriving, then cut the rest.

    Clients may also read their responses, and get those of the requests that wait behind them.
    Raises :class:`WorkLostError` when a request was cut without a complete response.
    """
    began = clock.monotonic()

    def left() -> float:
        return max(0.0, budget - (clock.monotonic() - began))

    await server.settle()
    await gate.requests.drain(left(), clock, before_cut=server.reject_unfinished)
    while server.is_answering() and left() > 0:
        await clock.sleep(_ANSWERING_SECONDS)
        await gate.requests.drain(left(), clock, before_cut=server.reject_unfinished)


async def stop_application(application: ApplicationLifespan) -> None:
    """End the ASGI lifespan. Raises :class:`WorkLostError` when the application reports failure."""
    if not await application.stop():
        raise WorkLostError("the application's own shutdown failed; the log says why")


EXIT_OK = 0
EXIT_UNCAUGHT = 1
EXIT_STARTUP = 3
EXIT_STAGE = 4

_EXIT_GRACE_SECONDS = 0.1
"""Time for cancelled tasks and idle threads to end."""
_CLOSE_SECONDS = 2.0
"""Time to close the event loop, which takes a millisecond."""

_DEFAULT_SWITCH_SECONDS = 0.005
_SWITCH_SECONDS = 0.0005
"""Time after which a thread that computes gives the interpreter to another one; Python's default is
5 ms. The event loop needs the interpreter several times for each job or request, and waits for so
long each time."""

_logger = logging.getLogger("viralfx.process")


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    """Return the factory of the event loop: uvloop if it is installed."""
    try:
        import uvloop  # noqa: PLC0415
    except ImportError:
        return asyncio.new_event_loop
    return uvloop.new_event_loop


class Process:
    """Runs the servers until a shutdown trigger, then the shutdown sequence."""

    def __init__(
        self,
        *,
        operations: Operations,
        signals: SignalWatch,
        reclaim_log: Callable[[], None],
        server: Callable[[], AnyServer] | None,
        application: Callable[[], ApplicationLifespan] | None = None,
        gate: Gate,
        management: Callable[[], AnyServer] | None,
        shutdown_on_uncaught: bool,
        queues: Sequence[str] = (),
        runs_jobs: bool = False,
        stall_threshold: float = 0.0,
        feed: Feed | None = None,
    ) -> None:
        """Create the event loop; the servers and the application are made on it later.

        ``reclaim_log`` restores logging if the application has reconfigured it during its start.
        ``server`` makes the application's server; None: no application is served. ``application``
        makes the lifespan of one that is not served. ``gate`` is in front of the application, or of
        the management endpoints alone. ``queues`` are logged at the start. ``runs_jobs``: the code
        of jobs runs on the loop. ``stall_threshold``: seconds after which a blocked loop is logged;
        0: never. ``feed`` has open pages of the console, which learn of each stage and of the end.
        """
        self._operations = operations
        self._signals = signals
        self._reclaim_log = reclaim_log
        self._make_server = server
        self._make_application = application
        self._gate = gate
        self._make_management = management
        self._shutdown_on_uncaught = shutdown_on_uncaught
        self._queues = tuple(queues)
        self._runs_jobs = runs_jobs
        self._stall_threshold = stall_threshold
        self._feed = feed
        self._loop = loop_factory()()
        self._uncaught = 0
        self._failed = False
        """True after an uncaught exception that shuts down."""
        self._unretrieved = 0
        self._thread_hook = threading.__excepthook__
        self._startup_failed = False
        operations.staged = True
        operations.shutdown.subscribe(self._on_shutdown_event)

    # -- the loop ----------------------------------------------------------------------------

    def run(self) -> int:
        """Run until the shutdown is complete and return the exit code, or exit the process."""
        loop = self._loop
        if math.isclose(sys.getswitchinterval(), _DEFAULT_SWITCH_SECONDS):
            # The application has chosen no other one.
            sys.setswitchinterval(_SWITCH_SECONDS)
        asyncio.set_event_loop(loop)
        self._signals.describe_tasks = functools.partial(stacks_of_tasks, loop)
        executor = concurrent.futures.ThreadPoolExecutor(thread_name_prefix="worker")
        loop.set_default_executor(executor)
        loop.set_exception_handler(self._on_loop_exception)
        if self._runs_jobs:
            loop.set_task_factory(make_task)
        self._thread_hook, threading.excepthook = threading.excepthook, self._on_thread_exception
        main = loop.create_task(self._main(), name="main")
        while not main.done():
            try:
                loop.run_until_complete(main)
            except BaseException as error:  # noqa: BLE001 - the main thread's boundary
                # A callback or a signal handler raised it through the loop. The loop and the main
                # task are intact, so the stages can still run.
                self._on_uncaught("main thread", error)
        code = EXIT_UNCAUGHT if main.cancelled() or main.exception() else main.result()
        executor.shutdown(wait=False, cancel_futures=True)
        self._end(code)
        return code

    def _end(self, code: int) -> None:
        """Exit immediately if anything would delay the interpreter's exit.

        That may be a task, a lookup of a name, a thread or a child.
        """
        left = asyncio.all_tasks(self._loop)
        for task in left:
            task.cancel()
        if left:
            _, left = self._finish(asyncio.wait(left, timeout=_EXIT_GRACE_SECONDS))
        if not left:
            self._finish(self._loop.shutdown_asyncgens())
            # That of uvloop waits for the lookups of names by other code, however long they take.
            late = threading.Timer(_CLOSE_SECONDS, _exit_late, (code,))
            late.daemon = True
            with contextlib.suppress(RuntimeError):  # no thread can be started
                late.start()
            self._loop.close()
            late.cancel()
        children = _end_children()
        deadline = time.monotonic() + _EXIT_GRACE_SECONDS
        while (busy := _busy_threads()) and time.monotonic() < deadline:
            busy[0].join(0.01)
        logging.shutdown()
        if left or busy or children:
            _exit_now(code)

    def _finish(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine to its end, although other code may cancel all tasks, or exit."""
        task = UncancelledTask(coroutine, loop=self._loop)
        while not task.done():
            try:
                self._loop.run_until_complete(task)
            except BaseException as error:  # noqa: BLE001 - logged, or raised below
                if not task.done():  # a callback has raised it
                    self._log_uncaught("main thread", error)
        return task.result()

    async def _main(self) -> int:
        operations = self._operations
        self._signals.claim_wakeup_fd()  # the loop has replaced it when it started
        self._signals.deliver_to(self._on_signal)
        server = self._make_server() if self._make_server else None
        management = self._make_management() if self._make_management else None
        application = server.application if server else None
        if self._make_application is not None:
            application = self._make_application()
        self._register_stages(server, application, management)
        monitor = BlockedLoopDetector(self._loop, self._stall_threshold)
        if self._stall_threshold:
            monitor.start()
        start = asyncio.create_task(self._start(server, application, management), name="start-up")
        stop = asyncio.create_task(operations.shutdown.wait(), name="shutdown-trigger")
        try:
            await asyncio.wait({start, stop}, return_when=asyncio.FIRST_COMPLETED)
            await stop
        except asyncio.CancelledError as error:
            # A job or the application has cancelled all tasks, those of the servers and the worker
            # included. The stages still end the process in order.
            self._failed = True
            self._log_uncaught("the main task", error)
            operations.shutdown.trigger("the main task was cancelled")
        # If start-up has not finished, the stages close the connections that it has opened.
        start.cancel()
        report = await self._stopped()
        monitor.stop()
        code = self._exit_code(report)
        _logger.info("Process ends", extra={"exitCode": code, "reason": report.reason})
        return code

    async def _stopped(self) -> ShutdownReport:
        """Run the stages to their end, although other code may cancel all tasks repeatedly."""
        while True:
            with contextlib.suppress(asyncio.CancelledError):
                return await self._operations.shutdown.run(uncancelled=True)

    async def _start(
        self,
        server: AnyServer | None,
        application: ApplicationLifespan | None,
        management: AnyServer | None,
    ) -> None:
        try:
            # The servers first, so that they answer probes during the rest of the start-up.
            if management is not None:
                await management.open()
            if server is not None:
                await server.open()
            await self._operations.start()
            if application is not None and not await application.start():
                raise StartupError(_failed(application.error))  # noqa: TRY301
            self._signals.reinstall()
            self._reclaim_log()
        except Exception as error:
            self._reclaim_log()
            self._startup_failed = True
            if isinstance(error, StartupError):
                _logger.error("Start-up failed", extra={"detail": str(error)})  # noqa: TRY400 - the error text is complete
            else:
                _logger.exception("Start-up failed", extra={"detail": in_one_line(error)})
            self._operations.shutdown.trigger("start-up failed")
            return
        self._gate.open = True
        self._operations.application_ready()
        extra: dict[str, object] = {}
        if server is not None:
            extra["host"], extra["port"] = server.address
        if management is not None:
            extra["host"], extra["managementPort"] = management.address
        if self._queues:
            extra["queues"] = ",".join(self._queues)
        _logger.info("Listening" if server is not None else "Working", extra=extra)

    def _register_stages(
        self,
        server: AnyServer | None,
        application: ApplicationLifespan | None,
        management: AnyServer | None,
    ) -> None:
        shutdown = self._operations.shutdown
        if server is not None:
            gate, clock = self._gate, self._operations.clock
            shutdown.register(
                Phase.STOP_ACCEPTING, "listeners", lambda _: stop_listening(server, gate)
            )
            shutdown.register(
                Phase.DRAIN, "requests", functools.partial(drain_requests, server, gate, clock)
            )
        if application is not None:
            shutdown.register(
                Phase.CLOSE, "application", lambda _: stop_application(application), first=True
            )
        feed = self._feed
        if feed is not None and management is None:
            shutdown.register(Phase.CLOSE, "console", feed.end)
        if server is not None:
            shutdown.register(Phase.CLOSE, "server", lambda _: server.close())
        if management is not None:
            if feed is not None:
                shutdown.register(Phase.CLOSE, "console", feed.end)
            shutdown.register(Phase.CLOSE, "management server", lambda _: management.close())

    def _exit_code(self, report: ShutdownReport) -> int:
        if self._startup_failed:
            return EXIT_STARTUP
        if self._failed:
            return EXIT_UNCAUGHT
        return EXIT_OK if report.clean else EXIT_STAGE

    # -- triggers ----------------------------------------------------------------------------

    def _on_signal(self, name: str) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._operations.shutdown.trigger, name)

    def _on_shutdown_event(self, event: ShutdownEvent) -> None:
        if isinstance(event, ShutdownTriggered):
            self._gate.requests.stopping = True
            self._signals.arm(event.force_timeout)

    def _on_uncaught(self, where: str, error: BaseException) -> None:
        self._log_uncaught(where, error)
        # A job may call code that exits, in a task or a callback of its own. Code that awaits that
        # task gets the exception, too; the other jobs and the API go on.
        may_be_of_a_job = self._runs_jobs and self._gate.open and not isinstance(error, Exception)
        if may_be_of_a_job or not self._shutdown_on_uncaught:
            return
        self._failed = True
        # The watchdog first, because the loop may be blocked.
        self._signals.arm(self._operations.shutdown.budgets.force)
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(
                self._operations.shutdown.trigger, f"uncaught exception in {where}"
            )

    def _log_uncaught(self, where: str, error: BaseException, **more: str) -> None:
        self._uncaught += 1
        _logger.error(
            "Uncaught exception",
            exc_info=error,
            extra={"where": where, "count": self._uncaught, **more},
        )

    def _on_loop_exception(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        # Transports and protocols report problems of one connection, not of the process.
        if error is None or "transport" in context or "protocol" in context:
            _logger.warning(
                "Event loop reports", exc_info=error, extra={"detail": context.get("message")}
            )
            return
        future = context.get("future")
        job = None
        if isinstance(future, JobChildTask):
            job = future.job
        elif future is None and (running := current_job.get()) is not None:
            # With uvloop, and since Python 3.12, the handler runs in the context of a callback.
            job = running.job
        if job is not None:
            where = "a callback" if future is None else "a task"
            self._log_uncaught(f"{where} of a job", error, job=job)
        elif future is None:
            self._on_uncaught("a callback", error)
        elif isinstance(future, asyncio.Task):
            self._on_uncaught("a background task", error)
        else:
            # A result that its code no longer needs, such as one of `gather` or an executor. The
            # code itself ended regularly.
            self._unretrieved += 1
            _logger.error(
                "Exception of a future was not retrieved",
                exc_info=error,
                extra={"count": self._unretrieved},
            )

    def _on_thread_exception(self, args: threading.ExceptHookArgs) -> None:
        if args.exc_value is not None and not isinstance(args.exc_value, SystemExit):
            name = args.thread.name if args.thread else "?"
            self._on_uncaught(f"thread {name}", args.exc_value)
        if self._thread_hook is not threading.__excepthook__:
            self._thread_hook(args)  # the application's own hook


def _failed(error: BaseException | None) -> str:
    reason = "; the log above says why" if error is None else f": {in_one_line(error)}"
    return f"the application's start-up failed{reason}"


def _exit_late(code: int) -> None:
    _end_children()
    logging.shutdown()
    _exit_now(code)


def _exit_now(code: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
    os._exit(code)


def _end_children() -> bool:
    """Terminate multiprocessing children, for which the exit would wait; return True if any."""
    multiprocessing = sys.modules.get("multiprocessing")
    if multiprocessing is None:
        return False
    children = multiprocessing.active_children()
    for child in children:
        child.terminate()
    deadline = time.monotonic() + _EXIT_GRACE_SECONDS
    for child in children:
        child.join(max(0.0, deadline - time.monotonic()))
        if child.is_alive():
            child.kill()
    return bool(children)


def _busy_threads() -> list[threading.Thread]:
    # A daemon that runs a task's code may hold native frames, which the interpreter's exit breaks.
    main = threading.main_thread()
    return [
        t
        for t in threading.enumerate()
        if t is not main and (t.busy if isinstance(t, JobThread) else not t.daemon) and t.is_alive()
    ]
