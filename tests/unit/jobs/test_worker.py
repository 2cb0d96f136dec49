"""When a worker claims jobs, which, and how many run at once."""

import asyncio
from collections.abc import Awaitable, Callable
from itertools import pairwise
from typing import Any

import pytest
from tests.unit.jobs.fleet import Fleet

from viralfx.jobs.memory import MemoryNotifier
from viralfx.jobs.model import JobState
from viralfx.jobs.notifier import JobNotification
from viralfx.jobs.worker.worker import JobWorker, WorkerState
from viralfx.resilience.policy import Backoff, BackoffPolicy


async def listening(fleet: Fleet, **options: Any) -> JobWorker:
    """Return a worker that has started."""
    worker = fleet.start(**options)
    await fleet.until(lambda: fleet.ledger.count("claim"))
    return worker


async def test_an_announced_job_runs_at_once(fleet: Fleet) -> None:
    """Without waiting for a poll."""
    await listening(fleet, poll_interval=10.0)
    job_id = await fleet.submit(payload='"it"')

    assert await fleet.final(job_id) < 0.01
    job = await fleet.job(job_id)
    assert (job.state, job.result, job.attempts) == (JobState.COMPLETED, b'"it"', 0)


async def test_an_unannounced_job_is_found_by_polling(fleet: Fleet) -> None:
    """Within one interval."""
    await listening(fleet, poll_interval=10.0)
    await asyncio.sleep(1.0)  # the first poll comes early, since the notifier may not be connected
    job_id = await fleet.accept()

    assert 1.0 < await fleet.final(job_id) <= 10.0


async def test_a_disconnected_worker_polls_more_often(fleet: Fleet) -> None:
    """Five times a second."""
    fleet.notifier.disconnected = True
    await listening(fleet, poll_interval=10.0)
    job_id = await fleet.submit()

    assert await fleet.final(job_id) <= 0.21


async def test_an_idle_worker_polls_rarely(fleet: Fleet) -> None:
    """About once per interval, for all queues together."""
    fleet.start(queues={"default": 10, "other": 10}, poll_interval=1.0)
    await asyncio.sleep(100.0)

    assert 99 <= fleet.ledger.count("due") <= 112
    assert fleet.ledger.count("claim") == 2
    assert fleet.ledger.count("register") <= 12
    assert fleet.ledger.count("sweep") <= 41


async def test_as_many_jobs_run_as_there_are_slots(fleet: Fleet) -> None:
    """While enough jobs are due."""
    ids = [await fleet.accept("sleep", "1.0") for _ in range(25)]
    fleet.start(queues={"default": 10})

    assert await fleet.final(*ids) == pytest.approx(3.0, abs=0.05)
    assert fleet.max_running == 10


async def test_a_full_queue_does_not_delay_the_others(fleet: Fleet) -> None:
    """Each queue has its own slots."""
    for _ in range(20):
        await fleet.accept("sleep", "1000.0")
    fleet.start(queues={"default": 10, "other": 1})
    await fleet.until(lambda: fleet.running == 10)
    job_id = await fleet.submit(queue="other")

    assert await fleet.final(job_id) < 1.0


async def test_a_backlog_is_processed_without_waiting(fleet: Fleet) -> None:
    """A poll that fills all slots is followed by another."""
    ids = [await fleet.accept() for _ in range(1000)]
    fleet.start(queues={"default": 10}, poll_interval=30.0)

    assert await fleet.final(*ids) < 0.1
    assert fleet.done == [0] * 1000


async def test_jobs_are_claimed_and_settled_in_batches(fleet: Fleet) -> None:
    """A ledger call serves as many jobs as there are slots."""
    ids = [await fleet.accept() for _ in range(1000)]
    fleet.ledger.seconds = {"claim": 0.005, "settle": 0.005}
    fleet.start(queues={"default": 100})
    await fleet.final(*ids)

    assert fleet.ledger.count("claim") <= 25
    assert fleet.ledger.count("settle") <= 25


async def test_the_longest_due_job_runs_first(fleet: Fleet) -> None:
    """Also if later jobs were announced."""
    await listening(fleet, queues={"default": 1}, poll_interval=60.0)
    await fleet.submit("sleep", "5.0")
    await fleet.until(lambda: fleet.running)
    for number in range(5):
        await fleet.submit(payload=str(number))
        await asyncio.sleep(0.01)
    await fleet.until(lambda: len(fleet.done) == 6)

    assert fleet.done == [5.0, 0, 1, 2, 3, 4]


async def test_a_busy_worker_takes_no_notification(fleet: Fleet) -> None:
    """It belongs to a worker with free slots."""
    busy = await listening(fleet, queues={"default": 2}, poll_interval=1000.0)
    for _ in range(2):
        await fleet.submit("sleep", "500.0")
    await fleet.until(lambda: busy.active == 2)
    # It finds by polling the job whose notification it took before it was busy.
    for _ in range(2):
        await fleet.submit()
    fleet.start("idle", queues={"default": 2}, poll_interval=2000.0)
    await fleet.until(lambda: len(fleet.done) == 2)
    ids = [await fleet.submit() for _ in range(10)]

    assert await fleet.final(*ids) < 0.1


class _OneByOne(MemoryNotifier):
    """Delivers its notifications one by one."""

    on_notification: Callable[[JobNotification], Awaitable[None]]

    async def listen(
        self, _: str, on_notification: Callable[[JobNotification], Awaitable[None]], __: int
    ) -> None:
        self.on_notification = on_notification
        await asyncio.Event().wait()

    def is_connected(self, _: str) -> bool:
        return True

    def deliver(self, *ids: str) -> asyncio.Future[None]:
        """Deliver a notification; return the running call."""
        return asyncio.ensure_future(
            self.on_notification(JobNotification(queue="default", ids=ids))
        )


async def test_a_notification_is_held_until_the_next_claim_and_a_free_slot(
    fleet: Fleet,
) -> None:
    """Until then the worker takes no other one."""
    fleet.notifier = notifier = _OneByOne()  # type: ignore[assignment]
    fleet.ledger.seconds = {"claim": 1.0}
    await listening(fleet, queues={"default": 2}, poll_interval=1000.0)
    await asyncio.sleep(2.0)
    first = notifier.deliver(await fleet.accept("sleep", "10.0"))
    await asyncio.sleep(0.5)
    assert not first.done()
    await asyncio.sleep(1.0)
    assert first.done()

    second = notifier.deliver(await fleet.accept("sleep", "10.0"))
    await asyncio.sleep(5.0)
    assert fleet.running == 2
    assert not second.done()

    await fleet.until(lambda: fleet.running < 2)
    await asyncio.sleep(0.01)
    assert second.done()


async def test_a_worker_at_full_load_takes_no_notification(fleet: Fleet) -> None:
    """Its polls find the jobs; each read of a notification would cost it time."""
    fleet.notifier = notifier = _OneByOne()  # type: ignore[assignment]
    for _ in range(6):
        await fleet.accept("sleep", "10.0")
    await listening(fleet, queues={"default": 2}, poll_interval=1000.0)
    await fleet.until(lambda: fleet.running == 2)
    stale = notifier.deliver("none")
    await fleet.until(lambda: len(fleet.done) == 4)
    await asyncio.sleep(1.0)
    assert fleet.running == 2
    assert not stale.done()

    await fleet.until(lambda: len(fleet.done) == 6)
    await asyncio.sleep(0.01)
    assert stale.done()


async def test_surplus_ids_of_a_notification_go_to_other_workers(fleet: Fleet) -> None:
    """Workers with free slots share them."""
    for name in ("a", "b", "c", "d"):
        fleet.start(name, queues={"default": 5}, poll_interval=1000.0)
    await fleet.until(lambda: fleet.ledger.count("claim") == 4)
    ids = [await fleet.accept("sleep", "10.0") for _ in range(20)]
    await fleet.notifier.notify(JobNotification(queue="default", ids=ids))

    assert await fleet.final(*ids) == pytest.approx(10.0, abs=0.1)


async def test_surplus_ids_are_announced_only_while_jobs_wait(fleet: Fleet) -> None:
    """A worker that finds no more jobs than slots sends none; one without a free slot at once."""
    await listening(fleet, queues={"default": 5}, poll_interval=1000.0)
    stale = tuple(f"stale {number}" for number in range(300))
    few = [await fleet.accept() for _ in range(4)]
    fleet.notifier.sent.clear()
    await fleet.notifier.notify(JobNotification(queue="default", ids=(*stale, *few)))
    await fleet.final(*few)
    await asyncio.sleep(1.0)
    assert [len(each.ids) for each in fleet.notifier.sent] == [304]

    many = [await fleet.accept("sleep", "10.0") for _ in range(7)]
    await fleet.notifier.notify(JobNotification(queue="default", ids=many))
    await fleet.until(lambda: fleet.running == 5)
    await asyncio.sleep(1.0)
    surplus = [each.ids for each in fleet.notifier.sent[2:]]
    assert [list(ids) for ids in surplus] == [many[5:]]
    await fleet.final(*many)


async def test_surplus_ids_of_a_failed_claim_go_to_other_workers(fleet: Fleet) -> None:
    """They may reach the ledger."""
    await listening(fleet, queues={"default": 1}, poll_interval=1000.0)
    ids = [await fleet.accept() for _ in range(3)]
    fleet.notifier.sent.clear()
    fleet.ledger.unavailable = frozenset({"claim"})
    await fleet.notifier.notify(JobNotification(queue="default", ids=ids))
    await fleet.until(lambda: len(fleet.notifier.sent) > 1)
    fleet.ledger.unavailable = frozenset()

    assert list(fleet.notifier.sent[1].ids) == ids[1:]
    await fleet.final(*ids)


async def test_a_stale_notification_costs_one_claim(fleet: Fleet) -> None:
    """Notifications may be lost, repeated, late and wrong."""
    await listening(fleet, poll_interval=1000.0)
    job_id = await fleet.submit()
    await fleet.final(job_id)
    await fleet.notifier.notify(JobNotification(queue="default", ids=(job_id, "none", job_id)))
    await fleet.notifier.notify(JobNotification(queue="default", ids=()))
    other = await fleet.submit()
    await fleet.final(other)

    assert fleet.done == [0, 0]


async def test_a_retry_runs_when_it_is_due(fleet: Fleet) -> None:
    """Without waiting for a poll."""
    times: list[float] = []

    async def fail(_: object) -> None:
        times.append(fleet.clock.monotonic())
        raise RuntimeError("once more")

    policy = BackoffPolicy(attempts=4, backoff=Backoff(base=3.0))
    fleet.declare("fail", fail, retry=policy)
    await listening(fleet, poll_interval=1000.0)
    job_id = await fleet.submit("fail")
    await fleet.final(job_id)

    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert gaps == pytest.approx([3.0, 6.0, 12.0], abs=0.02)


async def test_a_worker_without_a_valid_lease_claims_nothing(fleet: Fleet) -> None:
    """Before its registration, and after its lease has expired."""
    fleet.ledger.unavailable = frozenset({"register"})
    job_id = await fleet.accept()
    fleet.start(lease=10.0)
    await asyncio.sleep(30.0)
    assert fleet.ledger.count("claim") == 0

    fleet.ledger.unavailable = frozenset()
    assert await fleet.final(job_id) < 3.0

    fleet.ledger.unavailable = frozenset({"register"})
    await asyncio.sleep(10.1)
    polls = fleet.ledger.count("claim")
    await asyncio.sleep(30.0)
    assert fleet.ledger.count("claim") <= polls + 1


async def test_a_job_whose_claim_response_was_lost_runs_again(fleet: Fleet) -> None:
    """The heartbeat lists the jobs that the worker has."""
    job_id = await fleet.accept()
    fleet.ledger.failing_after = frozenset({"claim"})
    fleet.start(lease=30.0)
    await fleet.until(lambda: fleet.ledger.count("claim") > 1)
    fleet.ledger.failing_after = frozenset()

    assert await fleet.final(job_id, within=60.0) <= 45.0
    job = await fleet.job(job_id)
    assert (job.claims, job.attempts, job.crashes) == (2, 0, 0)


async def test_jobs_of_a_dead_worker_run_on_another(fleet: Fleet) -> None:
    """Within its lease and one sweep."""
    died = fleet.worker("dead", lease=10.0)
    job_id = await fleet.accept()
    await fleet.ledger.register("dead", ["default"], 10.0)
    await fleet.ledger.claim("default", died.name, 1)
    fleet.start("alive", lease=10.0, sweep_interval=5.0, poll_interval=1000.0)

    assert await fleet.final(job_id) <= 15.1
    job = await fleet.job(job_id)
    assert (job.state, job.crashes, job.attempts) == (JobState.COMPLETED, 1, 0)


async def test_a_second_start_does_nothing(fleet: Fleet) -> None:
    """The state only advances."""
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
        {"poll_interval": 0.0},
        {"default_timeout": float("inf")},
        {"max_crashes": 0},
    ],
)
async def test_numbers_out_of_range_are_refused(fleet: Fleet, option: dict[str, Any]) -> None:
    """When the config is made."""
    with pytest.raises(ValueError, match="must be"):
        fleet.worker(**option)


async def test_a_worker_polls_if_its_notifier_ends(fleet: Fleet) -> None:
    """Its jobs still run."""

    class Silent(MemoryNotifier):
        async def listen(self, *_: object) -> None:
            return

        def is_connected(self, _: str) -> bool:
            return False

    fleet.notifier = Silent()  # type: ignore[assignment]
    fleet.start()
    job_id = await fleet.accept()

    assert await fleet.final(job_id) < 0.5


async def test_a_notifier_that_raises_is_reported(fleet: Fleet) -> None:
    """As an uncaught exception, since the port promises not to raise."""

    class Broken(MemoryNotifier):
        async def listen(self, *_: object) -> None:
            raise ZeroDivisionError("a bug")

    reported: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
    fleet.notifier = Broken()  # type: ignore[assignment]
    fleet.start()
    job_id = await fleet.accept()
    await fleet.final(job_id)

    assert [str(context["exception"]) for context in reported] == ["a bug"]


async def test_a_worker_without_a_lease_takes_no_notification(fleet: Fleet) -> None:
    """One that starts leaves the jobs to the others until it can claim."""
    fleet.start("ready")
    await asyncio.sleep(1.0)
    fleet.ledger.seconds["register"] = 4.0
    fleet.start("starting")
    await asyncio.sleep(1.0)

    waited = [await fleet.final(await fleet.submit()) for _ in range(10)]

    assert max(waited) < 0.1
