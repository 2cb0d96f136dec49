"""A deployment of a new task and a changed payload, worker by worker, and back."""

from collections import Counter

import pytest
from tests.servers.postgres import Database
from tests.servers.waiting import wait_until
from tests.soak import SOAK
from tests.system.deployments import deploy_and_roll_back
from tests.system.service import Service
from tests.system.workers import environment_of

JOBS = 1000 if SOAK else 240
DELAY = 5.0
"""Seconds that a job may wait beyond the first worker that can run it, on a busy machine."""
OVERDUE_SECONDS = 20.0


@pytest.mark.soak
def test_a_deployment_and_its_roll_back_fail_no_job(database: Database) -> None:
    """The API is replaced before the workers, both times."""
    environment = environment_of(database, HEALTH_CHECK_INTERVAL="500", JOB_LEASE="6000")
    submitter = deploy_and_roll_back(
        database, environment, JOBS, until_unknown=says_unknown, until_known=says_healthy
    )

    jobs = submitter.jobs()
    assert Counter(job["state"] for job in jobs) == {"completed": JOBS}
    assert {job["attempts"] for job in jobs} == {0}
    assert sorted(job["id"] for job in jobs) == sorted(submitter.submitted)
    delays = submitter.delays()
    assert max(each[-1] for each in delays.values()) < DELAY, delays


def says_unknown(service: Service) -> None:
    """Wait until the check names the task that no worker knows."""

    def found() -> bool:
        shown = service.get("/health/queues").json()
        return "task deployed.refund wait and no worker knows it" in str(shown["message"])

    wait_until(found, seconds=OVERDUE_SECONDS, what="the check warns")


def says_healthy(service: Service) -> None:
    """Wait until the check passes again."""
    wait_until(
        lambda: service.get("/health/queues").json()["status"] == "pass",
        seconds=OVERDUE_SECONDS,
        what="the check passes",
    )
