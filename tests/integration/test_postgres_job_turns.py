"""Effects that occupy the pool's connections for long, and the work that must continue."""

import asyncio
from contextlib import AsyncExitStack, suppress
from typing import Any

import asyncpg
import pytest
from tests.contracts.ledgers import LONG_LEASE, draft
from tests.integration.job_ledgers import work
from tests.integration.postgres_clients import config_of, opened, sessions
from tests.servers.postgres import Database
from tests.servers.waiting import until

from viralfx.core.errors import LedgerUnavailableError
from viralfx.jobs.model import JobState
from viralfx.jobs.postgres import PostgresJobLedger

QUICK = 1.5
"""Seconds; timeout for a slot that never becomes free."""
HEARTBEAT = "viralfx-heartbeat"


@pytest.fixture
def database(migrated_database: Database) -> Database:
    """Return a database with the tables of jobs."""
    return migrated_database


class Holding:
    """An effect that keeps its slot until it is released."""

    def __init__(self) -> None:
        self.begun = 0
        self.over = asyncio.Event()

    async def __call__(self, _: Any) -> bytes:
        """Hold it."""
        self.begun += 1
        await self.over.wait()
        return b"1"


async def test_lease_is_renewed_while_the_pool_is_exhausted(database: Database) -> None:
    """Over a dedicated connection, which is reopened after a loss."""
    lease = "select lease_until from viralfx_workers where worker = 'w'"
    async with opened(config_of(database, pool_max=2)) as pool, AsyncExitStack() as held:
        ledger = PostgresJobLedger(pool)
        await work(ledger)
        for _ in range(2):
            await held.enter_async_context(pool.acquire())
        before = database.execute(lease)
        async with asyncio.timeout(3):
            await ledger.register("w", ["default"], LONG_LEASE)
        renewed = database.execute(lease)
        (pid,) = sessions(database, HEARTBEAT)
        database.execute(f"select pg_terminate_backend({pid})")
        async with asyncio.timeout(3):
            await ledger.register("w", ["default"], LONG_LEASE, [])
            assert await ledger.deregister("w")
        (other,) = sessions(database, HEARTBEAT)
        assert pool.in_use == 2

    assert before < renewed
    assert pid != other
    await until(lambda: not sessions(database, HEARTBEAT))


async def test_only_a_worker_opens_the_dedicated_connection(database: Database) -> None:
    """It is closed with the database."""
    async with opened(config_of(database)) as pool:
        ledger = PostgresJobLedger(pool)
        await ledger.accept([draft()])
        assert not sessions(database, HEARTBEAT)
        await ledger.register("w", ["default"], LONG_LEASE)
        assert sessions(database, HEARTBEAT)
        await pool.close()
        await until(lambda: not sessions(database, HEARTBEAT))
        with pytest.raises(LedgerUnavailableError):
            await ledger.register("w", ["default"], LONG_LEASE)
        await until(lambda: not sessions(database, HEARTBEAT))


async def test_effect_without_a_slot_does_not_start(database: Database) -> None:
    """Its job can be deferred and claimed by another worker."""
    holding, later = Holding(), Holding()
    later.over.set()
    async with opened(config_of(database, pool_max=3)) as pool, asyncio.timeout(20):
        ledger = PostgresJobLedger(pool, timeout=QUICK)
        first, second = await work(ledger), await work(ledger)
        running = asyncio.create_task(ledger.settle_with_effect(first, holding))
        await until(lambda: holding.begun)
        with pytest.raises(LedgerUnavailableError, match="have all its connections"):
            await ledger.settle_with_effect(second, later)
        begun = later.begun
        holding.over.set()
        assert await running
        assert await ledger.settle_with_effect(second, later)

    assert (begun, later.begun) == (0, 1)


async def test_effect_that_ignores_its_cancellation_loses_its_slot(database: Database) -> None:
    """It also loses its connection, and its changes are rolled back."""
    said: list[Exception] = []
    begun, over, after = asyncio.Event(), asyncio.Event(), Holding()
    after.over.set()
    database.execute("create table effects (number int)")

    async def stubborn(connection: Any) -> bytes:
        await connection.execute("insert into effects values (1)")
        begun.set()
        while not over.is_set():
            with suppress(asyncio.CancelledError):
                await over.wait()
        try:
            await connection.execute("insert into effects values (2)")
        except asyncpg.InterfaceError as error:
            said.append(error)
        return b"1"

    # No minimum, or the pool would reopen the closed connection before the test sees it.
    config = config_of(database, pool_min=0, pool_max=1)
    async with opened(config) as pool, asyncio.timeout(20):
        ledger = PostgresJobLedger(pool, timeout=QUICK)
        first, second = await work(ledger), await work(ledger)
        ignoring = asyncio.create_task(ledger.settle_with_effect(first, stubborn))
        try:
            await begun.wait()
            ignoring.cancel()
            await until(lambda: not pool.total_connections)
            assert await ledger.settle_with_effect(second, after)
            assert not ignoring.done()
        finally:
            over.set()
        with pytest.raises(LedgerUnavailableError):
            await ignoring
        assert await ledger.settle_with_effect(first, after)

    assert len(said) == 1
    assert database.execute("select * from effects") == []


async def test_one_queue_cannot_use_all_slots(database: Database) -> None:
    """Of three slots, hanging tasks of one queue get two."""
    holding, other = Holding(), Holding()
    other.over.set()
    async with opened(config_of(database, pool_max=5)) as pool, asyncio.timeout(20):
        ledger = PostgresJobLedger(pool, timeout=QUICK)
        claims = [await work(ledger) for _ in range(3)]
        await ledger.accept([draft(queue="mail")])
        (mail,) = await ledger.claim("mail", "w", 1)
        calls = [asyncio.create_task(ledger.settle_with_effect(each, holding)) for each in claims]
        await until(lambda: any(call.done() for call in calls))
        begun = holding.begun
        assert await ledger.settle_with_effect(mail, other)
        holding.over.set()
        ended = await asyncio.gather(*calls, return_exceptions=True)
        job = await ledger.get(mail.id)

    assert begun == 2
    assert [type(each) for each in ended] == [bool, bool, LedgerUnavailableError]
    assert job is not None
    assert job.state is JobState.COMPLETED
