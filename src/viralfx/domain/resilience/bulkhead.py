"""Bounded concurrency: one slow dependency must not hold every task of the process."""

import asyncio
import functools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar, cast

from viralfx.domain.events import Listener, notify
from viralfx.domain.resilience.failures import CallRejectedError
from viralfx.domain.resilience.guardable import is_async, operation_name, refuse_uncallable
from viralfx.domain.resilience.quantities import require_count, require_not_negative

T = TypeVar("T")
AsyncCallableT = TypeVar("AsyncCallableT", bound=Callable[..., Awaitable[object]])


class BulkheadFullError(CallRejectedError):
    """As many calls as allowed are under way and waiting: this one was not made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BulkheadFull:
    """Event: a call was not made."""

    name: str
    operation: str


class Bulkhead:
    """Lets ``limit`` calls run at a time and ``queue`` more wait their turn, in order.

    One beyond that raises :class:`BulkheadFullError` at once. A caller that is cancelled while it
    waits leaves the queue. Belongs to one event loop. Use it as a decorator of ``async def``,
    with :meth:`execute`, or as ``async with bulkhead:``.

    Raises ``ValueError`` for a limit below one or a negative queue.
    """

    def __init__(
        self,
        limit: int,
        *,
        queue: int = 0,
        name: str = "bulkhead",
        listeners: tuple[Listener[BulkheadFull], ...] = (),
    ) -> None:
        require_count("limit", limit)
        require_not_negative("queue", queue)
        self.name = name
        self._queue = queue
        self._waiting = 0
        self._permits = asyncio.Semaphore(limit)
        self._listeners = listeners

    async def __aenter__(self) -> None:
        """Take a permit, waiting for one if the queue allows it."""
        await self._take("")

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Give the permit back."""
        self._permits.release()

    async def execute(self, operation: Callable[[], Awaitable[T]], name: str = "") -> T:
        """Await ``operation()`` when its turn comes; ``name`` says what it is, for events."""
        refuse_uncallable(operation)
        await self._take(name)
        try:
            return await operation()
        finally:
            self._permits.release()

    def __call__(self, function: AsyncCallableT) -> AsyncCallableT:
        """Decorate a coroutine function.

        Raises ``TypeError`` for anything else: a plain function holds its loop as it is.
        """
        if not is_async(function):
            raise TypeError("a bulkhead bounds what a loop runs at a time: make it `async def`")
        name = operation_name(function)

        @functools.wraps(function)
        async def guarded(*args: object, **kwargs: object) -> object:
            await self._take(name)
            try:
                return await function(*args, **kwargs)
            finally:
                self._permits.release()

        return cast("AsyncCallableT", guarded)

    async def _take(self, operation: str) -> None:
        if not self._permits.locked():
            # Does not suspend: nobody can take the permit that was just seen.
            await self._permits.acquire()
            return
        if self._waiting >= self._queue:
            if self._listeners:
                notify(self._listeners, BulkheadFull(name=self.name, operation=operation))
            raise BulkheadFullError(f"bulkhead {self.name} is full")
        self._waiting += 1
        try:
            await self._permits.acquire()
        finally:
            self._waiting -= 1
