"""An application of FastAPI."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import APIRouter, FastAPI, WebSocket, WebSocketDisconnect
from fastapi.responses import PlainTextResponse
from tests.frameworks.scene import Clients, config, hold

from viralfx.asgi import OperationsMiddleware

clients = Clients()


@asynccontextmanager
async def lifespan(_api: FastAPI) -> AsyncIterator[None]:
    """Open the clients."""
    await clients.open(app)
    yield


api = FastAPI(lifespan=lifespan)
router = APIRouter()


@api.get("/hold")
async def held() -> PlainTextResponse:
    """Wait until the test goes on."""
    return PlainTextResponse(await hold())


@router.get("/{item}")
async def item(item: str) -> PlainTextResponse:
    """Return the id."""
    return PlainTextResponse(item)


@api.post("/jobs")
async def submit() -> PlainTextResponse:
    """Submit a job."""
    return PlainTextResponse((await app.jobs.submit("scene.note", "written")).job.id)


@api.websocket("/echo")
async def echo(socket: WebSocket) -> None:
    """Send each message back."""
    await socket.accept()
    try:
        while True:
            await socket.send_text(await socket.receive_text())
    except WebSocketDisconnect:
        pass


api.include_router(router, prefix="/items")
app = OperationsMiddleware(api, config(clients))
