"""Each variable ``REDIS_*`` has an effect on real servers: ignored, its test fails."""

from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
from tests.servers.certificates import Certificates
from tests.servers.redis import RedisServer, redis_server
from tests.servers.sentinel import SentinelSetup

from viralfx.adapters.redis import RedisClient
from viralfx.bootstrap import assemble
from viralfx.domain.health import Observation, Status
from viralfx.settings import fields, read_settings

pytestmark = pytest.mark.timeout(60)

COVERED = {
    "REDIS_HOST",
    "REDIS_PORT",
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
    """A new variable needs one."""
    assert {f.variable for f in fields() if f.variable.startswith("REDIS_")} == COVERED


@asynccontextmanager
async def wired(environ: Mapping[str, str]) -> AsyncIterator[RedisClient]:
    """Return the client that the variables make, as the program wires it."""
    redis = assemble(read_settings(environ)).redis
    assert redis is not None
    try:
        yield redis
    finally:
        await redis.close()


async def seen(environ: Mapping[str, str]) -> Observation:
    """Return what the health check says that the variables make."""
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
    """Return the variables for a set-up with Sentinels."""
    return {
        "REDIS_SENTINEL_ENABLED": "true",
        "REDIS_SENTINELS": ",".join(f"{host}:{port}" for host, port in setup.sentinels),
        "REDIS_SENTINEL_NAME": setup.name,
        "REDIS_PASSWORD": str(setup.password),
        "REDIS_SENTINEL_PASSWORD": str(setup.sentinel_password),
        **more,
    }


async def test_host_and_port(own_redis: RedisServer, redis: RedisServer) -> None:
    """What is written is there, and not on another server."""
    async with wired(plain(own_redis)) as client:
        await client.redis.set("planted", "here")

    assert own_redis.command("GET", "planted") == "here"
    assert redis.command("GET", "planted") is None
    assert (await seen(plain(own_redis, REDIS_HOST="nosuch.invalid"))).code == "unreachable"


async def test_db(redis: RedisServer) -> None:
    """What is written is in that database."""
    async with wired(plain(redis, REDIS_DB="3")) as client:
        await client.redis.set("planted", "three")

    assert redis.command("GET", "planted") is None
    assert "db3" in redis.command("INFO", "keyspace")


@contextmanager
def with_user() -> Iterator[RedisServer]:
    """Run a Redis that has a user beside the default one."""
    with redis_server(password="hush", users=["alice on >secret ~* +@all"]) as server:
        yield server


async def test_username_and_password() -> None:
    """The default user needs the one password, another user its own."""
    with with_user() as server:
        assert (await seen(plain(server))).code == "auth"
        assert (await seen(plain(server, REDIS_PASSWORD="wrong"))).code == "auth"
        assert (await seen(plain(server, REDIS_PASSWORD="hush"))).status is Status.PASS
        alice = plain(server, REDIS_USERNAME="alice", REDIS_PASSWORD="secret")
        assert (await seen(alice)).status is Status.PASS
        async with wired(alice) as client:
            assert await client.redis.acl_whoami() == "alice"


async def test_password_from_a_file(tmp_path: Path) -> None:
    """As a mounted secret has it."""
    (tmp_path / "password").write_text("hush\n")
    with with_user() as server:
        environ = plain(server, REDIS_PASSWORD_FILE=str(tmp_path / "password"))
        assert (await seen(environ)).status is Status.PASS


async def test_sentinel(sentinel_setup: SentinelSetup) -> None:
    """Enabled, the Sentinels say where the primary is, whatever REDIS_HOST says."""
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
async def test_sentinel_settings_count(
    sentinel_setup: SentinelSetup, wrong: dict[str, str]
) -> None:
    """With one of them wrong the primary is not found."""
    assert (await seen(sentinels(sentinel_setup))).status is Status.PASS
    assert (await seen(sentinels(sentinel_setup, **wrong))).status is Status.FAIL


async def test_tls(tls_redis: RedisServer, certificates: Certificates) -> None:
    """Asked for, verified, by the authority that is named; each switch by itself."""
    environ = plain(tls_redis, REDIS_PASSWORD=str(tls_redis.password))
    trusted = {**environ, "REDIS_TLS_ENABLED": "true", "REDIS_TLS_CA_FILE": str(certificates.ca)}

    assert (await seen(environ)).status is Status.FAIL
    assert (await seen(trusted)).status is Status.PASS
    other = {**trusted, "REDIS_TLS_CA_FILE": str(certificates.other_ca)}
    assert (await seen(other)).code == "tls"
    assert (await seen({**other, "REDIS_TLS_REJECT_UNAUTHORIZED": "false"})).status is Status.PASS


async def test_tls_is_never_left_out(redis: RedisServer) -> None:
    """A server that speaks none waits for more of what it does not understand; that is all."""
    redis.command("CONFIG", "RESETSTAT")
    observation = await seen(plain(redis, REDIS_TLS_ENABLED="true"))

    assert observation.status is Status.FAIL
    assert observation.code == "tls"
    assert "cmdstat_ping" not in redis.command("INFO", "commandstats")
