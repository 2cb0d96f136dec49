"""Webhooks over real sockets and real TLS: how they arrive, and what keeps them from inside."""

import asyncio
import base64
import hashlib
import hmac
import os
import socket
import ssl
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import pytest
import trustme
import uvloop
from tests.integration.webhooks import BODY, KEYS, LOOPBACK, Names, delivery, hang
from tests.servers.certificates import Certificates
from tests.servers.receiver import Receiver, receiver, status

from viralfx.adapters.http import HttpWebhookSender, SystemResolver, client_context
from viralfx.domain.webhooks.allowed import AllowList
from viralfx.domain.webhooks.errors import (
    WebhookRefusedError,
    WebhookRejectedError,
    WebhookUnavailableError,
)


@pytest.fixture
async def plain() -> AsyncIterator[Receiver]:
    """Return a receiver that speaks plain HTTP."""
    async with receiver() as receiving:
        yield receiving


@pytest.fixture
async def secure(certificates: Certificates) -> AsyncIterator[Receiver]:
    """Return a receiver that speaks TLS, as localhost and 127.0.0.1."""
    async with receiver(certificates.server_context()) as receiving:
        yield receiving


# -- what arrives ----------------------------------------------------------------------------------


def verified(received: Receiver, key: bytes) -> bool:
    """Verify the last request as a receiver does that has never seen this project."""
    request = received.requests[-1]
    headers = request.headers
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + request.body
    expected = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
    assert abs(time.time() - int(headers["webhook-timestamp"])) < 60
    return f"v1,{expected}" in headers["webhook-signature"].split(" ")


async def test_a_webhook_arrives_signed_over_tls(
    secure: Receiver, certificates: Certificates
) -> None:
    """Body, headers, server name and signature are what a receiver expects, by either secret."""
    delivering = delivery(f"localhost:{secure.port}", LOOPBACK, trust=certificates)
    url = f"https://localhost:{secure.port}/in?key=1"

    assert await delivering.deliver(url, message_id="job-1", body=BODY) == 200

    (request,) = secure.requests
    assert request.line == "POST /in?key=1 HTTP/1.1"
    assert request.body == BODY
    assert request.headers["host"] == f"localhost:{secure.port}"
    assert request.headers["content-type"] == "application/json"
    assert request.headers["connection"] == "close"
    assert request.headers["webhook-id"] == "job-1"
    assert secure.names == ["localhost"]
    assert all(verified(secure, key) for key in KEYS)
    assert not verified(secure, b"another" * 4)


async def test_addresses_are_hosts_too(certificates: Certificates) -> None:
    """Of both families, and with a certificate for the address."""
    async with receiver(certificates.server_context()) as four:
        delivering = delivery(f"127.0.0.1:{four.port}", trust=certificates)
        url = f"https://127.0.0.1:{four.port}/"
        assert await delivering.deliver(url, message_id="i", body=BODY) == 200
    async with receiver(host="::1") as six:
        delivering = delivery(f"http://[::1]:{six.port}")
        url = f"http://[0:0::1]:{six.port}/"
        assert await delivering.deliver(url, message_id="i", body=BODY) == 200
        assert six.requests[0].headers["host"] == f"[::1]:{six.port}"


async def test_the_system_is_asked_for_names(plain: Receiver) -> None:
    """A name that it does not know is worth another try: name servers come back."""
    assert "127.0.0.1" in await SystemResolver()("localhost", 80)
    known = delivery(f"http://localhost:{plain.port}", LOOPBACK, "::1/128")
    url = f"http://localhost:{plain.port}/"
    assert await known.deliver(url, message_id="i", body=BODY) == 200
    unknown = delivery("*.invalid")
    with pytest.raises(WebhookUnavailableError, match="its name has no address"):
        await unknown.deliver("https://hooks.invalid/", message_id="i", body=BODY)


def test_it_works_on_uvloop_as_well(certificates: Certificates) -> None:
    """The loop that the service runs on."""

    async def main() -> None:
        async with receiver(certificates.server_context()) as secure:
            where = f"localhost:{secure.port}"
            delivering = delivery(where, LOOPBACK, "::1/128", trust=certificates)
            assert await delivering.deliver(f"https://{where}/", message_id="i", body=BODY) == 200
        async with receiver() as silent:
            silent.answer(hang)
            where = f"localhost:{silent.port}"
            delivering = delivery(where, LOOPBACK, "::1/128", timeout=0.2)
            with pytest.raises(WebhookUnavailableError, match=r"within 0\.2 s"):
                await delivering.deliver(f"https://{where}/", message_id="i", body=BODY)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


# -- where it must not go --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "addresses",
    [
        ["127.0.0.1"],
        ["8.8.8.8", "127.0.0.1"],
        ["127.0.0.1", "8.8.8.8"],
        ["::ffff:127.0.0.1"],
        ["64:ff9b::127.0.0.1"],
        ["0.0.0.0"],  # noqa: S104 - nobody binds to it
        ["::1"],
        ["169.254.169.254"],
    ],
)
async def test_a_name_for_a_private_address_is_refused(
    plain: Receiver, addresses: list[str]
) -> None:
    """One such address among several is enough, and nobody is connected to."""
    names = Names(addresses)
    delivering = delivery(f"http://hooks.example.com:{plain.port}", names=names)
    url = f"http://hooks.example.com:{plain.port}/"

    with pytest.raises(WebhookRefusedError, match="which is not public"):
        await delivering.deliver(url, message_id="i", body=BODY)

    assert names.asked == ["hooks.example.com"]
    assert plain.connections == 0


async def test_a_name_cannot_change_its_meaning_after_the_look(
    plain: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is looked up once, and what is connected to is the address that was looked at.

    The second answer of this name server is never asked for within a delivery; in the next one
    it is looked at like the first.
    """
    async with receiver(host="127.0.0.2", port=plain.port) as inward:
        names = Names(["127.0.0.1"], ["127.0.0.2"])
        where = f"http://hooks.example.com:{plain.port}"
        delivering = delivery(where, "127.0.0.1/32", names=names)
        looked_up: list[object] = []
        original = socket.getaddrinfo

        def look_up(host: str, *rest: int, **more: int) -> object:
            looked_up.append(host)
            return original(host, *rest, **more)

        monkeypatch.setattr(socket, "getaddrinfo", look_up)

        assert await delivering.deliver(f"{where}/", message_id="i", body=BODY) == 200
        assert names.asked == ["hooks.example.com"]
        assert "hooks.example.com" not in looked_up
        with pytest.raises(WebhookRefusedError, match=r"127\.0\.0\.2, which is not public"):
            await delivering.deliver(f"{where}/", message_id="i", body=BODY)

        assert (plain.connections, inward.connections) == (1, 0)


@pytest.mark.parametrize("number", [301, 302, 303, 307, 308])
async def test_a_redirect_is_not_followed(plain: Receiver, number: int) -> None:
    """Neither inward nor back to the same host."""
    async with receiver() as inward:
        where = f"http://127.0.0.1:{plain.port}"
        delivering = delivery(where, f"http://127.0.0.1:{inward.port}")
        plain.answer(status(number, f"Location: http://127.0.0.1:{inward.port}/admin"))
        with pytest.raises(WebhookRejectedError, match="redirects are not followed"):
            await delivering.deliver(f"{where}/", message_id="i", body=BODY)
        plain.answer(status(number, "Location: /again"))
        with pytest.raises(WebhookRejectedError, match="redirects are not followed"):
            await delivering.deliver(f"{where}/", message_id="i", body=BODY)
        assert (plain.connections, inward.connections) == (2, 0)


async def test_no_proxy_of_the_environment_is_used(
    plain: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would connect to addresses that nobody looked at."""
    async with receiver() as proxy:
        for variable in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            for name in (variable, variable.lower()):
                monkeypatch.setitem(os.environ, name, f"http://127.0.0.1:{proxy.port}")
        where = f"http://127.0.0.1:{plain.port}"
        assert await delivery(where).deliver(f"{where}/", message_id="i", body=BODY) == 200
        assert proxy.connections == 0


async def test_no_cookie_is_kept(plain: Receiver) -> None:
    """What a receiver sets does not come back to it."""
    plain.answer(status(200, "Set-Cookie: session=1; Path=/"))
    where = f"http://127.0.0.1:{plain.port}"
    delivering = delivery(where)
    for _ in range(2):
        await delivering.deliver(f"{where}/", message_id="i", body=BODY)
    assert "cookie" not in plain.requests[1].headers


# -- with whom TLS is spoken -----------------------------------------------------------------------


async def test_an_unknown_authority_is_not_trusted(
    secure: Receiver, certificates: Certificates
) -> None:
    """Nothing is sent to a server whose certificate is not accepted."""
    hosts = AllowList([f"localhost:{secure.port}", LOOPBACK])
    for tls in (client_context(str(certificates.other_ca)), client_context()):
        sender = HttpWebhookSender(hosts.check_addresses, tls=tls, resolve=Names(["127.0.0.1"]))
        url = f"https://localhost:{secure.port}/"
        with pytest.raises(WebhookUnavailableError, match="its certificate is not accepted"):
            await sender.post(hosts.admit(url), {}, BODY)
    assert secure.requests == []


async def test_a_certificate_for_another_name_is_not_accepted(
    secure: Receiver, certificates: Certificates
) -> None:
    """The name is checked though the connection is made to an address."""
    names = Names(["127.0.0.1"])
    where = f"hooks.example.com:{secure.port}"
    delivering = delivery(where, LOOPBACK, trust=certificates, names=names)
    with pytest.raises(WebhookUnavailableError, match="certificate is not accepted: Hostname mism"):
        await delivering.deliver(f"https://{where}/", message_id="i", body=BODY)
    assert secure.names == ["hooks.example.com"]
    assert secure.requests == []


async def test_an_expired_certificate_is_not_accepted() -> None:
    """It may be renewed, so another try is worth it."""
    authority = trustme.CA()
    expired = authority.issue_cert("127.0.0.1", not_after=datetime(2020, 1, 1, tzinfo=UTC))
    shown, trusted = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH), client_context()
    expired.configure_cert(shown)
    authority.configure_trust(trusted)
    async with receiver(shown) as receiving:
        hosts = AllowList([f"127.0.0.1:{receiving.port}"])
        sender = HttpWebhookSender(hosts.check_addresses, tls=trusted)
        url = f"https://127.0.0.1:{receiving.port}/"
        with pytest.raises(WebhookUnavailableError, match="certificate has expired"):
            await sender.post(hosts.admit(url), {}, BODY)
        assert receiving.requests == []


async def test_tls_is_not_left_for_plain_text(plain: Receiver, certificates: Certificates) -> None:
    """A server that speaks none gets nothing."""
    where = f"localhost:{plain.port}"
    delivering = delivery(where, LOOPBACK, trust=certificates, names=Names(["127.0.0.1"]))

    async def not_tls(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail.example.com ESMTP\r\n")
        await writer.drain()

    plain.answer(not_tls)
    with pytest.raises(WebhookUnavailableError, match="TLS failed"):
        await delivering.deliver(f"https://{where}/", message_id="i", body=BODY)
