"""What leaves: nothing secret, no value of a statement or a command, and all of the batch."""

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
from viralfx.telemetry.redaction import Redaction
from viralfx.telemetry.tracing.cleaning import (
    KEPT_OF_A_CLIENT,
    LONGEST_OF_A_CLIENT,
    LONGEST_VALUE,
)
from viralfx.telemetry.tracing.databases import trace_redis
from viralfx.telemetry.tracing.provider import make_provider

_SECRET = "planted-secret"
_POSTGRES = "opentelemetry.instrumentation.asyncpg"
_REDIS = "opentelemetry.instrumentation.redis"
_ELSEWHERE = SpanContext(1, 2, is_remote=True, trace_flags=TraceFlags(1))


@pytest.fixture
def provider(memory: InMemorySpanExporter) -> Iterator[TracerProvider]:
    """Return a provider that cleans as the program's does."""
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
    """Return a span's attributes."""
    return span.attributes or {}


def test_nothing_secret_leaves(provider: TracerProvider, finished: Finished) -> None:
    """Wherever a text may stand, however deep."""
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


def test_half_a_character_costs_no_batch(provider: TracerProvider, finished: Finished) -> None:
    """JSON of a client may hold it, and it cannot be encoded as it is."""
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
def test_a_statement_has_no_values(
    provider: TracerProvider, finished: Finished, system: str, text: str
) -> None:
    """By whichever names, in whatever mixture a host's variables bring about."""
    statement = "SELECT * FROM users WHERE email = 'alice@example.com'"
    attributes = {system: "postgresql", text: statement}
    provider.get_tracer("test").start_span("work", attributes=attributes).end()
    [span] = finished()

    assert attributes_of(span)[text] == "SELECT * FROM users WHERE email = ?"


@pytest.mark.parametrize("length", [2000, 4096, 6143, 6144, 9000])
def test_a_long_statement_is_not_nothing(
    provider: TracerProvider, finished: Finished, length: int
) -> None:
    """However long it is, and whether of values or of columns."""
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


def test_a_name_that_is_no_text_costs_no_batch(
    provider: TracerProvider, finished: Finished
) -> None:
    """Nor does it raise in whose span it is."""
    odd: Any
    for odd in (None, b"GET", 5, SpanKind.SERVER):
        span = provider.get_tracer("test").start_span(odd)
        span.add_event(odd)
        span.update_name(odd)
        span.end()

    assert [span.name for span in finished()] == ["None", "b'GET'", "5", "SpanKind.SERVER"]
    assert len(encode_spans(finished()).resource_spans[0].scope_spans[0].spans) == 4


@pytest.mark.parametrize("secret", ["postgresql", "text", "query", "redis"])
def test_a_secret_that_is_a_word_of_the_conventions_hides_no_value(
    memory: InMemorySpanExporter, secret: str
) -> None:
    """Of a system by its name, of an attribute by its key."""
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


def test_no_key_is_left_as_it_came(provider: TracerProvider, finished: Finished) -> None:
    """Also where it begins as those of the conventions do."""
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
def test_a_statement_is_called_by_its_keyword(
    provider: TracerProvider, finished: Finished, statement: str, first: str, name: str
) -> None:
    """What the driver's instrumentation takes for its first word may go on with a value."""
    attributes = {"db.system.name": "postgresql", "db.query.text": statement}
    provider.get_tracer(_POSTGRES).start_span(first, attributes=attributes).end()
    [span] = finished()

    assert span.name == name


async def test_a_command_has_no_arguments(provider: TracerProvider, finished: Finished) -> None:
    """Not even where they are given as one text; and no name grows with a pipeline."""
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


def test_a_search_has_no_values(provider: TracerProvider, finished: Finished) -> None:
    """What the driver's instrumentation tells of one is what was looked for, and what was found."""
    span = provider.get_tracer(_REDIS).start_span("redis.search")
    for key in ("query", "xdoc_7.email"):
        span.set_attribute(f"redis.search.{key}", "planted")
    span.set_attribute("redis.search.total", 1)
    span.end()
    [search] = finished()

    assert attributes_of(search) == {"redis.search.total": 1, "db.operation.name": "redis.search"}


def test_a_name_is_not_endless(provider: TracerProvider, finished: Finished) -> None:
    """Whoever gives it."""
    began = provider.get_tracer("test").start_span("x" * 9000, kind=SpanKind.SERVER)
    assert isinstance(began, ReadableSpan)
    assert len(began.name) <= 512
    began.update_name(f"{'y' * 509} {_SECRET}")
    began.add_event("z" * 9000)
    began.end()
    [span] = finished()

    assert span.name == "y" * 256
    assert span.events[0].name == "z" * 256


def test_a_message_of_a_client_s_making_takes_no_time(
    provider: TracerProvider, finished: Finished
) -> None:
    """Each piece of it begins as something does that is looked for, and none ends like that."""
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
def test_no_half_of_a_secret_is_left_where_a_value_ends(
    provider: TracerProvider, finished: Finished, before: int
) -> None:
    """What is too long is cut after the secrets were found, or where they could not be."""
    text = "x" * before + f" {_SECRET}" * 500
    with provider.get_tracer("test").start_as_current_span("work") as span:
        span.set_attributes({"text": text, "many": [text], "url.path": text[:KEPT_OF_A_CLIENT]})
        span.record_exception(ValueError(text))
        span.set_status(StatusCode.ERROR, text)
    [work] = finished()

    assert "pla" not in work.to_json()
    assert len(attributes_of(work)["text"]) <= LONGEST_VALUE
    assert len(attributes_of(work)["many"][0]) <= LONGEST_VALUE
    assert len(attributes_of(work)["url.path"]) <= LONGEST_OF_A_CLIENT
    assert len(str(work.status.description)) <= LONGEST_VALUE


@pytest.mark.parametrize(
    "name", ["OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT", "OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT"]
)
def test_a_limit_of_the_variables_is_kept(
    monkeypatch: pytest.MonkeyPatch, memory: InMemorySpanExporter, name: str
) -> None:
    """Of what leaves; a text that is not too long is there to its end."""
    monkeypatch.setenv(name, "100")
    provider, _ = make_provider(instance="here", environment="test", exporter=memory)
    span = provider.get_tracer("test").start_span("work")
    span.set_attributes({"long": "x" * 101, "short": "x" * 100})
    span.end()
    provider.shutdown()
    [work] = memory.get_finished_spans()

    assert attributes_of(work) == {"long": "x" * 100, "short": "x" * 100}


def test_a_limit_of_spans_is_none_of_events(
    monkeypatch: pytest.MonkeyPatch, memory: InMemorySpanExporter
) -> None:
    """By the specification they have one of their own."""
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
    assert (work.events[0].attributes or {}) == {"long": "x" * LONGEST_VALUE}
    assert work.status.description == "x" * LONGEST_VALUE
