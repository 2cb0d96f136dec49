"""The job ledger with many rows: indexes and locks of its statements."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

import pytest
from tests.contracts.ledgers import ERROR, LONG_LEASE, draft, listed
from tests.integration.job_ledgers import NO_WORKER, work
from tests.integration.postgres_clients import config_of, opened
from tests.servers.postgres import Database

from viralfx.adapters.postgres.health import HEALTH_QUERY
from viralfx.jobs.ledger import ProgressReport, UnrunnableJobs
from viralfx.jobs.limits import Limit
from viralfx.jobs.model import (
    UNKNOWN_TASK,
    Claim,
    JobFilter,
    JobState,
    completed,
    failed,
)
from viralfx.jobs.postgres import PostgresJobLedger, claims, enqueue, job_changes
from viralfx.jobs.postgres import ledger_sql as sql
from viralfx.jobs.postgres.claims import Wanted
from viralfx.jobs.postgres.ledger_rows import completion_columns, states_within
from viralfx.postgres import PostgresDatabase
from viralfx.postgres.migrations import qualified

ROWS = 100_000
NEWEST = "ffffffff-ffff-ffff-ffff-ffffffffffff"
OLDEST = "00000000-0000-7000-8000-000000000000"
RECENT = "00000001-82b8-7000-8000-0000000182b8"
"""The id of the thousandth row, from the newest."""
FINISHED = f"""
with finished as (
select
    (lpad(to_hex(n), 12, '0') || '70008000' || lpad(to_hex(n), 12, '0'))::uuid as id,
    (array['default', 'notifications', 'analytics'])[1 + n % 3] as queue,
    'task' as task, case when n % 100 = 0 then 'failed' else 'completed' end as state,
    '{{}}'::json as payload, at, '1'::json as result
from (
    select n, now() - interval '1 day' + n * interval '100 ms' as at
    from generate_series(1, {ROWS}) as n
) as numbers
), failed as (
    insert into viralfx_jobs
        (id, queue, task, state, payload, result, created_at, run_at, started_at, finished_at,
        claims)
    select id, queue, task, state, payload, result, at, at, at, at, 1 from finished
    where state = 'failed'
)
insert into viralfx_finished_jobs
    (id, queue, task, state, payload, result, created_at, run_at, started_at, finished_at, claims)
select id, queue, task, state, payload, result, at, at, at, at, 1 from finished
where state = 'completed'
"""  # noqa: S608 - of this test

SCHEDULED = f"""
insert into viralfx_jobs (id, queue, task, state, payload, created_at, run_at)
select
    (lpad(to_hex(n), 12, '0') || '70009000' || lpad(to_hex(n), 12, '0'))::uuid, 'default', 'task',
    'scheduled', '{{}}', now(), now() + n * interval '1 hour'
from generate_series(1, {ROWS // 2}) as n
"""  # noqa: S608 - of this test


WAITING = f"""
insert into viralfx_jobs
    (id, queue, task, state, payload, created_at, run_at, priority, concurrency_key)
select
    (lpad(to_hex(n), 12, '0') || '7000a000' || lpad(to_hex(n), 12, '0'))::uuid, 'default',
    (array['task', 'unknown', 'limited', 'keyed'])[1 + n % 4], 'waiting', '{{}}',
    now(), now() + case n % 5 when 0 then interval '1 hour' else n * interval '-1 ms' end,
    -(n % 20) / 10, case n % 4 when 3 then 'customer ' || n % 500 end
from generate_series(1, {ROWS}) as n
"""  # noqa: S608 - of this test


@pytest.fixture
def database(migrated_database: Database) -> Database:
    """Return a database with the tables of jobs."""
    return migrated_database


@pytest.fixture
async def pool(database: Database) -> AsyncIterator[PostgresDatabase]:
    """Return a pool on a database that is migrated."""
    async with opened(config_of(database, pool_max=8)) as pool:
        yield pool


async def plan_of(pool: PostgresDatabase, statement: str, *arguments: Any) -> dict[str, Any]:
    """Return the server's plan for a statement of the ledger."""
    async with pool.acquire() as connection, connection.transaction():
        if statement in BY_INDEX:
            await connection.execute(job_changes.BY_INDEX)
        statement = qualified(statement, pool.config.settings.schema)
        text = await connection.fetchval(f"EXPLAIN (FORMAT JSON) {statement}", *arguments)
    plan: dict[str, Any] = json.loads(text)[0]["Plan"]
    return plan


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Return all nodes of a plan."""
    yield plan
    for part in plan.get("Plans", ()):
        yield from nodes(part)


BY_INDEX = {
    job_changes.SEARCH,
    job_changes.SEARCH_OF,
    job_changes.RETRY_STEP,
    job_changes.CANCEL_STEP,
    claims.DUE,
    claims.RESUME,
    claims.UNRUNNABLE,
    claims.WATCH_UNKNOWN,
}
JOB_TABLES = {"viralfx_jobs", "viralfx_finished_jobs"}
BOTH = {"jobs_pkey", "finished_jobs_pkey"}
KEYS = {"finished_jobs_pkey", "finished_jobs_key"}
PAGES = {"jobs_pages", "finished_jobs_pages"}
COUNTED = {"jobs_waiting", "jobs_scheduled"}
CLAIMING = ["default", "w", 50, 1]
COMPLETION = [*([one] * 50 for one in (NO_WORKER, 1, "1")), True]
FAILURE = (NO_WORKER, 1, "failed", None, "error", "why", None, 1, True, None, None)
SETTLEMENT = [*([one] * 50 for one in FAILURE), True]
SETTLED = [[one] * 50 for one in (NO_WORKER, 1, "completed", 0, 0)]
ACCEPTED = [[NO_WORKER] * 50, ["key"] * 50, ["unique"] * 50]
STATEMENTS: dict[str, tuple[str, list[Any], set[str]]] = {
    "claim by ids": (
        claims.CLAIM_THESE,
        [*CLAIMING, ["task"], [NO_WORKER] * 50],
        {"jobs_pkey"},
    ),
    "undo a claim": (claims.UNDO_CLAIM, ["w", [1, 2]], {"jobs_active", "jobs_pkey"}),
    "due": (claims.DUE, [["default", "analytics"], ["task"], 5.0], {"jobs_waiting_tasks"}),
    "resume": (claims.RESUME, ["default", 100], {"jobs_waiting"}),
    "accepted before": (
        sql.ACCEPTED_BEFORE,
        ACCEPTED,
        {"jobs_pkey", "jobs_key", "jobs_unique", *KEYS},
    ),
    "heartbeat": (
        sql.REGISTER_HOLDING,
        ["w", ["default"], 30.0, ["task"], True, [NO_WORKER] * 50, 30.0],
        {"jobs_active", "jobs_pkey"},
    ),
    "hand back": (claims.HAND_BACK, ["w", None], {"jobs_active", "jobs_pkey"}),
    "deregister": (claims.DEREGISTER, ["w"], {"jobs_active"}),
    "sweep": (sql.SWEEP, [5, None, 100, None], {"jobs_active", "jobs_cancelled", "jobs_pkey"}),
    "jobs that no worker can run": (claims.UNRUNNABLE, [1000], {"jobs_refused"}),
    "watch unknown tasks": (claims.WATCH_UNKNOWN, [3600.0, None], {"jobs_waiting_tasks"}),
    "expire a task": (
        claims.EXPIRE_TASK,
        [3600.0, "default", "task", "unknown"],
        {"jobs_pkey"},
    ),
    "expire payloads": (claims.EXPIRE_PAYLOADS, [3600.0, None], {"jobs_refused", "jobs_pkey"}),
    "list lost jobs": (sql.LOST, [5000, NO_WORKER], {"jobs_active"}),
    "list cancelled jobs": (sql.ENDING, [5000, NO_WORKER], {"jobs_cancelled"}),
    "list scheduled jobs": (sql.SOON, [60, 1000, NO_WORKER], {"jobs_scheduled", "jobs_pkey"}),
    "promote": (sql.PROMOTE, [60, 1000, None], {"jobs_scheduled", "jobs_pkey"}),
    "settle": (sql.SETTLE_ALL, SETTLEMENT, {"jobs_pkey"}),
    "settle completed": (sql.SETTLE_COMPLETED, COMPLETION, {"jobs_pkey"}),
    "settle others": (sql.SETTLE_OTHERS, SETTLEMENT, {"jobs_pkey"}),
    "settled before": (sql.SETTLED_BEFORE, SETTLED, BOTH),
    "counts": (sql.COUNTS, ["waiting"], COUNTED),
    "counts for the health checks": (HEALTH_QUERY, ["waiting"], COUNTED),
    "prune": (sql.PRUNE, [3600.0, 1000, None], {"finished_jobs_age"}),
    "prune failed": (sql.PRUNE_FAILED, [3600.0, 1000, None], {"jobs_failed"}),
    "get": (sql.GET, [NO_WORKER], BOTH),
    "page": (job_changes.PAGE, [NEWEST, 50], BOTH),
    "page of a queue": (
        job_changes.PAGE_OF,
        [NEWEST, 50, "default", states_within(None)],
        {*PAGES, "jobs_active", *BOTH},
    ),
    "page of a state": (
        job_changes.PAGE_OF,
        [NEWEST, 50, None, ["failed"]],
        PAGES | BOTH,
    ),
    "last job that a search scans": (job_changes.LAST_SCANNED, [NEWEST, 1000], BOTH),
    "search": (
        job_changes.SEARCH,
        [NEWEST, 2450, None, ["failed"], "task", None, None, 51],
        BOTH,
    ),
    "search of a queue": (
        job_changes.SEARCH_OF,
        [NEWEST, 2450, "default", ["failed"], "task", "error", None, 51],
        PAGES | BOTH,
    ),
    "retry": (job_changes.RETRY, [NO_WORKER], {"jobs_pkey"}),
    "retry many": (
        job_changes.RETRY_STEP,
        ["default", OLDEST, NEWEST, "task", "error", None, "failed", 4000, 3000, 10],
        {"jobs_pages", "jobs_pkey"},
    ),
    "run": (job_changes.RUN, [NO_WORKER], {"jobs_pkey"}),
    "cancel": (job_changes.CANCEL, [NO_WORKER], {"jobs_pkey"}),
    "cancel many": (
        job_changes.CANCEL_STEP,
        ["default", OLDEST, NEWEST, "task", None, None, "waiting", 4000, 3000],
        {"jobs_pages", "jobs_pkey"},
    ),
    "request to cancel": (job_changes.REQUEST_CANCEL, [NO_WORKER], {"jobs_pkey"}),
    "requests to cancel": (job_changes.CANCEL_REQUESTS, ["w"], {"jobs_cancelled"}),
    "finish cancelled": (sql.FINISH_CANCELLED, [1000, None], {"jobs_cancelled", "jobs_pkey"}),
    "report": (
        job_changes.REPORT,
        [[one] * 50 for one in (NO_WORKER, 1, "{}")],
        {"jobs_pkey"},
    ),
    "last run of a schedule": (
        enqueue.LAST_SCHEDULED,
        ["hour", NO_WORKER, datetime.now(UTC)],
        BOTH,
    ),
    "search of a correlation id": (
        job_changes.FIND,
        [NEWEST, RECENT, "order-17", None, None, None, None, None, 51],
        BOTH,
    ),
}

OPTIONAL = {
    "jobs that no worker can run": {"jobs_waiting", "jobs_waiting_tasks", "jobs_pages"},
    "expire a task": {"jobs_waiting", "jobs_waiting_tasks", "jobs_pages"},
}
"""Indexes that serve as well, since all waiting jobs of this test are of one task."""


async def test_each_statement_uses_an_index(pool: PostgresDatabase, database: Database) -> None:
    """With missing, outdated and current statistics."""
    ledger = PostgresJobLedger(pool)

    async def seen(when: str) -> None:
        for name, (statement, arguments, expected) in STATEMENTS.items():
            plan = await plan_of(pool, statement, *arguments)
            parts = [part for part in nodes(plan) if "Scan" in part["Node Type"]]
            read = [part for part in parts if part.get("Relation Name") in JOB_TABLES]
            used = {
                part["Index Name"].removeprefix("viralfx_")
                for part in parts
                if "jobs_" in part.get("Index Name", "")
            }
            assert [part for part in read if part["Node Type"] == "Seq Scan"] == [], (name, when)
            assert used - OPTIONAL.get(name, set()) == expected, (name, when)

    database.execute("analyze viralfx_jobs, viralfx_finished_jobs")
    database.execute(FINISHED)
    database.execute(SCHEDULED)
    await ledger.accept([draft() for _ in range(900)])
    await ledger.register("w", ["default"], LONG_LEASE)
    await ledger.claim("default", "w", 100)
    await seen("the table was empty when it was last looked at")
    database.execute("analyze viralfx_jobs, viralfx_finished_jobs")
    await seen("most jobs are finished")
    await ledger.accept([draft() for _ in range(10_000)])
    await seen("many have come since")


async def test_a_claim_reads_few_blocks(pool: PostgresDatabase, database: Database) -> None:
    """The function that claims made its plans while the tables were empty."""
    ledger = PostgresJobLedger(pool)
    limits = {"limited": Limit(concurrency=1000), "keyed": Limit(concurrency=1, keyed=True)}
    await ledger.register("w", ["default"], LONG_LEASE)
    for tasks in (["task"], ["limited", "keyed"]):
        for _ in range(3):
            await ledger.accept([draft(task=each, concurrency_key="a") for each in tasks])
            await ledger.claim("default", "w", 10, tasks=tasks, limits=limits)
    database.execute(WAITING)
    kinds: dict[str, tuple[list[str], bool, Mapping[str, Limit]]] = {
        "in order": (["task", "limited", "keyed"], True, {}),
        "beside unknown tasks": (["task"], False, {}),
        "of the last task": (["a-task", "task"], False, {}),
        "limited": (["limited"], False, limits),
        "with keys": (["keyed"], False, limits),
    }
    for when in ("before", "after"):
        for name, (tasks, in_order, known) in kinds.items():
            wanted = Wanted("default", "w", 10, tasks, None, known)
            arguments = "default", "w", 10, 1, tasks, in_order, *wanted.limit_columns
            async with pool.acquire() as connection:
                sql = qualified(claims.CLAIM, pool.config.settings.schema)
                plan = await connection.fetchval(
                    f"explain (analyze, buffers, format json) {sql}", *arguments
                )
            found = json.loads(plan)[0]["Plan"]
            assert found["Actual Rows"] == 11, (name, when)
            assert found["Shared Hit Blocks"] + found["Shared Read Blocks"] < 1000, (name, when)
        database.execute("analyze viralfx_jobs")


async def test_a_poll_reads_few_entries(database: Database) -> None:
    """Without statistics, on a connection that knew the indexes when they were small."""
    limits = {"limited": Limit(concurrency=1000), "keyed": Limit(concurrency=1, keyed=True)}
    async with opened(config_of(database, pool_max=1)) as pool:
        ledger = PostgresJobLedger(pool)
        await ledger.register("w", ["default"], LONG_LEASE, tasks=["task"])
        for tasks in (["task"], ["limited", "keyed"]):
            for _ in range(3):
                await ledger.accept([draft(task=each, concurrency_key="a") for each in tasks])
                await ledger.claim("default", "w", 10, tasks=tasks, limits=limits)
        database.execute(WAITING)
        for tasks in (["task"], ["limited", "keyed"]):
            await ledger.claim("default", "w", 10, tasks=tasks, limits=limits)
        due = await ledger.due(["default"], ["task"])
        resumed = await ledger.resume("default", 100)
        unrunnable = await ledger.unrunnable()
        assert await ledger.expire(3600.0) == {}
    ((read,),) = database.execute(
        "select sum(idx_tup_read) from pg_stat_user_indexes where indexrelname like 'viralfx_jobs%'"
    )

    assert due == {"default": 0.0}
    assert len(resumed) == 100
    assert unrunnable == [
        UnrunnableJobs("default", task, UNKNOWN_TASK, 1000)
        for task in ("keyed", "limited", "unknown")
    ]
    assert read < 10_000


async def test_plans_are_not_cached_while_the_table_grows(database: Database) -> None:
    """A cached plan for an empty table would scan the full one."""
    async with opened(config_of(database, pool_max=1)) as pool:
        ledger = PostgresJobLedger(pool)
        for _ in range(10):
            claim = await work(ledger)
            await ledger.settle([failed(claim, ERROR)])
            # A ledger promotes scheduled jobs seldom.
            await PostgresJobLedger(pool).sweep(5)
            await ledger.counts()
            await ledger.page(JobFilter(queue="default"))
        async with pool.acquire() as connection:
            kept = await connection.fetch(
                "select statement, generic_plans, custom_plans from pg_prepared_statements"
            )

    ours = [row for row in kept if "viralfx_" in row["statement"]]
    assert len(ours) > 6
    assert min(row["custom_plans"] for row in ours) >= 10
    assert max(row["generic_plans"] for row in ours) == 0


async def test_page_reads_few_rows(pool: PostgresDatabase, database: Database) -> None:
    """For a rare and a common state, and far from the newest job."""
    database.execute(FINISHED)
    database.execute(SCHEDULED)
    database.execute("analyze viralfx_jobs, viralfx_finished_jobs")
    ledger = PostgresJobLedger(pool)
    older = await ledger.page(JobFilter(state=JobState.FAILED, limit=500))
    pages = {
        "rare": [NEWEST, 50, None, ["failed"]],
        "far": [older[-1].id, 50, None, ["completed"]],
        "none": [NEWEST, 50, None, ["cancelled"]],
    }
    for name, arguments in pages.items():
        async with pool.acquire() as connection:
            text = await connection.fetchval(
                qualified(f"EXPLAIN (ANALYZE, FORMAT JSON) {job_changes.PAGE_OF}", "viralfx_ops"),
                *arguments,
            )
        most = max(
            part["Actual Rows"] * part["Actual Loops"]
            for part in nodes(json.loads(text)[0]["Plan"])
        )
        assert most <= 200, name

    ids = [job.id for job in older]
    assert len(ids) == 500
    assert ids == sorted(ids, reverse=True)
    assert {job.state for job in older} == {JobState.FAILED}


async def test_search_is_limited_and_returns_a_cursor(
    pool: PostgresDatabase, database: Database
) -> None:
    """Searching old jobs costs no more than searching new ones."""
    ledger = PostgresJobLedger(pool, max_scanned=20_000)
    accepted = await ledger.accept([draft(id=OLDEST, correlation_id="order-17")])
    database.execute(FINISHED)
    database.execute("analyze viralfx_jobs, viralfx_finished_jobs")
    found = await ledger.find("order-17")
    places = [found.before]
    while found.before is not None:
        assert list(found.jobs) == []
        found = await ledger.find("order-17", JobFilter(before=found.before))
        places.append(found.before)
    async with pool.acquire() as connection:
        text = await connection.fetchval(
            qualified(f"EXPLAIN (ANALYZE, FORMAT JSON) {job_changes.FIND}", "viralfx_ops"),
            *[NEWEST, places[0], "order-17", None, None, None, None, None, 51],
        )
    looked_at = [
        (part["Actual Rows"] + part.get("Rows Removed by Filter", 0)) * part["Actual Loops"]
        for part in nodes(json.loads(text)[0]["Plan"])
    ]

    assert list(found.jobs) == [listed(each.job) for each in accepted]
    assert places == [*sorted(filter(None, places), reverse=True), None]
    assert len(places) == 6
    assert max(looked_at) <= 20_000


async def test_settling_is_fast_with_outdated_statistics(
    pool: PostgresDatabase, database: Database
) -> None:
    """The server assumes that no job is active; the cost depends only on the number of outcomes."""
    ledger = PostgresJobLedger(pool)
    await ledger.accept([draft() for _ in range(1000)])
    database.execute("analyze viralfx_jobs, viralfx_finished_jobs")
    await ledger.register("w", ["default"], LONG_LEASE)
    claims = await ledger.claim("default", "w", 1000)
    outcomes = completion_columns([completed(claim, b"1") for claim in claims[:50]])
    async with pool.acquire() as connection:
        text = await connection.fetchval(
            qualified(f"EXPLAIN (ANALYZE, FORMAT JSON) {sql.SETTLE_COMPLETED}", "viralfx_ops"),
            *outcomes,
            True,
        )
    compared = [
        (part["Actual Rows"] + part.get("Rows Removed by Join Filter", 0)) * part["Actual Loops"]
        for part in nodes(json.loads(text)[0]["Plan"])
    ]

    assert (await ledger.counts())["default"].completed == 50
    assert max(compared) <= 2000


async def test_locked_rows_are_skipped(pool: PostgresDatabase, database: Database) -> None:
    """Claim, sweep and pruning do not wait for locks."""
    ledger = PostgresJobLedger(pool)
    held = await work(ledger, worker="dead")
    first, second = [each.job for each in await ledger.accept([draft(), draft()])]
    database.execute("update viralfx_workers set lease_until = now() - interval '1 s'")
    await ledger.register("w", ["default"], LONG_LEASE)
    async with asyncio.timeout(20), opened(config_of(database)) as other:
        async with other.acquire() as connection, connection.transaction():
            await connection.execute("set search_path = viralfx_ops")
            await connection.execute("select from viralfx_jobs where state <> 'waiting' for update")
            await connection.execute("select from viralfx_finished_jobs for update")
            await connection.execute("select from viralfx_jobs where id = $1 for update", first.id)
            claims = [
                *await ledger.claim("default", "w", 10, [first.id]),
                *await ledger.claim("default", "w", 10),
            ]
            swept = await ledger.sweep(5)
            pruned = await ledger.prune(0.0)
        assert [claim.id for claim in claims] == [second.id]
        assert (swept.returned, pruned) == ({}, 0)
        assert (await ledger.sweep(5)).returned == {"default": [held.id]}
        assert await ledger.prune(0.0) == 1


@pytest.mark.parametrize("state", [JobState.COMPLETED, JobState.FAILED])
async def test_a_batch_begins_where_the_one_before_ended(
    pool: PostgresDatabase, database: Database, state: JobState
) -> None:
    """The index keeps deleted rows until a vacuum. Jobs that a batch left are deleted last."""
    ledger = PostgresJobLedger(pool)
    failing = state is JobState.FAILED
    await ledger.accept([draft() for _ in range(4)])
    await ledger.register("w", ["default"], LONG_LEASE)
    claims = await ledger.claim("default", "w", 4)
    jobs = [claim.id for claim in claims]
    for claim in claims:
        await ledger.settle([failed(claim, ERROR) if failing else completed(claim, b"1")])
    first = await ledger.prune(0.0, 1, failed=failing)
    earlier = f"set finished_at = finished_at - interval '1 h' where id = '{jobs[3]}'"
    database.execute(f"update viralfx_jobs {earlier}")
    database.execute(f"update viralfx_finished_jobs {earlier}")
    second = await ledger.prune(0.0, 1, failed=failing)
    left = sorted(job.id for job in await ledger.page())

    assert (first, second, left) == (1, 1, jobs[2:])
    assert await ledger.prune(0.0, 2, failed=failing) == 2


async def test_a_report_waits_for_no_settlement(pool: PostgresDatabase) -> None:
    """They might wait for each other: a settlement locks completed jobs before the others."""
    ledger = PostgresJobLedger(pool)
    await ledger.accept([draft(), draft()])
    await ledger.register("w", ["default"], LONG_LEASE)
    settled, running = await ledger.claim("default", "w", 2)
    reports = [ProgressReport(claim=claim, progress=b"1") for claim in (settled, running)]
    lock = "select from viralfx_ops.viralfx_jobs where id = $1 for update"
    async with asyncio.timeout(5), pool.acquire() as connection, connection.transaction():
        await connection.execute(lock, settled.id)
        await ledger.report(reports)

    found = [await ledger.get(claim.id) for claim in (settled, running)]
    assert [job and job.progress for job in found] == [None, b"1"]


async def test_eight_workers_share_two_thousand_jobs(pool: PostgresDatabase) -> None:
    """Each job is claimed once, completed once and counted once."""
    ledger = PostgresJobLedger(pool)
    ids = [each.job.id for each in await ledger.accept([draft() for _ in range(2000)])]
    given: Counter[str] = Counter()
    taken: Counter[str] = Counter()

    async def run(worker: str) -> None:
        await ledger.register(worker, ["default"], LONG_LEASE)
        while claims := await ledger.claim("default", worker, 25):
            given.update(claim.id for claim in claims)
            taken.update(await ledger.settle([completed(claim, b"1") for claim in claims]))

    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        for number in range(8):
            group.create_task(run(f"worker-{number}"))
    counts = (await ledger.counts())["default"]

    assert given == taken == Counter(ids)
    assert (counts.waiting, counts.active, counts.completed) == (0, 0, 2000)


async def test_counters_stay_few_and_exact(pool: PostgresDatabase, database: Database) -> None:
    """Also during folding, and after manual changes of jobs."""
    ledger = PostgresJobLedger(pool)
    await ledger.register("w", ["default"], LONG_LEASE)
    await ledger.accept([draft() for _ in range(400)])
    claims: list[Claim] = list(await ledger.claim("default", "w", 400))
    seen: list[int] = []

    async def settle() -> None:
        while claims:
            await ledger.settle([completed(claims.pop(), b"1")])

    async def fold() -> None:
        while claims:
            await ledger.sweep(5)
            seen.append((await ledger.counts())["default"].completed)

    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        for work_ in (settle, settle, settle, fold, fold):
            group.create_task(work_())
    await ledger.sweep(5)
    ((rows, total),) = database.execute(
        "select count(*), sum(count)::int from viralfx_job_counters"
    )
    await ledger.accept([draft() for _ in range(3)])
    database.execute(
        "delete from viralfx_jobs where id = (select min(id::text)::uuid from viralfx_jobs)"
    )
    database.execute("update viralfx_jobs set state = 'failed', finished_at = now()")
    counts = (await ledger.counts())["default"]

    assert (rows < 110, total) == (True, 400)
    assert max(seen) <= 400
    assert (counts.waiting, counts.completed, counts.failed) == (0, 400, 2)
