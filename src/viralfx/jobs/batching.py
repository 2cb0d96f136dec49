"""Calls of the ledger that several callers share: batches, and followers of a job.

The jobs that a caller asks for together, or changes together, are here, too.
"""

import asyncio
from collections.abc import (
    AsyncGenerator,
    Awaitable,
    Callable,
    Collection,
    Hashable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import aclosing, contextmanager, nullcontext, suppress
from contextvars import Context
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Generic, TypeVar

from viralfx.core.clock import Clock, wait_for
from viralfx.core.errors import LedgerLimitError, LedgerUnavailableError, ViralFXError
from viralfx.core.keys import NamedKey
from viralfx.core.loops import HomeLoop, beside_others, running_loop
from viralfx.jobs.ledger import Accepted
from viralfx.jobs.model import Job, JobDraft, JobNotFoundError, KeyConflictError
from viralfx.resilience.deadline import Deadline

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


class PartlyDoneError(LedgerLimitError):
    """A call took effect except for some jobs, such as those that other transactions lock.

    Without a job, except for the worker itself.
    """

    def __init__(
        self,
        reason: str,
        left: Collection[str],
        *,
        settled: Collection[str] = (),
        returned: Mapping[str, Sequence[str]] | None = None,
        doubtful: bool = False,
    ) -> None:
        self.left = left
        """The ids of these jobs."""
        self.doubtful = doubtful
        """True if an earlier attempt of the call, whose answer was lost, may yet change them."""
        self.settled = settled
        self.returned = returned or {}
        """The answer for the others, of a settlement or a deregistration."""
        super().__init__(f"{len(left)} jobs are left: {reason}" if left else reason)


class KeyHeldError(LedgerLimitError):
    """An open transaction has submitted a job with the same key. The call accepted nothing."""

    def __init__(self, drafts: Sequence[JobDraft]) -> None:
        keyed = any(draft.key is not None for draft in drafts)
        same = "idempotency key" if keyed else "task and payload"
        super().__init__(
            f"an open transaction holds the same {same}; end it, or repeat the call after its end",
            "key_held",
        )


MAX_BATCH_BYTES = 4 * 2**20
"""Bytes of payloads or results from which a batch takes no further item."""


def _no_keys(_item: object) -> Collection[Hashable]:
    return ()


def _no_size(_item: object) -> int:
    return 0


class Batcher(Generic[ItemT, ResultT]):
    """Passes the items of concurrent callers to ``call``, and returns each caller its result.

    A call gets up to ``max_items`` items in the order of their arrival. It gets no further item
    once their sizes exceed ``max_bytes``; a larger item is passed on alone. One call runs at a
    time; if it takes longer than ``slow_after`` seconds, the next one starts beside it, up to
    ``max_calls`` at once. Items that share one of their ``keys`` are never passed on together or in
    concurrent calls.

    An error of a type in ``shared`` fails every item of the call, and every item that was already
    waiting for the next one: during an outage a caller waits for two calls at most. After any other
    error the batch is halved and tried again until only the items that cause the error fail;
    ``call`` must therefore do all or nothing. A shared error counts as another one if a concurrent
    call succeeded meanwhile: then there is no outage. Cancelling a caller does not affect the
    others; its own item may or may not have been passed on.
    """

    def __init__(
        self,
        call: Callable[[Sequence[ItemT]], Awaitable[Sequence[ResultT]]],
        *,
        max_items: int = 200,
        max_bytes: int = MAX_BATCH_BYTES,
        size: Callable[[ItemT], int] = _no_size,
        keys: Callable[[ItemT], Collection[Hashable]] = _no_keys,
        shared: type[Exception] | tuple[type[Exception], ...] = (),
        max_calls: int = 1,
        slow_after: float = 1.0,
    ) -> None:
        self._call = call
        self._max_items = max_items
        self._max_bytes = max_bytes
        self._size = size
        self._keys_of = keys
        self._shared = shared
        self._max_calls = max_calls
        self._slow_after = slow_after
        self._waiting: list[_Entry[ItemT, ResultT]] = []
        self._keys: set[Hashable] = set()
        """Keys of the items that are being passed on."""
        self._running: set[asyncio.Task[None]] = set()
        self._current: asyncio.Task[None] | None = None
        """The task that takes the next batch; the others are slow."""
        self._succeeded = 0
        """How many calls succeeded so far."""
        self._loop: asyncio.AbstractEventLoop | None = None

    async def __call__(self, item: ItemT) -> ResultT:
        """Return the result for ``item``, or raise its error.

        The callers of one moment must be on the same event loop.
        """
        if self._loop is not (loop := asyncio.get_running_loop()):
            # A loop that has ended leaves its tasks behind, and they never end.
            self._loop, self._current = loop, None
            self._waiting.clear()
            self._running.clear()
            self._keys.clear()
        entry: _Entry[ItemT, ResultT] = _Entry(item, self._keys_of(item))
        self._waiting.append(entry)
        if self._current is None:
            self._start()
        return await entry.result

    def cancel(self) -> None:
        """Cancel the running calls and all waiting callers."""
        for task in self._running:
            task.cancel()
        for entry in self._waiting:
            entry.result.cancel()

    def _start(self) -> None:
        if len(self._running) < self._max_calls and any(map(self._may_start, self._waiting)):
            # The task starts after all tasks that are ready now, and batches their items too. So it
            # is not for the factory of the loop, which may start it at once. It has a fresh
            # context: a caller's deadline does not apply to the other callers.
            self._current = asyncio.Task(self._run(), name="batcher", context=Context())
            self._running.add(self._current)
            self._current.add_done_callback(self._ended)

    def _may_start(self, entry: "_Entry[ItemT, ResultT]") -> bool:
        return not entry.result.done() and self._keys.isdisjoint(entry.keys)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._running.discard(task)
        if self._current is task:
            self._current = None
        if self._current is None:
            self._start()

    async def _run(self) -> None:
        current, loop = asyncio.current_task(), asyncio.get_running_loop()
        while self._current is current and (batch := self._next_batch()):
            behind = tuple(self._waiting)
            slow = loop.call_later(self._slow_after, self._begin_next, current)
            keys = {key for entry in batch for key in entry.keys}
            self._keys |= keys
            try:
                error = await self._send(batch)
            except asyncio.CancelledError:
                for entry in batch:
                    entry.result.cancel()
                raise
            finally:
                slow.cancel()
                self._keys -= keys
            if error is not None:
                still_waiting = set(self._waiting)
                for entry in behind:
                    if entry in still_waiting:
                        entry.fail(error)
            if self._current is None:
                self._current = current

    def _begin_next(self, slow: "asyncio.Task[None] | None") -> None:
        if self._current is slow:
            self._current = None
            self._start()

    def _next_batch(self) -> "list[_Entry[ItemT, ResultT]]":
        batch: list[_Entry[ItemT, ResultT]] = []
        later: list[_Entry[ItemT, ResultT]] = []
        keys: set[Hashable] = set(self._keys)
        size, full = 0, False
        for entry in self._waiting:
            if entry.result.done():
                continue  # its caller was cancelled
            if full or not keys.isdisjoint(entry.keys):
                later.append(entry)
                continue
            size += self._size(entry.item)
            if batch and size > self._max_bytes:
                full = True
                later.append(entry)
                continue
            batch.append(entry)
            full = len(batch) == self._max_items
            keys.update(entry.keys)
        self._waiting = later
        return batch

    async def _send(self, batch: "list[_Entry[ItemT, ResultT]]") -> Exception | None:
        """Resolve the callers of a batch; return a shared error, which fails waiting items too."""
        parts = [batch]
        succeeded, silent, allowed = self._succeeded, 0, 0
        while parts:
            part = parts.pop(0)
            try:
                results = await self._call([entry.item for entry in part])
            except Exception as error:  # noqa: BLE001 - passed on to the callers of the items
                held = isinstance(error, KeyHeldError)
                answers = held or not isinstance(error, self._shared)
                answers |= self._succeeded != succeeded
                silent = 0 if answers else silent + 1
                succeeded = self._succeeded
                if silent > allowed:
                    for entry in (*part, *(entry for other in parts for entry in other)):
                        entry.fail(error)
                    return error
                # From here on the batch may have a culprit, which is the only item of its part in
                # the end: one such error in a row is no outage.
                allowed = 1
                if len(part) == 1:
                    part[0].fail(error)
                else:
                    middle = len(part) // 2
                    at = len(parts) if held else 0  # a single draft waits for its key, the last
                    parts[at:at] = part[:middle], part[middle:]
            else:
                self._succeeded += 1
                for entry, result in zip(part, results, strict=True):
                    entry.succeed(result)
        return None


class _Entry(Generic[ItemT, ResultT]):
    """An item, and the future its caller waits for."""

    __slots__ = ("item", "keys", "result")

    def __init__(self, item: ItemT, keys: Collection[Hashable]) -> None:
        self.item = item
        self.keys = keys
        self.result: asyncio.Future[ResultT] = asyncio.get_running_loop().create_future()

    def succeed(self, result: ResultT) -> None:
        if not self.result.done():
            self.result.set_result(result)

    def fail(self, error: Exception) -> None:
        if not self.result.done():
            self.result.set_exception(error)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A job that is asked for; see :meth:`JobService.accept` for the meaning of the fields."""

    task: str
    payload: bytes
    """JSON."""
    key: str | NamedKey | None = None
    run_at: datetime | None = None
    priority: int | None = None
    unique: str | None = None
    queue: str | None = None
    max_attempts: int | None = None


def keys_of(draft: JobDraft) -> Sequence[str]:
    """Return the keys of which the ledger accepts one job at a time."""
    return [key for key in (draft.key, draft.unique_key) if key is not None]


_MAX_CONCURRENT_CALLS = 3
"""Calls that store jobs at once, if the earlier ones take long."""


class AcceptBatcher:
    """Stores the drafts of concurrent callers in shared calls of ``store``.

    Drafts with the same key share none: the second one finds the first one's job in the ledger.
    Such a call waits for open transactions with that key, and must not hold up the drafts without
    keys, which therefore have calls of their own. Raises the errors of ``store``.
    """

    def __init__(
        self, store: Callable[[Sequence[JobDraft]], Awaitable[Sequence[Accepted]]]
    ) -> None:
        self._plain, self._keyed = (
            Batcher(
                store,
                size=lambda draft: len(draft.payload),
                keys=keys_of,
                shared=LedgerUnavailableError,
                max_calls=_MAX_CONCURRENT_CALLS,
            )
            for _ in range(2)
        )

    async def __call__(self, draft: JobDraft) -> Accepted:
        """Store one draft, in a call with those of other callers."""
        return await (self._keyed if keys_of(draft) else self._plain)(draft)


def require_same(draft: JobDraft, accepted: Accepted) -> None:
    """Raise :class:`KeyConflictError` if the key of a draft belongs to a different job."""
    job = accepted.job
    # A job with another key is its duplicate: one of the same task and payload.
    if not accepted.created and draft.key == job.key is not None and not job.comes_from(draft):
        raise KeyConflictError(
            f"the idempotency key was used for job {job.id}, which asks for something else", job
        )


def require_all_same(drafts: Sequence[JobDraft], accepted: Sequence[Accepted]) -> None:
    """Do as :func:`require_same` for each of several jobs; the error names the job."""
    for index, (draft, one) in enumerate(zip(drafts, accepted, strict=True)):
        with about(index):
            require_same(draft, one)


@contextmanager
def about(index: int) -> Iterator[None]:
    """Name the job of a batch in the errors of the block."""
    try:
        yield
    except (ValueError, ViralFXError) as error:
        error.args = (f"the job at index {index}: {error}",)
        error.index = index  # type: ignore[union-attr]  # read by the HTTP API
        raise


@dataclass(frozen=True, slots=True)
class BulkCount:
    """The result of a change of many jobs."""

    count: int
    """How many jobs it changed."""
    more: bool = False
    """True if it ended at its most jobs, so that others may be left."""


def cut_off(count: int, error: LedgerUnavailableError) -> LedgerUnavailableError:
    """Return the error of a change of many jobs that ended after ``count`` of them."""
    changed = "1 job was" if count == 1 else f"{count} jobs were"
    return LedgerUnavailableError(f"{changed} changed; then {error}", error.code)


class Allowance:
    """The jobs that the steps of one change may still change: ``most`` in all, ``step`` at once."""

    def __init__(self, most: int | None, step: int) -> None:
        """``most`` None: any number."""
        self._left = most
        self._step = step

    @property
    def step(self) -> int:
        """How many jobs the next step may change; zero at the end."""
        return self._step if self._left is None else min(self._step, self._left)

    def use(self, changed: int) -> int:
        """Count the jobs that a step has changed; return their number."""
        if self._left is not None:
            self._left -= changed
        return changed
