"""The log of slow queries, on a real server."""

import asyncio
import logging

import asyncpg
import pytest
from tests.integration.postgres_clients import config_of, opened
from tests.servers.postgres import Database

from viralfx.core.correlation import bind_correlation_id, current_correlation_id
from viralfx.postgres import PostgresDatabase

SECRET = "hunter2"
SLEEP = "pg_sleep(0.6)"
THRESHOLD = 500
"""Milliseconds; other queries of the test and of the driver are faster."""


class Records(logging.Handler):
    """Keeps log records with the correlation id at that time."""

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
        """Return the text of all records."""
        return repr([vars(record) for record, _ in self.all])


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> Records:
    """Return the records of all loggers and levels from here on."""
    handler, root = Records(), logging.getLogger()
    monkeypatch.setattr(root, "handlers", [*root.handlers, handler])
    monkeypatch.setattr(root, "level", logging.DEBUG)
    return handler


async def flushed() -> None:
    """Wait until the driver has reported the finished queries."""
    await asyncio.sleep(0)
    await asyncio.sleep(0)


async def test_each_slow_query_is_logged_once(database: Database, records: Records) -> None:
    """With statement, duration and correlation id; fast queries are not logged."""
    async with opened(config_of(database, slow_query_threshold=THRESHOLD / 1000)) as pool:
        bind_correlation_id("request-1")
        async with pool.acquire() as connection:
            await connection.execute("select 1")
            await connection.fetchval(f"select  'a', {SLEEP},\n $1::int", 7)
        await flushed()

        assert pool.slow_queries == 1
    [(statement, duration, correlation_id)] = records.slow
    assert statement == "select ?, pg_sleep(?), $1::int"
    assert 600 <= duration < 5000
    assert correlation_id == "request-1"
    [record] = [r for r, _ in records.all if r.getMessage() == "Slow query"]
    assert (record.name, record.levelname) == ("viralfx.database", "WARNING")


@pytest.mark.parametrize("way", ["execute", "fetch", "many", "transaction", "retry"])
async def test_every_query_method_of_the_driver_is_logged_once(
    database: Database, records: Records, way: str
) -> None:
    """The driver has several methods."""
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

    async with opened(config_of(database, slow_query_threshold=THRESHOLD / 1000)) as pool:
        await ask(pool)
        await flushed()
        assert pool.slow_queries == 1

    assert [statement for statement, _, _ in records.slow] == [
        "select pg_sleep(?) where $1::text is not null"
    ]
    assert SECRET not in records.text()


async def test_no_value_is_logged(database: Database, records: Records) -> None:
    """Neither parameters nor literals, also if the query fails or is cancelled."""
    database.execute("create table users (name text primary key)")
    slow = f"insert into users select $1 || '{SECRET}' from {SLEEP}"  # noqa: S608 - planted
    slow += f" -- {SECRET}"
    async with opened(config_of(database, slow_query_threshold=THRESHOLD / 1000)) as pool:
        async with pool.acquire() as connection:
            await connection.execute(slow, SECRET)
            with pytest.raises(asyncpg.UniqueViolationError):
                await connection.execute(slow, SECRET)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.7):
                    await connection.execute(f"select '{SECRET}', pg_sleep(60)")
        await flushed()
        assert pool.slow_queries == 3

    assert len(records.slow) == 3
    errors = [vars(r).get("error") for r, _ in records.all if r.getMessage() == "Slow query"]
    assert errors == [None, "UniqueViolationError", "CancelledError"]
    assert SECRET not in records.text()


async def test_threshold_of_zero_turns_the_log_off(database: Database, records: Records) -> None:
    """Nothing is counted either."""
    async with opened(config_of(database, slow_query_threshold=0.0)) as pool:
        async with pool.acquire() as connection:
            await connection.execute(f"select {SLEEP}")
        await flushed()

        assert pool.slow_queries == 0
    assert records.slow == []
