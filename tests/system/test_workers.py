"""Jobs in Postgres: an API process, and worker processes that stop, die and restart."""

import gc
import signal
import socket
import sys
import time
from contextlib import ExitStack
from functools import partial

import pytest
from tests.servers.ports import free_port, own_address
from tests.servers.postgres import Database, PostgresServer
from tests.servers.redis import RedisServer
from tests.servers.waiting import wait_until
from tests.system.jobs import JOBS, accept, job, until
from tests.system.service import READY_WITHIN, Service, command, running
from tests.system.workers import api, environment_of, worker


def test_only_a_worker_runs_jobs(database: Database) -> None:
    """An accepted job waits for a worker; while it runs, the job holds the worker's name."""
    environment = environment_of(database, SHUTDOWN_DRAIN_TIMEOUT="2000")
    with api(environment) as service:
        headers = {"X-Correlation-ID": "order-17", "Idempotency-Key": "order-17"}
        job_id = accept(service, "parcels.ship", {"weight": 3}, **headers)
        held_id = accept(service, "parcels.wait", 600)
        assert job(service, job_id)["state"] == "waiting"
        with worker(environment) as first:
            done = until(service, job_id, "completed")
            held = until(service, held_id, "active")
            first.signal(signal.SIGTERM)

            assert first.exit_code() == 0
        service.signal(signal.SIGTERM)

        assert service.exit_code() == 0
    assert done["result"] == {"weight": 3, "attempt": 1, "correlationId": "order-17"}
    assert f"-{first.process.pid}-" in held["worker"]
    assert service.logged("Listening")[0].get("queues") is None
    working = first.logged("Working")[0]
    assert (working["queues"], working["managementPort"]) == (
        "default,notifications,analytics",
        first.management_port,
    )


def test_the_interpreter_gives_way_often_and_collects_seldom(database: Database) -> None:
    """Otherwise the event loop waits for 5 ms beside a thread, and collects after a few jobs."""
    environment = environment_of(database)
    with api(environment) as service, worker(environment):
        job_id = accept(service, "parcels.interpreter", None)
        found = until(service, job_id, "completed")["result"]

    assert found["switches"] <= sys.getswitchinterval() / 10
    assert found["collects"] >= max(2000, gc.get_threshold()[0])


def test_a_worker_serves_its_own_probes(database: Database) -> None:
    """Its management port serves probes and details, and no other endpoint."""
    environment = environment_of(database, MANAGEMENT_TOKEN="planted")
    with worker(environment) as process:
        statuses = {
            path: process.manage(path).status
            for path in ("/health", "/health/live", "/health/ready", "/health/startup", JOBS)
        }
        queues = process.manage("/health/queues?fresh=1").json()
        token = {"Authorization": "Bearer planted"}
        stopping = process.manage("/health/shutdown", method="POST", headers=token)
        code = process.exit_code()

    assert list(statuses.values()) == [200, 200, 200, 200, 404]
    assert queues["status"] == "pass"
    assert (stopping.status, code) == (202, 0)


def test_a_worker_is_probed_on_its_default_port(database: Database) -> None:
    """Without MANAGEMENT_PORT the port is 3001, unlike that of a service in the same pod."""
    environment = environment_of(database, HOST=(host := own_address()), PORT=str(free_port()))
    try:
        socket.create_server((host, 3001)).close()
    except OSError as problem:
        pytest.skip(f"port 3001 cannot be bound: {problem.strerror}")
    with (
        socket.create_server((host, int(environment["PORT"]))),
        running(program="worker", environment=environment) as process,
    ):
        wait_until(
            lambda: process.process.poll() is not None or process.logged("Working"),
            seconds=READY_WITHIN,
            what="it works",
        )
        assert process.process.poll() is None, f"ended early: {process.output} {process.errors}"
        kinds = ("live", "ready", "startup")
        asked = [command("probe", kind, "--worker", environment=environment) for kind in kinds]
        (working,) = process.logged("Working")
        elsewhere = {**environment, "MANAGEMENT_PORT": "1"}
        refused = command("probe", "live", "--worker", environment=elsewhere)

    assert working["managementPort"] == 3001
    assert [result.returncode for result in asked] == [0, 0, 0]
    assert '"ready":true' in asked[1].stdout
    assert (refused.returncode, ":1/health/live" in refused.stderr) == (1, True)


def test_in_memory_adapters_are_logged(database: Database) -> None:
    """With Postgres, only the cache is in memory; jobs are in Postgres."""
    with api(environment_of(database)) as service:
        (line,) = wait_until(
            lambda: service.logged("Data in memory is lost when this process ends")
        )

    assert line["inMemory"] == "cache"


def test_a_worker_of_one_queue_ignores_the_others(database: Database) -> None:
    """--queue selects the queues of a worker."""
    environment = environment_of(database)
    with (
        api(environment) as service,
        worker(environment, "--queue", "analytics", "--queue", "default") as process,
    ):
        left = accept(service, "parcels.wait", 0)
        taken = [accept(service, "parcels.echo", 1), accept(service, "parcels.ship", {"weight": 1})]
        for job_id in taken:
            until(service, job_id, "completed")

        assert job(service, left)["state"] == "waiting"
        (working,) = wait_until(lambda: process.logged("Working"))
    assert working["queues"] == "analytics,default"


def test_a_stopping_worker_hands_its_jobs_back(database: Database) -> None:
    """A job beyond the budget loses no attempt, and another worker is notified of it."""
    more = {"SHUTDOWN_DRAIN_TIMEOUT": "1000", "JOB_POLL_INTERVAL": "60000"}
    environment = environment_of(database, **more)
    with api(environment) as service, worker(environment) as first:
        short = accept(service, "parcels.wait", 0.5)
        long, stubborn = accept(service, "parcels.wait", 600), accept(service, "parcels.never", 0)
        for job_id in (long, stubborn):
            until(service, job_id, "active")
        with worker(environment) as second:
            first.signal(signal.SIGTERM)
            code = first.exit_code()
            again = wait_until(
                lambda: _active_at(service, (long, stubborn), second), what="taken over"
            )
            done = until(service, short, "completed")
            second.process.kill()

    assert (code, again) == (0, True)
    assert (done["attempts"], done["crashes"]) == (1, 0)


def _active_at(service: Service, ids: tuple[str, ...], owner: Service) -> bool:
    name = f"-{owner.process.pid}-"
    shown = [job(service, job_id) for job_id in ids]
    return all(
        (each["state"], each["attempts"], each["crashes"]) == ("active", 1, 0)
        and name in each["worker"]
        for each in shown
    )


@pytest.mark.each_python
def test_jobs_of_a_killed_worker_are_run_elsewhere(database: Database) -> None:
    """Within the lease and a sweep, without a notification; the crash costs no attempt."""
    environment = environment_of(database)
    with api(environment) as service, worker(environment) as first:
        job_id = accept(service, "parcels.wait", 600)
        until(service, job_id, "active")
        with worker(environment) as second:
            first.process.kill()
            wait_until(lambda: f"-{second.process.pid}-" in str(job(service, job_id)["worker"]))
            taken = job(service, job_id)
            second.process.kill()

    assert (taken["attempts"], taken["crashes"]) == (1, 1)


def test_a_frozen_database_ends_no_lease_wrongly(own_postgres: PostgresServer) -> None:
    """An outage longer than the leases: a sweep finds only the worker that really died."""
    # Each of the four workers gets four of the sixteen jobs.
    environment = environment_of(own_postgres, JOB_POLL_INTERVAL="100", JOB_CONCURRENCY="4")
    lost = "Job lease lost: other workers may take this worker's jobs"
    with ExitStack() as stack:
        service = stack.enter_context(api(environment))
        victim, *living = [stack.enter_context(worker(environment)) for _ in range(4)]
        ids = [accept(service, "parcels.wait", 600) for _ in range(16)]
        held = [until(service, job_id, "active") for job_id in ids]
        own_postgres.freeze()
        try:
            victim.process.kill()
            for each in living:
                wait_until(partial(each.logged, lost), what="leases are over")
            beginners = [
                stack.enter_context(
                    running(program="worker", management=True, environment=environment)
                )
                for _ in range(2)
            ]
        finally:
            own_postgres.thaw()
        for each in beginners:
            each.wait_ready()
        dead = [each["id"] for each in held if f"-{victim.process.pid}-" in each["worker"]]
        for job_id in dead:
            wait_until(partial(_runs_again, service, job_id), what="found, and run by another")
        shown = {job_id: job(service, job_id) for job_id in ids}
        for each in (*living, *beginners):
            each.process.kill()

    assert len(dead) == 4
    assert [job_id for job_id in ids if shown[job_id]["crashes"]] == dead
    assert {each["attempts"] for each in shown.values()} == {1}


def _runs_again(service: Service, job_id: str) -> bool:
    shown = job(service, job_id)
    return bool(shown["crashes"]) and shown["state"] == "active"


def test_a_job_that_crashes_workers_fails(database: Database) -> None:
    """After JOB_MAX_CRASHES it has failed, and the remaining workers go on."""
    environment = environment_of(database, JOB_MAX_CRASHES="2")
    with api(environment) as service:
        poison = accept(service, "parcels.die", None)
        for _ in range(2):
            with running(program="worker", management=True, environment=environment) as victim:
                assert victim.exit_code() == 66
        with worker(environment):
            failed = until(service, poison, "failed")
            until(service, accept(service, "parcels.echo", 1), "completed")

    assert failed["error"]["code"] == "crashed"
    assert (failed["attempts"], failed["crashes"]) == (0, 2)


def test_the_service_may_run_jobs_in_postgres_itself(database: Database) -> None:
    """With --worker; its jobs are handed back when it stops."""
    environment = environment_of(database, SHUTDOWN_DRAIN_TIMEOUT="2000")
    with api(environment, "--worker") as service:
        until(service, accept(service, "parcels.echo", 1), "completed")
        held = accept(service, "parcels.wait", 600)
        until(service, held, "active")
        service.signal(signal.SIGTERM)
        code = service.exit_code()
    with api(environment) as again:
        handed_back = job(again, held)

    assert code == 0
    assert (handed_back["state"], handed_back["attempts"]) == ("waiting", 0)


def test_notifications_over_redis_arrive_at_once(database: Database, redis: RedisServer) -> None:
    """With a poll interval of ten seconds, notified jobs run without delay."""
    environment = environment_of(
        database,
        REDIS_HOST=redis.host,
        REDIS_PORT=str(redis.port),
        JOB_POLL_INTERVAL="10000",
        JOB_LEASE="30000",
        JOB_SWEEP_INTERVAL="30000",
    )
    with api(environment) as service, worker(environment) as process:
        until(service, accept(service, "parcels.echo", 0), "completed")
        began = time.monotonic()
        for number in range(20):
            until(service, accept(service, "parcels.echo", number), "completed")
        took = time.monotonic() - began
        process.signal(signal.SIGTERM)

        assert process.exit_code() == 0
    assert took < 60.0  # six polls


def test_without_tables_the_api_names_the_remedy(own_postgres: PostgresServer) -> None:
    """503 until `viralfx migrate` has run, and no restart after it."""
    environment = {"DATABASE_URL": own_postgres.url(), "TASK_MODULES": "tests.job_tasks"}
    with running(environment=environment) as service:
        wait_until(lambda: service.status("/health/live") == 200, seconds=READY_WITHIN, what="live")
        wait_until(
            lambda: b"migrate" in service.get(JOBS).body, seconds=READY_WITHIN, what="started"
        )
        reply = service.get(JOBS)
        environment_of(own_postgres)
        wait_until(lambda: service.status(JOBS) == 200, what="the API works")

    assert reply.status == 503
    assert "viralfx migrate" in reply.json()["detail"]
    assert reply.headers["retry-after"] == "1"


def test_without_its_database_the_api_accepts_no_job(own_postgres: PostgresServer) -> None:
    """503 before it is back, never 202; jobs go on after that."""
    environment = environment_of(own_postgres)
    with api(environment) as service, worker(environment):
        before = accept(service, "parcels.wait", 3.0)
        own_postgres.stop()
        reply = service.get(JOBS, method="POST", json_body={"task": "parcels.echo"}, timeout=60)
        own_postgres.start()
        wait_until(lambda: service.status(JOBS) == 200, what="the API is back")
        after = accept(service, "parcels.echo", 1)
        until(service, after, "completed", seconds=40)
        until(service, before, "completed", seconds=40)

    assert reply.status == 503
    assert reply.headers["retry-after"]
