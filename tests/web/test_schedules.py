"""The schedules over HTTP."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import pytest
from litestar import Litestar
from litestar.testing import AsyncTestClient

from viralfx.domain.clock import timestamp
from viralfx.domain.jobs.model import JobDraft, new_job_id
from viralfx.domain.jobs.schedule import Schedule
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


async def test_schedules_need_the_token_of_the_api() -> None:
    """As all of the jobs API."""
    app = create_app(Settings(api_token=Secret("planted")))
    async with AsyncTestClient(app, raise_server_exceptions=False) as test_client:
        reply = await test_client.get(SCHEDULES)

    assert reply.status_code == 401
