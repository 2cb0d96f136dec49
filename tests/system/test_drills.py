"""Drills of the runbook's procedures for servers that are down or busy."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import asyncpg
import pytest
from tests.servers.fixtures import or_skip
from tests.servers.postgres import PostgresServer, postgres_server
from tests.servers.redis import RedisServer, redis_server
from tests.servers.waiting import wait_until
from tests.system.drills.cluster import BACKEND, Cluster
from tests.system.drills.drill import QUICK, Drill, clients
from tests.system.workers import environment_of

# The first drill may have to fetch promtool.
pytestmark = [pytest.mark.timeout(240)]

APP = ("--app", "tests.system.drills.app:app")
SETTINGS = {
    **QUICK,
    "DB_POOL_MIN": "1",
    "DB_POOL_TIMEOUT": "1500",
    "DB_CONNECTION_TIMEOUT": "1500",
    "DB_STATEMENT_TIMEOUT": "2000",
}


@pytest.fixture(scope="module")
def database() -> Iterator[PostgresServer]:
    """Return a Postgres that these drills may break and must restore."""
    with or_skip(), postgres_server() as server:
        environment_of(server)
        server.execute("CREATE TABLE orders (number int PRIMARY KEY, seen int NOT NULL DEFAULT 0)")
        server.execute("INSERT INTO orders VALUES (1), (2)")
        yield server


@pytest.fixture(scope="module")
def cache() -> Iterator[RedisServer]:
    """Return a Redis that these drills may break and must restore."""
    with or_skip(), redis_server() as server:
        yield server


@pytest.fixture
def cluster(database: PostgresServer, cache: RedisServer, tmp_path: Path) -> Iterator[Cluster]:
    """Return a cluster without processes."""
    environment = {
        **SETTINGS,
        "DATABASE_URL": database.url(),
        "REDIS_HOST": cache.host,
        "REDIS_PORT": str(cache.port),
    }
    with Cluster(tmp_path, environment) as cluster:
        yield cluster


def at(
    cluster: Cluster, heading: str, database: PostgresServer, cache: RedisServer, **more: str
) -> Drill:
    """Begin a drill with the application and the addresses of the servers."""
    cluster.deploy(BACKEND, *APP, environment=more)
    return Drill(
        heading,
        cluster,
        DATABASE_URL=database.url(),
        REDIS_HOST=cache.host,
        REDIS_PORT=str(cache.port),
        ROUTE="/orders/1",
    )


def test_the_database_is_down(
    cluster: Cluster, database: PostgresServer, cache: RedisServer
) -> None:
    """The server is killed; starting it is the whole remedy."""
    drill = at(cluster, "ViralFXDatabaseDown", database, cache)
    (backend,) = cluster.processes(BACKEND)
    lost = "Database connection lost"
    database.kill()
    try:
        # A check that was in flight has another reason than the later ones.
        reason = wait_until(lambda: backend.logged(lost), what=lost)[0]["detail"]
        drill.show_symptom({f"{lost}: Database refuses connections": f"{lost}: {reason}"})
        drill.diagnose()
        assert drill.procedure.steps("Remedy") == []
    finally:
        database.start()
    drill.end()
    assert reason in {"Database refuses connections", "Database closed the connection"}
    assert backend.process.poll() is None
    assert len(backend.logged(lost)) == 1


def test_the_database_hangs(cluster: Cluster, database: PostgresServer, cache: RedisServer) -> None:
    """The same procedure: all commands end, with the code of the document."""
    drill = at(cluster, "ViralFXDatabaseDown", database, cache)
    hangs = {"Database refuses connections": "Database does not answer", "refused": "timeout"}
    database.freeze()
    try:
        drill.show_symptom(instead=hangs)
        asked, question = drill.procedure.steps("Diagnosis")
        drill.console.expect(asked, "timeout\n")
        assert "timeout expired" in drill.console.type(question.command)
    finally:
        database.thaw()
    drill.end()


def test_redis_is_down(cluster: Cluster, database: PostgresServer, cache: RedisServer) -> None:
    """The server is killed; the service goes on and reconnects."""
    drill = at(cluster, "ViralFXRedisDown", database, cache)
    cache.kill()
    try:
        drill.show_symptom()
        drill.diagnose()
        assert drill.console.type("curl -sm 1 $INSTANCE/cached") == '{"fallback":true}'
        assert drill.procedure.steps("Remedy") == []
    finally:
        cache.start()
    drill.end()


def test_redis_hangs(cluster: Cluster, database: PostgresServer, cache: RedisServer) -> None:
    """The same procedure; the query from another host ends without a response."""
    drill = at(cluster, "ViralFXRedisDown", database, cache)
    cache.freeze()
    try:
        drill.show_symptom(instead={"Redis refuses connections": "Redis does not answer in time"})
        asked, question = drill.procedure.steps("Diagnosis")
        assert drill.console.type(asked.command).startswith('["timeout",{"host":')
        assert drill.console.type(question.command) == ""
    finally:
        cache.thaw()
    drill.end()


def test_the_pool_is_exhausted(
    cluster: Cluster, database: PostgresServer, cache: RedisServer
) -> None:
    """More slow statements than connections exhaust it; more connections are the remedy."""
    drill = at(cluster, "ViralFXPoolExhausted", database, cache, DB_POOL_MAX="2")
    with clients(cluster.instance, "/reports/1.2", 6):
        drill.show_symptom()
        drill.diagnose()
        drill.remedy()
        drill.end()


def test_responses_are_slow(cluster: Cluster, database: PostgresServer, cache: RedisServer) -> None:
    """A transaction keeps a row locked; ending it is the remedy."""
    drill = at(cluster, "ViralFXSlowRequests", database, cache)
    with locked(database), clients(cluster.instance, "/orders/1", 3):
        drill.show_symptom()
        drill.diagnose()
        drill.remedy()
        drill.end()


@contextmanager
def locked(database: PostgresServer) -> Iterator[None]:
    """Keep a row locked in an idle transaction."""
    held, over = threading.Event(), threading.Event()

    async def hold() -> None:
        connection = await asyncpg.connect(database.url())
        await connection.execute("BEGIN")
        await connection.execute("UPDATE orders SET seen = 0 WHERE number = 1")
        held.set()
        await asyncio.to_thread(over.wait)
        connection.terminate()

    thread = threading.Thread(target=asyncio.run, args=(hold(),))
    thread.start()
    try:
        wait_until(held.is_set, what="the row is locked")
        yield
    finally:
        over.set()
        thread.join()
