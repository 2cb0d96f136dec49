"""Fast probes and probes through ASGI have the same bytes.

The protocol itself serves a plain request for a probe. A request with a query, or with anything
else that is not plain, goes through ASGI. Each message of the table is sent to a service whose
probes all go through ASGI, and to a service with both paths: in one write, with a query in each
target, byte by byte, and split in two at each byte.
"""

import asyncio
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TypeAlias

import pytest
from tests.edge.wire import Wire, first_response
from tests.system.service import Service, running

APP = ("--app", "tests.edge.edge_app:app")
Parts: TypeAlias = tuple[bytes, bytes]
"""Head and body of a response."""
Observed: TypeAlias = dict[str, tuple[list[Parts], list[list[Parts]]]]
"""By message: the expected responses, and the responses to each way to send it."""
MAX_CONNECTIONS = 100
SILENCE_SECONDS = 0.1
"""Time without data after which a response on an open connection is complete."""
MAX_SILENCES = 50
"""Number of silences to wait for if the expected response is incomplete."""
OPEN = b"(open)"
"""Appended to the responses of a connection that the server keeps open."""
HANDSHAKE = (
    b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)


def _get(
    target: bytes, *lines: bytes, body: bytes = b"", method: bytes = b"GET", version: bytes = b"1.1"
) -> bytes:
    head = b"".join(line + b"\r\n" for line in (b"Host: x", *lines))
    return b"%s %s HTTP/%s\r\n%s\r\n%s" % (method, target, version, head, body)


LIVE = b"/health/live"
ECHO = _get(b"/echo/a")
MESSAGES = {
    "plain": _get(LIVE),
    "ready": _get(b"/health/ready"),
    "startup": _get(b"/health/startup"),
    "basic": _get(b"/health"),
    "detailed": _get(b"/health/detailed"),
    "one check": _get(b"/health/memory"),
    "unknown check": _get(b"/health/nothing"),
    "metrics": _get(b"/metrics"),
    "open metrics": _get(b"/metrics", b"Accept: application/openmetrics-text; version=1.0.0"),
    "close": _get(LIVE, b"Connection: close"),
    "close among others": _get(LIVE, b"Connection: x, Close"),
    "keep-alive": _get(LIVE, b"Connection: keep-alive"),
    "body with a length": _get(LIVE, b"Content-Length: 5", body=b"abcde"),
    "no body with a length": _get(LIVE, b"Content-Length: 0"),
    "body in chunks": _get(LIVE, b"Transfer-Encoding: chunked", body=b"3\r\nabc\r\n0\r\n\r\n"),
    "trailers": _get(LIVE, b"Transfer-Encoding: chunked", body=b"0\r\nX-Request-ID: a\r\n\r\n"),
    "three at once": _get(LIVE) * 3,
    "probe, document, probe": _get(LIVE) + _get(b"/echo/b") + _get(b"/health/ready"),
    "API, then probe": ECHO + _get(LIVE),
    "probe, then API": _get(LIVE) + ECHO,
    "probe, close, probe": _get(LIVE, b"Connection: close") + _get(LIVE),
    "body, then probe": _get(b"/up", b"Content-Length: 5", body=b"abcde", method=b"POST")
    + _get(LIVE),
    "probe with body, then probe": _get(LIVE, b"Content-Length: 5", body=b"abcde") + _get(LIVE),
    "HEAD": _get(LIVE, method=b"HEAD"),
    "HEAD of details": _get(b"/health/detailed", method=b"HEAD"),
    "HEAD of metrics": _get(b"/metrics", method=b"HEAD"),
    "HEAD, then GET": _get(LIVE, method=b"HEAD") + _get(LIVE),
    "HEAD with a body": _get(LIVE, b"Content-Length: 5", body=b"abcde", method=b"HEAD"),
    "absolute form": _get(b"http://x/health/live"),
    "WebSocket": _get(LIVE, HANDSHAKE.rstrip(b"\r\n")),
    "h2c": _get(
        LIVE, b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: A"
    ),
    "another protocol, then probe": _get(LIVE, b"Connection: Upgrade", b"Upgrade: foo")
    + _get(LIVE),
    "Upgrade alone": _get(LIVE, b"Upgrade: h2c"),
    "Expect": _get(LIVE, b"Expect: 100-continue"),
    "Expect with a body": _get(LIVE, b"Expect: 100-continue", b"Content-Length: 5", body=b"abcde"),
    "POST": _get(LIVE, b"Content-Length: 2", body=b"{}", method=b"POST"),
    "OPTIONS": _get(LIVE, method=b"OPTIONS"),
    "TRACE": _get(LIVE, method=b"TRACE"),
    "another method": _get(LIVE, method=b"PURGE"),
    "garbage": b"\x16\x03\x01\x02\x00\x01\r\n\r\n",
    "garbage after a probe": _get(LIVE) + b"\x16\x03\x01\x02\x00\x01\r\n\r\n",
    "length and coding": _get(
        LIVE, b"Content-Length: 5", b"Transfer-Encoding: chunked", body=b"0\r\n\r\n"
    ),
    "escape": _get(b"/health/l%69ve"),
    "trailing slash": _get(b"/health/live/"),
    "two slashes": _get(b"//health/live"),
    "dots": _get(b"/health/../health/live"),
    "semicolon": _get(b"/health/live;a"),
    "own correlation id": _get(LIVE, b"X-Correlation-ID: mine-1"),
    "own request id": _get(LIVE, b"x-request-id: mine-2"),
    "wrong correlation id": _get(LIVE, b"X-Correlation-ID: not valid", b"X-Request-ID: mine-3"),
    "two correlation ids": _get(LIVE, b"X-Correlation-ID: first", b"X-Correlation-ID: second"),
    "HTTP/1.0": _get(LIVE, version=b"1.0"),
    "HTTP/1.0 keep-alive": _get(LIVE, b"Connection: keep-alive", version=b"1.0"),
    "HTTP/1.2": _get(LIVE, version=b"1.2"),
    "white space after values": _get(LIVE, b"X-Request-ID: a \t", b"Accept: b "),
    "no Host": b"GET /health/live HTTP/1.1\r\n\r\n",
    "a wrong token": _get(b"/health/detailed", b"Authorization: Bearer wrong"),
    "empty lines before": b"\r\n\r\n" + _get(LIVE),
    "two heads and an end": _get(LIVE) + b"GET /health/live HTTP/1.1\r\nHost: x\r\nConn",
}
"""Plain and unusual requests."""

_MASKS = [
    (re.compile(rb"(?im)^(date: )[^\r]+"), rb"\1D"),
    (re.compile(rb'"uptime":[\d.]+'), b'"uptime":0'),
    (re.compile(rb'"(timestamp|lastCheck|since|checkedAt)":"[^"]+"'), rb'"\1":"T"'),
    (re.compile(rb"(?m)^(x-correlation-id: )[0-9a-f]{32}(?=\r|\Z)"), rb"\1ID"),
    (re.compile(rb'"correlationId":"[0-9a-f]{32}"'), b'"correlationId":"ID"'),
    (re.compile(rb"(?m)^(retry-after: )\d+"), rb"\1N"),
]
_CHANGES = (b'"uptime"', b'"timestamp"', b'"responseTime"', b"# HELP")
"""Fields of bodies whose length differs between requests."""


def masked(received: bytes, *, head: bool) -> list[Parts]:
    """Return heads and bodies with placeholders for values that differ between equal requests.

    With ``head`` the first response is to a HEAD request. An incomplete response, or one without
    a length, is returned unchanged.
    """
    responses: list[Parts] = []
    rest = received
    while rest:
        parsed = first_response(rest, head_only=head and not responses)
        if parsed is None:
            return [*responses, (b"", rest)]
        response, rest = parsed
        changing = any(change in response.body for change in _CHANGES)
        first, body = response.head, response.body
        if changing or not body:
            first = re.sub(rb"(content-length: )[1-9]\d*", rb"\1N", first)
        if b"# HELP" in body or b'"usagePercent"' in body or b'"rss"' in body:
            body = re.sub(rb"[^a-z]", b"", body[:30])
        for pattern, instead in _MASKS:
            first, body = pattern.sub(instead, first), pattern.sub(instead, body)
        responses.append((first, body))
    return responses


async def _send(port: int, parts: list[bytes], enough: Callable[[bytes], bool]) -> bytes:
    """Send the parts one by one; return the data until the server closes or is silent.

    While the data is not ``enough``, the wait continues through several silences.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    received = bytearray()

    async def read() -> None:
        with suppress(ConnectionError):
            while data := await reader.read(65536):
                received.extend(data)

    reading = asyncio.create_task(read())
    try:
        for part in parts:
            if reading.done():
                break
            writer.write(part)
            if len(parts) > 1:
                await asyncio.wait({reading}, timeout=0.004 if len(parts) == 2 else 0.0005)
        seen = -1
        for _ in range(MAX_SILENCES):
            await asyncio.wait({reading}, timeout=SILENCE_SECONDS)
            if reading.done() or (seen == len(received) and enough(bytes(received))):
                break
            seen = len(received)
        closed = reading.done()
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        writer.close()
    return bytes(received) + (b"" if closed else OPEN)


def _ways(message: bytes) -> list[list[bytes]]:
    singly = [message[at : at + 1] for at in range(len(message))]
    return [[message], singly, *([message[:at], message[at:]] for at in range(1, len(message)))]


async def _observe(port: int, through_asgi: int) -> Observed:
    """Return for each message the responses through ASGI, and those to each way to send it."""
    places = asyncio.Semaphore(MAX_CONNECTIONS)

    async def one(
        name: str, port: int, parts: list[bytes], expected: list[Parts] | None = None
    ) -> list[Parts]:
        head = MESSAGES[name].startswith(b"HEAD")

        def enough(received: bytes) -> bool:
            if expected is None:
                return bool(received)
            return masked(received + OPEN, head=head) == expected

        async with places:
            return masked(await _send(port, parts, enough), head=head)

    async def all_ways(name: str) -> tuple[list[Parts], list[list[Parts]]]:
        expected = await one(name, through_asgi, [MESSAGES[name]])
        ways = [*_ways(MESSAGES[name]), [with_queries(MESSAGES[name])]]
        return expected, await asyncio.gather(*(one(name, port, way, expected) for way in ways))

    observed = await asyncio.gather(*map(all_ways, MESSAGES))
    return dict(zip(MESSAGES, observed, strict=True))


def with_queries(message: bytes) -> bytes:
    """Return the message with a query in each target."""
    return re.sub(rb"(?m)^([A-Z]+ \S+) HTTP/1", rb"\1?long=1 HTTP/1", message)


@pytest.fixture(scope="module")
def observed() -> Observed:
    """Return the responses of two services to all messages."""
    # Details that are open to this machine alone go through ASGI on either path.
    quiet = {"ACCESS_LOG": "false", "HEALTH_DETAILS": "always"}
    with (
        running(*APP, environment=quiet) as service,
        running(*APP, environment=quiet, module="tests.edge.through_asgi") as through_asgi,
    ):
        ports = [one.wait_ready().port for one in (service, through_asgi)]
        return asyncio.run(_observe(*ports))


@pytest.mark.each_python
@pytest.mark.parametrize("name", MESSAGES)
def test_the_bytes_are_the_same(observed: Observed, name: str) -> None:
    """The split of the request and the path through the server do not matter."""
    expected, responses = observed[name]
    differing = {
        number: response for number, response in enumerate(responses) if response != expected
    }

    assert any(first for first, _ in expected), "there is a response"
    assert list(differing.values())[:1] == [expected][: len(differing)], f"ways {list(differing)}"


@pytest.fixture(scope="module")
def guarded() -> Iterator[Service]:
    """Return a service whose check details need a token."""
    environment = {
        "HEALTH_DETAILS": "authorized",
        "MANAGEMENT_TOKEN": "a-management-token-of-some-length",
    }
    with running(*APP, environment=environment) as service:
        yield service.wait_ready()


@pytest.mark.parametrize("path", ["/health/detailed", "/health/memory", "/metrics"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_both_paths_require_the_token(guarded: Service, method: str, path: str) -> None:
    """Plain requests and others get the same 401."""
    for target in (path, f"{path}?long=1"):
        message = _get(target.encode(), method=method.encode())
        for parts in ([message], [message[:9], message[9:]]):
            with Wire(guarded.port) as wire:
                response = wire.send(*parts).response(head_only=method == "HEAD")
            assert response.status == 401
            assert response.header(b"www-authenticate")
