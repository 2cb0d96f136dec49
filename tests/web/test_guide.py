"""The examples of docs/jobs.md for the first steps run as they are shown."""

import json
from datetime import timedelta
from typing import Any

import pytest
from litestar.testing import AsyncTestClient
from tests.architecture.claims import ROOT, blocks

from viralfx import JobContext, JobState
from viralfx.testing import run_pending

GUIDE = (ROOT / "docs/jobs.md").read_text(encoding="utf-8")


def shown(*headings: str) -> dict[str, Any]:
    """Return the names that the Python blocks below some headings define together."""
    names = {"__name__": __name__, "json": json, "JobContext": JobContext, "JobState": JobState}
    for heading in headings:
        section = GUIDE.partition(f"\n{heading}\n")[2].partition("\n#")[0]
        for block in blocks(section, "python"):
            exec(block, names)  # noqa: S102 - the text of this repository
    return names


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
