"""What is taken out of spans before they leave: secrets, values, and what cannot be sent."""

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TypeAlias

from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.trace import Link, Status, StatusCode
from opentelemetry.util.types import AnyValue

from viralfx.telemetry.tracing.error_texts import (
    description_without_values,
    is_said_by_postgres,
    without_values,
)

Clean: TypeAlias = Callable[[str], str]

_SYSTEMS = ("db.system.name", "db.system")
_OWN_SYSTEMS = ("postgresql", "redis")
_STATEMENTS = ("db.query.text", "db.statement")
"""Each as it is called now and as it was: OTEL_SEMCONV_STABILITY_OPT_IN brings that back."""
_POSTGRES, _REDIS = "opentelemetry.instrumentation.asyncpg", "opentelemetry.instrumentation.redis"
"""Whose spans are named after statements and commands, and so by whatever is written there."""

LONGEST_VALUE = 4096
"""Characters of an attribute: what waits to be sent is bounded in number, and so in size."""
LONGEST_OF_A_CLIENT = 256
"""Characters of what a client chooses; there are two thousand spans that may wait to be sent."""
KEPT_OF_A_CLIENT = 2 * LONGEST_OF_A_CLIENT
KEPT_BEYOND = 2048
"""Characters that are kept of an attribute beyond what may leave of it: so a secret that is cut in
two, and could not be found any more, is where nothing leaves."""
_OF_A_CLIENT = frozenset(
    {"url.path", "http.request.method_original", "server.address", "user_agent.original"}
)
_LONGEST_NAME = 256
KEPT_OF_A_NAME = 2 * _LONGEST_NAME
_NAMES_REMEMBERED = 1024
_ABOUT_ERRORS = ("exception.type", "exception.message", "exception.stacktrace")
_LENGTH = "db.redis.pipeline_length"
_LOOKED_UP = frozenset({*_STATEMENTS, *_ABOUT_ERRORS, _LENGTH, "db.operation.name", "error.type"})
"""Keys that stay as they are, although a password may be a word of them."""
_SEARCHED = ("redis.search.query", "redis.search.xdoc_", "redis.create_index.")
"""What is said of arguments and answers of one module of Redis, whose values those are."""
_END_OF_TIME = 2**64
_KEYWORD = re.compile(r"[A-Za-z]+")
_CURSOR = "CURSOR: "


class Cleaning:
    """Makes of each span one that may leave."""

    def __init__(
        self,
        clean: Clean | None = None,
        clean_sql: Clean | None = None,
        *,
        longest: int = LONGEST_VALUE,
        longest_of_span: int | None = None,
    ) -> None:
        """``clean`` takes secrets out of any text, ``clean_sql`` the values out of statements.

        ``longest`` is how many characters of an attribute may leave, ``longest_of_span`` is the
        same for those of the span itself, where it differs. Spans that come have ``KEPT_BEYOND``
        more of each.
        """
        self._clean = clean
        self._longest = longest
        self._longest_of_span = longest if longest_of_span is None else longest_of_span
        self._clean_sql = clean_sql
        # There are few, and they come with each span: to search them each time costs a multiple.
        self._known = lru_cache(_NAMES_REMEMBERED)(self.text)

    def span(self, span: ReadableSpan) -> ReadableSpan:
        """Return a span without secrets, of which everything can be encoded."""
        _require_times(span)
        own = span.attributes or {}
        scope = None if span.instrumentation_scope is None else span.instrumentation_scope.name
        if scope == _REDIS:
            own = {key: value for key, value in own.items() if not key.startswith(_SEARCHED)}
        attributes = self._attributes(own, self._longest_of_span)
        status, kind = span.status, _kind_of_error(span)
        if status.description:
            kept = self._longest + KEPT_BEYOND
            description = self._cut(status.description[:kept], self._longest)
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
                    self._attributes(event.attributes or {}, self._longest),
                    event.timestamp,
                )
                for event in span.events
            ],
            links=[
                Link(link.context, self._attributes(link.attributes or {}, self._longest))
                for link in span.links
            ],
            kind=span.kind,
            status=status,
            start_time=span.start_time,
            end_time=span.end_time,
            instrumentation_scope=span.instrumentation_scope,
        )

    def text(self, text: str) -> str:
        """Return a text without secrets that can be encoded."""
        if self._clean is not None:
            text = self._clean(text)
        if text.isascii():
            return text
        # Half a surrogate, which any client's JSON may hold, would cost the whole batch.
        return text.encode("utf-8", "backslashreplace").decode()

    def _attributes(self, attributes: Mapping[str, AnyValue], longest: int) -> dict[str, AnyValue]:
        # A secret may be a word of what is looked up, so it is looked up as it was.
        clean_sql = self._clean_sql
        if not any(attributes.get(key) == "postgresql" for key in _SYSTEMS):
            clean_sql = None
        cleaned: dict[str, AnyValue] = {}
        for key, value in attributes.items():
            if key in _SYSTEMS and value in _OWN_SYSTEMS:
                cleaned[key] = value
            elif key in _STATEMENTS and clean_sql is not None and isinstance(value, str):
                # First the values: without the secrets, what is one would be harder to tell. Then
                # nothing is left where its end was cut of which a half could be told.
                cleaned[key] = self.text(clean_sql(value))[:longest]
            else:
                name = key if key in _LOOKED_UP else self._name(key)
                cleaned[name] = self._value(value, longest, key)
        return cleaned | _texts_of_error(cleaned, attributes.get("exception.type"))

    def _name(self, name: object) -> str:
        # Nobody sees to it that it is a text, and of what is none no batch could be made.
        name = name if isinstance(name, str) else str(name)
        if len(name) <= _LONGEST_NAME:
            return self._known(name)
        kept = KEPT_OF_A_NAME - _LONGEST_NAME
        return self._cut(name[:KEPT_OF_A_NAME], _LONGEST_NAME, kept)

    def _value(self, value: AnyValue, longest: int, key: str = "") -> AnyValue:
        match value:
            case str():
                if key in _OF_A_CLIENT and longest > LONGEST_OF_A_CLIENT:
                    kept = KEPT_OF_A_CLIENT - LONGEST_OF_A_CLIENT
                    return self._cut(value, LONGEST_OF_A_CLIENT, kept)
                return self._cut(value, longest)
            case list() | tuple():
                return [self._value(each, longest) for each in value]
            case Mapping():
                return {self._name(key): self._value(each, longest) for key, each in value.items()}
            case bytes():
                return self.text(value.decode("latin-1")).encode("latin-1", "replace")
            case _:
                return value

    def _cut(self, text: str, longest: int, beyond: int = KEPT_BEYOND) -> str:
        cleaned = self.text(text)
        if len(text) >= longest + beyond:
            # Its end was cut, and may be the beginning of a secret.
            cleaned = cleaned[: max(0, len(cleaned) - beyond)]
        return cleaned[:longest]


def _texts_of_error(attributes: Mapping[str, AnyValue], kind: AnyValue) -> dict[str, str]:
    """Return those of an exception's attributes that may quote values, without them."""
    texts: dict[str, str] = {}
    for key in _ABOUT_ERRORS[1:]:
        if isinstance(text := attributes.get(key), str):
            texts[key] = without_values(text)
    if texts and is_said_by_postgres(str(kind)):
        texts["exception.message"] = ""
    return texts


def _require_times(span: ReadableSpan) -> None:
    """Raise ValueError for times that cannot be sent, as seconds that are no whole number."""
    times: list[object] = [span.start_time, span.end_time]
    times += [event.timestamp for event in span.events]
    for each in times:
        if each is not None and not (isinstance(each, int) and 0 <= each < _END_OF_TIME):
            raise ValueError(f"a time of it is {each!r} and not nanoseconds since 1970")


def _kind_of_error(span: ReadableSpan) -> str | None:
    """Return the class of the error that a span saw last, with its module."""
    kind = (span.events[-1].attributes or {}).get("exception.type") if span.events else None
    return None if kind is None else str(kind)


def _statement(name: str, attributes: Mapping[str, AnyValue]) -> tuple[str, str]:
    """Return how a statement's span is called, and the statement: both by its keyword alone.

    What precedes the first space may go on with a value.
    """
    statement = next((attributes[key] for key in _STATEMENTS if key in attributes), "")
    found = _KEYWORD.search(str(statement)) or _KEYWORD.match(name.removeprefix(_CURSOR))
    word = "postgresql" if found is None else found[0]
    return f"{_CURSOR}{word}" if name.startswith(_CURSOR) else word, word


def _command(name: str, attributes: dict[str, AnyValue]) -> tuple[str, str]:
    """Take a command's arguments out of its text; returns how the span is called, and the command.

    That is the first word: all may be given as one text. A pipeline has no end of them.
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
