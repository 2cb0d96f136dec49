"""Signals and the watchdog, on a thread that a blocked event loop cannot stop.

This module imports the standard library only, because it is installed before slow imports. Until
then the entry point blocks the signals, so an early signal is delivered at the installation.
"""

import contextlib
import faulthandler
import logging
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

EXIT_WATCHDOG = 124
EXIT_FORCED = 130

_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_UNHANDLED = (signal.SIG_DFL, signal.SIG_IGN, signal.default_int_handler, None)


class SignalWatch:
    """Turns SIGTERM, SIGHUP and SIGINT into one call, and ends the process at the deadline.

    The interpreter's C handler writes the number of each signal into a pipe immediately, even if
    the main thread is blocked, and the watching thread reads the pipe. A second SIGINT exits
    immediately with 130. After the first signal or :meth:`arm`, the process exits with 124 at the
    force timeout and writes all stacks to standard error. If SIGHUP is ignored when the process
    starts, as with ``nohup``, it stays ignored.
    """

    def __init__(self, *, force_timeout: float = 60.0) -> None:
        """``force_timeout``: seconds from a signal; :meth:`arm` may set an earlier deadline."""
        self.force_timeout = force_timeout
        self._lock = threading.Lock()
        self._on_signal: Callable[[str], None] | None = None
        self._pending: str | None = None
        self._deadline: float | None = None
        self._interrupts = 0
        self.describe_tasks: Callable[[], str] = str
        """Returns the stacks of the event loop's tasks, for the report at the force timeout."""
        self._previous_wakeup_fd = -1
        self._handled: tuple[signal.Signals, ...] = _STOPPING
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._thread = threading.Thread(target=self._watch, name="signal-watch", daemon=True)

    def install(self) -> None:
        """Install the handlers and unblock the signals. Call this once, on the main thread.

        SIGUSR2 is ignored until a handler for it is installed.
        """
        if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
            self._handled = tuple(each for each in _STOPPING if each is not signal.SIGHUP)
        if signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL:
            signal.signal(signal.SIGUSR2, ignore_signal)
        self.reinstall()
        # A forked child shares the pipe and the handlers, so its signals would be read as ours.
        # They stay blocked until the child has released both.
        os.register_at_fork(
            before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING),
            after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING),
            after_in_child=_release_in_child,
        )
        # Before the thread starts, so that it is not the only thread that can receive a signal.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)
        self._thread.start()

    def reinstall(self) -> None:
        """Handle signals again that the application ignores or reset; keep its own handlers."""
        for number in self._handled:
            if signal.getsignal(number) in _UNHANDLED:
                signal.signal(number, self._handle)
        self.claim_wakeup_fd()

    def claim_wakeup_fd(self) -> None:
        """Make our pipe the wakeup descriptor, and forward signals to the previous one.

        An event loop replaces the wakeup descriptor when it starts to run, and when an application
        adds a signal handler to it.
        """
        previous = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        if previous != self._writer:
            self._previous_wakeup_fd = previous

    def deliver_to(self, on_signal: Callable[[str], None]) -> None:
        """Call ``on_signal`` with the name of the first signal, on the watching thread.

        A signal that has arrived earlier is delivered immediately.
        """
        with self._lock:
            self._on_signal = on_signal
            pending = self._pending
        if pending is not None:
            on_signal(pending)

    def arm(self, seconds: float) -> None:
        """Exit in ``seconds`` unless the process ends first; the earliest deadline counts."""
        deadline = time.monotonic() + seconds
        with self._lock:
            if self._deadline is None or deadline < self._deadline:
                self._deadline = deadline
        self._wake(0)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        # Runs on the main thread between two byte codes. The number is in the pipe already, unless
        # the wakeup descriptor was replaced: then reclaim it and write the number here.
        previous = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        if previous != self._writer:
            self._previous_wakeup_fd = previous
            self._wake(number)

    def _wake(self, number: int) -> None:
        with contextlib.suppress(OSError):  # the pipe is full, so the thread will wake up
            os.write(self._writer, bytes((number,)))

    def _watch(self) -> None:
        while True:
            with self._lock:
                deadline = self._deadline
            wait = None if deadline is None else max(0.0, deadline - time.monotonic())
            readable, _, _ = select.select([self._reader], [], [], wait)
            if not readable:
                self._expire()
            for number in os.read(self._reader, 512):
                if number:
                    self._forward(number)
                if number in _STOPPING:
                    self._received(number)

    def _forward(self, number: int) -> None:
        if self._previous_wakeup_fd >= 0:
            with contextlib.suppress(OSError):  # that event loop is closed
                os.write(self._previous_wakeup_fd, bytes((number,)))

    def _received(self, number: int) -> None:
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                text = "Second SIGINT: exiting without the rest of the shutdown."
                _exit_with(EXIT_FORCED, text)
        self.arm(self.force_timeout)
        name = signal.Signals(number).name
        with self._lock:
            first = self._pending is None
            if first:
                self._pending = name
            on_signal = self._on_signal
        if first and on_signal is not None:
            on_signal(name)

    def _expire(self) -> None:
        late = "Shutdown did not end within SHUTDOWN_FORCE_TIMEOUT"
        text = f"{late}; stacks of all threads and tasks:"
        _exit_with(EXIT_WATCHDOG, text, tasks=self.describe_tasks)


def ignore_signal(_number: int, _frame: FrameType | None) -> None:
    """Ignore a signal whose handler is not installed yet and whose default ends the process."""


_STDERR = 2
_EXIT_REPORT_SECONDS = 1.0
"""Time limit for the report before the exit."""


def _release_in_child() -> None:
    with contextlib.suppress(ValueError):  # not the child's main thread
        signal.set_wakeup_fd(-1)
        for number in _STOPPING:
            if isinstance(getattr(signal.getsignal(number), "__self__", None), SignalWatch):
                signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)


def _exit_with(code: int, text: str, *, tasks: Callable[[], str] | None = None) -> None:
    """Exit after a report to standard error, which may fail or block without delaying the exit.

    With ``tasks`` the report has the stacks of all threads, then the result of that function.
    """

    def report() -> None:
        # The descriptor, because sys.stderr may be None, closed or replaced.
        with contextlib.suppress(Exception):
            os.write(_STDERR, f"{text}\n".encode())
            if tasks is not None:
                # Threads by C code, which works in any state of the interpreter.
                faulthandler.dump_traceback(_STDERR, all_threads=True)
                with contextlib.suppress(Exception):
                    os.write(_STDERR, tasks().encode("utf-8", "backslashreplace"))
            for handler in logging.getLogger().handlers:
                handler.flush()

    try:
        reporter = threading.Thread(target=report, name="exit-report", daemon=True)
        reporter.start()
        reporter.join(_EXIT_REPORT_SECONDS)  # writing to a full pipe without a reader blocks
    finally:
        os._exit(code)
