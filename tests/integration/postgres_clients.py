"""The Postgres adapter on the servers of a test, and checks for leaks."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any, Protocol
from urllib.parse import urlsplit

import msgspec
from tests.servers.postgres import Database, PostgresServer

from viralfx.adapters.postgres import PostgresHealthCheck
from viralfx.core.clock import Clock, SystemClock
from viralfx.postgres import PostgresConfig, PostgresDatabase
from viralfx.postgres.migrate import apply_migrations
from viralfx.settings import DatabaseAddress, DatabaseSettings


class Place(Protocol):
    """An address for a client: a server, or a proxy in front of one."""

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
    """Return a configuration with short timeouts for a database, or for a server's first one."""
    server = database.server if isinstance(database, Database) else database
    place = through or server
    address = DatabaseAddress(
        hosts=((place.host, place.port),),
        user=server.user,
        password=server.password,
        database=urlsplit(database.url).path[1:] if isinstance(database, Database) else "postgres",
    )
    settings = DatabaseSettings(
        tls_mode="disable",
        pool_min=1,
        pool_max=3,
        pool_timeout=5.0,
        connection_timeout=5.0,
        statement_timeout=10.0,
        slow_query_threshold=0.0,
        max_reconnect_attempts=1,
        reconnect_delay=0.01,
    )
    return changed(PostgresConfig(address=address, settings=settings), **more)


def changed(config: PostgresConfig, **more: Any) -> PostgresConfig:
    """Return a configuration with fields of its address or of its settings replaced."""
    suspect_after = more.pop("suspect_after", config.suspect_after)
    host, port = config.address.hosts[0]
    if more.keys() & {"host", "port"}:
        more["hosts"] = ((more.pop("host", host), more.pop("port", port)),)
    address = {name: more.pop(name) for name in tuple(more) if hasattr(config.address, name)}
    return PostgresConfig(
        address=replace(config.address, **address),
        settings=msgspec.structs.replace(config.settings, **more),
        suspect_after=suspect_after,
    )


@asynccontextmanager
async def opened(
    config: PostgresConfig,
    *,
    clock: Clock | None = None,
    on_suspected_outage: Callable[[], None] = lambda: None,
) -> AsyncIterator[PostgresDatabase]:
    """Open the database, and close its connections at the end.

    ``on_suspected_outage`` is set after the opening, which also triggers it.
    """
    database = PostgresDatabase(config, clock=clock or SystemClock())
    try:
        await database.open()
        database.on_suspected_outage = on_suspected_outage
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
    """Return the check of a database; it is closed at the end."""
    check = PostgresHealthCheck(database, clock or SystemClock(), timeout=within)
    try:
        yield check
    finally:
        await check.close()


def sessions(database: Database, application_name: str = "viralfx") -> list[int]:
    """Return the server's processes for clients of that name."""
    rows = database.execute(
        "select pid, application_name from pg_stat_activity where datname = current_database()"
    )
    return sorted(pid for pid, name in rows if name == application_name)


def active(database: Database) -> list[int]:
    """Return the server's processes that run a statement of the pool."""
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
    """Acquire and use a connection of the pool briefly."""
    await ask(database, "select 1")


async def all_can_be_taken(database: PostgresDatabase) -> None:
    """Acquire all connections of the pool at the same time, and use them."""
    async with AsyncExitStack() as stack:
        for _ in range(database.config.settings.pool_max):
            connection = await stack.enter_async_context(database.acquire())
            assert await connection.fetchval("select 1") == 1


class Suspicions:
    """Counts suspected outages."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> None:
        """Count one."""
        self.count += 1
