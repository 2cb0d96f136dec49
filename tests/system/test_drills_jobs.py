"""Drills of the runbook's procedures for waiting jobs: too few workers, or none."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.servers.postgres import Database, PostgresServer
from tests.servers.waiting import wait_until
from tests.system.drills.cluster import BACKEND, BESIDE, WORKER, Cluster
from tests.system.drills.drill import QUICK, Drill
from tests.system.drills.procedures import Console, steps_of_beginning
from tests.system.jobs import JOBS
from tests.system.service import Service
from tests.system.workers import environment_of

# The first drill may have to fetch promtool.
pytestmark = [pytest.mark.timeout(240)]

ALLOWED = {"Authorization": "Bearer planted-token"}


@pytest.fixture
def cluster(postgres: PostgresServer, database: Database, tmp_path: Path) -> Iterator[Cluster]:
    """Return a cluster with the jobs API and a Deployment of zero workers."""
    del postgres
    environment = environment_of(
        database,
        **QUICK,
        TASK_MODULES="tests.system.drills.tasks",
        API_TOKEN="planted-token",
        MANAGEMENT_TOKEN="planted-token",
    )
    with Cluster(tmp_path, environment) as cluster:
        cluster.deploy(BACKEND)
        cluster.deploy(WORKER, replicas=0)
        yield cluster


def accept(cluster: Cluster, payload: str = "", task: str = "orders.ship", **headers: str) -> str:
    """Submit a job and return its id."""
    body = {"task": task, "payload": payload}
    (backend,) = cluster.processes(BACKEND)
    reply = backend.get(JOBS, method="POST", json_body=body, headers={**ALLOWED, **headers})
    assert reply.status == 202, reply
    return str(reply.json()["id"])


def age(database: Database) -> None:
    """Make the waiting jobs ten minutes older, so that the drill is shorter."""
    database.execute(
        """
        UPDATE viralfx_jobs SET run_at = run_at - interval '10 minutes'
        WHERE state IN ('waiting', 'scheduled')
        """
    )


def wait_for_job(service: Service, job_id: str, state: str) -> None:
    """Wait until a job is in a state."""

    def is_there() -> bool:
        shown = service.get(f"{JOBS}/{job_id}", headers=ALLOWED).json()
        return bool(shown["state"] == state)

    wait_until(is_there, what=f"job {job_id} {state}")


def test_a_backlog(cluster: Cluster, database: Database, tmp_path: Path) -> None:
    """One worker with one slot and a slow job."""
    released = tmp_path / "released"
    cluster.deploy(BESIDE, environment={"JOB_CONCURRENCY": "1"})
    drill = Drill("ViralFXQueueBacklog", cluster, API_TOKEN="planted-token")
    (backend,) = cluster.processes(BACKEND)
    slow = accept(cluster, str(released))
    wait_for_job(backend, slow, "active")
    for _ in range(12):
        accept(cluster)
    age(database)
    drill.show_symptom()
    drill.diagnose()
    drill.remedy()
    drill.end()
    released.touch()
    wait_for_job(backend, slow, "completed")


def test_no_worker_runs(cluster: Cluster, database: Database) -> None:
    """There is no worker until the remedy scales the Deployment to two."""
    drill = Drill("ViralFXQueueUnattended", cluster)
    for _ in range(3):
        accept(cluster)
    age(database)
    drill.show_symptom()
    drill.diagnose()
    drill.remedy()
    drill.end()


def test_jobs_fail(cluster: Cluster, tmp_path: Path) -> None:
    """The cause is removed, then the jobs are retried."""
    paper = tmp_path / "paper"
    cluster.deploy(BESIDE, environment={"JOB_MAX_ATTEMPTS": "1"})
    (worker,) = cluster.processes(BESIDE)
    drill = Drill(
        "ViralFXJobsFailing",
        cluster,
        scraped="WORKER",
        WORKER=f"localhost:{worker.management_port}",
        API_TOKEN="planted-token",
    )
    for _ in range(6):
        accept(cluster, str(paper), "orders.bill")
    drill.show_symptom()
    drill.diagnose()
    paper.touch()
    drill.remedy()
    drill.end()


def test_a_correlation_id_leads_to_the_job_and_back(cluster: Cluster) -> None:
    """Without traces, at the default log levels and at changed ones."""
    cluster.deploy(BESIDE)
    (backend,), (worker,) = cluster.processes(BACKEND), cluster.processes(BESIDE)
    for number in range(3):
        accept(cluster, **{"X-Correlation-ID": f"other-{number}"})
    job_id = accept(cluster, **{"X-Correlation-ID": "order-17"})
    wait_for_job(backend, job_id, "completed")
    job = backend.get(f"{JOBS}/{job_id}", headers=ALLOWED).json()
    console = Console(
        cluster.folder,
        {
            "INSTANCE": cluster.instance,
            "WORKER": f"localhost:{worker.management_port}",
            "API_TOKEN": "planted-token",
            "MANAGEMENT_TOKEN": "planted-token",
            "ID": "order-17",
            "AT": job["createdAt"],
            "JOB": job_id,
        },
    )
    *before, by_job = steps_of_beginning("From a correlation id to the job, and back")
    console.follow(before)
    console.environment["JOB"] = accept(cluster, **{"X-Correlation-ID": "order-18"})
    console.follow([by_job])

    assert len(before) == 4
    assert job_id in console.type(before[0].command)
    assert job_id in console.type(before[1].command)
