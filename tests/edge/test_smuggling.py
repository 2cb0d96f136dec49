"""Request smuggling, directly and through real proxies in front of a real service.

Each proxy forbids ``/who`` and removes ``X-User``. A smuggled request, or a forged header, reaches
the service although the proxy did not see it.
"""

import asyncio
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from tests.edge.wire import ask, statuses, talk
from tests.servers.fixtures import or_skip
from tests.servers.haproxy import CONFIGURATION, haproxy
from tests.servers.nginx import nginx
from tests.servers.ports import free_port
from tests.servers.waiting import wait_until
from tests.system.service import Service, request, running

TRIES = int(os.environ.get("EDGE_TRIES", "60"))
"""Attempts of each kind; ``just smuggle-edge`` makes 1000."""
MAX_CONNECTIONS = 24
SILENCE_SECONDS = 0.15
"""Time without data after which a client disconnects."""
INNER = b"GET /who HTTP/1.1\r\nHost: x\r\nX-User: admin\r\n\r\n"
POST = b"POST /up HTTP/1.1\r\nHost: x\r\n"
LENGTH = b"Content-Length: %d\r\n" % len(INNER)
TE = b"Transfer-Encoding: chunked\r\n"
IN_A_CHUNK = b"%x\r\n%s\r\n0\r\n\r\n" % (len(INNER), INNER)
AFTER_NO_CHUNK = b"0\r\n\r\n" + INNER
LONGER = b"Content-Length: %d\r\n" % len(AFTER_NO_CHUNK)
WEBSOCKET = b"websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="


def _upgrade(protocol: bytes) -> bytes:
    return POST + b"Connection: Upgrade\r\nUpgrade: %s\r\n" % protocol


def _codings(*values: bytes) -> bytes:
    return POST + LONGER + b"".join(b"Transfer-Encoding:%s\r\n" % value for value in values)


KINDS: dict[str, list[tuple[bytes, bytes]]] = {
    "upgrade to foo": [(_upgrade(b"foo") + LENGTH, INNER), (_upgrade(b"foo") + TE, IN_A_CHUNK)],
    "upgrade to h2c": [(_upgrade(b"h2c") + LENGTH, INNER), (_upgrade(b"h2c") + TE, IN_A_CHUNK)],
    "upgrade to websocket": [
        (_upgrade(WEBSOCKET) + LENGTH, INNER),
        (_upgrade(WEBSOCKET) + TE, IN_A_CHUNK),
        (_upgrade(WEBSOCKET).replace(b"POST /up", b"GET /ws") + LENGTH, INNER),
    ],
    "upgrade to one of two": [
        (_upgrade(b"foo, websocket") + LENGTH, INNER),
        (_upgrade(b"foo") + b"Upgrade: websocket\r\n" + LENGTH, INNER),
    ],
    "trailers": [
        (POST + TE, b"1\r\na\r\n0\r\nX-User: admin\r\n\r\n"),
        (POST + TE + b"Trailer: X-User\r\nTE: trailers\r\n", b"0\r\nX-User: admin\r\n\r\n"),
        (POST + TE, b"0\r\nHost: y\r\nContent-Length: 45\r\nX-User: admin\r\n\r\n"),
    ],
    "length, then coding": [(POST + LONGER + TE, AFTER_NO_CHUNK), (POST + LENGTH + TE, IN_A_CHUNK)],
    "coding, then length": [
        (POST + TE + b"Content-Length: 4\r\n", IN_A_CHUNK),
        (POST + TE + LONGER, AFTER_NO_CHUNK),
    ],
    "two codings": [
        (_codings(*values), AFTER_NO_CHUNK)
        for values in (
            (b" chunked", b" identity"),
            (b" identity", b" chunked"),
            (b" chunked", b" xchunked"),
            (b" xchunked",),
            (b" chunked, identity",),
            (b" chunked \t",),
            (b" chunked ", b" identity "),
            (b"\x0bchunked",),
            (b" chunked\x0b",),
            (b"\tchunked",),
            (b" x\r\n chunked",),
        )
    ],
    "two lengths": [
        (POST + b"Content-Length: 0\r\n" + LENGTH, INNER),
        (POST + LENGTH + b"Content-Length: 0\r\n", INNER),
        (POST + b"Content-Length: 0, %d\r\n" % len(INNER), INNER),
        (POST + b"Content-Length: +%d\r\n" % len(INNER), INNER),
        (POST + b"Content-Length : %d\r\n" % len(INNER), INNER),
        (POST + b"Content-Length: %d \t\r\n" % len(INNER), INNER),
        (POST + b"Content-Length: 0 \r\nContent-Length: %d\t\r\n" % len(INNER), INNER),
        (POST + b"Content-Length: 0\r\n\tX: %d\r\n" % len(INNER), INNER),
    ],
}


@pytest.fixture(scope="module")
def backend() -> Iterator[Service]:
    """Return the service behind all proxies."""
    with running("--app", "tests.edge.edge_app:app", management=True) as service:
        yield service.wait_ready()


@contextmanager
def _haproxy(backend: Service, folder: Path, *, keeps_upgrades: bool) -> Iterator[int]:
    rules = "http-request deny if { path_beg /who }\n    http-request del-header X-User\n"
    lines = CONFIGURATION.read_text(encoding="utf-8").splitlines(keepends=True)
    (at,) = (n for n, line in enumerate(lines) if "http-request del-header Upgrade" in line)
    lines[at] = "    " + rules + ("" if keeps_upgrades else lines[at])
    configuration = folder / "haproxy.cfg"
    configuration.write_text("".join(lines), encoding="utf-8")
    port, both = free_port(), {"a": backend.port, "b": backend.port}
    with or_skip(), haproxy(port, both, folder, configuration) as proxy:
        wait_until(proxy.statistics.exists, what="the proxy")
        wait_until(lambda: proxy.is_up("a") and proxy.is_up("b"), what="both backends are up")
        yield port


@contextmanager
def _nginx(backend: Service, folder: Path) -> Iterator[int]:
    port = free_port()
    with or_skip(), nginx(port, backend.port, folder):
        yield port


PROXIES: dict[str, Callable[[Service, Path], object]] = {
    "haproxy as shipped": lambda service, folder: _haproxy(service, folder, keeps_upgrades=False),
    "haproxy that keeps upgrades": lambda s, folder: _haproxy(s, folder, keeps_upgrades=True),
    "nginx": _nginx,
}


@pytest.fixture(scope="module", params=PROXIES)
def proxy(
    request: pytest.FixtureRequest, backend: Service, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[int]:
    """Return the port of a proxy that enforces its rules for ordinary requests."""
    with ExitStack() as stack:
        opened = PROXIES[request.param](backend, tmp_path_factory.mktemp("proxy"))
        port: int = stack.enter_context(opened)  # type: ignore[arg-type]
        wait_until(lambda: _status(port, "/echo/a") == 200, what="the proxy forwards")
        assert _status(port, "/who") == 403
        forged = POST + b"X-User: admin\r\nContent-Length: 1\r\n\r\na"
        assert talk(port, forged).json() == {"n": 1, "user": None}
        yield port


def _status(port: int, path: str) -> int | None:
    try:
        return request(port, path).status
    except OSError:
        return None


async def _send(port: int, *parts: bytes, silence: float) -> bytes:
    """Send parts 10 ms apart; return the data until the server closes or is silent."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    received = bytearray()

    async def read() -> None:
        while data := await reader.read(65536):
            received.extend(data)
            arrived.set()

    arrived = asyncio.Event()
    reading = asyncio.create_task(read())
    try:
        for part in parts:
            writer.write(part)
            await asyncio.wait({reading}, timeout=0.01)
        while not reading.done():
            arrived.clear()
            arrival = asyncio.create_task(arrived.wait())
            await asyncio.wait(
                {arrival, reading}, timeout=silence, return_when=asyncio.FIRST_COMPLETED
            )
            arrival.cancel()
            if not arrived.is_set():
                break
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        writer.close()
    return bytes(received)


async def _tries(port: int, messages: list[tuple[bytes, bytes]], count: int) -> list[bytes]:
    """Make the attempts, each followed by an innocent client's request; return its responses."""
    places = asyncio.Semaphore(MAX_CONNECTIONS)

    async def one(number: int) -> bytes:
        head, body = messages[number % len(messages)]
        parts = (
            [head + b"\r\n" + body]
            if number // len(messages) % 3 == 0
            else [head + b"\r\n", body, b""]
            if number // len(messages) % 3 == 1
            else [head + b"\r\n" + body[:9], body[9:], b""]
        )
        innocent = b"GET /echo/%d HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" % number
        async with places:
            await _send(port, *parts, silence=SILENCE_SECONDS)
            return await _send(port, innocent, silence=10.0)

    return await asyncio.gather(*(one(number) for number in range(count)))


@pytest.mark.timeout(60 + 3 * TRIES)
@pytest.mark.parametrize("kind", KINDS)
def test_no_request_is_smuggled(
    proxy: int, backend: Service, kind: str, record_property: Callable[[str, object], None]
) -> None:
    """No hidden request runs, no header is forged, and each client gets its own response."""
    before = ask(backend.port, "/executed")
    responses = asyncio.run(_tries(proxy, KINDS[kind], TRIES))
    record_property("tries through a proxy", len(responses))

    assert ask(backend.port, "/executed") == before
    assert [statuses(response) for response in responses] == [[200]] * TRIES
    assert [
        number
        for number, response in enumerate(responses)
        if b'"name":"%d"' % number not in response
    ] == []


@pytest.mark.parametrize("kind", KINDS)
def test_no_request_is_smuggled_directly(backend: Service, kind: str) -> None:
    """The same without a proxy, each message twice."""
    before = ask(backend.port, "/executed")
    messages = KINDS[kind]
    responses = asyncio.run(_tries(backend.port, messages, 2 * len(messages)))

    assert ask(backend.port, "/executed") == before
    assert [statuses(response) for response in responses] == [[200]] * len(responses)


def test_an_executed_request_is_recorded(backend: Service) -> None:
    """The record that the tests above compare changes with an executed request or header."""
    before = ask(backend.port, "/executed")
    talk(backend.port, INNER)
    after = ask(backend.port, "/executed")

    assert after["who"] == before.get("who", 0) + 1
    assert after["user=admin"] == before.get("user=admin", 0) + 1
