"""Logger levels over HTTP, through the gate and through the documented routes."""

import logging
from collections.abc import AsyncIterator, MutableMapping
from typing import Any, cast

import pytest
from httpx import ASGITransport, AsyncClient
from litestar import Litestar
from litestar.testing import AsyncTestClient

from viralfx import OperationsConfig, OperationsPlugin
from viralfx.settings import Secret, Settings
from viralfx.web.gate import Gate

SETTINGS = Settings(management_token=Secret("planted"))
BEARER = {"Authorization": "Bearer planted"}
NAME = "viralfx.planted"
PATH = f"/health/loggers/{NAME}"


@pytest.fixture(params=["gate", "routes"])
async def client(request: pytest.FixtureRequest) -> AsyncIterator[AsyncClient]:
    """Return a client of an application behind a gate, or of the routes alone."""
    logging.getLogger(NAME).setLevel(logging.NOTSET)
    plugin = OperationsPlugin(OperationsConfig(settings=SETTINGS))
    app = Litestar(plugins=[plugin], logging_config=None)
    transport = ASGITransport(app=cast("Any", app))
    served = AsyncClient(transport=transport, base_url="http://test")
    async with AsyncTestClient(app) if request.param == "gate" else served as client:
        yield client
    logging.getLogger(NAME).setLevel(logging.NOTSET)


async def test_all_loggers_are_listed(client: AsyncClient) -> None:
    """The root logger is first; ``levels`` has the accepted levels."""
    response = await client.get("/health/loggers")
    body = response.json()

    assert response.status_code == 200
    assert response.headers["cache-control"] == "no-store"
    assert body["levels"] == ["error", "warn", "log", "debug", "verbose"]
    assert next(iter(body["loggers"])) == "root"
    assert body["loggers"][NAME]["level"] is None


async def test_a_level_is_changed_and_reset(client: AsyncClient) -> None:
    """Null resets the logger to its original level."""
    for level in ("error", "warn", "log", "debug", "verbose"):
        logging.getLogger(NAME).setLevel(logging.ERROR)
        changed = await client.put(PATH, json={"level": level}, headers=BEARER)
        again = await client.put(PATH, json={"level": "warn"}, headers=BEARER)
        shown = await client.get(PATH)
        reset = await client.put(PATH, json={"level": None}, headers=BEARER)

        assert (changed.status_code, changed.json()) == (
            200,
            {"level": level, "effectiveLevel": level},
        )
        assert again.json() == shown.json() == {"level": "warn", "effectiveLevel": "warn"}
        assert reset.json() == {"level": "error", "effectiveLevel": "error"}
        assert logging.getLogger(NAME).level == logging.ERROR


async def test_the_level_of_the_audit_trail_is_refused(client: AsyncClient) -> None:
    """By each of its names; the level of its parent changes."""
    for name in ("audit", "viralfx.audit"):
        answer = await client.put(
            f"/health/loggers/{name}", json={"level": "error"}, headers=BEARER
        )
        assert (answer.status_code, "audit trail" in answer.json()["detail"]) == (409, True)


async def test_the_context_of_a_line_names_its_logger(client: AsyncClient) -> None:
    """The ``context`` of a log line is accepted, and so is the name of a parent logger."""
    logging.getLogger("other.below.above")
    short = await client.put("/health/loggers/planted", json={"level": "debug"}, headers=BEARER)
    above = await client.get("/health/loggers/other.below")

    assert short.status_code == above.status_code == 200
    assert logging.getLogger(NAME).level == logging.DEBUG


async def test_an_unknown_name_is_404_and_creates_no_logger(client: AsyncClient) -> None:
    """Requests with unknown names use no memory."""
    for name in ("nothing.of.that.name", "x" * 10_000, "%00", "viralfx.planted."):
        before = len(logging.root.manager.loggerDict)
        for method in ("GET", "PUT"):
            response = await client.request(
                method, f"/health/loggers/{name}", json={"level": "debug"}, headers=BEARER
            )
            assert response.status_code == 404
            assert response.headers["content-type"] == "application/problem+json"
            assert len(response.content) < 1000

        assert len(logging.root.manager.loggerDict) == before


async def test_an_empty_name_is_not_found(client: AsyncClient) -> None:
    """It is not a check either; Litestar may respond with 404 or 405."""
    for method in ("GET", "PUT"):
        response = await client.request(method, "/health/loggers/", json={}, headers=BEARER)

        assert response.status_code in {404, 405}
        assert "no such check" not in response.text


async def test_an_invalid_body_is_a_problem_with_the_valid_levels(client: AsyncClient) -> None:
    """The level does not change."""
    for body, status in (
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
    ):
        response = await client.put(PATH, content=body, headers=BEARER)

        assert response.status_code == status
        assert response.headers["content-type"] == "application/problem+json"
        if status == 400:
            assert "error, warn, log, debug, verbose" in response.json()["detail"]
            assert response.json()["detail"].endswith("The level log is info in log lines.")
        assert logging.getLogger(NAME).level == logging.NOTSET


async def test_a_body_that_is_too_long_closes_the_connection(client: AsyncClient) -> None:
    """The rest of the body is not read."""
    body = b'{"level": "' + b"x" * 2000 + b'"}'
    response = await client.put(PATH, content=body, headers=BEARER)

    assert (response.status_code, response.headers["connection"]) == (413, "close")


@pytest.mark.parametrize("gate", [True, False])
async def test_a_client_disconnect_in_its_body_changes_nothing(*, gate: bool) -> None:
    """The received part may be valid JSON, but the request is incomplete."""
    plugin = OperationsPlugin(OperationsConfig(settings=SETTINGS))
    app = Litestar(plugins=[plugin], logging_config=None)
    served: Any = Gate(plugin.endpoints, cast("Any", app)) if gate else app
    sent: list[MutableMapping[str, Any]] = []
    messages: list[MutableMapping[str, Any]] = [
        {"type": "http.request", "body": b'{"level":"debug"}', "more_body": True},
        {"type": "http.disconnect"},
    ]

    async def receive() -> MutableMapping[str, Any]:
        return messages.pop(0)

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "PUT",
        "scheme": "http",
        "path": PATH,
        "raw_path": PATH.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [
            (b"host", b"test"),
            (b"authorization", b"Bearer planted"),
            (b"content-length", b"500"),
        ],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 1),
        "state": {},
    }
    await served(scope, receive, send)

    assert logging.getLogger(NAME).level == logging.NOTSET
    assert sent[0]["status"] == 400


@pytest.mark.parametrize(("headers", "status"), [({}, 401), ({"Authorization": "Bearer x"}, 401)])
async def test_a_change_needs_the_token(
    client: AsyncClient, headers: dict[str, str], status: int
) -> None:
    """Reading a level does not need it."""
    response = await client.put(PATH, json={"level": "debug"}, headers=headers)

    assert response.status_code == status
    assert logging.getLogger(NAME).level == logging.NOTSET


async def test_other_methods_are_not_allowed(client: AsyncClient) -> None:
    """The status is 405."""
    responses = [
        await client.delete(PATH, headers=BEARER),
        await client.post("/health/loggers", headers=BEARER),
    ]

    assert [response.status_code for response in responses] == [405, 405]


async def test_changes_need_a_configured_token() -> None:
    """Without one, the status is 403, as with the shutdown."""
    plugin = OperationsPlugin(OperationsConfig(settings=Settings()))
    app = Litestar(plugins=[plugin], logging_config=None)
    transport = ASGITransport(app=cast("Any", app))
    async with app.lifespan(), AsyncClient(transport=transport, base_url="http://t") as client:
        response = await client.put("/health/loggers/root", json={"level": "debug"}, headers=BEARER)

    assert response.status_code == 403


async def test_the_endpoints_are_documented() -> None:
    """The document describes the body and the responses."""
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
