"""``viralfx worker --app``: jobs in the lifespan of an application."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from tests.servers.postgres import Database
from tests.servers.waiting import wait_until
from tests.system.service import command, running
from tests.system.workers import environment_of, worker

APP = "tests.system.worker_app"


def submit(environment: dict[str, str], *arguments: str) -> str:
    """Submit a job on the command line; return its id."""
    done = command("jobs", "submit", *arguments, "--json", environment=environment)
    assert done.returncode == 0, done.stderr
    job_id: str = json.loads(done.stdout)["id"]
    return job_id


def shown(environment: dict[str, str], job_id: str) -> dict[str, Any]:
    """Return a job as the command line shows it."""
    done = command("jobs", "show", job_id, "--json", environment=environment)
    assert done.returncode == 0, done.stderr
    job: dict[str, Any] = json.loads(done.stdout)
    return job


def listed(environment: dict[str, str]) -> list[dict[str, Any]]:
    """Return the newest jobs."""
    done = command("jobs", "list", "--json", environment=environment)
    assert done.returncode == 0, done.stderr
    items: list[dict[str, Any]] = json.loads(done.stdout)["items"]
    return items


@pytest.mark.each_python
def test_jobs_run_in_the_lifespan_of_the_application(database: Database, tmp_path: Path) -> None:
    """With its tasks, clients, dependencies and middleware; SIGTERM drains the jobs first."""
    steps = tmp_path / "steps"
    steps.touch()
    environment = environment_of(database, TASK_MODULES="none", STEPS=str(steps))
    with worker(environment, "--app", f"{APP}:app") as process:
        job_id = submit(environment, "app.order", "7", "--queue", "default")
        wait_until(lambda: "follow 8" in steps.read_text(), what=steps.read_text)
        statuses = [process.manage(path).status for path in ("/health/live", "/orders")]
        submit(environment, "app.long", "1.5", "--queue", "default")
        wait_until(lambda: "long begins" in steps.read_text(), what=steps.read_text)
        process.signal(signal.SIGTERM)

        assert process.exit_code() == 0
    job = shown(environment, job_id)

    assert (job["state"], job["result"], statuses) == ("completed", 7, [200, 404])
    assert steps.read_text().splitlines() == [
        "lifespan begins",
        "started",
        "call 7 1",
        "call 8 1",
        "follow 8",
        "call 1.5 1",
        "long begins",
        "long ends, open: True",
        "lifespan ends",
        "stopped",
    ]


@pytest.mark.parametrize(
    ("app", "code", "problem"),
    [
        ("tests.system.apps:not_an_app", 2, "is not an ASGI application but a dict"),
        (f"{APP}:raises", 2, "RuntimeError: planted in a factory"),
        (f"{APP}:twice", 2, "@task('app.follow'): there are two tasks named 'app.follow'"),
        (
            f"{APP}:without_mailer",
            2,
            "viralfx: @task('app.follow'): follow takes 'mailer', and the application has no dep",
        ),
        ("tests.system.taskiq_app:idle", 2, "declares no task; name the modules of its tasks in"),
        ("tests.system.apps:fails_to_start", 3, "planted in start-up"),
        (
            None,
            2,
            "'mailer' to order; start it with --app MODULE:NAME. A task has one payload: if",
        ),
    ],
)
def test_an_application_that_cannot_be_used(
    database: Database, app: str | None, code: int, problem: str, tmp_path: Path
) -> None:
    """The worker does not start, and says why."""
    modules = APP if app is None else "none"
    environment = environment_of(database, TASK_MODULES=modules, STEPS=str(tmp_path / "steps"))
    arguments = [] if app is None else ["--app", app]
    with running(*arguments, program="worker", management=True, environment=environment) as process:
        assert process.exit_code() == code
    assert problem in "".join([*process.output, *process.errors])


@pytest.mark.parametrize("modules", ["tests.system.late_tasks", ""])
def test_a_task_that_is_declared_after_the_plugin(modules: str, database: Database) -> None:
    """The module of the application need not be in TASK_MODULES, and may be."""
    environment = environment_of(database, TASK_MODULES=modules)
    app = ("--app", "tests.system.late_tasks:app")
    with worker(environment, *app):
        submit(environment, "late.chain", "1", *app)
        done = wait_until(
            lambda: [
                job["task"]
                for job in listed(environment)
                if job["state"] == "completed" and job["task"] == "late.chain"
            ][1:]
        )

    assert done == ["late.chain"]


def test_a_plugin_that_no_application_starts(database: Database) -> None:
    """A task that uses it fails at once, and says what to do."""
    environment = environment_of(
        database, TASK_MODULES="tests.system.plugin_tasks", JOB_MAX_ATTEMPTS="1"
    )
    with worker(environment) as process:
        job_id = submit(environment, "plugin.chain", "1")
        wait_until(lambda: shown(environment, job_id)["state"] == "failed")
        job = shown(environment, job_id)
        warned = wait_until(
            lambda: process.logged(
                "Tasks cannot use an OperationsPlugin of TASK_MODULES; name its application with"
                " --app"
            )
        )

    assert job["error"]["message"].endswith("name that with --app MODULE:NAME")
    assert [line["level"] for line in warned] == ["warn"]
