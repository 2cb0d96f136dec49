"""Requests to mounted applications are counted by the path of the mount."""

import pytest
from litestar import Litestar, Router, asgi, get
from litestar.testing import AsyncTestClient
from litestar.types import Receive, Scope, Send

from viralfx import OperationsConfig, OperationsPlugin
from viralfx.settings import Settings


async def respond(send: Send) -> None:
    """Send a response."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"mounted", "more_body": False})


@asgi(["/shop", "/shop-two"], is_mount=True, copy_scope=True)
async def shop(scope: Scope, receive: Receive, send: Send) -> None:
    """Serve an application that is mounted at two paths."""
    del scope, receive
    await respond(send)


@asgi("/files", is_mount=True, copy_scope=True)
async def files(scope: Scope, receive: Receive, send: Send) -> None:
    """Serve an application that is mounted below a router."""
    del scope, receive
    await respond(send)


@get("/")
async def root() -> str:
    """Serve an ordinary route."""
    return "root"


@pytest.mark.parametrize(
    ("path", "route"),
    [
        ("/shop", "/shop"),
        ("/shop/items/17?a=b", "/shop"),
        ("/shop-two/items", "/shop-two"),
        ("/%73hop-two/items", "/shop-two"),
        ("/api/files/17", "/api/files"),
        ("/", "/"),
        ("/api", "unmatched"),
    ],
)
async def test_a_mounted_application_is_counted_by_its_mount_path(path: str, route: str) -> None:
    """The label is never a path that a client chose."""
    plugin = OperationsPlugin(OperationsConfig(settings=Settings()))
    app = Litestar([root, shop, Router("/api", route_handlers=[files])], plugins=[plugin])
    async with AsyncTestClient(app) as client:
        await client.get(path)
        metrics = (await client.get("/metrics")).text

    counted = [line for line in metrics.splitlines() if "request_duration_seconds_count{" in line]
    assert [f'http_route="{route}"' in line for line in counted] == [True]
