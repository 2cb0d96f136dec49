"""Fixtures with databases that are migrated."""

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from tests.integration.postgres_clients import config_of, migrated
from tests.servers.postgres import Database, PostgresServer


@pytest.fixture(scope="session")
def migrated_template(postgres: PostgresServer) -> str:
    """Return the name of a database to copy: that is quicker than to migrate each."""
    template = Database(postgres, postgres.create_database())
    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, migrated(config_of(template))).result()
    return template.name


@pytest.fixture
def migrated_database(postgres: PostgresServer, migrated_template: str) -> Iterator[Database]:
    """Return an empty database with our tables on the Postgres of the whole run."""
    name = postgres.create_database(migrated_template)
    yield Database(postgres, name)
    postgres.drop_database(name)
