"""The schedules over HTTP."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import pytest
from litestar import Litestar
from litestar.testing import AsyncTestClient

from viralfx import OperationsConfig, task
from viralfx.core.clock import timestamp
from viralfx.core.ids import new_job_id
from viralfx.jobs.model import JobDraft
from viralfx.jobs.schedule import Schedule
from viralfx.settings import Secret, Settings
from viralfx.web.app import create_app
from viralfx.web.plugin import OperationsPlugin

SCHEDULES = "/api/v1/schedules"


@pytest.fixture
async def client() -> AsyncIterator[AsyncTestClient[Litestar]]:
    """Return a client of the service, which has no worker."""
    app = create_app(Settings())
    app.plugins.get(OperationsPlugin).assembly.jobs.disable_worker()
    async with AsyncTestClient(app, raise_server_exceptions=False) as test_client:
        yield test_client


async def test_schedules_show_their_last_and_next_times(
    client: AsyncTestClient[Litestar],
) -> None:
    """Those of this process, and those that workers of another version declared."""
    jobs = client.app.plugins.get(OperationsPlugin).assembly.jobs
    last, now = datetime(2026, 1, 6, 12, tzinfo=UTC), datetime.now(UTC)
    await jobs.ledger.declare_schedules(
        [
            Schedule(task="default.prune", cron="0 * * * *"),
            Schedule(task="reports", cron="30 2 * * *", timezone="Europe/Berlin"),
        ],
        60.0,
    )
    draft = JobDraft(id=new_job_id(), queue="default", task="reports", payload=b"null", run_at=last)
    await jobs.ledger.accept_scheduled(draft)
    reply = await client.get(SCHEDULES)
    items = {each["task"]: each for each in reply.json()["items"]}
    hour = now.replace(minute=0, second=0, microsecond=0) + timedelta(hours=1)

    assert reply.status_code == 200
    assert list(items) == ["analytics.rollup_health", "default.prune", "reports"]
    assert [items[task]["lastRunAt"] for task in items] == [None, None, timestamp(last)]
    assert items["reports"]["timezone"] == "Europe/Berlin"
    for item in items.values():
        assert item["nextRunAt"] == item["nextRuns"][0]
        assert len(item["nextRuns"]) == 5
        assert item["nextRuns"] == sorted(item["nextRuns"])
    assert items["default.prune"]["nextRunAt"] >= timestamp(hour)


async def test_a_schedule_is_paused_and_resumed(client: AsyncTestClient[Litestar]) -> None:
    """The answer is the schedule; a repetition changes nothing."""
    path = f"{SCHEDULES}/default.prune"
    paused = [await client.post(f"{path}/pause") for _ in range(2)]
    listed = (await client.get(SCHEDULES)).json()["items"]
    resumed = [await client.post(f"{path}/resume") for _ in range(2)]

    assert [reply.status_code for reply in (*paused, *resumed)] == [200] * 4
    assert [reply.json()["paused"] for reply in (*paused, *resumed)] == [True, True, False, False]
    assert [each["paused"] for each in listed] == [False, True]
    assert paused[0].json() == listed[1]


async def test_the_task_of_a_schedule_is_run_now(client: AsyncTestClient[Litestar]) -> None:
    """Also while it is paused: a job with the payload null, and no time of the schedule."""
    path = f"{SCHEDULES}/default.prune"
    await client.post(f"{path}/pause")
    reply = await client.post(f"{path}/run", headers={"X-Correlation-ID": "by-hand"})
    job = (await client.get(reply.headers["location"])).json()
    (listed,) = [
        each
        for each in (await client.get(SCHEDULES)).json()["items"]
        if each["task"] == "default.prune"
    ]

    assert (reply.status_code, reply.json()["queue"]) == (202, "default")
    assert (job["task"], job["payload"], job["state"]) == ("default.prune", None, "waiting")
    assert (job["correlationId"], job["runAt"]) == ("by-hand", job["createdAt"])
    assert (listed["lastRunAt"], listed["paused"]) == (None, True)


async def test_the_job_of_a_unique_task_is_not_run_twice() -> None:
    """The answer is the job that waits, with 200."""

    @task("nightly", cron="0 3 * * *", unique="waiting")
    async def nightly(_: None) -> None: ...

    plugin = OperationsPlugin(OperationsConfig(settings=Settings(), tasks=[nightly], jobs_api=True))
    app = Litestar(plugins=[plugin], logging_config=None)
    plugin.assembly.jobs.disable_worker()
    async with AsyncTestClient(app) as test_client:
        replies = [await test_client.post(f"{SCHEDULES}/nightly/run") for _ in range(2)]

    assert [reply.status_code for reply in replies] == [202, 200]
    assert replies[0].json() == replies[1].json()


@pytest.mark.parametrize("action", ["pause", "resume", "run"])
async def test_an_unknown_schedule_is_not_found(
    client: AsyncTestClient[Litestar], action: str
) -> None:
    """A task without a schedule is none; one of a worker alone is known, and cannot be run."""
    ledger = client.app.plugins.get(OperationsPlugin).assembly.jobs.ledger
    await ledger.declare_schedules([Schedule(task="far:away", cron="0 3 * * *")], 60.0)
    missing = await client.post(f"{SCHEDULES}/notifications.webhook/{action}")
    misspelt = await client.post(f"{SCHEDULES}/default.prun/{action}")
    strange = await client.post(f"{SCHEDULES}/%00%22/{action}")
    far = await client.post(f"{SCHEDULES}/far%3Aaway/{action}")

    assert [reply.status_code for reply in (missing, misspelt, strange)] == [404] * 3
    assert "did you mean default.prune?" in misspelt.json()["detail"]
    assert far.status_code == (422 if action == "run" else 200)


async def test_schedules_need_the_token_of_the_api() -> None:
    """As all of the jobs API."""
    app = create_app(Settings(api_token=Secret("planted")))
    async with AsyncTestClient(app, raise_server_exceptions=False) as test_client:
        replies = [
            await test_client.get(SCHEDULES),
            *[
                await test_client.post(f"{SCHEDULES}/default.prune/{action}")
                for action in ("pause", "resume", "run")
            ],
        ]

    assert [reply.status_code for reply in replies] == [401] * 4
