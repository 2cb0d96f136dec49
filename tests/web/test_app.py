"""The service's own application: every error, even an unhandled one, is a problem."""

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
    """Raise an unexpected error."""
    raise RuntimeError("planted secret")


@get("/internal")
async def internal() -> None:
    """Raise an error whose text is not for clients."""
    raise InternalServerException("planted secret")


@get("/gone")
async def gone() -> None:
    """Raise a deliberate error with a header."""
    raise HTTPException("It was here once.", status_code=410, headers={"X-Since": "2026"})


@get("/typed")
async def typed(count: Annotated[int, QueryParameter()]) -> int:
    """Accept a number."""
    return count


@pytest.fixture
async def client() -> AsyncIterator[AsyncTestClient[Litestar]]:
    """Return a client of the service with four more handlers."""
    app = create_app(Settings())
    for handler in (unhandled, internal, gone, typed):
        app.register(handler)
    async with AsyncTestClient(app, raise_server_exceptions=False) as test_client:
        yield test_client


async def test_every_error_is_a_problem(client: AsyncTestClient[Litestar]) -> None:
    """Errors of Litestar, handlers and endpoints all have status, title and correlation id."""
    for method, path, status in (
        ("GET", "/nothing", 404),
        ("POST", "/gone", 405),
        ("GET", "/gone", 410),
        ("GET", "/typed?count=many", 400),
        ("GET", "/unhandled", 500),
        ("GET", "/internal", 500),
        ("GET", "/health/nothing", 404),
        ("GET", "/health/shutdown", 403),
    ):
        reply = await client.request(method, path, headers={"X-Correlation-ID": "given-1"})
        body = reply.json()

        assert (status, status) == (reply.status_code, body["status"])
        assert reply.headers["content-type"] == "application/problem+json"
        assert reply.headers["x-correlation-id"] == body["correlationId"] == "given-1"
        assert body["title"]


async def test_an_unhandled_error_is_logged_but_not_shown_to_the_client(
    client: AsyncTestClient[Litestar], caplog: pytest.LogCaptureFixture
) -> None:
    """The body holds no text of the exception; the log line holds the exception."""
    with caplog.at_level(logging.ERROR):
        replies = [await client.get(path) for path in ("/unhandled", "/internal")]

    assert ["planted" in reply.text for reply in replies] == [False, False]
    logged = [record for record in caplog.records if record.name == "viralfx.web"]
    assert ["planted secret" in str(record.exc_info) for record in logged] == [True, True]


async def test_a_validation_error_names_the_field(client: AsyncTestClient[Litestar]) -> None:
    """The problem lists the invalid fields."""
    body = (await client.get("/typed?count=many")).json()

    assert [error["key"] for error in body["errors"]] == ["count"]


async def test_headers_of_an_error_are_kept(client: AsyncTestClient[Litestar]) -> None:
    """Headers of an exception are in the response."""
    assert (await client.get("/gone")).headers["x-since"] == "2026"
