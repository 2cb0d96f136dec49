"""Credentials, certificates and addresses of Redis that change while the client runs."""

import asyncio
import socket
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import trustme
from redis import exceptions
from tests.integration.redis_clients import addresses_of, check_of, config_of, opened_with, within
from tests.servers.certificates import NAMES, Certificates
from tests.servers.fault_proxy import PASS, RESET, FaultProxy
from tests.servers.redis import RedisServer, redis_server
from tests.servers.sentinel import SentinelSetup
from tests.servers.waiting import wait_for_code

from viralfx.adapters.redis import RedisClient, RedisLimits
from viralfx.domain.health.model import Status
from viralfx.settings import CredentialsCallable, RedisSettings, Secret, read_settings
from viralfx.settings.rotation import READ_INTERVAL_SECONDS

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def server() -> Iterator[RedisServer]:
    """Return a Redis with a password, and a user with another."""
    with redis_server(password="one-one", users=["alice on >alice-one ~* +@all"]) as running:
        yield running


def change_password(server: RedisServer, password: str) -> None:
    """Change the password and end every connection."""
    server.command("CONFIG", "SET", "requirepass", password)
    server.password = password
    server.command("CLIENT", "KILL", "TYPE", "normal")


def in_file(server: RedisServer, folder: Path) -> tuple[RedisSettings, Path]:
    """Return settings whose password is in a file, and the file."""
    path = folder / "password"
    path.write_text(f"{server.password}\n")
    password = Secret(str(server.password), file=str(path))
    return RedisSettings(host=server.host, port=server.port, password=password), path


async def test_password_in_a_file_is_read_again(server: RedisServer, tmp_path: Path) -> None:
    """All connections end, and the next request finds the new password at once."""
    settings, path = in_file(server, tmp_path)
    client = RedisClient(settings)
    check = check_of(client)
    try:
        assert await client.redis.set("key", "value") is True
        assert (await check.check()).code is None
        path.write_text("two-two\n")
        change_password(server, "two-two")

        assert await within(1.0, client.redis.get("key")) == b"value"
        assert (await check.check()).code is None
        assert client.traffic.failed == 0
    finally:
        await client.close()


async def test_file_may_change_after_the_server(server: RedisServer, tmp_path: Path) -> None:
    """Meanwhile requests get their fallback; then the next check finds the new password."""
    settings, path = in_file(server, tmp_path)
    client = RedisClient(settings)
    check = check_of(client)
    try:
        await client.redis.set("key", "value")
        change_password(server, "two-two")
        observation = await check.check()
        fallback = await client.get_with_graceful_degradation(
            lambda: client.redis.get("key"), "fallback"
        )
        path.write_text("two-two\n")

        assert (observation.status, observation.code) == (Status.FAIL, "auth")
        assert fallback == "fallback"
        assert (await check.check()).code is None
        assert await client.redis.get("key") == b"value"
    finally:
        await client.close()


@pytest.mark.parametrize("form", ["password", "user and password", "async"])
async def test_callable_is_asked_for_each_connection(server: RedisServer, form: str) -> None:
    """It wins over the settings, and may name the user."""
    current = {"alice": "alice-one", "default": "one-one"}

    async def coroutine() -> tuple[str, str]:
        return "alice", current["alice"]

    forms: dict[str, CredentialsCallable] = {
        "password": lambda: current["default"],
        "user and password": lambda: ("alice", current["alice"]),
        "async": coroutine,
    }
    settings = RedisSettings(host=server.host, port=server.port, password=Secret("stale"))
    client = RedisClient(settings, credentials=forms[form])
    try:
        before = await client.redis.acl_whoami()
        server.command("ACL", "SETUSER", "alice", "resetpass", ">alice-two")
        current.update({"alice": "alice-two", "default": "two-two"})
        change_password(server, "two-two")

        assert await client.redis.acl_whoami() == before
        assert (await check_of(client).check()).code is None
    finally:
        await client.close()


async def test_callable_is_asked_once_more_after_a_refused_login(server: RedisServer) -> None:
    """A token may expire between the call and the login; the same one is not tried twice."""
    tokens = iter(["expired", "one-one", "wrong", "wrong", "one-one"])
    settings = RedisSettings(host=server.host, port=server.port)
    client = RedisClient(settings, credentials=lambda: next(tokens))
    try:
        assert await within(5.0, client.redis.set("key", "value")) is True
        server.command("CLIENT", "KILL", "TYPE", "normal")
        assert (await check_of(client).check()).code == "auth"

        assert (await check_of(client).check()).code is None
        assert next(tokens, None) is None
    finally:
        await client.close()


async def test_failing_callable_is_called_once_for_a_connection(server: RedisServer) -> None:
    """It gave nothing that the server could refuse."""
    calls = 0

    def fails() -> str:
        nonlocal calls
        calls += 1
        raise FileNotFoundError

    client = RedisClient(RedisSettings(host=server.host, port=server.port), credentials=fails)
    try:
        assert (await check_of(client).check()).code == "auth"
        assert calls == 1
    finally:
        await client.close()


async def test_failing_callable_is_named(server: RedisServer) -> None:
    """The check has the code ``auth``, without the text of the error."""

    def fails() -> str:
        raise FileNotFoundError("planted-secret")

    settings = RedisSettings(host=server.host, port=server.port)
    client = RedisClient(settings, credentials=fails)
    try:
        observation = await check_of(client).check()
        with pytest.raises(exceptions.AuthenticationError):
            await within(1.0, client.redis.get("key"))

        assert observation.code == "auth"
        assert "OperationsConfig.redis_credentials: " in observation.message
        assert "planted-secret" not in observation.message
    finally:
        await client.close()


async def test_address_in_a_file_is_read_again(
    server: RedisServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its user and password are used; a text that is no address is not."""
    path = tmp_path / "url"
    path.write_text(server.url())
    client = RedisClient(read_settings({"REDIS_URL_FILE": str(path)}).redis)
    try:
        await client.redis.set("key", "value")
        path.write_text("redis://broken:port:")
        server.command("CLIENT", "KILL", "TYPE", "normal")
        await until_read_again()
        assert await client.redis.get("key") == b"value"
        server.command("ACL", "SETUSER", "alice", "resetpass", ">alice-two")
        path.write_text(f"redis://alice:alice-two@{server.host}:{server.port}")
        change_password(server, "two-two")
        await until_read_again()

        assert await client.redis.acl_whoami() == "alice"
        assert "alice-two" not in caplog.text
    finally:
        await client.close()


async def until_read_again() -> None:
    """Wait until a file may be read again."""
    await asyncio.sleep(READ_INTERVAL_SECONDS)


async def test_sentinel_password_in_a_file_is_read_again(
    sentinel_setup: SentinelSetup, tmp_path: Path
) -> None:
    """The primary is found with the new one."""
    path = tmp_path / "sentinel-password"
    path.write_text(str(sentinel_setup.sentinel_password))
    settings = RedisSettings(
        sentinel_enabled=True,
        sentinels=addresses_of(sentinel_setup.sentinels),
        sentinel_name=sentinel_setup.name,
        password=Secret(str(sentinel_setup.password)),
        sentinel_password=Secret(str(sentinel_setup.sentinel_password), file=str(path)),
    )
    client = RedisClient(settings)
    try:
        assert await client.redis.ping() is True
        for sentinel in sentinel_setup.sentinel_servers:
            sentinel.command("ACL", "SETUSER", "default", "resetpass", ">rotated-pass")
            sentinel.password = "rotated-pass"
            sentinel.command("CLIENT", "KILL", "TYPE", "normal")
        path.write_text("rotated-pass")
        sentinel_setup.primary_server().command("CLIENT", "KILL", "TYPE", "normal")

        assert await within(5.0, client.redis.ping()) is True
        assert client.traffic.failed == 0
    finally:
        await client.close()


class Shown:
    """A server certificate that changes, as a proxy in front of Redis shows it."""

    def __init__(self, certificates: Certificates, folder: Path) -> None:
        self.context = certificates.server_context()
        self._folder = folder

    def show(self, authority: trustme.CA, *, valid: timedelta) -> None:
        """Show a certificate of an authority from the next handshake on."""
        now = datetime.now(UTC)
        issued = authority.issue_cert(
            *NAMES, not_before=now - timedelta(days=2), not_after=now + valid
        )
        chain, key = self._folder / "chain.pem", self._folder / "key.pem"
        chain.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        key.write_bytes(issued.private_key_pem.bytes())
        self.context.load_cert_chain(chain, key)


async def test_certificates_expire_and_change(
    redis: RedisServer, certificates: Certificates, tmp_path: Path
) -> None:
    """An expired one is refused; a new one, by an authority that the file has by then, is not."""
    shown, ca_file = Shown(certificates, tmp_path), tmp_path / "ca.pem"
    old, new = trustme.CA(), trustme.CA()
    old.cert_pem.write_to_path(str(ca_file))
    shown.show(old, valid=timedelta(days=1))
    with FaultProxy(redis.port, tls=shown.context) as proxy:
        config = config_of(
            host="localhost", port=proxy.port, tls_enabled=True, tls_ca_file=str(ca_file)
        )
        async with opened_with(config) as client:
            check = check_of(client)
            assert (await check.check()).code is None
            shown.show(old, valid=timedelta(days=-1))
            proxy.mode = RESET
            proxy.mode = PASS
            assert (await wait_for_code(check, "tls")).status is Status.FAIL
            shown.show(new, valid=timedelta(days=1))
            assert (await check.check()).code == "tls"
            ca_file.write_text("no certificate")
            assert (await check.check()).code == "tls"
            new.cert_pem.write_to_path(str(ca_file))

            assert (await check.check()).code is None
            assert await client.redis.ping() is True


async def test_address_of_a_name_may_change(
    own_redis: RedisServer, redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each connection asks for it anew."""
    resolve: Callable[..., Any] = socket.getaddrinfo
    leads_to = own_redis

    def getaddrinfo(host: str, port: object, *more: Any, **options: Any) -> Any:
        if host == "redis.test":
            return resolve(leads_to.host, leads_to.port, *more, **options)
        return resolve(host, port, *more, **options)

    monkeypatch.setattr("socket.getaddrinfo", getaddrinfo)
    async with opened_with(config_of(host="redis.test", port=6379)) as client:
        await client.redis.set("key", "old")
        leads_to = redis
        own_redis.stop()

        assert await within(5.0, client.redis.get("key")) is None
        assert (await check_of(client).check()).code is None
        assert client.limits == RedisLimits()
