"""Leases that a thread renews over a connection of its own."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
from tests.contracts.ledgers import LONG_LEASE, draft
from tests.integration.postgres_clients import config_of, opened, sessions
from tests.servers.postgres import Database
from tests.servers.waiting import until, wait_until

from viralfx.adapters.codec import MsgspecCodec
from viralfx.jobs.ledger import Claims
from viralfx.jobs.memory import MemoryNotifier
from viralfx.jobs.model import JobState
from viralfx.jobs.postgres import PostgresJobLedger, PostgresLeaseStore
from viralfx.jobs.tasks import TaskRegistry, declared_task, task
from viralfx.jobs.worker.worker import JobWorker, WorkerConfig
from viralfx.postgres import PostgresDatabase

CONNECTION = "viralfx-heartbeat"
LEASE = 1.0
VALID = "select lease_until > clock_timestamp(), eligible from viralfx_workers where worker = 'w'"


@pytest.fixture
def database(migrated_database: Database) -> Database:
    """Return a database with the tables of jobs."""
    return migrated_database


def in_own_loop(database: Database, pool: PostgresDatabase) -> int:
    """Renew, lose the connection and renew, in this thread; return the connections at the end."""

    async def renew() -> int:
        store = PostgresLeaseStore(pool)
        try:
            first = await store.register("w", ["default"], LONG_LEASE, [], tasks=["t"])
            (pid,) = sessions(database, CONNECTION)
            database.execute(f"select pg_terminate_backend({pid})")
            again = await store.register("w", ["default"], LONG_LEASE, eligible=False)
            assert (first.leader, again.leader) == (True, False)
            assert again.lease_until > first.lease_until
            return len(sessions(database, CONNECTION))
        finally:
            await store.close()

    return asyncio.run(renew())


async def test_a_store_renews_from_another_thread(database: Database) -> None:
    """With one connection, which is reopened after a loss and closed at the end."""
    async with opened(config_of(database)) as pool:
        assert await asyncio.to_thread(in_own_loop, database, pool) == 1
        wait_until(lambda: not sessions(database, CONNECTION), what="the end of the connection")
        assert database.execute(VALID) == [(True, False)]


@asynccontextmanager
async def working(
    pool: PostgresDatabase,
    *functions: Any,
    name: str = "w",
    slots: int = 2,
    ledger: PostgresJobLedger | None = None,
) -> AsyncIterator[JobWorker]:
    """Run a worker whose lease a thread renews."""
    declared = [each for function in functions if (each := declared_task(function))]
    worker = JobWorker(
        WorkerConfig(
            name=name,
            queues={"default": slots},
            lease=LEASE,
            poll_interval=0.5,
            default_timeout=20.0,
        ),
        ledger=ledger or PostgresJobLedger(pool),
        notifier=MemoryNotifier(),
        tasks=TaskRegistry(declared),
        codec=MsgspecCodec(),
        open_lease_store=partial(PostgresLeaseStore, pool),
    )
    worker.start()
    try:
        yield worker
    finally:
        await worker.drain(5.0)


async def test_a_blocked_worker_keeps_its_lease(database: Database) -> None:
    """It cannot lead meanwhile; its jobs complete, and no claim of theirs is taken back."""
    seen: list[Any] = []

    @task("block")
    async def block(_: Any) -> None:
        watching.start()
        time.sleep(4 * LEASE)  # noqa: ASYNC251 - the fault itself

    def watch() -> None:
        ends = time.monotonic() + 3.8 * LEASE
        while time.monotonic() < ends:
            seen.extend(database.execute(VALID))
            threading.Event().wait(0.05)

    watching = threading.Thread(target=watch)
    async with opened(config_of(database)) as pool:
        ledger = PostgresJobLedger(pool)
        (accepted,) = await ledger.accept([draft(task="block")])
        async with working(pool, block):
            await _final(ledger, accepted.job.id)
            await until(lambda: database.execute(VALID) == [(True, True)])
        job = await ledger.get(accepted.job.id)
    watching.join()

    assert job is not None
    assert (job.state, job.crashes, job.claims) == (JobState.COMPLETED, 0, 1)
    assert {valid for valid, _ in seen} == {True}
    assert (True, False) in seen


async def test_jobs_that_have_not_begun_run_on_another_worker(database: Database) -> None:
    """While the loop of their worker is blocked: each once, at no cost."""
    ran: list[tuple[str, int]] = []
    ended = threading.Event()

    def noting(worker: str) -> Any:
        @task("note")
        async def note(number: int) -> None:
            ran.append((worker, number))

        return note

    async def elsewhere() -> None:
        async with opened(config_of(database)) as pool, working(pool, noting("x"), name="x"):
            await until(lambda: len(ran) == 9)

    def run_elsewhere() -> None:
        asyncio.run(elsewhere())
        ended.set()

    other = threading.Thread(target=run_elsewhere)

    @task("block")
    async def block(_: Any) -> bool:
        other.start()
        return ended.wait(20.0)

    async with opened(config_of(database)) as pool:
        ledger = PostgresJobLedger(pool)
        drafts = [draft(task="note", payload=str(number).encode()) for number in range(9)]
        accepted = await ledger.accept([draft(task="block", priority=1), *drafts])
        async with working(pool, block, noting("w"), slots=10):
            for each in accepted:
                await _final(ledger, each.job.id)
        blocked, *others = [await ledger.get(each.job.id) for each in accepted]
    other.join()

    assert blocked is not None
    assert (blocked.result, blocked.crashes, blocked.claims) == (b"true", 0, 1)
    assert sorted(ran) == [("x", number) for number in range(9)]
    assert {(each.state, each.crashes, each.claims) for each in others if each} == {
        (JobState.COMPLETED, 0, 2)
    }


class _UnreadClaim(PostgresJobLedger):
    """Blocks the event loop once, after the server has executed a claim and before it returns."""

    def __init__(self, pool: PostgresDatabase, database: Database) -> None:
        super().__init__(pool)
        self._server = database
        self._block = True

    def _count(self, state: str) -> int:
        ((count,),) = self._server.execute(
            f"select count(*) from viralfx_jobs where state = '{state}'"  # noqa: S608 - of this test
        )
        return int(count)

    async def claim(self, *arguments: Any, **options: Any) -> Claims:
        claiming = asyncio.ensure_future(super().claim(*arguments, **options))
        if self._block:
            self._block = False
            while not self._count("active"):  # noqa: ASYNC110 - in the server
                await asyncio.sleep(0)
            wait_until(lambda: self._count("waiting"), what="the release")
        return await claiming


async def test_a_claim_that_the_blocked_loop_has_not_read_is_released(database: Database) -> None:
    """Its job runs once, when the loop answers again."""
    ran: list[int] = []

    @task("note")
    async def note(number: int) -> None:
        ran.append(number)

    async with opened(config_of(database)) as pool:
        ledger = _UnreadClaim(pool, database)
        (accepted,) = await ledger.accept([draft(task="note", payload=b"7")])
        async with working(pool, note, ledger=ledger) as worker:
            await _final(ledger, accepted.job.id)
        job = await ledger.get(accepted.job.id)

    assert job is not None
    assert (job.state, job.crashes, job.claims, job.history) == (JobState.COMPLETED, 0, 2, ())
    assert (ran, worker.fenced) == ([7], 0)


async def _final(ledger: PostgresJobLedger, job_id: str) -> None:
    async with asyncio.timeout(20.0):
        while not (job := await ledger.get(job_id)) or not job.state.final:  # noqa: ASYNC110 - looked up
            await asyncio.sleep(0.01)


def _lease_threads() -> set[threading.Thread]:
    return {each for each in threading.enumerate() if each.name == "job-lease"}


async def test_a_drained_worker_is_not_registered_again(database: Database) -> None:
    """Its thread and its connection end before it deregisters, over the pool."""
    before = set(threading.enumerate())
    async with opened(config_of(database)) as pool:
        for _ in range(5):
            async with working(pool):
                await until(lambda: database.execute(VALID) == [(True, True)])
            wait_until(lambda: not _lease_threads() - before, what="the thread's end")
            assert database.execute(VALID) == []
            wait_until(lambda: not sessions(database, CONNECTION), what="the connection's end")
    assert not sessions(database, CONNECTION)
