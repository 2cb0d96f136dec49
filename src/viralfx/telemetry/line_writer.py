"""Writes lines to a file descriptor without ever making who logs wait for it.

A pipe whose reader stopped reading blocks whoever writes into it, and so would a hung disk: that
must be a thread of its own and not the event loop (ADR-0027).
"""

import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from viralfx.telemetry.flag import Flag
from viralfx.telemetry.writes import Output, in_writes

_MOST_WAITING = 8 * 2**20
"""Bytes of lines that wait to be written; what comes on top of them is lost, and counted."""
_GATHERING = 0.02
"""Seconds in which lines are gathered: one write of many costs a fraction of many writes."""
_TOGETHER = 256
"""Lines that are made together: what that costs by itself hardly counts for each of them then."""
_LAST_WAIT = 1.0
"""Seconds that :meth:`LineWriter.flush` waits for a descriptor that takes nothing."""


class LineWriter:
    """Takes lines from any thread and writes them in order.

    Whoever brings the line that fills a write also writes, if the descriptor takes it at once: a
    switch of threads would cost more. All else is done by a thread that the writer starts itself,
    and that may wait.

    A finalizer or a signal's handler may log in the midst of anything here, on the same thread: no
    lock that it could meet is one that its own thread would wait for.
    """

    def __init__(
        self,
        descriptor: int,
        *,
        tell_lost: Callable[[int], bytes],
        make: Callable[[Sequence[Any]], bytes] = b"".join,
        most_waiting: int = _MOST_WAITING,
    ) -> None:
        """``tell_lost`` makes the line that says how many were lost, once one can be written.

        ``make`` makes lines, one each, of what is given to :meth:`write_later`.
        """
        self._output = Output(descriptor)
        self._at_once = self._output.at_once
        self._tell_lost = tell_lost
        self._make = make
        self._most_waiting = most_waiting
        self._unmade: deque[Any] = deque()
        self._awaited = False
        self._times_written = 0
        self._lines: deque[bytes] = deque()
        self._waiting = 0
        self._lost = 0
        self._to_tell = False
        self._writing = self._closed = False
        self._gave_up = self._direct = False
        self._thread: threading.Thread | None = None
        self._make_locks()
        begin = weakref.WeakMethod(self._begin_in_child)
        os.register_at_fork(after_in_child=lambda: (found := begin()) and found())

    def _make_locks(self) -> None:
        self._lock = threading.RLock()
        self._making = threading.Lock()
        self._maker: int | None = None
        self._idle = threading.Condition(self._lock)
        self._turn = threading.Lock()
        self._wanted = Flag()
        self._hurry = Flag()

    @property
    def lost(self) -> int:
        """Lines that were lost and are not told of yet."""
        return self._lost

    def count_lost(self, lines: int) -> None:
        """Count lines that could not be made; they are told of after the next one."""
        with self._lock:
            self._lost += lines

    def write(self, line: bytes, *, urgent: bool = False) -> None:
        """Take a line, its end included; it is written within moments, an urgent one at once."""
        # Also those that another thread is making at the moment come before this one.
        if self._unmade or self._making.locked():
            self._make_lines()
        self._append(line)
        if urgent:
            self._hurry.set()

    def write_later(self, item: Any) -> None:
        """Take what a line is made of: many of them together cost a fraction of one by one."""
        self._unmade.append(item)
        if self._direct or len(self._unmade) >= _TOGETHER:
            self._make_lines()
        elif not self._awaited:
            self._awaited = True
            self._wake()

    def _make_lines(self) -> None:
        """Make lines of what waits for it."""
        me = threading.get_ident()
        if self._maker == me:
            # In the midst of this very work: what was brought now is for the writer's thread.
            self._wake()
            return
        # One at a time, or lines of one thread could overtake each other.
        with self._making:
            self._maker = me
            try:
                self._make_what_waits()
            finally:
                self._maker = None

    def _make_what_waits(self) -> None:
        # In this order: what is brought from here on is waited for, or is among these.
        self._awaited = False
        items = [self._unmade.popleft() for _ in range(len(self._unmade))]
        if not items:
            return
        try:
            made = self._make(items)
        except Exception:  # noqa: BLE001 - whatever a value does; nobody may fail for it
            self.count_lost(len(items))
            return
        for lines in in_writes(made, self._at_once):
            if not self._written_at_once(lines):
                self._append(lines)

    def _written_at_once(self, lines: bytes) -> bool:
        """Write lines that nothing waits before, if that cannot take long; tell whether it did."""
        if self._lines or self._lost or len(lines) > self._at_once:
            return False
        if not self._turn.acquire(blocking=False):
            return False
        try:
            if self._lines or not self._output.ready():
                return False
            self._put(lines)
            self._times_written += 1
        finally:
            self._turn.release()
        return True

    def _append(self, lines: bytes) -> None:
        if self._direct:
            self._put(lines)
            return
        size, count = len(lines), lines.count(b"\n")
        with self._lock:
            if self._waiting + size > self._most_waiting:
                self._lost += count
                return
            first = not self._lines
            self._lines.append(lines)
            self._waiting += size
        if first or self._thread is None:
            self._wake()
        if self._waiting > self._at_once and self._turn.acquire(blocking=False):
            try:
                self._write_if_ready()
            finally:
                self._turn.release()

    def _wake(self) -> None:
        if self._thread is None:
            self._start()
        self._wanted.set()

    def _write_if_ready(self) -> None:
        """Write what fits into one write, if that cannot take long; the rest is for the thread."""
        fits = self._lines and len(self._lines[0]) <= self._at_once
        if fits and not self._lost and self._output.ready():
            self._put(self._take())
            self._times_written += 1
            with self._lock:
                self._writing = False
        else:
            self._hurry.set()

    def flush(self, seconds: float = _LAST_WAIT) -> bool:
        """Wait until everything is written, at most ``seconds``; tell whether it is.

        Who waited in vain once does not wait again: the end of a process comes by here twice.
        """
        if self._direct:
            return True
        self._make_lines()
        if self._thread is None:
            return self._write_alone(seconds)
        self._hurry.set()
        with self._idle:
            wait = 0.0 if self._gave_up else seconds
            done = self._idle.wait_for(self._nothing_waits, wait)
            self._gave_up = not done
        return done

    def _write_alone(self, seconds: float) -> bool:
        """Write what waits as long as it is taken; tell whether that was everything."""
        deadline = time.monotonic() + seconds
        with self._turn:
            while self._lines and self._output.wait(max(0.0, deadline - time.monotonic())):
                self._put(self._take())
            if self._to_tell and self._output.wait(max(0.0, deadline - time.monotonic())):
                self._tell()
            self._writing = False
        return not (self._lines or self._to_tell)

    def _nothing_waits(self) -> bool:
        return not (self._unmade or self._lines or self._writing or self._to_tell)

    def close(self) -> None:
        """Write what waits; lines that come later are written by who brings them."""
        # What is lost is told of after the next line, and there may be none any more.
        self._make_lines()
        self._to_tell = self._lost > 0
        self._wanted.set()
        if self.flush():
            self._direct = True
        self._closed = True
        self._hurry.set()
        self._wanted.set()

    def _start(self) -> None:
        with self._lock:
            if self._thread is not None:
                return
            self._thread = threading.Thread(target=self._run, name="log-writer", daemon=True)
            try:
                self._thread.start()
            except RuntimeError:  # no more threads may run; who brings the next line tries again
                self._thread = None
                self._awaited = False

    def _run(self) -> None:
        while not self._closed or self._unmade or self._lines:
            self._wanted.wait()
            # As long as those who bring lines fill writes, and write, there is nothing to do.
            written = self._times_written
            while not self._hurry.wait(_GATHERING) and written != self._times_written:
                written = self._times_written
            self._wanted.clear()
            self._hurry.clear()
            self._make_lines()
            with self._turn:
                while chunk := self._take():
                    self._put(chunk)
                if self._to_tell:
                    self._tell()
            with self._idle:
                self._writing = False
                self._idle.notify_all()
        # Also where the end came before the reader read on: nobody else writes from here on.
        self._direct = True

    def _take(self) -> bytes:
        """Return the next lines that go into one write; nothing when there are none."""
        with self._lock:
            chunk: list[bytes] = []
            size = 0
            while self._lines and (not chunk or size + len(self._lines[0]) <= self._at_once):
                chunk.append(self._lines.popleft())
                size += len(chunk[-1])
            self._waiting -= size
            self._writing = bool(chunk)
        return b"".join(chunk)

    def _tell(self) -> None:
        if self._lost:
            self._put(b"")
        self._to_tell = False

    def _put(self, chunk: bytes) -> None:
        unwritten = self._output.write(chunk)
        if not unwritten and self._lost:
            with self._lock:
                lost, self._lost = self._lost, 0
            unwritten = self._output.write(self._tell_lost(lost)) and lost
        if unwritten:
            # A full disk, or nobody who reads any more: what waits would fare no better.
            with self._lock:
                unwritten += sum(each.count(b"\n") for each in list(self._lines))
                self._lost += unwritten
                self._lines.clear()
                self._waiting = 0

    def _begin_in_child(self) -> None:
        """Write by itself in a forked child, which has no thread of ours; our lines stay ours."""
        self._make_locks()
        self._unmade.clear()
        self._lines.clear()
        self._waiting = self._lost = 0
        self._direct = True
