"""An application of FastAPI."""

from fastapi import APIRouter, FastAPI, WebSocket, WebSocketDisconnect
from fastapi.responses import PlainTextResponse
from tests.frameworks.scene import config, hold

from viralfx.asgi import OperationsMiddleware

api = FastAPI()
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
app = OperationsMiddleware(api, config())
