"""An application of Quart."""

from typing import cast

from quart import Quart, Response, request, websocket
from tests.frameworks.scene import config, hold

from viralfx.asgi import OperationsMiddleware

quart = Quart(__name__)


@quart.get("/hold")
async def held() -> str:
    """Wait until the test goes on."""
    return await hold()


@quart.get("/items/<item>")
async def item(item: str) -> str:
    """Return the id."""
    return item


@quart.post("/jobs")
async def submit() -> str:
    """Submit a job."""
    return (await app.jobs.submit("scene.note", "written")).job.id


@quart.websocket("/echo")
async def echo() -> None:
    """Send each message back."""
    while True:
        await websocket.send(await websocket.receive())


@quart.after_request
async def name_route(response: Response) -> Response:
    """Tell the operations layer the route of the request."""
    if request.url_rule is not None:
        cast("dict[str, object]", request.scope)["viralfx.route"] = request.url_rule.rule
    return response


app = OperationsMiddleware(quart, config())
