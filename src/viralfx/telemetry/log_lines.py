"""Makes a line of JSON of a log record, at a cost that every request can bear.

Nearly all lines hold nothing but texts and numbers, which msgspec writes at once. What else there
may be takes the standard library's way: slower, and with a word for everything.
"""

import json
import logging
import time
from collections.abc import Callable
from json.encoder import encode_basestring_ascii as quoted
from math import isfinite
from types import TracebackType
from typing import Any

import msgspec

from viralfx.domain.correlation import current_correlation_id, current_user_id
from viralfx.telemetry.access_log import AccessRecord
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
_MOST_HEADS = 10_000
"""Kinds of requests whose parts are kept; an application has some hundreds."""

_encode = msgspec.json.Encoder().encode


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
        self._second: tuple[int, str] = (0, "")
        self._heads: dict[tuple[str, str, int | None], tuple[str, str]] = {}

    def render(self, record: logging.LogRecord) -> bytes:
        """Return the line, its end included."""
        if type(record) is AccessRecord:
            return self._access(record)
        return self.ordinary(record)

    def ordinary(self, record: logging.LogRecord) -> bytes:
        """Return the line of any record, its end included."""
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

    def _access(self, record: AccessRecord) -> bytes:
        own = vars(record)
        key = (record.method, record.route, own.get("status"))
        head, middle = self._heads.get(key) or self._head(record, key)
        ids = f'"correlationId":{quoted(current_correlation_id() or "")}'
        if (user := current_user_id()) is not None:
            ids = f'{ids},"userId":{quoted(user)}'
        # All else is an application's own words, or numbers.
        if self._redaction.suspects(ids.encode()):
            return self.ordinary(record)
        if "traceId" in own:
            ids = f'{ids},"traceId":"{own["traceId"]}","spanId":"{own["spanId"]}"'
        asked = f',"requestSize":{own["requestSize"]}' if "requestSize" in own else ""
        cut = ',"cut":true' if "cut" in own else ""
        return (
            f'{{"timestamp":"{self._timestamp(record.created)}",{head},{ids},{middle},'
            f'"duration":{record.duration}{asked},"responseSize":{own["responseSize"]}{cut}}}\n'
        ).encode()

    def _head(self, record: AccessRecord, key: tuple[str, str, int | None]) -> tuple[str, str]:
        """Return the parts of a line that are the same for each request of a kind."""
        context = record.name.removeprefix("viralfx.")
        status = "" if key[2] is None else f',"status":{key[2]}'
        parts = (
            f'"level":"info","context":{quoted(context)},"message":{quoted(record.getMessage())}',
            f'"method":{quoted(record.method)},"route":{quoted(record.route)}{status}',
        )
        if len(self._heads) < _MOST_HEADS:
            self._heads[key] = parts
        return parts

    def _timestamp(self, created: float) -> str:
        second = int(created)
        known, text = self._second
        if known != second:
            text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
            self._second = (second, text)
        return f"{text}.{int((created - second) * 1000):03d}Z"


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
