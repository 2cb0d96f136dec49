"""Changes of many jobs in Postgres: no lock is waited for, and no job is lost or changed twice."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import pytest
from tests.contracts.ledgers import LONG_LEASE, draft, later
from tests.integration.job_ledgers import ledger_in
from tests.integration.postgres_clients import config_of, opened
from tests.servers.postgres import Database
from tests.soak import SOAK

from viralfx.jobs.ledger import QueueCounts
from viralfx.jobs.model import JobFilter, JobState, completed
from viralfx.jobs.postgres import PostgresJobLedger
from viralfx.postgres import PostgresDatabase

JOBS = 100_000 if SOAK else 9_000
"""More than two steps."""
FILL = """
insert into viralfx_ops.viralfx_jobs
    (id, queue, task, payload, created_at, run_at, finished_at, state, attempts, claims,
    error_code, error_message)
select (lpad(to_hex(n), 12, '0') || '70008000' || lpad(to_hex(n), 12, '0'))::uuid,
    (array['default', 'analytics'])[1 + n % 2], (array['ship', 'bill', 'ship'])[1 + n % 3],
    '{{}}', now(), now(), now(), 'failed', 1, 1, 'error', 'planted'
from generate_series(1, {jobs}) as n
"""
STATES = """
select task, state, count(*) from viralfx_ops.viralfx_all_jobs group by 1, 2 order by 1, 2
"""


@pytest.fixture
async def pool(migrated_database: Database) -> AsyncIterator[PostgresDatabase]:
    """Return a pool on a database with many failed jobs."""
    migrated_database.execute(FILL.format(jobs=JOBS))
    async with opened(config_of(migrated_database, pool_max=8)) as pool:
        yield pool


@pytest.mark.soak
async def test_a_change_of_many_jobs_waits_for_no_lock(
    pool: PostgresDatabase, migrated_database: Database
) -> None:
    """A job that another transaction has locked is left out; a second call takes it."""
    ledger = PostgresJobLedger(pool)
    ships = JOBS - (JOBS + 2) // 3
    async with pool.acquire() as other, other.transaction():
        await other.execute(
            "update viralfx_ops.viralfx_jobs set payload = '1' where id = ("
            "select id from viralfx_ops.viralfx_jobs where task = 'ship' limit 1)"
        )
        async with asyncio.timeout(120):
            retried = sum([s.count async for s in ledger.retry_all(JobFilter(task="ship"))])
    again = sum([s.count async for s in ledger.retry_all(JobFilter(task="ship"))])
    counts = await ledger.counts()

    assert (retried, again) == (ships - 1, 1)
    assert migrated_database.execute(STATES) == [
        ("bill", "failed", JOBS - ships),
        ("ship", "waiting", ships),
    ]
    assert sum(queue.waiting for queue in counts.values()) == ships
    cancelled = sum([s.count async for s in ledger.cancel_all(JobFilter(task="ship"))])
    assert cancelled == ships
    assert sum(queue.cancelled for queue in (await ledger.counts()).values()) == ships


async def test_workers_go_on_during_a_change_of_many_jobs(
    pool: PostgresDatabase, migrated_database: Database
) -> None:
    """They complete the jobs that were retried, while others are retried and cancelled."""
    ledger = PostgresJobLedger(pool)
    await ledger.register("w", ["default", "analytics"], LONG_LEASE)
    done: set[str] = set()
    ended = asyncio.Event()

    async def work(queue: str) -> None:
        while not ended.is_set():
            claims = await ledger.claim(queue, "w", 50)
            done.update(await ledger.settle([completed(claim, b"1") for claim in claims]))

    async with asyncio.timeout(120), asyncio.TaskGroup() as group:
        for queue in ("default", "analytics"):
            group.create_task(work(queue))
        retried = sum([s.count async for s in ledger.retry_all(JobFilter(code="error"))])
        cancelled = sum([s.count async for s in ledger.cancel_all(JobFilter(task="bill"))])
        ended.set()
    for queue in ("default", "analytics"):
        await work_off(ledger, queue, done)
    ((ended_cancelled,),) = migrated_database.execute(
        "select count(*) from viralfx_ops.viralfx_finished_jobs where state = 'cancelled'"
    )

    assert retried == JOBS
    assert done
    assert len(done) + ended_cancelled == JOBS
    # A running job may complete after the request.
    assert ended_cancelled <= cancelled


async def work_off(ledger: PostgresJobLedger, queue: str, done: set[str]) -> None:
    """Complete the rest."""
    while claims := await ledger.claim(queue, "w", 500):
        done.update(await ledger.settle([completed(claim, b"1") for claim in claims]))


async def test_a_job_that_becomes_due_during_a_cancellation_is_cancelled(
    migrated_database: Database,
) -> None:
    """A sweep promotes it between two steps."""
    async with ledger_in(migrated_database) as ledger:
        await ledger.accept([draft(), draft(run_at=later(datetime.now(UTC), 600.0))])
        async for _ in ledger.cancel_all(JobFilter(state=JobState.WAITING)):
            migrated_database.execute("update viralfx_jobs set state = 'waiting'")

        assert await ledger.counts() == {"default": QueueCounts(cancelled=2)}
