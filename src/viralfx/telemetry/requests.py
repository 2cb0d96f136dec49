"""What is known of a request that an application answered, and by which names it is counted."""

from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

import msgspec

METHODS = frozenset(
    {"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "QUERY", "TRACE"}
)

OTHER = "_OTHER"
"""The method of a request whose method is none of those."""

UNMATCHED = "unmatched"
"""The route of a request that none of the application's routes is for."""


CLIENT_LEFT = "viralfx.client_left"
"""Where the scope of a request says that its client left before all of it had come."""


def cause_of(error: BaseException) -> BaseException:
    """Return what an application raised, without what its framework wrapped it in.

    Litestar does once an answer has begun, and a group of tasks does that has one failure.
    """
    while True:
        inner = _wrapped_in(error)
        if inner is None:
            return error
        error = inner


def _wrapped_in(error: BaseException) -> BaseException | None:
    if isinstance(error, BaseExceptionGroup):
        return error.exceptions[0] if len(error.exceptions) == 1 else None
    # By name: this is no place to know a framework from. Its other errors are derived from it.
    kind = type(error)
    if kind.__name__ == "LitestarException" and kind.__module__.startswith("litestar."):
        return error.__cause__
    return None


def mount_of(scope: Mapping[str, Any]) -> str | None:
    """Return the path where the application is mounted that a request was given to, if one is.

    Litestar has no template for it, but the handler. Of several paths of its own it is the one
    that the client asked for, as far as that can be told.
    """
    handler, app = scope.get("route_handler"), scope.get("litestar_app")
    if handler is None or app is None:
        return None
    paths = [each.path for each in app.routes if getattr(each, "route_handler", None) is handler]
    asked = unquote((scope.get("raw_path") or b"").decode("latin-1"))
    matching = [path for path in paths if asked.startswith(path)]
    return max(matching, key=len) if matching else next(iter(paths), None)


class EndedRequest(msgspec.Struct, gc=False):
    """A request that is over.

    No more than what is known by then. Its line is made later, of many at a time: one by one that
    costs several times as much, as the request between two of them has the processor forget all
    it needs (ADR-0027).
    """

    at: float
    """Seconds since the epoch."""
    correlation_id: str | None
    user_id: str | None
    trace: tuple[str, str] | None
    """The ids of its trace and of its span, where they were recorded."""
    method: str
    """One of ``METHODS``, or ``OTHER``: a client may make up any."""
    route: str
    """Its template, or ``UNMATCHED``: a client chooses paths."""
    status: int | None
    """None where no answer began."""
    seconds: float
    received: int | None
    """Bytes, where the client announced them."""
    sent: int
    """Bytes."""
    cut: bool

    @property
    def message(self) -> str:
        """What people read."""
        ended = "without an answer" if self.status is None else self.status
        return f"{self.method} {self.route} {ended}"

    @property
    def duration(self) -> float:
        """Milliseconds, to the microsecond."""
        return int(self.seconds * 1e6) / 1000

    def fields(self) -> dict[str, Any]:
        """Return what its line has beside time, level, context and message, in its order."""
        trace_id, span_id = self.trace or (None, None)
        fields = {
            "correlationId": self.correlation_id,
            "userId": self.user_id,
            "traceId": trace_id,
            "spanId": span_id,
            "method": self.method,
            "route": self.route,
            "status": self.status,
            "duration": self.duration,
            "requestSize": self.received,
            "responseSize": self.sent,
            "cut": self.cut or None,
        }
        return {name: value for name, value in fields.items() if value is not None}
