"""In-process queues: order, concurrency, counts, and draining."""

import asyncio
import logging

import pytest
from tests.manual_clock import ManualClock
from tests.unit.doubles import BrokenError, swallow_cancellation

from viralfx.adapters.memory import DrainQueues, MemoryQueues
from viralfx.domain.errors import WorkLostError


class Jobs:
    """Queues, and jobs that take time on the clock and write down their ends."""

    def __init__(self, clock: ManualClock, *, concurrency: int = 2) -> None:
        self.queues = MemoryQueues(["default", "slow"], concurrency=concurrency)
        self.done: list[str] = []
        self.cancelled: list[str] = []
        self.running = 0
        self.most_running = 0
        self._clock = clock

    def submit(self, name: str, seconds: float = 0.0, *, queue: str = "default") -> None:
        """Submit a job."""

        async def job() -> None:
            self.running += 1
            self.most_running = max(self.most_running, self.running)
            try:
                await self._clock.sleep(seconds)
            except asyncio.CancelledError:
                self.cancelled.append(name)
                raise
            else:
                self.done.append(name)
            finally:
                self.running -= 1

        self.queues.submit(queue, job)

    async def metrics(self, queue: str = "default") -> dict[str, int]:
        """Return the counts of a queue as its health check gives them."""
        details = (await self.queues.check()).details
        by_name = {d["name"]: d["metrics"] for d in details if isinstance(d, dict)}
        return dict(by_name[queue])


@pytest.fixture
def jobs(clock: ManualClock) -> Jobs:
    """Return empty queues, two jobs at a time."""
    return Jobs(clock)


async def test_jobs_of_a_queue_begin_in_order(clock: ManualClock, jobs: Jobs) -> None:
    """First come, first served."""
    for number in range(5):
        jobs.submit(str(number))
    await clock.settle()

    assert jobs.done == ["0", "1", "2", "3", "4"]


async def test_concurrency_is_bounded_per_queue(clock: ManualClock, jobs: Jobs) -> None:
    """So many at a time in each queue, and a full queue holds up no other."""
    for number in range(6):
        jobs.submit(str(number), 1.0)
    await clock.settle()

    assert await jobs.metrics() == {"waiting": 4, "active": 2, "completed": 0, "failed": 0}

    jobs.submit("other", 0.5, queue="slow")
    await clock.advance(0.5)

    assert jobs.done == ["other"]

    await clock.advance(2.5)

    assert len(set(jobs.done) - {"other"}) == 6
    assert jobs.most_running == 3


async def test_counts_are_true(clock: ManualClock, jobs: Jobs) -> None:
    """Completed and failed jobs are counted in their queue."""

    async def broken() -> None:
        raise BrokenError("a job")

    async def gives_up() -> None:
        raise asyncio.CancelledError

    jobs.submit("fine")
    jobs.queues.submit("default", broken)
    jobs.queues.submit("default", gives_up)
    await clock.settle()

    assert await jobs.metrics() == {"waiting": 0, "active": 0, "completed": 1, "failed": 2}
    assert await jobs.metrics("slow") == {"waiting": 0, "active": 0, "completed": 0, "failed": 0}


async def test_failing_job_is_logged_and_ends_nothing(
    clock: ManualClock, jobs: Jobs, caplog: pytest.LogCaptureFixture
) -> None:
    """A job's error is one log line with the queue's name; the next job runs."""

    async def broken() -> None:
        raise BrokenError("a job")

    jobs.queues.submit("default", broken)
    jobs.submit("next")
    with caplog.at_level(logging.ERROR):
        await clock.settle()
    (record,) = caplog.records

    assert (record.message, getattr(record, "queue", None)) == ("Job failed", "default")
    assert jobs.done == ["next"]


def test_unknown_queue_is_an_error(jobs: Jobs) -> None:
    """A name that was not configured is refused."""
    with pytest.raises(KeyError):
        jobs.submit("lost", queue="unknown")


# -- draining --------------------------------------------------------------------------------


async def test_drain_of_empty_queues_is_immediate(clock: ManualClock, jobs: Jobs) -> None:
    """Nothing to do takes no time."""
    await DrainQueues(jobs.queues, clock).run(30.0)

    assert clock.sleeping == 0


async def test_drain_finishes_what_runs_and_what_waits(clock: ManualClock, jobs: Jobs) -> None:
    """In memory, a waiting job would be lost: it is run as well."""
    for number in range(6):
        jobs.submit(str(number), 1.0)
    drain = asyncio.create_task(DrainQueues(jobs.queues, clock).run(30.0))
    await clock.advance(2.9)

    assert not drain.done()

    await clock.advance(0.1)

    assert drain.done()
    assert len(jobs.done) == 6
    assert jobs.queues.unfinished == 0
    drain.result()


async def test_draining_queue_accepts_nothing(clock: ManualClock, jobs: Jobs) -> None:
    """A job that comes while the process leaves is refused, not lost."""
    await DrainQueues(jobs.queues, clock).run(30.0)

    with pytest.raises(WorkLostError, match="queue default accepts no more jobs"):
        jobs.submit("late")


async def test_job_that_submits_while_draining_fails_and_the_drain_ends(
    clock: ManualClock, jobs: Jobs
) -> None:
    """Follow-up work cannot keep a process from leaving."""

    async def endless() -> None:
        await clock.sleep(1.0)
        jobs.queues.submit("default", endless)

    jobs.queues.submit("default", endless)
    drain = asyncio.create_task(DrainQueues(jobs.queues, clock).run(30.0))
    await clock.advance(2.0)

    assert drain.done()
    drain.result()
    assert await jobs.metrics() == {"waiting": 0, "active": 0, "completed": 0, "failed": 1}


async def test_overrunning_jobs_are_cancelled_at_the_budget_and_told(
    clock: ManualClock, jobs: Jobs
) -> None:
    """What does not finish is cut, what waits never begins, and the stage fails with a count."""
    for number in range(4):
        jobs.submit(str(number), 100.0)
    drain = asyncio.create_task(DrainQueues(jobs.queues, clock).run(5.0))
    await clock.advance(5.0)

    with pytest.raises(WorkLostError, match="4 in-memory jobs did not finish within 5 s"):
        drain.result()
    assert sorted(jobs.cancelled) == ["0", "1"]
    assert jobs.queues.unfinished == 0


async def test_job_that_swallows_cancellation_does_not_hold_up_the_drain(
    clock: ManualClock, jobs: Jobs
) -> None:
    """The stage ends at its budget whatever a job does."""
    released = asyncio.Event()

    async def stubborn() -> None:
        await swallow_cancellation(released)

    jobs.queues.submit("default", stubborn)
    drain = asyncio.create_task(DrainQueues(jobs.queues, clock).run(5.0))
    await clock.advance(5.0)

    assert isinstance(drain.exception(), WorkLostError)
    released.set()
    await clock.settle()


async def test_zero_budget_still_closes_and_tells(clock: ManualClock, jobs: Jobs) -> None:
    """Without any time left the jobs are given up and counted."""
    jobs.submit("long", 1.0)
    await clock.settle()

    with pytest.raises(WorkLostError, match="1 in-memory jobs did not finish within 0 s"):
        await DrainQueues(jobs.queues, clock).run(0.0)


async def test_drain_again_after_the_end_is_harmless(clock: ManualClock, jobs: Jobs) -> None:
    """The second run of the stage has nothing to do."""
    stage = DrainQueues(jobs.queues, clock)
    jobs.submit("one")
    await stage.run(1.0)
    await stage.run(1.0)

    assert jobs.done == ["one"]


async def test_cancelled_drain_leaves_nothing_behind(clock: ManualClock) -> None:
    """A stage that is cut does not go on waiting in a task of its own."""
    queues = MemoryQueues(["default"])
    never = asyncio.Event()

    async def job() -> None:
        await never.wait()

    queues.submit("default", job)
    before = asyncio.all_tasks()
    drain = asyncio.create_task(DrainQueues(queues, clock).run(5.0))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    drain.cancel()
    await asyncio.wait({drain})
    await asyncio.sleep(0)
    left = asyncio.all_tasks() - before
    queues.cancel()

    assert {task.get_name() for task in left} <= {"job-default"}
