"""The tables of unfinished and finished jobs: moves, keys, promotions and counters."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from tests.architecture.claims import blocks
from tests.contracts.ledgers import ERROR, LONG_LEASE, draft, listed
from tests.guide import section
from tests.integration.job_ledgers import QUICK, ledger_in, work
from tests.integration.postgres_clients import config_of, opened
from tests.manual_clock import ManualClock
from tests.servers.postgres import Database, PostgresServer
from tests.servers.waiting import until

from viralfx.adapters.postgres.health import PostgresHealthCheck
from viralfx.core.errors import LedgerUnavailableError, TransactionError
from viralfx.jobs.ledger import QueueCounts
from viralfx.jobs.model import (
    JobFilter,
    JobNotFoundError,
    JobState,
    completed,
    failed,
    retried,
)
from viralfx.jobs.postgres import PostgresJobLedger
from viralfx.jobs.postgres import ledger_sql as sql
from viralfx.postgres import PostgresDatabase
from viralfx.postgres.migrations import qualified

SCHEDULED_JOBS = 20_000


async def _until_commits_wait(ledger: PostgresJobLedger) -> None:
    async with asyncio.timeout(20):
        with suppress(LedgerUnavailableError):
            while True:
                await ledger.accept([draft()])


@pytest.fixture
def database(migrated_database: Database) -> Database:
    """Return a database with the tables of jobs."""
    return migrated_database


@pytest.fixture
async def pool(database: Database) -> AsyncIterator[PostgresDatabase]:
    """Return a pool on a database that is migrated."""
    async with opened(config_of(database, pool_max=10)) as pool:
        yield pool


@pytest.fixture
def ledger(pool: PostgresDatabase) -> PostgresJobLedger:
    """Return a ledger in the database."""
    return PostgresJobLedger(pool)


def later(seconds: float) -> datetime:
    """Return a time in the future."""
    return datetime.now(UTC) + timedelta(seconds=seconds)


def states(database: Database) -> list[str]:
    """Return the states of the unfinished jobs as the table has them, in order of their ids."""
    return [state for (state,) in database.execute("select state from viralfx_jobs order by id")]


# -- keys ------------------------------------------------------------------------------------


async def test_a_key_has_one_job_while_jobs_move(ledger: PostgresJobLedger) -> None:
    """Clients repeat keys while workers complete the jobs of these keys."""
    await ledger.register("w", ["default"], LONG_LEASE)
    created: dict[str, set[str]] = {}
    over = asyncio.Event()

    async def submit(first: int) -> None:
        for number in range(150):
            key = f"key-{first + number // 5}"
            for accepted in await ledger.accept([draft(key=key), draft()]):
                if accepted.job.key == key:
                    created.setdefault(key, set()).add(accepted.job.id)

    async def run() -> None:
        while not over.is_set():
            claims = await ledger.claim("default", "w", 20)
            await ledger.settle([completed(claim, b"1") for claim in claims])

    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        workers = [group.create_task(run()) for _ in range(3)]
        async with asyncio.TaskGroup() as clients:
            for first in (0, 0, 0, 10):
                clients.create_task(submit(first))
        over.set()
        await asyncio.wait(workers)

    assert len(created) == 40
    assert [key for key, ids in created.items() if len(ids) != 1] == []


async def test_a_finished_job_keeps_its_id_and_key(
    ledger: PostgresJobLedger, database: Database
) -> None:
    """Also in one batch with new jobs."""
    claim = await work(ledger)
    await ledger.settle([completed(claim, b"1")])
    known = draft(key="key")
    await ledger.accept([known])
    (claim,) = await ledger.claim("default", "w", 1)
    await ledger.settle([completed(claim, b"1")])
    by_id, by_key, new = await ledger.accept([known, draft(key="key"), draft(key="new")])

    assert [each.created for each in (by_id, by_key, new)] == [False, False, True]
    assert by_id.job == by_key.job == await ledger.get(known.id)
    assert by_id.job.state is JobState.COMPLETED
    assert states(database) == ["waiting"]
    counts = (await ledger.counts())["default"]
    assert (counts.waiting, counts.active, counts.completed) == (1, 0, 3)


@pytest.mark.parametrize("isolation", ["repeatable_read", "serializable"])
async def test_a_key_needs_read_committed(
    pool: PostgresDatabase, ledger: PostgresJobLedger, isolation: Any
) -> None:
    """The snapshot of such a transaction does not show a job that moved since it began."""
    async with pool.acquire() as connection:
        with pytest.raises(TransactionError, match="READ COMMITTED"):
            async with connection.transaction(isolation=isolation):
                await ledger.accept_in(connection, [draft(key="key")])
        async with connection.transaction(isolation=isolation):
            (accepted,) = await ledger.accept_in(connection, [draft()])

    assert accepted.created


async def test_a_key_is_accepted_under_any_default_isolation(database: Database) -> None:
    """The ledger's own calls choose the level that they need."""
    (name,) = database.execute("select current_database()")[0]
    isolation = "default_transaction_isolation = 'repeatable read'"
    database.execute(f'alter database "{name}" set {isolation}')
    async with ledger_in(database) as ledger:
        first, again = [(await ledger.accept([draft(key="k")]))[0] for _ in range(2)]

    assert (first.created, again.created) == (True, False)
    assert first.job.id == again.job.id


async def test_calls_take_keys_in_one_order(
    pool: PostgresDatabase, ledger: PostgresJobLedger, database: Database
) -> None:
    """Otherwise two calls with the same keys could wait for each other."""
    async with pool.acquire() as connection, connection.transaction():
        await connection.execute("set local lock_timeout = '500ms'")
        await ledger.accept_in(connection, [draft(key="a")])
        both = asyncio.create_task(ledger.accept([draft(key="z"), draft(key="a")]))
        waiting = "select from pg_stat_activity where wait_event_type = 'Lock'"
        await until(lambda: database.execute(waiting))
        await ledger.accept_in(connection, [draft(key="z")])

    assert [each.created for each in await both] == [False, False]


async def test_a_repeated_key_waits_for_the_standby(own_postgres: PostgresServer) -> None:
    """The job exists on the primary only, since the first call was cancelled while it waited."""
    async with ledger_in(own_postgres, call_timeout=QUICK) as ledger:
        await work(ledger)
        own_postgres.execute("alter system set synchronous_standby_names = 'ghost'")
        own_postgres.execute("select pg_reload_conf()")
        # The server applies it some time later: until then, commits do not wait.
        await _until_commits_wait(ledger)
        asked = draft(key="key")
        refused = []
        for repeated in (asked, asked, draft(key="key")):
            with pytest.raises(LedgerUnavailableError) as caught:
                await ledger.accept([repeated])
            refused.append(caught.value)
        stored = await ledger.get(asked.id)
        own_postgres.execute("alter system reset synchronous_standby_names")
        own_postgres.execute("select pg_reload_conf()")
        (accepted,) = await ledger.accept([draft(key="key")])

    assert len(refused) == 3
    assert stored is not None
    assert (accepted.created, accepted.job.id) == (False, asked.id)


# -- scheduled jobs --------------------------------------------------------------------------


async def test_a_job_that_is_due_late_is_scheduled_until_a_sweep(
    ledger: PostgresJobLedger, pool: PostgresDatabase, database: Database
) -> None:
    """For callers it waits all the time. A ledger promotes jobs only every 20 s."""
    late, soon = draft(run_at=later(600)), draft(run_at=later(30))
    await ledger.accept([late, soon])
    before, counted = states(database), (await ledger.counts())["default"]
    await ledger.sweep(5)
    not_yet = states(database)
    database.execute("update viralfx_jobs set run_at = run_at - interval '9 min 15 s'")
    await ledger.sweep(5)
    not_again = states(database)
    await PostgresJobLedger(pool).sweep(5)

    assert before == not_yet == not_again == ["scheduled", "waiting"]
    assert states(database) == ["waiting", "waiting"]
    assert counted == QueueCounts(scheduled=2)
    assert (await ledger.counts())["default"].waiting == 1
    for asked in (late, soon):
        job = await ledger.get(asked.id)
        assert job is not None
        assert job.state is JobState.WAITING


async def test_a_scheduled_job_is_found_listed_and_cancelled(ledger: PostgresJobLedger) -> None:
    """As any waiting job."""
    asked = draft(run_at=later(600), correlation_id="order-17")
    (accepted,) = await ledger.accept([asked])
    waiting = JobFilter(state=JobState.WAITING)

    assert accepted.job.state is JobState.WAITING
    assert list(await ledger.page(waiting)) == [listed(accepted.job)]
    assert list((await ledger.find("order-17", waiting)).jobs) == [listed(accepted.job)]
    cancelled = await ledger.cancel(asked.id)
    assert (cancelled.state, cancelled.asked_run_at) == (JobState.CANCELLED, asked.run_at)
    assert await ledger.get(asked.id) == cancelled
    assert (await ledger.counts())["default"] == QueueCounts(cancelled=1)


async def test_a_long_delay_schedules_a_job_again(
    ledger: PostgresJobLedger, database: Database
) -> None:
    """A short one does not."""
    await ledger.register("w", ["default"], LONG_LEASE)
    await ledger.accept([draft(), draft(), draft()])
    claims = await ledger.claim("default", "w", 3)
    outcomes = [retried(claims[0], ERROR, 600.0), retried(claims[1], ERROR, 30.0)]
    await ledger.settle([*outcomes, completed(claims[2], b"1")])

    assert states(database) == ["scheduled", "waiting"]
    assert (await ledger.counts())["default"] == QueueCounts(scheduled=2, completed=1, consumers=1)


async def test_jobs_become_due_without_a_worker(
    pool: PostgresDatabase, ledger: PostgresJobLedger, database: Database
) -> None:
    """The health query counts them and promotes them, so that workers are started for them."""
    await ledger.accept([draft(run_at=later(600)) for _ in range(3)])
    database.execute("update viralfx_jobs set run_at = now() - interval '9 s'")
    counts = (await ledger.counts())["default"]
    check = PostgresHealthCheck(pool, ManualClock(), timeout=5.0)
    seen = (await check.query.counts())["default"]
    await check.close()

    assert (counts.waiting, counts.scheduled) == (seen.waiting, seen.scheduled) == (3, 0)
    assert seen.oldest_due == pytest.approx(9.0, abs=5.0)
    assert states(database) == ["waiting"] * 3
    assert (await ledger.counts())["default"].waiting == 3


async def test_counters_are_folded_without_a_worker(
    pool: PostgresDatabase, ledger: PostgresJobLedger, database: Database
) -> None:
    """By the health query, once there are many."""
    await ledger.accept([draft()])
    database.execute(
        "insert into viralfx_job_counters select 'default', 'failed', 1"
        " from generate_series(1, 20000)"
    )
    check = PostgresHealthCheck(pool, ManualClock(), timeout=5.0)
    first = (await check.query.counts())["default"]
    ((rows,),) = database.execute("select count(*) from viralfx_job_counters")
    second = (await check.query.counts())["default"]
    await check.close()

    assert (first.waiting, first.failed) == (second.waiting, second.failed) == (1, 20_000)
    assert rows == 2


async def test_the_guide_counts_the_jobs_again(
    pool: PostgresDatabase, ledger: PostgresJobLedger, database: Database
) -> None:
    """By the statements that it shows, after changes while the triggers were disabled."""
    await ledger.accept([draft() for _ in range(3)])
    database.execute("update viralfx_job_counters set count = 7")
    wrong = (await ledger.counts())["default"].waiting
    (statements,) = blocks(section("## Retention"), "sql")
    async with pool.acquire() as connection:
        await connection.execute(statements)

    assert (wrong, (await ledger.counts())["default"].waiting) == (7, 3)


async def test_scheduled_jobs_cost_the_counts_nothing(
    pool: PostgresDatabase, ledger: PostgresJobLedger, database: Database
) -> None:
    """No row of theirs is read, with and without current statistics."""
    database.execute(
        f"""
        insert into viralfx_jobs (id, queue, task, state, payload, created_at, run_at)
        select gen_random_uuid(), 'default', 'task', 'scheduled', '{{}}', now(),
            now() + n * interval '30 min'
        from generate_series(1, {SCHEDULED_JOBS}) as n
        """  # noqa: S608 - of this test
    )
    await ledger.accept([draft() for _ in range(10)])
    await ledger.accept([draft(run_at=later(20)) for _ in range(10)])
    read = []
    for _ in range(2):
        async with pool.acquire() as connection:
            text = await connection.fetchval(
                qualified(f"EXPLAIN (ANALYZE, FORMAT JSON) {sql.COUNTS}", "viralfx_ops"),
                JobState.WAITING,
            )
        read.append(max(_rows(json.loads(text)[0]["Plan"])))
        database.execute("analyze viralfx_jobs")
    counts = (await ledger.counts())["default"]

    assert (counts.waiting, counts.scheduled) == (10, SCHEDULED_JOBS + 10)
    assert max(read) <= 20


def _rows(plan: dict[str, Any]) -> list[float]:
    """Return how many rows of the jobs each node of a plan read."""
    rows = [count for part in plan.get("Plans", ()) for count in _rows(part)]
    if str(plan.get("Relation Name", plan.get("Index Name", ""))).startswith("viralfx_jobs"):
        read = plan["Actual Rows"] + plan.get("Rows Removed by Filter", 0)
        rows.append(read * plan["Actual Loops"])
    return rows or [0.0]


# -- retention -------------------------------------------------------------------------------


async def test_a_failed_job_is_pruned_apart(ledger: PostgresJobLedger) -> None:
    """Its key is free, and its total stays."""
    claim = await work(ledger)
    await ledger.settle([completed(claim, b"1")])
    await ledger.accept([asked := draft(key="key")])
    (claim,) = await ledger.claim("default", "w", 1)
    await ledger.settle([failed(claim, ERROR)])
    finished = await ledger.prune(0.0, failed=False)
    kept = await ledger.get(asked.id)
    pruned = await ledger.prune(0.0, failed=True)
    with pytest.raises(JobNotFoundError):
        await ledger.retry(asked.id)
    (accepted,) = await ledger.accept([draft(key="key")])

    assert (finished, pruned) == (2, 1)
    assert kept is not None
    assert accepted.created
    counts = (await ledger.counts())["default"]
    assert (counts.waiting, counts.completed, counts.failed) == (1, 2, 1)
