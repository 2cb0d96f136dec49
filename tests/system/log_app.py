"""An application that logs secrets, blocks its loop and fails, for tests of the log."""

import asyncio
import logging
import time
import warnings
from typing import Annotated

from litestar import Litestar, Request, get, post
from litestar.datastructures import State
from litestar.middleware import ASGIMiddleware
from litestar.params import FromPath, QueryParameter
from litestar.types import ASGIApp, Receive, Scope, Send

from viralfx import OperationsPlugin, bind_user_id
from viralfx.web.jobs.changes import jobs_router

plugin = OperationsPlugin()
_logger = logging.getLogger("shop.orders")

AnyRequest = Request[object, object, State]


class _Identity(ASGIMiddleware):
    async def handle(self, scope: Scope, receive: Receive, send: Send, next_app: ASGIApp) -> None:
        user = dict(scope.get("headers", ())).get(b"x-user")
        bind_user_id(None if user is None else user.decode("latin-1"))
        await next_app(scope, receive, send)


@get("/orders/{order:int}")
async def one(order: FromPath[int]) -> dict[str, int]:
    """Log lines of the application at several levels."""
    _logger.info("Order read", extra={"order": order})
    _logger.debug("Order was in the cache", extra={"order": order})
    return {"order": order}


@post("/echo", status_code=200)
async def echo(request: AnyRequest) -> dict[str, int]:
    """Read a body."""
    return {"bytes": len(await request.body())}


@get("/leak")
async def leak(request: AnyRequest) -> None:
    """Log every secret in every form, then fail with them."""
    settings = plugin.settings
    assert settings.database_url is not None
    assert settings.management_token is not None
    secrets = {
        "dsn": settings.database_url.value,
        "token": settings.management_token.value,
        "headers": {k.decode(): v.decode() for k, v in request.scope["headers"]},
    }
    _logger.warning("Leaking %s", secrets, extra=secrets)
    warnings.warn(f"connect to {secrets['dsn']}", stacklevel=1)
    logging.getLogger("asyncpg").warning("connecting with %r", secrets["dsn"])
    logging.getLogger("taskiq.receiver").error("token %s", secrets["token"])
    raise RuntimeError(f"cannot use {secrets}")


@get("/block")
async def block(seconds: Annotated[float, QueryParameter()]) -> None:
    """Block the event loop."""
    time.sleep(seconds)  # noqa: ASYNC251 - the fault itself


@get("/crash")
async def crash() -> None:
    """Start a task that fails with a secret in its error."""

    async def fail() -> None:
        assert plugin.settings.management_token is not None
        raise RuntimeError(f"planted {plugin.settings.management_token.value}")

    asyncio.get_running_loop().call_soon(asyncio.ensure_future, fail())


@get("/flood")
async def flood(lines: Annotated[int, QueryParameter()]) -> None:
    """Log ``lines`` lines."""
    for number in range(lines):
        _logger.info("Flood", extra={"number": number, "padding": "x" * 200})


app = Litestar(
    [one, echo, leak, block, crash, flood, jobs_router(plugin)],
    middleware=[_Identity()],
    plugins=[plugin],
)
