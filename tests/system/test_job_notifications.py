"""Jobs while Redis, which carries only notifications, is down, empty or not configured."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import pytest
from tests.servers.postgres import Database
from tests.servers.redis import RedisServer
from tests.servers.waiting import wait_until
from tests.system.jobs import JOBS, accept, until
from tests.system.service import Service, running
from tests.system.workers import api, environment_of, worker

POLL_SECONDS = 1.0
"""Seconds between two polls, the default."""
NOTIFIED_SECONDS = 10.0
"""Seconds in which a job starts by a notification, a sixth of the time between two polls."""
LOADED = 9.0
"""Seconds of tolerance for several processes on a busy machine."""


def environment_with(database: Database, redis: RedisServer) -> dict[str, str]:
    """Return the variables of an API and its workers."""
    return environment_of(
        database,
        TASK_MODULES="tests.system.fault_tasks",
        REDIS_HOST=redis.host,
        REDIS_PORT=str(redis.port),
        JOB_LEASE="30000",
        JOB_SWEEP_INTERVAL="30000",
        JOB_POLL_INTERVAL="1000",
    )


def _waited(job: dict[str, Any]) -> float:
    """Return the seconds from the due time of a job to its start."""
    begun, due = (datetime.fromisoformat(job[name]) for name in ("startedAt", "runAt"))
    return (begun - due).total_seconds()


def _waits(service: Service, count: int) -> list[float]:
    """Run jobs one after the other; return their waits in seconds, the shortest first."""
    jobs = []
    for _ in range(count):
        job_id = accept(service, "faults.work", 0)
        jobs.append(until(service, job_id, "completed"))
    return sorted(map(_waited, jobs))


def test_jobs_run_through_outages_of_redis(database: Database, own_redis: RedisServer) -> None:
    """Redis is down at the start, comes up, is emptied, has no memory left, and goes down again."""
    environment = environment_with(database, own_redis)
    own_redis.stop()
    with api(environment) as service, worker(environment) as process:
        never_there = _waits(service, 8)
        own_redis.start()
        wait_until(lambda: _redis_is(process, "pass"), what="the worker has Redis")
        wait_until(lambda: _redis_is(service, "pass"), what="the API has Redis")
        there = _waits(service, 8)
        emptied = []
        for _ in range(8):
            job_id = accept(service, "faults.work", 0)
            own_redis.flush()
            emptied.append(_waited(until(service, job_id, "completed")))
        own_redis.fill()
        wait_until(lambda: _redis_is(service, "warn"), what="the API sees that Redis is full")
        full = _waits(service, 8)
        own_redis.unfill()
        wait_until(lambda: _redis_is(service, "pass"), what="Redis takes writes again")
        back = _waits(service, 8)
        own_redis.stop()
        gone = _waits(service, 8)
        process.signal(signal.SIGTERM)
        code = process.exit_code()
    unsent = service.logged("Job notifications cannot be sent; workers poll")

    assert any("memory" in line["reason"] for line in unsent), unsent
    assert max(*never_there, *there, *emptied, *full, *back, *gone) < POLL_SECONDS + LOADED
    assert code == 0


def _redis_is(process: Service, status: str) -> bool:
    get = process.get if process.serves else process.manage
    return bool(get("/health/redis").json()["status"] == status)


@pytest.mark.each_python
def test_jobs_waiting_while_redis_is_emptied_run(database: Database, redis: RedisServer) -> None:
    """A worker that starts afterwards finds them in the ledger."""
    environment = environment_with(database, redis)
    with api(environment) as service:
        ids = [accept(service, "faults.work", 0) for _ in range(30)]
        redis.flush()
        with worker({**environment, "JOB_CONCURRENCY": "2"}):
            done = [until(service, job_id, "completed") for job_id in ids]
    begun = [datetime.fromisoformat(job["startedAt"]) for job in done]

    assert {(job["attempts"], job["crashes"]) for job in done} == {(1, 0)}
    # Fewer polls than one for every two jobs.
    assert (max(begun) - min(begun)).total_seconds() < 10 * POLL_SECONDS


LISTENING = """
select pid from pg_stat_activity
where datname = current_database() and application_name = 'viralfx-listen' and state = 'idle'
"""


def test_without_redis_a_worker_is_notified_by_postgres(database: Database) -> None:
    """A job is done within ten seconds although the worker polls once a minute."""
    environment = environment_of(
        database,
        TASK_MODULES="tests.system.fault_tasks",
        JOB_LEASE="120000",
        JOB_SWEEP_INTERVAL="60000",
        JOB_POLL_INTERVAL="60000",
    )
    with api(environment) as service, worker(environment) as process:
        # Until it listens, it polls often.
        listening = wait_until(lambda: database.execute(LISTENING), what="the worker listens")
        until(service, accept(service, "faults.work", 0), "completed")
        waits = _waits(service, 3)
        assert database.execute(LISTENING) == listening
        process.signal(signal.SIGTERM)
        assert process.exit_code() == 0
        assert process.logged("Job notifications are not received; workers poll") == []

    assert waits[-1] < NOTIFIED_SECONDS


@contextmanager
def in_memory(**environment: str) -> Iterator[Service]:
    """Run the service with everything in memory."""
    variables = {"TASK_MODULES": "tests.system.fault_tasks", **environment}
    with running(environment=variables) as service:
        yield service.wait_ready()


def test_the_stop_in_memory_runs_due_jobs_and_logs_the_rest() -> None:
    """The stop runs all due jobs; a job of the next century is lost: exit code 0 and one line."""
    with in_memory(JOB_CONCURRENCY="1", SHUTDOWN_DRAIN_TIMEOUT="9000") as service:
        for _ in range(3):
            accept(service, "faults.work", 1)
        body = {"task": "faults.work", "payload": 0, "runAt": "2100-01-01T00:00:00Z"}
        assert service.get(JOBS, method="POST", json_body=body).status == 202
        service.signal(signal.SIGTERM)
        code = service.exit_code()
    (left,) = service.logged("Job worker drained")
    (stage,) = (s for s in service.logged("Shutdown stage ended") if s["stage"] == "jobs")
    (lost,) = service.logged("Scheduled jobs in memory end with this process")

    assert (code, stage["outcome"], lost["scheduled"]) == (0, "ok", 1)
    assert (left["handedBack"], left["ignoring"], left["unrecorded"]) == (0, 0, 0)
