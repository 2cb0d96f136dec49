"""The data that logs, metrics and traces share: the current trace, ended requests, and stacks."""

import asyncio
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import Any

import msgspec

TRACE = "viralfx.trace"
"""Key of an ASGI scope; holds the ids of trace and span if the request is recorded."""

CurrentTrace = Callable[[], tuple[str, str] | None]
"""Returns the ids of the current trace and span, in lower-case hex digits.

Returns None if no span is current or it is not recorded.
"""


def _none() -> None:
    return None


_current: CurrentTrace = _none


def current_trace() -> tuple[str, str] | None:
    """Return trace id and span id of the current span; None if it is not recorded."""
    return _current()


def set_trace_source(current: CurrentTrace | None) -> None:
    """Set the function behind :func:`current_trace`; None turns it off."""
    global _current  # noqa: PLW0603 - one process has one context
    _current = current or _none


@contextmanager
def hide_packages(*packages: str) -> Iterator[None]:
    """Make imports of these packages fail within the block, as if they were not installed.

    Packages that are already imported stay available. Use this around imports of libraries for
    which the packages are optional; code after the block imports them normally.
    """
    hidden = [name for name in packages if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]  # makes the import system raise
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


def hide_opentelemetry() -> AbstractContextManager[None]:
    """Hide OpenTelemetry from libraries that would import it although tracing is off.

    Litestar (for its plugin) and redis-py (for its metrics) would, and the import takes a quarter
    of the start-up time.
    """
    return hide_packages("opentelemetry")


METHODS = frozenset(
    {"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "QUERY", "TRACE"}
)

OTHER = "_OTHER"
"""Stands for every method that is not in ``METHODS``."""

WEBSOCKET = "WEBSOCKET"
"""Stands for the method of a WebSocket, whose handshake is always a GET."""

UNMATCHED = "unmatched"
"""The route of a request that matches none of the application's routes."""


CLIENT_DISCONNECTED = "viralfx.client_disconnected"
"""Key of an ASGI scope; set if the client disconnected before its request was complete."""


class EndedRequest(msgspec.Struct, gc=False):
    """A finished request or WebSocket, as it is measured and logged.

    Holds raw values only. The log lines of many requests are rendered together later: rendering
    each one right after its request costs several times as much, because the CPU caches are cold
    (ADR-0027).
    """

    at: float
    """Seconds since the epoch."""
    correlation_id: str | None
    user_id: str | None
    trace: tuple[str, str] | None
    """Trace id and span id, if the request is recorded."""
    method: str
    """One of ``METHODS``, or ``OTHER``: clients can send any method; or ``WEBSOCKET``."""
    route: str
    """The route's template, or ``UNMATCHED``; never the path, which clients choose."""
    status: int | None
    """None if no response started."""
    seconds: float
    received: int | None
    """Bytes of the request's body, if the client announced them, or of a WebSocket's messages."""
    sent: int
    """Bytes of the response's body or of a WebSocket's messages."""
    cut: bool
    """Whether the response ended before it was complete, or a WebSocket without a close frame."""
    close_code: int | None = None
    """The close code of a WebSocket that was open."""

    @property
    def message(self) -> str:
        """The message of the log line."""
        ended = "without a response" if self.status is None else self.status
        if self.close_code is not None:
            ended = self.close_code
        return f"{self.method} {self.route} {ended}"

    @property
    def duration(self) -> float:
        """Milliseconds, with microsecond resolution."""
        return int(self.seconds * 1e6) / 1000

    def fields(self) -> dict[str, Any]:
        """Return the fields of the log line after time, level, context and message, in order."""
        trace_id, span_id = self.trace or (None, None)
        fields = {
            "correlationId": self.correlation_id,
            "userId": self.user_id,
            "traceId": trace_id,
            "spanId": span_id,
            "method": self.method,
            "route": self.route,
            "status": self.status,
            "closeCode": self.close_code,
            "duration": self.duration,
            "requestSize": self.received,
            "responseSize": self.sent,
            "cut": self.cut or None,
        }
        return {name: value for name, value in fields.items() if value is not None}


_MAX_FRAMES = 30
"""Innermost frames of a stack that are shown."""
_MAX_STACKS = 1000
"""Stacks that are shown: the event loop makes the text, and serves no request meanwhile."""


def stacks_of_threads() -> str:
    """Return the stack of each thread, in the form of :mod:`faulthandler` with names.

    Neither source lines nor values are in it, because values may be secrets.
    """
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    found = sys._current_frames()  # noqa: SLF001 - it has no other name
    heads = {ident: f"Thread {ident:#018x} [{names.get(ident, 'unknown')}]" for ident in found}
    stacks = ((heads[ident], _frames_of_thread(frame)) for ident, frame in found.items())
    return _text("Threads", len(found), stacks)


def stacks_of_tasks(loop: asyncio.AbstractEventLoop) -> str:
    """Return the stack of each task of a loop, through all coroutines that it awaits.

    Another thread than that of the loop may call this, such as the watchdog. The text has the form
    of :func:`stacks_of_threads`. The frames of a running task below its own coroutine are those of
    its thread.
    """
    tasks = sorted(asyncio.all_tasks(loop), key=lambda task: task.get_name())
    stacks = ((f"Task {task.get_name()!r}", _frames_of_task(task)) for task in tasks)
    return _text("Tasks", len(tasks), stacks)


def _text(kind: str, number: int, stacks: Iterable[tuple[str, list[FrameType]]]) -> str:
    lines = [f"{kind}: {number}"]
    for at, (head, frames) in enumerate(stacks):
        if at == _MAX_STACKS:
            lines += ["", f"... and {number - at} more"]
            break
        lines += ["", f"{head} (most recent call first):"]
        lines += (
            f'  File "{frame.f_code.co_filename}", line {frame.f_lineno} in'
            f" {frame.f_code.co_qualname}"
            for frame in frames
        )
    return "\n".join([*lines, ""])


def _frames_of_thread(frame: FrameType | None) -> list[FrameType]:
    frames: list[FrameType] = []
    while frame is not None and len(frames) < _MAX_FRAMES:
        frames.append(frame)
        frame = frame.f_back
    return frames


def _frames_of_task(task: "asyncio.Task[Any]") -> list[FrameType]:
    """Return the frames of a task, the innermost first.

    ``Task.get_stack`` has the outermost one alone.
    """
    frames: list[FrameType] = []
    awaited: Any = task.get_coro()
    while awaited is not None:
        for kind, inner in _AWAITABLES:
            frame = getattr(awaited, f"{kind}_frame", None)
            if frame is not None:
                frames.append(frame)
                awaited = getattr(awaited, inner)
                break
        else:
            break  # a future, or a step of an asynchronous generator, which does not show its frame
    return frames[::-1][:_MAX_FRAMES]


_AWAITABLES = (("cr", "cr_await"), ("gi", "gi_yieldfrom"), ("ag", "ag_await"))
"""Attributes of coroutines and generators: the prefix of the frame's, and the next awaitable."""
