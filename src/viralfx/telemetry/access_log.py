"""One line for each request that an application answered."""

import logging
from collections.abc import Callable
from typing import TypeAlias

import msgspec
from msgspec import UNSET, UnsetType

from viralfx.telemetry.metrics.requests import METHODS, OTHER, UNMATCHED

_logger = logging.getLogger("viralfx.access")


class AccessLine(msgspec.Struct, rename="camel", gc=False):
    """What a line says of a request, its fields in the order of the line."""

    timestamp: str
    level: str
    context: str
    message: str
    correlation_id: str | UnsetType
    user_id: str | UnsetType
    trace_id: str | UnsetType
    span_id: str | UnsetType
    method: str
    route: str
    status: int | UnsetType
    duration: float
    """Milliseconds."""
    request_size: int | UnsetType
    response_size: int
    cut: bool | UnsetType


class EndedRequest(msgspec.Struct, gc=False):
    """What is known of a request that is over; its line is made later, with those of others."""

    at: float
    """Seconds since the epoch."""
    correlation_id: str | None
    user_id: str | None
    method: str
    route: str | None
    """The template; None where the application has none for it."""
    status: int | None
    """None where no answer began."""
    seconds: float
    received: int | None
    """Bytes of the request's body, as far as they were announced."""
    sent: int
    """Bytes of the answer's body."""
    cut: bool
    trace: tuple[str, str] | None
    """The ids of its trace and of its span, where they were recorded."""

    def line(self, timestamp: str) -> AccessLine:
        """Return what is said of it, ``timestamp`` being its time."""
        # A client chooses paths and methods: neither goes into a line as it comes.
        method = self.method if self.method in METHODS else OTHER
        route, status, received = self.route or UNMATCHED, self.status, self.received
        trace_id, span_id = self.trace or (UNSET, UNSET)
        return AccessLine(
            timestamp,
            "info",
            "access",
            f"{method} {route} {'without an answer' if status is None else status}",
            self.correlation_id or UNSET,
            self.user_id or UNSET,
            trace_id,
            span_id,
            method,
            route,
            UNSET if status is None else status,
            round(self.seconds * 1000, 3),
            UNSET if received is None else received,
            self.sent,
            self.cut or UNSET,
        )


TakeRequest: TypeAlias = Callable[[EndedRequest], None]


def wanted() -> bool:
    """Tell whether requests are to be logged at the moment."""
    return _logger.isEnabledFor(logging.INFO)


def log_request(request: EndedRequest) -> None:
    """Log a request that is over."""
    take = _short_way()
    if take is None:
        _logger.handle(AccessRecord(request))
    else:
        take(request)


def _short_way() -> TakeRequest | None:
    """Return who takes lines without a record, if nobody else is to see it."""
    node, root = _logger, logging.root
    while node is not root:
        if node.handlers or node.filters or not node.propagate or node.parent is None:
            return None
        node = node.parent
    if len(root.handlers) != 1 or root.handlers[0].filters:
        return None
    take: TakeRequest | None = getattr(root.handlers[0], "take_request", None)
    return take


class AccessRecord(logging.LogRecord):
    """The record of one request, for any handler and filter."""

    def __init__(self, request: EndedRequest) -> None:
        line = request.line("")
        super().__init__(_logger.name, logging.INFO, "", 0, line.message, (), None)
        own = vars(self)
        own["created"], own["msecs"] = request.at, request.at % 1 * 1000
        for name, field in _FIELDS:
            if (value := getattr(line, field)) is not UNSET:
                own[name] = value


_FIELDS = tuple(
    (name, field)
    for name, field in zip(
        AccessLine.__struct_encode_fields__, AccessLine.__struct_fields__, strict=True
    )
    if field not in {"timestamp", "level", "context", "message"}
)
