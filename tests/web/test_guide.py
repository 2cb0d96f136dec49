"""The examples of docs/jobs.md for the first steps run as they are shown."""

import json
import shlex
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from docs.examples.greet import greet
from docs.examples.reports import daily_report
from litestar import Litestar
from litestar.testing import AsyncTestClient
from tests.architecture.claims import ROOT, blocks

from viralfx import (
    JobContext,
    JobState,
    OperationsConfig,
    OperationsPlugin,
    UnknownQueueError,
    task,
)
from viralfx.testing import run_pending

GUIDE = (ROOT / "docs/jobs.md").read_text(encoding="utf-8")


def shown(*headings: str) -> dict[str, Any]:
    """Return the names that the Python blocks below some headings define together."""
    names = {"__name__": __name__, "json": json, "JobContext": JobContext, "JobState": JobState}
    names["task"] = task
    for heading in headings:
        for block in blocks(below(heading), "python"):
            exec(block, names)  # noqa: S102 - the text of this repository
    return names


def below(heading: str) -> str:
    """Return the text below a heading."""
    return GUIDE.partition(f"\n{heading}\n")[2].partition("\n#")[0]


def requests(heading: str) -> Iterator[tuple[str, Any]]:
    """Yield path and JSON of the POST requests that the calls of curl below a heading send."""
    for block in blocks(below(heading), "bash"):
        words = iter(shlex.split(block.partition("|")[0]))
        path, body = "", None
        for word in words:
            if word == "-d":
                body = json.loads(next(words))
            elif word.startswith("localhost:3000/"):
                path = word.removeprefix("localhost:3000")
        yield path, body


@pytest.fixture(autouse=True)
def _in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the plugins of the examples from the variables of this environment."""
    for name in ("DATABASE_URL", "REDIS_URL", "TASK_MODULES"):
        monkeypatch.delenv(name, raising=False)


async def test_the_application_of_the_first_job() -> None:
    """Its handler submits, a caller waits for the result, and a script uses the lifespan."""
    names = shown("## A first job in one minute", "## Submit jobs", "## Read jobs from Python")
    plugin, app = names["plugin"], names["app"]
    async with AsyncTestClient(app) as client:
        job_id = (await client.post("/guests", json={"name": "Ada"})).text
        job = await plugin.jobs.wait(job_id, timeout=30)
        greeting = await names["greet_now"]("Bo")
    await names["main"]()

    assert (job.state, job.result) == (JobState.COMPLETED, b'"Hello, Ada"')
    assert greeting == "Hello, Bo"


async def test_the_retries_of_the_guide() -> None:
    """A policy of five attempts, an error without another one, and a pause that costs none."""
    names = shown("## A first job in one minute", "### Retries")
    charge, outcomes = names["charge"], iter([ValueError("planted"), "pause", "paid"])
    plugin = type(names["plugin"])(names["OperationsConfig"](tasks=[charge]))
    refused = (await plugin.jobs.submit(charge, "4000")).job
    (first,) = await run_pending(plugin)

    async def charge_card(_: str) -> str:
        outcome = next(outcomes)
        if outcome == "pause":
            raise names["TooManyCalls"]
        if isinstance(outcome, Exception):
            raise outcome
        return str(outcome)

    names["charge_card"] = charge_card
    await plugin.jobs.submit(charge, "4242")
    *_, last = await run_pending(plugin, until=timedelta(hours=1))

    assert (first.id, first.state, first.attempts) == (refused.id, "failed", 1)
    assert (last.state, last.result, last.attempts) == ("completed", "paid", 1)


def plugin_with(*tasks: Any) -> OperationsPlugin:
    """Return a plugin with tasks, and with the jobs API."""
    return OperationsPlugin(OperationsConfig(tasks=tasks, jobs_api=True))


async def test_the_queue_and_the_attempts_of_the_guide() -> None:
    """Those of the submission, in place of those of the task."""
    names = shown("### Unique jobs", "### Queue and attempts")
    plugin = names["plugin"] = plugin_with(names["refresh"])
    await names["refresh_at_night"](17)
    (job,) = (await plugin.jobs.search()).jobs
    with pytest.raises(UnknownQueueError):
        await plugin.jobs.submit("reports.refresh", 1, queue="reports")

    assert (job.queue, job.max_attempts, job.payload) == ("analytics", 1, b"17")


async def test_the_schedule_of_the_guide_is_paused_and_run() -> None:
    """The job of the closed books runs, and the open ones have the schedule again."""
    names = shown("### Pause a schedule, or run it now")
    plugin = names["plugin"] = plugin_with(daily_report)
    await names["close_the_books"](ledger_is_open=False)
    (job,) = await run_pending(plugin)
    paused = {each.task for each in await plugin.jobs.schedules() if each.paused}
    await names["close_the_books"](ledger_is_open=True)
    left = {each.task for each in await plugin.jobs.schedules() if each.paused}

    assert (job.task, job.result) == ("reports.daily", f"The report of job {job.id}")
    assert (paused, left) == ({"reports.daily"}, set())


async def test_the_requests_of_the_guide() -> None:
    """A waiting job is run now, a batch is accepted, and a change of many jobs finds none."""
    plugin = plugin_with(greet)
    app = Litestar(plugins=[plugin], logging_config=None)
    plugin.assembly.jobs.disable_worker()
    later = datetime.now(UTC) + timedelta(days=1)
    waiting = (await plugin.jobs.submit(greet, {"name": "Ada"}, run_at=later)).job
    (run,), (batch,), (change,) = [
        list(requests(heading))
        for heading in ("### Run a waiting job now", "### Many at once", "### Change many jobs")
    ]
    async with AsyncTestClient(app) as client:
        path = run[0].replace("01a214b8-8af2-7a9b-8393-0890f8feb712", waiting.id)
        due = await client.post(path)
        accepted = await client.post(batch[0], json=batch[1])
        changed = await client.post(change[0], json=change[1])
    job = await plugin.jobs.get(waiting.id)
    jobs = [await plugin.jobs.get(each["id"]) for each in accepted.json()["jobs"]]

    assert (due.status_code, accepted.status_code, changed.status_code) == (202, 202, 200)
    assert job.run_at < later
    assert [(each.key, each.priority, each.max_attempts) for each in jobs] == [
        ("guest-2", 0, None),
        (None, 5, 1),
    ]
    assert changed.text == blocks(below("### Change many jobs"), "json")[0].strip()
