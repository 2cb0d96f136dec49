"""An application of Litestar, with the plugin."""

from typing import Any

from litestar import Litestar, MediaType, WebSocket, get, post, websocket
from tests.frameworks.scene import Clients, config, hold

from viralfx import OperationsPlugin


@get("/hold", media_type=MediaType.TEXT)
async def held() -> str:
    """Wait until the test goes on."""
    return await hold()


@get("/items/{item:str}", media_type=MediaType.TEXT)
async def item(item: str) -> str:
    """Return the id."""
    return item


@post("/jobs", media_type=MediaType.TEXT)
async def submit() -> str:
    """Submit a job."""
    return (await plugin.jobs.submit("scene.note", "written")).job.id


@websocket("/echo")
async def echo(socket: WebSocket[Any, Any, Any]) -> None:
    """Send each message back."""
    await socket.accept()
    while True:
        await socket.send_text(await socket.receive_text())


async def open_clients() -> None:
    """Open the clients, after the lifespans of all plugins."""
    await clients.open(plugin)


clients = Clients()
plugin = OperationsPlugin(config(clients))
app = Litestar(
    [held, item, submit, echo],
    plugins=[plugin],
    on_startup=[open_clients],
    logging_config=None,
)
