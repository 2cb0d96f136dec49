"""The data that logs, metrics and traces share: the current trace, and the ended request."""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
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
