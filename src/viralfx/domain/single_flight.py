"""One piece of work for all who want its result at the same time."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class SingleFlight(Generic[T]):
    """Runs at most one piece of work per key; who comes while it runs shares its outcome.

    The work has a task of its own, in the context of who came first. A waiter who is cancelled
    leaves the others alone; when the last one left, the work is cancelled. An error reaches all
    who wait, and nobody who comes later. Work must not wait for its own key.
    """

    def __init__(self) -> None:
        self._flights: dict[str, _Flight[T]] = {}

    async def run(self, key: str, work: Callable[[], Awaitable[T]]) -> T:
        """Return what ``work``, or the work of that key under way, returns; or raise its error."""
        flight = self._flights.get(key)
        if flight is None or flight.task.done():
            flight = self._flights[key] = _Flight(work, key)
            flight.task.add_done_callback(lambda _: self._forget(key, flight))
        flight.waiting += 1
        try:
            await asyncio.wait({flight.task})
        finally:
            flight.waiting -= 1
            if not flight.waiting and not flight.task.done():
                # Forgotten at once: who comes now must not join what is being cancelled.
                self._forget(key, flight)
                flight.task.cancel()
        return flight.task.result()

    def _forget(self, key: str, flight: "_Flight[T]") -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]


class _Flight(Generic[T]):
    def __init__(self, work: Callable[[], Awaitable[T]], key: str) -> None:
        self.waiting = 0
        self.task = asyncio.create_task(_call(work), name=f"flight-{key}")
        self.task.add_done_callback(_retrieve)


async def _call(work: Callable[[], Awaitable[T]]) -> T:
    return await work()


def _retrieve(task: asyncio.Task[T]) -> None:
    # When nobody waits any more, the error is nobody's: it must not be taken for an uncaught one.
    if not task.cancelled():
        task.exception()
