"""The progress of one job as server-sent events."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

from httpx import ASGITransport, AsyncClient
from litestar import Litestar
from tests.servers.waiting import until
from tests.unit.metrics.reading import family, value

from viralfx.jobs.codec import read_progress
from viralfx.jobs.follower import JobFollower
from viralfx.jobs.ledger import ProgressReport
from viralfx.jobs.model import completed
from viralfx.settings import Settings
from viralfx.web.app import create_app
from viralfx.web.plugin import OperationsPlugin

JOBS = "/api/v1/jobs"


class Client(AsyncClient):
    """A client on the same event loop as the application, so that both run concurrently."""

    def __init__(self, app: Litestar, **more: Any) -> None:
        super().__init__(**more)
        self.app = app

    async def wait_until_followed(self) -> None:
        """Return once a client follows a job."""
        async with asyncio.timeout(10):
            while not plugin_of(self).assembly.jobs.follower._followed:
                await self.get("/health/detailed?fresh=1")


@asynccontextmanager
async def service() -> AsyncIterator[Client]:
    """Return a client of a service without a worker."""
    app = create_app(Settings(task_modules=("tests.job_tasks",)))
    app.plugins.get(OperationsPlugin).assembly.jobs.disable_worker()
    transport = ASGITransport(app=cast("Any", app))
    async with app.lifespan(), Client(app, transport=transport, base_url="http://test") as made:
        yield made


async def accept(client: Client) -> str:
    """Submit a job and return the URL of its events."""
    reply = await client.post(JOBS, json={"task": "parcels.echo", "payload": "x" * 1000})
    return str(reply.json()["links"]["events"])


def plugin_of(client: Client) -> OperationsPlugin:
    """Return the plugin of the service."""
    return client.app.plugins.get(OperationsPlugin)


def events(text: str) -> list[tuple[str, str]]:
    """Return names and job states of the events."""
    found = []
    for block in text.split("\r\n\r\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if line)
        if "event" in fields:
            found.append((fields["event"], json.loads(fields["data"]).get("state")))
    return found


async def test_a_job_is_followed_to_its_end() -> None:
    """The stream ends after the final state."""
    async with service() as client:
        following = asyncio.create_task(client.get(await accept(client)))
        ledger = plugin_of(client).assembly.jobs.ledger
        await ledger.register("w", ["analytics"], 60.0)
        async with asyncio.timeout(10):
            await client.wait_until_followed()
            (claim,) = await ledger.claim("analytics", "w", 1)
            await ledger.settle([completed(claim, b"1")])
            reply = await following

        assert events(reply.text) == [("job", "waiting"), ("job", "completed")]
        assert reply.headers["content-type"].startswith("text/event-stream")
        assert reply.headers["cache-control"] == "no-store"
        assert "content-length" not in reply.headers
        assert "xxx" not in reply.text
        registry = plugin_of(client).assembly.metrics.registry
        route = "/api/v1/jobs/{job_id}/events"
        assert value(registry, "viralfx_event_streams_total", http_route=route) == 1
        durations = family(registry, "http_server_request_duration_seconds").samples
        assert {sample.labels["http_route"] for sample in durations} == {JOBS}


async def test_the_progress_of_a_job_is_an_event() -> None:
    """The event has the report of its task."""
    async with service() as client:
        ledger = plugin_of(client).assembly.jobs.ledger
        link = await accept(client)
        await ledger.register("w", ["analytics"], 60.0)
        (claim,) = await ledger.claim("analytics", "w", 1)
        following = asyncio.create_task(client.get(link))
        async with asyncio.timeout(10):
            await client.wait_until_followed()
            report = read_progress(3, 4).encode()
            await ledger.report([ProgressReport(claim=claim, progress=report)])
            (followed,) = plugin_of(client).assembly.jobs.follower._followed.values()
            await until(lambda: followed.job.progress)
            await ledger.settle([completed(claim, b"1")])
            reply = await following

        assert events(reply.text) == [("job", "active"), ("job", "active"), ("job", "completed")]
        assert '"progress":{"current": 3, "total": 4, "message": null}' in reply.text


async def test_a_finished_job_has_one_event() -> None:
    """Then the stream ends."""
    async with service() as client:
        link = await accept(client)
        await client.delete(link.removesuffix("/events"))
        reply = await client.get(link)

        assert events(reply.text) == [("job", "cancelled")]


async def test_the_stop_ends_event_streams_of_jobs() -> None:
    """An open stream gets the event of the shutdown and does not delay it."""
    async with service() as client:
        following = asyncio.create_task(client.get(await accept(client)))
        plugin = plugin_of(client)
        async with asyncio.timeout(10):
            await client.wait_until_followed()
            plugin.operations.shutdown.trigger("test")
            await plugin.operations.shutdown.run()
            reply = await following

        assert events(reply.text) == [("job", "waiting"), ("shutdown", None)]


async def test_too_many_followers_get_503() -> None:
    """The response has ``Retry-After``."""
    async with service() as client:
        link = await accept(client)
        jobs = plugin_of(client).assembly.jobs
        clock = plugin_of(client).operations.clock
        jobs.follower = JobFollower(jobs.service.get, clock, max_followers=0)
        reply = await client.get(link)

        assert (reply.status_code, reply.headers["retry-after"]) == (503, "5")
