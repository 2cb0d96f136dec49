"""Eight workers on Postgres that keep the limits of tasks."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from tests.contracts.ledgers import draft
from tests.integration.job_ledgers import ledger_in
from tests.integration.postgres_clients import config_of, opened
from tests.servers.postgres import Database
from tests.servers.waiting import until
from tests.soak import SOAK

from viralfx.adapters.codec import MsgspecCodec
from viralfx.core.ids import new_job_id
from viralfx.jobs.ledger import Claims
from viralfx.jobs.limits import Limit, Rate
from viralfx.jobs.memory import MemoryNotifier
from viralfx.jobs.model import JobDraft
from viralfx.jobs.postgres import PostgresJobLedger
from viralfx.jobs.tasks import TaskRegistry, declared_task, task
from viralfx.jobs.worker.worker import JobWorker, WorkerConfig

WORKERS = 8


class Counted:
    """Declares tasks that count how many of their jobs run at once, by task and key."""

    def __init__(self) -> None:
        self.tasks = TaskRegistry()
        self.running: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.done: Counter[str] = Counter()

    def declare(self, name: str, seconds: float, **options: Any) -> None:
        """Declare a task that takes some seconds."""

        @task(name, **options)
        async def run(payload: dict[str, str]) -> None:
            of = f"{name} {payload.get('key', '')}".strip()
            self.running[of] += 1
            self.most[of] = max(self.most[of], self.running[of])
            await asyncio.sleep(seconds)
            self.running[of] -= 1
            self.done[name] += 1

        declared = declared_task(run)
        assert declared is not None
        self.tasks.add(declared)


@asynccontextmanager
async def fleet(database: Database, counted: Counted) -> AsyncIterator[PostgresJobLedger]:
    """Run eight workers while the block runs."""
    async with ledger_in(database, pool_max=12) as ledger:
        notifier = MemoryNotifier()
        workers = [
            JobWorker(
                WorkerConfig(name=f"w{number}", queues={"default": 5, "other": 5}),
                ledger=ledger,
                notifier=notifier,
                tasks=counted.tasks,
                codec=MsgspecCodec(),
            )
            for number in range(WORKERS)
        ]
        for worker in workers:
            worker.start()
        yield ledger
        await asyncio.gather(*(worker.drain(2.0) for worker in workers))


def jobs(count: int, **options: Any) -> list[JobDraft]:
    """Return drafts."""
    return [draft(id=new_job_id(), **options) for _ in range(count)]


def of_key(key: object) -> JobDraft:
    """Return the draft of a job with a key."""
    return draft(
        id=new_job_id(),
        task="sync",
        concurrency_key=str(key),
        payload=f'{{"key": "{key}"}}'.encode(),
    )


async def test_limits_hold_under_eight_workers(migrated_database: Database) -> None:
    """Jobs of other tasks and queues do not wait for those that a limit keeps back."""
    counted = Counted()
    counted.declare("report", 0.05, concurrency=3)
    counted.declare("free", 0.01)
    counted.declare("elsewhere", 0.01, queue="other")
    async with fleet(migrated_database, counted) as ledger:
        await ledger.accept(jobs(40, task="report", priority=9))
        await ledger.accept([*jobs(200, task="free"), *jobs(200, task="elsewhere", queue="other")])
        await until(
            lambda: counted.done["elsewhere"] == 200 and counted.done["free"] == 200, seconds=30.0
        )
        behind = 40 - counted.done["report"]
        await until(lambda: counted.done["report"] == 40, seconds=30.0)

    assert counted.most["report"] == 3
    assert counted.most["free"] > 3
    assert behind > 0


@pytest.mark.soak
@pytest.mark.parametrize("count", [400, 2000] if SOAK else [400])
async def test_keys_hold_under_eight_workers(migrated_database: Database, count: int) -> None:
    """Two jobs of each of many keys, and fifty of one, which takes part in each turn."""
    counted = Counted()
    counted.declare("sync", 0.005, concurrency=1, concurrency_key="key")
    async with fleet(migrated_database, counted) as ledger:
        for _ in range(2):
            await ledger.accept([of_key(key) for key in range(count)])
        await ledger.accept([of_key("big") for _ in range(50)])
        await until(lambda: counted.done["sync"] == 2 * count + 50, seconds=120.0)

    assert set(counted.most.values()) == {1}


async def test_another_default_isolation_level(migrated_database: Database) -> None:
    """A claim with limits then has a transaction of its own."""
    name = migrated_database.execute("select current_database()")[0][0]
    migrated_database.execute(
        f"alter database \"{name}\" set default_transaction_isolation = 'repeatable read'"
    )
    async with ledger_in(migrated_database) as ledger:
        await ledger.accept(jobs(3))
        await ledger.register("w", ["default"], 60.0)
        limits = {"task": Limit(concurrency=2)}
        claims = await ledger.claim("default", "w", 5, tasks=["task"], limits=limits)

    assert len(claims) == 2


async def test_a_locked_job_with_a_key_is_skipped(migrated_database: Database) -> None:
    """A claim does not wait for its row, since it holds the lock of the task meanwhile."""
    limits = {"sync": Limit(concurrency=1, rate=Rate(2, 86_400.0), keyed=True)}

    async def take(ledger: PostgresJobLedger) -> Claims:
        return await ledger.claim("default", "w", 5, tasks=["sync"], limits=limits)

    async with ledger_in(migrated_database) as ledger, opened(config_of(migrated_database)) as pool:
        locked, other = [each.job.id for each in await ledger.accept([of_key("a"), of_key("b")])]
        await ledger.register("w", ["default"], 60.0)
        async with asyncio.timeout(5.0), pool.acquire() as connection, connection.transaction():
            await connection.execute(
                "select from viralfx_ops.viralfx_jobs where id = $1 for update", locked
            )
            first = await take(ledger)
        second = await take(ledger)
    starts = migrated_database.execute(
        "select key, starts from viralfx_ops.viralfx_task_limits where starts <> '{}' order by key"
    )

    assert [claim.id for claim in first] == [other]
    assert 0.0 < first.again_in <= 1.0
    assert [claim.id for claim in second] == [locked]
    assert [tuple(row) for row in starts] == [("=a", [1]), ("=b", [1])]


async def test_keys_whose_period_is_over_are_forgotten(migrated_database: Database) -> None:
    """Without waiting for a claim that has one of them."""
    migrated_database.execute(
        "insert into viralfx_ops.viralfx_task_limits (task, key, last_key, starts, expires_at)"
        " select 'sync', key, last_key, '{1}', now() + expires from (values"
        " ('=over', null, interval '-2 min'), ('=held', null, '-2 min'), ('=new', null, '1 min'),"
        " ('', 'a', '-2 min')) as rows (key, last_key, expires)"
    )
    async with (
        asyncio.timeout(10.0),
        ledger_in(migrated_database) as ledger,
        opened(config_of(migrated_database)) as pool,
        pool.acquire() as connection,
        connection.transaction(),
    ):
        await connection.execute(
            "select from viralfx_ops.viralfx_task_limits where key = '=held' for update"
        )
        await ledger.sweep(5)
    left = migrated_database.execute("select key from viralfx_ops.viralfx_task_limits order by key")

    assert [key for (key,) in left] == ["", "=held", "=new"]


async def test_a_job_from_sql_without_a_key_takes_turns(migrated_database: Database) -> None:
    """Once a worker has claimed jobs of the task by their keys."""
    limits = {"sync": Limit(concurrency=1, keyed=True)}
    async with ledger_in(migrated_database) as ledger:
        await ledger.register("w", ["default"], 60.0)
        await ledger.accept([of_key("a") for _ in range(100)])
        held = await ledger.claim("default", "w", 1, tasks=["sync"], limits=limits)
        ((job_id,),) = migrated_database.execute("select viralfx_ops.enqueue('sync')")
        claims = await ledger.claim("default", "w", 5, tasks=["sync"], limits=limits)

    assert len(held) == 1
    assert [claim.id for claim in claims] == [str(job_id)]


async def test_a_clock_that_goes_back_hides_no_job_without_a_key(
    migrated_database: Database,
) -> None:
    """Full claims note when they last looked for such jobs; that may be in the future then."""
    limits = {"sync": Limit(concurrency=100, keyed=True)}
    async with ledger_in(migrated_database) as ledger:
        await ledger.register("w", ["default"], 60.0)
        await ledger.accept([of_key(key) for key in range(6) for _ in range(7)])
        taken = list(await ledger.claim("default", "w", 5, tasks=["sync"], limits=limits))
        migrated_database.execute(
            "update viralfx_ops.viralfx_task_limits set looked_at = now() + interval '1 hour'"
            " where key = ''"
        )
        (without,) = await ledger.accept([draft(id=new_job_id(), task="sync")])
        for _ in range(4):
            taken += await ledger.claim("default", "w", 5, tasks=["sync"], limits=limits)

    assert len(taken) == 25
    assert without.job.id in [claim.id for claim in taken]
