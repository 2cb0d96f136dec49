"""Webhooks to receivers that are slow, endless, broken, busy or unavailable."""

import asyncio
import socket
import struct
import time
from collections.abc import AsyncIterator, Sequence

import pytest
from tests.integration.webhooks import BODY, LOOPBACK, Names, delivery, hang
from tests.manual_clock import ManualClock
from tests.servers.certificates import Certificates
from tests.servers.ports import free_port
from tests.servers.receiver import Behaviour, Receiver, receiver, status
from tests.servers.waiting import until

from viralfx.domain.webhooks.delivery import HostCircuits
from viralfx.domain.webhooks.url import WebhookRejectedError, WebhookUnavailableError
from viralfx.resilience.breaker import CircuitOpenError


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


async def read_nothing(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Neither read nor send."""
    await writer.wait_closed()


def saying(first: bytes, then: bytes, pause: float = 0.02) -> Behaviour:
    """Send one text at once, then another one repeatedly."""

    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(first)
        while True:
            writer.write(then)
            await writer.drain()
            await asyncio.sleep(pause)

    return behave


HEAD = b"HTTP/1.1 200 OK\r\n"
MISBEHAVIOURS = {
    "silence": hang,
    "a head that drips": saying(HEAD, b"X-Drip: 1\r\n"),
    "a line that drips": saying(b"HTTP/1.1 20", b"0"),
    "endless interim responses": saying(b"", b"HTTP/1.1 103 Early Hints\r\nLink: <a>\r\n\r\n"),
}


@pytest.mark.parametrize("name", MISBEHAVIOURS)
@pytest.mark.parametrize("encrypted", [False, True])
async def test_total_time_is_limited(
    name: str, certificates: Certificates, *, encrypted: bool
) -> None:
    """However active the receiver is; the connection is closed."""
    async with receiver(certificates.server_context() if encrypted else None) as receiving:
        receiving.respond_with(MISBEHAVIOURS[name])
        where = f"{'https' if encrypted else 'http'}://127.0.0.1:{receiving.port}"
        delivering = delivery(where, trust=certificates, timeout=0.4)
        began = time.monotonic()

        with pytest.raises(WebhookUnavailableError, match=r"did not answer"):
            await delivering.deliver(f"{where}/", message_id="i", body=BODY)

        assert time.monotonic() - began < 20
        await until(lambda: receiving.ended == 1)


async def test_receiver_that_does_not_read(plain: Receiver) -> None:
    """The limit includes sending."""
    plain.respond_with(read_nothing)
    where = f"http://127.0.0.1:{plain.port}"
    with pytest.raises(WebhookUnavailableError, match=r"within 0\.3 s"):
        await delivery(where, timeout=0.3).deliver(
            f"{where}/", message_id="i", body=b"x" * 30_000_000
        )


async def test_tls_handshake_without_a_response(plain: Receiver) -> None:
    """It is aborted, and the connection is closed."""
    plain.respond_with(hang)
    where = f"127.0.0.1:{plain.port}"
    with pytest.raises(WebhookUnavailableError, match=r"within 0\.3 s"):
        await delivery(where, timeout=0.3).deliver(f"https://{where}/", message_id="i", body=BODY)
    await until(lambda: plain.ended == 1)


async def test_name_server_without_a_response() -> None:
    """The limit includes the lookup."""

    async def never(host: str, port: int) -> Sequence[str]:
        await asyncio.Event().wait()
        raise AssertionError((host, port))

    delivering = delivery("*.example.com", names=never, timeout=0.2)
    with pytest.raises(WebhookUnavailableError, match=r"within 0\.2 s"):
        await delivering.deliver("https://hooks.example.com/", message_id="i", body=BODY)


async def never_continuing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send the head of a response and nothing more."""
    writer.write(HEAD + b"Content-Length: 1000000\r\n\r\n")
    await hang(reader, writer)


BODIES = {
    "without an end": saying(HEAD + b"\r\n", b"x" * 65536, pause=0),
    "that drips": saying(HEAD + b"Content-Length: 1000000\r\n\r\n", b"x"),
    "that never comes": never_continuing,
    "in broken chunks": saying(HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"zzz\r\n"),
}


@pytest.mark.parametrize("name", BODIES)
async def test_body_of_a_response_is_ignored(plain: Receiver, name: str) -> None:
    """The status decides; the body gets a second."""
    plain.respond_with(BODIES[name])
    where = f"http://127.0.0.1:{plain.port}"
    began = time.monotonic()

    delivering = delivery(where, timeout=60.0)
    assert await delivering.deliver(f"{where}/", message_id="i", body=BODY) == 200

    assert time.monotonic() - began < 20
    await until(lambda: plain.ended == 1)


async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Reset the connection after the beginning of the request."""
    await reader.read(1)
    lingering = struct.pack("ii", 1, 0)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, lingering)


@pytest.mark.parametrize(
    ("behaviour", "error"),
    [
        (reset, "broke off"),
        (b"", "broke off, or did not speak HTTP"),
        (b"HTTP/1.1 200 OK\r\nX", "broke off, or did not speak HTTP"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "broke off, or did not speak HTTP"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 200_000, "broke off, or did not speak HTTP"),
        (b"HTTP/1.1 2000 OK\r\n\r\n", "broke off, or did not speak HTTP"),
    ],
    ids=["reset", "closed", "half a head", "another protocol", "a huge head", "a wrong status"],
)
async def test_lost_response_is_retried(
    plain: Receiver, behaviour: Behaviour | bytes, error: str
) -> None:
    """The receiver may have got the request."""
    plain.respond_with(behaviour)
    where = f"http://127.0.0.1:{plain.port}"
    with pytest.raises(WebhookUnavailableError, match=f"127.0.0.1 did not answer: .*{error}"):
        await delivery(where).deliver(f"{where}/", message_id="i", body=BODY)


async def test_refused_connection_is_retried() -> None:
    """The receiver may be restarting."""
    where = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(WebhookUnavailableError, match="it cannot be connected to"):
        await delivery(where).deliver(f"{where}/", message_id="i", body=BODY)


async def test_next_address_is_tried(plain: Receiver) -> None:
    """After a refusal, and after an address that drops packets."""
    with socket.socket() as full:
        full.bind(("127.0.0.3", plain.port))
        full.listen(0)
        waiting = [socket.socket() for _ in range(4)]
        for each in waiting:
            each.setblocking(False)
            each.connect_ex(("127.0.0.3", plain.port))
        names = Names(["127.0.0.2", "127.0.0.3", "127.0.0.1"])
        where = f"http://hooks.example.com:{plain.port}"
        delivering = delivery(where, LOOPBACK, names=names, timeout=1.5)
        try:
            assert await delivering.deliver(f"{where}/", message_id="i", body=BODY) == 200
        finally:
            for each in waiting:
                each.close()


@pytest.mark.parametrize("number", [429, 503])
async def test_retry_after_is_parsed(plain: Receiver, number: int) -> None:
    """In seconds or as a date."""
    where = f"http://127.0.0.1:{plain.port}"
    for written in (
        "42",
        time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 43)),
    ):
        plain.respond_with(status(number, f"Retry-After: {written}"))
        with pytest.raises(WebhookUnavailableError) as busy:
            await delivery(where).deliver(f"{where}/", message_id="i", body=BODY)
        assert busy.value.retry_after == pytest.approx(42, abs=2)


async def test_gone_is_permanent(plain: Receiver) -> None:
    """Status 410."""
    plain.respond_with(status(410, "Retry-After: 1", body=b"gone"))
    where = f"http://127.0.0.1:{plain.port}"
    with pytest.raises(WebhookRejectedError) as gone:
        await delivery(where).deliver(f"{where}/", message_id="i", body=BODY)
    assert gone.value.status == 410


async def test_circuit_opens_for_an_unavailable_host(plain: Receiver) -> None:
    """Other hosts are served, and one probe call detects the recovery."""
    port = free_port()
    down, up = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{plain.port}"
    clock = ManualClock()
    circuits = HostCircuits(failure_threshold=3, open_for=60.0, clock=clock)
    delivering = delivery(down, up, circuits=circuits)
    for _ in range(3):
        with pytest.raises(WebhookUnavailableError):
            await delivering.deliver(f"{down}/", message_id="i", body=BODY)
    async with receiver(port=port) as back:
        with pytest.raises(CircuitOpenError) as rejected:
            await delivering.deliver(f"{down}/", message_id="i", body=BODY)
        assert rejected.value.retry_after == 60.0
        assert back.connections == 0
        assert await delivering.deliver(f"{up}/", message_id="i", body=BODY) == 200
        await clock.advance(60.0)
        for _ in range(3):
            assert await delivering.deliver(f"{down}/", message_id="i", body=BODY) == 200


async def test_cancelled_delivery_closes_its_connection(plain: Receiver) -> None:
    """The cancellation is propagated."""
    plain.respond_with(hang)
    where = f"http://127.0.0.1:{plain.port}"
    task = asyncio.create_task(delivery(where).deliver(f"{where}/", message_id="i", body=BODY))
    await until(lambda: plain.connections == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: plain.ended == 1)


async def test_concurrent_deliveries_are_independent(
    secure: Receiver, certificates: Certificates
) -> None:
    """They share no state."""
    where = f"https://127.0.0.1:{secure.port}"
    delivering = delivery(where, trust=certificates)
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(delivering.deliver(f"{where}/", message_id=str(n), body=b"%d" % n))
            for n in range(50)
        ]
    assert [task.result() for task in tasks] == [200] * 50
    ids = {request.headers["webhook-id"]: request.body for request in secure.requests}
    assert ids == {str(n): b"%d" % n for n in range(50)}
