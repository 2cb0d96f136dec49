"""The audit trail in a database that lacks characters."""

from collections.abc import Iterator

import pytest
from tests.contracts.test_audit_store import event
from tests.integration.postgres_clients import config_of, migrated, opened
from tests.servers.postgres import Database

from viralfx.adapters.postgres import PostgresAuditStore


@pytest.fixture
def latin(database: Database) -> Iterator[Database]:
    """Return an empty database in LATIN1."""
    other = Database(database.server, f"{database.name}_latin")
    options = "encoding 'LATIN1' lc_collate 'C' lc_ctype 'C' template template0"
    database.execute(f"create database {other.name} {options}")
    yield other
    database.server.drop_database(other.name)


async def test_a_character_that_the_database_lacks_stops_no_event(latin: Database) -> None:
    """A client chose it, in the path of a refused request; it is an escape."""
    await migrated(config_of(latin))
    async with opened(config_of(latin)) as pool:
        store = PostgresAuditStore(pool)
        await store.write([event(target="/\u2603"), event(target="grün", detail=None)])
        await store.write([event(target="grün")])
        found = await store.read()

    assert [each.target for each in found] == ["grün", r"gr\xfcn", r"/\u2603"]
    assert found[1].detail is None
