"""When a worker claims jobs, which, and how many it runs at once."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from itertools import pairwise
from typing import Any

import pytest
from tests.unit.jobs.fleet import Fleet

from viralfx.adapters.memory import MemoryBell
from viralfx.domain.jobs.job import JobState, handed_back
from viralfx.domain.jobs.transport import Bell
from viralfx.domain.jobs.worker import JobWorker, WorkerState
from viralfx.domain.resilience.backoff import Backoff
from viralfx.domain.resilience.retry_policy import BackoffPolicy


async def listening(fleet: Fleet, **options: Any) -> JobWorker:
    """Return a worker that has begun."""
    worker = fleet.start(**options)
    await fleet.until(lambda: fleet.ledger.count("claim"))
    return worker


async def test_a_job_is_run_at_once_when_the_bell_is_rung(fleet: Fleet) -> None:
    """No look into the ledger is waited for."""
    await listening(fleet, look_interval=10.0)
    job_id = await fleet.submit(payload='"it"')

    assert await fleet.final(job_id) < 0.01
    job = await fleet.job(job_id)
    assert (job.state, job.result, job.attempts) == (JobState.COMPLETED, b'"it"', 0)


async def test_a_job_that_no_bell_told_of_is_found_by_looking(fleet: Fleet) -> None:
    """Within one interval."""
    await listening(fleet, look_interval=10.0)
    job_id = await fleet.accept()

    assert 1.0 < await fleet.final(job_id) <= 10.0


async def test_a_worker_that_hears_no_bell_looks_more_often(fleet: Fleet) -> None:
    """Five times a second."""
    fleet.bell.deaf = True
    await listening(fleet, look_interval=10.0)
    job_id = await fleet.submit()

    assert await fleet.final(job_id) <= 0.21


async def test_looks_of_an_idle_worker_are_few(fleet: Fleet) -> None:
    """About one in an interval for each queue, and one line of bookkeeping beside."""
    fleet.start(queues={"default": 10, "other": 10}, look_interval=1.0)
    await asyncio.sleep(100.0)

    assert 190 <= fleet.ledger.count("claim") <= 2 * 112
    assert fleet.ledger.count("register") <= 12
    assert fleet.ledger.count("sweep") <= 41


async def test_no_more_run_at_once_than_there_are_slots(fleet: Fleet) -> None:
    """And no less, while there is enough."""
    ids = [await fleet.accept("sleep", "1.0") for _ in range(25)]
    fleet.start(queues={"default": 10})

    assert await fleet.final(*ids) == pytest.approx(3.0, abs=0.05)
    assert fleet.most_running == 10


async def test_a_full_queue_holds_up_no_other(fleet: Fleet) -> None:
    """Each queue has slots of its own."""
    for _ in range(20):
        await fleet.accept("sleep", "1000.0")
    fleet.start(queues={"default": 10, "other": 1})
    await fleet.until(lambda: fleet.running == 10)
    job_id = await fleet.submit(queue="other")

    assert await fleet.final(job_id) < 1.0


async def test_a_backlog_is_worked_off_without_waiting_for_looks(fleet: Fleet) -> None:
    """While a look finds as much as it can take, the next one comes at once."""
    ids = [await fleet.accept() for _ in range(1000)]
    fleet.start(queues={"default": 10}, look_interval=30.0)

    assert await fleet.final(*ids) < 0.1
    assert fleet.done == [0] * 1000


async def test_jobs_are_claimed_and_settled_many_at_a_time(fleet: Fleet) -> None:
    """A step of the ledger serves as many jobs as there are slots."""
    ids = [await fleet.accept() for _ in range(1000)]
    fleet.ledger.seconds = {"claim": 0.005, "settle": 0.005}
    fleet.start(queues={"default": 100})
    await fleet.final(*ids)

    assert fleet.ledger.count("claim") <= 25
    assert fleet.ledger.count("settle") <= 25


async def test_the_longest_due_is_run_first(fleet: Fleet) -> None:
    """Also where bells told of later ones."""
    await listening(fleet, queues={"default": 1}, look_interval=60.0)
    await fleet.submit("sleep", "5.0")
    await fleet.until(lambda: fleet.running)
    for number in range(5):
        await fleet.submit(payload=str(number))
        await asyncio.sleep(0.01)
    await fleet.until(lambda: len(fleet.done) == 6)

    assert fleet.done == [5.0, 0, 1, 2, 3, 4]


async def test_bells_are_not_taken_by_a_worker_without_time(fleet: Fleet) -> None:
    """They belong to one that has it."""
    busy = await listening(fleet, queues={"default": 2}, look_interval=1000.0)
    for _ in range(2):
        await fleet.submit("sleep", "500.0")
    await fleet.until(lambda: busy.active == 2)
    # What it had taken before it knew is found by looking.
    for _ in range(2):
        await fleet.submit()
    fleet.start("idle", queues={"default": 2}, look_interval=2000.0)
    await fleet.until(lambda: len(fleet.done) == 2)
    ids = [await fleet.submit() for _ in range(10)]

    assert await fleet.final(*ids) < 0.1


class _Handed(MemoryBell):
    """Hands its bells over one by one."""

    hear: Callable[[Bell], Awaitable[None]]

    async def listen(self, _: str, hear: Callable[[Bell], Awaitable[None]], __: int) -> None:
        self.hear = hear
        await asyncio.Event().wait()

    def hears(self, _: str) -> bool:
        return True

    def begin(self, *ids: str) -> asyncio.Future[None]:
        """Let a bell be heard; return the call."""
        return asyncio.ensure_future(self.hear(Bell(queue="default", ids=ids)))


async def test_a_bell_is_heard_until_its_jobs_are_claimed_and_there_is_time(
    fleet: Fleet,
) -> None:
    """So long it keeps the worker from taking another."""
    fleet.bell = bell = _Handed()  # type: ignore[assignment]
    fleet.ledger.seconds = {"claim": 1.0}
    await listening(fleet, queues={"default": 2}, look_interval=1000.0)
    await asyncio.sleep(2.0)
    first = bell.begin(await fleet.accept("sleep", "10.0"))
    await asyncio.sleep(0.5)
    assert not first.done()
    await asyncio.sleep(1.0)
    assert first.done()

    second = bell.begin(await fleet.accept("sleep", "10.0"))
    await asyncio.sleep(5.0)
    assert fleet.running == 2
    assert not second.done()

    await fleet.until(lambda: fleet.running < 2)
    await asyncio.sleep(0.01)
    assert second.done()


async def test_what_one_worker_cannot_take_is_told_to_others(fleet: Fleet) -> None:
    """A bell of many jobs is shared by those who have slots."""
    for name in ("a", "b", "c", "d"):
        fleet.start(name, queues={"default": 5}, look_interval=1000.0)
    await fleet.until(lambda: fleet.ledger.count("claim") == 4)
    ids = [await fleet.accept("sleep", "10.0") for _ in range(20)]
    await fleet.bell.ring(Bell(queue="default", ids=ids))

    assert await fleet.final(*ids) == pytest.approx(10.0, abs=0.1)


async def test_bells_for_jobs_that_others_have_cost_nothing_but_a_claim(fleet: Fleet) -> None:
    """Bells may be lost, repeated, late and wrong."""
    await listening(fleet, look_interval=1000.0)
    job_id = await fleet.submit()
    await fleet.final(job_id)
    await fleet.bell.ring(Bell(queue="default", ids=(job_id, "none", job_id)))
    await fleet.bell.ring(Bell(queue="default", ids=()))
    other = await fleet.submit()
    await fleet.final(other)

    assert fleet.done == [0, 0]


async def test_a_retry_is_run_just_when_it_is_due(fleet: Fleet) -> None:
    """No look is waited for: the worker knows."""
    times: list[float] = []

    async def fail(_: object) -> None:
        times.append(fleet.clock.monotonic())
        raise RuntimeError("once more")

    policy = BackoffPolicy(attempts=4, backoff=Backoff(base=3.0))
    fleet.declare("fail", fail, retry=policy)
    await listening(fleet, look_interval=1000.0)
    job_id = await fleet.submit("fail")
    await fleet.final(job_id)

    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert gaps == pytest.approx([3.0, 6.0, 12.0], abs=0.02)


async def test_a_scheduled_job_waits_for_its_time(fleet: Fleet) -> None:
    """And is found within an interval after it."""
    await listening(fleet, look_interval=1.0)
    run_at = fleet.clock.now() + timedelta(seconds=20)
    job_id = await fleet.submit(run_at=run_at)
    await fleet.final(job_id)
    finished_at = (await fleet.job(job_id)).finished_at

    assert finished_at is not None
    assert 0.0 <= (finished_at - run_at).total_seconds() <= 1.01


async def test_a_worker_without_bookkeeping_claims_nothing(fleet: Fleet) -> None:
    """Until the ledger knows it, and not once its lease may be over."""
    fleet.ledger.away = frozenset({"register"})
    job_id = await fleet.accept()
    fleet.start(lease=10.0)
    await asyncio.sleep(30.0)
    assert fleet.ledger.count("claim") == 0

    fleet.ledger.away = frozenset()
    assert await fleet.final(job_id) < 3.0

    fleet.ledger.away = frozenset({"register"})
    await asyncio.sleep(10.1)
    looks = fleet.ledger.count("claim")
    await asyncio.sleep(30.0)
    assert fleet.ledger.count("claim") <= looks + 1


async def test_a_claim_whose_answer_is_lost_does_not_hold_its_job_for_ever(fleet: Fleet) -> None:
    """The worker says what it has, and the ledger gives the rest to others at no cost."""
    job_id = await fleet.accept()
    fleet.ledger.away_after = frozenset({"claim"})
    fleet.start(lease=30.0)
    await fleet.until(lambda: fleet.ledger.count("claim") > 1)
    fleet.ledger.away_after = frozenset()

    assert await fleet.final(job_id, within=60.0) <= 45.0
    job = await fleet.job(job_id)
    assert (job.claims, job.attempts, job.crashes) == (2, 0, 0)


async def test_jobs_of_a_worker_that_died_are_run_by_another(fleet: Fleet) -> None:
    """Within its lease and a sweep, with no message and no look of chance."""
    died = fleet.worker("dead", lease=10.0)
    job_id = await fleet.accept()
    await fleet.ledger.register("dead", ["default"], 10.0)
    await fleet.ledger.claim("default", died.name, 1)
    fleet.start("alive", lease=10.0, sweep_interval=5.0, look_interval=1000.0)

    assert await fleet.final(job_id) <= 15.1
    job = await fleet.job(job_id)
    assert (job.state, job.crashes, job.attempts) == (JobState.COMPLETED, 1, 0)


async def test_a_job_handed_back_by_another_worker_is_heard_of(fleet: Fleet) -> None:
    """Its bell is like any other."""
    job_id = await fleet.accept()
    await fleet.ledger.register("leaving", ["default"], 10.0)
    (claim,) = await fleet.ledger.claim("default", "leaving", 1)
    await listening(fleet, look_interval=1000.0)
    await fleet.ledger.settle([handed_back(claim)])
    await fleet.bell.ring(Bell(queue="default", ids=(job_id,)))

    assert await fleet.final(job_id) < 0.1


async def test_starting_twice_is_starting_once(fleet: Fleet) -> None:
    """And its state goes forward only."""
    worker = fleet.worker()
    states = [worker.state]
    worker.start()
    worker.start()
    await fleet.until(lambda: fleet.ledger.count("claim"))
    states.append(worker.state)
    draining = asyncio.create_task(worker.drain(10.0))
    await asyncio.sleep(0)
    states.append(worker.state)
    await draining
    states.append(worker.state)
    worker.start()

    assert states == [
        WorkerState.NEW,
        WorkerState.RUNNING,
        WorkerState.DRAINING,
        WorkerState.STOPPED,
    ]
    assert fleet.ledger.count("register") == 1


@pytest.mark.parametrize(
    "option",
    [
        {"queues": {"default": 0}},
        {"lease": 0.0},
        {"sweep_interval": -1.0},
        {"look_interval": 0.0},
        {"default_timeout": float("inf")},
        {"max_crashes": 0},
    ],
)
async def test_numbers_that_cannot_be_meant_are_refused(
    fleet: Fleet, option: dict[str, Any]
) -> None:
    """Where the worker is made."""
    with pytest.raises(ValueError, match="must be"):
        fleet.worker(**option)


async def test_a_transport_that_ends_leaves_the_worker_working(fleet: Fleet) -> None:
    """It looks by itself."""

    class Silent(MemoryBell):
        async def listen(self, *_: object) -> None:
            return

        def hears(self, _: str) -> bool:
            return False

    fleet.bell = Silent()  # type: ignore[assignment]
    fleet.start()
    job_id = await fleet.accept()

    assert await fleet.final(job_id) < 0.5


async def test_a_transport_that_breaks_is_told_of(fleet: Fleet) -> None:
    """As an uncaught exception: a port that promises not to raise has a bug."""

    class Broken(MemoryBell):
        async def listen(self, *_: object) -> None:
            raise ZeroDivisionError("a bug")

    told: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    fleet.bell = Broken()  # type: ignore[assignment]
    fleet.start()
    job_id = await fleet.accept()
    await fleet.final(job_id)

    assert [str(context["exception"]) for context in told] == ["a bug"]
