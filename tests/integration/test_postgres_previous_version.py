"""Statements of the previous version on the schema of this one, as in a rolling update."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from tests.contracts.ledgers import LONG_LEASE, draft
from tests.integration.postgres_clients import config_of, opened
from tests.servers.postgres import Database

from viralfx.jobs.ledger import Accepted
from viralfx.jobs.model import JobState, Unique
from viralfx.jobs.postgres import PostgresJobLedger
from viralfx.postgres import PostgresDatabase
from viralfx.postgres.migrate import FOLDER, apply_migrations, file_of, statements_of
from viralfx.postgres.migrations import REVISIONS

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
select pg_get_functiondef(oid) from pg_proc where pronamespace = 'viralfx_ops'::regnamespace
union all select format('%s %s %s %s', oid::regclass, relkind, reloptions,
    case relkind when 'v' then pg_get_viewdef(oid) when 'i' then pg_get_indexdef(oid) end)
    from pg_class where relnamespace = 'viralfx_ops'::regnamespace
union all select format('%s %s %s %s %s %s', attrelid::regclass, row_number() over (
        partition by attrelid order by attnum
    ), attname, format_type(atttypid, atttypmod), attnotnull, pg_get_expr(adbin, adrelid))
    from pg_class join pg_attribute on attrelid = pg_class.oid
    left join pg_attrdef on (adrelid, adnum) = (attrelid, attnum)
    where relnamespace = 'viralfx_ops'::regnamespace and attnum > 0 and not attisdropped
union all select format('%s %s %s', conrelid::regclass, conname, pg_get_constraintdef(oid))
    from pg_constraint where connamespace = 'viralfx_ops'::regnamespace
union all select pg_get_triggerdef(pg_trigger.oid)
    from pg_trigger join pg_class on tgrelid = pg_class.oid
    where relnamespace = 'viralfx_ops'::regnamespace
union all select version_num from viralfx_migrations
order by 1
"""
"""The objects of the schema, without the places that dropped columns leave, and its version."""
RELEASED = Path(__file__).with_name("schema_0_2_0.sql")


async def run(database: Database, statements: str) -> None:
    """Run several statements as one transaction."""
    connection = await asyncpg.connect(database.url)
    try:
        await connection.execute(statements)
    finally:
        await connection.close()


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


async def test_each_migration_can_be_taken_back(database: Database) -> None:
    """The files below `down` leave the schema as it was, and all can be applied again."""
    config = config_of(database)
    forth: list[list[tuple[Any, ...]]] = []
    for revision in REVISIONS:
        await apply_migrations(config, target=revision)
        forth.append(database.execute(SCHEMA))
    back = [forth[-1]]
    for before, at in zip(REVISIONS[-2::-1], REVISIONS[:0:-1], strict=True):
        await run(database, statements_of(FOLDER / "down" / file_of(at).name, "viralfx_ops"))
        database.execute(f"update viralfx_migrations set version_num = '{before}'")  # noqa: S608 - a constant
        back.append(database.execute(SCHEMA))
    await apply_migrations(config)

    assert back[::-1] == forth
    assert len({str(found) for found in forth}) == len(REVISIONS)
    assert database.execute(SCHEMA) == forth[-1]


async def test_a_database_of_0_2_0_is_upgraded_in_place(
    database: Database, migrated_database: Database
) -> None:
    """Its jobs stay, and its schema becomes that of a new database."""
    await run(database, RELEASED.read_text(encoding="utf-8"))
    ((job,),) = database.execute("select enqueue('task', '{}')")
    released = database.execute(SCHEMA)
    applied = await apply_migrations(config_of(database))

    assert [revision for revision, _ in applied] == list(REVISIONS[REVISIONS.index("0006") + 1 :])
    assert database.execute("select id from viralfx_all_jobs") == [(job,)]
    assert database.execute(SCHEMA) == migrated_database.execute(SCHEMA) != released


async def test_its_schema_is_that_of_its_migrations(
    database: Database, migrated_database: Database
) -> None:
    """The files up to its last one make it, so it finds there the objects that it needs."""
    await run(migrated_database, "drop schema viralfx_ops cascade")
    await run(migrated_database, RELEASED.read_text(encoding="utf-8"))
    await apply_migrations(config_of(database), target="0006")

    assert database.execute(SCHEMA) == migrated_database.execute(SCHEMA)


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
