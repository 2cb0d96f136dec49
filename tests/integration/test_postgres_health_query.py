"""The health query that the checks of database and queues share."""

import asyncio
import time
from typing import Any

import pytest
from tests.integration.postgres_clients import checked, config_of, migrated, opened
from tests.manual_clock import ManualClock
from tests.servers.fault_proxy import REFUSE
from tests.servers.fixtures import FaultProxies
from tests.servers.postgres import Database, PostgresServer, postgres_server
from tests.servers.waiting import until
from tests.soak import SOAK

from viralfx.core.clock import SystemClock
from viralfx.core.errors import LedgerLimitError, LedgerUnavailableError, NotMigratedError
from viralfx.core.ids import new_job_id
from viralfx.domain.health.model import CheckPolicy, Status
from viralfx.domain.health.monitor import HealthMonitor
from viralfx.jobs.health import BacklogCheck
from viralfx.jobs.model import JobDraft
from viralfx.jobs.postgres import PostgresJobLedger
from viralfx.postgres import PostgresConfig, PostgresDatabase


async def prepared(database: Database | PostgresServer) -> PostgresConfig:
    """Return the configuration of a database with a current schema."""
    return await migrated(config_of(database))


def a_job() -> JobDraft:
    """Return a job."""
    return JobDraft(id=new_job_id(), queue="default", task="t", payload=b"{}")


async def test_counts_equal_those_of_the_ledger(database: Database) -> None:
    """Also in the first query, and without any jobs."""
    async with opened(await prepared(database)) as pool, checked(pool) as check:
        ledger = PostgresJobLedger(pool)
        assert await check.query.counts() == {} == await ledger.counts()
        await ledger.accept([a_job() for _ in range(3)])
        assert (await check.query.counts())["default"].waiting == 3
        assert (await check.query.counts(max_age=60.0))["default"].waiting == 3
        await ledger.accept([a_job()])
        # The result satisfies the requested age.
        assert (await check.query.counts(max_age=60.0))["default"].waiting == 3
        assert (await check.query.counts())["default"].waiting == 4


async def test_counts_are_available_while_the_pool_is_exhausted(database: Database) -> None:
    """The backlog matters most under full load."""
    config = config_of(database, pool_max=1, pool_timeout=60.0)
    await migrated(config)
    async with opened(config) as pool, checked(pool) as check, pool.acquire():
        assert await check.query.counts() == {}


async def test_both_checks_share_one_command_per_interval() -> None:
    """Independent of their phases."""
    settings = {"log_statement": "all", "log_line_prefix": "[%a] "}
    interval = 0.25
    with postgres_server(settings=settings) as server:

        def asked() -> int:
            lines = server.log().splitlines()
            return sum("LOG:  execute" in line and "health]" in line for line in lines)

        async with opened(await prepared(server)) as pool, checked(pool) as check:
            monitor = HealthMonitor(clock=SystemClock())
            policy = CheckPolicy(interval=interval)
            monitor.register("database", check, policy)
            queues = BacklogCheck(counts=lambda: check.query.counts(1.25 * interval))
            monitor.register("queues", queues, policy)
            monitor.start()
            await until(lambda: monitor.report().started)
            began, before = time.monotonic(), asked()
            await until(lambda: time.monotonic() > began + 3.0)
            questions, seconds = asked() - before, time.monotonic() - began
            report = monitor.report()
            await monitor.stop()

    assert 4 <= questions <= seconds / interval + 2
    assert [check.status for check in report.checks.values()] == [Status.PASS, Status.PASS]


@pytest.mark.soak
async def test_forced_round_counts_jobs_accepted_before_it(
    database: Database,
) -> None:
    """The queues check runs after the database check and shares its new result."""
    gap, interval, turns = 0.1, 0.3, 30 if SOAK else 12
    reports = []
    async with opened(await prepared(database)) as pool, checked(pool) as check:
        ledger = PostgresJobLedger(pool)
        monitor = HealthMonitor(clock=SystemClock(), refresh_gap=gap)
        monitor.register("database", check, CheckPolicy(interval=0.6 * interval))
        queues = BacklogCheck(counts=lambda: check.query.counts(1.25 * interval))
        monitor.register("queues", queues, CheckPolicy(interval=interval, follows="database"))
        monitor.start()
        await until(lambda: monitor.report().started)
        for turn in range(1, turns + 1):
            later = time.monotonic() + gap + turn * interval / turns
            await until(lambda later=later: time.monotonic() > later)  # type: ignore[misc]
            await ledger.accept([a_job()])
            details: Any = (await monitor.refresh()).checks["queues"].details
            reports.append(details[0]["metrics"]["waiting"])
        await monitor.stop()

    assert reports == list(range(1, turns + 1))


async def test_running_query_does_not_serve_callers_that_need_a_new_one(
    own_postgres: PostgresServer,
) -> None:
    """The server may have counted already; callers that accept some age share the result."""
    async with opened(await prepared(own_postgres)) as pool, checked(pool) as check:
        await check.check()
        own_postgres.freeze()
        try:
            asked = []
            for max_age in (0.0, 60.0, 0.0):
                asked.append(asyncio.create_task(check.query.run(max_age)))
                await asyncio.sleep(0)
        finally:
            own_postgres.thaw()
        under_way, shared, new = await asyncio.gather(*asked)

    assert shared is under_way
    assert new is not under_way


async def test_locked_job_tables_do_not_fail_the_database_check(database: Database) -> None:
    """A migration of them must not make every instance unready."""
    async with opened(await prepared(database)) as pool, checked(pool, within=1.0) as check:
        queues = BacklogCheck(counts=check.query.counts)
        assert (await check.check()).status is Status.PASS
        async with pool.acquire() as connection, connection.transaction():
            await connection.execute("LOCK TABLE viralfx_ops.viralfx_jobs IN ACCESS EXCLUSIVE MODE")
            locked = await check.check()
            backlog = await queues.check()
        after = await queues.check()

    assert (locked.status, locked.code) == (Status.PASS, None)
    assert (backlog.status, backlog.code) == (Status.FAIL, "unavailable")
    assert str(backlog.error) == "the database cancelled a statement"
    assert after.status is Status.PASS


async def test_counts_need_a_current_schema(database: Database) -> None:
    """The error names the pending migrations."""
    async with opened(config_of(database)) as pool, checked(pool) as check:
        seen = await BacklogCheck(counts=check.query.counts).check()

    assert (seen.status, seen.code) == (Status.FAIL, "not_migrated")
    assert isinstance(seen.error, NotMigratedError)


async def test_waiting_callers_share_a_failure(
    own_postgres: PostgresServer,
) -> None:
    """There is no second query after the first one timed out."""
    within = 1.5
    async with (
        opened(await prepared(own_postgres)) as pool,
        checked(pool, within=within) as check,
    ):
        await check.check()
        own_postgres.freeze()
        try:
            began = time.monotonic()
            asked = [check.query.run(), check.query.counts(), check.query.run()]
            errors = await asyncio.gather(*asked, return_exceptions=True)
            took = time.monotonic() - began
        finally:
            own_postgres.thaw()

    assert [type(error) for error in errors] == [
        TimeoutError,
        LedgerLimitError,
        TimeoutError,
    ]
    assert within <= took < 2 * within


async def test_failure_is_shared_for_a_second_with_callers_that_accept_age(
    database: Database, fault_proxy: FaultProxies
) -> None:
    """The next check of the same round does not query a failed database again."""
    proxy = fault_proxy(database.server.port)
    proxy.mode = REFUSE
    clock = ManualClock()
    failing = PostgresDatabase(config_of(database, through=proxy), clock=SystemClock())
    asked = []
    async with checked(failing, clock=clock) as check:
        assert (await check.check()).status is Status.FAIL
        for seconds, max_age in ((1.0, 60.0), (0.01, 60.0), (0.5, 0.4), (0.3, 0.4), (0.01, 0.0)):
            await clock.advance(seconds)
            with pytest.raises(LedgerUnavailableError):
                await check.query.counts(max_age)
            asked.append(failing.failed_connections)

    assert asked == [1, 2, 3, 3, 4]


async def test_cancelled_caller_releases_the_query(
    own_postgres: PostgresServer,
) -> None:
    """The next caller queries again on another connection."""
    async with opened(await prepared(own_postgres)) as pool, checked(pool) as check:
        await check.check()
        own_postgres.freeze()
        try:
            gone = asyncio.create_task(check.query.run())
            waiting = asyncio.create_task(check.query.run())
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            gone.cancel()
            await asyncio.wait({gone})
        finally:
            own_postgres.thaw()
        assert not (await waiting).read_only
