"""The user id of a request: its jobs inherit it, the next request of the connection does not."""

from typing import Any

from docs.examples.identity import Identity
from litestar import Litestar, get, post
from litestar.testing import AsyncTestClient

from viralfx import OperationsConfig, OperationsPlugin, bind_user_id, task
from viralfx.core.correlation import current_user_id
from viralfx.settings import Settings
from viralfx.testing import run_pending


@get("/who")
async def who() -> str:
    """Return the user id of log lines."""
    return str(current_user_id())


async def test_a_request_does_not_inherit_the_user_id() -> None:
    """A server starts a pipelined request in the context of the previous one."""
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
        bind_user_id("previous-user")
        await app(scope, receive, send)

    assert sent[-1]["body"] == b"None"


users: list[str | None] = []


@task("users.note")
async def note(_: None) -> None:
    """Record the user id of log lines."""
    users.append(current_user_id())


async def test_a_job_has_the_user_of_its_request() -> None:
    """In the API and while it runs; a job of a request without a user has none."""
    plugin = OperationsPlugin(OperationsConfig(settings=Settings(), tasks=[note]))

    @post("/notes")
    async def submit() -> None:
        await plugin.jobs.submit("users.note", None)

    app = Litestar([submit], middleware=[Identity()], plugins=[plugin])
    async with AsyncTestClient(app) as client:
        for headers in ({"X-Verified-User": "ada"}, {}):
            await client.post("/notes", headers=headers)
        _ = await run_pending(plugin)
        jobs = (await plugin.jobs.search()).jobs

    assert sorted(map(str, users)) == ["None", "ada"]
    assert sorted(str(job.user_id) for job in jobs if job.task == "users.note") == ["None", "ada"]
