"""Followers of a job: streams of its changes that share the queries of the ledger."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager, nullcontext, suppress
from functools import partial

from viralfx.core.clock import Clock, wait_for
from viralfx.core.errors import LedgerUnavailableError
from viralfx.core.loops import HomeLoop, beside_others, running_loop
from viralfx.jobs.model import Job, JobNotFoundError
from viralfx.resilience.deadline import Deadline

_MIN_POLL_SECONDS = 0.1
_MAX_POLL_SECONDS = 1.0
"""Seconds between two queries for a job: short after a change, longer while nothing changes."""
_POLL_GROWTH = 1.5
_MAX_CONCURRENT_QUERIES = 4
_HEARTBEAT_SECONDS = 15.0
"""Seconds without a change after which a follower gets a heartbeat."""


class JobFollower:
    """Streams the changes of jobs to their followers.

    One query serves all followers of a job, and only a few queries run at once: with very many
    followers changes arrive later, and the load on the ledger stays the same.
    """

    def __init__(
        self,
        get: Callable[[str], Awaitable[Job]],
        clock: Clock,
        *,
        max_followers: int = 1000,
        home: HomeLoop | None = None,
    ) -> None:
        """``get`` returns a job and raises as :meth:`JobService.get` does, on the loop ``home``."""
        self._get = get
        self._home = home or HomeLoop()
        self._clock = clock
        self._max_followers = max_followers
        self._followers = 0
        self._followed: dict[tuple[asyncio.AbstractEventLoop, str], _FollowedJob] = {}
        self._on_loops: dict[asyncio.AbstractEventLoop, _OnLoop] = {}
        """Those with followers: one, once the application has started."""
        self._has_ended = False

    @property
    def full(self) -> bool:
        """True if ``max_followers`` follow already; :meth:`follow` does not check this itself."""
        return self._followers >= self._max_followers

    def end(self) -> None:
        """End all streams, and each new one after its first item."""
        self._has_ended = True
        for loop, on_loop in tuple(self._on_loops.items()):
            if loop is running_loop():
                on_loop.ended.set()
                continue
            with suppress(RuntimeError):  # it is closed
                loop.call_soon_threadsafe(on_loop.ended.set)

    async def follow(self, job: Job, *, counts: bool = True) -> AsyncGenerator[Job | None]:
        """Yield the job now and after each change; None as a heartbeat while nothing changes.

        ``counts``: whether it is one of ``max_followers``. Ends after a final state, if the job is
        pruned, or by :meth:`end`. An outage of the ledger delays changes and does not end the
        stream.
        """
        async with aclosing(self._home.iterate(partial(self._follow, job, counts))) as changes:
            async for each in changes:
                yield each

    async def _follow(self, job: Job, counts: bool) -> AsyncGenerator[Job | None]:  # noqa: FBT001 - as given
        with self._following(job, counts=counts) as (followed, on_loop):
            yield job
            sent_at, pause = self._clock.monotonic(), _MIN_POLL_SECONDS
            while not job.state.final and not await wait_for(on_loop.ended, pause, self._clock):
                try:
                    latest = await self._poll(followed, on_loop.queries, job.id, pause)
                except JobNotFoundError:
                    return
                now = self._clock.monotonic()
                if latest != job:
                    job, sent_at, pause = latest, now, _MIN_POLL_SECONDS
                    yield job
                    continue
                pause = min(_MAX_POLL_SECONDS, pause * _POLL_GROWTH)
                if now - sent_at >= _HEARTBEAT_SECONDS:
                    sent_at = now
                    yield None

    @beside_others
    async def wait(self, job_id: str, seconds: float | None = None) -> Job:
        """Return a job once it is completed, failed or cancelled.

        It asks the ledger as :meth:`follow` does. Raises :class:`JobNotFoundError`, and
        ``TimeoutError`` after ``seconds`` or if this process stops before the job has ended.
        """
        async with nullcontext() if seconds is None else Deadline(seconds, clock=self._clock):
            async with aclosing(self.follow(await self._get(job_id), counts=False)) as changes:
                async for job in changes:
                    if job is not None and job.state.final:
                        return job
            await self._get(job_id)  # raises an error if it was deleted
            raise TimeoutError(f"this process stops before job {job_id} has ended")

    @contextmanager
    def _following(self, job: Job, *, counts: bool) -> Iterator[tuple["_FollowedJob", "_OnLoop"]]:
        loop = asyncio.get_running_loop()
        self._leave_closed_loops()
        on_loop = self._on_loops.setdefault(loop, _OnLoop())
        if self._has_ended:
            on_loop.ended.set()
        key = loop, job.id
        followed = self._followed.setdefault(key, _FollowedJob(job, self._clock.monotonic()))
        followed.followers += 1
        on_loop.followers += 1
        self._followers += counts
        try:
            yield followed, on_loop
        finally:
            self._followers -= counts
            followed.followers -= 1
            on_loop.followers -= 1
            if not followed.followers:
                self._followed.pop(key, None)
            if not on_loop.followers:
                self._on_loops.pop(loop, None)

    def _leave_closed_loops(self) -> None:
        for loop in [each for each in tuple(self._on_loops) if each.is_closed()]:
            self._on_loops.pop(loop, None)
            for key in [each for each in tuple(self._followed) if each[0] is loop]:
                self._followed.pop(key, None)

    async def _poll(
        self, followed: "_FollowedJob", queries: asyncio.Semaphore, job_id: str, pause: float
    ) -> Job:
        async with followed.polling:
            # Another follower may have polled while this one waited; its result is recent enough.
            if self._clock.monotonic() - followed.polled_at >= pause:
                try:
                    async with queries:
                        followed.job = await self._get(job_id)
                except LedgerUnavailableError:
                    pass  # keeps the job as it was last seen
                followed.polled_at = self._clock.monotonic()
            return followed.job


class _OnLoop:
    """The state that the followers on one event loop share."""

    def __init__(self) -> None:
        self.followers = 0
        self.queries = asyncio.Semaphore(_MAX_CONCURRENT_QUERIES)
        self.ended = asyncio.Event()


class _FollowedJob:
    """A job that has followers, as the ledger last returned it."""

    def __init__(self, job: Job, polled_at: float) -> None:
        self.job = job
        self.polled_at = polled_at
        self.followers = 0
        self.polling = asyncio.Lock()
