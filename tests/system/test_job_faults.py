"""Jobs whose workers stop, die, hang or are killed: each fault, with its time limits.

All tests share one API and one database. Redis carries the notifications, and workers poll only
every ten seconds: a job that starts sooner was notified.
"""

import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from tests.servers.ports import free_port
from tests.servers.postgres import Database, PostgresServer
from tests.servers.redis import RedisServer
from tests.servers.waiting import wait_until
from tests.system.jobs import JOBS, accept, until
from tests.system.service import Prober, Service, command, running
from tests.system.workers import api, environment_of, worker

BUDGET = 2.5
LEASE, SWEEP = 2.0, 0.5
POLL = 60.0
"""Seconds after which a worker would find a job that was handed back without a notification."""
LOADED = 15.0
"""Seconds of tolerance for several processes on a busy machine."""


@dataclass(frozen=True)
class Home:
    """The API, database and Redis that all tests share."""

    service: Service
    database: Database
    environment: dict[str, str]

    def with_lease(self, lease: float, **more: str) -> dict[str, str]:
        """Return the variables of a worker with a lease of ``lease`` seconds."""
        times = {"JOB_LEASE": lease, "JOB_SWEEP_INTERVAL": SWEEP}
        return {**self.environment, **{k: f"{v * 1000:.0f}" for k, v in times.items()}, **more}


@pytest.fixture(scope="module")
def home(postgres: PostgresServer, shared_redis: RedisServer) -> Iterator[Home]:
    """Return an API that runs no jobs."""
    database = Database(postgres, postgres.create_database())
    environment = environment_of(
        database,
        TASK_MODULES="tests.system.fault_tasks",
        REDIS_HOST=shared_redis.host,
        REDIS_PORT=str(shared_redis.port),
        JOB_POLL_INTERVAL="10000",
        JOB_LEASE="30000",
        JOB_SWEEP_INTERVAL="30000",
        JOB_MAX_ATTEMPTS="1",
    )
    with api(environment) as service:
        yield Home(service, database, environment)
    postgres.drop_database(database.name)


@pytest.mark.each_python
def test_a_stopped_worker_finishes_or_hands_back_its_jobs(home: Home, tmp_path: Path) -> None:
    """Within the budget and without an attempt; probes are correct; the rest moves at once."""
    leaving = {**home.environment, "SHUTDOWN_DRAIN_TIMEOUT": f"{BUDGET * 1000:.0f}"}
    released = tmp_path / "released"
    with worker(leaving) as first:
        here = {"pid": first.process.pid}
        fits = [accept(home.service, "faults.until", str(released)) for _ in range(3)]
        long = [accept(home.service, "faults.stay", here) for _ in range(3)]
        deaf = accept(home.service, "faults.insist", here)
        for job_id in (*fits, *long, deaf):
            until(home.service, job_id, "active")
        assert first.management_port is not None
        with (
            worker({**home.environment, "JOB_POLL_INTERVAL": f"{POLL * 1000:.0f}"}) as second,
            Prober(first.management_port, "/health/ready", timeout=10) as ready,
            Prober(first.management_port, "/health/live", timeout=10) as live,
        ):
            wait_until(lambda: {200} == {*ready.order(), *live.order()}, what="probes")
            began = time.monotonic()
            first.signal(signal.SIGTERM)
            wait_until(lambda: 503 in ready.order(), what="not ready")
            released.touch()
            # Neither of these shortens the drain.
            first.signal(signal.SIGTERM)
            first.signal(signal.SIGINT)
            code = first.exit_code()
            took = time.monotonic() - began
            finished = [until(home.service, job_id, "completed") for job_id in fits]
            moved = [until(home.service, job_id, "completed") for job_id in (*long, deaf)]
            # A killed worker would stay the leader for its lease of 30 s.
            second.signal(signal.SIGTERM)
            second.exit_code()
    (left,) = first.logged("Job worker drained")
    after = [_moment(each["startedAt"]) - _moment(left["timestamp"]) for each in moved]

    assert code == 0
    assert BUDGET / 2 < took < BUDGET + LOADED
    assert (left["finished"], left["handedBack"], left["ignoring"]) == (3, 4, 1)
    assert {each["result"] for each in finished} == {first.process.pid}
    assert {each["result"] for each in moved} == {second.process.pid}
    assert _costs([*finished, *moved]) == {(1, 0)}
    assert max(after) < POLL / 3
    assert ready.order() in ([200, 503, None], [200, 503])
    assert live.order() in ([200, None], [200])


def _costs(jobs: list[dict[str, Any]]) -> set[tuple[int, int]]:
    return {(each["attempts"], each["crashes"]) for each in jobs}


def _moment(timestamp: str) -> float:
    return datetime.fromisoformat(timestamp).timestamp()


def test_the_jobs_of_a_killed_worker_run_without_a_notification(home: Home) -> None:
    """Without a new job or a notification, a sweep finds them within the lease and one interval."""
    environment = home.with_lease(LEASE)
    with worker(environment) as first:
        held = [
            accept(home.service, task, {"pid": first.process.pid})
            for task in ("faults.stay", "faults.stay", "faults.insist")
        ]
        for job_id in held:
            until(home.service, job_id, "active")
        with worker(environment) as second:
            first.process.kill()
            killed_at = datetime.now(UTC).timestamp()
            done = [until(home.service, job_id, "completed") for job_id in held]
    took = max(_moment(each["startedAt"]) for each in done) - killed_at

    assert {each["result"] for each in done} == {second.process.pid}
    assert _costs(done) == {(1, 1)}
    assert took < LEASE + SWEEP + LOADED


def test_a_poison_job_fails_no_other_job(home: Home) -> None:
    """After JOB_MAX_CRASHES it fails with code ``crashed``; concurrent jobs complete."""
    # A job that ran beside it twice is quarantined as well, and starts without a poll.
    environment = home.with_lease(LEASE, JOB_MAX_CRASHES="3")
    with ExitStack() as stack:
        first = stack.enter_context(worker(environment))
        here = {"pid": first.process.pid}
        beside = [accept(home.service, "faults.stay", here) for _ in range(4)]
        for job_id in beside:
            until(home.service, job_id, "active")
        poison = accept(home.service, "faults.kill", None)
        codes = [first.exit_code()]
        others = [
            stack.enter_context(running(program="worker", management=True, environment=environment))
            for _ in range(3)
        ]
        failed = until(home.service, poison, "failed", seconds=40)
        done = [until(home.service, job_id, "completed", seconds=30) for job_id in beside]
        codes += [code for each in others if (code := each.process.poll()) is not None]

    assert (failed["error"]["code"], failed["attempts"], failed["crashes"]) == ("crashed", 0, 3)
    assert codes == [-signal.SIGKILL] * 3
    assert {each["attempts"] for each in done} == {1}
    assert {each["crashes"] for each in done} <= {1, 2}


def test_a_worker_ended_by_force_loses_no_job(home: Home) -> None:
    """Neither exit code 130 (a second SIGINT) nor 124 (a blocked loop) loses a job."""
    environment = home.with_lease(LEASE)
    impatient = {
        "SHUTDOWN_DRAIN_TIMEOUT": "500",
        "SHUTDOWN_STATE_TIMEOUT": "500",
        "SHUTDOWN_CONNECTION_TIMEOUT": "500",
        "SHUTDOWN_FORCE_TIMEOUT": "1500",
    }
    with (
        worker(environment, "--queue", "default") as interrupted,
        worker({**environment, **impatient}, "--queue", "analytics") as blocked,
    ):
        stays = accept(home.service, "faults.stay", {"pid": interrupted.process.pid})
        blocks = accept(home.service, "faults.block", {"pid": blocked.process.pid})
        until(home.service, stays, "active")
        until(home.service, blocks, "active")
        interrupted.signal(signal.SIGINT)
        wait_until(lambda: interrupted.status("/health/ready") == 503, what="it drains")
        began = time.monotonic()
        interrupted.signal(signal.SIGINT)
        blocked.signal(signal.SIGTERM)
        codes = (interrupted.exit_code(), blocked.exit_code())
        took = time.monotonic() - began
        with worker(environment):
            done = [until(home.service, job_id, "completed") for job_id in (stays, blocks)]

    assert codes == (130, 124)
    assert took < 1.5 + LOADED
    assert "in block" in "".join(blocked.errors)
    assert _costs(done) == {(1, 1)}


def test_a_worker_that_cannot_start_logs_the_reason() -> None:
    """Exit code 2 with all configuration errors at once; 3 without the database."""
    port = str(free_port())
    wrong = command("worker", "--queue", "defualt", environment={"MANAGEMENT_PORT": port})
    alone = {
        "DATABASE_URL": f"postgresql://unknown:nothing@127.0.0.1:{free_port()}/none",
        "DB_MAX_RECONNECT_ATTEMPTS": "2",
        "DB_RECONNECT_DELAY": "10",
        "MANAGEMENT_PORT": port,
    }
    unreachable = command("worker", environment=alone)

    assert wrong.returncode == 2
    assert [line.split(":")[1].strip() for line in wrong.stderr.splitlines()] == [
        "DATABASE_URL",
        "--queue",
    ]
    assert unreachable.returncode == 3
    assert "after 2 attempts" in unreachable.stdout
    assert "Traceback" not in unreachable.stdout + unreachable.stderr


def test_the_counts_of_health_equal_the_ledger(home: Home) -> None:
    """Once all jobs of this file are at rest, API and workers report equal counts."""
    # Not across the turn of an hour, at which scheduled tasks run.
    wait_until(lambda: time.time() % 3600 < 3600 - 15, what="an hour begins")
    with worker(home.environment, "--queue", "default", "--queue", "analytics") as process:
        done = [accept(home.service, "faults.work", 0) for _ in range(5)]
        fails = [accept(home.service, "faults.fail", None) for _ in range(3)]
        _post(home, "faults.work", runAt="2100-01-01T00:00:00Z")
        cancelled = _post(home, "faults.work", runAt="2100-01-01T00:00:00Z")
        for _ in range(2):
            accept(home.service, "faults.insist", {"pid": 0})
        assert home.service.get(f"{JOBS}/{cancelled}", method="DELETE").status == 204
        for job_id in done:
            until(home.service, job_id, "completed")
        for job_id in fails:
            until(home.service, job_id, "failed")
        assert home.service.get(f"{JOBS}/{fails[0]}/retry", method="POST").status == 202
        wait_until(lambda: _rests(home), what="rest")
        counts = [
            _counts(response.json())
            for response in (
                home.service.get("/health/detailed?fresh=1"),
                process.manage("/health/detailed?fresh=1"),
            )
        ]
        kept = _kept(home)

    assert counts == [kept, kept]
    assert kept["default", "scheduled"] == 1
    assert kept["default", "cancelled"] == 1
    assert kept["default", "completed"] >= 5
    assert kept["default", "failed"] >= 3
    assert kept["notifications", "waiting"] == 2


def _post(home: Home, task: str, **more: str) -> str:
    body = {"task": task, "payload": 0, **more}
    return str(home.service.get(JOBS, method="POST", json_body=body).json()["id"])


def _rests(home: Home) -> bool:
    kept = _kept(home)
    return not any(kept[queue, "active"] for queue in ("default", "analytics")) and not any(
        kept[queue, "waiting"] for queue in ("default", "analytics")
    )


def _kept(home: Home) -> Counter[tuple[str, str]]:
    rows = home.database.execute(
        """
        SELECT queue,
            CASE WHEN state = 'waiting' AND run_at > now() THEN 'scheduled' ELSE state END AS shown,
            count(*)
        FROM viralfx_all_jobs GROUP BY queue, shown
        """
    )
    return Counter({(queue, state): count for queue, state, count in rows})


def _counts(health: Any) -> Counter[tuple[str, str]]:
    states = ("waiting", "active", "completed", "failed", "scheduled", "cancelled")
    return Counter(
        {
            (queue["name"], state): count
            for queue in health["checks"]["queues"]["details"]
            for state in states
            if (count := queue["metrics"][state])
        }
    )
