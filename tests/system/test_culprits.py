"""Jobs that go wrong in each known way, beside bystanders in other queues: 200 in a soak run.

Each case runs three workers, an API, Postgres and Redis. The bystanders complete, and each runs
once. One exception is documented: a bystander that was running when its worker died, or lost its
lease to code that holds the interpreter, runs again, and its ``crashes`` say so.

``just bench-bystanders`` compares the times of the bystanders with those without culprits.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from tests.servers.postgres import Database, PostgresServer
from tests.servers.redis import RedisServer
from tests.servers.waiting import wait_until
from tests.soak import SOAK, only_in_soak
from tests.system.bystanders import Crew, Crowd, crew, replacing
from tests.system.control_group import control_group
from tests.system.culprits import CODE, CONTENT, CULPRITS, NEWER, OLDER, Culprit, refusing
from tests.system.jobs import job
from tests.system.workers import environment_of

pytestmark = pytest.mark.timeout(400)

LEASE = 3.0
SHARED_LEASE = LEASE if SOAK else 8.0
"""Longer than a busy machine delays a renewal: a lost lease would be a crash of a bystander."""

Place: TypeAlias = tuple[Database, dict[str, str]]


@contextmanager
def _place(
    postgres: PostgresServer, redis: RedisServer, number: int, lease: float
) -> Iterator[Place]:
    """Make a database; ``number`` is that of the Redis database."""
    database = Database(postgres, postgres.create_database())
    environment = environment_of(
        database,
        TASK_MODULES=f"{CULPRITS},{OLDER}",
        REDIS_HOST=redis.host,
        REDIS_PORT=str(redis.port),
        REDIS_DB=str(number),
        JOB_LEASE=f"{lease * 1000:.0f}",
        JOB_MAX_ATTEMPTS="1",
        JOB_MAX_CRASHES="3",
        HEALTH_CHECK_INTERVAL="500" if SOAK else "2000",
        SHUTDOWN_DRAIN_TIMEOUT="2000",
    )
    yield database, environment
    postgres.drop_database(database.name)


@pytest.fixture
def own(postgres: PostgresServer, shared_redis: RedisServer) -> Iterator[Place]:
    """Return a database and the variables of processes that a test does not share."""
    with _place(postgres, shared_redis, 2, LEASE) as place:
        yield place


@pytest.fixture(scope="module")
def shared(
    postgres: PostgresServer, shared_redis: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Crew]:
    """Return workers that survive each culprit of the tests that share them."""
    folder = tmp_path_factory.mktemp("culprits")
    with (
        _place(postgres, shared_redis, 1, SHARED_LEASE) as place,
        crew(*place, folder, service_modules=f"{CULPRITS},{NEWER}") as workers,
    ):
        yield workers
        codes = workers.stop()
    assert codes == [0, 0, 0], "SIGTERM ends each worker in order"


def _unharmed(crowd: Crowd) -> bool:
    """Return True if each bystander completed, and ran once."""
    states = {(one["state"], one["attempts"], one["crashes"]) for one in crowd.shown}
    return states == {("completed", 1, 0)} and set(crowd.runs) == {1}


def _end(shown: dict[str, Any]) -> tuple[str, str | None]:
    return shown["state"], shown["error"] and shown["error"]["code"]


def _cases(*groups: list[Culprit]) -> list[Any]:
    """Return the culprits of a group at once, and for a soak run each alone as well."""
    cases = [pytest.param(group, id=f"{len(group)} at once") for group in groups]
    if SOAK:
        alone = {str(one): one for group in groups for one in group}
        cases += [pytest.param([one], id=name) for name, one in alone.items()]
    return cases


@pytest.mark.soak
@pytest.mark.parametrize("culprits", _cases(CONTENT, CODE))
def test_a_culprit_ends_alone(shared: Crew, culprits: list[Culprit]) -> None:
    """It ends with the documented state and code; its bystanders do not notice."""
    ids = [shared.submit(one.task, one.payload) for one in culprits]
    crowd = shared.stand_by()
    ends = {str(one): _end(shared.final(each)) for each, one in zip(ids, culprits, strict=True)}

    assert ends == {str(one): (one.state, one.code) for one in culprits}
    assert _unharmed(crowd)
    assert [worker.process.poll() for worker in shared.workers] == [None] * 3


@only_in_soak
@pytest.mark.parametrize("how", ["sleep", "python", "hashlib"])
def test_blocking_code_runs_once(shared: Crew, how: str) -> None:
    """Code that blocks a loop or a thread for ten leases keeps its job; no bystander notices."""
    seconds = 10 * SHARED_LEASE
    ids = [
        shared.submit("culprits.block", {"how": how, "seconds": seconds}),
        *(
            shared.submit("culprits.block_thread", {"how": each, "seconds": seconds})
            for each in ("sleep", "python", "hashlib")
        ),
    ]
    shared.begun(ids[:1])
    said = shared.says("is blocked")
    crowd = shared.stand_by()
    shown = [shared.final(each) for each in ids]

    assert said.startswith("warn")
    assert [_end(each) for each in shown] == [("completed", None)] * 4
    assert [(each["attempts"], each["crashes"]) for each in shown] == [(1, 0)] * 4
    assert [shared.noted(each) for each in ids] == [1] * 4
    assert _unharmed(crowd)


@only_in_soak
def test_code_that_holds_the_interpreter(shared: Crew) -> None:
    """Its worker may lose the lease, as documented; jobs that this costs a run count a crash."""
    culprit = shared.submit("culprits.block", {"how": "interpreter", "seconds": 2.5 * SHARED_LEASE})
    shared.begun([culprit])
    crowd = shared.stand_by()
    shown = shared.final(culprit)

    assert shared.noted(culprit) <= 1 + shown["crashes"]
    assert _end(shown) in {("completed", None), ("failed", "crashed")}
    assert _wronged(crowd) == []


def test_versions_wait_for_a_worker_that_can_run_them(shared: Crew) -> None:
    """A new task and a changed payload fail at no older worker; ``queues`` names both tasks."""
    ids = [
        shared.submit("versions.new", 1),
        shared.submit("versions.changed", {"amount": "1.00"}),
    ]
    crowd = shared.stand_by()
    said = [
        shared.says("of task versions.new waits and no worker knows it"),
        shared.says("of task versions.changed waits and no worker can decode its payload"),
    ]
    waiting = [job(shared.service, each)["state"] for each in ids]
    newer = shared.start_worker(TASK_MODULES=f"{CULPRITS},{NEWER}").wait_ready()
    shown = [shared.final(each) for each in ids]
    wait_until(shared.is_well, what=lambda: f"well again: {shared.health()}")
    newer.signal(signal.SIGTERM)

    assert newer.exit_code() == 0
    assert all(each.startswith("warn") for each in said)
    assert waiting == ["waiting"] * 2
    assert [(each["state"], each["attempts"]) for each in shown] == [("completed", 1)] * 2
    assert [shared.noted(each) for each in ids] == [1, 1]
    assert _unharmed(crowd)


def test_a_trigger_refuses_one_job(shared: Crew) -> None:
    """The job fails if a failure can be stored; otherwise ``queues`` warns until it can."""
    database = shared.database
    with refusing(database, "refused", "completed"), refusing(database, "unrecordable"):
        refused = shared.submit("culprits.refused", None)
        stays = shared.submit("culprits.unrecordable", None)
        crowd = shared.stand_by()
        failed = shared.final(refused)
        said = shared.says("not recorded")
        held = job(shared.service, stays)["state"]
        runs = shared.noted(stays)
    recorded = shared.final(stays)
    wait_until(shared.is_well, what=lambda: f"well again: {shared.health()}")

    assert _end(failed) == ("failed", "result")
    assert said.startswith("warn")
    assert (held, runs) == ("active", 1)
    assert recorded["state"] in {"completed", "failed"}
    assert shared.noted(stays) == 1
    assert _unharmed(crowd)


def test_a_culprit_that_ends_its_process(own: Place, tmp_path: Path) -> None:
    """It fails as ``crashed``; bystanders complete, and run again only if their worker died."""
    with crew(*own, tmp_path) as workers, replacing(workers) as end:
        ids = [workers.submit("culprits.end", "exit")]
        crowd = workers.stand_by()
        shown = [workers.final(ids[0])]
        # Not beside the other one, which would end the same worker first.
        ids.append(workers.submit("culprits.end", "kill"))
        shown.append(workers.final(ids[1]))
        end()
        codes = workers.stop()

    assert [_end(each) for each in shown] == [("failed", "crashed")] * 2
    assert [each["crashes"] for each in shown] == [3, 3]
    assert _wronged(crowd) == []
    assert set(workers.exits) == {0, -signal.SIGKILL}
    assert codes == [0, 0, 0]


@only_in_soak
def test_a_culprit_that_takes_all_memory(own: Place, tmp_path: Path) -> None:
    """The kernel ends its worker; it fails as ``crashed``, and bystanders complete."""
    with (
        control_group() as group,
        crew(*own, tmp_path, group=group) as workers,
        replacing(workers) as end,
    ):
        group.limit(1024)
        culprit = workers.submit("culprits.devour", None)
        crowd = workers.stand_by()
        shown = workers.final(culprit)
        end()
        codes = workers.stop()

    assert _end(shown) == ("failed", "crashed")
    assert _wronged(crowd) == []
    assert codes == [0, 0, 0]


def _wronged(crowd: Crowd) -> list[tuple[dict[str, Any], int]]:
    """Return each bystander that did not complete, or ran more than once more for each crash."""
    return [
        (one, runs)
        for one, runs in zip(crowd.shown, crowd.runs, strict=True)
        if one["state"] != "completed"
        or one["attempts"] != 1
        or not 1 <= runs <= 1 + one["crashes"]
    ]


def test_a_stop_while_a_thread_blocks(own: Place, tmp_path: Path) -> None:
    """The worker ends with 0 before the thread; another one runs the job again, unspent."""
    with crew(*own, tmp_path) as workers:
        job_id = workers.submit("culprits.block_thread", {"how": "sleep", "seconds": 600})
        workers.begun([job_id])
        shown = wait_until(lambda: _active(workers, job_id), what="active")
        assert shown is not None
        (holder,) = (w for w in workers.workers if f"-{w.process.pid}-" in shown["worker"])
        holder.signal(signal.SIGTERM)
        code = holder.exit_code()
        wait_until(lambda: workers.noted(job_id) == 2, what="it runs again")
        again = job(workers.service, job_id)
        for each in workers.workers:
            each.signal(signal.SIGTERM)
        codes = [each.exit_code() for each in workers.workers]

    assert (code, codes) == (0, [0, 0, 0])
    assert (again["attempts"], again["crashes"]) == (1, 0)


def _active(crew: Crew, job_id: str) -> dict[str, Any] | None:
    shown = job(crew.service, job_id)
    return shown if shown["state"] == "active" else None


def test_a_stop_while_an_outcome_is_refused(own: Place, tmp_path: Path) -> None:
    """All workers end with 0; the job is recorded by the next worker that may record it."""
    with crew(*own, tmp_path) as workers:
        with refusing(workers.database, "unrecordable"):
            job_id = workers.submit("culprits.unrecordable", None)
            workers.begun([job_id])
            workers.says("not recorded")
            codes = workers.stop()
        workers.workers = [workers.start_worker().wait_ready()]
        shown = workers.final(job_id)
        last = workers.stop()

    assert (codes, last) == ([0, 0, 0], [0])
    assert _end(shown) == ("completed", None)
