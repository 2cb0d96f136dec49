"""Makes a line of JSON of a log record, at a cost that every request can bear.

Nearly all lines hold nothing but texts and numbers, which msgspec writes at once. What else there
may be takes the standard library's way: slower, and with a word for everything.
"""

import json
import logging
import time
from collections.abc import Callable, Sequence
from math import isfinite
from types import TracebackType
from typing import Any

import msgspec

from viralfx.domain.correlation import current_correlation_id, current_user_id
from viralfx.telemetry.access_log import AccessLine
from viralfx.telemetry.log_levels import word
from viralfx.telemetry.redaction import Redaction
from viralfx.telemetry.trace_context import current_trace

ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None]

_STANDARD = frozenset(
    {*vars(logging.LogRecord("", 0, "", 0, "", (), None)), "message", "asctime", "color_message"}
)
_SIMPLE = frozenset({str, int, bool, type(None)})
_IDS = ("correlationId", "userId", "traceId", "spanId")
_COMPACT = (",", ":")

_encode = msgspec.json.Encoder().encode
_encode_lines = msgspec.json.Encoder().encode_lines


class JsonLines:
    """Renders records with the fields of the guide first, in its order.

    No field that a caller adds takes the place of these, but for an id that it knows better.
    """

    def __init__(
        self, redaction: Redaction, explain: Callable[[ExcInfo], list[dict[str, Any]]]
    ) -> None:
        """``explain`` turns an exception into what is written of it."""
        self._redaction = redaction
        self._explain = explain
        self._millisecond: tuple[int, str] = (-1, "")

    def render(self, record: logging.LogRecord) -> bytes:
        """Return the line, its end included."""
        event, simple = self.fields(record)
        return self._redaction.line(_to_json(event, simple=simple)) + b"\n"

    def fields(self, record: logging.LogRecord) -> tuple[dict[str, Any], bool]:
        """Return what a line holds, and whether that is nothing but texts and numbers."""
        event: dict[str, Any] = {
            "timestamp": self._timestamp(record.created),
            "level": word(record.levelno),
            "context": record.name.removeprefix("viralfx."),
            "message": message_of(record),
        }
        own, simple = vars(record), True
        bound = (current_correlation_id(), current_user_id(), *(current_trace() or (None, None)))
        for name, value in zip(_IDS, bound, strict=True):
            if (known := own.get(name, value)) is not None:
                event[name] = known
        for name, value in own.items():
            if name not in _STANDARD:
                event.setdefault(name, value)
                kind = type(value)
                if kind not in _SIMPLE and not (kind is float and isfinite(value)):
                    simple = False
        if record.exc_info and record.exc_info[1] is not None:
            event["exception"] = self._explain(record.exc_info)
            simple = False
        if record.stack_info:
            event["stack"] = record.stack_info
        return event, simple

    def of_requests(self, lines: Sequence[AccessLine]) -> bytes:
        """Return the lines of requests, with their ends; much cheaper together than one by one.

        The time of each becomes text.
        """
        for line in lines:
            line.timestamp = self._timestamp(float(line.timestamp))
        # All else is an application's own words, or numbers. As JSON, as that is what is searched.
        ids = [name for each in lines for name in (each.correlation_id, each.user_id) if name]
        try:
            made = _encode_lines(lines)
            if made.isascii() and not self._redaction.suspects(_encode(ids)):
                return made
        except UnicodeEncodeError:  # half a character
            pass
        return b"".join(map(self._with_care, lines))

    def _with_care(self, line: AccessLine) -> bytes:
        event = msgspec.to_builtins(line)
        return self._redaction.line(_to_json(event, simple=True)) + b"\n"

    def _timestamp(self, created: float) -> str:
        millisecond = int(created * 1000)
        known, text = self._millisecond
        if known != millisecond:
            second, rest = divmod(millisecond, 1000)
            text = f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(second))}.{rest:03d}Z"
            self._millisecond = (millisecond, text)
        return text


def message_of(record: logging.LogRecord) -> str:
    """Return the message; without its arguments where they do not fit."""
    try:
        return record.getMessage()
    except Exception:  # noqa: BLE001 - whatever the text of somebody's argument does
        return str(record.msg)


def _to_json(event: dict[str, Any], *, simple: bool) -> bytes:
    if simple:
        try:
            line = _encode(event)
        except (UnicodeEncodeError, OverflowError):  # half a character, or a number without end
            pass
        else:
            # Of what is not ASCII some ends a line for some programs.
            if line.isascii():
                return line
    try:
        return json.dumps(event, default=str, allow_nan=False, separators=_COMPACT).encode()
    except (ValueError, TypeError, RecursionError):
        # A number that JSON has no word for, a value that contains itself, keys that are no text.
        plain = {k: v if isinstance(v, str | int) else repr(v) for k, v in event.items()}
        return json.dumps(plain, separators=_COMPACT).encode()
