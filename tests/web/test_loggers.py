"""The levels of loggers over HTTP: ahead of an application and as its documented routes."""

import logging
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest
from httpx import ASGITransport, AsyncClient
from litestar import Litestar
from litestar.testing import AsyncTestClient

from viralfx import OperationsConfig, OperationsPlugin
from viralfx.settings import Secret, Settings

SETTINGS = Settings(management_token=Secret("planted"))
BEARER = {"Authorization": "Bearer planted"}
NAME = "viralfx.planted"
PATH = f"/health/loggers/{NAME}"


@pytest.fixture(params=["gate", "routes"])
async def client(request: pytest.FixtureRequest) -> AsyncIterator[AsyncClient]:
    """Return a client of an application behind a gate, or with its routes alone."""
    logging.getLogger(NAME).setLevel(logging.NOTSET)
    plugin = OperationsPlugin(OperationsConfig(settings=SETTINGS))
    app = Litestar(plugins=[plugin], logging_config=None)
    transport = ASGITransport(app=cast("Any", app))
    served = AsyncClient(transport=transport, base_url="http://test")
    async with AsyncTestClient(app) if request.param == "gate" else served as client:
        yield client
    logging.getLogger(NAME).setLevel(logging.NOTSET)


async def test_all_loggers_are_listed(client: AsyncClient) -> None:
    """The root first, and the words that a level may be."""
    answer = await client.get("/health/loggers")
    body = answer.json()

    assert answer.status_code == 200
    assert answer.headers["cache-control"] == "no-store"
    assert body["levels"] == ["error", "warn", "log", "debug", "verbose"]
    assert next(iter(body["loggers"])) == "root"
    assert body["loggers"][NAME]["level"] is None


@pytest.mark.parametrize("level", ["error", "warn", "log", "debug", "verbose"])
async def test_a_level_is_changed_and_put_back(client: AsyncClient, level: str) -> None:
    """Null is what it was before all changes, not no level."""
    logging.getLogger(NAME).setLevel(logging.ERROR)
    changed = await client.put(PATH, json={"level": level}, headers=BEARER)
    again = await client.put(PATH, json={"level": "warn"}, headers=BEARER)
    shown = await client.get(PATH)
    reset = await client.put(PATH, json={"level": None}, headers=BEARER)

    assert (changed.status_code, changed.json()) == (200, {"level": level, "effectiveLevel": level})
    assert again.json() == shown.json() == {"level": "warn", "effectiveLevel": "warn"}
    assert reset.json() == {"level": "error", "effectiveLevel": "error"}
    assert logging.getLogger(NAME).level == logging.ERROR


async def test_the_context_of_a_line_names_its_logger(client: AsyncClient) -> None:
    """What a line shows can be asked for as it is; so can what only has loggers below it."""
    logging.getLogger("other.below.above")
    short = await client.put("/health/loggers/planted", json={"level": "debug"}, headers=BEARER)
    above = await client.get("/health/loggers/other.below")

    assert short.status_code == above.status_code == 200
    assert logging.getLogger(NAME).level == logging.DEBUG


@pytest.mark.parametrize("name", ["nothing.of.that.name", "x" * 10_000, "%00", "viralfx.planted."])
async def test_an_unknown_name_is_404_and_makes_no_logger(client: AsyncClient, name: str) -> None:
    """Whatever a client asks for: nothing grows by it."""
    before = len(logging.root.manager.loggerDict)
    for method in ("GET", "PUT"):
        answer = await client.request(
            method, f"/health/loggers/{name}", json={"level": "debug"}, headers=BEARER
        )
        assert answer.status_code == 404
        assert answer.headers["content-type"] == "application/problem+json"
        assert len(answer.content) < 1000

    assert len(logging.root.manager.loggerDict) == before


async def test_no_name_is_no_logger_either(client: AsyncClient) -> None:
    """Nor a check; routes may say that this is no path, or none to change."""
    for method in ("GET", "PUT"):
        answer = await client.request(method, "/health/loggers/", json={}, headers=BEARER)

        assert answer.status_code in {404, 405}
        assert "no such check" not in answer.text


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"level": "loud"}', 400),
        (b'{"level": "DEBUG"}', 400),
        (b'{"level": "info"}', 400),
        (b'{"level": 10}', 400),
        (b'{"level": "debug", "more": 1}', 400),
        (b"{}", 400),
        (b"[]", 400),
        (b"", 400),
        (b"\xff", 400),
        (b'{"level": "' + b"x" * 2000 + b'"}', 413),
    ],
)
async def test_a_wrong_body_is_a_problem_that_says_what_is_right(
    client: AsyncClient, body: bytes, status: int
) -> None:
    """And changes nothing."""
    answer = await client.put(PATH, content=body, headers=BEARER)

    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    if status == 400:
        assert "error, warn, log, debug, verbose" in answer.json()["detail"]
        assert answer.json()["detail"].endswith("What log lines call info is log.")
    assert logging.getLogger(NAME).level == logging.NOTSET


@pytest.mark.parametrize(("headers", "status"), [({}, 401), ({"Authorization": "Bearer x"}, 401)])
async def test_a_change_needs_the_token(
    client: AsyncClient, headers: dict[str, str], status: int
) -> None:
    """A look does not, as for all details."""
    answer = await client.put(PATH, json={"level": "debug"}, headers=headers)

    assert answer.status_code == status
    assert logging.getLogger(NAME).level == logging.NOTSET


async def test_other_methods_are_refused(client: AsyncClient) -> None:
    """With the ones that there are."""
    answers = [
        await client.delete(PATH, headers=BEARER),
        await client.post("/health/loggers", headers=BEARER),
    ]

    assert [answer.status_code for answer in answers] == [405, 405]


async def test_without_a_token_configured_nobody_may_change() -> None:
    """403, as for the shutdown."""
    plugin = OperationsPlugin(OperationsConfig(settings=Settings()))
    app = Litestar(plugins=[plugin], logging_config=None)
    transport = ASGITransport(app=cast("Any", app))
    async with app.lifespan(), AsyncClient(transport=transport, base_url="http://t") as client:
        answer = await client.put("/health/loggers/root", json={"level": "debug"}, headers=BEARER)

    assert answer.status_code == 403


async def test_the_endpoints_are_documented() -> None:
    """With the body that is wanted."""
    app = Litestar(plugins=[OperationsPlugin(OperationsConfig(settings=SETTINGS))])
    paths = app.openapi_schema.to_schema()["paths"]
    change = paths["/health/loggers/{name}"]["put"]
    schema = change["requestBody"]["content"]["application/json"]["schema"]

    assert {"200", "400", "401", "403", "404", "408", "413"} <= set(change["responses"])
    assert "get" in paths["/health/loggers"]
    assert schema["properties"]["level"]["enum"] == [
        "error",
        "warn",
        "log",
        "debug",
        "verbose",
        None,
    ]
