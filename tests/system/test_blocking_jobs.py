"""Jobs that block their worker for many leases."""

import re
import signal
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from tests.servers.postgres import Database
from tests.servers.waiting import wait_until
from tests.soak import SOAK
from tests.system.jobs import accept, job, until
from tests.system.service import Service, running
from tests.system.workers import api, environment_of

LEASE = 1.5
BLOCKED = (5 if SOAK else 2) * LEASE
HELD = 2 * LEASE
WORKERS = 3
BYSTANDERS = 40
BESIDE_HELD = 10
BUDGET = 4.0
CRASHES = 2


def problem_of(service: Service) -> str | None:
    """Return the message of the check of the queues while it says that a worker is blocked."""
    message = str(service.get("/health/queues").json()["message"])
    return message if "is blocked" in message else None


def final(service: Service, job_id: str) -> dict[str, Any] | None:
    """Return a job once it has ended."""
    shown = job(service, job_id)
    return shown if shown["state"] in {"completed", "failed"} else None


@pytest.mark.soak
@pytest.mark.timeout(240)
def test_jobs_that_block_run_once_and_so_do_their_neighbours(
    database: Database, tmp_path: Path
) -> None:
    """Leases in Python, in C, in a child, in a thread: no crash, and no second run.

    C code that holds the interpreter may cost its worker the lease: then each further run of a job
    has a crash that explains it. A worker whose thread is busy ends within its budget, with code 0.
    """
    runs = tmp_path / "runs"
    environment = environment_of(
        database,
        TASK_MODULES="tests.system.blocking_tasks",
        JOB_LEASE=f"{LEASE * 1000:.0f}",
        JOB_SWEEP_INTERVAL="300",
        JOB_MAX_CRASHES=str(CRASHES),
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

        held = {"seconds": HELD, "path": str(runs)}
        holder = accept(service, "blocking.hold", held)
        wait_until(lambda: holder in runs.read_text(), what="the code that holds the interpreter")
        short = {"seconds": 0.01, "path": str(runs)}
        beside_it = [accept(service, "blocking.bystander", short) for _ in range(BESIDE_HELD)]
        unharmed = [until(service, each, "completed", seconds=120) for each in beside_it]
        last = wait_until(lambda: final(service, holder), seconds=120, what="its end")
        again = Counter(runs.read_text().split()) - counted

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
    assert last["state"] == ("failed" if last["crashes"] == CRASHES else "completed")
    assert last["error"] is None or last["error"]["code"] == "crashed"
    assert again.keys() == {holder, *beside_it}
    assert all(again[each["id"]] <= 1 + each["crashes"] for each in (last, *unharmed))
    assert {each["attempts"] for each in unharmed} == {1}
    assert codes == [0] * WORKERS
    assert (handed_back["attempts"], handed_back["crashes"]) == (0, 0)
    assert named
    assert named <= {*culprits[:4], holder}
