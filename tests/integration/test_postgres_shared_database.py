"""The program's schema in a database that an application and its migrations use, too."""

import re
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from alembic.autogenerate import produce_migrations
from alembic.migration import MigrationContext
from alembic.operations.ops import DropTableOp, MigrateOperation
from sqlalchemy import Column, Integer, MetaData, Table
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool
from tests.contracts.ledgers import LONG_LEASE, draft
from tests.integration.job_ledgers import work
from tests.integration.postgres_clients import changed, config_of, migrated, opened
from tests.servers.postgres import Database

from viralfx.adapters.postgres import PostgresStateStore
from viralfx.adapters.postgres.doctor import PostgresDoctor
from viralfx.domain.doctor import Verdict
from viralfx.domain.operations import SavedState
from viralfx.jobs.postgres import PostgresJobLedger
from viralfx.jobs.postgres.ledger_sql import SWEEP
from viralfx.postgres.migrations import REVISIONS, qualified

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "postgres.md"
ROLE = DOCS.parent / "deploy/postgres/service-role.sql"
ORDERS = MetaData()
Table("orders", ORDERS, Column("id", Integer, primary_key=True))
SCHEMAS = ("first", "second")
STATE = SavedState(saved_at=datetime(2026, 1, 1, tzinfo=UTC), starts=1, uptime=1.0, health="pass")
Filter = Callable[[str | None, str, dict[str, Any]], bool]


def documented_filters() -> Sequence[Filter]:
    """Return the functions of the page, in order."""
    paragraph = PAGE.read_text(encoding="utf-8").partition("## Share a database with Alembic")[2]
    found: list[Filter] = []
    for block in re.findall(r"```python\n(.*?)```", paragraph, re.DOTALL):
        names: dict[str, Any] = {}
        exec(block, names)  # noqa: S102 - the text of this repository
        found.append(names["include_name"])
    return found


async def differences(database: Database, **options: Any) -> list[MigrateOperation]:
    """Return what a revision would do that the application's Alembic generates."""
    engine = create_async_engine(
        database.url.replace("postgresql:", "postgresql+asyncpg:"), poolclass=NullPool
    )
    async with engine.connect() as connection:

        def compare(sync: Any) -> list[MigrateOperation]:
            context = MigrationContext.configure(sync, opts=options)
            revision = produce_migrations(context, ORDERS)
            assert revision.upgrade_ops is not None
            return list(revision.upgrade_ops.ops)

        found = await connection.run_sync(compare)
    await engine.dispose()
    return found


@pytest.fixture
def shared(migrated_database: Database) -> Database:
    """Return a migrated database with the table of an application."""
    migrated_database.execute("create table public.orders (id int primary key)")
    return migrated_database


async def test_alembic_of_the_application_ignores_the_tables(shared: Database) -> None:
    """By default it compares the schema of the application alone."""
    assert await differences(shared) == []


async def test_alembic_with_all_schemas_needs_the_filter(shared: Database) -> None:
    """The documented one; without it the revision would drop all jobs."""
    dropped = await differences(shared, include_schemas=True)
    tables = {op.table_name for op in dropped if isinstance(op, DropTableOp)}
    assert {"viralfx_jobs", "viralfx_migrations"} <= tables

    by_schema, _ = documented_filters()
    assert await differences(shared, include_schemas=True, include_name=by_schema) == []


async def test_alembic_beside_tables_in_its_own_schema(database: Database) -> None:
    """With ``DB_SCHEMA=public`` the other documented filter is needed."""
    database.execute("create table public.orders (id int primary key)")
    await migrated(config_of(database, schema="public"))
    assert await differences(database)

    _, by_table = documented_filters()
    assert await differences(database, include_name=by_table) == []


async def test_everything_is_in_the_schema(database: Database) -> None:
    """Tables, the view, indexes, functions and types; no search path leads a function astray."""
    await migrated(config_of(database))
    everywhere = """
        select distinct namespace::regnamespace::text from (
            select relname, relnamespace from pg_class
            union all select proname, pronamespace from pg_proc
            union all select typname, typnamespace from pg_type
        ) as objects (name, namespace) where name ~ '^_?viralfx'
    """
    assert database.execute(everywhere) == [("viralfx_ops",)]
    settings = """
        select distinct unnest(proconfig) from pg_proc
        where pronamespace = 'viralfx_ops'::regnamespace
    """
    paths = {name for (name,) in database.execute(settings) if "search_path" in name}
    assert paths == {"search_path=pg_catalog, pg_temp"}


async def test_roles_with_the_name_of_a_schema(database: Database) -> None:
    """A role that has a schema of its name first in its search path uses the same tables."""
    role = "viralfx_ops"
    config = await migrated(config_of(database))
    database.execute("create schema viralfx")
    database.execute("create table viralfx.viralfx_jobs (number int)")
    database.execute(f"create role {role} login superuser password 'planted'")
    try:
        async with opened(config_of(database, user=role, password="planted")) as other:
            await PostgresJobLedger(other).accept([draft()])
        async with opened(config) as own:
            assert (await PostgresJobLedger(own).counts())["default"].waiting == 1
    finally:
        database.execute(f"drop role {role}")


async def test_ledgers_in_two_schemas_are_independent(database: Database) -> None:
    """Each has jobs, workers, migrations and a sweep of its own."""
    async with AsyncExitStack() as stack:
        pools = []
        for schema in SCHEMAS:
            config = await migrated(config_of(database, schema=schema))
            pools.append(await stack.enter_async_context(opened(config)))
        first, second = ledgers = [PostgresJobLedger(pool) for pool in pools]
        await first.accept([draft(key="same")])
        (accepted,) = await second.accept([draft(key="same")])
        assert accepted.created
        await first.register("w", ["default"], LONG_LEASE)
        counts = [(await ledger.counts())["default"] for ledger in ledgers]
        assert [(each.waiting, each.consumers) for each in counts] == [(1, 1), (1, 0)]
        await second.register("gone", ["default"], 0.0)
        async with pools[0].acquire() as connection, connection.transaction():
            # The first ledger sweeps, and does not end.
            await connection.fetch(qualified(SWEEP, "first"), 5, None, 100, None)
            await second.sweep(5)
    workers = "select worker from {}.viralfx_workers"
    assert database.execute(workers.format("second")) == []
    revision = "select version_num from {}.viralfx_migrations"
    assert {database.execute(revision.format(each))[0] for each in SCHEMAS} == {(REVISIONS[-1],)}


async def test_documented_rights_are_enough(database: Database) -> None:
    """For a service whose user did not migrate: no finding of the doctor, and jobs run."""
    config = await migrated(config_of(database))
    role = f"{database.name}_service"
    database.execute(f"create role {role} login password 'planted'")
    try:
        (block,) = re.findall(r"```sql\n(GRANT .*?)```", PAGE.read_text("utf-8"), re.DOTALL)
        for statement in block.replace(" service;", f" {role};").splitlines():
            database.execute(statement)
        limited = changed(config, user=role, password="planted")
        async with opened(limited) as pool:
            ledger = PostgresJobLedger(pool)
            await work(ledger)
            await ledger.sweep(5)
            store = PostgresStateStore(pool, "pod")
            await store.save(STATE)
            assert await store.load() == STATE
        findings = await PostgresDoctor(limited, production=True).check()
        assert [each for each in findings if each.verdict is Verdict.FAIL] == []
    finally:
        database.execute(f"drop owned by {role}")
        database.execute(f"drop role {role}")


async def test_the_role_of_the_service_changes_no_table(database: Database) -> None:
    """With deploy/postgres/service-role.sql before the migration: jobs run, and tables stay."""
    role = f"{database.name}_service"
    script = ROLE.read_text("utf-8").replace("viralfx_service", f'"{role}"')
    script = script.replace(f"rolname = '\"{role}\"'", f"rolname = '{role}'")
    try:
        owner = await asyncpg.connect(database.url)
        for _again in range(2):
            await owner.execute(script)
        await owner.close()
        config = await migrated(config_of(database))
        database.execute(f"alter role \"{role}\" password 'planted'")
        limited = changed(config, user=role, password="planted")
        async with opened(limited) as pool:
            ledger = PostgresJobLedger(pool)
            await work(ledger)
            await ledger.sweep(5)
            store = PostgresStateStore(pool, "pod")
            await store.save(STATE)
            assert await store.load() == STATE
            for statement in FORBIDDEN:
                async with pool.acquire() as connection:
                    with pytest.raises(asyncpg.InsufficientPrivilegeError):
                        await connection.execute(statement)
        findings = await PostgresDoctor(limited, production=True).check()
        assert [each for each in findings if each.verdict is not Verdict.PASS] == []
    finally:
        database.execute(f'drop owned by "{role}"')
        database.execute(f'drop role "{role}"')


FORBIDDEN = (
    "drop table viralfx_ops.viralfx_jobs cascade",
    "truncate viralfx_ops.viralfx_state",
    "alter table viralfx_ops.viralfx_jobs add column more int",
    "alter table viralfx_ops.viralfx_jobs disable trigger user",
    "create table viralfx_ops.more (number int)",
    "drop function viralfx_ops.viralfx_claim_jobs",
    "drop schema viralfx_ops cascade",
    "create schema more",
    "create role more",
    "select pg_read_file('PG_VERSION')",
)


async def test_documented_call_from_sql(migrated_database: Database) -> None:
    """It submits a job once, and returns its id again."""
    paragraph = (DOCS / "jobs.md").read_text("utf-8").partition("## Jobs from SQL")[2]
    call = paragraph.partition("```sql\n")[2].partition("```")[0]
    async with opened(config_of(migrated_database)) as pool:
        async with pool.acquire() as connection:
            ids = [str(await connection.fetchval(call)) for _ in range(2)]
        ledger = PostgresJobLedger(pool)
        claims = await ledger.claim("notifications", "w", 10)
    assert [(claim.task, claim.payload) for claim in claims] == [("greet", b'{"name": "Ada"}')]
    assert ids == [claims[0].id] * 2
