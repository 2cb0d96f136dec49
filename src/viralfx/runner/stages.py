"""The shutdown stages of the HTTP side."""

from viralfx.domain.clock import Clock
from viralfx.domain.errors import WorkLostError
from viralfx.runner.http import HttpServer
from viralfx.web.gate import Gate


class StopListening:
    """Closes the listeners, has connections close, and tells the clients of streams."""

    def __init__(self, server: HttpServer, gate: Gate) -> None:
        self._server = server
        self._gate = gate

    async def run(self, budget: float) -> None:  # noqa: ARG002 - nothing here waits
        """Do it now; WebSockets are closed with 1012, event streams get the event ``shutdown``."""
        self._server.stop_listening()
        self._gate.exchanges.tell()


class DrainRequests:
    """Waits for the requests in flight."""

    def __init__(self, gate: Gate, clock: Clock) -> None:
        self._gate = gate
        self._clock = clock

    async def run(self, budget: float) -> None:
        """Wait, then cut; fails only when a request had to go without an answer."""
        await self._gate.exchanges.drain(budget, self._clock)


class StopApplication:
    """Runs the application's own shutdown."""

    def __init__(self, server: HttpServer) -> None:
        self._server = server

    async def run(self, budget: float) -> None:  # noqa: ARG002 - the sequence cuts it
        """End the ASGI lifespan; raises :class:`WorkLostError` when the application fails at it."""
        if not await self._server.stop_application():
            raise WorkLostError("the application's own shutdown failed; the log says why")


class CloseServer:
    """Closes a server for good."""

    def __init__(self, server: HttpServer) -> None:
        self._server = server

    async def run(self, budget: float) -> None:  # noqa: ARG002 - nothing here waits
        """Stop listening, where that is still to do, and cut what is connected."""
        self._server.close()
