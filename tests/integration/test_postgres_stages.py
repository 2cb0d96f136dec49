"""Leaving a real server: in order where that can be, by force where it must, in time always."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import asyncpg
import pytest
from tests.integration.postgres_clients import (
    Possessions,
    active,
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

from viralfx.adapters.postgres import ClosePostgres, PostgresDatabase, PostgresHealthCheck
from viralfx.domain.clock import SystemClock
from viralfx.domain.errors import StartupError, WorkLostError

SHORT, LONG = 0.3, 10.0
"""Budgets in seconds: one that is used up, and one that nobody needs."""
MARGIN = 1.0
"""Seconds that a busy machine may be late."""
LEAVE = 1.0
"""Seconds in which idle connections take their leave, whatever the budget."""

CUT = "Database connections cut: the server does not answer"


def stage_of(
    pool: PostgresDatabase, check: PostgresHealthCheck | None = None
) -> tuple[ClosePostgres, PostgresHealthCheck]:
    """Return the stage that leaves a pool, and the check that it leaves with it."""
    clock = SystemClock()
    check = check or PostgresHealthCheck(pool, clock, timeout=2.0)
    return ClosePostgres(pool, check, clock), check


async def timed(stage: ClosePostgres, budget: float) -> float:
    """Run the stage; return the seconds that it took, however it ended."""
    began = time.monotonic()
    async with asyncio.timeout(budget + MARGIN):
        await stage.run(budget)
    return time.monotonic() - began


async def all_gone(database: Database) -> None:
    """Wait until the server has no connection of the pool and the check any more."""
    await until(lambda: not sessions(database) and not sessions(database, "viralfx-health"))


@asynccontextmanager
async def holding(pool: PostgresDatabase) -> AsyncIterator[asyncio.Task[None]]:
    """Return a task that took a connection and does not give it back by itself."""
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


async def test_an_idle_pool_takes_its_leave(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """Every connection is closed at once, and nothing is logged about it."""
    before = Possessions()
    async with opened(config_of(database, pool_min=3)) as pool:
        stage, _ = stage_of(pool)
        assert len(sessions(database)) == 3
        took = await timed(stage, LONG)
        assert pool.total_connections == 0
        await all_gone(database)

    assert took < MARGIN
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == []
    await before.as_before()


async def test_the_checks_own_connection_goes_with_it(database: Database) -> None:
    """Nothing of ours is left on the server."""
    async with opened(config_of(database)) as pool:
        stage, check = stage_of(pool)
        await check.check()
        assert len(sessions(database, "viralfx-health")) == 1
        await timed(stage, LONG)
        await all_gone(database)


async def test_work_that_ends_in_time_is_waited_for(database: Database) -> None:
    """It keeps its connection to the end, and the stage is not longer than the work."""
    async with opened(config_of(database)) as pool:
        stage, _ = stage_of(pool)
        work = asyncio.create_task(ask(pool, "select pg_sleep(3)"))
        await until(lambda: active(database))
        took = await timed(stage, LONG)
        await work
        await all_gone(database)

    # Longer than idle connections would have got.
    assert LEAVE < took + 0.3 < LONG


async def test_a_connection_held_beyond_the_budget_is_cut(database: Database) -> None:
    """Within the budget; that something was cut is said, with how much."""
    before = Possessions()
    async with opened(config_of(database)) as pool, holding(pool), holding(pool):
        stage, _ = stage_of(pool)
        began = time.monotonic()
        with pytest.raises(WorkLostError, match=r"^2 database connections were still in use"):
            await timed(stage, SHORT)
        took = time.monotonic() - began
        assert pool.total_connections == 0
        await all_gone(database)

    assert SHORT <= took < SHORT + MARGIN
    await before.as_before()


async def test_who_runs_a_statement_then_is_told(database: Database) -> None:
    """By the error of a lost connection, not by waiting for ever; so is who waits in the queue."""
    async with opened(config_of(database, pool_max=1, pool_timeout=60.0)) as pool:
        stage, _ = stage_of(pool)
        callers = [asyncio.create_task(ask(pool, "select pg_sleep(60)")) for _ in range(2)]
        await until(lambda: pool.waiting == 1 and active(database))
        with pytest.raises(WorkLostError, match="1 database"):
            await timed(stage, SHORT)
        _, pending = await asyncio.wait(callers, timeout=2.0)

        assert not pending
        for caller in callers:
            assert isinstance(caller.exception(), asyncpg.InterfaceError | asyncpg.PostgresError)
        assert (pool.in_use, pool.waiting) == (0, 0)
        # Who is gone is not noticed by the server before the statement ends.
        for pid in active(database):
            database.execute(f"select pg_terminate_backend({pid})")


async def test_a_frozen_server_is_left_at_once(
    own_postgres: PostgresServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody uses it, so nothing is lost: the budget is not waited for, and one line says it."""
    before = Possessions()
    async with opened(config_of(own_postgres, pool_min=3)) as pool:
        stage, check = stage_of(pool)
        await check.check()
        own_postgres.freeze()
        try:
            took = await timed(stage, LONG)
            assert pool.total_connections == 0
            await before.as_before()
        finally:
            own_postgres.thaw()

    assert took < LEAVE + MARGIN
    assert [r.getMessage() for r in caplog.records if r.getMessage() == CUT] == [CUT]


async def test_a_frozen_server_in_use_is_left_within_the_budget(
    own_postgres: PostgresServer,
) -> None:
    """The statement that does not come back is cut, with the check that asks at that moment."""
    before = Possessions()
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
            _, pending = await asyncio.wait({work, checking}, timeout=2.0)
            assert not pending
            assert work.exception() is not None
            await before.as_before()
        finally:
            own_postgres.thaw()

    assert took < SHORT + MARGIN


async def test_a_network_that_swallows_everything_does_not_matter(
    database: Database, fault_proxy: FaultProxies
) -> None:
    """It looks like a frozen server from here, and is left like one."""
    proxy = fault_proxy(database.server.port)
    async with opened(config_of(database, through=proxy)) as pool:
        stage, _ = stage_of(pool)
        proxy.mode = BLACKHOLE
        took = await timed(stage, LONG)
        await until(lambda: not proxy.open)

    assert took < LEAVE + MARGIN


async def test_a_killed_server_does_not_matter(own_postgres: PostgresServer) -> None:
    """There is nobody to take leave of."""
    before = Possessions()
    async with opened(config_of(own_postgres, pool_min=3)) as pool:
        stage, _ = stage_of(pool)
        own_postgres.kill()
        assert await timed(stage, LONG) < LEAVE + MARGIN
    await before.as_before()


@pytest.mark.parametrize("first", ["in order", "by force"])
async def test_a_second_time_there_is_nothing_to_do(database: Database, first: str) -> None:
    """Whatever the first one came to; twice at once is harmless, too."""
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


async def test_before_anything_was_opened(database: Database) -> None:
    """Nothing to do, and who uses the pool afterwards is told without waiting."""
    pool = PostgresDatabase(config_of(database, pool_timeout=60.0), clock=SystemClock())
    stage, _ = stage_of(pool)

    assert await timed(stage, LONG) < MARGIN
    async with asyncio.timeout(MARGIN):
        with pytest.raises(asyncpg.InterfaceError, match="pool is closed"):
            await use(pool)


async def test_after_an_opening_that_failed(database: Database) -> None:
    """As a start that ends with 3 does."""
    config = replace(config_of(database), database="nowhere")
    pool = PostgresDatabase(config, clock=SystemClock())
    with pytest.raises(StartupError):
        await pool.open()
    stage, check = stage_of(pool)
    assert (await check.check()).code == "no_database"

    assert await timed(stage, LONG) < MARGIN


async def test_an_opening_that_comes_too_late_leaves_nothing(
    database: Database, fault_proxy: FaultProxies
) -> None:
    """A signal may come while the pool is being opened, and the stage then has none to close."""
    proxy = fault_proxy(database.server.port)
    before = Possessions()
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
    await before.as_before()


async def test_cut_off_it_cuts_everything(database: Database) -> None:
    """The sequence may end it early; no connection survives that."""
    before = Possessions()
    async with opened(config_of(database)) as pool, holding(pool):
        stage, _ = stage_of(pool)
        run = asyncio.create_task(stage.run(LONG))
        await asyncio.sleep(0.05)
        run.cancel()
        async with asyncio.timeout(MARGIN):
            await asyncio.wait({run})

        assert run.cancelled()
        assert pool.total_connections == 0
        await all_gone(database)
    await before.as_before()
