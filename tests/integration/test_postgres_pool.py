"""The pool on a real server: statistics, waiting, timeouts and lost connections."""

import asyncio
import random
import time
from contextlib import AsyncExitStack

import asyncpg
import pytest
from tests.integration.leaks import LeakCheck
from tests.integration.postgres_clients import (
    Suspicions,
    active,
    all_can_be_taken,
    ask,
    config_of,
    opened,
    sessions,
    use,
)
from tests.servers.fault_proxy import BLACKHOLE, PASS
from tests.servers.fixtures import FaultProxies
from tests.servers.postgres import Database, PostgresServer
from tests.servers.waiting import until

from viralfx.core.clock import SystemClock
from viralfx.postgres import PoolTimeoutError, PostgresDatabase
from viralfx.postgres.pool import PING_AFTER, PING_TIMEOUT
from viralfx.postgres.retry import is_transient

COUNTS = ("total", "idle", "in use", "waiting", "failed")


def counts(database: PostgresDatabase) -> dict[str, int]:
    """Return the statistics of the pool."""
    return {
        "total": database.total_connections,
        "idle": database.idle_connections,
        "in use": database.in_use,
        "waiting": database.waiting,
        "failed": database.failed_connections,
    }


def expected(**more: int) -> dict[str, int]:
    """Return the expected statistics; missing ones are zero."""
    return {name: more.get(name.replace(" ", "_"), 0) for name in COUNTS}


async def test_statistics_are_correct(database: Database) -> None:
    """Before opening, idle, in use, exhausted, idle again, and closed."""
    config = config_of(database, pool_min=2, pool_max=3)
    unopened = PostgresDatabase(config, clock=SystemClock())
    assert counts(unopened) == expected()
    async with opened(config) as pool:
        assert counts(pool) == expected(total=2, idle=2)
        assert len(sessions(database)) == 2
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(pool.acquire())
            assert counts(pool) == expected(total=2, idle=1, in_use=1)
            for _ in range(2):
                await stack.enter_async_context(pool.acquire())
            assert counts(pool) == expected(total=3, in_use=3)
            waiters = [asyncio.create_task(use(pool)) for _ in range(4)]
            await until(lambda: pool.waiting)
            assert counts(pool) == expected(total=3, in_use=3, waiting=4)
            assert len(sessions(database)) == 3
        await asyncio.gather(*waiters)
        assert counts(pool) == expected(total=3, idle=3)
        await pool.close()
        assert counts(pool) == expected()
    await until(lambda: not sessions(database))


async def test_acquire_needs_an_open_pool(
    database: Database,
) -> None:
    """Use before opening or after closing is an error of the caller and is not retried."""
    pool = PostgresDatabase(config_of(database), clock=SystemClock())
    began = time.monotonic()
    with pytest.raises(asyncpg.InterfaceError, match="pool is not open yet: nothing has") as early:
        await use(pool)
    assert time.monotonic() - began < pool.config.settings.pool_timeout
    await pool.open()
    await pool.close()
    with pytest.raises(asyncpg.InterfaceError, match="pool is closed") as late:
        await use(pool)

    assert not is_transient(early.value)
    assert not is_transient(late.value)


async def test_pool_timeout_raises_and_requests_a_check(database: Database) -> None:
    """The error has the documented text with the pool's figures."""
    suspicions = Suspicions()
    config = config_of(database, pool_max=1, pool_timeout=0.2)
    async with opened(config, on_suspected_outage=suspicions) as pool, pool.acquire():
        with pytest.raises(PoolTimeoutError, match=r"^Connection timeout: ") as caught:
            await use(pool)

    assert "within 0.2 s (1 of 1 in use, 0 others wait)" in str(caught.value)
    assert isinstance(caught.value, TimeoutError)
    assert not is_transient(caught.value)
    assert suspicions.count == 1


async def test_unreachable_server_is_not_a_pool_timeout(
    database: Database, fault_proxy: FaultProxies
) -> None:
    """A connection timeout and an exhausted pool are different errors."""
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


async def test_long_use_of_a_connection_requests_a_check(database: Database) -> None:
    """The check decides whether the work is slow or the server hangs."""
    suspicions = Suspicions()
    async with opened(
        config_of(database, suspect_after=0.5), on_suspected_outage=suspicions
    ) as pool:
        await use(pool)
        assert suspicions.count == 0
        async with pool.acquire():
            await until(lambda: suspicions.count)
        assert suspicions.count == 1


@pytest.mark.each_python
async def test_cancellations_leak_no_connection(database: Database) -> None:
    """A hundred callers are cancelled at different moments, while waiting or querying."""
    random_moments = random.Random(4)  # noqa: S311 - the same moments each time
    leaks = LeakCheck()
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
        assert counts(pool) == expected(total=3, idle=3)
        assert len(sessions(database)) == 3
    await leaks.assert_none()


async def test_cancelled_transactions_are_atomic(database: Database) -> None:
    """Cancelled at any await, all of the transaction is committed or nothing."""
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


async def test_cancelled_caller_does_not_wait_for_a_frozen_server(
    own_postgres: PostgresServer,
) -> None:
    """It ends within the reset timeout, and the pool works after the thaw."""
    leaks = LeakCheck()
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
    await leaks.assert_none()


@pytest.mark.each_python
@pytest.mark.parametrize("kill", ["terminate", "restart"])
async def test_connection_lost_while_idle_is_replaced(
    own_postgres: PostgresServer, kill: str
) -> None:
    """No caller gets an error; the loss requests a check."""
    suspicions = Suspicions()
    async with opened(config_of(own_postgres, pool_min=2), on_suspected_outage=suspicions) as pool:
        if kill == "restart":
            own_postgres.restart()
        else:
            own_postgres.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity"
                " where application_name = 'viralfx'"
            )
        await until(lambda: suspicions.count >= 2)
        await all_can_be_taken(pool)
        await until(lambda: pool.total_connections >= 2)


async def test_connection_lost_in_use_is_one_transient_error(database: Database) -> None:
    """Only its user gets the error; the next caller gets another connection."""
    suspicions = Suspicions()
    async with opened(config_of(database, pool_max=1), on_suspected_outage=suspicions) as pool:
        task = asyncio.create_task(ask(pool, "select pg_sleep(60)"))
        await until(lambda: active(database))
        database.execute(f"select pg_terminate_backend({active(database)[0]})")
        with pytest.raises(asyncpg.PostgresConnectionError) as caught:
            await task
        assert is_transient(caught.value)
        await use(pool)
        await until(lambda: suspicions.count == 1)


async def test_statement_timeout_cancels_in_the_server(database: Database) -> None:
    """The connection stays usable."""
    config = config_of(database, pool_max=1, statement_timeout=0.1)
    async with opened(config) as pool:
        async with pool.acquire() as connection:
            with pytest.raises(asyncpg.QueryCanceledError):
                await connection.execute("select pg_sleep(60)")
        before = sessions(database)
        await use(pool)
        assert sessions(database) == before


async def test_session_state_is_reset_between_callers(database: Database) -> None:
    """Session settings and locks end with the block."""
    async with opened(config_of(database, pool_max=1)) as pool:
        async with pool.acquire() as connection:
            await connection.execute("set statement_timeout = 54321")
            await connection.execute("select pg_advisory_lock(1)")
        async with pool.acquire() as connection:
            assert await connection.fetchval("show statement_timeout") == "10s"
            assert database.execute("select pg_try_advisory_lock(1)") == [(True,)]


async def test_the_reset_can_be_left_out(database: Database) -> None:
    """A caller that changes no session saves the round trip; after an error it is made anyway."""
    async with opened(config_of(database, pool_min=1, pool_max=1)) as pool:

        async def lock_timeout() -> str:
            async with pool.acquire(reset=False) as connection:
                found: str = await connection.fetchval("SHOW lock_timeout")
            return found

        async with pool.acquire(reset=False) as connection:
            await connection.execute("SET lock_timeout = '7s'")
        kept = await lock_timeout()
        with pytest.raises(asyncpg.PostgresSyntaxError):
            async with pool.acquire(reset=False) as connection:
                await connection.execute("SELEC 1")
        after_an_error = await lock_timeout()
        async with pool.acquire(reset=False) as connection:
            await connection.execute("SET lock_timeout = '8s'")
        await use(pool)
        after_another_caller = await lock_timeout()

    assert (kept, after_an_error, after_another_caller) == ("7s", "0", "0")


async def test_a_result_outlives_its_connection(database: Database) -> None:
    """A connection that is lost after the answer, before it is released, costs nothing."""
    async with opened(config_of(database, pool_min=1, pool_max=1)) as pool:
        lost = asyncio.Event()
        async with asyncio.timeout(10), pool.acquire(reset=False) as connection:
            connection.add_termination_listener(lambda _: lost.set())
            found = await connection.fetchval("SELECT 1")
            database.execute(f"select pg_terminate_backend({connection.get_server_pid()})")
            await lost.wait()
        assert found == 1
        await use(pool)


async def test_a_blocked_event_loop_is_no_silence(database: Database) -> None:
    """The answer to a test waits to be read meanwhile; the other connections stay."""
    async with opened(config_of(database, pool_min=3)) as pool:
        before = set(sessions(database))
        await asyncio.sleep(PING_AFTER)
        task = asyncio.create_task(use(pool))
        while not pool.members.lent():  # noqa: ASYNC110 - without a pause for the answer
            await asyncio.sleep(0)
        time.sleep(PING_TIMEOUT + 0.5)  # noqa: ASYNC251 - as a task that blocks
        await task
        stayed = before & set(sessions(database))

    assert len(stayed) >= 2
    assert pool.members.generation == 0
