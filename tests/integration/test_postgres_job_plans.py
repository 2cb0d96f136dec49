"""The job ledger with many rows: which indexes its statements use, and what they lock."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from tests.contracts.ledgers import ERROR, LONG, draft
from tests.integration.job_ledgers import NOBODY, work
from tests.integration.postgres_clients import config_of, opened
from tests.servers.postgres import Database

from viralfx.adapters.postgres import PostgresDatabase, PostgresJobLedger
from viralfx.adapters.postgres import job_statements as sql
from viralfx.adapters.postgres.health_question import QUESTION
from viralfx.adapters.postgres.job_rows import settlement_columns
from viralfx.adapters.postgres.job_search import FIND, LAST_LOOKED_AT
from viralfx.domain.jobs.job import Claim, JobState, completed, failed

ROWS = 100_000
NEWEST = "ffffffff-ffff-ffff-ffff-ffffffffffff"
OLDEST = "00000000-0000-7000-8000-000000000000"
RECENT = "00000001-82b8-7000-8000-0000000182b8"
"""The id of the thousandth row, from the newest."""
FINISHED = f"""
insert into viralfx_jobs
    (id, queue, task, state, payload, created_at, run_at, started_at, finished_at, claims, result)
select
    (lpad(to_hex(n), 12, '0') || '70008000' || lpad(to_hex(n), 12, '0'))::uuid,
    (array['default', 'notifications', 'analytics'])[1 + n % 3], 'task',
    case when n % 100 = 0 then 'failed' else 'completed' end,
    '{{}}', at, at, at, at, 1, '1'
from (
    select n, now() - interval '1 day' + n * interval '100 ms' as at
    from generate_series(1, {ROWS}) as n
) as numbers
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
    """Return how the server would execute a statement of the ledger's."""
    async with pool.acquire() as connection:
        text = await connection.fetchval(f"EXPLAIN (FORMAT JSON) {statement}", *arguments)
    plan: dict[str, Any] = json.loads(text)[0]["Plan"]
    return plan


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Return a plan and all its parts."""
    yield plan
    for part in plan.get("Plans", ()):
        yield from nodes(part)


CLAIMING = ["default", "w", 50, 1]
STATEMENTS: dict[str, tuple[str, list[Any], set[str]]] = {
    "claim": (sql.CLAIM, CLAIMING, {"waiting", "pkey"}),
    "claim by ids": (sql.CLAIM_THESE, [*CLAIMING, [NOBODY] * 50], {"pkey"}),
    "take back": (sql.TAKE_BACK, ["w", [1, 2]], {"active"}),
    "heartbeat": (sql.REGISTER_HOLDING, ["w", ["default"], 30.0, [NOBODY] * 50], {"active"}),
    "leave": (sql.LEAVE, ["w"], {"active"}),
    "sweep": (sql.SWEEP, [5, None], {"active", "pkey"}),
    "settle": (
        sql.SETTLE,
        [[one] * 50 for one in (NOBODY, 1, "completed", "1", None, None, None, 0)],
        {"pkey"},
    ),
    "counts": (sql.COUNTS, ["active"], {"waiting", "active"}),
    "counts for the health checks": (QUESTION, ["active"], {"waiting", "active"}),
    "prune": (sql.PRUNE, [3600.0, 1000], {"finished", "pkey"}),
    "get": (sql.GET, [NOBODY], {"pkey"}),
    "page": (sql.PAGE, [NEWEST, 50], {"pkey"}),
    "page of a queue": (
        sql.PAGE_OF_QUEUE,
        [NEWEST, 50, "default", [state.value for state in JobState]],
        {"pages", "active", "pkey"},
    ),
    "page of a state": (sql.PAGE_OF_STATE, [NEWEST, 50, None, ["failed"]], {"pages", "pkey"}),
    "last that a search looks at": (LAST_LOOKED_AT, [NEWEST, 1000], {"pkey"}),
    "search": (FIND, [NEWEST, RECENT, "order-17", None, None, 51], {"pkey"}),
}


async def test_each_statement_finds_its_rows_by_an_index(
    pool: PostgresDatabase, database: Database
) -> None:
    """Whatever the server believes of the table: nothing, what was long ago, or what is."""
    ledger = PostgresJobLedger(pool)

    async def seen(when: str) -> None:
        for name, (statement, arguments, expected) in STATEMENTS.items():
            plan = await plan_of(pool, statement, *arguments)
            parts = [part for part in nodes(plan) if "Scan" in part["Node Type"]]
            read = [part for part in parts if part.get("Relation Name") == "viralfx_jobs"]
            used = {
                part["Index Name"].removeprefix("viralfx_jobs_")
                for part in parts
                if part.get("Index Name", "").startswith("viralfx_jobs_")
            }
            assert [part for part in read if part["Node Type"] == "Seq Scan"] == [], (name, when)
            assert used == expected, (name, when)

    database.execute("analyze viralfx_jobs")
    database.execute(FINISHED)
    await ledger.accept([draft() for _ in range(300)])
    await ledger.register("w", ["default"], LONG)
    await ledger.claim("default", "w", 100)
    await seen("the table was empty when it was last looked at")
    database.execute("analyze viralfx_jobs")
    await seen("most jobs are finished")
    await ledger.accept([draft() for _ in range(10_000)])
    await seen("many have come since")


async def test_no_plan_is_kept_while_the_table_grows(database: Database) -> None:
    """The plan for an empty table would read all of a full one, until somebody looks again."""
    async with opened(config_of(database, pool_max=1)) as pool:
        ledger = PostgresJobLedger(pool)
        for _ in range(10):
            claim = await work(ledger)
            await ledger.settle([failed(claim, ERROR)])
            await ledger.sweep(5)
            await ledger.counts()
            await ledger.page(queue="default")
        async with pool.acquire() as connection:
            kept = await connection.fetch(
                "select statement, generic_plans, custom_plans from pg_prepared_statements"
            )

    ours = [row for row in kept if "viralfx_" in row["statement"]]
    assert len(ours) > 6
    assert min(row["custom_plans"] for row in ours) >= 10
    assert max(row["generic_plans"] for row in ours) == 0


async def test_a_page_reads_few_rows_of_many(pool: PostgresDatabase, database: Database) -> None:
    """Of a state that is rare as of one that is common, and far from the newest."""
    database.execute(FINISHED)
    database.execute("analyze viralfx_jobs")
    ledger = PostgresJobLedger(pool)
    older = await ledger.page(state=JobState.FAILED, limit=500)
    pages = {
        "rare": [NEWEST, 50, None, ["failed"]],
        "far": [older[-1].id, 50, None, ["completed"]],
        "none": [NEWEST, 50, None, ["cancelled"]],
    }
    for name, arguments in pages.items():
        async with pool.acquire() as connection:
            text = await connection.fetchval(
                f"EXPLAIN (ANALYZE, FORMAT JSON) {sql.PAGE_OF_STATE}", *arguments
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


async def test_a_search_stops_after_so_many_jobs(
    pool: PostgresDatabase, database: Database
) -> None:
    """Found or not, and says where it goes on: what is old costs no more than what is new."""
    ledger = PostgresJobLedger(pool, most_looked_at=20_000)
    accepted = await ledger.accept([draft(id=OLDEST, correlation_id="order-17")])
    database.execute(FINISHED)
    database.execute("analyze viralfx_jobs")
    found = await ledger.find("order-17")
    places = [found.before]
    while found.before is not None:
        assert list(found.jobs) == []
        found = await ledger.find("order-17", before=found.before)
        places.append(found.before)
    async with pool.acquire() as connection:
        text = await connection.fetchval(
            f"EXPLAIN (ANALYZE, FORMAT JSON) {FIND}",
            *[NEWEST, places[0], "order-17", None, None, 51],
        )
    looked_at = [
        (part["Actual Rows"] + part.get("Rows Removed by Filter", 0)) * part["Actual Loops"]
        for part in nodes(json.loads(text)[0]["Plan"])
    ]

    assert list(found.jobs) == [each.job for each in accepted]
    assert places == [*sorted(filter(None, places), reverse=True), None]
    assert len(places) == 6
    assert max(looked_at) <= 20_000


async def test_outcomes_are_found_in_a_table_that_was_small(
    pool: PostgresDatabase, database: Database
) -> None:
    """The server believes that no job is active; what it does is as much as there are outcomes."""
    ledger = PostgresJobLedger(pool)
    await ledger.accept([draft() for _ in range(1000)])
    database.execute("analyze viralfx_jobs")
    await ledger.register("w", ["default"], LONG)
    claims = await ledger.claim("default", "w", 1000)
    outcomes = settlement_columns([completed(claim, b"1") for claim in claims[:50]])
    async with pool.acquire() as connection:
        text = await connection.fetchval(f"EXPLAIN (ANALYZE, FORMAT JSON) {sql.SETTLE}", *outcomes)
    compared = [
        (part["Actual Rows"] + part.get("Rows Removed by Join Filter", 0)) * part["Actual Loops"]
        for part in nodes(json.loads(text)[0]["Plan"])
    ]

    assert (await ledger.counts())["default"].completed == 50
    assert max(compared) <= 2000


async def test_what_another_is_taking_is_passed_over(
    pool: PostgresDatabase, database: Database
) -> None:
    """Nobody waits for a lock: neither a claim, nor a sweep, nor pruning."""
    ledger = PostgresJobLedger(pool)
    held = await work(ledger, worker="dead")
    first, second = [each.job for each in await ledger.accept([draft(), draft()])]
    database.execute("update viralfx_workers set lease_until = now() - interval '1 s'")
    await ledger.register("w", ["default"], LONG)
    async with asyncio.timeout(20), opened(config_of(database)) as other:
        async with other.acquire() as connection, connection.transaction():
            await connection.execute("select from viralfx_jobs where state <> 'waiting' for update")
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


async def test_eight_workers_share_two_thousand_jobs(pool: PostgresDatabase) -> None:
    """Each job is given once and completed once, and the counters have each once."""
    ledger = PostgresJobLedger(pool)
    ids = [each.job.id for each in await ledger.accept([draft() for _ in range(2000)])]
    given: Counter[str] = Counter()
    taken: Counter[str] = Counter()

    async def run(worker: str) -> None:
        await ledger.register(worker, ["default"], LONG)
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
    """Also while they are folded, and for what somebody changes by hand."""
    ledger = PostgresJobLedger(pool)
    await ledger.register("w", ["default"], LONG)
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
    database.execute("update viralfx_jobs set state = 'failed' where state = 'completed'")
    counts = (await ledger.counts())["default"]

    assert (rows < 110, total) == (True, 400)
    assert max(seen) <= 400
    assert (counts.completed, counts.failed) == (0, 400)
