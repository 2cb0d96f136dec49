"""An application whose requests end early, by their clients or by itself."""

import asyncio
import logging
from collections.abc import AsyncIterator

from litestar import Litestar, Request, Response, asgi, get, post
from litestar.background_tasks import BackgroundTask
from litestar.datastructures import State
from litestar.exceptions import HTTPException
from litestar.response import Stream
from litestar.types import Receive, Scope, Send

from viralfx import OperationsPlugin
from viralfx.web.jobs.changes import jobs_router

AnyRequest = Request[object, object, State]


@post("/upload")
async def upload(request: AnyRequest) -> dict[str, int]:
    """Read a body."""
    return {"bytes": len(await request.body())}


@post("/upload/typed")
async def upload_typed(data: dict[str, int]) -> dict[str, int]:
    """Receive a body that Litestar reads."""
    return data


@post("/upload/group")
async def upload_in_a_group(request: AnyRequest) -> None:
    """Read a body in a separate task."""
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(request.body())


@get("/stream/endless")
async def endless_stream() -> Stream:
    """Send bytes without end."""

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b"."
            await asyncio.sleep(0.02)

    return Stream(endless())


@get("/stream/fails")
async def failing_stream() -> Stream:
    """Fail after a part of the response."""

    async def some() -> AsyncIterator[bytes]:
        yield b"." * 1000
        raise RuntimeError("planted")

    return Stream(some())


def _fail() -> None:
    raise RuntimeError("planted")


@get("/after/fails")
async def failing_after() -> Response[str]:
    """Send a complete response, then fail."""
    return Response("answered", background=BackgroundTask(_fail))


def _fail_too(_request: AnyRequest, error: HTTPException) -> Response[str]:
    raise RuntimeError("planted") from error


@get("/handler/fails", exception_handlers={HTTPException: _fail_too})
async def failing_handler() -> None:
    """Fail, and fail again in the error handler."""
    raise HTTPException(status_code=409)


_left = [0]
_released = asyncio.Event()


async def _wait(request: AnyRequest) -> None:
    """Wait for the release; count clients that disconnect before it."""
    in_flight = request.scope["viralfx.in_flight"]  # type: ignore[typeddict-item]
    notified = in_flight.on_disconnect

    def count() -> None:
        _left[0] += 1
        notified()

    in_flight.on_disconnect = count
    await _released.wait()


@get("/waits")
async def waits(request: AnyRequest) -> None:
    """Continue after the client has disconnected."""
    await _wait(request)


@get("/waits/cancelled", cancel_on_disconnect=True)
async def waits_cancelled(request: AnyRequest) -> None:
    """Stop when the client disconnects."""
    try:
        await _wait(request)
    except asyncio.CancelledError:
        logging.getLogger("viralfx.cut_app").info("cancelled")
        raise


@get("/listens")
async def listens(request: AnyRequest) -> None:
    """Wait for the disconnect of the client."""
    await request.body()
    while (await request.receive())["type"] != "http.disconnect":
        pass


@get("/left", media_type="text/plain")
async def left() -> str:
    """Return the number of clients that have disconnected."""
    return str(_left[0])


@get("/release")
async def release() -> None:
    """Release the waiting handlers, and no later one."""
    _released.set()
    _released.clear()


@asgi("/mounted", is_mount=True, copy_scope=True)
async def mounted(scope: Scope, receive: Receive, send: Send) -> None:
    """Respond in place of another application."""
    del scope, receive
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"mounted", "more_body": False})


plugin = OperationsPlugin()
app = Litestar(
    [
        upload,
        upload_typed,
        upload_in_a_group,
        endless_stream,
        failing_stream,
        failing_after,
        failing_handler,
        waits,
        waits_cancelled,
        listens,
        left,
        release,
        mounted,
        jobs_router(plugin),
    ],
    plugins=[plugin],
    logging_config=None,
)
