"""``docker compose up --wait`` with the image, Postgres and Redis: the whole system."""

from collections.abc import Iterator
from typing import Any

import pytest
from tests.deploy import engine
from tests.deploy.engine import docker, inspected
from tests.deploy.trial import Trial
from tests.deploy.trial import trial as composed
from tests.servers.fixtures import or_skip
from tests.servers.waiting import wait_until

pytestmark = [pytest.mark.image, pytest.mark.timeout(300)]

JOBS = 80
WORKERS = 2
USERS = {
    "secrets": "0:0",
    "postgres": "999:999",
    "roles": "999:999",
    "redis": "999:999",
    "migrate": "10001:10001",
    "backend": "10001:10001",
    "worker": "10001:10001",
}
SECRETS = ("service/password", "redis/password", "tokens/api", "tokens/management")


@pytest.fixture(scope="module")
def trial(image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trial]:
    """Return the running system with two workers."""
    with or_skip():
        engine.require("postgres:17", "redis:8")
    with composed(image, tmp_path_factory.mktemp("trial")) as made:
        made.up("--scale", f"worker={WORKERS}")
        yield made


def test_everything_is_healthy_and_in_production(trial: Trial) -> None:
    """On Postgres and Redis, with every check passing once the worker containers have started."""
    # While all containers start on a few cores, Postgres may cancel the first count of the queues.
    detailed = wait_until(trial.healthy, seconds=30, what=lambda: f"healthy: {trial.not_passing()}")

    assert trial.ask("/health").json()["environment"] == "production"
    assert detailed["checks"]["database"]["details"]["adapter"] == "postgres"
    for service in ("secrets", "migrate"):
        assert trial.containers(service)[0].state()["ExitCode"] == 0


@pytest.mark.parametrize("service", USERS)
def test_a_service_has_no_rights_and_no_secret_in_its_variables(trial: Trial, service: str) -> None:
    """Inspecting a container shows the paths of secrets, not their values."""
    running = inspected(trial.containers(service)[0].name)
    host, variables = running["HostConfig"], "\n".join(running["Config"]["Env"])
    secrets = {trial.secret(name) for name in SECRETS}

    assert running["Config"]["User"] == USERS[service]
    assert host["ReadonlyRootfs"]
    assert (host["CapDrop"], host["CapAdd"]) == (["ALL"], None)
    assert host["SecurityOpt"] == ["no-new-privileges:true"]
    assert len(secrets) == len(SECRETS)
    assert min(map(len, secrets)) == 64
    assert [secret for secret in secrets if secret in variables] == []


def test_a_job_is_done_by_a_worker_container(trial: Trial) -> None:
    """The API accepts it, and does not run it itself."""
    (done,) = trial.completed([trial.accept(0.0)])
    workers = [inspected(each.name)["Config"]["Hostname"] for each in trial.containers("worker")]

    assert done["result"] in workers
    assert trial.ask("/api/v1/jobs", headers={"Authorization": "Bearer guessed"}).status == 401


def test_killing_a_worker_loses_nothing(trial: Trial) -> None:
    """The other worker runs its jobs: every accepted job completes."""
    killed = trial.containers("worker")[0]
    ids = [trial.accept(1.0) for _ in range(JOBS)]
    killed.wait(lambda: mine(trial, killed.name), "a job that it runs")
    docker("kill", "--signal=KILL", killed.name)
    assert killed.wait_ended()["ExitCode"] == 137

    done = trial.completed(ids)
    crashed = [job for job in done if job["crashes"]]
    print(f"{len(ids)} accepted, {len(done)} completed, {len(crashed)} of them a second time")

    assert len({job["id"] for job in done}) == JOBS
    assert crashed
    assert {job["attempts"] for job in done} == {1}
    assert {state: len(trial.jobs(state)) for state in ("waiting", "active", "failed")} == {
        "waiting": 0,
        "active": 0,
        "failed": 0,
    }
    docker("start", killed.name)
    killed.wait_healthy()


def mine(trial: Trial, name: str) -> list[dict[str, Any]]:
    """Return the jobs that a container is running."""
    hostname = inspected(name)["Config"]["Hostname"]
    return [job for job in trial.jobs("active") if hostname in (job["worker"] or "")]


def test_more_workers_are_a_number(trial: Trial) -> None:
    """``--scale worker=3`` adds one, and leaves the others alone."""
    before = [each.name for each in trial.containers("worker")]
    trial.up("--scale", "worker=3")
    now = trial.containers("worker")

    assert len(now) == 3
    assert {each.name for each in now} > set(before)
    assert {each.state()["Health"]["Status"] for each in now} == {"healthy"}


def test_new_code_on_an_old_schema_says_what_to_run(trial: Trial) -> None:
    """It is not ready, and probes and log show the reason, until `viralfx migrate` has run."""
    trial.sql("create database empty owner viralfx_service")
    url = "postgresql://viralfx_service@postgres:5432/empty"
    with trial.beside("serve", DATABASE_URL=url) as early:
        behind = early.wait(lambda: probe(early.name), "an answer of the check")
        assert "schema is behind: 0001" in behind
        assert "run `viralfx migrate`" in behind
        assert "schema_behind" in early.log()
        assert engine.attempt("exec", early.name, "viralfx", "probe", "ready").returncode == 1

        with trial.beside("migrate", DATABASE_URL=url) as migration:
            assert migration.wait_ended()["ExitCode"] == 0
            assert "applied 0001" in migration.log()
        early.wait(
            lambda: engine.attempt("exec", early.name, "viralfx", "probe", "ready").returncode == 0,
            "ready",
        )


def test_old_code_on_a_new_schema_goes_on_and_warns(trial: Trial) -> None:
    """A roll-out that is undone works; the log and the doctor say that the image is the older."""
    trial.sql("create database later owner viralfx_service template template0")
    url = "postgresql://viralfx_service@postgres:5432/later"
    with trial.beside("migrate", DATABASE_URL=url) as migration:
        assert migration.wait_ended()["ExitCode"] == 0
    trial.sql("update viralfx_ops.viralfx_migrations set version_num = '9999'", database="later")

    with trial.beside("serve", DATABASE_URL=url) as old:
        old.wait_healthy()
        (line,) = old.wait(lambda: old.logged("Database schema is of a later version"), "the line")
        assert line["revision"] == "9999"
        doctor = engine.attempt("exec", old.name, "viralfx", "doctor").stdout
        assert "the schema is at 9999, made by a later version of the service" in doctor


def probe(name: str) -> str:
    """Return what the database check says inside a container, once it says something bad."""
    code = (
        "import json, urllib.error, urllib.request as r\n"
        "try: r.urlopen('http://127.0.0.1:3000/health/database')\n"
        "except urllib.error.HTTPError as e: print(e.read().decode())"
    )
    ran = engine.attempt("exec", name, "python", "-c", code)
    return ran.stdout if "behind" in ran.stdout else ""


def test_everything_stops_in_order(trial: Trial) -> None:
    """``docker compose stop`` ends each process of the project with 0."""
    trial.compose("stop")

    for service in ("backend", "worker"):
        for each in trial.containers(service):
            assert each.state()["ExitCode"] == 0, each.log()
            assert not each.state()["OOMKilled"]
