"""An ASGI application without a framework and without a lifespan."""

from tests.frameworks.scene import config, hold

from viralfx.asgi import OperationsMiddleware
from viralfx.server.interface import Receive, Scope, Send


async def plain(scope: Scope, receive: Receive, send: Send) -> None:
    """Serve ``/hold``, ``/items/{id}``, ``/jobs`` and the WebSocket ``/echo``."""
    if scope["type"] == "websocket":
        scope["viralfx.route"] = "/echo"
        await echo(receive, send)
        return
    assert scope["type"] == "http", "no lifespan here"
    body = "missing"
    if scope["path"] == "/hold":
        scope["viralfx.route"] = "/hold"
        body = await hold()
    elif scope["path"].startswith("/items/"):
        scope["viralfx.route"] = "/items/{id}"
        body = scope["path"].removeprefix("/items/")
    elif scope["path"] == "/jobs":
        scope["viralfx.route"] = "/jobs"
        body = (await app.jobs.submit("scene.note", "written")).job.id
    await send({"type": "http.response.start", "status": 404 if body == "missing" else 200})
    await send({"type": "http.response.body", "body": body.encode()})


async def echo(receive: Receive, send: Send) -> None:
    """Send each message back."""
    while (message := await receive())["type"] != "websocket.disconnect":
        if message["type"] == "websocket.connect":
            await send({"type": "websocket.accept"})
        else:
            await send({"type": "websocket.send", "text": message["text"]})


app = OperationsMiddleware(plain, config())
