"""The check of a real Postgres: a connection of its own, few questions, and true answers."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from tests.integration.postgres_clients import (
    Possessions,
    all_can_be_taken,
    ask,
    checked,
    config_of,
    migrated,
    opened,
    seen,
    sessions,
    until,
    use,
)
from tests.manual_clock import ManualClock
from tests.servers.fault_proxy import BLACKHOLE, PASS, REFUSE, RESET
from tests.servers.fixtures import FaultProxies
from tests.servers.postgres import Database, PostgresServer, postgres_server

from viralfx.adapters.postgres import PostgresConfig, PostgresDatabase, PostgresHealthCheck
from viralfx.adapters.postgres.schema import REVISIONS
from viralfx.domain.clock import SystemClock, timestamp
from viralfx.domain.health import CheckPolicy, Observation, Status
from viralfx.domain.monitor import HealthMonitor

HEALTH = "viralfx-health"
SOON = 1.0
"""Seconds that no answer of a server in order takes, even on a busy machine."""


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


async def look(check: PostgresHealthCheck, *, within: float = SOON) -> Observation:
    """Check once, in time."""
    async with asyncio.timeout(within):
        return await check.check()


@asynccontextmanager
async def looking(
    config: PostgresConfig, *, within: float = 2.0
) -> AsyncIterator[tuple[PostgresDatabase, PostgresHealthCheck]]:
    """Return the pool of a migrated database and its check."""
    await migrated(config)
    async with opened(config) as pool, checked(pool, within=within) as check:
        yield pool, check


# -- its own connection ----------------------------------------------------------------------


async def test_it_has_one_connection_of_its_own(database: Database) -> None:
    """Made at the first look, kept, with a name of its own; the pool gives nothing for it."""
    async with looking(config_of(database, pool_min=1, pool_max=1)) as (pool, check):
        async with pool.acquire():
            assert sessions(database, HEALTH) == []
            assert (await look(check)).status is Status.PASS
            [own] = sessions(database, HEALTH)
            for _ in range(5):
                await look(check)
            assert sessions(database, HEALTH) == [own]
        assert pool.total_connections == len(sessions(database)) == 1
        await check.close()
        await until(lambda: sessions(database, HEALTH) == [])


async def test_an_exhausted_pool_is_a_warning_with_the_waiters(database: Database) -> None:
    """Answered as quickly as ever; over when the last waiter has its turn."""
    config = config_of(database, pool_max=2, pool_timeout=30.0)
    async with looking(config) as (pool, check):
        async with AsyncExitStack() as stack:
            for _ in range(2):
                await stack.enter_async_context(pool.acquire())
            # All in use is no trouble yet: nobody waits.
            assert (await look(check)).status is Status.PASS
            waiters = [asyncio.create_task(use(pool)) for _ in range(7)]
            await until(lambda: pool.waiting == 7)
            exhausted = await look(check)
        await asyncio.gather(*waiters)
        after = await look(check)

    assert (exhausted.status, exhausted.code) == (Status.WARN, "pool_exhausted")
    assert exhausted.message == "Database connection pool is exhausted: 7 wait for a connection"
    assert exhausted.error is None
    assert connected(exhausted)
    stats = numbers(exhausted)
    assert (stats["activeConnections"], stats["idleConnections"]) == (2, 0)
    assert stats["waitingRequests"] == 7
    assert (after.status, numbers(after)["waitingRequests"]) == (Status.PASS, 0)


async def test_a_warning_gates_no_readiness(database: Database) -> None:
    """The monitor that the service runs stays ready while the pool is exhausted."""
    async with looking(config_of(database, pool_max=1, pool_timeout=30.0)) as (pool, check):
        monitor = HealthMonitor(clock=SystemClock())
        policy = CheckPolicy(interval=0.05, critical=True, gates_readiness=True, shared=True)
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


async def test_no_connection_left_for_the_check_is_told(database: Database) -> None:
    """The server may have given all it has to others: that is a failure with a code of its own."""
    config = await migrated(config_of(database))
    role = f"{database.name}_one"
    database.execute(f"create role {role} login connection limit 1 password 'planted'")
    database.execute(f"grant select on all tables in schema public to {role}")
    try:
        single = replace(config, user=role, password="planted", pool_max=1)
        async with opened(single) as pool, checked(pool) as check:
            observation = await look(check)
            assert (observation.status, observation.code) == (
                Status.FAIL,
                "too_many_connections",
            )
            assert numbers(observation)["failedConnections"] == 1
            assert not connected(observation)
            await pool.close()
            await seen(check, None)
    finally:
        database.execute(f"drop owned by {role}")
        database.execute(f"drop role {role}")


# -- what it shows ---------------------------------------------------------------------------


async def test_statistics_have_the_guides_names_and_true_values(database: Database) -> None:
    """One by one, against what was done."""
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
            busy = await look(check)
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
        await clock.advance(60.0)
        idle = numbers(await look(check))

    assert (idle["activeConnections"], idle["idleConnections"]) == (0, 3)
    assert idle["lastHealthCheck"] == timestamp(clock.now())


async def test_failed_connections_count_the_checks_own(
    database: Database, fault_proxy: FaultProxies
) -> None:
    """Each attempt that failed, and none that did not."""
    proxy = fault_proxy(database.server.port)
    async with looking(config_of(database, through=proxy)) as (_, check):
        assert numbers(await look(check))["failedConnections"] == 0
        proxy.mode = REFUSE
        counts = [numbers(await look(check))["failedConnections"] for _ in range(3)]
        proxy.mode = PASS
        after = numbers(await seen(check, None))["failedConnections"]

    # The first look finds its connection cut; the pool tries to refill itself meanwhile.
    assert counts == sorted(counts)
    assert after >= counts[-1] >= 2


async def test_before_the_pool_is_open_it_answers_all_the_same(database: Database) -> None:
    """The check runs while the start still tries to connect."""
    config = await migrated(config_of(database))
    pool = PostgresDatabase(config, clock=SystemClock())
    async with checked(pool) as check:
        observation = await look(check)

    assert observation.status is Status.PASS
    assert numbers(observation)["totalConnections"] == 0


# -- the schema ------------------------------------------------------------------------------


async def test_a_schema_that_is_behind_fails_until_it_was_migrated(database: Database) -> None:
    """It says what is pending and what to run, and sees by itself that it was done."""
    config = config_of(database)
    async with opened(config) as pool, checked(pool) as check:
        behind = await look(check)
        again = await look(check)
        await migrated(config)
        after = await look(check)

    assert (behind.status, behind.code) == (Status.FAIL, "schema_behind")
    assert behind.message == (
        f"Database schema is behind: {', '.join(REVISIONS)} pending; run `viralfx migrate`"
    )
    # The database itself is fine, and that can be seen.
    assert connected(behind)
    assert (again.code, after.status) == ("schema_behind", Status.PASS)


async def test_a_schema_of_a_later_version_is_fine(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """The version before goes on while the next one is rolled out, and says so once."""
    config = await migrated(config_of(database))
    database.execute("update viralfx_migrations set version_num = '9999'")
    async with opened(config) as pool, checked(pool) as check:
        assert (await look(check)).status is Status.PASS
        [own] = sessions(database, HEALTH)
        database.execute(f"select pg_terminate_backend({own})")
        await seen(check, None)

    lines = [record for record in caplog.records if "later version" in record.message]
    assert [vars(line)["revision"] for line in lines] == ["9999"]


async def test_the_schema_is_looked_at_again_on_a_new_connection(database: Database) -> None:
    """Behind the same address may be another database, restored from an older time."""
    async with looking(config_of(database)) as (_, check):
        assert (await look(check)).status is Status.PASS
        database.execute("drop table viralfx_migrations")
        [own] = sessions(database, HEALTH)
        database.execute(f"select pg_terminate_backend({own})")
        await seen(check, "schema_behind")


async def test_a_database_that_takes_no_writes_is_a_warning(database: Database) -> None:
    """A replica, or one that was set so."""
    config = await migrated(config_of(database))
    database.execute(f"alter database {database.name} set default_transaction_read_only = on")
    async with opened(config) as pool, checked(pool) as check:
        observation = await look(check)

    assert (observation.status, observation.code) == (Status.WARN, "read_only")
    assert connected(observation)


# -- how much it asks ------------------------------------------------------------------------


@pytest.fixture
def talkative() -> Iterator[PostgresServer]:
    """Return a Postgres that logs every statement with the name of who sent it."""
    with postgres_server(settings={"log_statement": "all", "log_line_prefix": "[%a] "}) as server:
        yield server


def statements(server: PostgresServer) -> Counter[str]:
    """Count what the check sent, by its text."""
    return Counter(
        line.partition(": ")[2]
        for line in server.log().splitlines()
        if line.startswith(f"[{HEALTH}] LOG:") and ("execute" in line or "statement" in line)
    )


async def test_each_look_is_one_command(talkative: PostgresServer) -> None:
    """After the first, which also reads the version of the schema."""
    async with looking(config_of(talkative)) as (_, check):
        await look(check)
        before = statements(talkative)
        for _ in range(20):
            assert (await look(check)).status is Status.PASS
        more = statements(talkative) - before

    assert before.total() <= 3
    assert list(more.values()) == [20]


async def test_an_idle_monitor_asks_at_most_once_an_interval(talkative: PostgresServer) -> None:
    """However often its report is read."""
    interval = 0.2
    async with looking(config_of(talkative)) as (_, check):
        monitor = HealthMonitor(clock=SystemClock())
        monitor.register("database", check, CheckPolicy(interval=interval))
        monitor.start()
        await until(lambda: monitor.report().started)
        before, began = statements(talkative).total(), time.monotonic()
        await until(lambda: monitor.report().started and time.monotonic() > began + 2.0)
        asked, seconds = statements(talkative).total() - before, time.monotonic() - began
        await monitor.stop()

    assert 3 <= asked <= seconds / interval + 1


async def test_looks_at_the_same_time_take_turns(database: Database) -> None:
    """One that was left behind by the monitor must not meet the next on the wire."""
    async with looking(config_of(database)) as (_, check):
        observations = await asyncio.gather(*(look(check, within=5.0) for _ in range(20)))
        assert {o.status for o in observations} == {Status.PASS}
        assert len(sessions(database, HEALTH)) == 1


# -- what fails ------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["killed", "stopped"])
async def test_lost_and_restored(own_postgres: PostgresServer, how: str) -> None:
    """One look says that it is gone and why, and one that it is back; the pool comes back, too."""
    async with looking(config_of(own_postgres)) as (pool, check):
        assert (await look(check)).status is Status.PASS
        if how == "killed":
            own_postgres.kill()
        else:
            own_postgres.stop()
        await seen(check, "refused")
        gone = await look(check)
        own_postgres.start()
        back = await look(check)
        await all_can_be_taken(pool)

    assert (gone.status, gone.message) == (Status.FAIL, "Database refuses connections")
    assert isinstance(gone.error, OSError)
    assert not connected(gone)
    assert back.status is Status.PASS
    assert connected(back)
    assert numbers(back)["failedConnections"] >= 1


@pytest.mark.parametrize("way", ["terminated", "reset"])
async def test_a_connection_that_broke_is_made_anew(
    database: Database, fault_proxy: FaultProxies, way: str
) -> None:
    """Where that was between two looks, the next one does not even fail."""
    proxy = fault_proxy(database.server.port)
    async with looking(config_of(database, through=proxy)) as (_, check):
        await look(check)
        [own] = sessions(database, HEALTH)
        if way == "terminated":
            database.execute(f"select pg_terminate_backend({own})")
        else:
            proxy.mode = RESET
            proxy.mode = PASS
        # Until this process has heard of it, a look may fail.
        await seen(check, None)
        await until(lambda: sessions(database, HEALTH) not in ([], [own]))
        assert (await look(check)).status is Status.PASS


async def test_a_frozen_server_is_a_timeout_with_the_pools_numbers(
    own_postgres: PostgresServer,
) -> None:
    """In the check's own time, again at the next look, and over at the first after the thaw."""
    within = 0.3
    config = config_of(own_postgres, pool_min=2, pool_max=2, connection_timeout=5.0)
    async with looking(config, within=within) as (_, check):
        await look(check)
        own_postgres.freeze()
        try:
            took = []
            for _ in range(3):
                began = time.monotonic()
                frozen = await look(check, within=within + SOON)
                took.append(time.monotonic() - began)
                assert (frozen.status, frozen.code) == (Status.FAIL, "timeout")
                assert frozen.message == "Database does not answer"
                assert numbers(frozen)["totalConnections"] == 2
                assert not connected(frozen)
        finally:
            own_postgres.thaw()
        assert (await seen(check, None)).status is Status.PASS

    assert all(within <= seconds < within + SOON for seconds in took)


async def test_fifty_freezes_leave_nothing(own_postgres: PostgresServer) -> None:
    """No descriptor, task or session more than before."""
    config = config_of(own_postgres)
    async with looking(config, within=0.05) as (_, check):
        await seen(check, None)
        held = Possessions()
        for _ in range(50):
            own_postgres.freeze()
            try:
                await seen(check, "timeout")
            finally:
                own_postgres.thaw()
            await seen(check, None)
        await held.as_before()
        count = "select count(*) from pg_stat_activity where application_name = 'viralfx-health'"
        await until(lambda: own_postgres.execute(count) == [(1,)])


async def test_it_may_be_cancelled_at_any_turn(database: Database) -> None:
    """While connecting, reading the version or asking; the next one works."""
    config = await migrated(config_of(database))
    before = Possessions()
    async with opened(config) as pool:
        for turns in range(60):
            async with checked(pool) as check:
                cut = asyncio.create_task(check.check())
                for _ in range(turns):
                    await asyncio.sleep(0)
                cut.cancel()
                async with asyncio.timeout(SOON):
                    await asyncio.wait({cut})

                assert (await look(check, within=5.0)).status is Status.PASS
        await until(lambda: sessions(database, HEALTH) == [])
    await before.as_before()


async def test_cancelled_on_a_frozen_server_it_ends_at_once(own_postgres: PostgresServer) -> None:
    """The monitor's own timeout cuts it, and must not have to leave it behind."""
    async with looking(config_of(own_postgres), within=60.0) as (_, check):
        await look(check)
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
        await seen(check, None)


async def test_nothing_secret_is_shown(database: Database, fault_proxy: FaultProxies) -> None:
    """Whatever is wrong, neither message nor details hold the password or the user."""
    proxy = fault_proxy(database.server.port)
    planted = "planted-secret"
    right = config_of(database, through=proxy)
    wrong = [
        replace(right, password=planted),
        replace(right, user=planted, password=planted),
        replace(right, database=planted),
        replace(right, tls_mode="require"),
    ]
    codes = []
    for config in wrong:
        async with checked(PostgresDatabase(config, clock=SystemClock())) as check:
            observation = await look(check)
            codes.append(observation.code)
            assert planted not in f"{observation.message} {observation.details}"
    proxy.mode = BLACKHOLE
    async with checked(PostgresDatabase(right, clock=SystemClock()), within=0.1) as check:
        codes.append((await look(check)).code)

    assert codes == ["auth", "auth", "no_database", "tls", "timeout"]
