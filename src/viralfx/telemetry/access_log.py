"""One line for each request that an application answered."""

import logging
from collections.abc import Callable
from typing import TypeAlias

import msgspec

from viralfx.telemetry.metrics.requests import METHODS, OTHER, UNMATCHED

_logger = logging.getLogger("viralfx.access")


class AccessLine(msgspec.Struct, rename="camel", omit_defaults=True, gc=False):
    """What a line says of a request, its fields in the order of the line.

    What is None is not in it; the other defaults are there because a field that may be left out
    stands before them.
    """

    timestamp: float | str
    """Seconds since the epoch, until it is written as text."""
    level: str
    context: str
    message: str
    correlation_id: str | None = None
    user_id: str | None = None
    trace_id: str | None = None
    span_id: str | None = None
    method: str = ""
    route: str = ""
    status: int | None = None
    """None where no answer began."""
    duration: float = -1.0
    """Milliseconds."""
    request_size: int | None = None
    """Bytes, where the client announced them."""
    response_size: int = -1
    cut: bool = False


TakeLine: TypeAlias = Callable[[AccessLine], None]


def wanted() -> bool:
    """Tell whether requests are to be logged at the moment."""
    return _logger.isEnabledFor(logging.INFO)


def log_request(  # noqa: PLR0917 - by name they would cost more than all that is done with them
    at: float,
    correlation_id: str | None,
    user_id: str | None,
    trace: tuple[str, str] | None,
    method: str,
    route: str | None,
    status: int | None,
    seconds: float,
    received: int | None,
    sent: int,
    cut: bool,  # noqa: FBT001 - see above
) -> None:
    """Log a request that is over.

    ``at`` is in seconds since the epoch; ``trace`` are the ids of its trace and of its span, where
    they were recorded; ``route`` is its template, None or empty where the application has none;
    ``status`` is None where no answer began, ``received`` where no size was announced.
    """
    # A client chooses paths and methods: neither goes into a line as it comes.
    if method not in METHODS:
        method = OTHER
    if not route:
        route = UNMATCHED
    trace_id, span_id = trace or (None, None)
    line = AccessLine(
        at,
        "info",
        "access",
        f"{method} {route} {'without an answer' if status is None else status}",
        correlation_id,
        user_id,
        trace_id,
        span_id,
        method,
        route,
        status,
        int(seconds * 1e6) / 1000,
        received,
        sent,
        cut,
    )
    take = _short_way()
    if take is None:
        _logger.handle(AccessRecord(line))
    else:
        take(line)


def _short_way() -> TakeLine | None:
    """Return who takes lines without a record, if nobody else is to see it."""
    node, root = _logger, logging.root
    while node is not root:
        if node.handlers or node.filters or not node.propagate or node.parent is None:
            return None
        node = node.parent
    if len(root.handlers) != 1 or root.handlers[0].filters:
        return None
    take: TakeLine | None = getattr(root.handlers[0], "take_request", None)
    return take


class AccessRecord(logging.LogRecord):
    """The record of one request, for any handler and filter."""

    def __init__(self, line: AccessLine) -> None:
        super().__init__(_logger.name, logging.INFO, "", 0, line.message, (), None)
        own = vars(self)
        own["created"] = created = float(line.timestamp)
        own["msecs"] = created % 1 * 1000
        for name, field, default in _FIELDS:
            if (value := getattr(line, field)) != default:
                own[name] = value


_FIELDS = tuple(
    (field.encode_name, field.name, field.default)
    for field in msgspec.structs.fields(AccessLine)
    if not field.required
)
