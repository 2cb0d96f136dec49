"""Litestar's caches keep no long texts of clients."""

import gc
import tracemalloc
from collections.abc import MutableMapping
from typing import Annotated, Any

import pytest
from litestar import Litestar, Request, get, post, route
from litestar.datastructures import State
from litestar.enums import RequestEncodingType
from litestar.params import Body, FromPath, FromQuery
from litestar.testing import AsyncTestClient

from viralfx import OperationsConfig, OperationsPlugin
from viralfx.settings import Settings
from viralfx.settings.groups import Secret
from viralfx.web.app import create_app, create_jobs_api
from viralfx.web.jobs.routes import MAX_QUERY_FIELDS
from viralfx.web.layer import OperationsLayer

AnyRequest = Request[object, object, State]
TOKEN = "example-token-of-the-tests"
LONG, TIMES = 12_000, 100
MAX_KEPT_BYTES = 1.25 * 2**20
"""More than bounded caches keep. Unbounded ones keep at least 2 MB of the texts that are sent."""


async def serve(
    app: Any,
    path: str,
    *,
    query: bytes = b"",
    cookie: bytes = b"",
    host: bytes = b"test",
    form: bytes | None = None,
    method: str = "GET",
) -> int:
    """Send one request without a client that keeps anything; return the status."""
    headers = [(b"host", host), (b"cookie", cookie)]
    if form is not None:
        headers.append((b"content-length", str(len(form)).encode()))
    if form is not None and path == "/form":
        headers.append((b"content-type", b"application/x-www-form-urlencoded"))
    statuses: list[int] = []

    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": form or b"", "more_body": False}

    async def send(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "server": ("test", 80),
        "client": ("127.0.0.1", 1),
        "scheme": "http",
        "method": method,
        "root_path": "",
        "path": path,
        "raw_path": path.encode(),
        "query_string": query,
        "headers": headers,
        "state": {},
    }
    await app(scope, receive, send)
    return statuses[0]


@get("/read/{name:str}")
async def read(request: AnyRequest, name: FromPath[str], a: FromQuery[str] = "") -> int:
    """Read each part of a request that Litestar caches."""
    return len([name, a, *request.cookies, *request.query_params, str(request.url)])


@route("/form", http_method=["GET", "POST"], status_code=200)
async def fill(request: AnyRequest) -> int:
    """Read a form."""
    return len(await request.form())


@post("/declared", status_code=200)
async def fill_declared(
    data: Annotated[dict[str, str], Body(media_type=RequestEncodingType.URL_ENCODED)],
) -> int:
    """Read a body that the handler declares as a form."""
    return len(data)


def kept(number: int, text: str) -> bytes:
    """Return the text of a request: no two are equal."""
    return f"{number}{text}".encode()


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("path", "\U0001f600" + "a" * LONG),
        ("query", "&a" * (LONG // 10)),
        ("cookie", "a" * 2 * LONG),
        ("host", "a" * LONG),
        ("form", "&a" * (LONG // 6)),
        ("form of a GET", "&a" * (LONG // 6)),
        ("declared", "a" * LONG),
    ],
)
async def test_long_texts_of_clients_are_not_kept(kind: str, text: str) -> None:
    """Paths, queries, cookies and forms are not, in any application of Litestar."""
    app = Litestar(
        [read, fill, fill_declared],
        plugins=[OperationsPlugin(OperationsConfig(settings=Settings()))],
        logging_config=None,
        openapi_config=None,
    )

    async def send(number: int) -> int:
        if kind == "path":
            return await serve(app, f"/read/{number}{text}")
        if kind == "form of a GET":
            return await serve(app, "/form", form=kept(number, text))
        if kind in {"form", "declared"}:
            return await serve(app, f"/{kind}", form=kept(number, text), method="POST")
        part: Any = {kind: kept(number, text)}
        return await serve(app, "/read/name", **part)

    async with AsyncTestClient(app):
        assert await growth(send, 200) < MAX_KEPT_BYTES


async def growth(send: Any, status: int) -> int:
    """Return how much memory is kept after many requests."""
    for number in range(20):
        assert await send(-1 - number) == status
    tracemalloc.start()
    try:
        for number in range(TIMES):
            assert await send(number) == status
        gc.collect()
        return tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("framework", ["own", "other"])
async def test_a_request_without_a_token_leaves_nothing(framework: str) -> None:
    """The router caches the path before the jobs API looks for its token."""
    settings = Settings(api_token=Secret(TOKEN))
    app = create_app(settings)
    served: Any = app
    if framework == "other":
        served = create_jobs_api(OperationsLayer(OperationsConfig(settings=settings)))

    async def send(number: int) -> int:
        return await serve(served, f"/api/v1/jobs/\U0001f600{'a' * LONG}{framework}{number}")

    async with AsyncTestClient(app):
        assert await growth(send, 401) < MAX_KEPT_BYTES


async def test_a_query_has_a_limited_number_of_fields() -> None:
    """Litestar would make an object of each; the answer is that for other bad requests."""
    app = create_app(Settings())
    async with AsyncTestClient(app) as client:
        most = await client.get(f"/api/v1/jobs?{'&' * (MAX_QUERY_FIELDS - 1)}")
        beyond = await client.get(f"/api/v1/jobs?{'&' * MAX_QUERY_FIELDS}")

    assert most.status_code == 200
    assert beyond.status_code == 400
    assert beyond.headers["content-type"] == "application/problem+json"
    assert beyond.json()["detail"] == "The query has more than 100 fields."
