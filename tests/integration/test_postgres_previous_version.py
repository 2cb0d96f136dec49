"""Statements of the previous version on the schema of this one, as in a rolling update."""

from collections.abc import AsyncIterator

import pytest
from tests.contracts.ledgers import LONG_LEASE, draft
from tests.integration.postgres_clients import config_of, opened
from tests.servers.postgres import Database

from viralfx.adapters.postgres import PostgresDatabase, PostgresJobLedger
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


@pytest.fixture
async def pool(migrated_database: Database) -> AsyncIterator[PostgresDatabase]:
    """Return a pool on a database that is migrated."""
    async with opened(config_of(migrated_database)) as pool:
        yield pool


async def submit(ledger: PostgresJobLedger, unique: Unique) -> Accepted:
    """Submit a twin through this version."""
    (accepted,) = await ledger.accept([draft(unique=unique, unique_key="digest")])
    return accepted


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
