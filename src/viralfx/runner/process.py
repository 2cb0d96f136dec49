"""One process: start-up, the triggers of its shutdown, the ordered stop and the exit code."""

import asyncio
import concurrent.futures
import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from viralfx.domain.errors import StartupError
from viralfx.domain.operations import Operations
from viralfx.domain.shutdown import Phase, ShutdownEvent, ShutdownReport, ShutdownTriggered
from viralfx.runner.http import HttpServer, loop_factory
from viralfx.runner.signals import SignalWatch
from viralfx.runner.stages import (
    CloseServer,
    DrainRequests,
    StopApplication,
    StopListening,
)
from viralfx.runner.stalls import StallDetector
from viralfx.web.gate import Gate

EXIT_OK = 0
EXIT_UNCAUGHT = 1
EXIT_STARTUP = 3
EXIT_STAGE = 4

_LAST_GRACE = 0.1
"""Seconds that cancelled tasks and idle threads get to end by themselves."""

_logger = logging.getLogger("viralfx.process")


class Process:
    """Runs the servers until a trigger, then the shutdown sequence; gives the exit code."""

    def __init__(
        self,
        *,
        operations: Operations,
        signals: SignalWatch,
        reclaim_log: Callable[[], None],
        server: Callable[[], HttpServer] | None,
        gate: Gate,
        management: Callable[[], HttpServer] | None,
        shutdown_on_uncaught: bool,
        queues: Sequence[str] = (),
        stall_threshold: float = 0.0,
    ) -> None:
        """Take what there is to run; the servers are made on the loop that runs them.

        ``reclaim_log`` takes logging back from whoever configured it while the application started.
        ``server`` is the application's, None where there is none; ``gate`` stands in front of it,
        or else of the management endpoints. ``queues`` are told of at the start. A loop that is
        blocked for ``stall_threshold`` seconds is logged; 0: it is not.
        """
        self._operations = operations
        self._signals = signals
        self._reclaim_log = reclaim_log
        self._make_server = server
        self._gate = gate
        self._make_management = management
        self._shutdown_on_uncaught = shutdown_on_uncaught
        self._queues = tuple(queues)
        self._stall_threshold = stall_threshold
        self._loop = loop_factory()()
        self._uncaught = 0
        self._thread_hook = threading.__excepthook__
        self._startup_failed = False
        operations.staged = True
        operations.shutdown.subscribe(self._on_shutdown_event)

    # -- the loop ----------------------------------------------------------------------------

    def run(self) -> int:
        """Run to the end and return the exit code; it may also end the process itself."""
        loop = self._loop
        asyncio.set_event_loop(loop)
        executor = concurrent.futures.ThreadPoolExecutor(thread_name_prefix="worker")
        loop.set_default_executor(executor)
        loop.set_exception_handler(self._on_loop_exception)
        self._thread_hook, threading.excepthook = threading.excepthook, self._on_thread_exception
        main = loop.create_task(self._main(), name="main")
        while not main.done():
            try:
                loop.run_until_complete(main)
            except BaseException as error:  # noqa: BLE001 - the main thread's boundary
                # Raised through the loop by a callback or a Python signal handler: the loop and
                # the main task are intact, so the stages can still run.
                self._on_uncaught("main thread", error)
        code = EXIT_UNCAUGHT if main.cancelled() or main.exception() else main.result()
        executor.shutdown(wait=False, cancel_futures=True)
        self._end(code)
        return code

    def _end(self, code: int) -> None:
        """Leave at once when something is left that the interpreter's own exit would wait for."""
        left = asyncio.all_tasks(self._loop)
        for task in left:
            task.cancel()
        if left:
            _, left = self._loop.run_until_complete(asyncio.wait(left, timeout=_LAST_GRACE))
        if not left:
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()
        children = _end_children()
        deadline = time.monotonic() + _LAST_GRACE
        while (busy := _busy_threads()) and time.monotonic() < deadline:
            busy[0].join(0.01)
        logging.shutdown()
        if left or busy or children:
            for stream in (sys.stdout, sys.stderr):
                if stream is not None:
                    with contextlib.suppress(OSError, ValueError):
                        stream.flush()
            os._exit(code)

    async def _main(self) -> int:
        operations = self._operations
        self._signals.take_wakeup()  # the loop took it when it began to run
        self._signals.deliver_to(self._on_signal)
        server = self._make_server() if self._make_server else None
        management = self._make_management() if self._make_management else None
        self._register_stages(server, management)
        stalls = StallDetector(self._loop, self._stall_threshold)
        if self._stall_threshold:
            stalls.start()
        start = asyncio.create_task(self._start(server, management), name="start-up")
        stop = asyncio.create_task(operations.shutdown.wait(), name="shutdown-trigger")
        await asyncio.wait({start, stop}, return_when=asyncio.FIRST_COMPLETED)
        await stop
        # Still starting when told to stop: what it began is closed by the stages.
        start.cancel()
        report = await operations.shutdown.run()
        stalls.stop()
        code = self._exit_code(report)
        _logger.info("Process ends", extra={"exitCode": code, "reason": report.reason})
        return code

    async def _start(self, server: HttpServer | None, management: HttpServer | None) -> None:
        try:
            # The servers first: probes are answered while everything else is still to come.
            if management is not None:
                await management.open()
            if server is not None:
                await server.open()
            await self._operations.start()
            if server is not None and not await server.start_application():
                raise StartupError("the application's start-up failed; the log above says why")  # noqa: TRY301
            self._signals.reclaim()
            self._reclaim_log()
        except Exception as error:
            self._reclaim_log()
            self._startup_failed = True
            if isinstance(error, StartupError):
                _logger.error("Start-up failed", extra={"detail": str(error)})  # noqa: TRY400 - it says everything
            else:
                _logger.exception("Start-up failed")
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

    def _register_stages(self, server: HttpServer | None, management: HttpServer | None) -> None:
        shutdown = self._operations.shutdown
        if server is not None:
            shutdown.register(Phase.STOP_ACCEPTING, "listeners", StopListening(server, self._gate))
            shutdown.register(
                Phase.DRAIN, "requests", DrainRequests(self._gate, self._operations.clock)
            )
            shutdown.register(Phase.CLOSE, "application", StopApplication(server), first=True)
            shutdown.register(Phase.CLOSE, "server", CloseServer(server))
        if management is not None:
            shutdown.register(Phase.CLOSE, "management server", CloseServer(management))

    def _exit_code(self, report: ShutdownReport) -> int:
        if self._startup_failed:
            return EXIT_STARTUP
        if self._uncaught and self._shutdown_on_uncaught:
            return EXIT_UNCAUGHT
        return EXIT_OK if report.clean else EXIT_STAGE

    # -- triggers ----------------------------------------------------------------------------

    def _on_signal(self, name: str) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the end is reached already
            self._loop.call_soon_threadsafe(self._operations.shutdown.trigger, name)

    def _on_shutdown_event(self, event: ShutdownEvent) -> None:
        if isinstance(event, ShutdownTriggered):
            self._gate.exchanges.leaving = True
            self._signals.arm(event.force_timeout)

    def _on_uncaught(self, where: str, error: BaseException) -> None:
        self._log_uncaught(where, error)
        if not self._shutdown_on_uncaught:
            return
        # The watchdog first: the loop may be the very thing that does not run any more.
        self._signals.arm(self._operations.shutdown.budgets.force)
        with contextlib.suppress(RuntimeError):  # likewise
            self._loop.call_soon_threadsafe(
                self._operations.shutdown.trigger, f"uncaught exception in {where}"
            )

    def _log_uncaught(self, where: str, error: BaseException) -> None:
        self._uncaught += 1
        _logger.error(
            "Uncaught exception",
            exc_info=error,
            extra={"where": where, "count": self._uncaught},
        )

    def _on_loop_exception(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        # What a transport or protocol reports is a connection's trouble, not the process's.
        if error is None or "transport" in context or "protocol" in context:
            _logger.warning(
                "Event loop reports", exc_info=error, extra={"detail": context.get("message")}
            )
            return
        self._on_uncaught("a background task" if "future" in context else "a callback", error)

    def _on_thread_exception(self, args: threading.ExceptHookArgs) -> None:
        if args.exc_value is not None and not isinstance(args.exc_value, SystemExit):
            name = args.thread.name if args.thread else "?"
            self._on_uncaught(f"thread {name}", args.exc_value)
        if self._thread_hook is not threading.__excepthook__:
            self._thread_hook(args)  # the application's own wants to know as well


def _end_children() -> bool:
    """End the processes of multiprocessing, which would be waited for; tell if there were any."""
    multiprocessing = sys.modules.get("multiprocessing")
    if multiprocessing is None:
        return False
    children = multiprocessing.active_children()
    for child in children:
        child.terminate()
    deadline = time.monotonic() + _LAST_GRACE
    for child in children:
        child.join(max(0.0, deadline - time.monotonic()))
        if child.is_alive():
            child.kill()
    return bool(children)


def _busy_threads() -> list[threading.Thread]:
    main = threading.main_thread()
    return [t for t in threading.enumerate() if t is not main and not t.daemon and t.is_alive()]
