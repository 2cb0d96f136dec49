"""Following one job until it is final: everybody who follows it shares the looks at the ledger."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager

from viralfx.domain.clock import Clock, finished_within
from viralfx.domain.jobs.job import Job, JobNotFoundError, LedgerUnavailableError

_LEAST_PAUSE = 0.1
_MOST_PAUSE = 1.0
"""Seconds between two looks at a job: seldom while nothing happens, often right after it did."""
_GROWTH = 1.5
_LOOKS_AT_ONCE = 4
_HEARTBEAT = 15.0
"""Seconds after which a follower who heard nothing is told that there is nothing to tell."""


class JobWatch:
    """Tells followers what becomes of their jobs.

    A job is looked at once for all who follow it, and never are more than a few looks under way:
    with very many followers the news comes later, and the ledger is spared.
    """

    def __init__(
        self, get: Callable[[str], Awaitable[Job]], clock: Clock, *, most: int = 1000
    ) -> None:
        """``get`` raises as :meth:`JobService.get` does; ``most`` may follow at once."""
        self._get = get
        self._clock = clock
        self._most = most
        self._followers = 0
        self._watched: dict[str, _Watched] = {}
        self._looks = asyncio.Semaphore(_LOOKS_AT_ONCE)
        self._ended = asyncio.Event()

    @property
    def full(self) -> bool:
        """Whether nobody more should follow."""
        return self._followers >= self._most

    def end(self) -> None:
        """End all that is followed, and what will be."""
        self._ended.set()

    async def follow(self, job: Job) -> AsyncIterator[Job | None]:
        """Yield the job now and at each change; None now and then where there is no change.

        Ends after a final state, when there is no such job any more, or by :meth:`end`. What the
        ledger cannot say at the moment is waited for.
        """
        with self._following(job) as watched:
            yield job
            told_at, pause = self._clock.monotonic(), _LEAST_PAUSE
            while not job.state.final and not await self._ends_within(pause):
                try:
                    latest = await self._look(watched, job.id, pause)
                except JobNotFoundError:
                    return
                now = self._clock.monotonic()
                if latest != job:
                    job, told_at, pause = latest, now, _LEAST_PAUSE
                    yield job
                    continue
                pause = min(_MOST_PAUSE, pause * _GROWTH)
                if now - told_at >= _HEARTBEAT:
                    told_at = now
                    yield None

    @contextmanager
    def _following(self, job: Job) -> Iterator["_Watched"]:
        watched = self._watched.setdefault(job.id, _Watched(job, self._clock.monotonic()))
        watched.followers += 1
        self._followers += 1
        try:
            yield watched
        finally:
            self._followers -= 1
            watched.followers -= 1
            if not watched.followers:
                del self._watched[job.id]

    async def _look(self, watched: "_Watched", job_id: str, pause: float) -> Job:
        async with watched.looking:
            # Somebody else may have looked in the meantime: that is as good.
            if self._clock.monotonic() - watched.seen_at >= pause:
                try:
                    async with self._looks:
                        watched.job = await self._get(job_id)
                except LedgerUnavailableError:
                    pass  # what was seen last is all there is to tell
                watched.seen_at = self._clock.monotonic()
            return watched.job

    async def _ends_within(self, seconds: float) -> bool:
        ended = asyncio.ensure_future(self._ended.wait())
        try:
            return await finished_within(ended, seconds, self._clock)
        finally:
            ended.cancel()


class _Watched:
    """What was last seen of a job that somebody follows."""

    def __init__(self, job: Job, seen_at: float) -> None:
        self.job = job
        self.seen_at = seen_at
        self.followers = 0
        self.looking = asyncio.Lock()
