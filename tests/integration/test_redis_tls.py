"""TLS to a real Redis, without any fallback to plain text."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from redis import exceptions
from tests.integration.leaks import LeakCheck
from tests.integration.redis_clients import (
    QUICK,
    addresses_of,
    check_of,
    config_of,
    opened,
    opened_with,
)
from tests.servers.certificates import Certificates
from tests.servers.fault_proxy import BLACKHOLE, PASS, FaultProxy
from tests.servers.redis import RedisServer
from tests.servers.sentinel import SentinelSetup

pytestmark = pytest.mark.timeout(60)


def tls_client(server: RedisServer, **more: Any) -> Any:
    """Return a client of a server that has a password; it uses TLS by default."""
    return opened(server, **{"password": server.password, "tls_enabled": True, **QUICK, **more})


@pytest.mark.each_python
async def test_trusted_certificate_is_accepted(
    tls_redis: RedisServer, certificates: Certificates
) -> None:
    """Requests and checks use TLS."""
    async with tls_client(tls_redis, tls_ca_file=str(certificates.ca)) as client:
        await client.redis.set("key", "value")

        assert await client.redis.get("key") == b"value"
        assert (await check_of(client).check()).message == "Redis is healthy"


@pytest.mark.each_python
@pytest.mark.parametrize("trust", ["another authority", "the system"])
async def test_untrusted_certificate_is_refused(
    tls_redis: RedisServer, certificates: Certificates, trust: str
) -> None:
    """With the code ``tls`` and without retries."""
    ca_file = str(certificates.other_ca) if trust == "another authority" else None
    async with tls_client(tls_redis, tls_ca_file=ca_file) as client:
        observation = await check_of(client).check()

        assert observation.code == "tls"
        assert observation.message == "Redis cannot be trusted: the TLS handshake failed"
        with pytest.raises(exceptions.ConnectionError):
            await client.redis.get("key")
        assert client.traffic.failed_attempts == 2  # one of the check, one of the request


async def test_certificate_for_another_name_is_refused(
    tls_redis: RedisServer, certificates: Certificates
) -> None:
    """A matching IP address is not enough."""
    config = config_of(
        host="127.1",
        port=tls_redis.port,
        password="hush",
        tls_enabled=True,
        tls_ca_file=str(certificates.ca),
        **QUICK,
    )
    async with opened_with(config) as client:
        assert (await check_of(client).check()).code == "tls"


async def test_verification_can_be_turned_off(tls_redis: RedisServer) -> None:
    """The connection still uses TLS."""
    async with tls_client(tls_redis, tls_reject_unauthorized=False) as client:
        assert await client.redis.set("key", "value") is True


@pytest.mark.parametrize("content", [None, "no certificate"])
async def test_invalid_ca_file_is_reported_by_the_check(
    tls_redis: RedisServer, tmp_path: Path, content: str | None
) -> None:
    """Creating the client raises nothing; correcting the file is enough."""
    file = tmp_path / "ca.pem"
    if content is not None:
        file.write_text(content)
    async with tls_client(tls_redis, tls_ca_file=str(file)) as client:
        check = check_of(client)
        assert (await check.check()).code == "tls"
        file.write_bytes(tls_redis.tls.ca.read_bytes() if tls_redis.tls else b"")
        assert (await check.check()).code is None


@asynccontextmanager
async def plain_listener(answer: bytes) -> AsyncIterator[tuple[int, list[bytes]]]:
    """Listen as a server without TLS, and keep the received bytes."""
    received: list[bytes] = []
    served: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        served.append(writer)
        with suppress(OSError):
            received.append(await reader.read(65536))
            if answer:
                writer.write(answer)
                await writer.drain()
            await reader.read()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1], received
    finally:
        server.close()
        for writer in served:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()
        # Last: from Python 3.12 on it also waits for the connections.
        await server.wait_closed()


@pytest.mark.parametrize("answer", [b"-ERR unknown command\r\n", b"+PONG\r\n", b""])
async def test_there_is_no_fallback_to_plain_text(answer: bytes) -> None:
    """For any reply of a server without TLS, no byte of the password is sent."""
    config = {"connect_timeout": 5.0 if answer else 0.3, **QUICK}
    async with (
        plain_listener(answer) as (port, received),
        opened_with(
            config_of(
                host="127.0.0.1",
                port=port,
                password="hush",
                tls_enabled=True,
                tls_reject_unauthorized=False,
                **config,
            )
        ) as client,
    ):
        observation = await check_of(client).check()
        with pytest.raises((exceptions.ConnectionError, exceptions.TimeoutError)):
            await client.redis.get("key")

        assert observation.code == ("tls" if answer else "timeout")
        assert len(received) >= 2
        assert all(first.startswith(b"\x16\x03") for first in received)
        assert not any(b"hush" in first for first in received)


async def test_real_server_without_tls_is_refused(redis: RedisServer) -> None:
    """It does not understand the TLS greeting."""
    async with opened(
        redis, tls_enabled=True, tls_reject_unauthorized=False, connect_timeout=0.5, **QUICK
    ) as client:
        assert (await check_of(client).check()).code in {"tls", "timeout", "lost"}


async def test_plain_text_to_a_tls_server_fails(tls_redis: RedisServer) -> None:
    """The setting decides, not the server."""
    async with tls_client(tls_redis, tls_enabled=False) as client:
        assert (await check_of(client).check()).code in {"lost", "timeout", "error"}


async def test_frozen_handshake_leaks_nothing(
    tls_redis: RedisServer, certificates: Certificates
) -> None:
    """The handshake is cut at any moment."""
    proxy = FaultProxy(tls_redis.port)
    with proxy:
        tls: dict[str, Any] = {"tls_enabled": True, "tls_ca_file": str(certificates.ca)}
        async with opened(proxy, password="hush", **tls, **QUICK) as client:
            check = check_of(client)
            await check.check()
            leaks = LeakCheck()
            for turns in range(20):
                proxy.mode = BLACKHOLE
                fresh = check_of(client)
                cut = asyncio.create_task(fresh.check())
                for _ in range(turns):
                    await asyncio.sleep(0)
                cut.cancel()
                await asyncio.wait({cut})
            proxy.mode = PASS  # it keeps its own side of what it holds back
            await leaks.assert_none()


async def test_sentinels_use_tls_too(
    sentinel_setup: SentinelSetup, certificates: Certificates
) -> None:
    """The primary is found through a sentinel with TLS, and is not contacted in plain text."""
    sentinel = sentinel_setup.sentinel_servers[0]
    with FaultProxy(sentinel.port, tls=certificates.server_context()) as front:
        config = config_of(
            sentinel_enabled=True,
            sentinels=addresses_of([(front.host, front.port)]),
            sentinel_name=sentinel_setup.name,
            sentinel_password=sentinel_setup.sentinel_password,
            password=sentinel_setup.password,
            tls_enabled=True,
            tls_ca_file=str(certificates.ca),
            connect_timeout=0.5,
            **QUICK,
        )
        async with opened_with(config) as client:
            observation = await check_of(client).check()

            assert client.address == sentinel_setup.primary()
            assert observation.code in {"tls", "timeout", "lost"}
