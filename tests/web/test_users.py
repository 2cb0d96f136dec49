"""Whose request it is, from one request of a connection to the next."""

from typing import Any

from litestar import Litestar, get
from litestar.testing import AsyncTestClient

from viralfx import OperationsConfig, OperationsPlugin, bind_user_id
from viralfx.domain.correlation import current_user_id
from viralfx.settings import Settings


@get("/who")
async def who() -> str:
    """Tell the user that log lines would name."""
    return str(current_user_id())


async def test_a_request_is_not_that_of_the_user_before() -> None:
    """A server begins a pipelined request in the context of the one before it."""
    app = Litestar([who], plugins=[OperationsPlugin(OperationsConfig(settings=Settings()))])
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope: Any = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
        "path": "/who",
        "raw_path": b"/who",
        "root_path": "",
        "query_string": b"",
        "scheme": "http",
        "headers": [],
        "client": None,
        "server": None,
    }
    async with AsyncTestClient(app):
        bind_user_id("who asked before")
        await app(scope, receive, send)

    assert sent[-1]["body"] == b"None"
