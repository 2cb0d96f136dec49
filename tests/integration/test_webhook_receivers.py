"""Webhooks to receivers that are slow, endless, broken, busy, gone or away."""

import asyncio
import socket
import struct
import time
from collections.abc import AsyncIterator, Sequence

import pytest
from tests.integration.webhooks import BODY, LOOPBACK, Names, delivery, hang, until
from tests.manual_clock import ManualClock
from tests.servers.certificates import Certificates
from tests.servers.ports import free_port
from tests.servers.receiver import Behaviour, Receiver, receiver, status

from viralfx.domain.resilience.circuit import CircuitOpenError
from viralfx.domain.webhooks.errors import WebhookRejectedError, WebhookUnavailableError
from viralfx.domain.webhooks.hosts import HostCircuits


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


async def read_nothing(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Take nothing in and say nothing."""
    await writer.wait_closed()


def saying(first: bytes, then: bytes, pause: float = 0.02) -> Behaviour:
    """Say something at once, then something else again and again."""

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
    "interim answers for ever": saying(b"", b"HTTP/1.1 103 Early Hints\r\nLink: <a>\r\n\r\n"),
}


@pytest.mark.parametrize("name", MISBEHAVIOURS)
@pytest.mark.parametrize("encrypted", [False, True])
async def test_no_answer_in_time_is_none(
    name: str, certificates: Certificates, *, encrypted: bool
) -> None:
    """One limit bounds it all, however busy the receiver looks; the connection is closed."""
    async with receiver(certificates.server_context() if encrypted else None) as receiving:
        receiving.answer(MISBEHAVIOURS[name])
        where = f"{'https' if encrypted else 'http'}://127.0.0.1:{receiving.port}"
        delivering = delivery(where, trust=certificates, timeout=0.4)
        began = time.monotonic()

        with pytest.raises(WebhookUnavailableError, match=r"did not answer"):
            await delivering.deliver(f"{where}/", message_id="i", body=BODY)

        assert time.monotonic() - began < 2
        await until(lambda: receiving.ended == 1)


async def test_a_receiver_that_takes_nothing_in(plain: Receiver) -> None:
    """The limit bounds the sending too."""
    plain.answer(read_nothing)
    where = f"http://127.0.0.1:{plain.port}"
    with pytest.raises(WebhookUnavailableError, match=r"within 0\.3 s"):
        await delivery(where, timeout=0.3).deliver(
            f"{where}/", message_id="i", body=b"x" * 30_000_000
        )


async def test_a_tls_handshake_without_an_answer(plain: Receiver) -> None:
    """It is cut, and its connection closed."""
    plain.answer(hang)
    where = f"127.0.0.1:{plain.port}"
    with pytest.raises(WebhookUnavailableError, match=r"within 0\.3 s"):
        await delivery(where, timeout=0.3).deliver(f"https://{where}/", message_id="i", body=BODY)
    await until(lambda: plain.ended == 1)


async def test_a_name_server_without_an_answer() -> None:
    """The limit includes the lookup."""

    async def never(host: str, port: int) -> Sequence[str]:
        await asyncio.Event().wait()
        raise AssertionError((host, port))

    delivering = delivery("*.example.com", names=never, timeout=0.2)
    with pytest.raises(WebhookUnavailableError, match=r"within 0\.2 s"):
        await delivering.deliver("https://hooks.example.com/", message_id="i", body=BODY)


async def never_going_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Say a head, and nothing more."""
    writer.write(HEAD + b"Content-Length: 1000000\r\n\r\n")
    await hang(reader, writer)


BODIES = {
    "without an end": saying(HEAD + b"\r\n", b"x" * 65536, pause=0),
    "that drips": saying(HEAD + b"Content-Length: 1000000\r\n\r\n", b"x"),
    "that never comes": never_going_on,
    "in broken chunks": saying(HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"zzz\r\n"),
}


@pytest.mark.parametrize("name", BODIES)
async def test_the_body_of_an_answer_does_not_matter(plain: Receiver, name: str) -> None:
    """The status has come, so it is delivered; the rest is given a second and then left."""
    plain.answer(BODIES[name])
    where = f"http://127.0.0.1:{plain.port}"
    began = time.monotonic()

    assert await delivery(where).deliver(f"{where}/", message_id="i", body=BODY) == 200

    assert time.monotonic() - began < 3
    await until(lambda: plain.ended == 1)


async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Reset the connection once the request has begun to come."""
    await reader.read(1)
    lingering = struct.pack("ii", 1, 0)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, lingering)


@pytest.mark.parametrize(
    ("behaviour", "told"),
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
async def test_no_answer_at_all(plain: Receiver, behaviour: Behaviour | bytes, told: str) -> None:
    """It may have been taken; another try is worth it."""
    plain.answer(behaviour)
    where = f"http://127.0.0.1:{plain.port}"
    with pytest.raises(WebhookUnavailableError, match=f"127.0.0.1 did not answer: .*{told}"):
        await delivery(where).deliver(f"{where}/", message_id="i", body=BODY)


async def test_nobody_listens() -> None:
    """Another try is worth it."""
    where = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(WebhookUnavailableError, match="it cannot be connected to"):
        await delivery(where).deliver(f"{where}/", message_id="i", body=BODY)


async def test_an_address_that_does_not_accept_leaves_time_for_the_next(plain: Receiver) -> None:
    """Refused, or swallowed: the host's other address is tried."""
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
async def test_a_receiver_says_when_to_come_back(plain: Receiver, number: int) -> None:
    """In seconds or as a date."""
    where = f"http://127.0.0.1:{plain.port}"
    for written in (
        "42",
        time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 43)),
    ):
        plain.answer(status(number, f"Retry-After: {written}"))
        with pytest.raises(WebhookUnavailableError) as busy:
            await delivery(where).deliver(f"{where}/", message_id="i", body=BODY)
        assert busy.value.retry_after == pytest.approx(42, abs=2)


async def test_a_receiver_that_is_gone(plain: Receiver) -> None:
    """410 is for ever."""
    plain.answer(status(410, "Retry-After: 1", body=b"gone"))
    where = f"http://127.0.0.1:{plain.port}"
    with pytest.raises(WebhookRejectedError) as gone:
        await delivery(where).deliver(f"{where}/", message_id="i", body=BODY)
    assert gone.value.status == 410


async def test_a_host_that_is_down_is_left_alone_and_found_again(plain: Receiver) -> None:
    """Its circuit opens, others are served, and one call finds it back."""
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


async def test_a_job_that_is_cut_off_leaves_nothing_behind(plain: Receiver) -> None:
    """The cancellation comes through and the connection is closed."""
    plain.answer(hang)
    where = f"http://127.0.0.1:{plain.port}"
    task = asyncio.create_task(delivery(where).deliver(f"{where}/", message_id="i", body=BODY))
    await until(lambda: plain.connections == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: plain.ended == 1)


async def test_many_at_once(secure: Receiver, certificates: Certificates) -> None:
    """Deliveries share nothing that they could disturb one another by."""
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
