"""The bulkhead: a limit on concurrent calls."""

import asyncio
import functools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar, cast

from viralfx.core.errors import require_count, require_not_negative
from viralfx.core.events import Listener, notify
from viralfx.resilience._callables import (
    CallRejectedError,
    is_async,
    operation_name,
    require_callable,
)

T = TypeVar("T")
AsyncCallableT = TypeVar("AsyncCallableT", bound=Callable[..., Awaitable[object]])


class BulkheadFullError(CallRejectedError):
    """The bulkhead is full: the call was not made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BulkheadFull:
    """Event: a call was not made."""

    name: str
    operation: str


class Bulkhead:
    """Runs at most ``limit`` calls at a time; up to ``queue`` more wait in order of arrival.

    A further call raises :class:`BulkheadFullError` at once. A caller that is cancelled while it
    waits leaves the queue. Use it as a decorator of ``async def``, with :meth:`execute`, or as
    ``async with bulkhead:``.

    A bulkhead belongs to the event loop that uses it first, until that loop is closed. A call from
    another one raises ``RuntimeError``: it could not wake a caller that waits.

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
        """The name of the bulkhead in errors and events."""
        self._queue = queue
        self._waiting = 0
        self._limit = limit
        self._loop: asyncio.AbstractEventLoop | None = None
        self._permits = asyncio.Semaphore(limit)
        self._listeners = listeners

    async def __aenter__(self) -> None:
        """Acquire a permit; wait for one if the queue has a free place."""
        await self._acquire("")

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Release the permit."""
        self._permits.release()

    async def execute(self, operation: Callable[[], Awaitable[T]], name: str = "") -> T:
        """Await ``operation()`` once a permit is free. Events carry ``name`` as the operation."""
        require_callable(operation)
        await self._acquire(name)
        try:
            return await operation()
        finally:
            self._permits.release()

    def __call__(self, function: AsyncCallableT) -> AsyncCallableT:
        """Decorate a coroutine function.

        Raises ``TypeError`` for anything else: a plain function blocks the loop, so it is never
        concurrent with another call.
        """
        if not is_async(function):
            raise TypeError("a bulkhead limits the calls that run on a loop: make it `async def`")
        name = operation_name(function)

        @functools.wraps(function)
        async def guarded(*args: object, **kwargs: object) -> object:
            await self._acquire(name)
            try:
                return await function(*args, **kwargs)
            finally:
                self._permits.release()

        return cast("AsyncCallableT", guarded)

    async def _acquire(self, operation: str) -> None:
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._move_to(loop)
        if not self._permits.locked():
            # Does not suspend, so that no other task can take the permit in between.
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

    def _move_to(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._loop is not None and not self._loop.is_closed():
            raise RuntimeError(
                f"bulkhead {self.name} belongs to another event loop: make one for each loop"
            )
        # Calls of a closed loop never release their permits.
        self._loop, self._waiting = loop, 0
        self._permits = asyncio.Semaphore(self._limit)
