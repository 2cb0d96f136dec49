"""Opening the pool: attempts, error messages, and clean-up."""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import pytest
from tests.integration.leaks import LeakCheck
from tests.integration.postgres_clients import changed, config_of, opened, sessions, use
from tests.manual_clock import ManualClock
from tests.servers.fault_proxy import BLACKHOLE, REFUSE
from tests.servers.fixtures import FaultProxies
from tests.servers.postgres import Database, PostgresServer
from tests.servers.waiting import until

from viralfx.bootstrap.postgres import postgres_config
from viralfx.core.clock import SystemClock
from viralfx.core.errors import StartupError
from viralfx.postgres import PostgresConfig, PostgresDatabase
from viralfx.settings import read_settings

SECRET = "hunter2"


async def refusal(config: PostgresConfig) -> str:
    """Return the error message of a failed opening."""
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
        "has an unknown host name, after 1 attempt; check the host",
    ),
    "no host": (
        {"host": "a..b"},
        "has an unknown host name, after 1 attempt; check the host",
    ),
    "folder": (
        {"host": "/nowhere"},
        "has no socket in that folder, after 1 attempt; check the folder",
    ),
    "tls": (
        {"tls_mode": "require"},
        "does not support TLS, after 1 attempt; enable TLS on the server, or see DB_TLS_MODE",
    ),
    "attempts": (
        {"database": "nowhere", "max_reconnect_attempts": 3},
        "has no database of that name, after 3 attempts; check the name, or create it",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
async def test_error_names_problem_variable_and_remedy(database: Database, wrong: str) -> None:
    """In one line."""
    more, text = WRONG[wrong]
    config = changed(config_of(database), **more)

    leaks = LeakCheck()

    assert await refusal(config) == f"DATABASE_URL: the database at {config.address} {text}"
    await leaks.assert_none()


async def test_unreachable_server_is_named(database: Database, fault_proxy: FaultProxies) -> None:
    """It refuses at once, or does not respond within the connection timeout."""
    proxy = fault_proxy(database.server.port)
    config = config_of(database, through=proxy, connection_timeout=0.1)
    proxy.mode = REFUSE
    assert "refuses connections, after 1 attempt; check host and port" in await refusal(config)
    proxy.mode = BLACKHOLE
    assert "does not answer, after 1 attempt; check the server" in await refusal(config)
    await until(lambda: not proxy.open)


async def test_missing_permission_is_named(database: Database) -> None:
    """The role may not log in, may not use the database, or has no connection left."""
    execute, name = database.execute, database.name
    execute(f"create role {name}_a nologin password '{SECRET}'")
    execute(f"create role {name}_b login password '{SECRET}'")
    execute(f"create role {name}_c login connection limit 0 password '{SECRET}'")
    execute(f"revoke connect on database {name} from public")
    config = changed(config_of(database), password=SECRET)
    try:
        for role, text in {
            "a": "does not admit this user, after 1 attempt; check user, pg_hba.conf",
            "b": "denies this user a permission, after 1 attempt; grant it",
            "c": "has no connection left, after 1 attempt; lower DB_POOL_MAX",
        }.items():
            assert text in await refusal(changed(config, user=f"{name}_{role}"))
    finally:
        for role in "abc":
            execute(f"drop role {name}_{role}")


class Between(ManualClock):
    """A clock that runs a hook between two attempts and skips waits."""

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
    """Return level, number, maximum and code of each logged attempt."""
    return [
        (record.levelname, *map(vars(record).__getitem__, ("attempt", "attempts", "code")))
        for record in caplog.records
        if record.getMessage() == "Database connection attempt failed"
    ]


async def test_each_attempt_is_logged_once(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """The delay separates them; there is none after the last."""
    config = config_of(database, max_reconnect_attempts=3, reconnect_delay=7.0)
    clock = Between()
    with pytest.raises(StartupError):
        await PostgresDatabase(changed(config, database="nowhere"), clock=clock).open()

    assert attempts(caplog) == [("WARNING", n, 3, "no_database") for n in (1, 2, 3)]
    assert [record.exc_info for record in caplog.records] == [None] * 3
    assert clock.slept == [7.0, 7.0]


async def test_server_that_starts_between_attempts_is_used(
    own_postgres: PostgresServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Its port is closed first, then it is starting, then it responds."""
    config = config_of(own_postgres, max_reconnect_attempts=5, connection_timeout=1.0)
    own_postgres.stop()

    def start_slowly() -> None:
        own_postgres.start()
        own_postgres.freeze()

    clock = Between(lambda: None, start_slowly, own_postgres.thaw)
    async with opened(config, clock=clock) as pool:
        await use(pool)

    codes = [code for _, _, _, code in attempts(caplog)]
    assert codes == ["refused", "refused", "timeout"]


async def test_opening_is_idempotent(database: Database) -> None:
    """The second call does nothing."""
    async with opened(config_of(database, pool_min=2)) as pool:
        before = sessions(database)
        await pool.open()
        assert sessions(database) == before


async def test_opening_a_pool_without_a_minimum_tests_the_connection(database: Database) -> None:
    """A wrong password fails at start-up and not at the first use."""
    config = config_of(database, pool_min=0)
    assert "refuses the user or password" in await refusal(changed(config, password=SECRET))
    async with opened(config) as pool:
        await use(pool)


async def test_cancelled_opening_leaks_nothing(
    database: Database, fault_proxy: FaultProxies
) -> None:
    """At any await, in a hanging attempt, and between two attempts."""
    leaks = LeakCheck()
    proxy = fault_proxy(database.server.port)
    config = config_of(database, pool_min=3, max_reconnect_attempts=2, reconnect_delay=60.0)

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
    await cut(changed(config, password=SECRET), partial(asyncio.sleep, 0.1))
    proxy.close()
    await leaks.assert_none()
    await until(lambda: not sessions(database))


async def turn(times: int) -> None:
    """Let the loop turn some times."""
    for _ in range(times):
        await asyncio.sleep(0)


@pytest.mark.parametrize("password", ["p@ss:w/o?r#d%", "100%25", " sp ace ", "ünï'\"\\"])
async def test_any_password_works(database: Database, password: str) -> None:
    """Percent-encoded in the address, or plain in its own variable."""
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
