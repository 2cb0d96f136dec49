"""Workers whose notifier reaches all of them, as LISTEN and NOTIFY do."""

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable

import pytest
from tests.unit.jobs.fleet import FaultyNotifier, Fleet

from viralfx.jobs.notifier import JobNotification
from viralfx.jobs.worker.worker import JobWorker

WORKERS = 100


class Broadcasts(FaultyNotifier):
    """Calls every listener of a queue."""

    broadcasts = True

    def __init__(self) -> None:
        super().__init__()
        self._all: defaultdict[str, list[Callable[[JobNotification], Awaitable[None]]]]
        self._all = defaultdict(list)

    async def notify(self, notification: JobNotification) -> None:
        """Call all of them."""
        self.sent.append(notification)
        if not self.disconnected:
            for on_notification in self._all[notification.queue]:
                await on_notification(notification)

    async def listen(
        self,
        queue: str,
        on_notification: Callable[[JobNotification], Awaitable[None]],
        slots: int,
    ) -> None:
        """Listen until cancelled."""
        self._all[queue].append(on_notification)
        try:
            await super().listen(queue, on_notification, slots)
        finally:
            self._all[queue].remove(on_notification)


@pytest.fixture
def fleet(fleet: Fleet) -> Fleet:
    """Return a fleet with such a notifier."""
    fleet.notifier = Broadcasts()
    return fleet


async def _started(fleet: Fleet, count: int, slots: int = 10) -> list[JobWorker]:
    """Start workers, and wait until each knows of the others and has polled."""
    workers = [
        fleet.start(f"w{number:03}", queues={"default": slots}, poll_interval=600.0)
        for number in range(count)
    ]
    await asyncio.sleep(30.0)
    return workers


async def test_a_single_worker_claims_at_once(fleet: Fleet) -> None:
    """With one claim, by the id of the job."""
    await _started(fleet, 1)
    fleet.ledger.calls.clear()
    job_id = await fleet.submit()

    assert await fleet.final(job_id) < 0.001
    claims = [about for name, about in fleet.ledger.calls if name == "claim"]
    assert claims == [("default", "w000", 10, [job_id])]


async def test_idle_workers_do_not_claim_at_once(fleet: Fleet) -> None:
    """The first comes after milliseconds, and the others one by one, with one claim each."""
    await _started(fleet, WORKERS)
    waits = []
    for _ in range(20):
        fleet.ledger.calls.clear()
        waits.append(await fleet.final(await fleet.submit()))
        done = fleet.ledger.count("claim")
        await asyncio.sleep(2.0)
        assert done < WORKERS / 4
        assert fleet.ledger.count("claim") == WORKERS

    assert sorted(waits)[10] < 0.015
    assert max(waits) < 0.05


async def test_many_jobs_are_shared(fleet: Fleet) -> None:
    """The notification has more ids than a worker has slots; nothing waits for a poll."""
    await _started(fleet, 10, slots=2)
    ids = [await fleet.accept("sleep", "0.2") for _ in range(60)]
    await fleet.notifier.notify(JobNotification("default", ids))

    assert await fleet.final(*ids, within=5.0) < 1.0
    assert fleet.max_running == 20


async def test_a_busy_worker_claims_when_a_slot_is_free(fleet: Fleet) -> None:
    """The notification came while all its slots were taken."""
    await _started(fleet, 1, slots=1)
    first = await fleet.submit("sleep", "5.0")
    await fleet.until(lambda: fleet.running == 1)
    second = await fleet.submit()

    await fleet.final(first)
    assert await fleet.final(second) < 5.01


async def test_notifications_during_the_pause_share_a_claim(fleet: Fleet) -> None:
    """A burst costs each worker one or two claims."""
    await _started(fleet, 50)
    fleet.ledger.calls.clear()
    ids = [await fleet.submit() for _ in range(200)]
    await fleet.final(*ids, within=5.0)
    await asyncio.sleep(2.0)

    assert fleet.ledger.count("claim") < 200


async def test_a_notification_without_ids_leads_to_a_poll(fleet: Fleet) -> None:
    """It stands for notifications that were lost."""
    await _started(fleet, 1)
    job_id = await fleet.accept()
    await fleet.notifier.notify(JobNotification("default", ()))

    assert await fleet.final(job_id) < 0.001


async def test_a_job_of_a_limited_task_in_another_queue_starts_at_once(fleet: Fleet) -> None:
    """Only a poll claims it, and the queue of its task is another one."""
    fleet.declare("limited", fleet.note, queue="own", concurrency=5)
    await _started(fleet, 3)

    assert await fleet.final(await fleet.submit("limited")) < 0.05


async def test_workers_of_other_queues_do_not_make_it_wait(fleet: Fleet) -> None:
    """Only workers that share the queue count, for the pause and for polls."""
    for number in range(WORKERS):
        fleet.start(f"other{number:03}", queues={"other": 1}, poll_interval=600.0)
    fleet.start("mine", queues={"default": 10}, poll_interval=1.0)
    await asyncio.sleep(60.0)

    assert await fleet.final(await fleet.submit()) < 0.001
    assert await fleet.final(await fleet.accept()) <= 1.01
