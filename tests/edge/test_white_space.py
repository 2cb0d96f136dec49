"""White space around the value of a header is not a part of it (RFC 9112, 5.1)."""

import re

import msgspec
import pytest
from litestar import Litestar, Request, WebSocket, post, websocket
from litestar.datastructures import State
from tests.edge.inside import served
from tests.edge.wire import RawResponse, first_response, statuses

from viralfx.server.limits import HttpLimits
from viralfx.settings import Secret, Settings

TOKEN = "a-management-token-of-some-length"
SETTINGS = Settings(management_token=Secret(TOKEN))
PADDINGS = [b" ", b"\t", b" \t \t", b"   "]
HANDSHAKE = (
    b"GET /ws HTTP/1.1\r\nHost: x\r\nConnection: Upgrade%b\r\nUpgrade: websocket%b\r\n"
    b"Sec-WebSocket-Version: 13%b\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==%b\r\n"
    b"X: a%b\r\n\r\n"
)
MASKS = [
    (re.compile(rb"(?m)^(date|x-correlation-id): [^\r]+"), rb"\1: M"),
    (re.compile(rb'("correlationId"|"timestamp"):"[^"]+"'), rb'\1:"M"'),
    (re.compile(rb'"uptime":[\d.]+'), b'"uptime":0'),
    (re.compile(rb"content-length: \d+"), b"content-length: N"),
]


@post("/echo", status_code=200)
async def echo(request: Request[object, object, State]) -> dict[str, object]:
    """Return the headers as the application sees them, and the body."""
    headers = [(name.decode(), value.decode("latin-1")) for name, value in request.scope["headers"]]
    return {"headers": headers, "body": (await request.body()).decode()}


@websocket("/ws")
async def ws(socket: WebSocket[object, object, State]) -> None:
    """Accept with a header of the handshake."""
    await socket.accept(headers={"X": repr(socket.headers["x"])})
    await socket.close()


APP = Litestar([echo, ws], logging_config=None)


def response_of(received: bytes) -> RawResponse:
    """Return the first response."""
    parsed = first_response(received)
    assert parsed is not None, received
    return parsed[0]


def masked(received: bytes) -> bytes:
    """Return responses with placeholders for values that differ between equal requests."""
    for pattern, instead in MASKS:
        received = pattern.sub(instead, received)
    return received


def request(*lines: bytes, line: bytes = b"POST /echo HTTP/1.1", body: bytes = b"") -> bytes:
    """Return a message with these lines in its head."""
    return b"\r\n".join([line, *lines, b"", body])


@pytest.mark.each_python
async def test_the_application_sees_values_without_it() -> None:
    """Spaces and tabs at both ends; all other bytes belong to the value."""
    given = {
        b"X: a ": "a",
        b"X:a\t": "a",
        b"X: \t a \t ": "a",
        b"X:  a \t b  ": "a \t b",
        b"X: \t ": "",
        b"X:": "",
        b"X: \xa0a\xa0": "\xa0a\xa0",
        b"X: 5 \t": "5",
    }
    async with served(APP, settings=SETTINGS) as server:
        answers = {
            line: response_of(await server.ask(request(b"Host: x", line))).json()["headers"]
            for line in given
        }

    assert answers == {line: [["host", "x"], ["x", value]] for line, value in given.items()}


CASES = {
    "Host": request(b"Host: localhost%b"),
    "Host with a port": request(b"Host: [::1]:80%b"),
    "length": request(b"Host: x", b"Content-Length: 2%b", body=b"{}"),
    "Expect": request(b"Host: x", b"Content-Length: 2", b"Expect: 100-continue%b", body=b"{}"),
    "an ignored upgrade": request(b"Host: x", b"Connection: Upgrade%b", b"Upgrade: h2c%b"),
    "a token": request(
        *(b"Host: x", b"Authorization: Bearer " + TOKEN.encode() + b"%b"),
        line=b"GET /health/shutdown HTTP/1.1",
    ),
    "a probe": request(b"Host: x%b", b"X: a%b", line=b"GET /health/live HTTP/1.1"),
}
CLOSING = {
    "close": request(b"Host: x", b"Connection: close%b"),
    "close among others": request(b"Host: x", b"Connection: x , Close%b"),
    "a probe": request(b"Host: x", b"Connection: close%b", line=b"GET /health/live HTTP/1.1"),
    "HTTP/1.0": request(b"Host: x", b"Connection: keep-alive%b", line=b"POST /echo HTTP/1.0"),
    "HTTP/1.0 without": request(b"Host: x%b", line=b"POST /echo HTTP/1.0"),
}
"""Requests after whose response the server closes the connection."""


@pytest.mark.each_python
@pytest.mark.parametrize("name", CASES | CLOSING)
async def test_the_response_is_the_same(name: str) -> None:
    """For each header that the server itself reads."""
    message, closes = (CASES | CLOSING)[name], name in CLOSING
    async with served(APP, settings=SETTINGS) as server:
        bare = masked(await server.ask(message.replace(b"%b", b""), closes=closes))
        padded = {
            padding: masked(await server.ask(message.replace(b"%b", padding), closes=closes))
            for padding in PADDINGS
        }

    assert set(statuses(bare)) <= {200, 201}, bare
    assert padded == dict.fromkeys(PADDINGS, bare)


async def test_a_correlation_id_is_valid_with_it() -> None:
    """For a fast probe and for the application."""
    lines = (b"Host: x", b"X-Correlation-ID: mine-1 \t")
    async with served(APP, settings=SETTINGS) as server:
        answers = [
            response_of(await server.ask(request(*lines, line=line)))
            for line in (b"POST /echo HTTP/1.1", b"GET /health/live HTTP/1.1")
        ]

    assert [each.header(b"x-correlation-id") for each in answers] == [b"mine-1", b"mine-1"]


@pytest.mark.parametrize("after", PADDINGS)
async def test_a_handshake_opens_a_websocket(after: bytes) -> None:
    """Its headers have no white space at the end either."""
    async with served(APP, settings=SETTINGS) as server:
        received = await server.ask(HANDSHAKE.replace(b"%b", after))

    assert statuses(received) == [101]
    assert b"\r\nx: 'a'\r\n" in received.lower()


async def test_no_request_after_a_padded_close_is_served() -> None:
    """The second request is not answered, as after ``close`` alone."""
    second = request(b"Host: x")
    async with served(APP, settings=SETTINGS) as server:
        answers = [
            statuses(await server.ask(request(b"Host: x", line) + second, closes=True))
            for line in (b"Connection: close", b"Connection: close \t")
        ]

    assert answers == [[200], [200]]


@pytest.mark.parametrize(
    "lines",
    [
        (b"Host: a b",),
        (b"Host: a\tb",),
        (b"Host : x",),
        (b"Host: x\x0b",),
        (b"Host: x", b"X\t: a"),
        (b"Host: x", b" X: a"),
        (b"Host: x", b"X: a", b" b"),
        (b"Host: x", b"X: a ", b"\tb"),
        (b"Host: x", b"Content-Length : 2"),
        (b"Host: x", b"Content-Length: 2 2"),
        (b"Host: x", b"Content-Length: 2\t2"),
        (b"Host: x", b"Content-Length: 2\x0b"),
        (b"Host: x", b"Content-Length: \x0c2"),
        (b"Host: x", b"Content-Length: 2 ", b"Content-Length: 2 "),
        (b"Host: x", b"Content-Length: 2 ", b"Transfer-Encoding: chunked "),
        (b"Host: x", b"Transfer-Encoding: chunked x"),
        (b"Host: x", b"Transfer-Encoding: \x0bchunked"),
        (b"Host: x", b"Transfer-Encoding: chunked\x0b"),
    ],
)
async def test_other_white_space_is_invalid(lines: tuple[bytes, ...]) -> None:
    """Within a value, before a colon, at the beginning of a line, and of other kinds."""
    async with served(APP, settings=SETTINGS) as server:
        received = await server.ask(request(*lines, body=b"0\r\n\r\n"), closes=True)

    assert statuses(received) == [400]


async def test_white_space_counts_as_a_part_of_the_head() -> None:
    """The limit is for the bytes that are sent."""
    async with served(APP, limits=HttpLimits(max_head_bytes=1000)) as server:
        answers = [
            statuses(await server.ask(request(b"Host: x", b"X: a" + b" " * size)))
            for size in (900, 1100)
        ]

    assert answers == [[200], [431]]


async def test_the_body_in_chunks_is_read_after_it() -> None:
    """A space after ``chunked``; the parser refuses a tab there."""
    lines, body = (b"Host: x", b"Transfer-Encoding: chunked  "), b"2\r\n{}\r\n0\r\n\r\n"
    async with served(APP, settings=SETTINGS) as server:
        space = response_of(await server.ask(request(*lines, body=body)))
        lines = (b"Host: x", b"Transfer-Encoding: chunked\t")
        tab = await server.ask(request(*lines, body=body), closes=True)

    assert msgspec.json.decode(space.body)["body"] == "{}"
    assert ["transfer-encoding", "chunked"] in msgspec.json.decode(space.body)["headers"]
    assert statuses(tab) == [400]
