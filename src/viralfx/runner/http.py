"""One HTTP server whose start and stop are separate steps.

uvicorn does the protocol; its own main loop, signal handling and shutdown order are not used,
because they close the listeners before anything else can be said (ADR-0008).
"""

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.lifespan.on import LifespanOn

from viralfx.runner.server_log import SERVER_LOG
from viralfx.web.asgi import ASGIApp

LoopFactory = Callable[[], asyncio.AbstractEventLoop]


class HttpServer:
    """Serves an ASGI application on one listening socket."""

    def __init__(self, app: ASGIApp, listener: socket.socket, *, lifespan: bool) -> None:
        """With ``lifespan`` the application's own start-up and shutdown are driven as well."""
        self._config = uvicorn.Config(
            app,
            http="httptools",
            lifespan="on" if lifespan else "off",
            log_config=None,
            access_log=False,
            server_header=False,
            # Longer than the idle time of the usual load balancers (60 s): whoever closes an idle
            # connection first must be the client, or a request sent at that moment is lost.
            timeout_keep_alive=75,
        )
        self._config.load()
        self._listener = listener
        self._server = uvicorn.Server(self._config)
        self._lifespan = LifespanOn(self._config) if lifespan else None
        self._clock_task: asyncio.Task[None] | None = None

    @property
    def address(self) -> tuple[str, int]:
        """The host and port that are listened on."""
        name = self._listener.getsockname()
        return str(name[0]), int(name[1])

    async def open(self) -> None:
        """Accept connections; the application's lifespan has not begun yet."""
        SERVER_LOG.install()
        self._server.lifespan = _StateOnly(self._lifespan.state if self._lifespan else {})
        await self._server.on_tick(0)
        await self._server.startup(sockets=[self._listener])
        self._clock_task = asyncio.create_task(self._tick(), name="http-date")

    async def start_application(self) -> bool:
        """Run the application's own start-up; False when it failed, which is then logged."""
        if self._lifespan is None:
            return True
        await self._lifespan.startup()
        return not self._lifespan.should_exit

    async def stop_application(self) -> bool:
        """Run the application's own shutdown, if its start-up ended; False when it failed."""
        if self._lifespan is None or not self._lifespan.startup_event.is_set():
            return True
        await self._lifespan.shutdown()
        return not self._lifespan.should_exit

    def stop_listening(self) -> None:
        """Refuse new connections, close idle ones, and have busy ones close after their answer."""
        if self._server.started:
            for server in self._server.servers:
                server.close()
        self._listener.close()
        for connection in list(self._server.server_state.connections):
            connection.shutdown()

    def close(self) -> None:
        """Stop listening and cut every connection that is left."""
        if self._clock_task is not None:
            self._clock_task.cancel()
        self.stop_listening()
        for connection in list(self._server.server_state.connections):
            if connection.transport is not None:
                connection.transport.close()
        SERVER_LOG.tell_rest(now=True)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            await self._server.on_tick(0)  # renews the Date header
            SERVER_LOG.tell_rest()


class _StateOnly:
    """Stands in for uvicorn's lifespan while the listeners open ahead of the application."""

    should_exit = False

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state

    async def startup(self) -> None:
        pass


def loop_factory() -> LoopFactory:
    """Return what makes the event loop: uvloop where there is one."""
    factory = uvicorn.Config("", loop="auto", log_config=None).get_loop_factory()
    return factory or asyncio.new_event_loop
