"""WebSockets: invalid frames cause a close frame and a warning, but no error."""

import asyncio
import base64
import os
import signal
import socket
from typing import Any

import pytest
from tests.servers.waiting import wait_until
from tests.system.service import Service, running
from uvicorn import Config
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from uvicorn.server import ServerState

from viralfx.server.connections import Connections
from viralfx.server.limits import HttpLimits
from viralfx.server.websocket import limited_websocket_class

PLAIN = ("--app", "tests.system.apps:plain")


def handshake(path: str, extra: str = "") -> bytes:
    """Return the head of a handshake."""
    key = base64.b64encode(os.urandom(16)).decode()
    lines = [
        f"GET {path} HTTP/1.1",
        "Host: test",
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        f"Sec-WebSocket-Key: {key}",
        *([extra] if extra else []),
    ]
    return "\r\n".join([*lines, "", ""]).encode()


def opened(service: Service, path: str = "/socket", *, extra: str = "") -> socket.socket:
    """Open a WebSocket and return its connection after the handshake."""
    connection = socket.create_connection(("127.0.0.1", service.port), timeout=20)
    connection.sendall(handshake(path, extra))
    received = b""
    while b"\r\n\r\n" not in received:
        received += connection.recv(1)
    assert received.startswith(b"HTTP/1.1 101 ")
    return connection


@pytest.mark.each_python
@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (b"\xff" * 80, 1002),
        (b"\x81\x05hello", 1002),
        (b"\x81\xff" + b"\xff" * 8 + b"a" * 100, 1009),
        (b"\x88\x82aaaaaa", 1002),
        (b"\x81\x81\0\0\0\0\xff", 1007),
        (b"\x01\x80\0\0\0\0" + b"\x00\x80\0\0\0\0" * 2000, 1009),
    ],
    ids=["opcode", "unmasked", "length", "close-code", "text", "fragments"],
)
def test_an_invalid_frame_closes_the_connection(frame: bytes, code: int) -> None:
    """The client gets the standard close code; the log has no traceback."""
    with running(*PLAIN) as service:
        service.wait_ready()
        with opened(service) as connection:
            connection.sendall(frame)
            received = b""
            while chunk := connection.recv(65536):
                received += chunk
        service.signal(signal.SIGTERM)
        assert service.exit_code() == 0
        lines = [line for line in service.output if '"level":"error"' in line]

        rejections = service.logged("HTTP request rejected")

    assert [line["reason"] for line in rejections] == ["websocket"]
    assert received[0] == 0x88
    assert int.from_bytes(received[2:4], "big") == code
    assert lines == []


@pytest.mark.parametrize("scheme", ["http", "ws"])
def test_an_absolute_address_opens_a_websocket(scheme: str) -> None:
    """Clients send one to a proxy, which may pass it on unchanged."""
    with running(*PLAIN) as service:
        service.wait_ready()
        opened(service, f"{scheme}://test/socket?from=proxy").close()


def test_a_websocket_counts_as_a_connection_until_it_ends() -> None:
    """The gauge rises with the handshake and falls with the close."""

    def connections(service: Service) -> float:
        body = service.manage("/metrics").body.decode()
        (line,) = [
            line
            for line in body.splitlines()
            if line.startswith('viralfx_http_connections{server="api"}')
        ]
        return float(line.split()[1])

    with running(*PLAIN, management=True) as service:
        service.wait_ready()
        sockets = [opened(service) for _ in range(5)]
        assert connections(service) == 5
        for connection in sockets:
            connection.close()
        wait_until(lambda: connections(service) == 0, what="all are closed")


def test_a_frame_after_an_invalid_one_is_no_error() -> None:
    """The connection ends, and the log has one warning."""
    with running(*PLAIN) as service:
        service.wait_ready()
        for _ in range(20):
            with opened(service) as connection:
                connection.sendall(b"\x81\x81\0\0\0\0\xff" + b"\x88\x82\0\0\0\0\x03\xe8")
                while connection.recv(65536):
                    pass
        service.signal(signal.SIGTERM)
        assert service.exit_code() == 0
        lines = service.logged("HTTP request rejected")

    assert [line for line in service.output if '"level":"error"' in line] == []
    assert len(lines) <= 2
    assert sum(1 + line["others"] for line in lines) >= 20


@pytest.mark.parametrize(
    ("app", "path", "code"),
    [
        ("tests.edge.edge_app:app", "/ws", 4001),
        ("tests.frameworks.starlette_app:app", "/once", 1006),
        ("tests.frameworks.plain_app:app", "/echo", 1006),
    ],
    ids=["litestar", "starlette", "plain"],
)
def test_a_client_that_closes_before_the_answer_is_no_error(app: str, path: str, code: int) -> None:
    """The log has the line of its end alone; with the client's code, if the framework closes."""
    with running("--app", app) as service:
        service.wait_ready()
        for _ in range(5):
            with opened(service, path) as connection:
                connection.sendall(b"\x81\x81\0\0\0\0a" + b"\x88\x82\0\0\0\0\x0f\xa1")
                while connection.recv(65536):
                    pass
        service.signal(signal.SIGTERM)
        assert service.exit_code() == 0
        codes = [line["closeCode"] for line in service.logged(f"WEBSOCKET {path} {code}")]

    assert [line for line in service.output if '"level":"error"' in line] == []
    assert codes == [code] * 5


def test_compression_is_not_negotiated() -> None:
    """A small compressed frame could inflate to a very large message."""
    with running(*PLAIN) as service:
        service.wait_ready()
        with opened(service, extra="Sec-WebSocket-Extensions: permessage-deflate") as connection:
            connection.sendall(b"\xc1\x81\0\0\0\0\xff")
            received = connection.recv(65536)

    assert int.from_bytes(received[2:4], "big") == 1002


async def test_a_pong_may_wait_behind_messages_that_are_not_read() -> None:
    """The server asks again, and does not blame the client for the pace of the application."""
    pings = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "websocket"
        await send({"type": "websocket.accept"})
        await pings.wait()
        read = [await receive() for _ in range(3)]  # the connection, and two messages
        await send({"type": "websocket.send", "text": f"{len(read)}"})

    config = Config(app, ws_ping_interval=0.05, ws_ping_timeout=0.05, lifespan="off")
    config.load()
    connections = Connections(HttpLimits())
    kind: Any = limited_websocket_class(WebSocketsSansIOProtocol, connections)
    server = await asyncio.get_running_loop().create_server(
        lambda: kind(config, ServerState(), {}), "127.0.0.1"
    )
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    writer.write(handshake("/"))
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"\x81\x81\0\0\0\0a" * 2)
    received = []
    async with asyncio.timeout(20):
        while (head := await reader.readexactly(2))[0] != 0x81:
            received.append(head[0])
            data = await reader.readexactly(head[1])
            writer.write(b"\x8a" + bytes((0x80 | len(data),)) + bytes(4) + data)
            if len(received) == 2:
                pings.set()
        assert await reader.readexactly(1) == b"3"
    writer.close()
    server.close()

    assert set(received) == {0x89}
