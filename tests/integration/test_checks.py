"""The checks to use against services that refuse, hang, are full, or lie about their address."""

import asyncio
import os
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import create_async_engine
from tests.integration.webhooks import hang
from tests.servers.certificates import Certificates
from tests.servers.ports import free_port
from tests.servers.postgres import Database
from tests.servers.receiver import receiver, status
from tests.servers.waiting import until

from viralfx import DiskCheck, HttpCheck, SqlAlchemyCheck, Status, TcpCheck
from viralfx.adapters.http import client_context
from viralfx.checks import _check_addresses
from viralfx.domain.webhooks.url import WebhookRefusedError, parse_destination


async def test_an_http_service_passes_by_its_status() -> None:
    """By default any 2xx does; redirects are not followed, and headers are sent."""
    async with receiver() as receiving:
        url = f"http://127.0.0.1:{receiving.port}/status?of=shop"
        check = HttpCheck(url, headers={"Authorization": "Bearer planted"})
        codes = []
        for number in (200, 204, 302, 404, 503):
            receiving.respond_with(status(number, "Location: http://127.0.0.1:1/"))
            codes.append((await check.check()).code)
        receiving.respond_with(status(404))
        expected = await HttpCheck(url, statuses=(404,)).check()

    assert codes == [None, None, *["unexpected_status"] * 3]
    assert expected.status is Status.PASS
    assert receiving.requests[0].line == "GET /status?of=shop HTTP/1.1"
    assert receiving.requests[0].headers["authorization"] == "Bearer planted"
    assert receiving.requests[0].headers["host"] == f"127.0.0.1:{receiving.port}"


async def test_an_http_service_that_cannot_be_used(certificates: Certificates) -> None:
    """The code names the reason, and the message contains no header and no query."""
    async with receiver() as silent, receiver(certificates.server_context()) as secure:
        silent.respond_with(hang)
        trusting = client_context(str(certificates.ca))
        of_tls = f"https://localhost:{secure.port}/?key=planted"
        found = [
            await check.check()
            for check in (
                HttpCheck(f"http://127.0.0.1:{free_port()}/?key=planted"),
                HttpCheck(f"http://127.0.0.1:{silent.port}/?key=planted", timeout=0.05),
                HttpCheck("http://shop.invalid/?key=planted"),
                HttpCheck(of_tls),
                HttpCheck(of_tls, tls=trusting),
            )
        ]

    codes = ["connection_refused", "timeout", "name_unknown", "tls", None]
    assert [each.code for each in found] == codes
    assert "planted" not in "".join(f"{each.message}{each.details}" for each in found)


@pytest.mark.parametrize(
    "address", ["169.254.169.254", "::ffff:169.254.169.254", "fe80::1", "64:ff9b::a9fe:a9fe"]
)
def test_a_name_that_leads_to_a_metadata_service_is_refused(address: str) -> None:
    """The address that is connected to decides, not the name."""
    with pytest.raises(WebhookRefusedError, match="never allowed"):
        _check_addresses(parse_destination("http://shop.example/"), ["10.1.2.3", address])


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "10.1.2.3", "fd00::7", "93.184.215.14"])
def test_services_of_ones_own_network_are_allowed(address: str) -> None:
    """A check asks its application's neighbours, which have private addresses."""
    _check_addresses(parse_destination("http://shop.example/"), [address])


async def test_a_port_that_cannot_be_connected_to() -> None:
    """The code names the reason."""
    refused = await TcpCheck("127.0.0.1", free_port()).check()
    unknown = await TcpCheck("shop.invalid", 80).check()

    assert (refused.code, unknown.code) == ("connection_refused", "name_unknown")


async def test_a_port_behind_the_second_address_of_a_name() -> None:
    """Each address of ``localhost`` is tried."""
    async with receiver(host="127.0.0.1") as receiving:
        observation = await TcpCheck("localhost", receiving.port).check()

    assert observation.status is Status.PASS


async def test_a_lookup_that_hangs_ends_with_its_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """A later check asks again; the thread of the first one goes on to wait."""
    answered = threading.Event()
    asked: list[str] = []

    def getaddrinfo(host: str, port: int, **_: Any) -> Any:
        asked.append(host)
        if len(asked) == 1:
            answered.wait(60.0)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    async with receiver(host="127.0.0.1") as receiving:
        check = TcpCheck("shop.test", receiving.port, timeout=0.2)
        with monkeypatch.context() as patched:
            patched.setattr(socket, "getaddrinfo", getaddrinfo)
            first = await check.check()
            observation = first
            try:
                async with asyncio.timeout(10.0):
                    while observation.status is not Status.PASS:
                        observation = await check.check()
            finally:
                answered.set()

    assert (first.code, set(asked)) == ("timeout", {"shop.test"})
    assert len(asked) >= 2


async def test_an_exhausted_pool_is_a_warning(database: Database) -> None:
    """A busy application is not restarted or taken out of traffic for it."""
    address = database.url.replace("://", "+asyncpg://", 1)
    engine = create_async_engine(address, pool_size=1, max_overflow=1)
    check = SqlAlchemyCheck(engine)
    try:
        async with engine.connect() as one, engine.connect() as two:
            assert one is not two
            busy = await check.check()
        free = await check.check()
    finally:
        await engine.dispose()

    assert (busy.status, busy.code) == (Status.WARN, "pool_exhausted")
    assert busy.details == {"dialect": "postgresql", "pool": {"inUse": 2, "limit": 2}}
    assert free.status is Status.PASS


async def test_a_database_that_is_gone(tmp_path: Path) -> None:
    """The driver's error is the check's; the next attempt works."""
    file = tmp_path / "folder" / "shop.db"
    engine = create_engine(f"sqlite:///{file}")
    check = SqlAlchemyCheck(engine)
    with pytest.raises(OperationalError):
        await check.check()
    file.parent.mkdir()

    assert (await check.check()).status is Status.PASS
    engine.dispose()


async def test_free_space(tmp_path: Path) -> None:
    """Limits are bytes or shares; a path that is not there is a failure with a code."""
    figures = os.statvfs(tmp_path)
    free = figures.f_bavail * figures.f_frsize
    found = [
        await check.check()
        for check in (
            DiskCheck(tmp_path, 0.000001),
            DiskCheck(tmp_path, 0.000001, warn=2 * free),
            DiskCheck(tmp_path, 2 * free),
            DiskCheck(tmp_path, 0.999999),
            DiskCheck(tmp_path / "nothing", 1e9),
        )
    ]

    expected = [None, "disk_low", "disk_full", "disk_full", "path_unreadable"]
    assert [each.code for each in found] == expected


async def test_a_check_that_is_cancelled_leaves_no_connection() -> None:
    """The monitor cancels an attempt at its timeout; the socket is closed."""
    async with receiver() as silent:
        silent.respond_with(hang)
        attempt = asyncio.create_task(HttpCheck(f"http://127.0.0.1:{silent.port}/").check())
        await until(lambda: silent.connections)
        attempt.cancel()
        await until(lambda: silent.ended)

    assert attempt.cancelled()
