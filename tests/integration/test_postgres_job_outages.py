"""The job ledger while its server hangs, is gone, restarts, or knows of no jobs."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from tests.contracts.ledgers import ERROR, LONG, draft, later
from tests.integration.job_ledgers import NOBODY, QUICK, ledger_in, work
from tests.integration.postgres_clients import until
from tests.servers.postgres import Database, PostgresServer

from viralfx.adapters.postgres import PostgresJobLedger
from viralfx.domain.jobs.job import (
    Claim,
    LedgerUnavailableError,
    NotMigratedError,
    completed,
    retried,
)

CLEANING = 3.0
"""Seconds that a call may take longer: it lets go of its connection in that time."""


@pytest.fixture
def database(migrated_database: Database) -> Database:
    """Return a database with the tables of jobs."""
    return migrated_database


CALLS: dict[str, Callable[[PostgresJobLedger, Claim], Awaitable[object]]] = {
    "accept": lambda ledger, _: ledger.accept([draft()]),
    "claim": lambda ledger, _: ledger.claim("default", "w", 1),
    "claim by ids": lambda ledger, _: ledger.claim("default", "w", 1, [NOBODY]),
    "settle": lambda ledger, claim: ledger.settle([retried(claim, ERROR, 0.0)]),
    "effect": lambda ledger, claim: ledger.settle_with_effect(claim, _no_effect),
    "register": lambda ledger, _: ledger.register("w", ["default"], LONG, [NOBODY]),
    "leave": lambda ledger, _: ledger.leave("nobody"),
    "sweep": lambda ledger, _: ledger.sweep(5),
    "get": lambda ledger, _: ledger.get(NOBODY),
    "page": lambda ledger, _: ledger.page(),
    "find": lambda ledger, _: ledger.find("order-17"),
    "retry": lambda ledger, _: ledger.retry(NOBODY),
    "cancel": lambda ledger, _: ledger.cancel(NOBODY),
    "counts": lambda ledger, _: ledger.counts(),
    "prune": lambda ledger, _: ledger.prune(3600.0),
}


async def _no_effect(connection: Any) -> bytes:
    await connection.execute("select 1")
    return b"1"


async def test_every_call_says_that_the_server_hangs(own_postgres: PostgresServer) -> None:
    """In time, each of them; and it works again as soon as the server does."""
    async with ledger_in(own_postgres, patience=QUICK, pool_max=20) as ledger:
        claim = await work(ledger)
        own_postgres.freeze()
        try:
            async with asyncio.timeout(QUICK + CLEANING):
                said = await asyncio.gather(
                    *(call(ledger, claim) for call in CALLS.values()), return_exceptions=True
                )
        finally:
            own_postgres.thaw()
        assert [type(error) for error in said] == [LedgerUnavailableError] * len(CALLS)
        async with asyncio.timeout(10):
            await work(ledger, worker="after")


async def test_every_call_says_that_the_server_is_gone(own_postgres: PostgresServer) -> None:
    """Refused connections are tried again for as long as a restart takes, and not for ever."""
    async with ledger_in(own_postgres, patience=QUICK) as ledger:
        claim = await work(ledger)
        await asyncio.to_thread(own_postgres.kill)
        async with asyncio.timeout(QUICK + CLEANING):
            said = await asyncio.gather(
                *(call(ledger, claim) for call in CALLS.values()), return_exceptions=True
            )
        assert [type(error) for error in said] == [LedgerUnavailableError] * len(CALLS)
        await asyncio.to_thread(own_postgres.start)
        async with asyncio.timeout(10):
            await work(ledger, worker="after")
            assert await ledger.settle([completed(claim, b"1")]) == {claim.id}


async def test_a_restart_loses_nothing_that_was_accepted(own_postgres: PostgresServer) -> None:
    """Whatever was answered is there, whatever was not is there once or not at all."""
    accepted: list[str] = []
    over = asyncio.Event()

    async def keep_accepting(ledger: PostgresJobLedger) -> None:
        while not over.is_set():
            asked = draft()
            try:
                (answer,) = await ledger.accept([asked])
            except LedgerUnavailableError:
                continue
            assert answer.job.id == asked.id
            accepted.append(asked.id)

    async with ledger_in(own_postgres, pool_max=5) as ledger:
        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            for _ in range(4):
                group.create_task(keep_accepting(ledger))
            await until(lambda: len(accepted) > 20)
            await asyncio.to_thread(own_postgres.restart)
            before = len(accepted)
            await until(lambda: len(accepted) > before + 20)
            over.set()
        rows = own_postgres.execute("select id::text from viralfx_jobs")

    assert len(set(accepted)) == len(accepted)
    assert set(accepted) <= {job_id for (job_id,) in rows}


async def test_every_call_says_that_nobody_migrated(database: Database) -> None:
    """Which is another thing to do than to wait."""
    async with ledger_in(database) as ledger:
        claim = await work(ledger)
        database.execute("drop table viralfx_jobs, viralfx_workers, viralfx_job_counters")
        said = await asyncio.gather(
            *(call(ledger, claim) for call in CALLS.values()), return_exceptions=True
        )

    assert [type(error) for error in said] == [NotMigratedError] * len(CALLS)
    assert "viralfx migrate" in str(said[0])


async def test_a_sweep_that_waited_in_a_frozen_server_takes_no_job(
    own_postgres: PostgresServer,
) -> None:
    """Nobody could renew a lease meanwhile; the sweep is received when all of them are over."""
    lease = 1.0
    async with ledger_in(own_postgres, patience=10.0) as ledger:
        claim = await work(ledger)
        ends = await ledger.register("w", ["default"], lease)
        await ledger.sweep(5, ends)  # the driver knows the statement, and sends it in one piece
        own_postgres.freeze()
        try:
            sweeping = asyncio.create_task(ledger.sweep(5, ends))
            await until(lambda: datetime.now(UTC) > later(ends, lease))
        finally:
            own_postgres.thaw()
        swept = await sweeping
        await ledger.register("w", ["default"], LONG)

        assert (dict(swept.returned), list(swept.crashed)) == ({}, [])
        assert await ledger.settle([completed(claim, b"1")]) == {claim.id}
