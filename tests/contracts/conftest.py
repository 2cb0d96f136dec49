"""Gives the contract suites of jobs each adapter in turn."""

from collections.abc import AsyncIterator

import pytest
from tests.contracts.ledgers import LEDGERS, Kept, Make
from tests.contracts.transports import TRANSPORTS, Line
from tests.contracts.transports import Make as MakeLine
from tests.servers.postgres import Database, PostgresServer

from viralfx.domain.jobs.ledger import JobLedger


@pytest.fixture(scope="session")
def ledger_database(postgres: PostgresServer, migrated_template: str) -> Database:
    """Return the database that all tests of the ledger in Postgres share: emptied is cheap."""
    database = Database(postgres, postgres.create_database(migrated_template))
    database.execute("create table effects (id serial, text text)")
    return database


@pytest.fixture(params=list(LEDGERS.values()), ids=list(LEDGERS))
async def kept(request: pytest.FixtureRequest) -> AsyncIterator[Kept]:
    """Return each ledger in turn, empty, with what tests need besides."""
    make: Make = request.param
    async with make(request) as kept:
        yield kept


@pytest.fixture
def ledger(kept: Kept) -> JobLedger:
    """Return the ledger of :func:`kept`."""
    return kept.ledger


@pytest.fixture(params=list(TRANSPORTS.values()), ids=list(TRANSPORTS))
async def line(request: pytest.FixtureRequest) -> AsyncIterator[Line]:
    """Return each transport in turn, with nothing on its way."""
    make: MakeLine = request.param
    async with make(request) as line:
        yield line
