"""The log of slow queries, on a real server."""

import asyncio
import logging

import asyncpg
import pytest
from tests.integration.postgres_clients import config_of, opened
from tests.servers.postgres import Database

from viralfx.adapters.postgres import PostgresDatabase
from viralfx.domain.correlation import bind_correlation_id, current_correlation_id

SECRET = "hunter2"
SLEEP = "pg_sleep(0.6)"
THRESHOLD = 0.5
"""Seconds that nothing else takes that is asked here, nor what the driver asks beside it."""


class Records(logging.Handler):
    """Keeps what is logged by anybody, with the correlation id of that moment."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.all: list[tuple[logging.LogRecord, str | None]] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one."""
        self.all.append((record, current_correlation_id()))

    @property
    def slow(self) -> list[tuple[str, int, str | None]]:
        """Statement, duration in milliseconds and correlation id of each slow query."""
        return [
            (*map(vars(record).__getitem__, ("statement", "duration")), correlation_id)
            for record, correlation_id in self.all
            if record.getMessage() == "Slow query"
        ]

    def text(self) -> str:
        """Return everything that any record holds."""
        return repr([vars(record) for record, _ in self.all])


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> Records:
    """Return what is logged from here on, whatever its level."""
    handler, root = Records(), logging.getLogger()
    monkeypatch.setattr(root, "handlers", [*root.handlers, handler])
    monkeypatch.setattr(root, "level", logging.DEBUG)
    return handler


async def told() -> None:
    """Wait until the driver has told of the queries that ended."""
    await asyncio.sleep(0)
    await asyncio.sleep(0)


async def test_each_slow_query_is_logged_once(database: Database, records: Records) -> None:
    """Its shape, how long it took and on whose behalf; the quick ones are not."""
    async with opened(config_of(database, slow_query_threshold=THRESHOLD)) as pool:
        bind_correlation_id("request-1")
        async with pool.acquire() as connection:
            await connection.execute("select 1")
            await connection.fetchval(f"select  'a', {SLEEP},\n $1::int", 7)
        await told()

        assert pool.slow_queries == 1
    [(statement, duration, correlation_id)] = records.slow
    assert statement == "select ?, pg_sleep(?), $1::int"
    assert 600 <= duration < 5000
    assert correlation_id == "request-1"
    [record] = [r for r, _ in records.all if r.getMessage() == "Slow query"]
    assert (record.name, record.levelname) == ("viralfx.database", "WARNING")


@pytest.mark.parametrize("way", ["execute", "fetch", "many", "transaction", "retry"])
async def test_however_it_is_asked(database: Database, records: Records, way: str) -> None:
    """The driver has many ways; each tells once."""
    query = f"select {SLEEP} where $1::text is not null"

    async def ask(pool: PostgresDatabase) -> None:
        if way == "retry":
            await pool.execute_with_retry(lambda connection: connection.execute(query, SECRET))
            return
        async with pool.acquire() as connection:
            if way == "execute":
                await connection.execute(query, SECRET)
            elif way == "fetch":
                await connection.fetch(query, SECRET)
            elif way == "many":
                await connection.executemany(query, [(SECRET,)] * 2)
            else:
                async with connection.transaction():
                    await connection.fetchrow(query, SECRET)

    async with opened(config_of(database, slow_query_threshold=THRESHOLD)) as pool:
        await ask(pool)
        await told()
        assert pool.slow_queries == 1

    assert [statement for statement, _, _ in records.slow] == [
        "select pg_sleep(?) where $1::text is not null"
    ]
    assert SECRET not in records.text()


async def test_no_value_reaches_the_log(database: Database, records: Records) -> None:
    """Neither parameters nor literals, also where the query fails or is cancelled."""
    database.execute("create table users (name text primary key)")
    slow = f"insert into users select $1 || '{SECRET}' from {SLEEP}"  # noqa: S608 - planted
    slow += f" -- {SECRET}"
    async with opened(config_of(database, slow_query_threshold=THRESHOLD)) as pool:
        async with pool.acquire() as connection:
            await connection.execute(slow, SECRET)
            with pytest.raises(asyncpg.UniqueViolationError):
                await connection.execute(slow, SECRET)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.7):
                    await connection.execute(f"select '{SECRET}', pg_sleep(60)")
        await told()
        assert pool.slow_queries == 3

    assert len(records.slow) == 3
    errors = [vars(r).get("error") for r, _ in records.all if r.getMessage() == "Slow query"]
    assert errors == [None, "UniqueViolationError", "CancelledError"]
    assert SECRET not in records.text()


async def test_a_threshold_of_zero_logs_none(database: Database, records: Records) -> None:
    """And counts none."""
    async with opened(config_of(database, slow_query_threshold=0.0)) as pool:
        async with pool.acquire() as connection:
            await connection.execute(f"select {SLEEP}")
        await told()

        assert pool.slow_queries == 0
    assert records.slow == []
