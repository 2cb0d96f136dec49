"""Applications that are mounted in one with the plugin are told apart by where that is."""

import pytest
from litestar import Litestar, Router, asgi, get
from litestar.testing import AsyncTestClient
from litestar.types import Receive, Scope, Send

from viralfx import OperationsConfig, OperationsPlugin
from viralfx.settings import Settings


async def answer(send: Send) -> None:
    """Answer anything."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"mounted", "more_body": False})


@asgi(["/shop", "/shop-two"], is_mount=True, copy_scope=True)
async def shop(scope: Scope, receive: Receive, send: Send) -> None:
    """Stand for an application with two paths."""
    del scope, receive
    await answer(send)


@asgi("/files", is_mount=True, copy_scope=True)
async def files(scope: Scope, receive: Receive, send: Send) -> None:
    """Stand for one below a router."""
    del scope, receive
    await answer(send)


@get("/")
async def root() -> str:
    """Have a template of the application's own."""
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
async def test_what_is_mounted_is_counted_by_its_path(path: str, route: str) -> None:
    """Under any server, and by no path that a client chose."""
    plugin = OperationsPlugin(OperationsConfig(settings=Settings()))
    app = Litestar([root, shop, Router("/api", route_handlers=[files])], plugins=[plugin])
    async with AsyncTestClient(app) as client:
        await client.get(path)
        metrics = (await client.get("/metrics")).text

    counted = [line for line in metrics.splitlines() if "request_duration_seconds_count{" in line]
    assert [f'http_route="{route}"' in line for line in counted] == [True]
