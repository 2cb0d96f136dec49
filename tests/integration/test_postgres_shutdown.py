"""Shutdown of the pool on a real server: orderly if possible, forced otherwise, always in time."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import asyncpg
import pytest
from tests.integration.leaks import LeakCheck
from tests.integration.postgres_clients import (
    active,
    ask,
    changed,
    config_of,
    opened,
    sessions,
    use,
)
from tests.servers.fault_proxy import BLACKHOLE, PASS
from tests.servers.fixtures import FaultProxies
from tests.servers.postgres import Database, PostgresServer
from tests.servers.waiting import until, wait_until

from viralfx.adapters.postgres import PostgresHealthCheck, close_postgres
from viralfx.core.clock import SystemClock
from viralfx.core.errors import StartupError, WorkLostError
from viralfx.domain.shutdown import StageFunction
from viralfx.postgres import PostgresDatabase

SHORT, LONG = 0.3, 60.0
"""Budgets in seconds: one that is used up, and one that is more than enough."""
MARGIN = 20.0
"""Tolerance in seconds for a busy machine."""
LEAVE = 1.0
"""Seconds within which idle connections close, for any budget."""

CUT = "Database connections cut: the server does not answer"


def stage_of(
    pool: PostgresDatabase, check: PostgresHealthCheck | None = None
) -> tuple[StageFunction, PostgresHealthCheck]:
    """Return the stage that closes a pool and its check."""
    clock = SystemClock()
    check = check or PostgresHealthCheck(pool, clock, timeout=2.0)
    return partial(close_postgres, pool, check, clock), check


async def timed(stage: StageFunction, budget: float) -> float:
    """Run the stage; return the seconds that it took, however it ended."""
    began = time.monotonic()
    async with asyncio.timeout(budget + MARGIN):
        await stage(budget)
    return time.monotonic() - began


async def all_gone(database: Database) -> None:
    """Wait until the server has no connection of the pool and the check."""
    await until(lambda: not sessions(database) and not sessions(database, "viralfx-health"))


@asynccontextmanager
async def holding(pool: PostgresDatabase) -> AsyncIterator[asyncio.Task[None]]:
    """Return a task that holds a connection until it is cancelled."""
    taken = asyncio.Event()

    async def hold() -> None:
        async with pool.acquire():
            taken.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(hold())
    await taken.wait()
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait({task}, timeout=5)
        assert task.done()


async def test_idle_pool_closes_in_order(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """Every connection is closed at once, and nothing is logged."""
    leaks = LeakCheck()
    async with opened(config_of(database, pool_min=3)) as pool:
        stage, _ = stage_of(pool)
        assert len(sessions(database)) == 3
        took = await timed(stage, LONG)
        assert pool.total_connections == 0
        await all_gone(database)

    assert took < MARGIN
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == []
    await leaks.assert_none()


async def test_connection_of_the_check_is_closed_too(database: Database) -> None:
    """The server has no connection of this process left."""
    async with opened(config_of(database)) as pool:
        stage, check = stage_of(pool)
        await check.check()
        assert len(sessions(database, "viralfx-health")) == 1
        await timed(stage, LONG)
        await all_gone(database)


async def test_stage_waits_for_running_work(database: Database) -> None:
    """The work keeps its connection, and the stage ends with it."""
    async with opened(config_of(database)) as pool:
        stage, _ = stage_of(pool)
        work = asyncio.create_task(ask(pool, "select pg_sleep(3)"))
        await until(lambda: active(database))
        took = await timed(stage, LONG)
        await work
        await all_gone(database)

    # Longer than the limit for idle connections.
    assert LEAVE < took + 0.3 < LONG


async def test_connection_in_use_is_cut_at_the_end_of_the_budget(database: Database) -> None:
    """The error has the number of connections."""
    leaks = LeakCheck()
    async with opened(config_of(database)) as pool, holding(pool), holding(pool):
        stage, _ = stage_of(pool)
        began = time.monotonic()
        with pytest.raises(WorkLostError, match=r"^2 database connections were still in use"):
            await timed(stage, SHORT)
        took = time.monotonic() - began
        assert pool.total_connections == 0
        await all_gone(database)

    # The last quarter is for the requests to cancel.
    assert 0.75 * SHORT <= took < SHORT + MARGIN
    await leaks.assert_none()


async def test_cut_statement_raises_a_lost_connection(database: Database) -> None:
    """At once; waiting callers get an error too, and the server has ended the statement."""
    async with opened(config_of(database, pool_max=1, pool_timeout=60.0)) as pool:
        stage, _ = stage_of(pool)
        callers = [asyncio.create_task(ask(pool, "select pg_sleep(60)")) for _ in range(2)]
        await until(lambda: pool.waiting == 1 and active(database))
        with pytest.raises(WorkLostError, match="1 database"):
            await timed(stage, SHORT)
        _, pending = await asyncio.wait(callers, timeout=MARGIN)

        assert not pending
        for caller in callers:
            assert isinstance(caller.exception(), asyncpg.InterfaceError | asyncpg.PostgresError)
        assert (pool.in_use, pool.waiting) == (0, 0)
        wait_until(lambda: not active(database), what="the statement ends")


async def test_idle_pool_on_a_frozen_server_closes_at_once(
    own_postgres: PostgresServer, caplog: pytest.LogCaptureFixture
) -> None:
    """No work is lost, so the stage does not wait for the budget; one line is logged."""
    leaks = LeakCheck()
    async with opened(config_of(own_postgres, pool_min=3)) as pool:
        stage, check = stage_of(pool)
        await check.check()
        own_postgres.freeze()
        try:
            took = await timed(stage, LONG)
            assert pool.total_connections == 0
            await leaks.assert_none()
        finally:
            own_postgres.thaw()

    assert took < LEAVE + MARGIN
    assert [r.getMessage() for r in caplog.records if r.getMessage() == CUT] == [CUT]


async def test_pool_in_use_on_a_frozen_server_closes_within_the_budget(
    own_postgres: PostgresServer,
) -> None:
    """The hanging statement and the running check are cut."""
    leaks = LeakCheck()
    async with opened(config_of(own_postgres, statement_timeout=60.0)) as pool:
        stage, check = stage_of(pool)
        await check.check()
        own_postgres.freeze()
        try:
            work = asyncio.create_task(use(pool))
            checking = asyncio.create_task(check.check())
            await until(lambda: pool.in_use)
            began = time.monotonic()
            with pytest.raises(WorkLostError, match="1 database"):
                await timed(stage, SHORT)
            took = time.monotonic() - began
            _, pending = await asyncio.wait({work, checking}, timeout=MARGIN)
            assert not pending
            assert work.exception() is not None
            await leaks.assert_none()
        finally:
            own_postgres.thaw()

    assert took < SHORT + MARGIN


async def test_network_that_drops_packets_is_like_a_frozen_server(
    database: Database, fault_proxy: FaultProxies
) -> None:
    """The stage ends in the same time."""
    proxy = fault_proxy(database.server.port)
    async with opened(config_of(database, through=proxy)) as pool:
        stage, _ = stage_of(pool)
        proxy.mode = BLACKHOLE
        took = await timed(stage, LONG)
        await until(lambda: not proxy.open)

    assert took < LEAVE + MARGIN


async def test_killed_server_does_not_delay_the_stage(own_postgres: PostgresServer) -> None:
    """There is no connection left to close."""
    leaks = LeakCheck()
    async with opened(config_of(own_postgres, pool_min=3)) as pool:
        stage, _ = stage_of(pool)
        own_postgres.kill()
        assert await timed(stage, LONG) < LEAVE + MARGIN
    await leaks.assert_none()


@pytest.mark.parametrize("first", ["in order", "by force"])
async def test_stage_is_idempotent(database: Database, first: str) -> None:
    """Also concurrently, and after any result of the first run."""
    async with opened(config_of(database)) as pool:
        stage, check = stage_of(pool)
        await check.check()
        if first == "by force":
            async with holding(pool):
                with pytest.raises(WorkLostError):
                    await timed(stage, SHORT)
        else:
            await asyncio.gather(timed(stage, LONG), timed(stage, LONG))

        assert await timed(stage, LONG) < MARGIN
        with pytest.raises(asyncpg.InterfaceError, match="pool is closed"):
            await use(pool)


async def test_stage_is_safe_before_opening(database: Database) -> None:
    """Later users of the pool get an error at once."""
    pool = PostgresDatabase(config_of(database, pool_timeout=60.0), clock=SystemClock())
    stage, _ = stage_of(pool)

    assert await timed(stage, LONG) < MARGIN
    async with asyncio.timeout(MARGIN):
        with pytest.raises(asyncpg.InterfaceError, match="pool is closed"):
            await use(pool)


async def test_stage_is_safe_after_a_failed_opening(database: Database) -> None:
    """As in a start that exits with 3."""
    config = changed(config_of(database), database="nowhere")
    pool = PostgresDatabase(config, clock=SystemClock())
    with pytest.raises(StartupError):
        await pool.open()
    stage, check = stage_of(pool)
    assert (await check.check()).code == "no_database"

    assert await timed(stage, LONG) < MARGIN


async def test_opening_that_finishes_after_the_stage_leaks_nothing(
    database: Database, fault_proxy: FaultProxies
) -> None:
    """A signal may arrive while the pool is opening."""
    proxy = fault_proxy(database.server.port)
    leaks = LeakCheck()
    pool = PostgresDatabase(config_of(database, through=proxy), clock=SystemClock())
    stage, _ = stage_of(pool)
    proxy.mode = BLACKHOLE
    opening = asyncio.create_task(pool.open())
    await until(lambda: proxy.open)
    await timed(stage, LONG)
    proxy.mode = PASS
    async with asyncio.timeout(5):
        await opening

    assert pool.total_connections == 0
    await until(lambda: not proxy.open)
    await leaks.assert_none()


async def test_cancelled_stage_cuts_every_connection(database: Database) -> None:
    """The sequence may cancel the stage."""
    leaks = LeakCheck()
    async with opened(config_of(database)) as pool, holding(pool):
        stage, _ = stage_of(pool)
        run = asyncio.create_task(stage(LONG))
        await asyncio.sleep(0.05)
        run.cancel()
        async with asyncio.timeout(MARGIN):
            await asyncio.wait({run})

        assert run.cancelled()
        assert pool.total_connections == 0
        await all_gone(database)
    await leaks.assert_none()
