"""One line for each request that an application answered."""

import logging
import time
from collections.abc import Callable
from typing import TypeAlias

import msgspec
from msgspec import UNSET, UnsetType

from viralfx.domain.correlation import current_correlation_id, current_user_id

_logger = logging.getLogger("viralfx.access")


class AccessLine(msgspec.Struct, rename="camel", gc=False):
    """What a line says of a request, its fields in the order of the line."""

    timestamp: float | str
    """Seconds since the epoch, or how a line has it."""
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


TakeLine: TypeAlias = Callable[[AccessLine], None]


def log_request(
    method: str,
    route: str,
    status: int | None,
    seconds: float,
    *,
    request_size: int | None,
    response_size: int,
    cut: bool,
    trace: tuple[str, str] | None,
) -> None:
    """Log a request that is over.

    ``status`` is None where no answer began, ``request_size`` where it was not announced,
    ``trace`` where none is recorded.
    """
    if not _logger.isEnabledFor(logging.INFO):
        return
    trace_id, span_id = trace or (UNSET, UNSET)
    line = AccessLine(
        time.time(),
        "info",
        "access",
        f"{method} {route} {'without an answer' if status is None else status}",
        current_correlation_id() or UNSET,
        current_user_id() or UNSET,
        trace_id,
        span_id,
        method,
        route,
        UNSET if status is None else status,
        round(seconds * 1000, 3),
        UNSET if request_size is None else request_size,
        response_size,
        cut or UNSET,
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
        own, known = vars(self), msgspec.structs.asdict(line)
        own["created"] = created = known.pop("timestamp")
        own["msecs"] = created % 1 * 1000
        for name in ("level", "context", "message"):
            del known[name]
        own.update((_in_camel_case[name], v) for name, v in known.items() if v is not UNSET)


_in_camel_case = dict(
    zip(AccessLine.__struct_fields__, AccessLine.__struct_encode_fields__, strict=True)
)
