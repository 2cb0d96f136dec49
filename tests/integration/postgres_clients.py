"""The Postgres adapter on the servers of a test, and what it must not leave behind."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any, Protocol
from urllib.parse import urlsplit

import psutil
from tests.servers.postgres import Database, PostgresServer

from viralfx.adapters.postgres import PostgresConfig, PostgresDatabase, PostgresHealthCheck
from viralfx.adapters.postgres.migrate import apply_migrations
from viralfx.domain.clock import Clock, SystemClock
from viralfx.domain.health import Observation


class Place(Protocol):
    """Where a client connects to: a server, or a proxy in front of one."""

    @property
    def host(self) -> str:
        """Its address."""
        ...

    @property
    def port(self) -> int:
        """Its port."""
        ...


def config_of(
    database: Database | PostgresServer, *, through: Place | None = None, **more: Any
) -> PostgresConfig:
    """Return how to reach a database, or the first one of a server, in little time."""
    server = database.server if isinstance(database, Database) else database
    place = through or server
    quick = PostgresConfig(
        host=place.host,
        port=place.port,
        user=server.user,
        password=server.password,
        database=urlsplit(database.url).path[1:] if isinstance(database, Database) else "postgres",
        tls_mode="disable",
        pool_min=1,
        pool_max=3,
        pool_timeout=5.0,
        connection_timeout=5.0,
        statement_timeout=10.0,
        slow_query_threshold=0.0,
        connect_attempts=1,
        connect_delay=0.01,
    )
    return replace(quick, **more)


@asynccontextmanager
async def opened(
    config: PostgresConfig,
    *,
    clock: Clock | None = None,
    on_doubt: Callable[[], None] = lambda: None,
) -> AsyncIterator[PostgresDatabase]:
    """Return the database, open; what is left of it at the end is cut.

    Doubts count from here: that it was opened is one, too.
    """
    database = PostgresDatabase(config, clock=clock or SystemClock())
    try:
        await database.open()
        database.on_doubt = on_doubt
        yield database
    finally:
        database.terminate()
        # A connection that was still being made closes its socket in one of the next turns. Left
        # open in a loop that has stopped, half way through its login, it would hold up the server
        # in dropping any database.
        for _ in range(10):
            await asyncio.sleep(0)


async def migrated(config: PostgresConfig) -> PostgresConfig:
    """Apply the migrations; return the configuration."""
    await apply_migrations(config)
    return config


@asynccontextmanager
async def checked(
    database: PostgresDatabase, *, clock: Clock | None = None, within: float = 2.0
) -> AsyncIterator[PostgresHealthCheck]:
    """Return the check of a database, closed at the end."""
    check = PostgresHealthCheck(database, clock or SystemClock(), timeout=within)
    try:
        yield check
    finally:
        await check.close()


async def seen(check: PostgresHealthCheck, code: str | None, *, seconds: float = 10) -> Observation:
    """Check until the code is seen."""
    async with asyncio.timeout(seconds):
        while True:
            if (observation := await check.check()).code == code:
                return observation
            await asyncio.sleep(0.01)


async def until(look: Callable[[], object], *, seconds: float = 10.0) -> None:
    """Wait until what is looked at is true; fail when it is not in time."""
    async with asyncio.timeout(seconds):
        while True:
            if look():
                return
            await asyncio.sleep(0.005)


def sessions(database: Database, application_name: str = "viralfx") -> list[int]:
    """Return the server's processes for clients of that name."""
    rows = database.execute(
        "select pid, application_name from pg_stat_activity where datname = current_database()"
    )
    return sorted(pid for pid, name in rows if name == application_name)


def active(database: Database) -> list[int]:
    """Return the server's processes that run a statement of the pool's."""
    rows = database.execute(
        "select pid from pg_stat_activity where datname = current_database()"
        " and application_name = 'viralfx' and state = 'active'"
    )
    return [pid for (pid,) in rows]


async def ask(database: PostgresDatabase, statement: str) -> None:
    """Run one statement on a connection of the pool."""
    async with database.acquire() as connection:
        await connection.execute(statement)


async def use(database: PostgresDatabase) -> None:
    """Use a connection of the pool as shortly as possible."""
    await ask(database, "select 1")


async def all_can_be_taken(database: PostgresDatabase) -> None:
    """Take every connection that there may be at once, and use it."""
    async with AsyncExitStack() as stack:
        for _ in range(database.config.pool_max):
            connection = await stack.enter_async_context(database.acquire())
            assert await connection.fetchval("select 1") == 1


class Doubts:
    """Counts how often a check was asked for."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> None:
        """Ask for one."""
        self.count += 1


class Possessions:
    """The open files and the tasks of this process, compared with those at the beginning."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._files, self._tasks = self._process.num_fds(), asyncio.all_tasks()

    async def as_before(self) -> None:
        """Wait until there is nothing more; fail when that does not come."""
        try:
            await until(lambda: not self._more())
        except TimeoutError:
            raise AssertionError(f"left behind: {self._more()}") from None

    def _more(self) -> str:
        files = self._process.num_fds() - self._files
        tasks = asyncio.all_tasks() - self._tasks
        return f"{files} files, {tasks}" if files > 0 or tasks else ""
