"""A release of asyncpg without the private parts that the adapter uses: it works by the others."""

import asyncio
import logging
from collections.abc import Iterator
from typing import Any

import asyncpg
import pytest
from asyncpg import connect_utils
from asyncpg.transaction import Transaction, TransactionState
from tests.integration.postgres_clients import active, ask, changed, config_of, opened
from tests.servers.postgres import Database
from tests.servers.waiting import until

from viralfx.postgres import Connector
from viralfx.postgres.servers import CANCELS, TRANSACTIONS, missing_abilities

WARNING = "asyncpg lacks parts that the database adapter uses"


@pytest.fixture(autouse=True)
def _asked_again() -> Iterator[None]:
    """Let the process ask again what the driver lacks."""
    missing_abilities.cache_clear()
    yield
    missing_abilities.cache_clear()


async def _send(transaction: Any, statement: str, state: TransactionState) -> None:
    connection = transaction._connection
    connection._top_xact = transaction if state is TransactionState.STARTED else None
    await connection._protocol.query(statement, 5.0)
    transaction._state = state


async def _start(self: Any) -> None:
    await _send(self, "BEGIN;", TransactionState.STARTED)


async def _commit(self: Any) -> None:
    await _send(self, "COMMIT;", TransactionState.COMMITTED)


@pytest.fixture
def own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the driver begin and end transactions without ``Connection.execute``."""
    monkeypatch.setattr(Transaction, "start", _start)
    monkeypatch.setattr(Transaction, "_Transaction__commit", _commit)


def test_a_missing_part_is_named_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, own_way: None
) -> None:
    """With what does not work without it; the release of the lock lacks nothing."""
    del own_way
    assert missing_abilities() == {TRANSACTIONS}
    missing_abilities.cache_clear()
    caplog.clear()
    monkeypatch.delattr(connect_utils, "_cancel")
    monkeypatch.delattr(asyncpg.Connection, "_introspect_types")
    for _ in range(2):
        assert missing_abilities() == {CANCELS, TRANSACTIONS, "look up types in one transaction"}

    (record,) = caplog.records
    assert (record.message, record.levelno) == (WARNING, logging.WARNING)
    assert vars(record)["lacking"] == (
        "connect_utils._cancel, Transaction over Connection.execute, Connection._introspect_types"
    )


def test_the_release_of_the_lock_lacks_nothing() -> None:
    """A new release that does is found by `just newest`."""
    assert missing_abilities() == frozenset()


async def test_without_the_cancel_request_the_server_finds_out(
    database: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A cancelled caller returns at once, its statement ends, and the pool serves the next one."""
    monkeypatch.delattr(connect_utils, "_cancel")
    async with opened(config_of(database)) as pool:
        sleeping = asyncio.ensure_future(ask(pool, "select pg_sleep(600)"))
        await until(lambda: active(database))
        sleeping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sleeping
        await until(lambda: not active(database))
        assert await pool.execute_with_retry(lambda each: each.fetchval("select 42")) == 42

    assert [record.message for record in caplog.records].count(WARNING) == 1


async def test_a_transaction_that_the_driver_sends_itself_is_limited_and_checked(
    database: Database, own_way: None
) -> None:
    """Behind a pooler its settings are those of the adapter, and a failed one is not committed."""
    del own_way
    config = changed(config_of(database), pooler="transaction", statement_timeout=7.0)
    connection = await Connector(config).connect()
    try:
        async with connection.transaction():
            assert await connection.fetchval("show statement_timeout") == "7s"
            async with connection.transaction():
                assert await connection.fetchval("select 1") == 1
        assert await connection.fetchval("show statement_timeout") == "0"
        transaction = connection.transaction()
        await transaction.start()
        with pytest.raises(asyncpg.DivisionByZeroError):
            await connection.execute("select 1 / 0")
        with pytest.raises(asyncpg.InFailedSQLTransactionError):
            await transaction.commit()
        await transaction.rollback()
    finally:
        await connection.close()
    async with opened(config_of(database)) as pool:
        assert await pool.execute_with_retry(lambda each: each.fetchval("select 42")) == 42
