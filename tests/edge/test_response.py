"""Responses: the fast path writes the same bytes as uvicorn, without reference cycles."""

import asyncio
import gc
import socket
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from litestar import Litestar, get
from uvicorn.logging import TRACE_LOG_LEVEL
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from viralfx import OperationsPlugin
from viralfx.runner.connections import Connections
from viralfx.runner.http_limits import HttpLimits
from viralfx.runner.http_response import ResponseCycle
from viralfx.runner.server import HttpServer
from viralfx.web.gate import Gate
from viralfx.web.in_flight import InFlightRequest

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


def outcome(
    kind: type[RequestResponseCycle], messages: list[dict[str, Any]], method: str, *, keep: bool
) -> tuple[object, ...]:
    """Return everything that client and server observe of a response."""
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
            cycle.send(cast("Any", dict(message))).send(None)
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
    """Invalid names, values, lengths and orders have the same errors."""
    expected = outcome(RequestResponseCycle, messages, method, keep=keep)

    assert outcome(ResponseCycle, messages, method, keep=keep) == expected


@get("/work", sync_to_thread=False)
def work() -> str:
    """Respond."""
    return "done"


async def test_a_request_has_no_reference_cycle() -> None:
    """A cycle would keep the memory of each request until a garbage collection."""
    plugin = OperationsPlugin()
    app = Litestar([work], plugins=[plugin], logging_config=None)
    gate = Gate(plugin.endpoints, cast("Any", app))
    gate.open = True
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    server = HttpServer(gate, listener, lifespan=False)
    await server.open()
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
            if isinstance(one, (InFlightRequest, ResponseCycle)) and id(one) not in before
        ]
    finally:
        gc.enable()
        writer.close()
        await writer.wait_closed()
        await server.stop_listening()
        await server.close()

    assert len(left) <= 2  # of the last request, whose task may not have ended
