"""Jobs accepted in a transaction of the caller."""

from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
from tests.contracts.ledgers import draft
from tests.integration.job_ledgers import work
from tests.integration.postgres_clients import config_of, opened
from tests.servers.postgres import Database

from viralfx.adapters.postgres import PostgresDatabase, PostgresJobLedger
from viralfx.domain.jobs.model import JobDraft


@pytest.fixture
def table(migrated_database: Database) -> Database:
    """Return a database with a table of unique numbers."""
    migrated_database.execute("create table effects (number int primary key)")
    return migrated_database


@pytest.fixture
async def pool(table: Database) -> AsyncIterator[PostgresDatabase]:
    """Return a pool on the database."""
    async with opened(config_of(table)) as pool:
        yield pool


def effects(database: Database) -> list[int]:
    """Return the numbers that were written."""
    return [number for (number,) in database.execute("select number from effects order by 1")]


async def test_jobs_commit_and_roll_back_with_the_transaction(
    pool: PostgresDatabase, table: Database
) -> None:
    """A business row and its job: both or none."""
    ledger = PostgresJobLedger(pool)
    kept, dropped = draft(key="kept"), draft(key="dropped")

    async def order(connection: Any, number: int, asked: JobDraft) -> None:
        await connection.execute("insert into effects values ($1)", number)
        (accepted,) = await ledger.accept_in(connection, [asked])
        assert accepted.created
        assert await ledger.get(asked.id) is None

    async def order_and_fail(connection: Any) -> None:
        await order(connection, 2, dropped)
        await connection.execute("insert into effects values (1)")

    await pool.execute_with_retry(lambda connection: order(connection, 1, kept))
    with pytest.raises(asyncpg.UniqueViolationError):
        await pool.execute_with_retry(order_and_fail)

    assert effects(table) == [1]
    assert await ledger.get(kept.id) is not None
    assert await ledger.get(dropped.id) is None


async def test_effect_may_accept_jobs(pool: PostgresDatabase, table: Database) -> None:
    """The next job exists only after this one is completed."""
    ledger = PostgresJobLedger(pool)
    claim = await work(ledger)
    following = draft(key="next")

    async def chain(connection: Any) -> bytes:
        (accepted,) = await ledger.accept_in(connection, [following])
        (again,) = await ledger.accept_in(connection, [draft(key="next")])
        assert (accepted.created, again.created) == (True, False)
        assert list(await ledger.claim("default", "w", 10)) == []
        return b"1"

    assert await ledger.settle_with_effect(claim, chain)
    (next_claim,) = await ledger.claim("default", "w", 10)

    assert next_claim.id == following.id
    assert effects(table) == []
