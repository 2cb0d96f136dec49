"""The pool on a real server: what it says of itself, who waits, who gives up, and what is lost."""

import asyncio
import random
from contextlib import AsyncExitStack

import asyncpg
import pytest
from tests.integration.postgres_clients import (
    Doubts,
    Possessions,
    active,
    all_can_be_taken,
    ask,
    config_of,
    opened,
    sessions,
    until,
    use,
)
from tests.servers.fault_proxy import BLACKHOLE, PASS
from tests.servers.fixtures import FaultProxies
from tests.servers.postgres import Database, PostgresServer

from viralfx.adapters.postgres import PoolTimeoutError, PostgresDatabase
from viralfx.adapters.postgres.errors import is_transient
from viralfx.domain.clock import SystemClock

COUNTS = ("total", "idle", "in use", "waiting", "failed")


def counts(database: PostgresDatabase) -> dict[str, int]:
    """Return what the pool says of itself."""
    return {
        "total": database.total_connections,
        "idle": database.idle_connections,
        "in use": database.in_use,
        "waiting": database.waiting,
        "failed": database.failed_connections,
    }


def told(**more: int) -> dict[str, int]:
    """Return what it should say; what is not given is zero."""
    return {name: more.get(name.replace(" ", "_"), 0) for name in COUNTS}


async def test_counts_are_true(database: Database) -> None:
    """Before, while it is idle, in use, exhausted, idle again, and closed."""
    config = config_of(database, pool_min=2, pool_max=3)
    unopened = PostgresDatabase(config, clock=SystemClock())
    assert counts(unopened) == told()
    async with opened(config) as pool:
        assert counts(pool) == told(total=2, idle=2)
        assert len(sessions(database)) == 2
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(pool.acquire())
            assert counts(pool) == told(total=2, idle=1, in_use=1)
            for _ in range(2):
                await stack.enter_async_context(pool.acquire())
            assert counts(pool) == told(total=3, in_use=3)
            waiters = [asyncio.create_task(use(pool)) for _ in range(4)]
            await until(lambda: pool.waiting)
            assert counts(pool) == told(total=3, in_use=3, waiting=4)
            assert len(sessions(database)) == 3
        await asyncio.gather(*waiters)
        assert counts(pool) == told(total=3, idle=3)
        await pool.close()
        assert counts(pool) == told()
    await until(lambda: not sessions(database))


async def test_nothing_is_given_out_before_it_is_open_and_after_it_is_closed(
    database: Database,
) -> None:
    """That is a mistake of the caller's, and is not tried again."""
    pool = PostgresDatabase(config_of(database), clock=SystemClock())
    with pytest.raises(asyncpg.InterfaceError, match="pool is not open yet") as early:
        await use(pool)
    await pool.open()
    await pool.close()
    with pytest.raises(asyncpg.InterfaceError, match="pool is closed") as late:
        await use(pool)

    assert not is_transient(early.value)
    assert not is_transient(late.value)


async def test_who_waits_too_long_is_told_and_asks_for_a_check(database: Database) -> None:
    """The guide's words, with the numbers that explain them."""
    doubts = Doubts()
    config = config_of(database, pool_max=1, pool_timeout=0.2)
    async with opened(config, on_doubt=doubts) as pool, pool.acquire():
        with pytest.raises(PoolTimeoutError, match=r"^Connection timeout: ") as caught:
            await use(pool)

    assert "within 0.2 s (1 of 1 in use, 0 others wait)" in str(caught.value)
    assert isinstance(caught.value, TimeoutError)
    assert not is_transient(caught.value)
    assert doubts.count == 1


async def test_whoever_waits_for_a_new_connection_waits_in_vain_for_the_network(
    database: Database, fault_proxy: FaultProxies
) -> None:
    """That the server cannot be reached is another error than that the pool is exhausted."""
    proxy = fault_proxy(database.server.port)
    config = config_of(database, through=proxy, connection_timeout=1.0, pool_timeout=5.0)
    async with opened(config) as pool, pool.acquire():
        proxy.mode = BLACKHOLE
        with pytest.raises(TimeoutError) as caught:
            await use(pool)
        assert not isinstance(caught.value, PoolTimeoutError)
        assert is_transient(caught.value)
        assert pool.failed_connections == 1
        proxy.mode = PASS
        await use(pool)


async def test_a_long_use_asks_for_a_check(database: Database) -> None:
    """It may be slow work, or a server that does not answer; the check finds out."""
    doubts = Doubts()
    async with opened(config_of(database, doubt_after=0.5), on_doubt=doubts) as pool:
        await use(pool)
        assert doubts.count == 0
        async with pool.acquire():
            await until(lambda: doubts.count)
        assert doubts.count == 1


async def test_cancellations_leak_no_connection(database: Database) -> None:
    """A hundred callers, each cut off at a moment of its own, while they wait or while they ask."""
    random_moments = random.Random(4)  # noqa: S311 - the same moments each time
    before = Possessions()
    async with opened(config_of(database, pool_max=3)) as pool:
        for _ in range(10):
            callers = [asyncio.create_task(ask(pool, "select pg_sleep(0.01)")) for _ in range(10)]
            for caller in callers:
                await asyncio.sleep(random_moments.uniform(0, 0.004))
                caller.cancel()
            async with asyncio.timeout(5):
                await asyncio.wait(callers)
        await until(lambda: counts(pool)["idle"] == counts(pool)["total"])
        await all_can_be_taken(pool)
        assert counts(pool) == told(total=3, idle=3)
        assert len(sessions(database)) == 3
    await before.as_before()


async def test_cancelled_transactions_leave_nothing(database: Database) -> None:
    """Cut off between any two turns of the loop: it is all there or nothing."""
    database.execute("create table rows (number int)")
    async with opened(config_of(database, pool_max=2)) as pool:
        for turns in range(30):
            task = asyncio.create_task(
                pool.execute_with_retry(lambda c: c.execute("insert into rows values (1), (2)"))
            )
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            async with asyncio.timeout(5):
                await asyncio.wait({task})
        await all_can_be_taken(pool)
    assert database.execute("select count(*) % 2 from rows") == [(0,)]


async def test_a_cancelled_caller_is_not_held_by_a_frozen_server(
    own_postgres: PostgresServer,
) -> None:
    """It ends within the time that giving back may take, and the pool works after the thaw."""
    before = Possessions()
    async with opened(config_of(own_postgres, pool_max=2, statement_timeout=60.0)) as pool:
        callers = [
            asyncio.create_task(ask(pool, "select pg_sleep(60)")),
            asyncio.create_task(
                pool.execute_with_retry(lambda c: c.fetchval("select pg_sleep(60)"))
            ),
        ]
        await until(lambda: pool.in_use == 2)
        own_postgres.freeze()
        try:
            for caller in callers:
                caller.cancel()
            async with asyncio.timeout(8):
                await asyncio.wait(callers)
            assert all(caller.cancelled() for caller in callers)
            assert pool.in_use == 0
        finally:
            own_postgres.thaw()
        await all_can_be_taken(pool)
    await before.as_before()


@pytest.mark.parametrize("kill", ["terminate", "restart"])
async def test_a_connection_that_died_while_idle_costs_nobody_an_error(
    own_postgres: PostgresServer, kill: str
) -> None:
    """It is replaced before anybody gets it, and the loss is a reason for a check."""
    doubts = Doubts()
    async with opened(config_of(own_postgres, pool_min=2), on_doubt=doubts) as pool:
        if kill == "restart":
            own_postgres.restart()
        else:
            own_postgres.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity"
                " where application_name = 'viralfx'"
            )
        await until(lambda: doubts.count >= 2)
        await all_can_be_taken(pool)
        await until(lambda: pool.total_connections >= 2)


async def test_a_connection_that_dies_in_use_is_one_error(database: Database) -> None:
    """Of the one who used it; it is transient, and the next one gets another connection."""
    doubts = Doubts()
    async with opened(config_of(database, pool_max=1), on_doubt=doubts) as pool:
        task = asyncio.create_task(ask(pool, "select pg_sleep(60)"))
        await until(lambda: active(database))
        database.execute(f"select pg_terminate_backend({active(database)[0]})")
        with pytest.raises(asyncpg.PostgresConnectionError) as caught:
            await task
        assert is_transient(caught.value)
        await use(pool)
        await until(lambda: doubts.count == 1)


async def test_a_statement_that_takes_too_long_is_cancelled(database: Database) -> None:
    """By the server, and the connection goes on to serve."""
    config = config_of(database, pool_max=1, statement_timeout=0.1)
    async with opened(config) as pool:
        async with pool.acquire() as connection:
            with pytest.raises(asyncpg.QueryCanceledError):
                await connection.execute("select pg_sleep(60)")
        before = sessions(database)
        await use(pool)
        assert sessions(database) == before


async def test_what_a_caller_set_does_not_reach_the_next_one(database: Database) -> None:
    """Settings of a session and locks end with the block."""
    async with opened(config_of(database, pool_max=1)) as pool:
        async with pool.acquire() as connection:
            await connection.execute("set statement_timeout = 1")
            await connection.execute("select pg_advisory_lock(1)")
        async with pool.acquire() as connection:
            assert await connection.fetchval("show statement_timeout") == "10s"
            assert database.execute("select pg_try_advisory_lock(1)") == [(True,)]
