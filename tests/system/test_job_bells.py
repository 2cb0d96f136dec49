"""Jobs while Redis, which only tells of them, is away, empty or not there at all."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from tests.servers.postgres import Database
from tests.servers.redis import RedisServer
from tests.servers.waiting import wait_until
from tests.system.jobs import JOBS, accept, until
from tests.system.service import Service, running
from tests.system.workers import api, environment_of, worker

LOOK = 1.0
"""Seconds between two looks, the default."""
LOADED = 1.0
"""Seconds more, for several processes on a machine that is busy otherwise."""


def environment_with(database: Database, redis: RedisServer) -> dict[str, str]:
    """Return the variables of an API and its workers."""
    return environment_of(
        database,
        TASK_MODULES="tests.system.fault_tasks",
        REDIS_HOST=redis.host,
        REDIS_PORT=str(redis.port),
        JOB_LEASE="30000",
        JOB_SWEEP_INTERVAL="30000",
    )


def _waited(job: dict[str, Any]) -> float:
    """Return the seconds between when a job was due and when it began."""
    begun, due = (datetime.fromisoformat(job[name]) for name in ("startedAt", "runAt"))
    return (begun - due).total_seconds()


def _slowest(service: Service, count: int) -> float:
    """Have jobs run one after the other; return the longest time one waited."""
    jobs = []
    for _ in range(count):
        job_id = accept(service, "faults.work", 0)
        jobs.append(until(service, job_id, "completed"))
    return max(map(_waited, jobs))


def test_jobs_are_run_whatever_becomes_of_redis(database: Database, own_redis: RedisServer) -> None:
    """Down at the start, there later, emptied under jobs that wait, and gone again."""
    environment = environment_with(database, own_redis)
    own_redis.stop()
    with api(environment) as service, worker(environment) as process:
        never_there = _slowest(service, 8)
        own_redis.start()
        wait_until(lambda: _redis_is(process, "pass"), what="the worker has Redis")
        wait_until(lambda: _redis_is(service, "pass"), what="the API has Redis")
        there = _slowest(service, 8)
        emptied = []
        for _ in range(8):
            job_id = accept(service, "faults.work", 0)
            own_redis.flush()
            emptied.append(_waited(until(service, job_id, "completed")))
        own_redis.stop()
        gone = _slowest(service, 8)
        process.signal(signal.SIGTERM)
        code = process.exit_code()

    assert max(never_there, there, *emptied, gone) < LOOK + LOADED
    assert code == 0


def _redis_is(process: Service, status: str) -> bool:
    look = process.get if process.serves else process.manage
    return bool(look("/health/redis").json()["status"] == status)


def test_jobs_that_waited_while_redis_was_emptied_are_run(
    database: Database, redis: RedisServer
) -> None:
    """By a worker that begins afterwards, and knows no more of them than the ledger does."""
    environment = environment_with(database, redis)
    with api(environment) as service:
        ids = [accept(service, "faults.work", 0) for _ in range(30)]
        redis.flush()
        with worker({**environment, "JOB_CONCURRENCY": "2"}):
            done = [until(service, job_id, "completed") for job_id in ids]
    begun = [datetime.fromisoformat(job["startedAt"]) for job in done]

    assert {(job["attempts"], job["crashes"]) for job in done} == {(1, 0)}
    # Not one look for every two of them.
    assert (max(begun) - min(begun)).total_seconds() < 5 * LOOK


def test_without_any_redis_a_worker_looks_often(database: Database) -> None:
    """Nobody tells it anything, so it does not leave jobs for the ten seconds it could."""
    environment = environment_of(
        database,
        TASK_MODULES="tests.system.fault_tasks",
        JOB_LEASE="30000",
        JOB_SWEEP_INTERVAL="30000",
        JOB_LOOK_INTERVAL="10000",
    )
    with api(environment) as service, worker(environment):
        assert _slowest(service, 8) < LOOK + LOADED


@contextmanager
def in_memory(**environment: str) -> Iterator[Service]:
    """Run the service with everything in memory."""
    variables = {"TASK_MODULES": "tests.system.fault_tasks", **environment}
    with running(environment=variables) as service:
        yield service.wait_ready()


def test_in_memory_what_waits_is_run_and_what_cannot_be_is_told() -> None:
    """All that is due at the stop; a job of next year is lost with its process: 4, and a line."""
    with in_memory(JOB_CONCURRENCY="1", SHUTDOWN_DRAIN_TIMEOUT="9000") as service:
        for _ in range(3):
            accept(service, "faults.work", 1)
        body = {"task": "faults.work", "payload": 0, "runAt": "2100-01-01T00:00:00Z"}
        assert service.get(JOBS, method="POST", json_body=body).status == 202
        service.signal(signal.SIGTERM)
        code = service.exit_code()
    (left,) = service.logged("Job worker left")
    (stage,) = (s for s in service.logged("Shutdown stage ended") if s["stage"] == "jobs")
    lost = [line for line in service.output if "1 in-memory jobs did not finish" in line]

    assert (code, stage["outcome"], len(lost)) == (4, "failed", 1)
    assert (left["handedBack"], left["ignoring"], left["unrecorded"]) == (0, 0, 0)
