"""Spans of statements on a real server, made by the instrumentation library and redacted."""

import asyncio
import os
from collections.abc import AsyncIterator, Iterator, Sequence

import asyncpg
import pytest
from opentelemetry.instrumentation.asyncpg import AsyncPGInstrumentor
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from redis.asyncio import Redis
from tests.servers.postgres import Database
from tests.servers.redis import RedisServer

from viralfx.bootstrap.postgres import clean_statement
from viralfx.telemetry.tracing.provider import make_provider
from viralfx.telemetry.tracing.setup import trace_asyncpg, trace_redis


def spans_of_statements(memory: InMemorySpanExporter) -> Sequence[ReadableSpan]:
    """Return the spans of statements."""
    return [span for span in memory.get_finished_spans() if span.kind is SpanKind.CLIENT]


@pytest.fixture
def memory() -> InMemorySpanExporter:
    """Return the exporter that keeps spans in memory."""
    return InMemorySpanExporter()


@pytest.fixture
def provider(
    monkeypatch: pytest.MonkeyPatch, memory: InMemorySpanExporter
) -> Iterator[TracerProvider]:
    """Return the tracer provider of the driver's instrumentation."""
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    made, _ = make_provider(
        instance="here", environment="test", exporter=memory, clean_sql=clean_statement
    )
    trace_asyncpg(made)
    yield made
    AsyncPGInstrumentor().uninstrument()  # type: ignore[no-untyped-call]
    made.shutdown()


@pytest.fixture
async def connection(
    database: Database, provider: TracerProvider
) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
    """Return a connection of the application."""
    with provider.get_tracer("test").start_as_current_span("work"):
        made = await asyncpg.connect(database.url)
        try:
            yield made
        finally:
            await made.close()


async def test_statement_may_be_a_keyword_argument(
    provider: TracerProvider,
    memory: InMemorySpanExporter,
    connection: "asyncpg.Connection[asyncpg.Record]",
) -> None:
    """As in the driver, which also reports a missing one."""
    await connection.execute(query="CREATE TABLE shop (name text PRIMARY KEY)")
    await connection.executemany(command="INSERT INTO shop VALUES ($1)", args=[["a"], ["b"]])
    assert len(await connection.fetch(query="SELECT * FROM shop WHERE name < 'c'")) == 2
    assert await connection.fetchval("SELECT name FROM shop", column=0) == "a"
    with pytest.raises(TypeError, match="query"):
        await connection.fetch()  # type: ignore[call-overload]
    provider.force_flush()

    assert [
        (span.name, (span.attributes or {})["db.query.text"])
        for span in spans_of_statements(memory)
    ] == [
        ("CREATE", "CREATE TABLE shop (name text PRIMARY KEY)"),
        ("INSERT", "INSERT INTO shop VALUES ($1)"),
        ("SELECT", "SELECT * FROM shop WHERE name < ?"),
        ("SELECT", "SELECT name FROM shop"),
    ]


async def test_without_the_part_that_a_keyword_needs_nothing_is_recorded(
    provider: TracerProvider,
    memory: InMemorySpanExporter,
    connection: "asyncpg.Connection[asyncpg.Record]",
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A release of the library without it lets no statement fail; one warning says so."""
    monkeypatch.delattr(AsyncPGInstrumentor, "_do_execute")
    trace_asyncpg(provider)

    assert await connection.fetchval(query="SELECT 42") == 42
    assert spans_of_statements(memory) == []
    assert [record.message for record in caplog.records] == ["Statements are not traced"]


async def test_cancelled_statement_has_a_span(
    provider: TracerProvider,
    memory: InMemorySpanExporter,
    connection: "asyncpg.Connection[asyncpg.Record]",
) -> None:
    """The library by itself records only errors."""
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await connection.execute("SELECT pg_sleep(60)")
    provider.force_flush()
    [span] = spans_of_statements(memory)

    assert (span.attributes or {})["error.type"] == "CancelledError"
    assert span.status.status_code is StatusCode.ERROR


async def test_cancelled_redis_command_has_a_span(
    provider: TracerProvider, memory: InMemorySpanExporter, redis: RedisServer
) -> None:
    """The rules of statements hold for commands."""
    client = Redis.from_url(redis.url())
    trace_redis(client, provider)
    with provider.get_tracer("test").start_as_current_span("work"):
        await client.ping()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await client.execute_command("BLPOP", "nothing", 60)  # type: ignore[no-untyped-call]
        await client.aclose()
    provider.force_flush()
    ping, blpop = spans_of_statements(memory)

    assert "error.type" not in (ping.attributes or {})
    assert (blpop.attributes or {})["error.type"] == "CancelledError"
    assert blpop.status.status_code is StatusCode.ERROR


async def test_failed_statement_has_no_row_in_its_span(
    provider: TracerProvider,
    memory: InMemorySpanExporter,
    connection: "asyncpg.Connection[asyncpg.Record]",
) -> None:
    """Neither from the server's message nor from the driver's."""
    await connection.execute("CREATE TABLE shop (name text PRIMARY KEY, number integer)")
    await connection.execute("INSERT INTO shop VALUES ('planted', 1)")
    with pytest.raises(asyncpg.UniqueViolationError, match="shop_pkey"):
        await connection.execute("INSERT INTO shop VALUES ($1)", "planted")
    with pytest.raises(asyncpg.DataError, match="planted"):
        await connection.execute("INSERT INTO shop VALUES ('a', $1)", "planted")
    with pytest.raises(asyncpg.RaiseError, match="planted"):
        await connection.execute("DO $$ BEGIN RAISE EXCEPTION 'planted'; END $$")
    provider.force_flush()
    failed = [span for span in spans_of_statements(memory) if span.events]

    assert [(span.attributes or {})["error.type"] for span in failed] == [
        "UniqueViolationError",
        "DataError",
        "RaiseError",
    ]
    assert {str((span.attributes or {})["db.operation.name"]) for span in failed} == {
        "INSERT",
        "DO",
    }
    assert [span.status.description for span in failed] == [
        "UniqueViolationError",
        "DataError",
        "RaiseError",
    ]
    assert all("planted" not in span.to_json() for span in failed)
