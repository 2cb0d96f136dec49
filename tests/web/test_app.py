"""The service's own application: every error is a problem, the unhandled ones too."""

import logging
from collections.abc import AsyncIterator
from typing import Annotated

import pytest
from litestar import Litestar, get
from litestar.exceptions import HTTPException, InternalServerException
from litestar.params import QueryParameter
from litestar.testing import AsyncTestClient

from viralfx.settings import Settings
from viralfx.web.app import create_app


@get("/unhandled")
async def unhandled() -> None:
    """Fail in a way nobody expected."""
    raise RuntimeError("planted secret")


@get("/internal")
async def internal() -> None:
    """Fail with a text that is not for clients."""
    raise InternalServerException("planted secret")


@get("/gone")
async def gone() -> None:
    """Fail on purpose, with a header."""
    raise HTTPException("It was here once.", status_code=410, headers={"X-Since": "2026"})


@get("/typed")
async def typed(count: Annotated[int, QueryParameter()]) -> int:
    """Take a number."""
    return count


@pytest.fixture
async def client() -> AsyncIterator[AsyncTestClient[Litestar]]:
    """Return a client of the service with four handlers more."""
    app = create_app(Settings())
    for handler in (unhandled, internal, gone, typed):
        app.register(handler)
    async with AsyncTestClient(app, raise_server_exceptions=False) as test_client:
        yield test_client


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("POST", "/gone", 405),
        ("GET", "/gone", 410),
        ("GET", "/typed?count=many", 400),
        ("GET", "/unhandled", 500),
        ("GET", "/internal", 500),
        ("GET", "/health/nothing", 404),
        ("GET", "/health/shutdown", 403),
    ],
)
async def test_every_error_is_a_problem(
    client: AsyncTestClient[Litestar], method: str, path: str, status: int
) -> None:
    """Status, title and correlation id are there, whoever raised it."""
    reply = await client.request(method, path, headers={"X-Correlation-ID": "given-1"})
    body = reply.json()

    assert (status, status) == (reply.status_code, body["status"])
    assert reply.headers["content-type"] == "application/problem+json"
    assert reply.headers["x-correlation-id"] == body["correlationId"] == "given-1"
    assert body["title"]


async def test_an_unhandled_error_tells_the_log_and_not_the_client(
    client: AsyncTestClient[Litestar], caplog: pytest.LogCaptureFixture
) -> None:
    """The body holds no text of the exception; the log line holds the exception."""
    with caplog.at_level(logging.ERROR):
        replies = [await client.get(path) for path in ("/unhandled", "/internal")]

    assert ["planted" in reply.text for reply in replies] == [False, False]
    logged = [record for record in caplog.records if record.name == "viralfx.web"]
    assert ["planted secret" in str(record.exc_info) for record in logged] == [True, True]


async def test_a_validation_error_names_the_field(client: AsyncTestClient[Litestar]) -> None:
    """The problem lists what is wrong with each field."""
    body = (await client.get("/typed?count=many")).json()

    assert [error["key"] for error in body["errors"]] == ["count"]


async def test_headers_of_an_error_are_kept(client: AsyncTestClient[Litestar]) -> None:
    """What a handler wants to say in headers is said."""
    assert (await client.get("/gone")).headers["x-since"] == "2026"
