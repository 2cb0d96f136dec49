"""Fixtures with migrated databases."""

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from tests.servers.postgres import Database, PostgresServer


@pytest.fixture(scope="session")
def migrated_template(postgres: PostgresServer) -> str:
    """Return the name of a migrated template database; copying it is fast."""
    # Imported here: the adapter would delay every run that needs no database.
    from tests.integration.postgres_clients import config_of, migrated  # noqa: PLC0415

    template = Database(postgres, postgres.create_database())
    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, migrated(config_of(template))).result()
    return template.name


@pytest.fixture
def migrated_database(postgres: PostgresServer, migrated_template: str) -> Iterator[Database]:
    """Return an empty migrated database on the session's Postgres."""
    name = postgres.create_database(migrated_template)
    yield Database(postgres, name)
    postgres.drop_database(name)
