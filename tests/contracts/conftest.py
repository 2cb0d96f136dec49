"""Runs the contract suites of jobs against each adapter."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from _pytest.mark import ParameterSet
from tests.contracts.ledgers import LEDGERS, LedgerCase, Make, Pools, open_pools
from tests.contracts.notifiers import BROADCASTING, NOTIFIERS, SHARING, NotifierPair
from tests.contracts.notifiers import Make as MakePair
from tests.servers.postgres import Database, PostgresServer

from viralfx.jobs.ledger import JobLedger


@pytest.fixture(scope="session")
def ledger_database(postgres: PostgresServer, migrated_template: str) -> Database:
    """Return the database that all tests of the Postgres ledger share: emptying it is cheap."""
    database = Database(postgres, postgres.create_database(migrated_template))
    database.execute("create table effects (id serial, text text)")
    return database


def _parameters() -> list[ParameterSet]:
    # ``.ci/soak`` repeats tests by their mark: the ledger behind each pooler, and nothing else.
    marks = {name: [pytest.mark.soak] * name.startswith("pgbouncer") for name in LEDGERS}
    return [pytest.param(make, id=name, marks=marks[name]) for name, make in LEDGERS.items()]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the tests of ledgers in the loop of their pools, one for each file."""
    for item in items:
        if "ledger_pools" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.asyncio(loop_scope="module"), append=False)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def ledger_pools() -> AsyncIterator[Pools]:
    """Return the pools that the tests of one file share."""
    async with open_pools() as pools:
        yield pools


@pytest_asyncio.fixture(params=_parameters(), loop_scope="module")
async def case(request: pytest.FixtureRequest, ledger_pools: Pools) -> LedgerCase:
    """Return each ledger, empty, with the operations that tests need."""
    make: Make = request.param
    return await make(request, ledger_pools)


@pytest.fixture
def ledger(case: LedgerCase) -> JobLedger:
    """Return the ledger of :func:`case`."""
    return case.ledger


@pytest.fixture(params=list(NOTIFIERS.values()), ids=list(NOTIFIERS))
async def pair(request: pytest.FixtureRequest) -> AsyncIterator[NotifierPair]:
    """Return two instances of each notifier, without pending notifications."""
    make: MakePair = request.param
    async with make(request) as pair:
        yield pair


@pytest.fixture(params=list(SHARING.values()), ids=list(SHARING))
async def sharing_pair(request: pytest.FixtureRequest) -> AsyncIterator[NotifierPair]:
    """Return two instances of each notifier whose listeners share the notifications."""
    make: MakePair = request.param
    async with make(request) as pair:
        yield pair


@pytest.fixture(params=list(BROADCASTING.values()), ids=list(BROADCASTING))
async def broadcasting_pair(request: pytest.FixtureRequest) -> AsyncIterator[NotifierPair]:
    """Return two instances of each notifier whose listeners receive each notification."""
    make: MakePair = request.param
    async with make(request) as pair:
        yield pair
