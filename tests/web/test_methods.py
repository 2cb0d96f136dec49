"""HEAD for every path with GET, and ``Allow`` with every method of a path."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
from litestar import Litestar
from litestar.testing import AsyncTestClient

from viralfx.settings import Settings
from viralfx.web.app import create_app

JOBS = "/api/v1/jobs"
Client = AsyncTestClient[Litestar]

VARYING = {"x-correlation-id", "content-length"}
"""Headers that may differ between responses; an uptime may have one more digit."""


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    """Return a client of the service."""
    app = create_app(Settings(task_modules=("tests.job_tasks",)))
    async with AsyncTestClient(app, raise_server_exceptions=False) as client:
        yield client


async def accepted(client: Client) -> str:
    """Submit a job that stays waiting, and return its path."""
    body = {"task": "parcels.echo", "runAt": "2999-01-01T00:00:00Z"}
    return str((await client.post(JOBS, json=body)).json()["links"]["self"])


async def documented(client: Client) -> dict[str, set[str]]:
    """Return the methods of every path in the document, with values for placeholders."""
    job = (await accepted(client)).rpartition("/")[2]
    paths = (await client.get("/api/docs/openapi.json")).json()["paths"]
    values = {"job_id": job, "check": "database", "name": "root", "queue": "default"}
    values["task"] = "default.prune"
    return {path.format(**values): {m.upper() for m in item} for path, item in paths.items()}


async def test_head_has_the_status_and_headers_of_get(client: Client) -> None:
    """This holds for every path of the document, and for the document itself."""
    paths = [path for path, methods in (await documented(client)).items() if "GET" in methods]
    paths += ["/api/docs", "/api/docs/openapi.json", f"{JOBS}/x", f"{JOBS}?limit=0", "/metrics"]
    assert len(paths) > 15
    for path in (path for path in paths if not path.endswith("/events")):
        get, head = await client.get(path), await client.head(path)

        assert head.status_code == get.status_code, path
        assert head.content == b""
        assert _steady(head) == _steady(get), path


def _steady(reply: Any) -> dict[str, str]:
    return {name: value for name, value in reply.headers.items() if name not in VARYING}


async def test_head_has_the_content_length_of_get(client: Client) -> None:
    """It is compared for a waiting job and the document, whose lengths do not change."""
    for path in (await accepted(client), "/api/docs/openapi.json"):
        get, head = await client.get(path), await client.head(path)

        assert head.headers["content-length"] == str(len(get.content))


async def test_head_of_an_event_stream_ends_immediately(client: Client) -> None:
    """GET would stream until the job is final."""
    path = f"{await accepted(client)}/events"
    for _ in range(3):
        head = await client.head(path)

        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-type"].startswith("text/event-stream")
    assert (await client.head(f"{JOBS}/x/events")).status_code == 404


async def test_head_is_not_allowed_without_get(client: Client) -> None:
    """The response is 405 with ``Allow``."""
    reply = await client.head(f"{await accepted(client)}/retry")

    assert (reply.status_code, reply.headers["allow"]) == (405, "OPTIONS, POST")


async def test_allow_names_every_method(client: Client) -> None:
    """It is compared for OPTIONS and for unsupported methods, on every path."""
    for path, methods in (await documented(client)).items():
        wanted = methods | ({"HEAD"} if "GET" in methods else set())
        for asked in ("TRACE", "OPTIONS", "PATCH"):
            reply = await client.request(asked, path)

            # Operations endpoints treat OPTIONS as any other unsupported method.
            assert set(reply.headers["allow"].split(", ")) - {"OPTIONS"} == wanted, (asked, path)
            assert reply.status_code in ({204, 405} if asked == "OPTIONS" else {405})


async def test_allow_is_the_same_each_time(client: Client) -> None:
    """The methods are sorted."""
    other, options = await client.patch(JOBS), await client.options(JOBS)

    assert other.headers["allow"] == options.headers["allow"] == "GET, HEAD, OPTIONS, POST"
