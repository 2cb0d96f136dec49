"""The servers of the tests: each fault has the effect of its name."""

import asyncio
import ssl
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import redis as driver
from redis.backoff import NoBackoff
from redis.retry import Retry
from tests.servers.certificates import Certificates
from tests.servers.host import PortTakenError
from tests.servers.postgres import Database, PostgresServer, postgres_server
from tests.servers.processes import MEMORY, make_folder, use_memory
from tests.servers.redis import RedisServer, redis_host, redis_server
from tests.servers.sentinel import SentinelSetup
from tests.servers.server import Server
from tests.servers.waiting import wait_until

LONG = 10.0
SHORT = 0.5
"""Seconds; a working server needs a hundredth of it."""


async def connect(url: str, **more: Any) -> "asyncpg.Connection[asyncpg.Record]":
    """Connect to Postgres as a program does."""
    return await asyncpg.connect(url, **{"timeout": 5, **more})


@contextmanager
def client(server: RedisServer, **more: Any) -> Iterator[driver.Redis]:
    """Return a client of Redis without retries."""
    options = {"socket_timeout": SHORT, "retry": Retry(NoBackoff(), 0), **more}
    made = driver.Redis(server.host, server.port, **options)
    with closing(made):
        yield made


def test_data_of_servers_are_in_memory_and_programs_are_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An empty variable keeps both on the disk."""
    monkeypatch.setenv(MEMORY, str(tmp_path))
    folder, programs = make_folder(), make_folder(programs=True)
    monkeypatch.setenv(MEMORY, "")
    use_memory()
    on_disk = make_folder()

    assert folder.parent == tmp_path
    assert {programs.parent, on_disk.parent} == {Path(tempfile.gettempdir())}


async def test_database_is_empty_and_observable(database: Database) -> None:
    """Each test has a database of its own and can see its sessions."""
    connection = await connect(database.url)

    sessions = "select count(*) from pg_stat_activity where datname = current_database()"
    assert database.execute(sessions) == [(2,)]
    assert database.execute("select * from pg_tables where schemaname = 'public'") == []

    await connection.close()


async def test_address_is_encoded_and_its_password_is_checked(database: Database) -> None:
    """Any password can be used in an address."""
    database.execute("create role \"o'neil\" login password 'p@ss/w:rd?#%'")
    right = database.server.url(
        database.name, user="o'neil", password="p@ss/w:rd?#%", application_name="a b"
    )
    wrong = database.server.url(database.name, user="o'neil")

    connection = await connect(right)
    assert await connection.fetchval("show application_name") == "a b"
    await connection.close()
    with pytest.raises(asyncpg.InvalidPasswordError):
        await connect(wrong)

    database.execute('drop role "o\'neil"')


async def test_frozen_postgres_responds_after_the_thaw(
    own_postgres: PostgresServer,
) -> None:
    """Open and new sessions hang until then."""
    connection = await connect(own_postgres.url())

    await asyncio.to_thread(own_postgres.freeze)
    with pytest.raises(TimeoutError):
        await connect(own_postgres.url(), timeout=SHORT)
    query = asyncio.create_task(connection.fetchval("select 1"))
    done, _ = await asyncio.wait([query], timeout=SHORT)
    assert not done
    await asyncio.to_thread(own_postgres.thaw)

    assert await query == 1
    assert own_postgres.execute("select 2") == [(2,)]
    await connection.close()


@pytest.mark.parametrize("end", [PostgresServer.kill, PostgresServer.stop])
async def test_restarted_postgres_keeps_its_data(
    own_postgres: PostgresServer, end: Callable[[PostgresServer], None]
) -> None:
    """The port is closed meanwhile and the same afterwards."""
    port = own_postgres.port
    own_postgres.execute("create table kept as select 7 as x")
    connection = await connect(own_postgres.url())

    await asyncio.to_thread(end, own_postgres)
    # The type depends on how much of the end the driver has read.
    lost = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError)
    with pytest.raises(lost):
        await connection.fetchval("select 1", timeout=5)
    connection.terminate()
    with pytest.raises(ConnectionRefusedError):
        await connect(own_postgres.url())
    await asyncio.to_thread(own_postgres.start)

    assert own_postgres.port == port
    assert own_postgres.execute("select x from kept") == [(7,)]


def test_settings_are_passed_to_postgres() -> None:
    """A test can set any parameter."""
    with postgres_server(settings={"max_connections": "7", "fsync": "on"}) as server:
        assert server.execute("show max_connections") == [("7",)]
        assert server.execute("show fsync") == [("on",)]


async def test_postgres_with_tls_needs_its_ca(
    tls_postgres: PostgresServer, certificates: Certificates
) -> None:
    """A wrong CA and plain text are refused."""
    good = tls_postgres.url(sslmode="verify-full", sslrootcert=str(certificates.ca))
    wrong = tls_postgres.url(sslmode="verify-full", sslrootcert=str(certificates.other_ca))
    plain = tls_postgres.url(sslmode="disable")

    connection = await connect(good)
    encrypted = "select ssl from pg_stat_ssl where pid = pg_backend_pid()"
    assert await connection.fetchval(encrypted) is True
    await connection.close()
    with pytest.raises(ssl.SSLCertVerificationError):
        await connect(wrong)
    with pytest.raises(asyncpg.InvalidAuthorizationSpecificationError):
        await connect(plain)


def test_shared_redis_is_empty(redis: RedisServer) -> None:
    """Each test starts without keys of others."""
    assert redis.command("DBSIZE") == 0

    redis.command("SET", "left", "behind")
    assert redis.command("GET", "left") == "behind"
    redis.flush()

    assert redis.command("DBSIZE") == 0


def test_frozen_redis_responds_after_the_thaw(own_redis: RedisServer) -> None:
    """Open and new connections hang until then."""
    with client(own_redis) as one, client(own_redis) as another:
        one.set("key", "kept")

        own_redis.freeze()
        with pytest.raises(driver.TimeoutError):
            one.ping()
        with pytest.raises(driver.TimeoutError):
            another.ping()
        own_redis.thaw()

        assert one.get("key") == b"kept"


@pytest.mark.parametrize("end", [RedisServer.kill, RedisServer.stop])
def test_restarted_redis_keeps_persisted_keys(
    end: Callable[[RedisServer], None],
) -> None:
    """With the append-only file; the port is closed meanwhile."""
    with redis_server(arguments=["--appendonly", "yes", "--appendfsync", "always"]) as server:
        port = server.port
        server.command("SET", "key", "kept")

        end(server)
        with client(server) as gone, pytest.raises(driver.ConnectionError, match="refused"):
            gone.ping()
        server.start()

        assert (server.port, server.command("GET", "key")) == (port, "kept")


def test_restarted_redis_without_persistence_is_empty(own_redis: RedisServer) -> None:
    """All keys are lost."""
    own_redis.command("SET", "key", "lost")

    own_redis.restart()

    assert own_redis.command("DBSIZE") == 0


def test_redis_can_be_observed_while_loading(own_redis: RedisServer) -> None:
    """It accepts connections and refuses commands, then serves its data."""
    own_redis.command("SET", "key", "kept")

    own_redis.loading(3.0)
    with client(own_redis, socket_timeout=LONG) as early, pytest.raises(driver.BusyLoadingError):
        early.ping()

    def value() -> bytes | None:
        # It answers only between two parts of its data.
        with client(own_redis) as late:
            try:
                return late.get("key")  # type: ignore[return-value]  # also typed for asyncio
            except (driver.BusyLoadingError, driver.TimeoutError):
                return None

    assert wait_until(value, what="loaded") == b"kept"


def test_redis_has_passwords_and_users() -> None:
    """The default user has the password; another user has only its permissions."""
    line = "reader on >read-only ~public:* +get"
    with redis_server(password="hush", users=[line]) as server:
        reader = {"username": "reader", "password": "read-only"}
        with client(server) as anonymous, pytest.raises(driver.AuthenticationError):
            anonymous.ping()
        with client(server, password="wrong") as liar, pytest.raises(driver.AuthenticationError):
            liar.ping()
        with client(server, **reader) as user:
            assert user.get("public:x") is None
            with pytest.raises(driver.exceptions.NoPermissionError):
                user.set("public:x", "1")

        assert server.command("ACL", "WHOAMI") == "default"


def test_redis_with_tls_needs_its_ca(tls_redis: RedisServer, certificates: Certificates) -> None:
    """A wrong CA and plain text are refused."""
    trusting = {"ssl": True, "password": tls_redis.password}
    with client(tls_redis, ssl_ca_certs=str(certificates.ca), **trusting) as good:
        assert good.ping()
    with (
        client(tls_redis, ssl_ca_certs=str(certificates.other_ca), **trusting) as wrong,
        pytest.raises(driver.ConnectionError, match="CERTIFICATE_VERIFY_FAILED"),
    ):
        wrong.ping()
    with (
        client(tls_redis, password=tls_redis.password) as plain,
        pytest.raises((driver.ConnectionError, driver.TimeoutError)),
    ):
        plain.ping()


def test_faults_of_redis_work_behind_tls(
    tls_redis: RedisServer, certificates: Certificates
) -> None:
    """Freeze, thaw, kill and restart."""
    options = {"ssl": True, "ssl_ca_certs": str(certificates.ca), "password": tls_redis.password}
    with client(tls_redis, **options) as one:
        one.ping()

        tls_redis.freeze()
        with pytest.raises(driver.TimeoutError):
            one.ping()
        tls_redis.thaw()
        assert one.ping()
        tls_redis.kill()
        with pytest.raises(driver.ConnectionError):
            one.ping()
        with pytest.raises(driver.ConnectionError, match="refused"):
            one.ping()
        tls_redis.start()

        assert one.ping()


def test_server_moves_if_its_port_is_taken(own_redis: RedisServer) -> None:
    """Two servers with the same chosen port both start; a requested port is never changed."""
    taken = own_redis.port
    host = redis_host()
    host.port = taken

    with RedisServer(host) as other:
        assert other.port != taken
        assert other.command("PING")
    with pytest.raises(PortTakenError), redis_server(port=taken):
        pass
    own_redis.stop()
    with redis_server(port=taken) as follower:
        assert (follower.port, follower.command("PING")) == (taken, True)


def test_frozen_server_can_be_stopped(own_postgres: PostgresServer, own_redis: RedisServer) -> None:
    """No process is left, and it can be started again."""
    servers: list[Server] = [own_postgres, own_redis]
    for server in servers:
        for end in (server.kill, server.stop):
            server.freeze()
            end()
            assert server.pids == []
            server.start()

    assert own_postgres.execute("select 1") == [(1,)]
    assert own_redis.command("PING")


def test_sentinels_promote_the_replica_of_a_killed_primary(sentinel_setup: SentinelSetup) -> None:
    """It has the replicated data and accepts writes; the old primary returns as its replica."""
    before = sentinel_setup.primary_server()
    other = sentinel_setup.replica_server()
    before.command("SET", "key", "kept")
    before.command("WAIT", 1, 5000)

    assert sentinel_setup.kill_primary() is before
    after = sentinel_setup.wait_failover()

    assert after is other
    assert sentinel_setup.primary() == (other.host, other.port)
    assert after.command("GET", "key") == "kept"
    after.command("SET", "key", "new")
    before.start()
    sentinel_setup.wait_follows(before)


def test_sentinels_have_a_password_of_their_own(sentinel_setup: SentinelSetup) -> None:
    """The password of the servers is not enough."""
    sentinel = sentinel_setup.sentinel_servers[0]

    def ask(password: str | None) -> Any:
        with client(sentinel, password=password) as made:
            execute: Callable[..., Any] = made.execute_command
            return execute("SENTINEL", "GET-MASTER-ADDR-BY-NAME", sentinel_setup.name)

    host, port = sentinel_setup.primary()
    assert ask(sentinel_setup.sentinel_password) == [host.encode(), str(port).encode()]
    with pytest.raises(driver.AuthenticationError):
        ask(sentinel_setup.password)
