"""Spans of statements, of a real server: made by the library, and without what is in no trace."""

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
from viralfx.telemetry.tracing.databases import trace_asyncpg, trace_redis
from viralfx.telemetry.tracing.provider import make_provider


def told(memory: InMemorySpanExporter) -> Sequence[ReadableSpan]:
    """Return the spans of statements."""
    return [span for span in memory.get_finished_spans() if span.kind is SpanKind.CLIENT]


@pytest.fixture
def memory() -> InMemorySpanExporter:
    """Return where spans go."""
    return InMemorySpanExporter()


@pytest.fixture
def provider(
    monkeypatch: pytest.MonkeyPatch, memory: InMemorySpanExporter
) -> Iterator[TracerProvider]:
    """Return what the driver's calls are traced with."""
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
    """Return a connection of the application's own."""
    with provider.get_tracer("test").start_as_current_span("work"):
        made = await asyncpg.connect(database.url)
        try:
            yield made
        finally:
            await made.close()


async def test_a_statement_may_be_given_by_name(
    provider: TracerProvider,
    memory: InMemorySpanExporter,
    connection: "asyncpg.Connection[asyncpg.Record]",
) -> None:
    """As the driver has it; and what is missing is missed by the driver."""
    await connection.execute(query="CREATE TABLE shop (name text PRIMARY KEY)")
    await connection.executemany(command="INSERT INTO shop VALUES ($1)", args=[["a"], ["b"]])
    assert len(await connection.fetch(query="SELECT * FROM shop WHERE name < 'c'")) == 2
    assert await connection.fetchval("SELECT name FROM shop", column=0) == "a"
    with pytest.raises(TypeError, match="query"):
        await connection.fetch()  # type: ignore[call-overload]
    provider.force_flush()

    assert [(span.name, (span.attributes or {})["db.query.text"]) for span in told(memory)] == [
        ("CREATE", "CREATE TABLE shop (name text PRIMARY KEY)"),
        ("INSERT", "INSERT INTO shop VALUES ($1)"),
        ("SELECT", "SELECT * FROM shop WHERE name < ?"),
        ("SELECT", "SELECT name FROM shop"),
    ]


async def test_a_statement_that_is_given_up_is_told_of(
    provider: TracerProvider,
    memory: InMemorySpanExporter,
    connection: "asyncpg.Connection[asyncpg.Record]",
) -> None:
    """By whoever waits for it no longer: the library tells of errors alone."""
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await connection.execute("SELECT pg_sleep(60)")
    provider.force_flush()
    [span] = told(memory)

    assert (span.attributes or {})["error.type"] == "CancelledError"
    assert span.status.status_code is StatusCode.ERROR


async def test_a_command_that_is_given_up_is_told_of(
    provider: TracerProvider, memory: InMemorySpanExporter, redis: RedisServer
) -> None:
    """Of Redis, too."""
    client = Redis.from_url(redis.url())
    trace_redis(client, provider)
    with provider.get_tracer("test").start_as_current_span("work"):
        await client.ping()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await client.execute_command("BLPOP", "nothing", 60)  # type: ignore[no-untyped-call]
        await client.aclose()
    provider.force_flush()
    ping, blpop = told(memory)

    assert "error.type" not in (ping.attributes or {})
    assert (blpop.attributes or {})["error.type"] == "CancelledError"
    assert blpop.status.status_code is StatusCode.ERROR


async def test_no_row_is_in_a_trace_of_what_went_wrong(
    provider: TracerProvider,
    memory: InMemorySpanExporter,
    connection: "asyncpg.Connection[asyncpg.Record]",
) -> None:
    """Not in what the server says, nor in what the driver says of what it was given."""
    await connection.execute("CREATE TABLE shop (name text PRIMARY KEY, number integer)")
    await connection.execute("INSERT INTO shop VALUES ('planted', 1)")
    with pytest.raises(asyncpg.UniqueViolationError, match="shop_pkey"):
        await connection.execute("INSERT INTO shop VALUES ($1)", "planted")
    with pytest.raises(asyncpg.DataError, match="planted"):
        await connection.execute("INSERT INTO shop VALUES ('a', $1)", "planted")
    with pytest.raises(asyncpg.RaiseError, match="planted"):
        await connection.execute("DO $$ BEGIN RAISE EXCEPTION 'planted'; END $$")
    provider.force_flush()
    failed = [span for span in told(memory) if span.events]

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
