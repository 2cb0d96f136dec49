"""Each variable ``REDIS_*`` has an effect on real servers."""

from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
from tests.servers.certificates import Certificates
from tests.servers.redis import RedisServer, redis_server
from tests.servers.sentinel import SentinelSetup
from tests.servers.supply import Tier, chosen

from viralfx.adapters.redis import RedisClient
from viralfx.bootstrap import assemble
from viralfx.domain.health.model import Observation, Status
from viralfx.settings import fields, read_settings

pytestmark = pytest.mark.timeout(60)

COVERED = {
    "REDIS_HOST",
    "REDIS_PORT",
    "REDIS_SOCKET",
    "REDIS_URL",
    "REDIS_USERNAME",
    "REDIS_PASSWORD",
    "REDIS_DB",
    "REDIS_SENTINEL_ENABLED",
    "REDIS_SENTINELS",
    "REDIS_SENTINEL_NAME",
    "REDIS_SENTINEL_USERNAME",
    "REDIS_SENTINEL_PASSWORD",
    "REDIS_TLS_ENABLED",
    "REDIS_TLS_REJECT_UNAUTHORIZED",
    "REDIS_TLS_CA_FILE",
}


def test_every_variable_has_a_test_here() -> None:
    """The test fails for a new variable without a test."""
    assert {f.variable for f in fields() if f.variable.startswith("REDIS_")} == COVERED


@asynccontextmanager
async def wired(environ: Mapping[str, str]) -> AsyncIterator[RedisClient]:
    """Return the client for an environment, wired as in the program."""
    redis = assemble(read_settings(environ)).redis
    assert redis is not None
    try:
        yield redis
    finally:
        await redis.close()


async def seen(environ: Mapping[str, str]) -> Observation:
    """Return the result of the health check for an environment."""
    assembly = assemble(read_settings({**environ, "HEALTH_CHECK_TIMEOUT": "3000"}))
    assert assembly.redis is not None
    monitor = assembly.operations.monitor
    try:
        monitor.start()
        report = (await monitor.refresh()).checks["redis"]
    finally:
        await monitor.stop()
        await assembly.redis.close()
    return Observation(
        status=report.status, message=report.message, details=report.details, code=report.code
    )


def plain(server: RedisServer, **more: str) -> dict[str, str]:
    """Return the variables for one server."""
    return {"REDIS_HOST": server.host, "REDIS_PORT": str(server.port), **more}


def sentinels(setup: SentinelSetup, **more: str) -> dict[str, str]:
    """Return the variables for a setup with Sentinels."""
    return {
        "REDIS_SENTINEL_ENABLED": "true",
        "REDIS_SENTINELS": ",".join(f"{host}:{port}" for host, port in setup.sentinels),
        "REDIS_SENTINEL_NAME": setup.name,
        "REDIS_PASSWORD": str(setup.password),
        "REDIS_SENTINEL_PASSWORD": str(setup.sentinel_password),
        **more,
    }


async def test_host_and_port(own_redis: RedisServer, redis: RedisServer) -> None:
    """Data goes to that server."""
    async with wired(plain(own_redis)) as client:
        await client.redis.set("planted", "here")

    assert own_redis.command("GET", "planted") == "here"
    assert redis.command("GET", "planted") is None
    assert (await seen(plain(own_redis, REDIS_HOST="nosuch.invalid"))).code == "unreachable"


async def test_url() -> None:
    """It has all in one; a variable that is set wins."""
    with with_user() as server:
        url = f"redis://alice:secret@{server.host}:{server.port}/3"
        async with wired({"REDIS_URL": url}) as client:
            await client.redis.set("planted", "here")
            assert await client.redis.acl_whoami() == "alice"
        wrong = await seen({"REDIS_URL": url, "REDIS_PASSWORD": "wrong"})

        assert "db3" in server.command("INFO", "keyspace")
        assert wrong.code == "auth"


async def test_socket() -> None:
    """Data goes through it, with the password; the check has its path, and port 0."""
    if chosen().tier is Tier.DOCKER:
        pytest.skip("a container keeps its socket to itself")
    arguments = ["--unixsocket", "redis.sock", "--unixsocketperm", "777"]
    with redis_server(password="hush", arguments=arguments) as server:
        path = str(Path(server.command("CONFIG", "GET", "dir")[1]) / "redis.sock")
        environ = {"REDIS_SOCKET": path, "REDIS_PASSWORD": "hush", "REDIS_DB": "3"}
        async with wired(environ) as client:
            await client.redis.set("planted", "here")
        observation = await seen(environ)
        missing = await seen({"REDIS_SOCKET": f"{path}.missing"})

        assert "db3" in server.command("INFO", "keyspace")
        assert observation.status is Status.PASS
        assert isinstance(observation.details, Mapping)
        assert observation.details["config"] == {"host": path, "port": 0, "db": 3}
        assert missing.code == "unreachable"


async def test_db(redis: RedisServer) -> None:
    """Data goes to that database."""
    async with wired(plain(redis, REDIS_DB="3")) as client:
        await client.redis.set("planted", "three")

    assert redis.command("GET", "planted") is None
    assert "db3" in redis.command("INFO", "keyspace")


@contextmanager
def with_user() -> Iterator[RedisServer]:
    """Run a Redis that has a second user."""
    with redis_server(password="hush", users=["alice on >secret ~* +@all"]) as server:
        yield server


async def test_username_and_password() -> None:
    """The default user and another user have passwords of their own."""
    with with_user() as server:
        assert (await seen(plain(server))).code == "auth"
        assert (await seen(plain(server, REDIS_PASSWORD="wrong"))).code == "auth"
        assert (await seen(plain(server, REDIS_PASSWORD="hush"))).status is Status.PASS
        alice = plain(server, REDIS_USERNAME="alice", REDIS_PASSWORD="secret")
        assert (await seen(alice)).status is Status.PASS
        async with wired(alice) as client:
            assert await client.redis.acl_whoami() == "alice"


async def test_password_from_a_file(tmp_path: Path) -> None:
    """For example a mounted secret."""
    (tmp_path / "password").write_text("hush\n")
    with with_user() as server:
        environ = plain(server, REDIS_PASSWORD_FILE=str(tmp_path / "password"))
        assert (await seen(environ)).status is Status.PASS


async def test_sentinel(sentinel_setup: SentinelSetup) -> None:
    """If enabled, the Sentinels provide the address, and REDIS_HOST is ignored."""
    primary = sentinel_setup.primary_server()
    environ = sentinels(sentinel_setup, REDIS_HOST="nosuch.invalid")
    observation = await seen(environ)

    assert observation.status is Status.PASS
    assert isinstance(observation.details, Mapping)
    assert observation.details["config"] == {"host": primary.host, "port": primary.port, "db": 0}
    off = await seen({**environ, "REDIS_SENTINEL_ENABLED": "false"})
    assert off.code == "unreachable"


@pytest.mark.parametrize(
    "wrong",
    [
        {"REDIS_SENTINELS": "127.0.0.1:1"},
        {"REDIS_SENTINEL_NAME": "another"},
        {"REDIS_SENTINEL_PASSWORD": "wrong"},
        {"REDIS_SENTINEL_USERNAME": "nobody"},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
async def test_each_sentinel_setting_matters(
    sentinel_setup: SentinelSetup, wrong: dict[str, str]
) -> None:
    """With one of them wrong the primary is not found."""
    assert (await seen(sentinels(sentinel_setup))).status is Status.PASS
    assert (await seen(sentinels(sentinel_setup, **wrong))).status is Status.FAIL


async def test_tls(tls_redis: RedisServer, certificates: Certificates) -> None:
    """Enabled, verified, and verified with a CA file; each switch by itself."""
    environ = plain(tls_redis, REDIS_PASSWORD=str(tls_redis.password))
    trusted = {**environ, "REDIS_TLS_ENABLED": "true", "REDIS_TLS_CA_FILE": str(certificates.ca)}

    assert (await seen(environ)).status is Status.FAIL
    assert (await seen(trusted)).status is Status.PASS
    other = {**trusted, "REDIS_TLS_CA_FILE": str(certificates.other_ca)}
    assert (await seen(other)).code == "tls"
    assert (await seen({**other, "REDIS_TLS_REJECT_UNAUTHORIZED": "false"})).status is Status.PASS


async def test_there_is_no_fallback_to_plain_text(redis: RedisServer) -> None:
    """A server without TLS gets a TLS greeting and nothing else."""
    redis.command("CONFIG", "RESETSTAT")
    observation = await seen(plain(redis, REDIS_TLS_ENABLED="true"))

    assert observation.status is Status.FAIL
    assert observation.code == "tls"
    assert "cmdstat_ping" not in redis.command("INFO", "commandstats")
