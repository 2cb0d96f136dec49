"""An application of Starlette."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect
from tests.frameworks.scene import Clients, config, hold

from viralfx.asgi import OperationsMiddleware

clients = Clients()


@asynccontextmanager
async def lifespan(_api: Starlette) -> AsyncIterator[None]:
    """Open the clients."""
    await clients.open(app)
    yield


async def held(_request: Request) -> PlainTextResponse:
    """Wait until the test goes on."""
    return PlainTextResponse(await hold())


async def item(request: Request) -> PlainTextResponse:
    """Return the id."""
    return PlainTextResponse(request.path_params["id"])


async def submit(_request: Request) -> PlainTextResponse:
    """Submit a job."""
    return PlainTextResponse((await app.jobs.submit("scene.note", "written")).job.id)


async def echo(socket: WebSocket) -> None:
    """Send each message back."""
    await socket.accept()
    try:
        while True:
            await socket.send_text(await socket.receive_text())
    except WebSocketDisconnect:
        pass


async def once(socket: WebSocket) -> None:
    """Send one message back, without a thought of clients that disconnect."""
    await socket.accept()
    await socket.send_text(await socket.receive_text())


routes = [
    Route("/hold", held),
    Route("/items/{id}", item),
    Route("/jobs", submit, methods=["POST"]),
    WebSocketRoute("/echo", echo),
    WebSocketRoute("/once", once),
]
app = OperationsMiddleware(Starlette(routes=routes, lifespan=lifespan), config(clients))
