"""Finds out what blocks the event loop, on a thread that it cannot block."""

import asyncio
import contextlib
import logging
import sys
import threading
import time
import traceback
from contextvars import Context

_logger = logging.getLogger("viralfx.loop")
_process_logger = logging.getLogger("viralfx.process")

_MOST_FRAMES = 30
"""The innermost of the stack: what led there is the same each time."""
_ASKS_PER_THRESHOLD = 4
_RAN = 0.1
"""The share of the time that the process was computing from which on it was not held up itself."""


class StallDetector:
    """Asks the loop for an answer all the time, and tells of one that does not come.

    One warning with the stack of the loop's thread as soon as the threshold has passed, and how
    long it took once it is over. Where native code held the interpreter itself, or the whole
    process was stopped, both come at the end.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, threshold: float) -> None:
        """Take the ``threshold``, in seconds without an answer, from which a loop is blocked."""
        self._loop = loop
        self._threshold = threshold
        self._loop_thread = threading.get_ident()
        self._failed = False
        self._stopped = threading.Event()
        self._answered = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="loop-watch", daemon=True)

    def start(self) -> None:
        """Begin to watch; call it on the thread of the loop."""
        self._loop_thread = threading.get_ident()
        self._thread.start()

    def stop(self) -> None:
        """End watching; the thread ends by itself."""
        self._stopped.set()
        self._answered.set()

    def _watch(self) -> None:
        while not self._stopped.wait(self._threshold / _ASKS_PER_THRESHOLD):
            try:
                self._ask()
            except Exception as error:  # noqa: BLE001 - whatever a filter of somebody's does
                self._say_it_failed(error)

    def _say_it_failed(self, error: Exception) -> None:
        """Log the first error of the watch itself; one that nobody takes would end the process."""
        if self._failed:
            return
        self._failed = True
        # By another logger: what is wrong with ours may be what has failed.
        with contextlib.suppress(Exception):
            _process_logger.error("Watch over the event loop failed", exc_info=error)

    def _ask(self) -> None:
        self._answered.clear()
        asked, cpu = time.monotonic(), time.process_time()
        try:
            self._loop.call_soon_threadsafe(self._answered.set)
        except RuntimeError:  # the loop is closed: there is nothing to watch
            self._stopped.set()
            return
        if self._answered.wait(self._threshold) or self._stopped.is_set():
            return
        stack, context = self._stack(), self._context()
        # The loop may run again by now, where this thread could not run before either.
        late = time.monotonic() - asked > 2 * self._threshold
        if late and time.process_time() - cpu < _RAN * (time.monotonic() - asked):
            self._answered.wait()
            _logger.warning("Process did not run", extra={"duration": _milliseconds(asked)})
            return
        extra = {"blocked": _milliseconds(asked), "stack": stack}
        context.run(_logger.warning, "Event loop is blocked", extra=extra)
        self._answered.wait()
        if not self._stopped.is_set():
            _logger.info("Event loop runs again", extra={"duration": _milliseconds(asked)})

    def _stack(self) -> list[str]:
        frame = sys._current_frames().get(self._loop_thread)  # noqa: SLF001 - it has no other name
        # Without source lines and values: where it is says enough, and holds no secret.
        frames = traceback.extract_stack(frame)[-_MOST_FRAMES:] if frame is not None else []
        return [f"{one.filename}:{one.lineno} {one.name}" for one in frames]

    def _context(self) -> Context:
        """Return the context of what the loop is busy with, in which a line has its ids.

        An empty one where no task runs, and before Python 3.12, where nobody tells.
        """
        if sys.version_info >= (3, 12):
            task = asyncio.current_task(self._loop)
            if task is not None:
                # A copy: the context itself is entered already, on the thread of the loop.
                return task.get_context().copy()
        return Context()


def _milliseconds(since: float) -> int:
    return round((time.monotonic() - since) * 1000)
