"""Job ledgers in the databases of a test."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from tests.contracts.ledgers import LONG, draft
from tests.integration.postgres_clients import config_of, migrated, opened
from tests.servers.postgres import Database, PostgresServer

from viralfx.adapters.postgres import PostgresJobLedger
from viralfx.domain.jobs.job import Claim, completed

QUICK = 2.0
"""Seconds of patience for calls that are to fail."""
NOBODY = "00000000-0000-7000-8000-000000000000"


@asynccontextmanager
async def ledger_in(
    database: Database | PostgresServer, *, patience: float = 8.0, **config: Any
) -> AsyncIterator[PostgresJobLedger]:
    """Return a ledger in a database that is migrated, or in one that is it hereby."""
    if isinstance(database, PostgresServer):
        await migrated(config_of(database))
    async with opened(config_of(database, **config)) as pool:
        yield PostgresJobLedger(pool, patience=patience)


async def work(ledger: PostgresJobLedger, *, worker: str = "w") -> Claim:
    """Take a job from its acceptance to its end; return a claim on another.

    With that the driver knows every statement of this, and sends each in one piece.
    """
    await ledger.accept([draft(), draft()])
    await ledger.register(worker, ["default"], LONG)
    first, second = await ledger.claim("default", worker, 2)
    assert await ledger.settle([completed(first, b"1")]) == {first.id}
    return second
