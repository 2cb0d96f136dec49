"""Responses: the fast path writes the same bytes as uvicorn, without reference cycles."""

import asyncio
import gc
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from litestar import Litestar, get
from tests.edge.inside import served
from tests.edge.test_websockets import handshake
from tests.edge.wire import statuses
from uvicorn.logging import TRACE_LOG_LEVEL
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from viralfx import OperationsConfig
from viralfx.server.connections import Connections
from viralfx.server.interface import Message, Receive, Scope, Send
from viralfx.server.limits import HttpLimits
from viralfx.server.response import ResponseCycle
from viralfx.settings import Settings
from viralfx.web.gate import Gate
from viralfx.web.in_flight import InFlightRequest
from viralfx.web.layer import OperationsLayer

DATE = (b"date", b"Fri, 27 Nov 2026 12:00:00 GMT")


class RecordingTransport:
    """A transport that records bytes and calls."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.closed = 0

    def write(self, piece: bytes) -> None:
        """Record a piece."""
        self.pieces.append(piece)

    def close(self) -> None:
        """Count the call."""
        self.closed += 1

    def is_closing(self) -> bool:
        """Return True after a close."""
        return self.closed > 0

    def pause_reading(self) -> None:
        """Do nothing, because nothing is read."""

    resume_reading = pause_reading


def once(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message whose headers, and each of them, can be read once."""
    headers = message.get("headers")
    return message if headers is None else {**message, "headers": map(iter, headers)}


def outcome(
    kind: type[RequestResponseCycle],
    messages: list[dict[str, Any]],
    method: str,
    *,
    keep: bool,
    copied: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> tuple[object, ...]:
    """Return everything that client and server observe of a response to ``copied`` messages."""
    transport, ends = RecordingTransport(), list[int]()
    cycle = kind(
        scope=cast("Any", {"type": "http", "method": method, "headers": []}),
        transport=cast("Any", transport),
        flow=FlowControl(cast("Any", transport)),
        logger=cast("Any", TRACE_LOG_LEVEL),
        access_logger=cast("Any", None),
        access_log=False,
        default_headers=[DATE],
        message_event=asyncio.Event(),
        expect_100_continue=False,
        keep_alive=keep,
        on_response=lambda: ends.append(1),
    )
    if isinstance(cycle, ResponseCycle):
        cycle.connections = Connections(HttpLimits())
        cycle.connections.server_head = b"%b: %b\r\n" % DATE
    errors = []
    for message in messages:
        # No coroutine here waits, so one step completes it.
        try:
            cycle.send(cast("Any", copied(message))).send(None)
        except StopIteration:
            continue
        except Exception as error:  # noqa: BLE001 - both must raise the same error
            errors.append((type(error), str(error)))
    return (
        b"".join(transport.pieces),
        transport.closed,
        len(ends),
        errors,
        cycle.response_started,
        cycle.response_complete,
        cycle.keep_alive,
        cycle.message_event.is_set(),
    )


NAMES = st.sampled_from(
    [
        *(b"content-type", b"Content-Type", b"x-correlation-id", b"X" * 70, b"a b", b"x\n", b""),
        *(b"connection", b"transfer-encoding", b"content-length", b"Content-Length"),
    ]
)
VALUES = st.sampled_from(
    [
        *(b"", b"2", b"0", b"3", b"+2", b" 2", b"text/plain", b"close", b"chunked"),
        *(b"keep-alive, Close", b"a\r\nb", b"\xff\t", b"\x00"),
    ]
)
STARTS = st.fixed_dictionaries(
    {
        "type": st.just("http.response.start"),
        "status": st.sampled_from([200, 201, 204, 304, 404, 500, 599, 600]),
    },
    optional={"headers": st.lists(st.tuples(NAMES, VALUES), max_size=5)},
)
BODIES = st.fixed_dictionaries(
    {"type": st.just("http.response.body")},
    optional={"body": st.sampled_from([b"", b"ok", b"abc"]), "more_body": st.booleans()},
)
ORDINARY: list[dict[str, Any]] = [
    {
        "type": "http.response.start",
        "status": 200,
        "headers": [(b"Content-Type", b"text/plain"), (b"content-length", b"2")],
    },
    {"type": "http.response.body", "body": b"ok"},
]


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_an_ordinary_response_has_the_same_bytes_as_uvicorn(method: str, *, keep: bool) -> None:
    """The order and case of the headers, and the close, are the same."""
    expected = outcome(RequestResponseCycle, ORDINARY, method, keep=keep)

    assert outcome(ResponseCycle, ORDINARY, method, keep=keep) == expected
    assert cast("bytes", expected[0]).startswith(b"HTTP/1.1 200 OK\r\ndate: ")


@given(
    messages=st.lists(STARTS | BODIES, max_size=2)
    | st.tuples(STARTS, BODIES).map(list)
    | st.tuples(STARTS, BODIES, BODIES).map(list),
    method=st.sampled_from(["GET", "HEAD", "POST"]),
    keep=st.booleans(),
)
def test_any_response_has_the_same_bytes_and_errors_as_uvicorn(
    messages: list[dict[str, Any]], method: str, *, keep: bool
) -> None:
    """Invalid names, values, lengths and orders have the same errors; so have iterators."""
    expected = outcome(RequestResponseCycle, messages, method, keep=keep)

    assert outcome(ResponseCycle, messages, method, keep=keep) == expected
    assert outcome(ResponseCycle, messages, method, keep=keep, copied=once) == expected


LENGTH, TYPE, OWN = (b"content-length", b"2"), (b"content-type", b"text/plain"), (b"x-own", b"a")
SHAPES = {
    "/length": [TYPE, LENGTH, OWN],
    "/chunked": [TYPE, OWN],
    "/close": [TYPE, LENGTH, OWN, (b"connection", b"close")],
    "/coding": [TYPE, OWN, (b"transfer-encoding", b"chunked")],
    "/id": [TYPE, LENGTH, (b"x-correlation-id", b"mine"), OWN],
    "/events": [(b"content-type", b"text/event-stream"), OWN],
    "/long": [TYPE, LENGTH, (b"x-" + b"n" * 70, b"a"), OWN],
    "/error": [TYPE, LENGTH, OWN],
}
"""Headers that take different ways through the gate and the server, by path."""


async def sends(scope: Scope, receive: Receive, send: Send) -> None:
    """Respond with headers that can be read once, as a WebSocket accepts or rejects with them."""
    headers = map(iter, SHAPES[scope["path"]])
    if scope["type"] == "websocket":
        await receive()
        kind = "accept" if scope["path"] == "/chunked" else "http.response.start"
        await send({"type": f"websocket.{kind}", "status": 418, "headers": headers})
        if kind != "accept":
            await send({"type": "websocket.http.response.body", "body": b"ok"})
        return
    status = 500 if scope["path"] == "/error" else 200
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b"ok"})


def own_lines(received: bytes) -> set[bytes]:
    """Return the lines of a head that come from the application."""
    head = received.partition(b"\r\n\r\n")[0].lower()
    shown = {b"%b: %b" % header for headers in SHAPES.values() for header in headers}
    return shown & set(head.split(b"\r\n"))


@pytest.mark.parametrize("stopping", [False, True])
@pytest.mark.parametrize("method", [b"GET", b"HEAD"])
async def test_headers_that_can_be_read_once_reach_the_client(
    method: bytes, *, stopping: bool
) -> None:
    """On each way of a response; the correlation id is the one of the request."""
    found = {}
    async with served(sends) as server:
        server.gate.requests.stopping = stopping
        for path in SHAPES:
            message = b"%b %b HTTP/1.1\r\nHost: x\r\n\r\n" % (method, path.encode())
            found[path] = own_lines(await server.ask(message, head=method == b"HEAD"))

    wanted = {path: {b"%b: %b" % each for each in pairs} for path, pairs in SHAPES.items()}
    wanted["/id"].remove(b"x-correlation-id: mine")
    if stopping:
        wanted = {path: {*lines, b"connection: close"} for path, lines in wanted.items()}
    for path in {"/chunked", "/events"} if method == b"GET" else ():
        wanted[path].add(b"transfer-encoding: chunked")
    assert found == wanted


async def test_headers_of_a_websocket_can_be_read_once() -> None:
    """When it is accepted, and when the application rejects it with a response."""
    async with served(sends) as server:
        accepted = await server.ask(handshake("/chunked"))
        rejected = await server.ask(handshake("/length"))

    assert accepted.startswith(b"HTTP/1.1 101 ")
    assert own_lines(accepted) == {b"content-type: text/plain", b"x-own: a"}
    assert rejected.startswith(b"HTTP/1.1 418 ")
    assert b"x-own: a" in own_lines(rejected)


async def test_one_message_may_accept_several_websockets() -> None:
    """Each gets one correlation id, its own."""
    accept = {"type": "websocket.accept"}

    async def accepts(_: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send(accept)

    async with served(accepts) as server:
        heads = [(await server.ask(handshake("/"))).lower() for _ in range(3)]

    assert [head.count(b"\r\nx-correlation-id: ") for head in heads] == [1, 1, 1]
    assert accept == {"type": "websocket.accept"}


async def test_one_message_may_start_several_responses() -> None:
    """A server keeps the message while a client reads slowly: each request has its own."""
    start: Message = {"type": "http.response.start", "status": 200, "headers": [OWN]}
    given = {**start, "headers": [OWN]}
    kept: list[Message] = []

    async def app(_: Scope, _receive: Receive, send: Send) -> None:
        await send(start)

    async def keep(message: Message) -> None:
        kept.append(message)

    gate = Gate(OperationsLayer(OperationsConfig(settings=Settings())).endpoints, app)
    gate.open = True
    ids = [b"first", b"second"]
    for each in ids:
        headers = [(b"x-correlation-id", each)]
        scope = {"type": "http", "method": "GET", "path": "/", "headers": headers}
        await gate(scope, asyncio.Queue[Message]().get, keep)

    found = [dict(message["headers"]) for message in kept]
    assert found == [{b"x-correlation-id": each, b"x-own": b"a"} for each in ids]
    assert start == given


async def test_headers_of_a_request_can_be_read_once() -> None:
    """Another server may pass an iterator; the gate and the application both see all headers."""
    given = [(b"host", b"x"), (b"x-correlation-id", b"mine"), (b"x-own", b"a")]
    seen: list[object] = []

    async def app(scope: Scope, _receive: Receive, send: Send) -> None:
        seen.append(list(scope["headers"]))
        await send({"type": "http.response.start", "status": 200, "headers": ()})

    async def send(message: Message) -> None:
        seen.append(message["headers"])

    scope = {"type": "http", "method": "GET", "path": "/", "headers": iter(given)}
    gate = Gate(OperationsLayer(OperationsConfig(settings=Settings())).endpoints, app)
    gate.open = True
    await gate(scope, asyncio.Queue[Message]().get, send)

    assert seen == [given, [(b"x-correlation-id", b"mine")]]


async def test_headers_that_fail_start_no_response() -> None:
    """The server answers 500, and the record of the request says so."""

    def failing() -> Iterator[tuple[bytes, bytes]]:
        yield TYPE
        raise ValueError("planted")

    async def app(_: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": failing()})

    async with served(app) as server:
        ended: list[tuple[int | None, bool]] = []
        server.gate.requests._on_end = lambda each: ended.append((each.status, each.complete))
        received = await server.ask(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")

    assert statuses(received) == [500]
    assert ended == [(500, True)]


@get("/work", sync_to_thread=False)
def work() -> str:
    """Respond."""
    return "done"


async def test_a_request_has_no_reference_cycle() -> None:
    """A cycle would keep the memory of each request until a garbage collection."""
    async with served(Litestar([work], logging_config=None)) as server:
        reader, writer = await asyncio.open_connection(*server.address)
        try:
            gc.collect()
            gc.disable()
            before = {id(one) for one in gc.get_objects()}  # other tests may have left some
            for _ in range(50):
                writer.write(b"GET /work HTTP/1.1\r\nHost: x\r\n\r\n")
                await reader.readuntil(b"done")
            await asyncio.sleep(0)
            left = [
                one
                for one in gc.get_objects()
                if issubclass(type(one), (InFlightRequest, ResponseCycle)) and id(one) not in before
            ]
        finally:
            gc.enable()
            writer.close()
            await writer.wait_closed()

    assert len(left) <= 2  # of the last request, whose task may not have ended
