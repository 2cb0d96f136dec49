"""An application whose requests do not end as they should, by their clients or by itself."""

import asyncio
from collections.abc import AsyncIterator

from litestar import Litestar, Request, Response, asgi, get, post
from litestar.background_tasks import BackgroundTask
from litestar.datastructures import State
from litestar.exceptions import HTTPException
from litestar.response import Stream
from litestar.types import Receive, Scope, Send

from viralfx import OperationsPlugin
from viralfx.web.jobs import jobs_router

AnyRequest = Request[object, object, State]


@post("/upload")
async def upload(request: AnyRequest) -> dict[str, int]:
    """Take a body."""
    return {"bytes": len(await request.body())}


@post("/upload/typed")
async def upload_typed(data: dict[str, int]) -> dict[str, int]:
    """Take a body that Litestar reads."""
    return data


@post("/upload/group")
async def upload_in_a_group(request: AnyRequest) -> None:
    """Take a body in a task of its own."""
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(request.body())


@get("/stream/endless")
async def endless_stream() -> Stream:
    """Send bytes for ever."""

    async def forever() -> AsyncIterator[bytes]:
        while True:
            yield b"."
            await asyncio.sleep(0.02)

    return Stream(forever())


@get("/stream/fails")
async def failing_stream() -> Stream:
    """Fail after a part of the answer."""

    async def some() -> AsyncIterator[bytes]:
        yield b"." * 1000
        raise RuntimeError("planted")

    return Stream(some())


def _fail() -> None:
    raise RuntimeError("planted")


@get("/after/fails")
async def failing_after() -> Response[str]:
    """Answer whole, and fail then."""
    return Response("answered", background=BackgroundTask(_fail))


def _fail_too(_request: AnyRequest, error: HTTPException) -> Response[str]:
    raise RuntimeError("planted") from error


@get("/handler/fails", exception_handlers={HTTPException: _fail_too})
async def failing_handler() -> None:
    """Fail, and then in what was to answer for it."""
    raise HTTPException(status_code=409)


@asgi("/mounted", is_mount=True, copy_scope=True)
async def mounted(scope: Scope, receive: Receive, send: Send) -> None:
    """Stand for another application."""
    del scope, receive
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"mounted", "more_body": False})


app = Litestar(
    [
        upload,
        upload_typed,
        upload_in_a_group,
        endless_stream,
        failing_stream,
        failing_after,
        failing_handler,
        mounted,
        jobs_router(),
    ],
    plugins=[OperationsPlugin()],
    logging_config=None,
)
