"""Statements of the previous version on the schema of this one, as in a rolling update."""

from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
from alembic.config import Config
from alembic.runtime.environment import EnvironmentContext
from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool
from tests.contracts.ledgers import LONG_LEASE, draft
from tests.integration.postgres_clients import config_of, opened
from tests.servers.postgres import Database

from viralfx.adapters.postgres import PostgresDatabase, PostgresJobLedger
from viralfx.adapters.postgres.migrate import apply_migrations, scripts
from viralfx.adapters.postgres.migrations import VERSION_TABLE
from viralfx.domain.jobs.ledger import Accepted
from viralfx.domain.jobs.model import JobState, Unique

CLAIM = """
with chosen as materialized (
    select id from viralfx_jobs
    where state = 'waiting' and queue = 'default' and run_at <= statement_timestamp()
    order by run_at, id
    limit 50
    for update skip locked
)
update viralfx_jobs as job
set state = 'active', worker = 'old', receipt = 1, claims = claims + 1,
    started_at = statement_timestamp()
from chosen
where job.id = chosen.id
returning job.id::text
"""
HAND_BACK = "update viralfx_jobs set state = 'waiting', worker = null where worker = 'old'"
FAIL = """
update viralfx_jobs
set state = 'failed', worker = null, error_code = 'error', attempts = attempts + 1,
    finished_at = statement_timestamp()
where worker = 'old'
"""
SWEEP = """
update viralfx_jobs
set state = 'failed', worker = null, crashes = crashes + 1, error_code = 'crashed',
    finished_at = statement_timestamp()
where worker = 'old'
"""
EXPIRE = """
update viralfx_jobs
set state = 'failed', finished_at = statement_timestamp(), error_code = 'unknown_task'
where state = 'waiting'
"""


ACCEPT = """
select id from viralfx_accept_jobs(
    array[$1::uuid], array['default'], array['task'], array['{}'::json], array[$2],
    array[null]::text[], array[null]::text[], array[null]::timestamptz[], 60::float8,
    null::integer[], null::text[], null::boolean[], null::text[], null::text[]
)
"""
CLAIM_FUNCTION = """
select (claimed).id, (claimed).payload from viralfx_claim_jobs(
    $1, 'w', 10, 1, null, true, '{}', '{}', '{}', '{}', '{}'
)
"""
LIST = "select state, worker from viralfx_all_jobs where id = $1"
COMPLETE = """
with taken as (
    delete from viralfx_jobs as job where id = $1 and state = 'active'
    returning job.id, job.queue, job.task, job.payload, job.created_at, job.run_at,
        statement_timestamp(), 'completed'
), moved as (
    insert into viralfx_finished_jobs (
        id, queue, task, payload, created_at, run_at, finished_at, state
    ) select * from taken returning id
)
select id from moved
"""
DECLARE = """
insert into viralfx_schedules as known (task, cron, timezone, since, seen_at)
values ('hour', '0 * * * *', 'UTC', statement_timestamp(), statement_timestamp())
on conflict (task) do update set seen_at = excluded.seen_at
returning task
"""
ADVANCE = """
update viralfx_schedules set last_run_at = statement_timestamp()
where task = 'hour' and (last_run_at is null or last_run_at < statement_timestamp())
returning true
"""
SCHEMA = """
select pg_get_functiondef(oid) from pg_proc
where pronamespace = 'viralfx_ops'::regnamespace
union all select pg_get_viewdef('viralfx_ops.viralfx_all_jobs'::regclass)
union all select format('%s %s %s', attrelid::regclass, attname, atttypid::regtype)
    from pg_attribute join pg_class on attrelid = pg_class.oid
    where relnamespace = 'viralfx_ops'::regnamespace and attnum > 0 and not attisdropped
order by 1
"""


@pytest.fixture
async def pool(migrated_database: Database) -> AsyncIterator[PostgresDatabase]:
    """Return a pool on a database that is migrated."""
    async with opened(config_of(migrated_database)) as pool:
        yield pool


async def submit(ledger: PostgresJobLedger, unique: Unique) -> Accepted:
    """Submit a twin through this version."""
    (accepted,) = await ledger.accept([draft(unique=unique, unique_key="digest")])
    return accepted


async def test_a_process_of_it_goes_on_while_the_schema_is_migrated(database: Database) -> None:
    """On a connection that has run its statements: it accepts, claims, lists and completes."""
    config = config_of(database)
    await apply_migrations(config, target="0005")
    old = await asyncpg.connect(database.url, server_settings={"search_path": "viralfx_ops"})
    found: list[tuple[Any, ...]] = []
    for _ in range(2):
        accepted = await old.fetchval(ACCEPT, draft().id, "once")
        again = await old.fetchval(ACCEPT, draft().id, "once")
        claimed = await old.fetch(CLAIM_FUNCTION, "default")
        (row,) = await old.fetch(LIST, accepted)
        moved = await old.fetchval(COMPLETE, accepted)
        scheduled = [await old.fetchval(each) for each in (DECLARE, ADVANCE)]
        found.append((again, [each["id"] for each in claimed], tuple(row), moved, scheduled))
        await old.execute("delete from viralfx_finished_jobs")
        applied = await apply_migrations(config)
        assert [revision for revision, _ in applied] == (
            ["0006", "0007"] if len(found) == 1 else []
        )
    await old.close()

    for again, claimed_ids, listed, moved, scheduled in found:
        assert (again, claimed_ids, listed) == (None, [moved, None], ("active", "w"))
        assert scheduled == ["hour", True]


async def test_it_runs_a_paused_schedule(
    migrated_database: Database, pool: PostgresDatabase
) -> None:
    """It knows no pauses; the schedule stays paused for the others."""
    ledger = PostgresJobLedger(pool)
    migrated_database.execute(DECLARE)
    await ledger.pause_schedule("hour")
    advanced = migrated_database.execute(ADVANCE)
    (state,) = await ledger.schedules()

    assert advanced == [(True,)]
    assert state.paused_at is not None


async def test_the_schema_of_it_can_be_restored(database: Database) -> None:
    """Functions, view and columns are those of its migrations; later ones can be made again."""
    config = config_of(database)
    await apply_migrations(config, target="0005")
    before = database.execute(SCHEMA)
    await apply_migrations(config)
    after = database.execute(SCHEMA)
    engine = create_async_engine(
        database.url.replace("postgresql:", "postgresql+asyncpg:"), poolclass=NullPool
    )
    async with engine.begin() as connection:
        await connection.run_sync(restore)
    await engine.dispose()

    assert database.execute(SCHEMA) == before != after
    await apply_migrations(config)
    assert database.execute(SCHEMA) == after


def restore(connection: Connection) -> None:
    """Downgrade the schema to the migrations of the version before."""
    directory = scripts()

    def steps(revision: Any, _: object) -> Any:
        return directory._downgrade_revs("0005", revision)

    with EnvironmentContext(Config(), directory, fn=steps) as environment:
        environment.configure(
            connection=connection, version_table=VERSION_TABLE, version_table_schema="viralfx_ops"
        )
        environment.run_migrations()


@pytest.mark.parametrize("end", [(CLAIM, FAIL), (CLAIM, SWEEP), (EXPIRE,)])
async def test_a_job_that_it_fails_keeps_no_twin_away(
    migrated_database: Database, pool: PostgresDatabase, end: tuple[str, ...]
) -> None:
    """It knows no unique jobs, and so sets no column of theirs; a retry is not unique."""
    ledger = PostgresJobLedger(pool)
    first = await submit(ledger, Unique.UNFINISHED)
    for statement in (CLAIM, HAND_BACK):
        migrated_database.execute(statement)
    twins = [await submit(ledger, Unique.UNFINISHED) for _ in range(2)]
    for statement in end:
        migrated_database.execute(statement)
    after = await submit(ledger, Unique.UNFINISHED)
    retried = await ledger.retry(first.job.id)

    assert [(twin.created, twin.job.id) for twin in twins] == [(False, first.job.id)] * 2
    assert after.created
    assert retried.state is JobState.WAITING


async def test_its_claim_frees_a_job_that_is_unique_while_it_waits(
    migrated_database: Database, pool: PostgresDatabase
) -> None:
    """A change that is submitted while the job runs is not lost."""
    ledger = PostgresJobLedger(pool)
    first = await submit(ledger, Unique.WAITING)
    claimed = migrated_database.execute(CLAIM)
    second = await submit(ledger, Unique.WAITING)
    migrated_database.execute(HAND_BACK)
    third = await submit(ledger, Unique.WAITING)
    await ledger.register("new", ["default"], LONG_LEASE)
    claims = await ledger.claim("default", "new", 5)

    assert claimed == [(first.job.id,)]
    assert (second.created, third.created) == (True, False)
    assert third.job.id == second.job.id
    assert {claim.id for claim in claims} == {first.job.id, second.job.id}


async def test_a_job_that_it_hands_back_is_cancelled_if_that_was_requested(
    migrated_database: Database, pool: PostgresDatabase
) -> None:
    """The next sweep finds the job, although it waits."""
    ledger = PostgresJobLedger(pool)
    (accepted,) = await ledger.accept([draft()])
    migrated_database.execute(CLAIM)
    await ledger.cancel(accepted.job.id, running=True)
    migrated_database.execute(HAND_BACK)
    swept = await ledger.sweep(5)
    job = await ledger.get(accepted.job.id)
    counts = (await ledger.counts())["default"]

    assert list(swept.cancelled) == [accepted.job.id]
    assert job is not None
    assert job.state is JobState.CANCELLED
    assert (counts.waiting, counts.active, counts.cancelled) == (0, 0, 1)
