"""The levels of loggers, and the rendering of log records and requests as lines of JSON.

There are three paths, by frequency. Lines of requests are rendered many at a time from cached
frames. Records that hold only strings and numbers are encoded by msgspec. All other records go
through the standard library's encoder, which is slower and has a fallback for every value.

The access log is here too: one line for each request, without a ``LogRecord`` where possible. So
are the facts of log lines in their messages, for the formatter of another program.
"""

import json
import logging
import re
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf, isfinite
from time import monotonic
from types import TracebackType
from typing import Any, TypeAlias

import msgspec

from viralfx.core.correlation import current_correlation_id, current_user_id
from viralfx.core.errors import ViralFXError, printable, text_of, type_name
from viralfx.settings import Settings
from viralfx.telemetry import EndedRequest, current_trace
from viralfx.telemetry.logging.redaction import Redaction, secrets_of

VERBOSE = 5
"""Below DEBUG: very detailed tracing."""

LEVELS = {
    "error": logging.ERROR,
    "warn": logging.WARNING,
    "log": logging.INFO,
    "debug": logging.DEBUG,
    "verbose": VERBOSE,
}
"""The names that LOG_LEVEL accepts."""

ROOT = "root"
"""The name of the root logger."""

AUDIT = "viralfx.audit"
"""The name of the logger of the audit trail, whose level does not change."""

_NAMESPACE = "viralfx."
_levels_logger = logging.getLogger("viralfx.loggers")


def line_level(level: int) -> str:
    """Return the name of a ``logging`` level in log lines."""
    return "info" if (setting := setting_of(level)) == "log" else setting


def setting_of(level: int) -> str:
    """Return the name of a ``logging`` level in LOG_LEVEL."""
    if level >= logging.ERROR:
        return "error"
    if level >= logging.WARNING:
        return "warn"
    if level >= logging.INFO:
        return "log"
    return "debug" if level >= logging.DEBUG else "verbose"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggerLevel:
    """The level of one logger, as named in LOG_LEVEL."""

    level: str | None
    """The logger's own level; None if it inherits its parent's."""
    effective: str
    """The level in force, own or inherited."""


class FixedLevelError(ViralFXError):
    """The level of this logger does not change."""


class LoggerLevels:
    """Shows and changes the levels of existing loggers; never creates a logger."""

    def __init__(self) -> None:
        self._before: dict[str, int] = {}
        self._changes: Counter[str] = Counter()

    def all(self) -> dict[str, LoggerLevel]:
        """Return the levels of all loggers by name, the root first."""
        names = sorted(
            name
            for name, logger in list(logging.root.manager.loggerDict.items())
            if isinstance(logger, logging.Logger)
        )
        return {name: _level(_logger_of(name)) for name in (ROOT, *names)}

    def find(self, name: str) -> str | None:
        """Return the full name of a logger; None if it does not exist.

        The project's loggers are also found by their ``context`` in log lines, which lacks the
        prefix ``viralfx.``. A name that only has child loggers exists as well.
        """
        known = logging.root.manager.loggerDict
        return next((n for n in (name, _NAMESPACE + name) if n == ROOT or n in known), None)

    def get(self, name: str) -> LoggerLevel:
        """Return the level of a logger; ``name`` comes from :meth:`find`."""
        return _level(_logger_of(name))

    def changes(self, name: str) -> int:
        """Return how often :meth:`set` was called for a logger."""
        return self._changes[name]

    def set(self, name: str, level: str | None) -> LoggerLevel:
        """Change the level of a logger; None restores the level before all changes.

        ``name`` comes from :meth:`find`. Raises :class:`FixedLevelError` for the audit trail, and
        ``KeyError`` for an unknown level name.
        """
        if name == AUDIT:
            raise FixedLevelError("the audit trail is logged at every level")
        logger = _logger_of(name)
        number = None if level is None else LEVELS[level]
        if number is not None:
            self._before.setdefault(name, logger.level)
            logger.setLevel(number)
        elif name in self._before:
            logger.setLevel(self._before.pop(name))
        self._changes[name] += 1
        now = _level(logger)
        # A warning, so that every level but ``error`` lets it through.
        _levels_logger.warning(
            "Logger level changed",
            extra={"logger": name, "loggerLevel": now.level, "effectiveLevel": now.effective},
        )
        return now


def _logger_of(name: str) -> logging.Logger:
    return logging.getLogger(None if name == ROOT else name)


def _level(logger: logging.Logger) -> LoggerLevel:
    return LoggerLevel(
        level=setting_of(logger.level) if logger.level else None,
        effective=setting_of(logger.getEffectiveLevel()),
    )


_SINK_CHECK_SECONDS = 0.02
"""A handler or filter that is added to the access log gets records after at most this time."""

_access_logger = logging.getLogger("viralfx.access")


RequestSink: TypeAlias = Callable[[EndedRequest], None]


class AccessLog:
    """Logs requests. Skips creating a ``LogRecord`` if no other handler or filter would see it."""

    wanted = staticmethod(partial(_access_logger.isEnabledFor, logging.INFO))
    """Returns True if the level of the access log lets requests through."""

    def __init__(self) -> None:
        self._sink: RequestSink | None = None
        self._next_check = -inf

    def write(self, request: EndedRequest) -> None:
        """Log a finished request."""
        # Walking the loggers costs as much as the rest of this method, so it is done periodically.
        now = monotonic()
        if now >= self._next_check:
            self._sink = _direct_sink()
            self._next_check = now + _SINK_CHECK_SECONDS
        if self._sink is None:
            _access_logger.handle(AccessRecord(request))
        else:
            self._sink(request)


def _direct_sink() -> RequestSink | None:
    """Return the handler's sink for requests; None if another handler or filter needs records."""
    node, root = _access_logger, logging.root
    while node is not root:
        if node.handlers or node.filters or not node.propagate or node.parent is None:
            return None
        node = node.parent
    if len(root.handlers) != 1:
        return None
    (handler,) = root.handlers
    if handler.filters or handler.level > logging.INFO:
        return None
    sink: RequestSink | None = getattr(handler, "accept_request", None)
    return sink


class AccessRecord(logging.LogRecord):
    """The ``LogRecord`` of one request, for other handlers and filters."""

    def __init__(self, request: EndedRequest) -> None:
        super().__init__(_access_logger.name, logging.INFO, "", 0, request.message, (), None)
        vars(self).update(request.fields(), created=request.at, msecs=request.at % 1 * 1000)


ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None]

STANDARD = frozenset(
    {*vars(logging.LogRecord("", 0, "", 0, "", (), None)), "message", "asctime", "color_message"}
)
_SIMPLE = frozenset({str, int, bool, type(None)})
_IDS = ("correlationId", "userId", "traceId", "spanId")
_COMPACT = (",", ":")
_MAX_INT_BITS = 64

_encode = msgspec.json.Encoder().encode


class JsonLines:
    """Renders records with the fields of docs/operations.md first, in that order.

    A caller's fields never replace these, except for the ids of correlation, user and trace.
    """

    def __init__(
        self, redaction: Redaction, explain: Callable[[ExcInfo], list[dict[str, Any]]]
    ) -> None:
        """``explain`` converts an exception to the value of the field ``exception``."""
        self._redaction = redaction
        self._explain = explain
        self._millisecond: tuple[int, str] = (-1, "")
        self._frames: dict[tuple[str, str, int | None], tuple[str, str]] = {}

    def render(self, record: logging.LogRecord) -> bytes:
        """Return the line, with its newline."""
        event, simple = self.fields(record)
        return self._redaction.line(_to_json(event, simple=simple)) + b"\n"

    def fields(self, record: logging.LogRecord) -> tuple[dict[str, Any], bool]:
        """Return the fields of a line, and True if all values are strings or numbers."""
        event: dict[str, Any] = {
            "timestamp": self._timestamp(record.created),
            "level": line_level(record.levelno),
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
            event["exception"] = self._explained(record.exc_info)
            simple = False
        if record.stack_info:
            event["stack"] = record.stack_info
        return event, simple

    def _explained(self, error: ExcInfo) -> list[dict[str, Any]]:
        try:
            return self._explain(error)
        except KeyboardInterrupt:
            raise
        except BaseException:  # noqa: BLE001 - raised by the error's own code, such as its notes
            return [{"exc_type": type_name(error[1]), "exc_value": text_of(error[1])}]

    def render_requests(self, requests: Sequence[EndedRequest]) -> bytes:
        """Return the lines of several requests; much cheaper than rendering them one by one."""
        if self._have_plain_ids(requests):
            return "".join(map(self._render_plain, requests)).encode()
        return b"".join(
            [
                self._render_plain(each).encode()
                if self._have_plain_ids([each])
                else self._render_any(each)
                for each in requests
            ]
        )

    def _have_plain_ids(self, requests: Sequence[EndedRequest]) -> bool:
        """Return True if no id needs escaping in JSON and none may hold a secret.

        All other values of these lines are numbers or come from the application's code.
        """
        ids = [i for each in requests for i in (each.correlation_id, each.user_id) if i]
        try:
            text = " ".join(ids)
        except TypeError:  # the application bound a user id that is not a string
            return False
        return _is_plain(text) and not self._redaction.may_hold_secret(text.encode())

    def _render_any(self, request: EndedRequest) -> bytes:
        event = {
            "timestamp": self._timestamp(request.at),
            "level": "info",
            "context": "access",
            "message": request.message,
            **request.fields(),
        }
        simple = request.user_id is None or type(request.user_id) is str
        return self._redaction.line(_to_json(event, simple=simple)) + b"\n"

    def _render_plain(self, request: EndedRequest) -> str:
        """Return the line of a request whose ids need no escaping."""
        if request.close_code is not None:  # a client may choose it, so its frame is not kept
            return self._render_any(request).decode()
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
        """Return the parts that all requests of a kind share: before the ids, and after them."""
        method, route, status = request.method, request.route, request.status
        code = "" if status is None else f',"status":{status}'
        head = f'","level":"info","context":"access","message":{json.dumps(request.message)}'
        middle = f',"method":{json.dumps(method)},"route":{json.dumps(route)}{code},"duration":'
        # Bounded by routes, methods and status codes; clients can invent none of them.
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
    """Return True if ASCII-only JSON needs no escape for a text."""
    return text.isascii() and text.isprintable() and '"' not in text and "\\" not in text


def _plain_ids(request: EndedRequest) -> str:
    values = (request.correlation_id, request.user_id, *(request.trace or (None, None)))
    ids = zip(_IDS, values, strict=True)
    return "".join([f',"{name}":"{value}"' for name, value in ids if value is not None])


def message_of(record: logging.LogRecord) -> str:
    """Return the message without trailing newlines; the bare format if its arguments do not fit."""
    try:
        text = record.getMessage()
    except KeyboardInterrupt:
        raise
    except BaseException:  # noqa: BLE001 - raised by the repr of a caller's argument
        text = _text(record.msg, str)
    return text.rstrip("\r\n")


def _text(value: object, make: Callable[[object], str]) -> str:
    try:
        return make(value)
    except KeyboardInterrupt:
        raise
    except BaseException:  # noqa: BLE001 - raised by the value's own __repr__ or __str__
        return object.__repr__(value)


def _to_json(event: dict[str, Any], *, simple: bool) -> bytes:
    if simple:
        try:
            line = _encode(event)
        except (ValueError, OverflowError, TypeError):
            pass  # a lone surrogate, an infinite number, a key that is not a string
        else:
            # Some programs treat non-ASCII characters such as U+2028 as line ends.
            if line.isascii():
                return line
    try:
        return json.dumps(event, default=str, allow_nan=False, separators=_COMPACT).encode()
    except KeyboardInterrupt:
        raise
    except BaseException:  # noqa: BLE001 - raised by the repr of a caller's value
        # Also for a number that JSON cannot express, a circular value, a key that is not a string.
        event = {_text(name, str): plain(value) for name, value in event.items()}
        return json.dumps(event, separators=_COMPACT).encode()


def plain(value: object) -> object:
    """Return a value that can always be encoded: the same if possible, else its repr."""
    if value is None or type(value) is bool:
        return value
    if isinstance(value, str):
        return str.__str__(value)
    # Python refuses to convert integers with thousands of digits to text.
    if isinstance(value, int) and int.bit_length(value) <= _MAX_INT_BITS:
        return int(value)
    return _text(value, repr)


LOGGERS = (
    *(
        "alerts",
        "asgi",
        "audit",
        "cache",
        "circuits",
        "console",
        "credentials",
        "database",
        "events",
    ),
    *("fleet", "health", "heap", "http", "jobs", "lifecycle", "loggers", "loop", "management"),
    *("metrics", "process", "queues", "redis", "requests", "resilience", "serve", "settings"),
    *("shutdown", "state", "taskiq", "tracing", "web"),
)
"""The loggers of this package below ``viralfx``, without ``access``, whose messages are whole."""
_STANDARD = frozenset({*vars(logging.LogRecord("", 0, "", 0, "", (), None)), "message", "asctime"})
_MAX_FACT_CHARACTERS = 200
"""Characters of one fact that are shown."""
_LIKE_FACTS = re.compile(r",\s*[^\W\d]\w*=").search


class _Whole(str):
    """A message that has its facts: of two applications in one process, each has a filter."""

    __slots__ = ()


class FactsInMessages(logging.Filter):
    """Appends the extra fields of a record to its message: ``Health check changed: check=shop``.

    The default formatters of ``logging`` and of servers show the message alone. The fields stay,
    for formatters that show them. Secrets are redacted and control characters are escaped, also in
    the traceback of an error: no formatter of this package follows.
    """

    def __init__(self, redact: Callable[[str], str] = str) -> None:
        super().__init__()
        self._redact = redact
        self._loggers: list[logging.Logger] = []

    @classmethod
    def from_settings(cls, settings: Settings) -> "FactsInMessages":
        """Return one that redacts the secrets of ``settings``."""
        return cls(Redaction({*secrets_of(settings)}).text)

    def install(self) -> None:
        """Begin with all loggers of this package, also those of modules that are imported later."""
        for name in LOGGERS:
            logger = logging.getLogger(f"viralfx.{name}")
            if self not in logger.filters:
                logger.addFilter(self)
                self._loggers.append(logger)

    def remove(self) -> None:
        """End it."""
        for logger in self._loggers:
            logger.removeFilter(self)
        self._loggers.clear()

    def complete(self, record: logging.LogRecord) -> None:
        """Change the message of a record, if it is one of this package."""
        area, _, name = record.name.partition(".")
        if area == "viralfx" and name in LOGGERS:
            self.filter(record)

    def filter(self, record: logging.LogRecord) -> bool:
        """Change the message of a record; return True."""
        if isinstance(record.msg, _Whole):
            return True
        facts = [
            f"{name}={self._shown(value)}"
            for name, value in vars(record).items()
            if name not in _STANDARD and value is not None
        ]
        message = message_of(record)
        shown = printable(message)
        if facts or shown != message:
            record.msg, record.args = _Whole(": ".join(filter(None, (shown, ", ".join(facts))))), ()
        if record.exc_info and not record.exc_text:
            # Formatters write this text where it is set.
            text = "".join(traceback.format_exception(record.exc_info[1])).rstrip("\n")
            if not all(map(str.isprintable, text.split("\n"))):
                record.exc_text = printable(text, kept="\n\t")
        return True

    def _shown(self, value: object) -> str:
        try:
            text = " ".join(str(value).split())
        except Exception:  # noqa: BLE001 - a log line must not fail its caller
            return f"a {type(value).__name__}"
        shown = printable(self._redact(text)[:_MAX_FACT_CHARACTERS])
        # Clients choose some values, so one that looks like further facts is in quotes.
        if shown.startswith('"') or _LIKE_FACTS(shown):
            quoted = shown.replace("\\", "\\\\").replace('"', '\\"')
            return f'"{quoted}"'
        return shown
