"""The memory of connections that the server ends, and of those that have ended."""

import asyncio
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from tests.edge.test_large_reads import frame
from tests.edge.test_websockets import handshake
from uvicorn import Config
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from uvicorn.server import ServerState

from viralfx.server.connections import Connections
from viralfx.server.limits import HttpLimits
from viralfx.server.protocol import protocol_class
from viralfx.server.websocket import limited_websocket_class
from viralfx.web.in_flight import InFlightRequests

App = Callable[[Any, Any, Any], Awaitable[None]]
LARGE = 240_000
ROUNDS = 20
ANSWER = b"\x81\x01."
_awaited: list[asyncio.Event] = []


@asynccontextmanager
async def served(app: App, connections: Connections) -> AsyncIterator[tuple[str, int]]:
    """Serve an application with real connections; yield the address."""
    config = Config(app, lifespan="off", log_config=None)
    config.load()
    websockets: Any = limited_websocket_class(WebSocketsSansIOProtocol, connections)
    requests: Any = protocol_class(connections, InFlightRequests(), {}, None, app)
    state = ServerState()

    def connected() -> asyncio.Protocol:
        connections.open += 1
        kind = websockets if app is not late else requests
        return kind(config, state, {})  # type: ignore[no-any-return]

    loop = asyncio.get_running_loop()
    server = await loop.create_server(connected, "127.0.0.1")
    yield server.sockets[0].getsockname()
    server.close()


async def opened(address: tuple[str, int]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Open a WebSocket."""
    reader, writer = await asyncio.open_connection(*address)
    writer.write(handshake("/"))
    await reader.readuntil(b"\r\n\r\n")
    return reader, writer


async def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - nothing announces it
            await asyncio.sleep(0.001)


async def answering(_: Any, receive: Any, send: Any) -> None:
    """Answer each message."""
    await send({"type": "websocket.accept"})
    while (message := await receive())["type"] != "websocket.disconnect":
        if message.pop("type") == "websocket.receive":
            message.clear()
            await send({"type": "websocket.send", "text": "."})


async def stays() -> None:
    """Wait for the end of the test, in a task that no collection of garbage ends before."""
    event = asyncio.Event()
    _awaited.append(event)
    await event.wait()


async def mute(_: Any, receive: Any, send: Any) -> None:
    """Accept a WebSocket, and wait for something else."""
    await receive()
    await send({"type": "websocket.accept"})
    await stays()


async def late(_: Any, __: Any, ___: Any) -> None:
    """Do not read the body of a request."""
    await stays()


async def test_a_server_without_memory_ends_the_websockets_that_hold_most(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A parser keeps the last frame. Other connections go on, and nothing stays counted."""
    used = 0
    monkeypatch.setattr("viralfx.server.connections._used_bytes", lambda: used)
    connections = Connections(HttpLimits(max_request_bytes=4 * LARGE, max_resident_bytes=1))
    backlogs, rejected = connections.backlogs, list[str]()
    connections.on_rejected = rejected.append
    async with served(answering, connections) as address:
        clients = [await opened(address) for _ in range(9)]
        for reader, writer in clients[:6]:
            writer.write(frame(bytes(LARGE)))
            assert await reader.readexactly(3) == ANSWER
        used = 2
        clients[6][1].write(frame(bytes(LARGE)))
        await until(lambda: bool(rejected))
        for reader, writer in clients[7:]:
            writer.write(frame(b"small"))
            assert await reader.readexactly(3) == ANSWER
        for _, writer in clients:
            writer.close()
        await until(lambda: connections.open == 0)

    assert 3 <= rejected.count("websocket") == len(rejected) <= 4
    assert backlogs._waiting_bytes == 0
    assert not backlogs._held


@pytest.mark.parametrize(
    ("app", "sent"),
    [
        (mute, frame(bytes(900_000))[:-1]),
        (mute, b"\x02" + frame(bytes(900_000))[1:]),
        (late, b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 90000\r\n\r\n" + bytes(60_000)),
    ],
    ids=["a message", "a fragment", "a body"],
)
async def test_bytes_of_a_client_that_left_are_freed(app: App, sent: bytes) -> None:
    """Of an application that does not notice its end."""
    connections = Connections(HttpLimits())
    backlogs, before = connections.backlogs, 0
    expected = 0.9 * (len(sent) - 1000)
    tracemalloc.start()
    try:
        async with served(app, connections) as address:
            for number in range(ROUNDS):
                if number == 1:
                    before = tracemalloc.get_traced_memory()[0]
                if app is mute:
                    _, writer = await opened(address)
                else:
                    _, writer = await asyncio.open_connection(*address)
                writer.write(sent)
                await until(lambda: connections.request_bytes + backlogs._waiting_bytes > expected)
                writer.close()
                await until(lambda: connections.open == 0)
            grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
        _awaited.clear()

    assert grown < 0.3 * (ROUNDS - 1) * len(sent)
    assert connections.request_bytes == backlogs._waiting_bytes == 0
