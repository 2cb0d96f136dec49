"""Webhooks over real sockets and TLS: delivery, and protection against SSRF."""

import asyncio
import base64
import hashlib
import hmac
import os
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import pytest
import trustme
import uvloop
from tests.integration.names import silent_names
from tests.integration.webhooks import BODY, KEYS, LOOPBACK, Names, delivery, hang, receiver_key
from tests.servers.certificates import Certificates
from tests.servers.receiver import Receiver, receiver, status

from viralfx.adapters.http import HttpWebhookSender, client_context
from viralfx.core.threads import NameLookups
from viralfx.domain.webhooks.url import (
    AllowList,
    WebhookRefusedError,
    WebhookRejectedError,
    WebhookUnavailableError,
)


@pytest.fixture
async def plain() -> AsyncIterator[Receiver]:
    """Return a receiver without TLS."""
    async with receiver() as receiving:
        yield receiving


@pytest.fixture
async def secure(certificates: Certificates) -> AsyncIterator[Receiver]:
    """Return a receiver with TLS for localhost and 127.0.0.1."""
    async with receiver(certificates.server_context()) as receiving:
        yield receiving


# -- what arrives ----------------------------------------------------------------------------------


def verified(received: Receiver, key: bytes) -> bool:
    """Verify the last request with an independent implementation."""
    request = received.requests[-1]
    headers = request.headers
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + request.body
    expected = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
    assert abs(time.time() - int(headers["webhook-timestamp"])) < 60
    return f"v1,{expected}" in headers["webhook-signature"].split(" ")


@pytest.mark.each_python
async def test_webhook_is_delivered_signed_over_tls(
    secure: Receiver, certificates: Certificates
) -> None:
    """Body, headers, server name and signature are correct, with the key of either secret."""
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
    there = f"https://localhost:{secure.port}"
    assert all(verified(secure, receiver_key(key, there)) for key in KEYS)
    assert not verified(secure, receiver_key(KEYS[0], f"https://localhost:{secure.port + 1}"))
    assert not any(verified(secure, key) for key in KEYS)


async def test_host_may_be_an_address(certificates: Certificates) -> None:
    """IPv4 and IPv6, with a certificate for the address."""
    async with receiver(certificates.server_context()) as four:
        delivering = delivery(f"127.0.0.1:{four.port}", trust=certificates)
        url = f"https://127.0.0.1:{four.port}/"
        assert await delivering.deliver(url, message_id="i", body=BODY) == 200
    async with receiver(host="::1") as six:
        delivering = delivery(f"http://[::1]:{six.port}")
        url = f"http://[0:0::1]:{six.port}/"
        assert await delivering.deliver(url, message_id="i", body=BODY) == 200
        assert six.requests[0].headers["host"] == f"[::1]:{six.port}"


async def test_names_are_resolved_by_the_system(plain: Receiver) -> None:
    """An unknown name is retried: name servers may recover."""
    assert "127.0.0.1" in await NameLookups().addresses("localhost", 80)
    known = delivery(f"http://localhost:{plain.port}", LOOPBACK, "::1/128")
    url = f"http://localhost:{plain.port}/"
    assert await known.deliver(url, message_id="i", body=BODY) == 200
    unknown = delivery("*.invalid")
    with pytest.raises(WebhookUnavailableError, match="its name has no address"):
        await unknown.deliver("https://hooks.invalid/", message_id="i", body=BODY)


def test_delivery_works_on_uvloop(certificates: Certificates) -> None:
    """The event loop of the service."""

    async def main() -> None:
        async with receiver(certificates.server_context()) as secure:
            where = f"localhost:{secure.port}"
            delivering = delivery(where, LOOPBACK, "::1/128", trust=certificates)
            assert await delivering.deliver(f"https://{where}/", message_id="i", body=BODY) == 200
        async with receiver() as silent:
            silent.respond_with(hang)
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
        ["0.0.0.0"],  # noqa: S104 - no socket is bound
        ["::1"],
        ["169.254.169.254"],
    ],
)
async def test_name_with_a_private_address_is_refused(
    plain: Receiver, addresses: list[str]
) -> None:
    """One such address among several is enough; there is no connection."""
    names = Names(addresses)
    delivering = delivery(f"http://hooks.example.com:{plain.port}", names=names)
    url = f"http://hooks.example.com:{plain.port}/"

    with pytest.raises(WebhookRefusedError, match="which is not public"):
        await delivering.deliver(url, message_id="i", body=BODY)

    assert names.asked == ["hooks.example.com"]
    assert plain.connections == 0


async def test_names_without_an_answer_do_not_hold_up_others(
    plain: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each lookup has a thread of its own, which does not delay the end of the process."""
    delivering = delivery(f"http://localhost:{plain.port}", "*.silent.test", LOOPBACK, "::1/128")
    urls = [f"https://{number}.silent.test/" for number in range(8)]
    urls.append(f"http://localhost:{plain.port}/")
    with silent_names(monkeypatch):
        *others, known = [
            asyncio.create_task(delivering.deliver(url, message_id="i", body=BODY)) for url in urls
        ]
        assert await known == 200
        lookups = [each for each in threading.enumerate() if each.name == "name-lookup"]
        assert len(lookups) >= len(others)
        assert all(each.daemon for each in lookups)
    failed = await asyncio.gather(*others, return_exceptions=True)
    assert {type(error) for error in failed} == {WebhookUnavailableError}


async def test_dns_rebinding_has_no_effect(
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
async def test_redirect_is_not_followed(plain: Receiver, number: int) -> None:
    """Neither to a private address nor to the same host."""
    async with receiver() as inward:
        where = f"http://127.0.0.1:{plain.port}"
        delivering = delivery(where, f"http://127.0.0.1:{inward.port}")
        plain.respond_with(status(number, f"Location: http://127.0.0.1:{inward.port}/admin"))
        with pytest.raises(WebhookRejectedError, match="redirects are not followed"):
            await delivering.deliver(f"{where}/", message_id="i", body=BODY)
        plain.respond_with(status(number, "Location: /again"))
        with pytest.raises(WebhookRejectedError, match="redirects are not followed"):
            await delivering.deliver(f"{where}/", message_id="i", body=BODY)
        assert (plain.connections, inward.connections) == (2, 0)


async def test_proxy_of_the_environment_is_ignored(
    plain: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would connect to unchecked addresses."""
    async with receiver() as proxy:
        for variable in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            for name in (variable, variable.lower()):
                monkeypatch.setitem(os.environ, name, f"http://127.0.0.1:{proxy.port}")
        where = f"http://127.0.0.1:{plain.port}"
        assert await delivery(where).deliver(f"{where}/", message_id="i", body=BODY) == 200
        assert proxy.connections == 0


async def test_cookies_are_not_kept(plain: Receiver) -> None:
    """The next request sends none."""
    plain.respond_with(status(200, "Set-Cookie: session=1; Path=/"))
    where = f"http://127.0.0.1:{plain.port}"
    delivering = delivery(where)
    for _ in range(2):
        await delivering.deliver(f"{where}/", message_id="i", body=BODY)
    assert "cookie" not in plain.requests[1].headers


# -- verification of certificates ------------------------------------------------------------------


@pytest.mark.each_python
async def test_unknown_ca_is_refused(secure: Receiver, certificates: Certificates) -> None:
    """Nothing is sent to the server."""
    hosts = AllowList([f"localhost:{secure.port}", LOOPBACK])
    for tls in (client_context(str(certificates.other_ca)), client_context()):
        sender = HttpWebhookSender(hosts.check_addresses, tls=tls, resolve=Names(["127.0.0.1"]))
        url = f"https://localhost:{secure.port}/"
        with pytest.raises(WebhookUnavailableError, match="its certificate is not accepted"):
            await sender.post(hosts.admit(url), {}, BODY)
    assert secure.requests == []


async def test_certificate_for_another_name_is_refused(
    secure: Receiver, certificates: Certificates
) -> None:
    """The name is verified although the connection uses an address."""
    names = Names(["127.0.0.1"])
    where = f"hooks.example.com:{secure.port}"
    delivering = delivery(where, LOOPBACK, trust=certificates, names=names)
    with pytest.raises(WebhookUnavailableError, match="certificate is not accepted: Hostname mism"):
        await delivering.deliver(f"https://{where}/", message_id="i", body=BODY)
    assert secure.names == ["hooks.example.com"]
    assert secure.requests == []


async def test_expired_certificate_is_refused() -> None:
    """It may be renewed, so the delivery is retried."""
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


async def test_there_is_no_fallback_to_plain_text(
    plain: Receiver, certificates: Certificates
) -> None:
    """A server without TLS gets no request."""
    where = f"localhost:{plain.port}"
    delivering = delivery(where, LOOPBACK, trust=certificates, names=Names(["127.0.0.1"]))

    async def not_tls(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail.example.com ESMTP\r\n")
        await writer.drain()

    plain.respond_with(not_tls)
    with pytest.raises(WebhookUnavailableError, match="TLS failed"):
        await delivering.deliver(f"https://{where}/", message_id="i", body=BODY)
