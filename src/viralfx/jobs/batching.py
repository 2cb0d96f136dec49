"""Batches: calls of the ledger that several callers share."""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Hashable, Sequence
from contextvars import Context
from typing import Generic, TypeVar

from viralfx.core.errors import LedgerUnavailableError
from viralfx.jobs.ledger import Accepted, KeyHeldError
from viralfx.jobs.model import JobDraft

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

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
