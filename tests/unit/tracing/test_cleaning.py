"""Tests of cleaning: no secrets or values are exported, and every batch can be encoded."""

import time
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import Link, SpanContext, SpanKind, StatusCode, TraceFlags
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from tests.unit.tracing.conftest import Finished

from viralfx.bootstrap.postgres import clean_statement
from viralfx.telemetry.logging.redaction import Redaction
from viralfx.telemetry.tracing.cleaning import (
    KEPT_CLIENT_CHARACTERS,
    MAX_CLIENT_CHARACTERS,
    MAX_VALUE_CHARACTERS,
)
from viralfx.telemetry.tracing.provider import make_provider
from viralfx.telemetry.tracing.setup import trace_redis

_SECRET = "planted-secret"
_POSTGRES = "opentelemetry.instrumentation.asyncpg"
_REDIS = "opentelemetry.instrumentation.redis"
_ELSEWHERE = SpanContext(1, 2, is_remote=True, trace_flags=TraceFlags(1))


@pytest.fixture
def provider(memory: InMemorySpanExporter) -> Iterator[TracerProvider]:
    """Return a provider that cleans spans as in production."""
    made, _ = make_provider(
        instance="here",
        environment="test",
        exporter=memory,
        clean=Redaction([_SECRET]).text,
        clean_sql=clean_statement,
    )
    yield made
    made.shutdown()


def attributes_of(span: ReadableSpan) -> Mapping[str, Any]:
    """Return the attributes of a span."""
    return span.attributes or {}


def test_no_secret_is_exported(provider: TracerProvider, finished: Finished) -> None:
    """Secrets are redacted in every text of a span, at any depth."""
    links = [Link(_ELSEWHERE, {"link": f"{_SECRET} linked"})]
    with provider.get_tracer("test").start_as_current_span(f"do {_SECRET}", links=links) as span:
        span.set_attributes({"token": _SECRET, "number": 7, f"of {_SECRET}": True})
        span.set_attribute("many", [f"postgresql://user:{_SECRET}@host/db", "else"])
        span.set_attribute("deep", {_SECRET: [{"one": _SECRET}]})
        span.set_attribute("bytes", f"\xff{_SECRET}".encode("latin-1"))
        span.add_event(f"event {_SECRET}", {"exception.message": f"no {_SECRET} here"})
        span.set_status(StatusCode.ERROR, f"{_SECRET} was wrong")
    [work] = finished()

    assert _SECRET.encode() not in encode_spans([work]).SerializeToString()
    assert work.name == "do ***"
    assert attributes_of(work)["number"] == 7
    assert attributes_of(work)["many"] == ["postgresql://***@host/db", "else"]
    assert attributes_of(work)["bytes"] == b"\xff***"
    assert work.links[0].context == _ELSEWHERE
    assert work.end_time == span.end_time  # type: ignore[attr-defined]


def test_a_lone_surrogate_does_not_fail_the_batch(
    provider: TracerProvider, finished: Finished
) -> None:
    """A client's JSON may contain one, and it cannot be encoded as UTF-8."""
    span = provider.get_tracer("test").start_span("\ud800")
    span.set_attribute("\udcff", ["\udcff", "\N{WHITE SMILING FACE}"])
    span.record_exception(ValueError("no such user: \ud800"))
    span.set_status(StatusCode.ERROR, "\ud800")
    span.end()
    provider.get_tracer("test").start_span("good").end()

    assert len(encode_spans(finished()).resource_spans[0].scope_spans[0].spans) == 2
    bad = finished()[0]
    assert bad.name == "\\ud800"
    assert attributes_of(bad) == {"\\udcff": ["\\udcff", "\N{WHITE SMILING FACE}"]}
    assert bad.status.description == "\\ud800"
    message = (bad.events[0].attributes or {})["exception.message"]
    assert message == "no such user: \\ud800"


@pytest.mark.parametrize("system", ["db.system", "db.system.name"])
@pytest.mark.parametrize("text", ["db.statement", "db.query.text"])
def test_statements_contain_no_values(
    provider: TracerProvider, finished: Finished, system: str, text: str
) -> None:
    """This holds for current and former attribute names in any combination."""
    statement = "SELECT * FROM users WHERE email = 'alice@example.com'"
    attributes = {system: "postgresql", text: statement}
    provider.get_tracer("test").start_span("work", attributes=attributes).end()
    [span] = finished()

    assert attributes_of(span)[text] == "SELECT * FROM users WHERE email = ?"


@pytest.mark.parametrize("length", [2000, 4096, 6143, 6144, 9000])
def test_a_long_statement_is_not_empty(
    provider: TracerProvider, finished: Finished, length: int
) -> None:
    """Truncation leaves the beginning of statements with many values or many columns."""
    tracer = provider.get_tracer("test")
    for head, each in (("INSERT INTO x VALUES (", "'planted', "), ("SELECT ", "a_column, ")):
        statement = (head + each * length)[:length]
        attributes = {"db.system.name": "postgresql", "db.query.text": statement}
        tracer.start_span("work", attributes=attributes).end()
    insert, select = (attributes_of(span)["db.query.text"] for span in finished())

    assert insert.startswith("INSERT INTO x VALUES (?, ?")
    assert "pla" not in insert
    assert select.startswith("SELECT a_column, a_column")
    assert min(len(insert), len(select)) > 400


def test_a_name_that_is_not_a_string_does_not_fail_the_batch(
    provider: TracerProvider, finished: Finished
) -> None:
    """The application does not get an exception either."""
    odd: Any
    for odd in (None, b"GET", 5, SpanKind.SERVER):
        span = provider.get_tracer("test").start_span(odd)
        span.add_event(odd)
        span.update_name(odd)
        span.end()

    assert [span.name for span in finished()] == ["None", "b'GET'", "5", "SpanKind.SERVER"]
    assert len(encode_spans(finished()).resource_spans[0].scope_spans[0].spans) == 4


@pytest.mark.parametrize("secret", ["postgresql", "query.text", "db.query", "redis.search"])
def test_a_secret_equal_to_an_attribute_name_disables_no_cleaning(
    memory: InMemorySpanExporter, secret: str
) -> None:
    """This holds for values of ``db.system`` and for keys."""
    provider, _ = make_provider(
        instance="here",
        environment="test",
        exporter=memory,
        clean=Redaction([secret]).text,
        clean_sql=clean_statement,
    )
    attributes: dict[str, str | bool] = {
        "db.system.name": "postgresql",
        "db.query.text": f"SELECT '{secret}', 'planted'",
        f"of {secret}": True,
    }
    provider.get_tracer("test").start_span("work", attributes=attributes).end()
    search = {"redis.search.query": "planted", "db.system": "redis"}
    provider.get_tracer(_REDIS).start_span("redis.search", attributes=search).end()
    provider.shutdown()
    span, search_span = memory.get_finished_spans()

    assert attributes_of(span) == {
        "db.system.name": "postgresql",
        "db.query.text": "SELECT ?, ?",
        "of ***": True,
    }
    assert "planted" not in search_span.to_json()


def test_all_attribute_keys_are_redacted(provider: TracerProvider, finished: Finished) -> None:
    """Keys that begin like those of the conventions are redacted as well."""
    attributes: dict[str, int | str] = {
        f"http.{_SECRET}": 1,
        "url.\ud800": 2,
        "db." + "x" * 9000: 3,
        "db.system": _SECRET,
    }
    provider.get_tracer("test").start_span("work", attributes=attributes).end()
    [span] = finished()

    assert list(attributes_of(span)) == ["http.***", "url.\\ud800", "db." + "x" * 253, "db.system"]
    assert attributes_of(span)["db.system"] == "***"


@pytest.mark.parametrize(
    ("statement", "first", "name"),
    [
        ("SELECT 1", "SELECT", "SELECT"),
        ("select'hunter2'as x", "select'hunter2'as", "select"),
        ("-- hunter2\n(SELECT 1)", "--", "SELECT"),
        ("/* a\n b */ INSERT INTO x VALUES (1)", "/*", "INSERT"),
        ("FETCH 1", "CURSOR: FETCH'hunter2'", "CURSOR: FETCH"),
        ("", "", "postgresql"),
    ],
)
def test_a_statements_span_is_named_by_its_keyword(
    provider: TracerProvider, finished: Finished, statement: str, first: str, name: str
) -> None:
    """The text before the first space may contain a value."""
    attributes = {"db.system.name": "postgresql", "db.query.text": statement}
    provider.get_tracer(_POSTGRES).start_span(first, attributes=attributes).end()
    [span] = finished()

    assert span.name == name


async def test_redis_commands_contain_no_arguments(
    provider: TracerProvider, finished: Finished
) -> None:
    """This includes commands given as one string; the name of a pipeline is constant."""
    client = Redis(port=1, retry=Retry(NoBackoff(), 0))
    trace_redis(client, provider)
    pipeline = client.pipeline()
    for number in range(3000):
        pipeline.set(f"key{number}", number)  # type: ignore[unused-awaitable]
    with provider.get_tracer("test").start_as_current_span("work"):
        with pytest.raises(RedisConnectionError):
            await client.execute_command("SET session:alice hunter2")  # type: ignore[no-untyped-call]
        with pytest.raises(RedisConnectionError):
            await client.get("alice")
        with pytest.raises(RedisConnectionError):
            await pipeline.execute()
    one, two, three, _ = finished()

    assert (one.name, attributes_of(one)["db.query.text"]) == ("SET", "SET ? ?")
    assert (two.name, attributes_of(two)["db.query.text"]) == ("GET", "GET ?")
    assert three.name == "PIPELINE"
    assert [attributes_of(span)["db.operation.name"] for span in (one, two, three)] == [
        "SET",
        "GET",
        "PIPELINE",
    ]
    assert {attributes_of(span)["error.type"] for span in (one, two, three)} == {"ConnectionError"}
    assert set(attributes_of(three)["db.query.text"].split("\n")[:500]) == {"SET ? ?"}


def test_redis_search_attributes_are_removed(provider: TracerProvider, finished: Finished) -> None:
    """The driver's instrumentation records the query and the results."""
    span = provider.get_tracer(_REDIS).start_span("redis.search")
    for key in ("query", "xdoc_7.email"):
        span.set_attribute(f"redis.search.{key}", "planted")
    span.set_attribute("redis.search.total", 1)
    span.end()
    [search] = finished()

    assert attributes_of(search) == {"redis.search.total": 1, "db.operation.name": "redis.search"}


def test_span_names_are_truncated(provider: TracerProvider, finished: Finished) -> None:
    """This holds for names of the application and of instrumentations."""
    began = provider.get_tracer("test").start_span("x" * 9000, kind=SpanKind.SERVER)
    assert isinstance(began, ReadableSpan)
    assert len(began.name) <= 512
    began.update_name(f"{'y' * 509} {_SECRET}")
    began.add_event("z" * 9000)
    began.end()
    [span] = finished()

    assert span.name == "y" * 256
    assert span.events[0].name == "z" * 256


def test_a_crafted_message_is_cleaned_in_linear_time(
    provider: TracerProvider, finished: Finished
) -> None:
    """Each part begins like a pattern and does not complete it."""
    span = provider.get_tracer("test").start_span("work")
    for piece in (
        *("Command # 1 (a ", "invalid input syntax:", "invalid input syntax ", "\n| DETAIL:"),
        *("\n|\n|", "\\nDETAIL: ", "://a:", "[SQL: ", "RaiseError('", "\n+-+--"),
    ):
        span.record_exception(ValueError(piece * 100_000))
        span.set_status(StatusCode.ERROR, piece * 100_000)
    began = time.process_time()
    span.end()
    assert finished()

    assert time.process_time() - began < 1


@pytest.mark.parametrize("before", range(40, 4200, 160))
def test_truncation_leaves_no_part_of_a_secret(
    provider: TracerProvider, finished: Finished, before: int
) -> None:
    """Text is truncated after redaction, or within the margin that is never exported."""
    text = "x" * before + f" {_SECRET}" * 500
    with provider.get_tracer("test").start_as_current_span("work") as span:
        span.set_attributes(
            {"text": text, "many": [text], "url.path": text[:KEPT_CLIENT_CHARACTERS]}
        )
        span.record_exception(ValueError(text))
        span.set_status(StatusCode.ERROR, text)
    [work] = finished()

    assert "pla" not in work.to_json()
    assert len(attributes_of(work)["text"]) <= MAX_VALUE_CHARACTERS
    assert len(attributes_of(work)["many"][0]) <= MAX_VALUE_CHARACTERS
    assert len(attributes_of(work)["url.path"]) <= MAX_CLIENT_CHARACTERS
    assert len(str(work.status.description)) <= MAX_VALUE_CHARACTERS


@pytest.mark.parametrize(
    "name", ["OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT", "OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT"]
)
def test_the_configured_length_limit_is_applied(
    monkeypatch: pytest.MonkeyPatch, memory: InMemorySpanExporter, name: str
) -> None:
    """It limits the exported text; shorter text is complete."""
    monkeypatch.setenv(name, "100")
    provider, _ = make_provider(instance="here", environment="test", exporter=memory)
    span = provider.get_tracer("test").start_span("work")
    span.set_attributes({"long": "x" * 101, "short": "x" * 100})
    span.end()
    provider.shutdown()
    [work] = memory.get_finished_spans()

    assert attributes_of(work) == {"long": "x" * 100, "short": "x" * 100}


def test_the_span_limit_does_not_apply_to_events(
    monkeypatch: pytest.MonkeyPatch, memory: InMemorySpanExporter
) -> None:
    """The specification has a separate limit for them."""
    monkeypatch.setenv("OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT", "10")
    provider, _ = make_provider(instance="here", environment="test", exporter=memory)
    span = provider.get_tracer("test").start_span("work")
    span.set_attribute("long", "x" * 5000)
    span.add_event("happened", {"long": "x" * 5000})
    span.set_status(StatusCode.ERROR, "x" * 5000)
    span.end()
    provider.shutdown()
    [work] = memory.get_finished_spans()

    assert attributes_of(work) == {"long": "x" * 10}
    assert (work.events[0].attributes or {}) == {"long": "x" * MAX_VALUE_CHARACTERS}
    assert work.status.description == "x" * MAX_VALUE_CHARACTERS
