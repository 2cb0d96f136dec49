"""Jobs that block their worker for many leases."""

import re
import signal
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.servers.postgres import Database
from tests.servers.waiting import wait_until
from tests.soak import SOAK
from tests.system.jobs import accept, until
from tests.system.service import Service, running
from tests.system.workers import api, environment_of

LEASE = 1.5
BLOCKED = (5 if SOAK else 2) * LEASE
WORKERS = 3
BYSTANDERS = 40
BUDGET = 4.0


def problem_of(service: Service) -> str | None:
    """Return the message of the check of the queues while it says that a worker is blocked."""
    message = str(service.get("/health/queues").json()["message"])
    return message if "is blocked" in message else None


@pytest.mark.soak
@pytest.mark.timeout(240)
def test_jobs_that_block_run_once_and_so_do_their_neighbours(
    database: Database, tmp_path: Path
) -> None:
    """Leases in Python, in C, in a child, in a thread: no crash, and no second run.

    A worker whose thread is busy ends within its budget, with code 0.
    """
    runs = tmp_path / "runs"
    environment = environment_of(
        database,
        TASK_MODULES="tests.system.blocking_tasks",
        JOB_LEASE=f"{LEASE * 1000:.0f}",
        JOB_SWEEP_INTERVAL="300",
        HEALTH_CHECK_INTERVAL="500",
        SHUTDOWN_DRAIN_TIMEOUT=f"{BUDGET * 1000:.0f}",
    )
    with ExitStack() as stack:
        workers = [
            stack.enter_context(running(program="worker", management=True, environment=environment))
            for _ in range(WORKERS)
        ]
        service = stack.enter_context(api(environment))
        for each in workers:
            each.wait_ready()
        beside = {"seconds": 1.0, "path": str(runs)}
        block = {"seconds": BLOCKED, "path": str(runs)}
        half = range(BYSTANDERS // 2)
        neighbours = [accept(service, "blocking.bystander", beside) for _ in half]
        kinds = ("sleep", "compute", "run", "digest", "thread")
        culprits = [accept(service, f"blocking.{kind}", block) for kind in kinds]
        neighbours += [accept(service, "blocking.bystander", beside) for _ in half]
        blocked = wait_until(lambda: problem_of(service), what="the check that says it")
        ended = [until(service, each, "completed", seconds=120) for each in culprits]
        ended += [until(service, each, "completed", seconds=120) for each in neighbours]
        counted = Counter(runs.read_text().split())

        stuck = accept(service, "blocking.thread", {"seconds": 600, "path": str(runs)})
        wait_until(lambda: stuck in runs.read_text(), what="the job that never ends")
        for each in workers:
            each.signal(signal.SIGTERM)
        codes = [each.exit_code() for each in workers]
        handed_back = until(service, stuck, "waiting")
    warning = "Event loop is blocked; a thread renews the job lease"
    named = {line["job"] for each in workers for line in each.logged(warning)} - {None}

    assert re.search(r"default: the event loop of [123] of 3 workers is blocked", blocked)
    assert counted == Counter([*culprits, *neighbours])
    assert {(each["attempts"], each["crashes"]) for each in ended} == {(1, 0)}
    assert codes == [0] * WORKERS
    assert (handed_back["attempts"], handed_back["crashes"]) == (0, 0)
    assert named
    assert named <= set(culprits[:4])
