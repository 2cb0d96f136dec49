"""The examples of docs/jobs.md that need no server run as they are shown."""

import asyncio
import json
import os
import shlex
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from docs.examples import shipping
from docs.examples.greet import greet
from docs.examples.reports import daily_report
from litestar import Litestar
from litestar.testing import AsyncTestClient, TestClient
from tests.architecture.claims import blocks
from tests.guide import section, shown

from viralfx import Discard, JobState, OperationsConfig, OperationsPlugin, UnknownQueueError
from viralfx.jobs.tasks import declared_task, mark
from viralfx.testing import JobsOfTest, run_pending, viralfx_jobs

__all__ = ["viralfx_jobs"]

Hold = Callable[[OperationsPlugin], JobsOfTest]


def requests(heading: str) -> Iterator[tuple[str, Any]]:
    """Yield path and JSON of the POST requests that the calls of curl below a heading send."""
    for block in blocks(section(heading), "bash"):
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


def plugin_of(*tasks: Callable[..., Any]) -> OperationsPlugin:
    """Return the plugin of an application with these tasks."""
    return OperationsPlugin(OperationsConfig(tasks=tasks))


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
    names = shown("### Retries")
    charge, outcomes = names["charge"], iter([ValueError("planted"), "pause", "paid"])
    plugin = plugin_of(charge)
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

    assert first.error is not None
    assert (first.id, first.state, first.attempts) == (refused.id, "failed", 1)
    assert (first.error.code, first.error.message) == ("discarded", "the card was declined")
    assert (last.state, last.result, last.attempts) == ("completed", "paid", 1)


async def test_the_model_of_the_guide() -> None:
    """It is the payload, and a changed copy is the result."""
    names = shown("### Models of Pydantic")
    plugin = names["plugin"] = plugin_of(names["pack"])
    job_id = await names["order"](names["Box"](number=7))
    (job,) = await run_pending(plugin, raise_errors=True)

    assert (job.id, job.payload) == (job_id, {"number": 7, "weight": 1.0})
    assert job.result == {"number": 7, "weight": 1.2}


def plugin_with(*tasks: Any) -> OperationsPlugin:
    """Return a plugin with tasks, and with the jobs API."""
    return OperationsPlugin(OperationsConfig(tasks=tasks, jobs_api=True))


async def test_the_queue_and_the_attempts_of_the_guide() -> None:
    """Those of the submission, in place of those of the task."""
    names = shown("### Unique jobs", "### Queue and attempts")
    plugin = names["plugin"] = plugin_with(names["refresh"])
    await names["refresh_at_night"](17)
    (found,) = (await plugin.jobs.search()).jobs
    job = await plugin.jobs.get(found.id)
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
    assert changed.text == blocks(section("### Change many jobs"), "json")[0].strip()


async def test_the_code_that_blocks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A thread that runs a program for each file, and a coroutine that waits for a program."""
    program = tmp_path / "mogrify"
    program.write_text(f'#!/bin/sh\necho "$3" >> {tmp_path}/shrunk\n', encoding="utf-8")
    program.chmod(0o755)
    (tmp_path / "reports.py").write_text(
        "import sys\nsys.exit(int(sys.argv[1]) % 2)\n", encoding="utf-8"
    )
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    names = shown("### Code that blocks")
    plugin = plugin_of(names["shrink"], names["render"])
    await plugin.jobs.submit("images.shrink", ["a.png", "b.png"])
    for number in (8, 7):
        await plugin.jobs.submit("reports.render", number)
    shrunk, even, odd = await run_pending(plugin)

    assert (shrunk.state, shrunk.result, even.result) == ("completed", 2, 8)
    assert (tmp_path / "shrunk").read_text(encoding="utf-8") == "a.png\nb.png\n"
    assert odd.error is not None
    assert odd.error.message == "the report ended with code 1"


async def test_the_limits_of_the_guide() -> None:
    """Three builds at once, one sync of each customer, a hundred mails: counted by the tasks."""
    names = shown("## Limits")
    running, most = Counter[str](), Counter[str]()

    def counted(name: str, key: Callable[[Any], str]) -> Callable[[Any], Awaitable[None]]:
        async def run(payload: Any) -> None:
            by = key(payload)
            running[by] += 1
            most[by] = max(most[by], running[by])
            await asyncio.sleep(0.01)  # the work
            running[by] -= 1

        declared = declared_task(names[name])
        assert declared is not None
        mark(run, replace(declared, function=run))
        return run

    build = counted("build", lambda _: "build")
    sync = counted("sync", lambda payload: str(payload["customer"]))
    plugin = plugin_of(build, sync, names["send"])
    async with AsyncTestClient(Litestar(plugins=[plugin])):
        accepted = [
            *await plugin.jobs.submit_many(build, range(7)),
            *await plugin.jobs.submit_many(sync, [{"customer": each} for each in "aabbab"]),
            *await plugin.jobs.submit_many("mails.send", range(101)),
        ]
        *others, last = accepted
        jobs = [await plugin.jobs.wait(each.job.id, timeout=60) for each in others]
        waiting = await plugin.jobs.get(last.job.id)

    assert {job.state for job in jobs} == {JobState.COMPLETED}
    assert most == {"build": 3, "a": 1, "b": 1}
    assert waiting.state is JobState.WAITING


async def test_the_fence_of_the_guide() -> None:
    """A system keeps the highest number for each job, and refuses a claim before it."""
    names = shown("## How often a task runs")
    plugin, storage = plugin_of(names["write_file"]), names["storage"]
    late = (await plugin.jobs.submit("files.write", "a.txt")).job
    await plugin.jobs.submit("files.write", "b.txt")
    storage.fences[late.id] = 2
    refused, written = await run_pending(plugin)

    assert refused.error is not None
    assert refused.error.code == "discarded"
    assert (written.state, storage.fences[written.id]) == ("completed", 1)
    with pytest.raises(Discard, match=r"a later claim of this job wrote b\.txt"):
        await storage.put("b.txt", written.id, 0)


async def test_the_results_and_payloads_of_the_guide(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A result says where the data are, and a payload of the version before fits its task."""
    monkeypatch.chdir(tmp_path)
    names = shown("## Deployments in any order", "## Results and payloads")
    plugin = plugin_of(names["export_orders"], names["write_letter"])
    await plugin.jobs.submit("orders.export", [7, 8])
    await plugin.jobs.submit("letters.write", {"to": "Ada"})
    await plugin.jobs.submit("letters.write", {"to": "Bo", "language": "de"})
    exported, *letters = await run_pending(plugin)

    assert Path(exported.result["path"]).read_text(encoding="utf-8") == "7\n8"  # noqa: ASYNC240 - of a test
    assert [each.result for each in letters] == ["Ada, in en", "Bo, in de"]


def test_the_dependencies_and_the_test_of_the_guide() -> None:
    """The first test of the guide, with the application that it shows under dependencies."""
    names = shown("### Dependencies and middleware", "## Tests of an application")
    names["app"].state.mailer = names["Mailer"]()

    names["test_welcome"]()


def test_the_test_of_the_guide_with_the_fixture(viralfx_jobs: Hold) -> None:
    """The second one, with the application of the example."""
    names = shown(
        "## Tests of an application",
        TestClient=TestClient,
        app=shipping.app,
        plugin=shipping.plugin,
    )

    names["test_order"](viralfx_jobs)
