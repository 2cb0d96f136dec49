"""A receiver of webhooks and checks that answers, or does not, as a test tells it."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

Behaviour = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@dataclass(frozen=True, kw_only=True)
class Received:
    """One request as it came."""

    line: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Receiver:
    """Listens on a port of its own; records what comes and how many connections there were."""

    port: int = 0
    connections: int = 0
    ended: int = 0
    """Connections that the client ended or left."""
    requests: list[Received] = field(default_factory=list)
    names: list[str | None] = field(default_factory=list)
    """Server names asked for in TLS handshakes."""
    behaviours: list[Behaviour] = field(default_factory=list)
    """One for each connection; the last one for all that follow."""

    def respond_with(self, *responses: bytes | Behaviour) -> None:
        """Set what to do with each connection: a complete answer to a request, or anything."""
        self.behaviours = [
            self._responding(response) if isinstance(response, bytes) else response
            for response in responses
        ]

    async def read(self, reader: asyncio.StreamReader) -> None:
        """Read and record one request."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        line, *lines = head.removesuffix("\r\n\r\n").split("\r\n")
        headers = {name.lower(): value for name, value in (each.split(": ", 1) for each in lines)}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        self.requests.append(Received(line=line, headers=headers, body=body))

    def _responding(self, response: bytes) -> Behaviour:
        async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await self.read(reader)
            writer.write(response)
            await writer.drain()

        return behave

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        self.connections += 1
        behave = self.behaviours.pop(0) if len(self.behaviours) > 1 else self.behaviours[0]
        try:
            await behave(reader, writer)
        except (OSError, EOFError):
            self.ended += 1
        finally:
            writer.close()


def status(number: int, *headers: str, body: bytes = b"") -> bytes:
    """Return a complete answer."""
    head = [f"HTTP/1.1 {number} Whatever", *headers, f"Content-Length: {len(body)}", "", ""]
    return "\r\n".join(head).encode() + body


@asynccontextmanager
async def receiver(
    tls: ssl.SSLContext | None = None, *, host: str = "127.0.0.1", port: int = 0
) -> AsyncIterator[Receiver]:
    """Run a receiver that answers 200 until told otherwise."""
    receiving = Receiver()
    receiving.respond_with(status(200))
    if tls is not None:
        tls.sni_callback = lambda _object, name, _context: receiving.names.append(name)
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await receiving.serve(reader, writer)
        except asyncio.CancelledError:
            return  # the test is over
        finally:
            tasks.discard(task)

    server = await asyncio.start_server(serve, host, port, ssl=tls)
    receiving.port = server.sockets[0].getsockname()[1]
    try:
        yield receiving
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
