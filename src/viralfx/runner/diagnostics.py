"""Diagnostics of the running process: a blocked event loop, and a report of the heap at SIGUSR2.

A thread detects a blocked loop and logs the stack that blocks it. For a report, a forked child has
a copy of all objects at one moment, and counts them without blocking the parent (ADR-0028).
"""

import asyncio
import contextlib
import gc
import json
import logging
import os
import select
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from contextvars import Context
from itertools import islice
from pathlib import Path
from types import FrameType

from viralfx.core.extras import MissingExtraError, needed_by
from viralfx.core.ids import is_job_id
from viralfx.runner.signals import ignore_signal
from viralfx.settings.platform import memory_limits

_loop_logger = logging.getLogger("viralfx.loop")
_process_logger = logging.getLogger("viralfx.process")

_MAX_FRAMES = 30
"""Innermost frames that are logged; the outer ones are always the same."""
_CHECKS_PER_THRESHOLD = 4
_MIN_CPU_SHARE = 0.1
"""CPU time per elapsed time below which the process itself was suspended, not its loop blocked."""


class BlockedLoopDetector:
    """Schedules callbacks on the loop, and logs a warning if one does not run in time.

    The warning comes at the threshold and has the stack of the loop's thread. A second line has the
    duration once the loop runs again. If native code holds the interpreter lock, or the process is
    suspended, both lines come at the end.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, threshold: float) -> None:
        """``threshold``: seconds after which a loop that runs no callback counts as blocked."""
        self._loop = loop
        self._threshold = threshold
        self._loop_thread = threading.get_ident()
        self._failed = False
        self._stopped = threading.Event()
        self._callback_ran = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="loop-watch", daemon=True)

    def start(self) -> None:
        """Start the monitor. Call this on the thread of the loop."""
        self._loop_thread = threading.get_ident()
        self._thread.start()

    def stop(self) -> None:
        """Stop the monitor; its thread ends soon after."""
        self._stopped.set()
        self._callback_ran.set()

    def _watch(self) -> None:
        while not self._stopped.wait(self._threshold / _CHECKS_PER_THRESHOLD):
            try:
                self._check()
            except Exception as error:  # noqa: BLE001 - a log filter may raise anything
                self._log_failure(error)

    def _log_failure(self, error: Exception) -> None:
        """Log the first error of the monitor; an uncaught one would shut the process down."""
        if self._failed:
            return
        self._failed = True
        # With another logger, because a filter of the other logger may be the cause.
        with contextlib.suppress(Exception):
            _process_logger.error("Event loop monitor failed", exc_info=error)

    def _check(self) -> None:
        self._callback_ran.clear()
        started_at, cpu = time.monotonic(), time.process_time()
        try:
            self._loop.call_soon_threadsafe(self._callback_ran.set)
        except RuntimeError:  # the loop is closed
            self._stopped.set()
            return
        if self._callback_ran.wait(self._threshold) or self._stopped.is_set():
            return
        stack, context, job = self._stack(), self._context(), self._job()
        # If this thread could not run either, the loop may run again by now.
        late = time.monotonic() - started_at > 2 * self._threshold
        if late and time.process_time() - cpu < _MIN_CPU_SHARE * (time.monotonic() - started_at):
            self._callback_ran.wait()
            _loop_logger.warning(
                "Process did not run", extra={"duration": _milliseconds(started_at)}
            )
            return
        extra = {"blocked": _milliseconds(started_at), "stack": stack, **job}
        context.run(_loop_logger.warning, "Event loop is blocked", extra=extra)
        self._callback_ran.wait()
        if not self._stopped.is_set():
            _loop_logger.info(
                "Event loop runs again", extra={"duration": _milliseconds(started_at)}
            )

    def _stack(self) -> list[str]:
        current = sys._current_frames().get(self._loop_thread)  # noqa: SLF001 - it has no other name
        # Without source lines and values, which might contain secrets.
        frames = traceback.extract_stack(current)[-_MAX_FRAMES:] if current is not None else []
        return [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames]

    def _job(self) -> dict[str, object]:
        # The asyncio task of a job has the job's id as its name.
        task = asyncio.current_task(self._loop)
        return {"job": task.get_name()} if task and is_job_id(task.get_name()) else {}

    def _context(self) -> Context:
        """Return the context of the task that blocks the loop, so that log lines have its ids.

        The context is empty if no task runs, and before Python 3.12, which does not expose it.
        """
        if sys.version_info >= (3, 12):
            task = asyncio.current_task(self._loop)
            if task is not None:
                # A copy, because the context itself is entered on the loop's thread.
                return task.get_context().copy()
        return Context()


def _milliseconds(since: float) -> int:
    return round((time.monotonic() - since) * 1000)


_MAX_MEMORY_SHARE = 0.95
"""The share of the memory limit that both processes may use. The rest covers the time between two
measurements."""
_PRIVATE = ("Private_Clean:", "Private_Dirty:")


class MemoryHeadroom:
    """Measures the memory that this process and its forked child use together."""

    def __init__(self, child: int) -> None:
        """``child``: the process id of the child."""
        self._limit = min(memory_limits(), default=None)
        self._child = child

    def is_short(self) -> bool:
        """Return True if the memory limit is nearly reached; False if there is no limit."""
        if self._limit is None:
            return False
        # Of the child only private pages: new ones, and those that either process wrote to.
        used = _bytes(os.getpid(), "Rss:") + _bytes(self._child, *_PRIVATE)
        return used > _MAX_MEMORY_SHARE * self._limit


def _bytes(pid: int, *names: str) -> int:
    """Return the sum of these counters of a process; 0 for a process that has ended."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
    except OSError:
        return 0
    fields = [line.split() for line in text.splitlines()]
    return sum(1024 * int(field[1]) for field in fields if field[0] in names)


_heap_logger = logging.getLogger("viralfx.heap")

_MAX_SECONDS = 120.0
"""Time after which a child that is still counting is killed."""
_MEASURE_SECONDS = 0.05
"""Interval of the memory measurements."""
_ROWS = 40
_UNHANDLED = (signal.SIG_DFL, ignore_signal, None)
_MAX_DESCRIPTORS = 2**20


class HeapReports:
    """Makes heap reports, one at a time, each in a new file that only its owner can read."""

    def __init__(self, folder: str | None) -> None:
        """``folder``: the directory of the reports; None: the system's temporary directory."""
        self._folder = Path(folder) if folder else _temporary()
        self._busy = threading.Lock()

    def install(self) -> None:
        """Make a report at each SIGUSR2, unless the application has its own handler.

        Call this on the main thread.
        """
        if signal.getsignal(signal.SIGUSR2) in _UNHANDLED:
            signal.signal(signal.SIGUSR2, self._on_signal)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        # Runs between two byte codes of the main thread, so it also works while the main thread
        # blocks the event loop.
        self.make()

    def make(self) -> None:
        """Start a report and return immediately. A log line has its path, or the error."""
        if not self._busy.acquire(blocking=False):
            _heap_logger.warning("Heap report already in progress")
            return
        name = f"heap-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{os.getpid()}.txt"
        path = self._folder / name
        try:
            reader, writer = os.pipe()
        except OSError as error:
            self._fail(error.strerror)
            return
        try:
            with warnings.catch_warnings():
                # Forking with threads is safe here: the child needs no lock that a thread may hold,
                # neither of the parent nor of fork hooks of other libraries.
                warnings.simplefilter("ignore", DeprecationWarning)
                child = os.fork()
        except OSError as error:
            os.close(reader)
            os.close(writer)
            self._fail(error.strerror)
            return
        if child == 0:
            _report_and_exit(path, writer)
        os.close(writer)
        waiter = threading.Thread(
            target=self._wait_for_report,
            args=(child, reader, path),
            name="heap-report",
            daemon=True,
        )
        try:
            waiter.start()
        except RuntimeError as error:  # no more threads may run
            os.close(reader)
            _kill(child)
            _wait_for_end(child)
            _remove(path)
            self._fail(str(error))

    def _fail(self, detail: str | None) -> None:
        # Without a traceback, which would only show the code that the signal interrupted.
        self._busy.release()
        _heap_logger.error("Heap report failed", extra={"detail": detail})

    def _wait_for_report(self, child: int, reader: int, path: Path) -> None:
        started_at, output = time.monotonic(), b""
        try:
            problem = _wait_for_output(reader, MemoryHeadroom(child))
            output = os.read(reader, select.PIPE_BUF) if problem is None else b""
            if problem is not None:
                _kill(child)
            _wait_for_end(child)
        finally:
            os.close(reader)
            self._busy.release()
        duration = round((time.monotonic() - started_at) * 1000)
        if not output:
            _remove(path)
        problem = problem or "the child process ended early"
        result: dict[str, object] = json.loads(output) if output else {"detail": problem}
        extra = {"path": str(path), "duration": duration, **result}
        if "detail" in result:
            _heap_logger.error("Heap report failed", extra=extra)
        else:
            _heap_logger.warning("Heap report written", extra=extra)


def _wait_for_output(reader: int, headroom: MemoryHeadroom) -> str | None:
    """Wait until the child has written its result or ended; return the reason to kill it."""
    deadline = time.monotonic() + _MAX_SECONDS
    # Not ``select``, which fails for descriptors above 1023; a server has more connections.
    poll = select.poll()
    poll.register(reader, select.POLLIN)
    while not poll.poll(_MEASURE_SECONDS * 1000):
        if headroom.is_short():
            # Otherwise the kernel may kill the service instead of the child.
            return "not enough memory"
        if time.monotonic() > deadline:
            return f"not finished after {_MAX_SECONDS:g} s"
    return None


def _kill(child: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended already
        os.kill(child, signal.SIGKILL)


def _wait_for_end(child: int) -> None:
    # The parent process may have SIGCHLD ignored, or the application may wait for all children.
    with contextlib.suppress(ChildProcessError):
        os.waitpid(child, 0)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def _temporary() -> Path:
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError:
        # No directory is writable, as in a read-only container. A report then fails with a log line
        # that has this path; the service is not affected.
        return Path("/tmp")  # noqa: S108 - it is missing or read-only


def _report_and_exit(path: Path, writer: int) -> None:
    """Write the report in the child, and exit without touching the objects of the parent."""
    try:
        # Otherwise connections that the parent closes would stay open in the child.
        os.dup2(writer, 3)
        os.closerange(4, _MAX_DESCRIPTORS)
        result = _write(path, _report)
        os.write(3, json.dumps(result).encode())
    finally:
        os._exit(0)


def _write(path: Path, report: Callable[[], tuple[str, int, int]]) -> dict[str, object]:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        return {"detail": f"cannot create the file: {error.strerror}"}
    try:
        text, objects, size = report()
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
    except MissingExtraError as error:
        _remove(path)
        return {"detail": str(error)}
    except Exception as error:  # noqa: BLE001 - the child can only report to its parent
        _remove(path)
        reason = error.strerror if isinstance(error, OSError) else type(error).__name__
        return {"detail": f"cannot write the file: {reason}"}
    return {"objects": objects, "heapBytes": size}


def _report() -> tuple[str, int, int]:
    """Return the report, the number of objects and their bytes.

    The report has types and counts but no values, because values may come from requests.
    """
    # Not at the top: only a child needs it, and its memory is freed when the child ends.
    with needed_by("a heap report"):
        from guppy import hpy  # noqa: PLC0415

    gc.unfreeze()
    heap = hpy().heap()
    rows = [f"{'objects':>10} {'bytes':>14} {'of all':>7}  kind"]
    for row in islice(heap.bytype.partition.get_rows(), _ROWS):
        share = row.size / heap.size
        rows.append(f"{row.count:>10} {row.size:>14} {share:>7.1%}  {row.name}")
    head = [
        f"Heap of process {os.getppid()}, Python {sys.version.split()[0]}",
        f"{heap.count} objects, {heap.size} bytes",
        f"Garbage collector: {gc.get_count()} new objects by generation",
        "",
    ]
    return "\n".join([*head, *rows, ""]), heap.count, heap.size
