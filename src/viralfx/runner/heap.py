"""Writes a report of what is on the heap, at SIGUSR2, while the service goes on (ADR-0028).

A forked child holds the same objects at the same moment, and may take its time to count them.
"""

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
import warnings
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import FrameType

from viralfx.runner.room import Room
from viralfx.runner.signals import not_yet

_logger = logging.getLogger("viralfx.heap")

_LONGEST = 120.0
"""Seconds after which a child that is still counting is ended."""
_PAUSE = 0.05
"""Seconds between two looks at the memory that the child takes."""
_ROWS = 40
_NOBODY = (signal.SIG_DFL, not_yet, None)
_DESCRIPTORS = 2**20


class HeapReports:
    """Makes heap reports, one at a time, each in a file of its own that only its owner reads."""

    def __init__(self, folder: str | None) -> None:
        """``folder`` None is the system's for temporary files."""
        self._folder = Path(folder) if folder else _temporary()
        self._busy = threading.Lock()

    def install(self) -> None:
        """Make one at each SIGUSR2, unless the application has a handler for it.

        Call it on the main thread.
        """
        if signal.getsignal(signal.SIGUSR2) in _NOBODY:
            signal.signal(signal.SIGUSR2, self._on_signal)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        # Between two byte codes of the main thread, whatever it is doing: also when it is that
        # which keeps the event loop from running.
        self.make()

    def make(self) -> None:
        """Begin a report and return at once; where it is, or what went wrong, is one log line."""
        if not self._busy.acquire(blocking=False):
            _logger.warning("Heap report is being made already")
            return
        name = f"heap-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{os.getpid()}.txt"
        path = self._folder / name
        try:
            reader, writer = os.pipe()
        except OSError as error:
            self._give_up(error.strerror)
            return
        try:
            with warnings.catch_warnings():
                # The child does nothing that a thread of the parent's could hold up, nor one of
                # those that hooks of other libraries start in it.
                warnings.simplefilter("ignore", DeprecationWarning)
                child = os.fork()
        except OSError as error:
            os.close(reader)
            os.close(writer)
            self._give_up(error.strerror)
            return
        if child == 0:
            _report_and_exit(path, writer)
        os.close(writer)
        follower = threading.Thread(
            target=self._follow, args=(child, reader, path), name="heap-report", daemon=True
        )
        try:
            follower.start()
        except RuntimeError as error:  # no more threads may run
            os.close(reader)
            _kill(child)
            _wait_for_end(child)
            _remove(path)
            self._give_up(str(error))

    def _give_up(self, why: str | None) -> None:
        # Without a traceback: it would only show the work that the signal came into.
        self._busy.release()
        _logger.error("Heap report failed", extra={"detail": why})

    def _follow(self, child: int, reader: int, path: Path) -> None:
        began, said = time.monotonic(), b""
        try:
            why = _what_is_wrong(reader, Room(child))
            said = os.read(reader, select.PIPE_BUF) if why is None else b""
            if why is not None:
                _kill(child)
            _wait_for_end(child)
        finally:
            os.close(reader)
            self._busy.release()
        duration = round((time.monotonic() - began) * 1000)
        if not said:
            _remove(path)
        why = why or "the child ended early"
        result: dict[str, object] = json.loads(said) if said else {"detail": why}
        extra = {"path": str(path), "duration": duration, **result}
        if "detail" in result:
            _logger.error("Heap report failed", extra=extra)
        else:
            _logger.warning("Heap report written", extra=extra)


def _what_is_wrong(reader: int, room: Room) -> str | None:
    """Wait until the child has said something, or ended; return why it is not worth waiting."""
    deadline = time.monotonic() + _LONGEST
    # Not ``select``, which takes no descriptor above 1023: as many clients as that are nothing odd.
    said = select.poll()
    said.register(reader, select.POLLIN)
    while not said.poll(_PAUSE * 1000):
        if room.is_short():
            # Rather no report than none and no process: the kernel would end either of them.
            return "it takes more memory than is left"
        if time.monotonic() > deadline:
            return "it took too long"
    return None


def _kill(child: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has just ended, and somebody knows
        os.kill(child, signal.SIGKILL)


def _wait_for_end(child: int) -> None:
    # Whoever started us may have SIGCHLD ignored, or an application wait for every child there is.
    with contextlib.suppress(ChildProcessError):
        os.waitpid(child, 0)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def _temporary() -> Path:
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError:
        # Nothing can be written anywhere, as in a container that is to be so: a report will fail
        # and say where it would have been, and nobody else is the worse for it.
        return Path("/tmp")  # noqa: S108 - it is not there, or cannot be written


def _report_and_exit(path: Path, writer: int) -> None:
    """Write the report in the child; nothing of the parent's is touched, and nothing returns."""
    try:
        # Or a client whose connection the parent closes would wait for the child as well.
        os.dup2(writer, 3)
        os.closerange(4, _DESCRIPTORS)
        result = _written(path, _report)
        os.write(3, json.dumps(result).encode())
    finally:
        os._exit(0)


def _written(path: Path, report: Callable[[], tuple[str, int, int]]) -> dict[str, object]:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        return {"detail": f"cannot create it: {error.strerror}"}
    try:
        text, objects, size = report()
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
    except Exception as error:  # noqa: BLE001 - the child's boundary: it can only tell its parent
        _remove(path)
        why = error.strerror if isinstance(error, OSError) else type(error).__name__
        return {"detail": f"cannot write it: {why}"}
    return {"objects": objects, "heapBytes": size}


def _report() -> tuple[str, int, int]:
    """Return the report, the number of objects and their bytes.

    It holds kinds and counts, never a value: those are what requests brought.
    """
    # Not at the top: only a child needs it, and takes it with it when it ends.
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
