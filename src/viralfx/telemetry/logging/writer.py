"""Writes log lines to a file descriptor without blocking the caller.

A pipe whose reader has stopped blocks every writer, and so does a hung disk. Such writes therefore
happen in a thread of their own and never on the event loop (ADR-0027).
"""

import os
import select
import stat
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from queue import Empty, SimpleQueue
from typing import Any


class AutoResetEvent:
    """An event that one thread waits for and any thread sets; waiting resets it.

    Unlike ``threading.Event``, setting it from a finalizer or signal handler cannot deadlock.
    """

    def __init__(self) -> None:
        self._sets: SimpleQueue[None] = SimpleQueue()

    def set(self) -> None:
        """Set the event: it ends the current wait or the next one."""
        if self._sets.empty():
            self._sets.put(None)

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until the event is set, and reset it; return False after ``seconds``."""
        try:
            self._sets.get(timeout=seconds)
        except Empty:
            return False
        return True

    def clear(self) -> None:
        """Reset the event."""
        while not self._sets.empty():
            self._sets.get()


_FILE_WRITE_BYTES = 2**17
_LINE_END = ord("\n")


class Output:
    """A file descriptor to which lines are written."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._torn = False
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)
        # A terminal reports that it is writable as soon as one byte fits. A longer write then
        # blocks, without limit after Ctrl-S.
        self._poll_is_reliable = not os.isatty(descriptor)
        self.max_write_bytes = max_write_bytes(descriptor)

    def ready(self) -> bool:
        """Return True if a write of ``max_write_bytes`` is certain not to block."""
        return self._poll_is_reliable and bool(self._poll.poll(0))

    def wait(self, seconds: float) -> bool:
        """Wait up to ``seconds`` until the descriptor is writable; return whether it is."""
        return bool(self._poll.poll(seconds * 1000))

    def write(self, chunk: bytes) -> int:
        """Write all lines, blocking if necessary; return the number of lines that failed."""
        # If the last write ended within a line, end that line first, so that the next is whole.
        rest = memoryview(b"\n" + chunk if self._torn else chunk)
        try:
            while rest:
                try:
                    written = os.write(self._descriptor, rest)
                except BlockingIOError:
                    # Another process that shares the descriptor made it non-blocking.
                    self._wait_unshared(1.0)
                    continue
                self._torn = rest[written - 1] != _LINE_END
                rest = rest[written:]
        except OSError:
            return min(bytes(rest).count(b"\n"), chunk.count(b"\n"))
        return 0

    def _wait_unshared(self, seconds: float) -> None:
        # With a poll object of its own: after closing, several threads may write, and one object
        # serves one thread at a time. ``select`` does not accept descriptors above 1023.
        poll = select.poll()
        poll.register(self._descriptor, select.POLLOUT)
        poll.poll(seconds * 1000)


def max_write_bytes(descriptor: int) -> int:
    """Return how many bytes go into one write.

    For a pipe this is ``PIPE_BUF``: such writes are atomic, and do not block if the pipe is
    writable. Files have no such limit, and every write has a cost, so theirs are larger.
    """
    try:
        is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
    except OSError:
        is_file = False
    return _FILE_WRITE_BYTES if is_file else select.PIPE_BUF


def split_writes(lines: bytes, max_bytes: int) -> Iterator[bytes]:
    """Yield whole lines in chunks of up to ``max_bytes``; a longer line is a chunk of its own."""
    start = 0
    while len(lines) - start > max_bytes:
        end = lines.rfind(b"\n", start, start + max_bytes)
        if end < 0:
            end = lines.index(b"\n", start)
        yield lines[start : end + 1]
        start = end + 1
    if start < len(lines):
        yield lines[start:]


_MAX_WAITING_BYTES = 8 * 2**20
"""Limit of the lines that wait to be written; further lines are dropped and counted."""
_GATHER_SECONDS = 0.02
"""Time in which lines are gathered: one large write costs a fraction of many small ones."""
_BATCH_LINES = 256
"""Deferred lines that are rendered together, to spread the fixed cost of rendering."""
_FLUSH_SECONDS = 1.0
"""Default time for which :meth:`LineWriter.flush` waits for a blocked descriptor."""


_writers: "weakref.WeakSet[LineWriter]" = weakref.WeakSet()


def lost_lines() -> int:
    """Return the number of lines that the writers of this process have lost so far."""
    return sum(writer.lost_total for writer in list(_writers))


class LineWriter:
    """Accepts lines from any thread and writes them in order.

    The caller whose line fills a chunk writes the chunk itself if that cannot block, because a
    switch of threads would cost more. The writer's own thread does all other writes and may block.

    A finalizer or signal handler may log on a thread that is inside any of these methods, so no
    lock may make a thread wait for itself.
    """

    def __init__(
        self,
        descriptor: int,
        *,
        lost_warning: Callable[[int], bytes],
        render_deferred: Callable[[Sequence[Any]], bytes] = b"".join,
        max_waiting_bytes: int = _MAX_WAITING_BYTES,
    ) -> None:
        """``lost_warning`` renders the line that reports the number of lost lines.

        ``render_deferred`` renders the items of :meth:`write_later`, one line each.
        """
        self._output = Output(descriptor)
        self._max_write_bytes = self._output.max_write_bytes
        self._lost_warning = lost_warning
        self._render_deferred = render_deferred
        self._max_waiting_bytes = max_waiting_bytes
        self._deferred: deque[Any] = deque()
        self._wake_requested = False
        self._caller_writes = 0
        self._lines: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._lost = self._lost_total = 0
        self._must_report_lost = False
        self._writing = self._closed = False
        self._flush_timed_out = self._write_through = False
        self._thread: threading.Thread | None = None
        self._make_locks()
        _writers.add(self)
        begin = weakref.WeakMethod(self._begin_in_child)
        os.register_at_fork(after_in_child=lambda: (found := begin()) and found())

    def _make_locks(self) -> None:
        self._lock = threading.RLock()
        self._render_lock = threading.Lock()
        self._rendering_thread: int | None = None
        self._idle = threading.Condition(self._lock)
        self._write_lock = threading.Lock()
        self._work = AutoResetEvent()
        self._write_now = AutoResetEvent()

    @property
    def lost(self) -> int:
        """Lines that were lost and not yet reported."""
        return self._lost

    @property
    def lost_total(self) -> int:
        """All lines that were lost so far."""
        return self._lost_total

    def count_lost(self, lines: int) -> None:
        """Count lines that could not be rendered; the warning follows the next line."""
        with self._lock:
            self._lost += lines
            self._lost_total += lines

    def write(self, line: bytes, *, urgent: bool = False) -> None:
        """Accept a line with its newline. It is written within moments; an urgent one at once."""
        # Earlier deferred lines come first, also those that another thread is rendering now.
        if self._deferred or self._render_lock.locked():
            self._flush_deferred()
        self._append(line)
        if urgent:
            self._write_now.set()

    def write_later(self, item: Any) -> None:
        """Accept an item that is rendered later; rendering many together is much cheaper."""
        self._deferred.append(item)
        if self._write_through or len(self._deferred) >= _BATCH_LINES:
            self._flush_deferred()
        elif not self._wake_requested:
            self._wake_requested = True
            self._wake()

    def _flush_deferred(self) -> None:
        """Render and write or enqueue all deferred items."""
        me = threading.get_ident()
        if self._rendering_thread == me:
            # Re-entered from a finalizer or signal handler: the writer's thread does the rest.
            self._wake()
            return
        # One thread at a time, to keep the lines of each thread in order.
        with self._render_lock:
            self._rendering_thread = me
            try:
                self._render_batch()
            finally:
                self._rendering_thread = None

    def _render_batch(self) -> None:
        # Reset first: a later item either wakes the writer again or is in this batch.
        self._wake_requested = False
        items = [self._deferred.popleft() for _ in range(len(self._deferred))]
        if not items:
            return
        try:
            made = self._render_deferred(items)
        except Exception:  # noqa: BLE001 - raised by a value; logging must not fail the caller
            self.count_lost(len(items))
            return
        for lines in split_writes(made, self._max_write_bytes):
            if not self._wrote_directly(lines):
                self._append(lines)

    def _wrote_directly(self, lines: bytes) -> bool:
        """Write lines directly if the queue is empty and that cannot block; return success."""
        if self._lines or self._lost or len(lines) > self._max_write_bytes:
            return False
        if not self._write_lock.acquire(blocking=False):
            return False
        try:
            if self._lines or not self._output.ready():
                return False
            self._write_chunk(lines)
            self._caller_writes += 1
        finally:
            self._write_lock.release()
        return True

    def _append(self, lines: bytes) -> None:
        if self._write_through:
            self._write_chunk(lines)
            return
        size, count = len(lines), lines.count(b"\n")
        with self._lock:
            if self._waiting_bytes + size > self._max_waiting_bytes:
                self._lost += count
                self._lost_total += count
                return
            first = not self._lines
            self._lines.append(lines)
            self._waiting_bytes += size
        if first or self._thread is None:
            self._wake()
        if self._waiting_bytes > self._max_write_bytes and self._write_lock.acquire(blocking=False):
            try:
                self._write_if_ready()
            finally:
                self._write_lock.release()

    def _wake(self) -> None:
        if self._thread is None:
            self._start()
        self._work.set()

    def _write_if_ready(self) -> None:
        """Write one chunk if that cannot block; otherwise leave it to the writer's thread."""
        fits = self._lines and len(self._lines[0]) <= self._max_write_bytes
        if fits and not self._lost and self._output.ready():
            self._write_chunk(self._next_chunk())
            self._caller_writes += 1
            with self._lock:
                self._writing = False
        else:
            self._write_now.set()

    def flush(self, seconds: float = _FLUSH_SECONDS) -> bool:
        """Wait up to ``seconds`` until everything is written; return whether it is.

        After one timeout further calls return at once, because a process flushes twice at its end.
        """
        if self._write_through:
            return True
        self._flush_deferred()
        if self._thread is None:
            return self._write_without_thread(seconds)
        self._write_now.set()
        with self._idle:
            wait = 0.0 if self._flush_timed_out else seconds
            done = self._idle.wait_for(self._nothing_waits, wait)
            self._flush_timed_out = not done
        return done

    def _write_without_thread(self, seconds: float) -> bool:
        """Write queued lines while the descriptor is writable; return whether all are written."""
        deadline = time.monotonic() + seconds
        with self._write_lock:
            while self._lines and self._output.wait(max(0.0, deadline - time.monotonic())):
                self._write_chunk(self._next_chunk())
            if self._must_report_lost and self._output.wait(max(0.0, deadline - time.monotonic())):
                self._write_lost_warning()
            self._writing = False
        return not (self._lines or self._must_report_lost)

    def _nothing_waits(self) -> bool:
        return not (self._deferred or self._lines or self._writing or self._must_report_lost)

    def close(self) -> None:
        """Write queued lines and end the thread; later lines are written by their callers."""
        # The warning about lost lines follows the next line, and there may be none.
        self._flush_deferred()
        self._must_report_lost = self._lost > 0
        self._work.set()
        if self.flush():
            self._write_through = True
        self._closed = True
        self._write_now.set()
        self._work.set()

    def _start(self) -> None:
        with self._lock:
            if self._thread is not None:
                return
            self._thread = threading.Thread(target=self._run, name="log-writer", daemon=True)
            try:
                self._thread.start()
            except RuntimeError:  # the thread limit is reached; the next line tries again
                self._thread = None
                self._wake_requested = False

    def _run(self) -> None:
        while not self._closed or self._deferred or self._lines:
            self._work.wait()
            # While callers fill and write chunks themselves, this thread has nothing to do.
            written = self._caller_writes
            while not self._write_now.wait(_GATHER_SECONDS) and written != self._caller_writes:
                written = self._caller_writes
            self._work.clear()
            self._write_now.clear()
            self._flush_deferred()
            with self._write_lock:
                while chunk := self._next_chunk():
                    self._write_chunk(chunk)
                if self._must_report_lost:
                    self._write_lost_warning()
            with self._idle:
                self._writing = False
                self._idle.notify_all()
        # Also if close() timed out on a blocked reader: this thread writes nothing any more.
        self._write_through = True

    def _next_chunk(self) -> bytes:
        """Remove and return the lines of the next write; empty if there are none."""
        with self._lock:
            chunk: list[bytes] = []
            size = 0
            while self._lines and (
                not chunk or size + len(self._lines[0]) <= self._max_write_bytes
            ):
                chunk.append(self._lines.popleft())
                size += len(chunk[-1])
            self._waiting_bytes -= size
            self._writing = bool(chunk)
        return b"".join(chunk)

    def _write_lost_warning(self) -> None:
        if self._lost:
            self._write_chunk(b"")
        self._must_report_lost = False

    def _write_chunk(self, chunk: bytes) -> None:
        unwritten = new = self._output.write(chunk)
        if not unwritten and self._lost:
            with self._lock:
                lost, self._lost = self._lost, 0
            unwritten = self._output.write(self._lost_warning(lost)) and lost
        if unwritten:
            # The disk is full or the reader is gone: the queued lines would fail as well.
            with self._lock:
                queued = sum(each.count(b"\n") for each in list(self._lines))
                self._lost += unwritten + queued
                self._lost_total += new + queued
                self._lines.clear()
                self._waiting_bytes = 0

    def _begin_in_child(self) -> None:
        """Reset a forked child: it has no writer thread, and queued lines belong to the parent."""
        self._make_locks()
        self._deferred.clear()
        self._lines.clear()
        self._waiting_bytes = self._lost = 0
        self._write_through = True
