"""The job ledger while its server hangs, is down, restarts, or has no tables."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from tests.contracts.ledgers import ERROR, LONG_LEASE, draft, later
from tests.integration.job_ledgers import NO_WORKER, QUICK, ledger_in, work
from tests.servers.postgres import Database, PostgresServer
from tests.servers.waiting import until

from viralfx.adapters.codec import MsgspecCodec
from viralfx.core.errors import LedgerUnavailableError, NotMigratedError
from viralfx.jobs.memory import MemoryNotifier
from viralfx.jobs.model import Claim, completed, retried
from viralfx.jobs.postgres import PostgresJobLedger
from viralfx.jobs.tasks import TaskRegistry
from viralfx.jobs.worker.worker import JobWorker, WorkerConfig

CLEANING = 3.0
"""Seconds that a call may take longer to release its connection."""


@pytest.fixture
def database(migrated_database: Database) -> Database:
    """Return a database with the tables of jobs."""
    return migrated_database


CALLS: dict[str, Callable[[PostgresJobLedger, Claim], Awaitable[object]]] = {
    "accept": lambda ledger, _: ledger.accept([draft()]),
    "claim": lambda ledger, _: ledger.claim("default", "w", 1),
    "claim by ids": lambda ledger, _: ledger.claim("default", "w", 1, [NO_WORKER]),
    "settle": lambda ledger, claim: ledger.settle([retried(claim, ERROR, 0.0)]),
    "effect": lambda ledger, claim: ledger.settle_with_effect(claim, _no_effect),
    "register": lambda ledger, _: ledger.register("w", ["default"], LONG_LEASE, [NO_WORKER]),
    "leave": lambda ledger, _: ledger.deregister("nobody"),
    "sweep": lambda ledger, _: ledger.sweep(5),
    "get": lambda ledger, _: ledger.get(NO_WORKER),
    "page": lambda ledger, _: ledger.page(),
    "find": lambda ledger, _: ledger.find("order-17"),
    "retry": lambda ledger, _: ledger.retry(NO_WORKER),
    "cancel": lambda ledger, _: ledger.cancel(NO_WORKER),
    "counts": lambda ledger, _: ledger.counts(),
    "prune": lambda ledger, _: ledger.prune(3600.0),
}


async def _no_effect(connection: Any) -> bytes:
    await connection.execute("select 1")
    return b"1"


async def test_every_call_fails_in_time_on_a_frozen_server(own_postgres: PostgresServer) -> None:
    """Each works again as soon as the server does."""
    async with ledger_in(own_postgres, call_timeout=QUICK, pool_max=20) as ledger:
        claim = await work(ledger)
        own_postgres.freeze()
        try:
            async with asyncio.timeout(QUICK + CLEANING):
                results = await asyncio.gather(
                    *(call(ledger, claim) for call in CALLS.values()), return_exceptions=True
                )
        finally:
            own_postgres.thaw()
        assert [error for error in results if not isinstance(error, LedgerUnavailableError)] == []
        async with asyncio.timeout(30):
            # On a busy machine the first new connection may take longer than a call.
            while isinstance(await attempted(work(ledger, worker="after")), LedgerUnavailableError):
                pass


async def attempted(call: Awaitable[object]) -> object:
    """Return the result of a call, or the error of a ledger that does not answer."""
    try:
        return await call
    except LedgerUnavailableError as error:
        return error


async def test_every_call_fails_without_a_server(own_postgres: PostgresServer) -> None:
    """Refused connections are retried for the duration of a restart."""
    async with ledger_in(own_postgres, call_timeout=QUICK) as ledger:
        claim = await work(ledger)
        await asyncio.to_thread(own_postgres.kill)
        async with asyncio.timeout(QUICK + CLEANING):
            results = await asyncio.gather(
                *(call(ledger, claim) for call in CALLS.values()), return_exceptions=True
            )
        assert [error for error in results if not isinstance(error, LedgerUnavailableError)] == []
        await asyncio.to_thread(own_postgres.start)
        async with asyncio.timeout(10):
            await work(ledger, worker="after")
            assert await ledger.settle([completed(claim, b"1")]) == {claim.id}


async def test_restart_loses_no_accepted_job(own_postgres: PostgresServer) -> None:
    """An acknowledged job exists; an unacknowledged one exists once or not at all."""
    accepted: list[str] = []
    over = asyncio.Event()

    async def keep_accepting(ledger: PostgresJobLedger) -> None:
        while not over.is_set():
            asked = draft()
            try:
                (answer,) = await ledger.accept([asked])
            except LedgerUnavailableError:
                continue
            assert answer.job.id == asked.id
            accepted.append(asked.id)

    async with ledger_in(own_postgres, pool_max=5) as ledger:
        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            for _ in range(4):
                group.create_task(keep_accepting(ledger))
            await until(lambda: len(accepted) > 20)
            await asyncio.to_thread(own_postgres.restart)
            before = len(accepted)
            await until(lambda: len(accepted) > before + 20)
            over.set()
        rows = own_postgres.execute("select id::text from viralfx_all_jobs")

    assert len(set(accepted)) == len(accepted)
    assert set(accepted) <= {job_id for (job_id,) in rows}


async def test_every_call_reports_missing_tables(database: Database) -> None:
    """The error names the remedy and is not an outage."""
    async with ledger_in(database) as ledger:
        claim = await work(ledger)
        database.execute("drop table viralfx_jobs, viralfx_workers, viralfx_job_counters cascade")
        results = await asyncio.gather(
            *(call(ledger, claim) for call in CALLS.values()), return_exceptions=True
        )

    assert [type(error) for error in results] == [NotMigratedError] * len(CALLS)
    assert "viralfx migrate" in str(results[0])


async def test_a_worker_without_tables_drains_at_once(database: Database) -> None:
    """It was never registered, so it does not wait until it can deregister."""
    database.execute("drop table viralfx_jobs, viralfx_workers, viralfx_job_counters cascade")
    async with ledger_in(database) as ledger:
        worker = JobWorker(
            WorkerConfig(name="w", queues={"default": 1}, lease=LONG_LEASE),
            ledger=ledger,
            notifier=MemoryNotifier(),
            tasks=TaskRegistry(),
            codec=MsgspecCodec(),
        )
        worker.start()
        async with asyncio.timeout(30):
            await worker.drain(300.0)


async def test_sweep_delayed_by_a_frozen_server_takes_no_job(
    own_postgres: PostgresServer,
) -> None:
    """No worker could renew its lease meanwhile; the late sweep must not count that."""
    lease = 1.0
    async with ledger_in(own_postgres, call_timeout=10.0) as ledger:
        claim = await work(ledger)
        ends = (await ledger.register("w", ["default"], lease)).lease_until
        await ledger.sweep(5, ends)  # prepares the statement, so that it is sent in one message
        own_postgres.freeze()
        try:
            sweeping = asyncio.create_task(ledger.sweep(5, ends))
            await until(lambda: datetime.now(UTC) > later(ends, lease))
        finally:
            own_postgres.thaw()
        swept = await sweeping
        await ledger.register("w", ["default"], LONG_LEASE)

        assert (dict(swept.returned), list(swept.crashed)) == ({}, [])
        assert await ledger.settle([completed(claim, b"1")]) == {claim.id}
