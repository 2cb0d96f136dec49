"""A server in the process of a test, with an application behind a gate."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, cast

from tests.edge.wire import TIMEOUT_SECONDS, first_response

from viralfx import OperationsConfig
from viralfx.server.http_server import HttpServer
from viralfx.server.limits import HttpLimits
from viralfx.settings import Settings
from viralfx.web.gate import Gate
from viralfx.web.layer import OperationsLayer


@dataclass(frozen=True)
class Served:
    """A running server."""

    gate: Gate
    address: tuple[str, int]

    async def ask(self, message: bytes, *, head: bool = False, closes: bool = False) -> bytes:
        """Send a message over a new connection, and return what arrives.

        That is the first response, without a body after ``head``. With ``closes`` it is everything
        until the server closes the connection.
        """
        reader, writer = await asyncio.open_connection(*self.address)
        received = b""
        try:
            writer.write(message)
            async with asyncio.timeout(TIMEOUT_SECONDS):
                while closes or first_response(received, head_only=head) is None:
                    if not (data := await reader.read(65536)):
                        break
                    received += data
        finally:
            writer.close()
        return received


@asynccontextmanager
async def served(
    app: object, *, settings: Settings | None = None, limits: HttpLimits | None = None
) -> AsyncIterator[Served]:
    """Serve an ASGI application, whose lifespan does not run."""
    layer = OperationsLayer(OperationsConfig(settings=settings or Settings()))
    gate = Gate(layer.endpoints, cast("Any", app))
    gate.open = True
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    server = HttpServer(gate, listener, lifespan=False, limits=limits)
    await server.open()
    try:
        yield Served(gate, server.address)
    finally:
        await server.close()
