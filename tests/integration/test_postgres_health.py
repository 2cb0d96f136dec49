"""The check of a real Postgres: dedicated connection, number of queries, and results."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from tests.integration.leaks import LeakCheck
from tests.integration.postgres_clients import (
    all_can_be_taken,
    ask,
    changed,
    checked,
    config_of,
    migrated,
    opened,
    sessions,
    use,
)
from tests.manual_clock import ManualClock
from tests.servers.fault_proxy import BLACKHOLE, PASS, REFUSE, RESET
from tests.servers.fixtures import FaultProxies
from tests.servers.postgres import Database, PostgresServer, postgres_server
from tests.servers.waiting import until, wait_for_code
from tests.soak import cycles

from viralfx.adapters.postgres import PostgresHealthCheck
from viralfx.core.clock import SystemClock, timestamp
from viralfx.domain.health.model import CheckPolicy, Observation, Status
from viralfx.domain.health.monitor import HealthMonitor
from viralfx.postgres import PostgresConfig, PostgresDatabase
from viralfx.postgres.migrations import REVISIONS

HEALTH = "viralfx-health"
SOON = 5.0
"""Seconds; a working server responds faster, even on a busy machine."""


def numbers(observation: Observation) -> dict[str, Any]:
    """Return the pool's statistics that were seen."""
    details: Any = observation.details
    stats: dict[str, Any] = details["stats"]
    return stats


def connected(observation: Observation) -> bool:
    """Return what was seen of the check's own connection."""
    details: Any = observation.details
    assert details["adapter"] == "postgres"
    return bool(details["isConnected"])


async def run_check(check: PostgresHealthCheck, *, within: float = SOON) -> Observation:
    """Run the check once, within its timeout."""
    async with asyncio.timeout(within):
        return await check.check()


@asynccontextmanager
async def checked_pool(
    config: PostgresConfig, *, within: float = 2.0
) -> AsyncIterator[tuple[PostgresDatabase, PostgresHealthCheck]]:
    """Return the pool of a migrated database and its check."""
    await migrated(config)
    async with opened(config) as pool, checked(pool, within=within) as check:
        yield pool, check


# -- its own connection ----------------------------------------------------------------------


async def test_check_uses_a_dedicated_connection(database: Database) -> None:
    """It is opened at the first check, kept and named; it is not taken from the pool."""
    async with checked_pool(config_of(database, pool_min=1, pool_max=1)) as (pool, check):
        async with pool.acquire():
            assert sessions(database, HEALTH) == []
            assert (await run_check(check)).status is Status.PASS
            [own] = sessions(database, HEALTH)
            for _ in range(5):
                await run_check(check)
            assert sessions(database, HEALTH) == [own]
        assert pool.total_connections == len(sessions(database)) == 1
        await check.close()
        await until(lambda: sessions(database, HEALTH) == [])


async def test_exhausted_pool_is_a_warning_with_the_number_of_waiters(database: Database) -> None:
    """The check is as fast as before; the warning ends when no caller waits."""
    config = config_of(database, pool_max=2, pool_timeout=30.0)
    async with checked_pool(config) as (pool, check):
        async with AsyncExitStack() as stack:
            for _ in range(2):
                await stack.enter_async_context(pool.acquire())
            # All connections are in use, but no caller waits.
            assert (await run_check(check)).status is Status.PASS
            waiters = [asyncio.create_task(use(pool)) for _ in range(7)]
            await until(lambda: pool.waiting == 7)
            exhausted = await run_check(check)
        await asyncio.gather(*waiters)
        after = await run_check(check)

    assert (exhausted.status, exhausted.code) == (Status.WARN, "pool_exhausted")
    assert exhausted.message == "Database connection pool is exhausted: 7 wait for a connection"
    assert exhausted.error is None
    assert connected(exhausted)
    stats = numbers(exhausted)
    assert (stats["activeConnections"], stats["idleConnections"]) == (2, 0)
    assert stats["waitingRequests"] == 7
    assert (after.status, numbers(after)["waitingRequests"]) == (Status.PASS, 0)


async def test_warning_keeps_the_service_ready(database: Database) -> None:
    """The service's monitor stays ready while the pool is exhausted."""
    async with checked_pool(config_of(database, pool_max=1, pool_timeout=30.0)) as (pool, check):
        monitor = HealthMonitor(clock=SystemClock())
        policy = CheckPolicy(interval=0.05, critical=True, required_for_readiness=True, shared=True)
        monitor.register("database", check, policy)
        monitor.start()
        await until(lambda: monitor.report().started)
        async with pool.acquire():
            waiter = asyncio.create_task(use(pool))
            await until(lambda: monitor.report().checks["database"].status is Status.WARN)
            report = monitor.report()
        await waiter
        await until(lambda: monitor.report().checks["database"].status is Status.PASS)
        await monitor.stop()

    assert report.ready
    assert (report.health, report.failing_gates) == ("degraded", ())
    assert [transition.new for transition in monitor.history] == [
        Status.PASS,
        Status.WARN,
        Status.PASS,
    ]


async def test_too_many_connections_has_its_own_code(migrated_database: Database) -> None:
    """The check fails if the server has no connection left for it."""
    config = config_of(migrated_database)
    role = f"{migrated_database.name}_one"
    migrated_database.execute(f"create role {role} login connection limit 1 password 'planted'")
    migrated_database.execute(f"grant usage on schema viralfx_ops to {role}")
    migrated_database.execute(f"grant select on all tables in schema viralfx_ops to {role}")
    try:
        single = changed(config, user=role, password="planted", pool_max=1)
        async with opened(single) as pool, checked(pool) as check:
            observation = await run_check(check)
            assert (observation.status, observation.code) == (
                Status.FAIL,
                "too_many_connections",
            )
            assert numbers(observation)["failedConnections"] == 1
            assert not connected(observation)
            await pool.close()
            await wait_for_code(check, None)
    finally:
        migrated_database.execute(f"drop owned by {role}")
        migrated_database.execute(f"drop role {role}")


# -- what it shows ---------------------------------------------------------------------------


async def test_statistics_have_documented_names_and_correct_values(database: Database) -> None:
    """Each value matches the operations of the test."""
    clock = ManualClock()
    config = await migrated(
        config_of(
            database,
            pool_min=2,
            pool_max=4,
            pool_timeout=7.5,
            slow_query_threshold=0.5,
        )
    )
    async with opened(config) as pool, checked(pool, clock=clock) as check:
        await ask(pool, "select pg_sleep(0.6)")
        async with AsyncExitStack() as stack:
            for _ in range(3):
                await stack.enter_async_context(pool.acquire())
            busy = await run_check(check)
        assert busy.details == {
            "adapter": "postgres",
            "isConnected": True,
            "stats": {
                "totalConnections": 3,
                "activeConnections": 3,
                "idleConnections": 0,
                "waitingRequests": 0,
                "failedConnections": 0,
                "slowQueries": 1,
                "lastHealthCheck": timestamp(clock.now()),
            },
            "poolConfig": {"min": 2, "max": 4, "timeout": 7500},
        }
        # Without another check, in responses after the connections are back.
        assert busy.live_details is not None
        stats: Any = busy.live_details()["stats"]
        assert (stats["activeConnections"], stats["idleConnections"]) == (0, 3)
        assert stats["lastHealthCheck"] == timestamp(clock.now())
        await clock.advance(60.0)
        idle = numbers(await run_check(check))

    assert (idle["activeConnections"], idle["idleConnections"]) == (0, 3)
    assert idle["lastHealthCheck"] == timestamp(clock.now())


async def test_failed_connections_include_those_of_the_check(
    database: Database, fault_proxy: FaultProxies
) -> None:
    """Only failed attempts are counted."""
    proxy = fault_proxy(database.server.port)
    async with checked_pool(config_of(database, through=proxy)) as (_, check):
        assert numbers(await run_check(check))["failedConnections"] == 0
        proxy.mode = REFUSE
        counts = [numbers(await run_check(check))["failedConnections"] for _ in range(3)]
        proxy.mode = PASS
        after = numbers(await wait_for_code(check, None))["failedConnections"]

    # The first check finds its connection closed; the pool tries to refill itself meanwhile.
    assert counts == sorted(counts)
    assert after >= counts[-1] >= 2


async def test_check_works_before_the_pool_is_open(migrated_database: Database) -> None:
    """It runs while the start still tries to connect."""
    config = config_of(migrated_database)
    pool = PostgresDatabase(config, clock=SystemClock())
    async with checked(pool) as check:
        observation = await run_check(check)

    assert observation.status is Status.PASS
    assert numbers(observation)["totalConnections"] == 0


# -- the schema ------------------------------------------------------------------------------


async def test_pending_migrations_fail_until_they_are_applied(database: Database) -> None:
    """The message names them and the command; the check notices that they were applied."""
    config = config_of(database)
    async with opened(config) as pool, checked(pool) as check:
        behind = await run_check(check)
        again = await run_check(check)
        await migrated(config)
        after = await run_check(check)

    assert (behind.status, behind.code) == (Status.FAIL, "schema_behind")
    assert behind.message == (
        f"Database schema is behind: {', '.join(REVISIONS)} pending; run `viralfx migrate`"
    )
    # The other fields show that the database itself is healthy.
    assert connected(behind)
    assert (again.code, after.status) == ("schema_behind", Status.PASS)


async def test_dropped_tables_fail_until_they_are_back(migrated_database: Database) -> None:
    """On the same connection; careless migrations of an application may drop them."""
    config = config_of(migrated_database)
    async with opened(config) as pool, checked(pool) as check:
        assert (await run_check(check)).status is Status.PASS
        migrated_database.execute("drop schema viralfx_ops cascade")
        dropped = await run_check(check)
        await migrated(config)
        after = await run_check(check)

    assert (dropped.status, dropped.code) == (Status.FAIL, "schema_behind")
    assert connected(dropped)
    assert after.status is Status.PASS


async def test_schema_of_a_later_version_passes(
    migrated_database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """The previous version keeps running during a roll-out; it logs that once."""
    config = config_of(migrated_database)
    migrated_database.execute("update viralfx_migrations set version_num = '9999'")
    async with opened(config) as pool, checked(pool) as check:
        assert (await run_check(check)).status is Status.PASS
        [own] = sessions(migrated_database, HEALTH)
        migrated_database.execute(f"select pg_terminate_backend({own})")
        await wait_for_code(check, None)

    lines = [record for record in caplog.records if "later version" in record.message]
    assert [vars(line)["revision"] for line in lines] == ["9999"]


async def test_schema_is_checked_again_on_a_new_connection(database: Database) -> None:
    """The same address may lead to another database, restored from a backup."""
    async with checked_pool(config_of(database)) as (_, check):
        assert (await run_check(check)).status is Status.PASS
        database.execute("drop table viralfx_migrations")
        [own] = sessions(database, HEALTH)
        database.execute(f"select pg_terminate_backend({own})")
        await wait_for_code(check, "schema_behind")


async def test_read_only_database_fails(migrated_database: Database) -> None:
    """No job can be accepted or claimed, so another instance should get the requests."""
    config = config_of(migrated_database)
    migrated_database.execute(
        f"alter database {migrated_database.name} set default_transaction_read_only = on"
    )
    async with opened(config) as pool, checked(pool) as check:
        observation = await run_check(check)

    assert (observation.status, observation.code) == (Status.FAIL, "read_only")
    assert connected(observation)


# -- how much it asks ------------------------------------------------------------------------


@pytest.fixture
def logging_postgres() -> Iterator[PostgresServer]:
    """Return a Postgres that logs every statement with the application name."""
    with postgres_server(settings={"log_statement": "all", "log_line_prefix": "[%a] "}) as server:
        yield server


def statements(server: PostgresServer) -> Counter[str]:
    """Count the statements of the check by their text."""
    return Counter(
        line.partition(": ")[2]
        for line in server.log().splitlines()
        if line.startswith(f"[{HEALTH}] LOG:") and ("execute" in line or "statement" in line)
    )


async def test_each_check_is_one_command(logging_postgres: PostgresServer) -> None:
    """Except the first, which also reads the version of the schema."""
    async with checked_pool(config_of(logging_postgres)) as (_, check):
        await run_check(check)
        before = statements(logging_postgres)
        for _ in range(20):
            assert (await run_check(check)).status is Status.PASS
        more = statements(logging_postgres) - before

    assert before.total() <= 3
    assert list(more.values()) == [20]


async def test_idle_monitor_runs_one_check_per_interval(logging_postgres: PostgresServer) -> None:
    """Reading its report runs no check."""
    interval = 0.2
    async with checked_pool(config_of(logging_postgres)) as (_, check):
        monitor = HealthMonitor(clock=SystemClock())
        monitor.register("database", check, CheckPolicy(interval=interval))
        monitor.start()
        await until(lambda: monitor.report().started)
        began, before = time.monotonic(), statements(logging_postgres).total()
        await until(lambda: monitor.report().started and time.monotonic() > began + 2.0)
        asked, seconds = statements(logging_postgres).total() - before, time.monotonic() - began
        await monitor.stop()

    assert 3 <= asked <= seconds / interval + 2


async def test_concurrent_checks_do_not_mix_their_queries(database: Database) -> None:
    """A check that the monitor abandoned must not share the connection with the next one."""
    async with checked_pool(config_of(database)) as (_, check):
        observations = await asyncio.gather(*(run_check(check, within=5.0) for _ in range(20)))
        assert {o.status for o in observations} == {Status.PASS}
        assert len(sessions(database, HEALTH)) == 1


# -- what fails ------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["killed", "stopped"])
async def test_check_reports_loss_and_recovery(own_postgres: PostgresServer, how: str) -> None:
    """One check reports the loss with its cause, and one the recovery, also of the pool."""
    async with checked_pool(config_of(own_postgres)) as (pool, check):
        assert (await run_check(check)).status is Status.PASS
        if how == "killed":
            own_postgres.kill()
        else:
            own_postgres.stop()
        await wait_for_code(check, "refused")
        gone = await run_check(check)
        own_postgres.start()
        back = await run_check(check)
        await all_can_be_taken(pool)

    assert (gone.status, gone.message) == (Status.FAIL, "Database refuses connections")
    assert isinstance(gone.error, OSError)
    assert not connected(gone)
    assert back.status is Status.PASS
    assert connected(back)
    assert numbers(back)["failedConnections"] >= 1


@pytest.mark.parametrize("way", ["terminated", "reset"])
async def test_broken_connection_is_reopened(
    database: Database, fault_proxy: FaultProxies, way: str
) -> None:
    """If it broke between two checks, the next one does not fail."""
    proxy = fault_proxy(database.server.port)
    async with checked_pool(config_of(database, through=proxy)) as (_, check):
        await run_check(check)
        [own] = sessions(database, HEALTH)
        if way == "terminated":
            database.execute(f"select pg_terminate_backend({own})")
        else:
            proxy.mode = RESET
            proxy.mode = PASS
        # Until this process has noticed it, a check may fail.
        await wait_for_code(check, None)
        await until(lambda: sessions(database, HEALTH) not in ([], [own]))
        assert (await run_check(check)).status is Status.PASS


async def test_frozen_server_is_a_timeout_with_pool_statistics(
    own_postgres: PostgresServer,
) -> None:
    """The check ends within its timeout, and passes again after the thaw."""
    within = 0.3
    config = config_of(own_postgres, pool_min=2, pool_max=2, connection_timeout=5.0)
    async with checked_pool(config, within=within) as (_, check):
        await run_check(check)
        own_postgres.freeze()
        try:
            took = []
            for _ in range(3):
                began = time.monotonic()
                frozen = await run_check(check, within=within + SOON)
                took.append(time.monotonic() - began)
                assert (frozen.status, frozen.code) == (Status.FAIL, "timeout")
                assert frozen.message == "Database does not answer"
                assert numbers(frozen)["totalConnections"] == 2
                assert not connected(frozen)
        finally:
            own_postgres.thaw()
        assert (await wait_for_code(check, None)).status is Status.PASS

    assert all(within <= seconds < within + SOON for seconds in took)


@pytest.mark.soak
async def test_repeated_freezes_leave_no_resources(own_postgres: PostgresServer) -> None:
    """No descriptor, task or session more than before."""
    config = config_of(own_postgres)
    async with checked_pool(config, within=0.5) as (_, check):
        await wait_for_code(check, None)
        leaks = LeakCheck()
        for _ in cycles(50):
            own_postgres.freeze()
            try:
                await wait_for_code(check, "timeout")
            finally:
                own_postgres.thaw()
            await wait_for_code(check, None)
        await leaks.assert_none()
        count = "select count(*) from pg_stat_activity where application_name = 'viralfx-health'"
        await until(lambda: own_postgres.execute(count) == [(1,)])


async def test_cancellation_at_any_await_is_safe(migrated_database: Database) -> None:
    """While connecting, reading the version or querying; the next check works."""
    config = config_of(migrated_database)
    leaks = LeakCheck()
    async with opened(config) as pool:
        for turns in range(60):
            async with checked(pool) as check:
                cut = asyncio.create_task(check.check())
                for _ in range(turns):
                    await asyncio.sleep(0)
                cut.cancel()
                async with asyncio.timeout(SOON):
                    await asyncio.wait({cut})

                assert (await run_check(check, within=5.0)).status is Status.PASS
        await until(lambda: sessions(migrated_database, HEALTH) == [])
    await leaks.assert_none()


async def test_cancellation_on_a_frozen_server_is_immediate(own_postgres: PostgresServer) -> None:
    """The monitor's timeout cancels the check and does not have to abandon it."""
    async with checked_pool(config_of(own_postgres), within=60.0) as (_, check):
        await run_check(check)
        own_postgres.freeze()
        try:
            checking = asyncio.create_task(check.check())
            await asyncio.sleep(0.05)
            checking.cancel()
            async with asyncio.timeout(0.5):
                await asyncio.wait({checking})
            assert checking.cancelled()
        finally:
            own_postgres.thaw()
        await wait_for_code(check, None)


async def test_no_secret_is_shown(database: Database, fault_proxy: FaultProxies) -> None:
    """Neither message nor details contain the password or the user, for any failure."""
    proxy = fault_proxy(database.server.port)
    planted = "planted-secret"
    right = config_of(database, through=proxy)
    wrong = [
        changed(right, password=planted),
        changed(right, user=planted, password=planted),
        changed(right, database=planted),
        changed(right, tls_mode="require"),
    ]
    codes = []
    for config in wrong:
        async with checked(PostgresDatabase(config, clock=SystemClock())) as check:
            observation = await run_check(check)
            codes.append(observation.code)
            assert planted not in f"{observation.message} {observation.details}"
    proxy.mode = BLACKHOLE
    async with checked(PostgresDatabase(right, clock=SystemClock()), within=0.1) as check:
        codes.append((await run_check(check)).code)

    assert codes == ["auth", "auth", "no_database", "tls", "timeout"]
