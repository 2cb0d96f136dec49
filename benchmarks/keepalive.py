"""Keep-alive clients that record the outcome of each request.

Run as a program it is the load generator if ``wrk`` is not installed.
"""

import asyncio
import json
import sys
import time
from typing import cast

import uvloop

HEADERS = {"User-Agent": "kube-probe/1.34", "Accept": "*/*"}


class KeepAliveClients:
    """Clients that each send one request after another, and reconnect if the server closes."""

    def __init__(self, port: int, path: str, *, count: int, posted: str = "") -> None:
        """Request a path by GET, or POST the JSON document ``posted`` to it."""
        lines = ["Host: localhost", *map(": ".join, HEADERS.items())]
        if posted:
            length = f"Content-Length: {len(posted.encode())}"
            lines = [f"POST {path} HTTP/1.1", *lines, "Content-Type: application/json", length]
        else:
            lines = [f"GET {path} HTTP/1.1", *lines]
        self.request = "\r\n".join([*lines, "", posted]).encode()
        self.responded = 0
        self.lost: list[str] = []
        """The reason for each lost request; its client then stops."""
        self.leaving = False
        self._port, self._count = port, count
        self._present = 0
        self._gone = asyncio.Event()

    async def come(self) -> None:
        """Connect and start; returns when every client is connected."""
        self._present = self._count
        async with asyncio.TaskGroup() as group:
            for _ in range(self._count):
                group.create_task(self.connect())

    async def leave(self) -> None:
        """Wait for responses to sent requests, send no more, and close."""
        self.leaving = True
        if self._present:
            await self._gone.wait()

    async def connect(self) -> None:
        """Open one connection for a client."""
        loop = asyncio.get_running_loop()
        try:
            await loop.create_connection(lambda: _Connection(self), "127.0.0.1", self._port)
        except OSError as error:
            self.give_up(f"refused: {error.strerror}")

    def give_up(self, why: str) -> None:
        """Count a request as lost, and its client as stopped."""
        self.lost.append(why)
        self.went()

    def went(self) -> None:
        """Count a client as stopped."""
        self._present -= 1
        if not self._present:
            self._gone.set()


class _Connection(asyncio.Protocol):
    def __init__(self, clients: KeepAliveClients) -> None:
        self._clients = clients
        self._received = b""
        self._waiting = False
        self._reconnecting: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._waiting = True
        self._transport.write(self._clients.request)

    def data_received(self, data: bytes) -> None:
        received = self._received + data if self._received else data
        head_end = received.find(b"\r\n\r\n")
        length_at = received.find(b"content-length: ", 0, head_end)
        if length_at < 0:
            self._received = received
            return
        length = int(received[length_at + 16 : received.find(b"\r", length_at)])
        if len(received) < head_end + 4 + length:
            self._received = received
            return
        self._received = b""
        clients = self._clients
        if not received.startswith(b"HTTP/1.1 2"):
            clients.lost.append(received[:head_end].split(b"\r", 1)[0].decode("latin-1"))
        else:
            clients.responded += 1
        if clients.leaving:
            self._waiting = False
            self._transport.close()
            clients.went()
        elif received.find(b"connection: close", 0, head_end) > 0:
            self._waiting = False
            self._transport.close()
            self._reconnecting = asyncio.get_running_loop().create_task(clients.connect())
        else:
            self._transport.write(clients.request)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._waiting:
            self._clients.give_up(f"closed: {exc}")


async def _load(
    port: int, path: str, connections: int, seconds: float, posted: str = ""
) -> dict[str, object]:
    clients = KeepAliveClients(port, path, count=connections, posted=posted)
    began = time.monotonic()
    await clients.come()
    await asyncio.sleep(seconds)
    await clients.leave()
    return {
        "requests": clients.responded,
        "failed": len(clients.lost),
        "why": sorted(set(clients.lost)),
        "seconds": time.monotonic() - began,
    }


if __name__ == "__main__":
    port_text, requested, connections_text, seconds_text, *body = sys.argv[1:]
    work = _load(int(port_text), requested, int(connections_text), float(seconds_text), *body)
    print(json.dumps(uvloop.run(work)))
