"""Fixtures with real servers for all tests; each starts when a test asks for it."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Protocol

import pytest
from tests.servers import supply
from tests.servers.certificates import Certificates
from tests.servers.fault_proxy import FaultProxy
from tests.servers.pgbouncer import PgBouncer, Poolers
from tests.servers.pgbouncer import pgbouncer as running_pgbouncer
from tests.servers.postgres import Database, PostgresServer, postgres_server, share_folder
from tests.servers.processes import use_memory
from tests.servers.redis import RedisServer, redis_server
from tests.servers.sentinel import SentinelSetup
from tests.servers.sentinel import sentinel_setup as running_sentinels


def pytest_report_header() -> str:
    """Say what servers this run uses, so that it says what it proved."""
    try:
        return f"servers: {supply.chosen()}"
    except supply.UnavailableError as reason:
        return f"servers: none, tests that need one are skipped ({reason})"


def pytest_configure(config: pytest.Config) -> None:
    """Refuse to run without the servers that were asked for."""
    use_memory()
    if config.getoption("numprocesses", None):
        share_folder()
    if supply.asked():
        try:
            supply.chosen()
        except supply.UnavailableError as reason:
            raise pytest.UsageError(f"{supply.CHOICE}: {reason}") from None


class FaultProxies(Protocol):
    """Makes proxies that end with the test."""

    def __call__(self, port: int, *, host: str = "127.0.0.1") -> FaultProxy:
        """Put a proxy in front of a server."""


@contextmanager
def or_skip() -> Iterator[None]:
    """Skip the test when this machine cannot run what it needs.

    With VIRALFX_TEST_COMPLETE it fails instead: for who knows that the machine can.
    """
    try:
        yield
    except supply.UnavailableError as reason:
        if os.environ.get("VIRALFX_TEST_COMPLETE"):
            pytest.fail(str(reason))
        pytest.skip(str(reason))


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Return an authority, a server certificate by it, and an authority of no use."""
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """Return the Postgres of the whole run: not to be stopped, killed or frozen."""
    with or_skip(), postgres_server() as server:
        yield server


@pytest.fixture
def database(postgres: PostgresServer) -> Iterator[Database]:
    """Return an empty database on the Postgres of the whole run."""
    name = postgres.create_database()
    yield Database(postgres, name)
    postgres.drop_database(name)


@pytest.fixture
def own_postgres() -> Iterator[PostgresServer]:
    """Return a Postgres with which the test may do anything."""
    with or_skip(), postgres_server() as server:
        yield server


@pytest.fixture
def tls_postgres(certificates: Certificates) -> Iterator[PostgresServer]:
    """Return a Postgres for this test that speaks only TLS."""
    with or_skip(), postgres_server(tls=certificates) as server:
        yield server


@pytest.fixture(scope="session")
def shared_redis() -> Iterator[RedisServer]:
    """Return the Redis of the whole run; tests take ``redis``."""
    with or_skip(), redis_server() as server:
        yield server


@pytest.fixture
def redis(shared_redis: RedisServer) -> RedisServer:
    """Return the Redis of the whole run, empty: not to be stopped, killed or frozen."""
    shared_redis.flush()
    return shared_redis


@pytest.fixture
def own_redis() -> Iterator[RedisServer]:
    """Return a Redis with which the test may do anything."""
    with or_skip(), redis_server() as server:
        yield server


@pytest.fixture
def tls_redis(certificates: Certificates) -> Iterator[RedisServer]:
    """Return a Redis for this test that speaks only TLS, with a password."""
    with or_skip(), redis_server(tls=certificates, password="hush") as server:
        yield server


@pytest.fixture
def sentinel_setup() -> Iterator[SentinelSetup]:
    """Return a primary, a replica and three Sentinels for this test, with two passwords."""
    with or_skip(), running_sentinels(password="hush", sentinel_password="watch") as setup:
        yield setup


@pytest.fixture
def fault_proxy() -> Iterator[FaultProxies]:
    """Return what puts proxies in front of servers."""
    with ExitStack() as stack:

        def make(port: int, *, host: str = "127.0.0.1") -> FaultProxy:
            return stack.enter_context(FaultProxy(port, host=host))

        yield make


@contextmanager
def _poolers() -> Iterator[Poolers]:
    with ExitStack() as stack:

        def make(server: PostgresServer, mode: str, **more: object) -> PgBouncer:
            with or_skip():
                return stack.enter_context(running_pgbouncer(server, mode, **more))

        yield make


@pytest.fixture
def pgbouncer() -> Iterator[Poolers]:
    """Return what puts poolers in front of servers."""
    with _poolers() as make:
        yield make


@pytest.fixture(scope="session")
def shared_pgbouncer() -> Iterator[Poolers]:
    """Return what gives poolers of the whole run: not to be stopped, frozen or paused."""
    with _poolers() as make:
        yield cache(make)
