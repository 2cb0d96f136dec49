"""The routes of queues in the jobs API."""

import logging
from collections.abc import AsyncIterator

import pytest
from litestar import Litestar
from litestar.testing import AsyncTestClient
from tests.web.test_jobs import assert_problem

from viralfx.settings import Secret, Settings
from viralfx.web.app import create_app
from viralfx.web.plugin import OperationsPlugin

QUEUES = "/api/v1/queues"
Client = AsyncTestClient[Litestar]


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    """Return a client of the service, whose worker runs five jobs of one queue at once."""
    settings = Settings(
        queues=("default:5", "notifications", "analytics"), task_modules=("tests.job_tasks",)
    )
    async with AsyncTestClient(create_app(settings), raise_server_exceptions=False) as client:
        yield client


async def test_a_queue_is_paused_and_resumed(
    client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    """Its jobs are accepted meanwhile, and run afterwards; the check of the queues says so."""
    caplog.set_level(logging.WARNING, "viralfx.queues")
    listed = (await client.get(QUEUES)).json()["items"]
    paused = await client.post(f"{QUEUES}/default/pause")
    again = await client.post(f"{QUEUES}/default/pause", json={})
    job = {"task": "parcels.ship", "payload": {"weight": 3}}
    url = (await client.post("/api/v1/jobs", json=job)).json()["links"]["self"]
    counts = (await client.get(QUEUES)).json()["items"][0]
    jobs = client.app.plugins.get(OperationsPlugin).assembly.jobs
    observed = await jobs.check.check()
    state = (await client.get(url)).json()["state"]
    resumed = await client.post(f"{QUEUES}/default/resume")

    assert [(each["name"], each["paused"], each["concurrency"]) for each in listed] == [
        ("default", False, 5),
        ("notifications", False, 10),
        ("analytics", False, 10),
    ]
    assert (paused.status_code, again.status_code, resumed.status_code) == (200, 200, 200)
    assert (paused.json()["paused"], counts["paused"], resumed.json()["paused"]) == (
        True,
        True,
        False,
    )
    assert (state, counts["counts"]["waiting"]) == ("waiting", 1)
    assert "; paused: default" in observed.message
    assert observed.details[0]["paused"] is True
    events = jobs.follower.follow(await jobs.service.get(url.rpartition("/")[2]))
    assert [each.state async for each in events if each is not None][-1] == "completed"
    logged = [record.getMessage() for record in caplog.records if record.name == "viralfx.queues"]
    assert logged == [f"Queue {what}: queue=default" for what in ("paused", "paused", "resumed")]


async def test_a_queue_that_is_configured_nowhere_is_not_found(client: Client) -> None:
    """The problem names the queues that there are."""
    for change in ("pause", "resume"):
        reply = await client.post(f"{QUEUES}/zzz/{change}")

        assert_problem(
            reply, 404, "There is no queue 'zzz'; there are analytics, default, notifications."
        )


async def test_a_queue_of_another_process_can_be_paused(client: Client) -> None:
    """It is known by its jobs or its workers."""
    ledger = client.app.plugins.get(OperationsPlugin).assembly.jobs.ledger
    await ledger.register("elsewhere", ["reports"], 60.0)
    paused = await client.post(f"{QUEUES}/reports/pause")

    assert paused.status_code == 200
    assert (paused.json()["paused"], paused.json()["concurrency"]) == (True, None)


async def test_queues_need_the_token_of_the_api() -> None:
    """As all of the jobs API does."""
    app = create_app(Settings(api_token=Secret("planted")))
    async with AsyncTestClient(app, raise_server_exceptions=False) as client:
        for method, path in (("GET", ""), ("POST", "/default/pause"), ("POST", "/default/resume")):
            assert (await client.request(method, f"{QUEUES}{path}")).status_code == 401
