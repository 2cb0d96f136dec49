"""Each variable of Postgres has an effect on real servers."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import asyncpg
import pytest
from tests.contracts.ledgers import draft
from tests.integration.postgres_clients import ask, config_of, migrated, sessions, use
from tests.manual_clock import ManualClock
from tests.servers.certificates import Certificates
from tests.servers.fault_proxy import BLACKHOLE, RESET
from tests.servers.fixtures import FaultProxies
from tests.servers.postgres import Database, PostgresServer
from tests.servers.waiting import until

from viralfx.bootstrap import assemble
from viralfx.bootstrap.postgres import postgres_config
from viralfx.core.clock import Clock
from viralfx.core.errors import StartupError
from viralfx.domain.health.check_runner import CheckCompleted
from viralfx.domain.health.model import Status
from viralfx.jobs.postgres import PostgresJobLedger
from viralfx.postgres import PoolTimeoutError, PostgresDatabase
from viralfx.settings import fields, read_settings

pytestmark = pytest.mark.timeout(60)

COVERED = {
    "DATABASE_URL",
    "POOL_PROFILE",
    "DB_PASSWORD",
    "DB_TLS_MODE",
    "DB_TLS_CA_FILE",
    "DB_SCHEMA",
    "DB_POOL_MIN",
    "DB_POOL_MAX",
    "DB_POOL_TIMEOUT",
    "DB_CONNECTION_TIMEOUT",
    "DB_STATEMENT_TIMEOUT",
    "DB_SLOW_QUERY_THRESHOLD",
    "DB_HEALTH_CHECK_INTERVAL",
    "DB_MAX_RECONNECT_ATTEMPTS",
    "DB_RECONNECT_DELAY",
}
ELSEWHERE = {
    "DATABASE_MIGRATION_URL": "test_poolers.py",
    "DATABASE_LISTEN_URL": "test_poolers.py",
    "DB_POOLER": "test_poolers.py",
    "DB_MAX_LIFETIME": "test_postgres_failover.py",
    "DB_TLS_CERT_FILE": "test_postgres_rotation.py",
    "DB_TLS_KEY_FILE": "test_postgres_rotation.py",
}
"""Variables with tests in another file, by their names or as arguments."""
ONCE = {"DB_MAX_RECONNECT_ATTEMPTS": "1"}
LATE = 10.0
"""Tolerance in seconds for a busy machine."""


def test_every_variable_has_a_test_here() -> None:
    """The test fails for a new variable without a test."""
    ours = ("DB_", "DATABASE_", "POOL_")
    text = Path(__file__).read_text(encoding="utf-8").partition("ONCE =")[2]

    assert {f.variable for f in fields() if f.variable.startswith(ours)} == COVERED | set(ELSEWHERE)
    assert {variable for variable in COVERED if variable not in text} == set()
    for variable, file in ELSEWHERE.items():
        other = Path(__file__).with_name(file).read_text(encoding="utf-8")
        argument = variable.removeprefix("DB_").lower()
        assert variable in other or f"{argument}=" in other, variable


@asynccontextmanager
async def wired(
    environ: Mapping[str, str], *, clock: Clock | None = None
) -> AsyncIterator[PostgresDatabase]:
    """Return the opened pool for an environment, wired as in the program."""
    database = assemble(read_settings(environ), clock=clock).database
    assert database is not None
    try:
        await database.open()
        yield database
    finally:
        database.terminate()


async def refusal(environ: Mapping[str, str], *, clock: Clock | None = None) -> str:
    """Return the error message for an environment without a usable pool."""
    with pytest.raises(StartupError) as caught:
        async with wired({**ONCE, **environ}, clock=clock):
            pass
    return str(caught.value)


def of(database: Database, **more: str) -> dict[str, str]:
    """Return the variables for one database."""
    return {"DATABASE_URL": database.url, **more}


# -- address and credentials -----------------------------------------------------------------


@pytest.fixture
def other(postgres: PostgresServer) -> Iterator[Database]:
    """Return another empty database on the same server."""
    name = postgres.create_database()
    yield Database(postgres, name)
    postgres.drop_database(name)


async def test_database_url(
    database: Database, other: Database, own_postgres: PostgresServer
) -> None:
    """Data goes to the named database and server, as the named user."""
    role = f"{database.name}_role"
    database.execute(f"create role {role} login password 'p:w@'")
    database.execute(f"grant create on schema public to {role}")
    url = database.server.url(database.name, user=role, password="p:w@")
    try:
        async with wired({"DATABASE_URL": url}) as pool:
            await ask(pool, "create table planted ()")
        owner = "select tableowner::text from pg_tables where tablename = 'planted'"
        assert database.execute(owner) == [(role,)]
        assert other.execute(owner) == own_postgres.execute(owner) == []
    finally:
        database.execute(f"drop owned by {role}")
        database.execute(f"drop role {role}")
    who = "select system_identifier from pg_control_system()"
    async with wired({"DATABASE_URL": own_postgres.url()}) as pool, pool.acquire() as connection:
        assert [(await connection.fetchval(who),)] == own_postgres.execute(who)
    wrong = own_postgres.url(password="wrong")
    assert "refuses the user or password" in await refusal({"DATABASE_URL": wrong})


async def test_parameters_of_database_url(database: Database) -> None:
    """Those of libpq and Prisma that correspond to a variable or a server setting."""
    parameters = "application_name=mine&schema=public&connection_limit=3&statement_timeout=250"
    async with (
        wired({"DATABASE_URL": f"{database.url}?{parameters}&pool_timeout=1"}) as pool,
        AsyncExitStack() as stack,
    ):
        connection = await stack.enter_async_context(pool.acquire())
        assert pool.config.settings.schema == "viralfx_ops"
        assert await connection.fetchval("show statement_timeout") == "250ms"
        for _ in range(2):
            await stack.enter_async_context(pool.acquire())
        assert len(sessions(database, "mine")) == 3
        began = time.monotonic()
        with pytest.raises(PoolTimeoutError, match="within 1 s"):
            await use(pool)
        assert 1 <= time.monotonic() - began < 1 + LATE
    text = await refusal({"DATABASE_URL": f"{database.url}?sslmode=require"})
    assert "does not support TLS" in text


async def test_schema(database: Database) -> None:
    """The tables are there; a schema with the name of the user, which comes first, is not used."""
    environ = {"DATABASE_URL": database.url, "DB_SCHEMA": "mine"}
    await migrated(postgres_config(read_settings(environ)))
    database.execute(f"create schema {database.server.user}")
    database.execute(f"create table {database.server.user}.viralfx_jobs (number int)")
    async with wired(environ) as pool:
        await PostgresJobLedger(pool).accept([draft()])
    assert database.execute("select count(*) from mine.viralfx_jobs") == [(1,)]


@pytest.mark.parametrize("way", ["DB_PASSWORD", "DB_PASSWORD_FILE"])
async def test_password(database: Database, tmp_path: Path, way: str) -> None:
    """Plain in the variable, or in a mounted secret."""
    role, password = f"{database.name}_role", "p:w@/?#%41"
    file = tmp_path / "password"
    file.write_text(f"{password}\n", encoding="utf-8")
    database.execute(f"create role {role} login password '{password}'")
    server = database.server
    url = f"postgresql://{role}@{server.host}:{server.port}/{database.name}"
    given = password if way == "DB_PASSWORD" else str(file)
    try:
        async with wired({"DATABASE_URL": url, way: given}) as pool:
            await use(pool)
        assert "refuses the user or password" in await refusal(
            {"DATABASE_URL": url, "DB_PASSWORD": "wrong"}
        )
    finally:
        database.execute(f"drop role {role}")


async def test_tls(tls_postgres: PostgresServer, certificates: Certificates) -> None:
    """Off, required, verified, and verified with a CA file."""
    url = {"DATABASE_URL": tls_postgres.url()}

    async def encrypted(**more: str) -> bool:
        async with wired({**url, **ONCE, **more}) as pool, pool.acquire() as connection:
            return bool(
                await connection.fetchval(
                    "select ssl from pg_stat_ssl where pid = pg_backend_pid()"
                )
            )

    assert await encrypted(DB_TLS_MODE="require")
    assert "does not admit this user" in await refusal({**url, "DB_TLS_MODE": "disable"})
    # The system does not trust the test's CA.
    unknown = {**url, "DB_TLS_MODE": "verify-full"}
    assert "cannot be trusted over TLS" in await refusal(unknown)
    assert await encrypted(DB_TLS_MODE="verify-full", DB_TLS_CA_FILE=str(certificates.ca))
    other = {**unknown, "DB_TLS_CA_FILE": str(certificates.other_ca)}
    assert "cannot be trusted over TLS" in await refusal(other)


# -- how many --------------------------------------------------------------------------------


async def hold(pool: PostgresDatabase) -> None:
    """Take a connection and keep it."""
    async with pool.acquire():
        await asyncio.Event().wait()


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, (2, 10)),
        ({"DB_POOL_MIN": "4"}, (4, 10)),
        ({"DB_POOL_MAX": "3"}, (2, 3)),
        ({"POOL_PROFILE": "small"}, (2, 10)),
        ({"POOL_PROFILE": "medium"}, (5, 20)),
        ({"POOL_PROFILE": "large"}, (10, 50)),
        # Explicit sizes override the profile.
        ({"POOL_PROFILE": "medium", "DB_POOL_MIN": "1"}, (1, 20)),
        ({"POOL_PROFILE": "large", "DB_POOL_MAX": "12"}, (10, 12)),
    ],
    ids=lambda value: ",".join(value.values()) if isinstance(value, dict) else "",
)
async def test_sizes(
    database: Database, environ: dict[str, str], expected: tuple[int, int]
) -> None:
    """The server sees the sizes of the profile in docs/operations.md, or those set."""
    (least, most), callers = expected, 60
    async with wired(of(database, DB_POOL_TIMEOUT="60000", **environ)) as pool:
        assert len(sessions(database)) == least
        holding = [asyncio.create_task(hold(pool)) for _ in range(callers)]
        try:
            await until(lambda: pool.in_use == most)
            # A connection above the maximum would be opened here.
            await asyncio.sleep(0.2)
            assert (pool.in_use, pool.waiting) == (most, callers - most)
            assert len(sessions(database)) == most
        finally:
            for holder in holding:
                holder.cancel()
            await asyncio.wait(holding)


# -- how long --------------------------------------------------------------------------------


async def test_pool_timeout(database: Database) -> None:
    """A caller waits that long for a connection."""
    environ = of(database, DB_POOL_MIN="1", DB_POOL_MAX="1", DB_POOL_TIMEOUT="150")
    async with wired(environ) as pool, pool.acquire():
        began = time.monotonic()
        with pytest.raises(PoolTimeoutError, match=r"within 0\.15 s"):
            await use(pool)

    assert 0.15 <= time.monotonic() - began < LATE


async def test_connection_timeout(database: Database, fault_proxy: FaultProxies) -> None:
    """An attempt to connect to a silent server takes that long."""
    proxy = fault_proxy(database.server.port)
    proxy.mode = BLACKHOLE
    url = database.server.url(database.name, host=proxy.host, port=proxy.port)
    began = time.monotonic()
    text = await refusal({"DATABASE_URL": url, "DB_CONNECTION_TIMEOUT": "150"})

    assert "does not answer" in text
    assert 0.15 <= time.monotonic() - began < LATE


@pytest.mark.parametrize(
    ("environ", "shown"),
    [
        ({}, "1min"),
        ({"DB_STATEMENT_TIMEOUT": "150"}, "150ms"),
        ({"DB_STATEMENT_TIMEOUT": "0"}, "0"),
    ],
)
async def test_statement_timeout(database: Database, environ: dict[str, str], shown: str) -> None:
    """The server cancels longer statements."""
    async with wired(of(database, **environ)) as pool, pool.acquire() as connection:
        assert await connection.fetchval("show statement_timeout") == shown
        if shown == "150ms":
            with pytest.raises(asyncpg.QueryCanceledError):
                await connection.execute("select pg_sleep(30)")


@pytest.mark.parametrize(
    ("environ", "seconds", "slow"),
    [
        ({}, 0.06, 0),
        ({}, 1.1, 1),
        ({"DB_SLOW_QUERY_THRESHOLD": "500"}, 0.6, 1),
        ({"DB_SLOW_QUERY_THRESHOLD": "0"}, 0.06, 0),
    ],
)
async def test_slow_query_threshold(
    database: Database,
    caplog: pytest.LogCaptureFixture,
    environ: dict[str, str],
    seconds: float,
    slow: int,
) -> None:
    """Only queries of that duration are logged and counted."""
    async with wired(of(database, **environ)) as pool:
        await ask(pool, f"select pg_sleep({seconds})")
        await asyncio.sleep(0)
        await asyncio.sleep(0)

        assert pool.slow_queries == slow
    assert [r.getMessage() for r in caplog.records if "Slow" in r.getMessage()] == (
        ["Slow query"] * slow
    )


@pytest.mark.parametrize("often", ["database", "others"])
async def test_health_check_interval(database: Database, often: str) -> None:
    """It applies to the database while it passes, and to no other check."""
    await migrated(config_of(database))
    # The second attempt is at a random moment of the interval.
    short, long = "100", "3600000"
    environ = of(
        database,
        DB_HEALTH_CHECK_INTERVAL=short if often == "database" else long,
        HEALTH_CHECK_INTERVAL=long if often == "database" else short,
    )
    seen: Counter[str] = Counter()
    assembly = assemble(read_settings(environ))
    monitor = assembly.operations.monitor
    monitor.subscribe(
        lambda event: seen.update([event.check]) if isinstance(event, CheckCompleted) else None
    )
    monitor.start()
    try:
        watched, rare = ("database", "redis") if often == "database" else ("redis", "database")
        await until(lambda: seen[watched] > 5)
        assert monitor.report().checks["database"].status is Status.PASS
        assert seen[rare] == 1
    finally:
        await monitor.stop()
        assembly.operations.shutdown.trigger("the test is over")
        await assembly.operations.shutdown.run()


class NoWaitClock(ManualClock):
    """A clock that records waits and skips them."""

    def __init__(self) -> None:
        super().__init__()
        self.slept: list[float] = []

    async def sleep(self, seconds: float) -> None:
        """Note it."""
        self.slept.append(seconds)


@pytest.mark.parametrize(
    ("environ", "attempts", "delay"),
    [
        ({}, 5, 5.0),
        ({"DB_MAX_RECONNECT_ATTEMPTS": "1"}, 1, 5.0),
        ({"DB_MAX_RECONNECT_ATTEMPTS": "3"}, 3, 5.0),
        ({"DB_RECONNECT_DELAY": "1250"}, 5, 1.25),
    ],
    ids=["default", "one", "three", "delay"],
)
async def test_attempts_and_delay(
    database: Database,
    fault_proxy: FaultProxies,
    environ: dict[str, str],
    attempts: int,
    delay: float,
) -> None:
    """Number of attempts, and the time between them."""
    proxy = fault_proxy(database.server.port)
    proxy.mode = RESET
    url = database.server.url(database.name, host=proxy.host, port=proxy.port)
    clock = NoWaitClock()
    with pytest.raises(StartupError, match=f"after {attempts} attempt"):
        async with wired({"DATABASE_URL": url, "DB_TLS_MODE": "disable", **environ}, clock=clock):
            pass

    assert proxy.accepted == attempts
    assert clock.slept == [delay] * (attempts - 1)
