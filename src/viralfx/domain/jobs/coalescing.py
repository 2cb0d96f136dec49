"""Many callers' items in few calls: what comes while one call is under way goes into the next."""

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Sequence
from contextvars import Context
from typing import Generic, TypeVar

ItemT = TypeVar("ItemT")
AnswerT = TypeVar("AnswerT")


def _apart_from_none(_item: object) -> None:
    return None


class Coalescer(Generic[ItemT, AnswerT]):
    """Hands the items of concurrent callers to ``call``, and its answers back to each of them.

    One call is under way at a time, with up to ``most`` items in the order they came. Items for
    which ``apart`` returns the same key, None aside, never share a call.

    An error of a kind in ``shared`` is that of every item of the call, and of those that found no
    place in it: while no call succeeds, nobody waits for more than two. After any other one the
    items are tried again in ever smaller parts, so that it reaches only those that cause it:
    ``call`` must do all or nothing. A caller that is cancelled leaves the others alone; whether
    its own item was handed over is then unknown.
    """

    def __init__(
        self,
        call: Callable[[Sequence[ItemT]], Awaitable[Sequence[AnswerT]]],
        *,
        most: int = 200,
        apart: Callable[[ItemT], Hashable | None] = _apart_from_none,
        shared: type[Exception] | tuple[type[Exception], ...] = (),
    ) -> None:
        self._call = call
        self._most = most
        self._apart = apart
        self._shared = shared
        self._waiting: list[_Entry[ItemT, AnswerT]] = []
        self._running: asyncio.Task[None] | None = None

    async def __call__(self, item: ItemT) -> AnswerT:
        """Return the answer for ``item``, or raise its error."""
        entry: _Entry[ItemT, AnswerT] = _Entry(item)
        self._waiting.append(entry)
        if self._running is None:
            # A task begins after whatever is ready to run now, and takes what that brings. What
            # is bound to one caller, its deadline above all, is not the others'.
            self._running = asyncio.create_task(self._run(), name="coalescer", context=Context())
        return await entry.answer

    def cancel(self) -> None:
        """Cancel the call under way and all who wait."""
        if self._running is not None:
            self._running.cancel()
        for entry in self._waiting:
            entry.answer.cancel()

    async def _run(self) -> None:
        batch: list[_Entry[ItemT, AnswerT]] = []
        try:
            while batch := self._take():
                behind = tuple(self._waiting)
                if (error := await self._send(batch)) is not None:
                    for entry in behind:
                        entry.fail(error)
        except asyncio.CancelledError:
            for entry in batch:
                entry.answer.cancel()
            raise
        finally:
            self._running = None
            if self._waiting:  # left by a cancellation; those who came since are owed a call
                self._running = asyncio.create_task(self._run(), context=Context())

    def _take(self) -> "list[_Entry[ItemT, AnswerT]]":
        taken: list[_Entry[ItemT, AnswerT]] = []
        later: list[_Entry[ItemT, AnswerT]] = []
        keys: set[Hashable] = set()
        for entry in self._waiting:
            if entry.answer.done():
                continue  # its caller was cancelled
            key = self._apart(entry.item)
            if len(taken) == self._most or key in keys:
                later.append(entry)
            else:
                taken.append(entry)
                if key is not None:
                    keys.add(key)
        self._waiting = later
        return taken

    async def _send(self, batch: "list[_Entry[ItemT, AnswerT]]") -> Exception | None:
        """Answer the callers; return an error that is all of theirs."""
        try:
            answers = await self._call([entry.item for entry in batch])
        except Exception as error:  # noqa: BLE001 - it is owed to those whose items caused it
            shared = isinstance(error, self._shared)
            if len(batch) == 1 or shared:
                for entry in batch:
                    entry.fail(error)
                return error if shared else None
        else:
            for entry, answer in zip(batch, answers, strict=True):
                entry.succeed(answer)
            return None
        middle = len(batch) // 2
        if (failure := await self._send(batch[:middle])) is None:
            return await self._send(batch[middle:])
        for entry in batch[middle:]:
            entry.fail(failure)
        return failure


class _Entry(Generic[ItemT, AnswerT]):
    """An item, and the caller's answer."""

    __slots__ = ("answer", "item")

    def __init__(self, item: ItemT) -> None:
        self.item = item
        self.answer: asyncio.Future[AnswerT] = asyncio.get_running_loop().create_future()

    def succeed(self, answer: AnswerT) -> None:
        if not self.answer.done():
            self.answer.set_result(answer)

    def fail(self, error: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)
