"""Following a job: what is told, when the ledger is asked, and when it ends."""

import asyncio
from dataclasses import replace

import pytest
from tests.manual_clock import ManualClock

from viralfx.adapters.memory import MemoryJobLedger
from viralfx.domain.jobs.job import (
    Job,
    JobDraft,
    JobNotFoundError,
    JobState,
    LedgerUnavailableError,
    completed,
)
from viralfx.domain.jobs.watch import JobWatch


class Jobs:
    """A ledger whose looks are counted, and may fail."""

    def __init__(self, clock: ManualClock) -> None:
        self.ledger = MemoryJobLedger(clock)
        self.looks = 0
        self.under_way = 0
        self.most_under_way = 0
        self.away = False
        self.slow = 0.0
        self._clock = clock

    async def accept(self, job_id: str) -> Job:
        """Keep a job."""
        draft = JobDraft(id=job_id, queue="default", task="t", payload=b"null")
        (accepted,) = await self.ledger.accept([draft])
        return accepted.job

    async def get(self, job_id: str) -> Job:
        """Return a job as the service does."""
        self.looks += 1
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            await self._clock.sleep(self.slow)
            if self.away:
                raise LedgerUnavailableError("planted")
            job = await self.ledger.get(job_id)
            if job is None:
                raise JobNotFoundError("planted")
            return job
        finally:
            self.under_way -= 1


class Follower:
    """Follows a job and writes down what it is told."""

    def __init__(self, watch: JobWatch, job: Job) -> None:
        self.told: list[str | None] = []
        self.task = asyncio.create_task(self._follow(watch, job))

    async def _follow(self, watch: JobWatch, job: Job) -> None:
        async for news in watch.follow(job):
            self.told.append(None if news is None else str(news.state))


@pytest.fixture
def jobs(clock: ManualClock) -> Jobs:
    """Return an empty ledger."""
    return Jobs(clock)


async def run_one(jobs: Jobs) -> None:
    """Run the longest waiting job."""
    await jobs.ledger.register("w", ["default"], 600.0)
    (claim,) = await jobs.ledger.claim("default", "w", 1)
    await jobs.ledger.settle([completed(claim, b"1")])


async def test_each_state_is_told_once_until_the_last(clock: ManualClock, jobs: Jobs) -> None:
    """Now, at each change, and no more after the final one."""
    job = await jobs.accept("a")
    follower = Follower(JobWatch(jobs.get, clock), job)
    await clock.advance(3.0)
    await jobs.ledger.register("w", ["default"], 600.0)
    (claim,) = await jobs.ledger.claim("default", "w", 1)
    await clock.advance(3.0)
    await jobs.ledger.settle([completed(claim, b"1")])
    await clock.advance(1.1)

    assert follower.task.done()
    assert follower.told == ["waiting", "active", "completed"]
    assert clock.sleeping == 0


async def test_a_final_job_is_told_and_over(clock: ManualClock, jobs: Jobs) -> None:
    """Without any look at the ledger."""
    job = replace(await jobs.accept("a"), state=JobState.CANCELLED)
    follower = Follower(JobWatch(jobs.get, clock), job)
    await clock.settle()

    assert (follower.task.done(), follower.told, jobs.looks) == (True, ["cancelled"], 0)


async def test_looks_are_frequent_at_first_and_then_seldom(clock: ManualClock, jobs: Jobs) -> None:
    """The first after a tenth of a second, later one a second; a heartbeat each 15 seconds."""
    follower = Follower(JobWatch(jobs.get, clock), await jobs.accept("a"))
    await clock.advance(0.1)

    assert jobs.looks == 1

    await clock.advance(55.0)

    assert 55 <= jobs.looks <= 65
    assert follower.told == ["waiting", None, None, None]
    follower.task.cancel()


async def test_followers_of_one_job_share_the_looks(clock: ManualClock, jobs: Jobs) -> None:
    """A hundred cost what one costs, also when they come at different times."""
    watch, job = JobWatch(jobs.get, clock), await jobs.accept("a")
    followers = []
    for _ in range(100):
        followers.append(Follower(watch, job))
        await clock.advance(0.013)
    before = jobs.looks
    await clock.advance(10.0)

    assert jobs.looks - before <= 21
    await run_one(jobs)
    await clock.advance(1.1)
    assert {tuple(f.told) for f in followers} == {("waiting", "completed")}


async def test_few_looks_are_under_way_however_many_follow(clock: ManualClock, jobs: Jobs) -> None:
    """A slow ledger is not buried, and every follower gets its turn."""
    watch = JobWatch(jobs.get, clock)
    followers = [Follower(watch, await jobs.accept(str(n))) for n in range(40)]
    jobs.slow = 0.1
    await clock.advance(5.0)

    assert jobs.most_under_way == 4
    for _ in followers:
        await run_one(jobs)
    await clock.advance(5.0)
    assert all(f.told == ["waiting", "completed"] for f in followers)


async def test_a_ledger_that_is_away_is_waited_for(clock: ManualClock, jobs: Jobs) -> None:
    """Nothing ends, and the news come when it is back."""
    follower = Follower(JobWatch(jobs.get, clock), await jobs.accept("a"))
    jobs.away = True
    await clock.advance(20.0)
    jobs.away = False
    await run_one(jobs)
    await clock.advance(1.1)

    assert follower.told == ["waiting", None, "completed"]


async def test_a_job_that_is_forgotten_ends_it(clock: ManualClock, jobs: Jobs) -> None:
    """Pruned meanwhile: there is nothing more to tell."""
    follower = Follower(JobWatch(jobs.get, clock), replace(await jobs.accept("a"), id="b"))
    await clock.advance(1.0)

    assert (follower.task.done(), follower.told) == (True, ["waiting"])
    follower.task.result()


async def test_the_end_of_all_ends_each(clock: ManualClock, jobs: Jobs) -> None:
    """At once, and whoever comes later is told the state and no more."""
    watch, job = JobWatch(jobs.get, clock), await jobs.accept("a")
    early = Follower(watch, job)
    await clock.settle()
    watch.end()
    await clock.settle()
    late = Follower(watch, job)
    await clock.settle()

    assert (early.task.done(), late.task.done()) == (True, True)
    assert early.told == late.told == ["waiting"]
    assert clock.sleeping == 0


async def test_a_follower_who_leaves_leaves_nothing(clock: ManualClock, jobs: Jobs) -> None:
    """Neither its place nor its job is kept, and the others go on."""
    watch, job = JobWatch(jobs.get, clock, most=2), await jobs.accept("a")
    stays, leaves = Follower(watch, job), Follower(watch, job)
    await clock.settle()

    assert watch.full

    leaves.task.cancel()
    await clock.advance(2.0)

    assert not watch.full

    stays.task.cancel()
    await clock.settle()

    assert watch._watched == {}
    assert clock.sleeping == 0
