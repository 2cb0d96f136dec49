"""Cancellation of running jobs over HTTP; the API and the workers have their own processes."""

import signal
import time
from pathlib import Path
from typing import Any

import pytest
from tests.servers.postgres import Database
from tests.servers.waiting import wait_until
from tests.system.jobs import JOBS, accept, job, until
from tests.system.service import Service
from tests.system.workers import api, environment_of, worker

SEEN_WITHIN = 2.0
ENDS_WITHIN = 10.0
"""Seconds from the request to the end of the job."""
LOADED = 2.0
"""Seconds more on a busy machine."""


def cancel(service: Service, job_id: str) -> None:
    """Request that a running job ends."""
    reply = service.get(f"{JOBS}/{job_id}/cancel", method="POST")
    assert (reply.status, reply.json()["state"]) == (202, "active"), reply


def reported(service: Service, job_id: str) -> dict[str, Any]:
    """Return a running job once its progress is shown."""

    def shown() -> dict[str, Any] | None:
        found = job(service, job_id)
        return found if found["progress"] else None

    found = wait_until(shown, what="progress")
    assert found is not None
    return found


@pytest.mark.each_python
def test_running_jobs_are_cancelled(database: Database, tmp_path: Path) -> None:
    """The task sees it within two seconds, and a transaction is rolled back."""
    database.execute("create table effects (text text)")
    environment = environment_of(database, TASK_MODULES="tests.system.control_tasks")
    path = tmp_path / "count"
    with api(environment) as service, worker(environment):
        counting = accept(service, "control.count", str(path))
        writing = accept(service, "control.write", "planted")
        progress = reported(service, counting)["progress"]
        reported(service, writing)
        cancel(service, counting)
        requested = time.time()
        cancel(service, writing)
        ended = until(service, counting, "cancelled", seconds=ENDS_WITHIN)
        rolled_back = until(service, writing, "cancelled", seconds=ENDS_WITHIN)
        again = service.get(f"{JOBS}/{counting}/cancel", method="POST").status
    seen = float((tmp_path / "count.cancelled").read_text())

    assert progress["current"] > 0
    assert (progress["total"], progress["message"]) == (10**6, "counting")
    assert ended["progress"]["current"] >= progress["current"]
    assert seen - requested < SEEN_WITHIN + LOADED
    assert [each["code"] for each in ended["failures"]] == ["cancelled"]
    assert (ended["attempts"], rolled_back["attempts"], again) == (0, 0, 409)
    assert database.execute("select * from effects") == []


def test_a_cancelled_job_does_not_survive_its_worker(database: Database, tmp_path: Path) -> None:
    """Killed before it could see the request: the sweep cancels the job, which runs no more."""
    environment = environment_of(database, TASK_MODULES="tests.system.control_tasks")
    path = tmp_path / "count"
    with api(environment) as service, worker(environment) as first:
        job_id = accept(service, "control.count", str(path))
        reported(service, job_id)
        first.signal(signal.SIGSTOP)
        cancel(service, job_id)
        first.process.kill()
        with worker(environment):
            ended = until(service, job_id, "cancelled")

    assert (ended["crashes"], ended["attempts"]) == (1, 0)
    assert [each["code"] for each in ended["failures"]] == ["crashed"]
    assert path.read_text() == "began\n"
    assert not (tmp_path / "count.cancelled").exists()
