"""Following a job: its updates, the queries to the ledger, and the end of the stream."""

import asyncio
from dataclasses import replace

import pytest
from tests.manual_clock import ManualClock

from viralfx.core.errors import LedgerUnavailableError
from viralfx.jobs.follower import JobFollower
from viralfx.jobs.memory import MemoryJobLedger
from viralfx.jobs.model import Job, JobDraft, JobNotFoundError, JobState, completed


class Jobs:
    """A ledger that counts its queries, and can fail."""

    def __init__(self, clock: ManualClock) -> None:
        self.ledger = MemoryJobLedger(clock)
        self.polls = 0
        self.under_way = 0
        self.most_under_way = 0
        self.unavailable = False
        self.slow = 0.0
        self._clock = clock

    async def accept(self, job_id: str) -> Job:
        """Store a job."""
        draft = JobDraft(id=job_id, queue="default", task="t", payload=b"null")
        (accepted,) = await self.ledger.accept([draft])
        return accepted.job

    async def get(self, job_id: str) -> Job:
        """Return a job as the service does."""
        self.polls += 1
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            await self._clock.sleep(self.slow)
            if self.unavailable:
                raise LedgerUnavailableError("planted")
            job = await self.ledger.get(job_id)
            if job is None:
                raise JobNotFoundError("planted")
            return job
        finally:
            self.under_way -= 1


class Follower:
    """Follows a job and records its updates."""

    def __init__(self, follower: JobFollower, job: Job) -> None:
        self.updates: list[str | None] = []
        self.task = asyncio.create_task(self._follow(follower, job))

    async def _follow(self, follower: JobFollower, job: Job) -> None:
        async for update in follower.follow(job):
            self.updates.append(None if update is None else str(update.state))


@pytest.fixture
def jobs(clock: ManualClock) -> Jobs:
    """Return an empty ledger."""
    return Jobs(clock)


async def run_one(jobs: Jobs) -> None:
    """Run the longest waiting job."""
    await jobs.ledger.register("w", ["default"], 600.0)
    (claim,) = await jobs.ledger.claim("default", "w", 1)
    await jobs.ledger.settle([completed(claim, b"1")])


async def test_each_state_is_sent_once_until_the_final_one(clock: ManualClock, jobs: Jobs) -> None:
    """The stream ends with it."""
    job = await jobs.accept("a")
    follower = Follower(JobFollower(jobs.get, clock), job)
    await clock.advance(3.0)
    await jobs.ledger.register("w", ["default"], 600.0)
    (claim,) = await jobs.ledger.claim("default", "w", 1)
    await clock.advance(3.0)
    await jobs.ledger.settle([completed(claim, b"1")])
    await clock.advance(1.1)

    assert follower.task.done()
    assert follower.updates == ["waiting", "active", "completed"]
    assert clock.sleeping == 0


async def test_a_final_job_is_sent_and_the_stream_ends(clock: ManualClock, jobs: Jobs) -> None:
    """Without a query to the ledger."""
    job = replace(await jobs.accept("a"), state=JobState.CANCELLED)
    follower = Follower(JobFollower(jobs.get, clock), job)
    await clock.settle()

    assert (follower.task.done(), follower.updates, jobs.polls) == (True, ["cancelled"], 0)


async def test_polls_are_frequent_at_first_and_then_rare(clock: ManualClock, jobs: Jobs) -> None:
    """After 0.1 s first, later once a second, with a heartbeat every 15 seconds."""
    follower = Follower(JobFollower(jobs.get, clock), await jobs.accept("a"))
    await clock.advance(0.1)

    assert jobs.polls == 1

    await clock.advance(55.0)

    assert 55 <= jobs.polls <= 65
    assert follower.updates == ["waiting", None, None, None]
    follower.task.cancel()


async def test_followers_of_one_job_share_its_polls(clock: ManualClock, jobs: Jobs) -> None:
    """Also if they start at different times."""
    follower, job = JobFollower(jobs.get, clock), await jobs.accept("a")
    followers = []
    for _ in range(100):
        followers.append(Follower(follower, job))
        await clock.advance(0.013)
    before = jobs.polls
    await clock.advance(10.0)

    assert jobs.polls - before <= 21
    await run_one(jobs)
    await clock.advance(1.1)
    assert {tuple(f.updates) for f in followers} == {("waiting", "completed")}


async def test_concurrent_polls_are_bounded(clock: ManualClock, jobs: Jobs) -> None:
    """A slow ledger is not overloaded, and every follower gets its updates."""
    follower = JobFollower(jobs.get, clock)
    followers = [Follower(follower, await jobs.accept(str(n))) for n in range(40)]
    jobs.slow = 0.1
    await clock.advance(5.0)

    assert jobs.most_under_way == 4
    for _ in followers:
        await run_one(jobs)
    await clock.advance(5.0)
    assert all(f.updates == ["waiting", "completed"] for f in followers)


async def test_an_outage_delays_updates(clock: ManualClock, jobs: Jobs) -> None:
    """The stream continues when the ledger is back."""
    follower = Follower(JobFollower(jobs.get, clock), await jobs.accept("a"))
    jobs.unavailable = True
    await clock.advance(20.0)
    jobs.unavailable = False
    await run_one(jobs)
    await clock.advance(1.1)

    assert follower.updates == ["waiting", None, "completed"]


async def test_a_pruned_job_ends_the_stream(clock: ManualClock, jobs: Jobs) -> None:
    """There are no more updates."""
    follower = Follower(JobFollower(jobs.get, clock), replace(await jobs.accept("a"), id="b"))
    await clock.advance(1.0)

    assert (follower.task.done(), follower.updates) == (True, ["waiting"])
    follower.task.result()


async def test_end_ends_all_streams(clock: ManualClock, jobs: Jobs) -> None:
    """A later stream sends the state and ends."""
    follower, job = JobFollower(jobs.get, clock), await jobs.accept("a")
    early = Follower(follower, job)
    await clock.settle()
    follower.end()
    await clock.settle()
    late = Follower(follower, job)
    await clock.settle()

    assert (early.task.done(), late.task.done()) == (True, True)
    assert early.updates == late.updates == ["waiting"]
    assert clock.sleeping == 0


async def test_a_cancelled_follower_is_removed(clock: ManualClock, jobs: Jobs) -> None:
    """The others continue."""
    follower, job = JobFollower(jobs.get, clock, max_followers=2), await jobs.accept("a")
    stays, ends = Follower(follower, job), Follower(follower, job)
    await clock.settle()

    assert follower.full

    ends.task.cancel()
    await clock.advance(2.0)

    assert not follower.full

    stays.task.cancel()
    await clock.settle()

    assert follower._followed == {}
    assert clock.sleeping == 0
