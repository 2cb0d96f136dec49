"""Signals and the watchdog, on a thread of their own so that a blocked event loop cannot stop them.

Imports the standard library only: it is installed before anything slow is imported, because the
first process of a container ignores SIGTERM until it has a handler.
"""

import contextlib
import faulthandler
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

EXIT_WATCHDOG = 124
EXIT_FORCED = 130

_STOPPING = (signal.SIGTERM, signal.SIGINT)


class SignalWatch:
    """Turns SIGTERM and SIGINT into one call, and ends the process when the time is over.

    The interpreter's C handler writes each signal's number into our pipe at once, whatever the
    main thread is doing; the thread reads it there. A second SIGINT ends the process immediately
    with 130. From the first signal, or from :meth:`arm`, the process ends with 124 after the force
    timeout, its stacks written to standard error.
    """

    def __init__(self, *, force_timeout: float = 60.0) -> None:
        """``force_timeout`` seconds hold for a signal; :meth:`arm` may set an earlier end."""
        self.force_timeout = force_timeout
        self._lock = threading.Lock()
        self._on_signal: Callable[[str], None] | None = None
        self._pending: str | None = None
        self._deadline: float | None = None
        self._interrupts = 0
        self._passed_on_to = -1
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._thread = threading.Thread(target=self._watch, name="signal-watch", daemon=True)

    def install(self) -> None:
        """Take over the signals. Call it on the main thread, once."""
        for number in _STOPPING:
            signal.signal(number, self._handle)
        self.take_wakeup()
        self._thread.start()

    def take_wakeup(self) -> None:
        """Have signals reported to our pipe, and pass them on to who had them reported before.

        An event loop takes the report for itself when it starts to run, and when an application
        adds a signal handler to it.
        """
        previous = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        if previous != self._writer:
            self._passed_on_to = previous

    def deliver_to(self, on_signal: Callable[[str], None]) -> None:
        """Call ``on_signal`` with the name of the first signal, on the watching thread.

        A signal that came earlier is delivered at once.
        """
        with self._lock:
            self._on_signal = on_signal
            pending = self._pending
        if pending is not None:
            on_signal(pending)

    def arm(self, seconds: float) -> None:
        """End the process in ``seconds`` unless it ends before; the earliest call counts."""
        deadline = time.monotonic() + seconds
        with self._lock:
            if self._deadline is None or deadline < self._deadline:
                self._deadline = deadline
        self._wake(0)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        # Runs on the main thread between two byte codes. The pipe has the number already, unless
        # somebody took the report away: then take it back and say it ourselves.
        previous = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        if previous != self._writer:
            self._passed_on_to = previous
            self._wake(number)

    def _wake(self, number: int) -> None:
        with contextlib.suppress(OSError):  # full: the thread has enough to read already
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
                    self._pass_on(number)
                if number in _STOPPING:
                    self._received(number)

    def _pass_on(self, number: int) -> None:
        if self._passed_on_to >= 0:
            with contextlib.suppress(OSError):  # that loop is gone
                os.write(self._passed_on_to, bytes((number,)))

    def _received(self, number: int) -> None:
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                _last_words("Second SIGINT: ending now, without the rest of the shutdown.")
                os._exit(EXIT_FORCED)
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
        _last_words("Shutdown did not end within SHUTDOWN_FORCE_TIMEOUT; stacks of all threads:")
        with contextlib.suppress(Exception):
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
        os._exit(EXIT_WATCHDOG)


def _last_words(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        os.write(sys.stderr.fileno(), f"{text}\n".encode())
