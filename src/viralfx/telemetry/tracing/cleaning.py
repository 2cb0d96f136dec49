"""Cleaning of spans before export: removes secrets, query values and unencodable text."""

import re
import sys
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TypeAlias

from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.trace import Link, Status, StatusCode
from opentelemetry.util.types import AnyValue

_REST = (
    r"(?=\n[ |]*\n[ |]*(?:The above exception was|During handling of the above)"
    r"|\n[ |]*(?:\+-)?\+-{16}(?: (?:\d+|\.\.\.) -{16}|-{20})(?:\n|\Z)|\Z)"
)
"""The end of an error's text in a traceback: another error, a member of a group, or the end."""
_END = re.compile(_REST)
_DETAIL = re.compile(rf"((?:\b|(?<=\\n))DETAIL:).*?{_REST}", re.DOTALL)
"""In the repr of an error the preceding line ends with a literal ``\\n``."""
_ASYNCPG_ERROR = re.compile(
    # The driver's own InterfaceError is about connections and holds no values.
    rf"^([ |]*asyncpg\.exceptions\.(?!_base\.InterfaceError:)[\w.]+): .*?{_REST}",
    re.DOTALL | re.MULTILINE,
)
_SQLALCHEMY = re.compile(
    rf"(<class 'asyncpg\.exceptions\.[\w.]+'>:|\[(?:SQL|parameters):) .*?{_REST}", re.DOTALL
)
"""SQLAlchemy's quotation of the driver's error, the statement and its parameters."""
_ERROR_REPR = re.compile(r"\b(\w+Error)\((?=['\"])")
_INVALID = re.compile(
    rf"(invalid input (?:syntax|value|for query argument)[^:\n]{{0,200}}:).*?{_REST}", re.DOTALL
)
"""Messages of Postgres and its driver about a value, quoted in the texts of other errors."""
_IN_PIPELINE = re.compile(
    r"(Command # \d+ \(\S+) .{0,500}?(\) of pipeline caused error)", re.DOTALL
)
_UNKNOWN_COMMAND = re.compile(r"(, with args beginning with:).*")


def may_quote_values(kind: str) -> bool:
    """Return whether the text of an error class (with its module) may quote values.

    Postgres quotes them itself, as for a duplicate key, and procedures raise texts of their own.
    """
    module, _, name = kind.rpartition(".")
    return module.partition(".")[0] == "asyncpg" and _quotes(name)


def without_values(text: str) -> str:
    """Return the text of an error or traceback without values of the database."""
    text = _ASYNCPG_ERROR.sub(r"\1", text)
    text = _SQLALCHEMY.sub(r"\1 ...", text)
    text = _without_error_reprs(text)
    text = _DETAIL.sub(r"\1 ...", text)
    text = _INVALID.sub(r"\1 ...", text)
    text = _IN_PIPELINE.sub(r"\1 ...\2", text)
    return _UNKNOWN_COMMAND.sub(r"\1 ...", text)


def description_without_values(description: str, kind: str | None = None) -> str:
    """Return the description of a status without values; for exceptions it begins with the class.

    ``kind`` is the exception's class with its module, if the span recorded one.
    """
    name = description.partition(":")[0]
    known = kind is not None and kind.rpartition(".")[2] == name
    if may_quote_values(str(kind)) if known else _quotes(name):
        return name
    return without_values(description)


def _without_error_reprs(text: str) -> str:
    """Return the text without the arguments in reprs of Postgres errors."""
    kept, at = [], 0
    for found in _ERROR_REPR.finditer(text):
        if found.start() >= at and _quotes(found[1]):
            kept.append(text[at : found.end()] + "...")
            end = _END.search(text, found.end())
            at = end.start() if end is not None else len(text)
    return "".join([*kept, text[at:]])


def _quotes(name: str) -> bool:
    exceptions = sys.modules.get("asyncpg.exceptions")
    return name.endswith("Error") and name != "InterfaceError" and hasattr(exceptions, name)


Clean: TypeAlias = Callable[[str], str]

_SYSTEMS = ("db.system.name", "db.system")
_OWN_SYSTEMS = ("postgresql", "redis")
_STATEMENTS = ("db.query.text", "db.statement")
"""Current and former attribute name; OTEL_SEMCONV_STABILITY_OPT_IN selects the former."""
_POSTGRES, _REDIS = "opentelemetry.instrumentation.asyncpg", "opentelemetry.instrumentation.redis"
"""Instrumentations whose span names contain text of statements and commands."""

MAX_VALUE_CHARACTERS = 4096
"""Exported length of an attribute; bounds the memory of queued spans."""
MAX_CLIENT_CHARACTERS = 256
"""Exported length of an attribute that a client controls; 2,048 spans may be queued."""
KEPT_CLIENT_CHARACTERS = 2 * MAX_CLIENT_CHARACTERS
KEPT_EXTRA_CHARACTERS = 2048
"""Characters kept beyond the exported length. A secret that truncation cuts in two cannot be found;
this margin keeps it outside the exported part."""
_CLIENT_ATTRIBUTES = frozenset(
    {"url.path", "http.request.method_original", "server.address", "user_agent.original"}
)
_MAX_NAME_CHARACTERS = 256
KEPT_NAME_CHARACTERS = 2 * _MAX_NAME_CHARACTERS
_CACHED_NAMES = 1024
_ERROR_ATTRIBUTES = ("exception.type", "exception.message", "exception.stacktrace")
_LENGTH = "db.redis.pipeline_length"
_UNREDACTED_KEYS = frozenset(
    {*_STATEMENTS, *_ERROR_ATTRIBUTES, _LENGTH, "db.operation.name", "error.type"}
)
"""Keys that are never redacted, even if a password is part of their name."""
_REDIS_SEARCH_PREFIXES = ("redis.search.query", "redis.search.xdoc_", "redis.create_index.")
"""Attributes of Redis' search module; their values are queries and results."""
_MAX_TIME_NANOSECONDS = 2**64
_KEYWORD = re.compile(r"[A-Za-z]+")
_CURSOR = "CURSOR: "


class Cleaning:
    """Converts recorded spans to spans that may be exported."""

    def __init__(
        self,
        clean: Clean | None = None,
        clean_sql: Clean | None = None,
        *,
        max_characters: int = MAX_VALUE_CHARACTERS,
        max_span_characters: int | None = None,
    ) -> None:
        """``clean`` redacts secrets in any text, ``clean_sql`` removes values from statements.

        ``max_characters`` is the exported length of attributes, ``max_span_characters`` that of
        the span's own attributes if it differs. Recorded spans keep ``KEPT_EXTRA_CHARACTERS``
        more of each.
        """
        self._clean = clean
        self._max_characters = max_characters
        self._max_span_characters = (
            max_characters if max_span_characters is None else max_span_characters
        )
        self._clean_sql = clean_sql
        # Few distinct names occur in every span; a cache is several times faster than cleaning.
        self._clean_name = lru_cache(_CACHED_NAMES)(self.text)

    def span(self, span: ReadableSpan) -> ReadableSpan:
        """Return a span without secrets, all of which can be encoded.

        Raises ``ValueError`` for times that cannot be encoded.
        """
        _require_times(span)
        own = span.attributes or {}
        scope = None if span.instrumentation_scope is None else span.instrumentation_scope.name
        if scope == _REDIS:
            own = {
                key: value
                for key, value in own.items()
                if not key.startswith(_REDIS_SEARCH_PREFIXES)
            }
        attributes = self._attributes(own, self._max_span_characters)
        status, kind = span.status, _kind_of_error(span)
        if status.description:
            kept = self._max_characters + KEPT_EXTRA_CHARACTERS
            description = self._cut(status.description[:kept], self._max_characters)
            status = Status(status.status_code, description_without_values(description, kind))
        name = self._name(span.name)
        if scope in {_POSTGRES, _REDIS}:
            called = _statement if scope == _POSTGRES else _command
            name, operation = called(name, attributes)
            attributes.setdefault("db.operation.name", operation)
            if kind is not None and status.status_code is StatusCode.ERROR:
                attributes.setdefault("error.type", kind.rpartition(".")[2])
        return ReadableSpan(
            name=name,
            context=span.context,
            parent=span.parent,
            resource=span.resource,
            attributes=attributes,
            events=[
                Event(
                    self._name(event.name),
                    self._attributes(event.attributes or {}, self._max_characters),
                    event.timestamp,
                )
                for event in span.events
            ],
            links=[
                Link(link.context, self._attributes(link.attributes or {}, self._max_characters))
                for link in span.links
            ],
            kind=span.kind,
            status=status,
            start_time=span.start_time,
            end_time=span.end_time,
            instrumentation_scope=span.instrumentation_scope,
        )

    def text(self, text: str) -> str:
        """Return an encodable text without secrets."""
        if self._clean is not None:
            text = self._clean(text)
        if text.isascii():
            return text
        # A lone surrogate, which any client's JSON may contain, would fail the whole batch.
        return text.encode("utf-8", "backslashreplace").decode()

    def _attributes(
        self, attributes: Mapping[str, AnyValue], max_characters: int
    ) -> dict[str, AnyValue]:
        # Decided on the original attributes: redaction could change the values that are compared.
        clean_sql = self._clean_sql
        if not any(attributes.get(key) == "postgresql" for key in _SYSTEMS):
            clean_sql = None
        cleaned: dict[str, AnyValue] = {}
        for key, value in attributes.items():
            if key in _SYSTEMS and value in _OWN_SYSTEMS:
                cleaned[key] = value
            elif key in _STATEMENTS and clean_sql is not None and isinstance(value, str):
                # Values first, because redaction could hide where a value ends. After that no part
                # of a truncated value is left.
                cleaned[key] = self.text(clean_sql(value))[:max_characters]
            else:
                name = key if key in _UNREDACTED_KEYS else self._name(key)
                cleaned[name] = self._value(value, max_characters, key)
        return cleaned | _texts_of_error(cleaned, attributes.get("exception.type"))

    def _name(self, name: object) -> str:
        # The SDK does not check that names are strings; others would fail the whole batch.
        name = name if isinstance(name, str) else str(name)
        if len(name) <= _MAX_NAME_CHARACTERS:
            return self._clean_name(name)
        kept = KEPT_NAME_CHARACTERS - _MAX_NAME_CHARACTERS
        return self._cut(name[:KEPT_NAME_CHARACTERS], _MAX_NAME_CHARACTERS, kept)

    def _value(self, value: AnyValue, max_characters: int, key: str = "") -> AnyValue:
        match value:
            case str():
                if key in _CLIENT_ATTRIBUTES and max_characters > MAX_CLIENT_CHARACTERS:
                    kept = KEPT_CLIENT_CHARACTERS - MAX_CLIENT_CHARACTERS
                    return self._cut(value, MAX_CLIENT_CHARACTERS, kept)
                return self._cut(value, max_characters)
            case list() | tuple():
                return [self._value(each, max_characters) for each in value]
            case Mapping():
                return {
                    self._name(key): self._value(each, max_characters)
                    for key, each in value.items()
                }
            case bytes():
                return self.text(value.decode("latin-1")).encode("latin-1", "replace")
            case _:
                return value

    def _cut(self, text: str, max_characters: int, extra: int = KEPT_EXTRA_CHARACTERS) -> str:
        cleaned = self.text(text)
        if len(text) >= max_characters + extra:
            # The recorded text was truncated, and its end may be the beginning of a secret.
            cleaned = cleaned[: max(0, len(cleaned) - extra)]
        return cleaned[:max_characters]


def _texts_of_error(attributes: Mapping[str, AnyValue], kind: AnyValue) -> dict[str, str]:
    """Return an exception's message and stack trace without values."""
    texts: dict[str, str] = {}
    for key in _ERROR_ATTRIBUTES[1:]:
        if isinstance(text := attributes.get(key), str):
            texts[key] = without_values(text)
    if texts and may_quote_values(str(kind)):
        texts["exception.message"] = ""
    return texts


def _require_times(span: ReadableSpan) -> None:
    """Raise ``ValueError`` for times that cannot be encoded, such as fractional seconds."""
    times: list[object] = [span.start_time, span.end_time]
    times += [event.timestamp for event in span.events]
    for each in times:
        if each is not None and not (isinstance(each, int) and 0 <= each < _MAX_TIME_NANOSECONDS):
            raise ValueError(f"{each!r} is not a time in nanoseconds since 1970")


def _kind_of_error(span: ReadableSpan) -> str | None:
    """Return the class of the span's last error, with its module."""
    kind = (span.events[-1].attributes or {}).get("exception.type") if span.events else None
    return None if kind is None else str(kind)


def _statement(name: str, attributes: Mapping[str, AnyValue]) -> tuple[str, str]:
    """Return span name and operation of a statement, both only its first keyword.

    The text before the first space is no substitute: it may contain a value.
    """
    statement = next((attributes[key] for key in _STATEMENTS if key in attributes), "")
    found = _KEYWORD.search(str(statement)) or _KEYWORD.match(name.removeprefix(_CURSOR))
    word = "postgresql" if found is None else found[0]
    return f"{_CURSOR}{word}" if name.startswith(_CURSOR) else word, word


def _command(name: str, attributes: dict[str, AnyValue]) -> tuple[str, str]:
    """Remove the arguments from a command's text; return the span's name and the operation.

    Both are the first word of the command, or ``PIPELINE`` for a pipeline.
    """
    pipeline = _LENGTH in attributes
    for key in _STATEMENTS:
        if isinstance(text := attributes.get(key), str):
            commands = text.split("\n") if pipeline else [text]
            attributes[key] = "\n".join(map(_without_arguments, commands))
    word = "PIPELINE" if pipeline else _without_arguments(name).partition(" ")[0] or "redis"
    return word, word


def _without_arguments(command: str) -> str:
    first, *arguments = command.split() or [""]
    return " ".join([first, *("?" for _ in arguments)])
