"""Makes a line of JSON of a log record, at a cost that every request can bear.

Nearly all lines are those of requests, which are made many at a time around texts that most of them
have in common. Nearly all others hold nothing but texts and numbers, which msgspec writes at once.
What else there may be takes the standard library's way: slower, and with a word for everything.
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
from viralfx.telemetry.log_levels import word
from viralfx.telemetry.redaction import Redaction
from viralfx.telemetry.requests import EndedRequest
from viralfx.telemetry.trace_context import current_trace

ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None]

STANDARD = frozenset(
    {*vars(logging.LogRecord("", 0, "", 0, "", (), None)), "message", "asctime", "color_message"}
)
_SIMPLE = frozenset({str, int, bool, type(None)})
_IDS = ("correlationId", "userId", "traceId", "spanId")
_COMPACT = (",", ":")
_MOST_BITS = 64

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
        self._millisecond: tuple[int, str] = (-1, "")
        self._frames: dict[tuple[str, str, int | None], tuple[str, str]] = {}

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
            if name not in STANDARD:
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

    def of_requests(self, requests: Sequence[EndedRequest]) -> bytes:
        """Return the lines of requests, with their ends; much cheaper together than one by one."""
        if self._have_plain_ids(requests):
            return "".join(map(self._of_plain_ids, requests)).encode()
        return b"".join(
            [
                self._of_plain_ids(each).encode()
                if self._have_plain_ids([each])
                else self._of_any_ids(each)
                for each in requests
            ]
        )

    def _have_plain_ids(self, requests: Sequence[EndedRequest]) -> bool:
        """Tell whether JSON writes the ids as they are, and none of them may hold a secret.

        All else in the lines is an application's own words, or numbers.
        """
        ids = [i for each in requests for i in (each.correlation_id, each.user_id) if i]
        try:
            text = " ".join(ids)
        except TypeError:  # an application named its user by what is no text
            return False
        return _is_plain(text) and not self._redaction.suspects(text.encode())

    def _of_any_ids(self, request: EndedRequest) -> bytes:
        event = {
            "timestamp": self._timestamp(request.at),
            "level": "info",
            "context": "access",
            "message": request.message,
            **request.fields(),
        }
        simple = request.user_id is None or type(request.user_id) is str
        return self._redaction.line(_to_json(event, simple=simple)) + b"\n"

    def _of_plain_ids(self, request: EndedRequest) -> str:
        """Return the line of a request whose ids JSON writes as they are."""
        kind = (request.method, request.route, request.status)
        head, middle = self._frames.get(kind) or self._frame(request)
        correlation_id = request.correlation_id
        if request.user_id is None and request.trace is None and correlation_id is not None:
            ids = f',"correlationId":"{correlation_id}"'
        else:
            ids = _plain_ids(request)
        received = "" if request.received is None else f',"requestSize":{request.received}'
        cut = ',"cut":true' if request.cut else ""
        return (
            f'{{"timestamp":"{self._timestamp(request.at)}{head}{ids}{middle}{request.duration}'
            f'{received},"responseSize":{request.sent}{cut}}}\n'
        )

    def _frame(self, request: EndedRequest) -> tuple[str, str]:
        """Make what all requests of a kind have in their lines: before the ids, and after them."""
        method, route, status = request.method, request.route, request.status
        code = "" if status is None else f',"status":{status}'
        head = f'","level":"info","context":"access","message":{json.dumps(request.message)}'
        middle = f',"method":{json.dumps(method)},"route":{json.dumps(route)}{code},"duration":'
        # No more than there are routes, methods and codes: a client can make up none of them.
        self._frames[method, route, status] = head, middle
        return head, middle

    def _timestamp(self, created: float) -> str:
        millisecond = int(created * 1000)
        known, text = self._millisecond
        if known != millisecond:
            second, rest = divmod(millisecond, 1000)
            text = f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(second))}.{rest:03d}Z"
            self._millisecond = (millisecond, text)
        return text


def _is_plain(text: str) -> bool:
    """Tell whether JSON, ASCII alone, writes a text as it is."""
    return text.isascii() and text.isprintable() and '"' not in text and "\\" not in text


def _plain_ids(request: EndedRequest) -> str:
    values = (request.correlation_id, request.user_id, *(request.trace or (None, None)))
    ids = zip(_IDS, values, strict=True)
    return "".join([f',"{name}":"{value}"' for name, value in ids if value is not None])


def message_of(record: logging.LogRecord) -> str:
    """Return the message, of which no line ends; without its arguments where they do not fit."""
    try:
        text = record.getMessage()
    except Exception:  # noqa: BLE001 - whatever the text of somebody's argument does
        text = _text(record.msg, str)
    return text.rstrip("\r\n")


def _text(value: object, make: Callable[[object], str]) -> str:
    try:
        return make(value)
    except Exception:  # noqa: BLE001 - it has a way of its own, and that fails
        return object.__repr__(value)


def _to_json(event: dict[str, Any], *, simple: bool) -> bytes:
    if simple:
        try:
            line = _encode(event)
        except (ValueError, OverflowError, TypeError):
            pass  # half a character, a number without end, a name that is no text
        else:
            # Of what is not ASCII some ends a line for some programs.
            if line.isascii():
                return line
    try:
        return json.dumps(event, default=str, allow_nan=False, separators=_COMPACT).encode()
    except Exception:  # noqa: BLE001 - whatever the text of somebody's value does
        # Or a number that JSON has no word for, a value within itself, keys that are no text.
        event = {_text(name, str): plain(value) for name, value in event.items()}
        return json.dumps(event, separators=_COMPACT).encode()


def plain(value: object) -> object:
    """Return a value that can be written in any case, and that is the same if it can be."""
    if value is None or type(value) is bool:
        return value
    if isinstance(value, str):
        return str.__str__(value)
    # Python writes out no number of thousands of digits.
    if isinstance(value, int) and int.bit_length(value) <= _MOST_BITS:
        return int(value)
    return _text(value, repr)
