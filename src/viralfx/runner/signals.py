"""Signals and the watchdog, on a thread of their own so that a blocked event loop cannot stop them.

Imports the standard library only: it is installed before anything slow is imported, because the
first process of a container ignores SIGTERM until it has a handler.
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

_STOPPING = (signal.SIGTERM, signal.SIGINT)
_NOBODY = (signal.SIG_DFL, signal.SIG_IGN, signal.default_int_handler, None)


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
        """Take over the signals. Call it on the main thread, once.

        SIGUSR2 does nothing from here on, until somebody has a use for it.
        """
        if signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL:
            signal.signal(signal.SIGUSR2, not_yet)
        self.reclaim()
        # A forked child shares our pipe and our handlers, so a signal for it would be read as one
        # for us. It gets none before it has let go of both.
        os.register_at_fork(
            before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING),
            after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING),
            after_in_child=_let_go,
        )
        self._thread.start()

    def reclaim(self) -> None:
        """Take back what an application may have put to rest; its own handlers stay."""
        for number in _STOPPING:
            if signal.getsignal(number) in _NOBODY:
                signal.signal(number, self._handle)
        self.take_wakeup()

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
                text = "Second SIGINT: ending now, without the rest of the shutdown."
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
        text = "Shutdown did not end within SHUTDOWN_FORCE_TIMEOUT; stacks of all threads:"
        _exit_with(EXIT_WATCHDOG, text, stacks=True)


def not_yet(_number: int, _frame: FrameType | None) -> None:
    """Do nothing at a signal that asks for what is still to come, but would end the process."""


_STDERR = 2
_LAST_WORDS = 1.0
"""Seconds that may pass over them."""


def _let_go() -> None:
    with contextlib.suppress(ValueError):  # not the child's main thread
        signal.set_wakeup_fd(-1)
        for number in _STOPPING:
            if isinstance(getattr(signal.getsignal(number), "__self__", None), SignalWatch):
                signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)


def _exit_with(code: int, text: str, *, stacks: bool = False) -> None:
    """End the process; what is said before may fail or block without holding the end up."""

    def say() -> None:
        # The descriptor, not sys.stderr: that may be None, closed or somebody else's object.
        with contextlib.suppress(Exception):
            os.write(_STDERR, f"{text}\n".encode())
            if stacks:
                faulthandler.dump_traceback(_STDERR, all_threads=True)
            for handler in logging.getLogger().handlers:
                handler.flush()

    try:
        teller = threading.Thread(target=say, name="last-words", daemon=True)
        teller.start()
        teller.join(_LAST_WORDS)  # a full pipe that nobody reads blocks for ever
    finally:
        os._exit(code)
