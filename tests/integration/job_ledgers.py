"""Job ledgers in the databases of a test."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from tests.contracts.ledgers import LONG_LEASE, draft
from tests.integration.postgres_clients import config_of, migrated, opened
from tests.servers.postgres import Database, PostgresServer

from viralfx.jobs.model import Claim, completed
from viralfx.jobs.postgres import PostgresJobLedger

QUICK = 2.0
"""Seconds; timeout of ledger calls that are expected to fail."""
NO_WORKER = "00000000-0000-7000-8000-000000000000"


@asynccontextmanager
async def ledger_in(
    database: Database | PostgresServer, *, call_timeout: float = 8.0, **config: Any
) -> AsyncIterator[PostgresJobLedger]:
    """Open a ledger in a migrated database; a plain server is migrated first."""
    if isinstance(database, PostgresServer):
        await migrated(config_of(database))
    async with opened(config_of(database, **config)) as pool:
        yield PostgresJobLedger(pool, timeout=call_timeout)


async def work(ledger: PostgresJobLedger, *, worker: str = "w") -> Claim:
    """Run a job from acceptance to completion; return a claim on another one.

    After that the driver has prepared all statements and sends each in one message.
    """
    await ledger.accept([draft(), draft()])
    await ledger.register(worker, ["default"], LONG_LEASE)
    first, second = await ledger.claim("default", worker, 2)
    assert await ledger.settle([completed(first, b"1")]) == {first.id}
    return second
