"""Opening the pool: attempts, what is said when it cannot be had, and what is left then."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from tests.integration.postgres_clients import Possessions, config_of, opened, sessions, until, use
from tests.manual_clock import ManualClock
from tests.servers.fault_proxy import BLACKHOLE, REFUSE
from tests.servers.fixtures import FaultProxies
from tests.servers.postgres import Database, PostgresServer

from viralfx.adapters.postgres import PostgresConfig, PostgresDatabase
from viralfx.bootstrap.postgres import postgres_config
from viralfx.domain.clock import SystemClock
from viralfx.domain.errors import StartupError
from viralfx.settings import read_settings

SECRET = "hunter2"


async def refusal(config: PostgresConfig) -> str:
    """Return what is said when the pool cannot be opened."""
    database = PostgresDatabase(config, clock=SystemClock())
    with pytest.raises(StartupError) as caught:
        await database.open()
    assert database.total_connections == 0
    assert database.failed_connections >= 1
    text = str(caught.value)
    assert "\n" not in text
    assert SECRET not in text
    return text


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "password": (
        {"password": SECRET},
        "refuses the user or password, after 1 attempt; check the user and password",
    ),
    "user": (
        {"user": "nobody", "password": SECRET},
        "refuses the user or password, after 1 attempt; check the user and password",
    ),
    "database": (
        {"database": "nowhere"},
        "has no database of that name, after 1 attempt; check the name, or create it",
    ),
    "host": (
        {"host": "nowhere.invalid"},
        "has a host name that is not known, after 1 attempt; check the host",
    ),
    "no host": (
        {"host": "a..b"},
        "has a host name that is not known, after 1 attempt; check the host",
    ),
    "folder": (
        {"host": "/nowhere"},
        "has no socket in that folder, after 1 attempt; check the folder",
    ),
    "tls": (
        {"tls_mode": "require"},
        "speaks no TLS, after 1 attempt; turn it on there, or see DB_TLS_MODE",
    ),
    "attempts": (
        {"database": "nowhere", "connect_attempts": 3},
        "has no database of that name, after 3 attempts; check the name, or create it",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
async def test_what_is_wrong_is_said(database: Database, wrong: str) -> None:
    """With the place, the variable and what to do, in one line."""
    more, text = WRONG[wrong]
    config = replace(config_of(database), **more)

    before = Possessions()

    assert await refusal(config) == f"DATABASE_URL: the database at {config.address} {text}"
    await before.as_before()


async def test_a_server_that_cannot_be_reached_is_said(
    database: Database, fault_proxy: FaultProxies
) -> None:
    """Refused at once, or without an answer within the time for a connection."""
    proxy = fault_proxy(database.server.port)
    config = config_of(database, through=proxy, connection_timeout=0.1)
    proxy.mode = REFUSE
    assert "refuses connections, after 1 attempt; check host and port" in await refusal(config)
    proxy.mode = BLACKHOLE
    assert "does not answer, after 1 attempt; look at the server" in await refusal(config)
    await until(lambda: not proxy.open)


async def test_what_is_not_allowed_is_said(database: Database) -> None:
    """An account that may not log in, not into this database, or no more often."""
    execute, name = database.execute, database.name
    execute(f"create role {name}_a nologin password '{SECRET}'")
    execute(f"create role {name}_b login password '{SECRET}'")
    execute(f"create role {name}_c login connection limit 0 password '{SECRET}'")
    execute(f"revoke connect on database {name} from public")
    config = replace(config_of(database), password=SECRET)
    try:
        for role, text in {
            "a": "does not let this user in, after 1 attempt; check user, pg_hba.conf",
            "b": "denies this user a permission, after 1 attempt; grant it",
            "c": "has no connection left, after 1 attempt; lower DB_POOL_MAX",
        }.items():
            assert text in await refusal(replace(config, user=f"{name}_{role}"))
    finally:
        for role in "abc":
            execute(f"drop role {name}_{role}")


class Between(ManualClock):
    """A clock on which something happens between two attempts, and waits are over at once."""

    def __init__(self, *happenings: Callable[[], object]) -> None:
        super().__init__()
        self.slept: list[float] = []
        self._happenings = list(happenings)

    async def sleep(self, seconds: float) -> None:
        """Let the next thing happen."""
        self.slept.append(seconds)
        if self._happenings:
            self._happenings.pop(0)()


def attempts(caplog: pytest.LogCaptureFixture) -> list[tuple[str, int, int, str]]:
    """Return the level, the number, the most and the code of each attempt that was told of."""
    return [
        (record.levelname, *map(vars(record).__getitem__, ("attempt", "attempts", "code")))
        for record in caplog.records
        if record.getMessage() == "Database connection attempt failed"
    ]


async def test_each_attempt_is_told_once(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """One line each, the delay between them, and none after the last."""
    config = config_of(database, connect_attempts=3, connect_delay=7.0)
    clock = Between()
    with pytest.raises(StartupError):
        await PostgresDatabase(replace(config, database="nowhere"), clock=clock).open()

    assert attempts(caplog) == [("WARNING", n, 3, "no_database") for n in (1, 2, 3)]
    assert [record.exc_info for record in caplog.records] == [None] * 3
    assert clock.slept == [7.0, 7.0]


async def test_a_server_that_comes_up_in_between_is_enough(
    own_postgres: PostgresServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Its port is closed at first, then it takes its time, and then it answers."""
    config = config_of(own_postgres, connect_attempts=5, connection_timeout=1.0)
    own_postgres.stop()

    def start_slowly() -> None:
        own_postgres.start()
        own_postgres.freeze()

    clock = Between(lambda: None, start_slowly, own_postgres.thaw)
    async with opened(config, clock=clock) as pool:
        await use(pool)

    codes = [code for _, _, _, code in attempts(caplog)]
    assert codes == ["refused", "refused", "timeout"]


async def test_opening_twice_is_harmless(database: Database) -> None:
    """The second time there is nothing to do."""
    async with opened(config_of(database, pool_min=2)) as pool:
        before = sessions(database)
        await pool.open()
        assert sessions(database) == before


async def test_a_pool_that_may_be_empty_is_looked_at_all_the_same(database: Database) -> None:
    """Or a wrong password would first be seen by whoever needs a connection."""
    config = config_of(database, pool_min=0)
    assert "refuses the user or password" in await refusal(replace(config, password=SECRET))
    async with opened(config) as pool:
        await use(pool)


async def test_cancellation_while_it_opens_leaves_nothing(
    database: Database, fault_proxy: FaultProxies
) -> None:
    """At any turn of the loop, in an attempt that hangs, and between two."""
    before = Possessions()
    proxy = fault_proxy(database.server.port)
    config = config_of(database, pool_min=3, connect_attempts=2, connect_delay=60.0)

    async def cut(config: PostgresConfig, at: Callable[[], Awaitable[object]]) -> None:
        pool = PostgresDatabase(config, clock=SystemClock())
        task = asyncio.create_task(pool.open())
        await at()
        task.cancel()
        async with asyncio.timeout(5):
            await asyncio.wait({task})
        pool.terminate()
        assert pool.total_connections == 0

    for turns in range(40):
        await cut(config, partial(turn, turns))
    hanging = config_of(database, through=proxy, connection_timeout=60.0)
    proxy.mode = BLACKHOLE
    await cut(hanging, partial(until, lambda: proxy.open))
    await cut(replace(config, password=SECRET), partial(asyncio.sleep, 0.1))
    proxy.close()
    await before.as_before()
    await until(lambda: not sessions(database))


async def turn(times: int) -> None:
    """Let the loop turn some times."""
    for _ in range(times):
        await asyncio.sleep(0)


@pytest.mark.parametrize("password", ["p@ss:w/o?r#d%", "100%25", " sp ace ", "ünï'\"\\"])
async def test_any_password_will_do(database: Database, password: str) -> None:
    """Percent-encoded in the address, or as it is in a variable of its own."""
    role = f"{database.name}_role"
    quoted = password.replace("'", "''")
    database.execute(f"create role {role} login password '{quoted}'")
    server = database.server
    given = (
        {"DATABASE_URL": server.url(database.name, user=role, password=password)},
        {
            "DATABASE_URL": f"postgresql://{role}@{server.host}:{server.port}/{database.name}",
            "DB_PASSWORD": password,
        },
    )
    try:
        for environ in given:
            async with opened(postgres_config(read_settings(environ))) as pool:
                await use(pool)
    finally:
        database.execute(f"drop role {role}")


@pytest.mark.parametrize("schema", ["app", "Mixed Case", 'a"b,c'])
async def test_the_schema_is_where_names_are_looked_up(database: Database, schema: str) -> None:
    """In every connection, whatever its name looks like, and after one was given back."""
    quoted = '"' + schema.replace('"', '""') + '"'
    database.execute(f"create schema {quoted}")
    database.execute(f"create table {quoted}.here (number int)")
    async with opened(config_of(database, schema=schema, pool_max=1)) as pool:
        for _ in range(2):
            async with pool.acquire() as connection:
                assert await connection.fetchval("select current_schema()") == schema
                await connection.execute("insert into here values (1)")
                await connection.execute("set search_path = pg_catalog")
