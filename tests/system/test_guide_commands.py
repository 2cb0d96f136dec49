"""The requests and commands of docs/jobs.md answer as they are shown."""

import asyncio
import re
import shlex
from typing import Any

import docs.examples.shipping  # noqa: F401 - its plugin is made without the environment of a test
import pytest
from tests.guide import GUIDE, section
from tests.integration.job_ledgers import ledger_in
from tests.servers.postgres import Database
from tests.system.jobs import JOBS, accept, until
from tests.system.service import Service, running
from tests.system.test_jobs_command import Shell
from tests.system.test_readme import blocks, typed

from viralfx.jobs.schedule import Schedule

JOB_ID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
REQUEST = re.compile(r"```bash\n(curl .*?)```(?:\n```json\n(.*?)```)?", re.DOTALL)


def request(heading: str) -> tuple[str, str]:
    """Return the request below a heading, and its answer."""
    (found,) = REQUEST.findall(section(heading))
    command, answer = found
    return command, answer


def sent(service: Service, heading: str, job_id: str = "") -> tuple[str, str]:
    """Send the request about a job; return the answer that came and the one that is shown."""
    command, answer = request(heading)
    return typed(JOB_ID.sub(job_id, command), service).strip(), answer.strip()


def test_the_requests_of_the_guide() -> None:
    """A batch, a pause, a cancellation, the failures of a job, and a change of many."""
    environment = {
        "TASK_MODULES": "docs.examples.greet,docs.examples.shipping,tests.job_tasks",
        "JOB_TIMEOUT": "200",
        "JOB_MAX_ATTEMPTS": "1",
    }
    with running(environment=environment) as service:
        service.wait_ready()
        paused = sent(service, "### Pause a queue")
        batch, _ = sent(service, "### Many at once")
        again, _ = sent(service, "### Many at once")
        waiting = accept(service, "greet", {"name": "Cy"})
        cancelled, _ = sent(service, "### Cancel a running job", waiting)
        service.get("/api/v1/queues/notifications/resume", method="POST")
        late = accept(service, "parcels.wait", 60.0)
        until(service, late, "failed")
        failures = sent(service, "### Failures", late)
        changed = sent(service, "### Change many jobs")
        job = service.get(f"{JOBS}/{waiting}").json()

    assert paused[0] == paused[1]
    assert re.findall(r'"created":(\w+)', batch) == ["true", "true"]
    assert re.findall(r'"created":(\w+)', again) == ["false", "true"]  # only the first has a key
    assert f'"id":"{waiting}"' in cancelled
    assert job["state"] == "cancelled"
    assert failures[0] == failures[1].replace("5 s", "0.2 s")
    assert changed[0] == changed[1]


@pytest.fixture
def shell(database: Database) -> Shell:
    """Return a shell with the tasks of the example, on a ledger that knows its schedule."""
    found = Shell(database)
    found.environment["TASK_MODULES"] = "docs.examples.shipping"

    async def declare() -> None:
        berlin = "Europe/Berlin"
        daily = Schedule(task="reports.daily", cron="30 2 * * *", timezone=berlin, catch_up=True)
        async with ledger_in(database) as ledger:
            await ledger.declare_schedules([daily], 86_400.0)

    asyncio.run(declare())
    return found


def test_the_commands_of_the_guide(shell: Shell) -> None:
    """Each succeeds as it is written, on one job; each action that is named has one."""
    job_id = shell.json("submit", "shipping.ship", '{"order": "1", "weight": 1}')["id"]
    printed: dict[str, str] = {}
    for line in blocks(section("## The command line"), "bash")[0].splitlines():
        program, command, *arguments = shlex.split(JOB_ID.sub(job_id, line))
        done = shell.run(*arguments)
        assert (program, command) == ("viralfx", "jobs")
        assert done.returncode == 0, done.stderr
        of = 2 if arguments[1:2] == ["--schedule"] else 1
        printed[" ".join(arguments[:of])] = done.stdout

    assert printed["list"].split()[:2] == ["id", "task"]
    assert job_id in printed["show"]
    assert printed["submit"].endswith("  shipping.ship in default, waiting\n")
    assert printed["retry"] == "0 jobs\n"
    assert printed["run"] == f"{job_id}  waiting\n"
    assert printed["cancel"] == f"{job_id}  cancelled\n"
    assert printed["queues"].split()[:2] == ["queue", "paused"]
    assert (printed["pause"], printed["resume"]) == (
        "notifications  paused\n",
        "notifications  resumed\n",
    )
    assert printed["pause --schedule"] == "reports.daily  paused\n"
    assert "reports.daily" in printed["schedules"]


def test_the_schedules_of_the_guide(shell: Shell) -> None:
    """The tasks, expressions and time zones are those of the page."""
    found = re.search(r"```bash\nviralfx (jobs schedules)\n```\n```\n(.*?)```", GUIDE, re.DOTALL)
    assert found

    def rows(text: str) -> list[Any]:
        return [re.split(r" {2,}", line)[:3] for line in text.splitlines()]

    assert rows(shell.run("schedules").stdout) == rows(found[2])
