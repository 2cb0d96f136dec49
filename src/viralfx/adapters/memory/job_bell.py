"""Bells for the workers of this process: queues of the event loop."""

import asyncio
import logging
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable

from viralfx.domain.jobs.transport import Bell

_logger = logging.getLogger("viralfx.queues")
_MOST_BELLS = 10_000
"""For each queue; whoever hears none of so many finds the jobs by looking."""


class MemoryBell:
    """Implements ``JobTransport`` in process. Bells of a queue go to its listeners in turn.

    ``complete`` tells whether all who ring do it here; otherwise workers are not to rely on it.
    """

    def __init__(self, *, complete: bool = True) -> None:
        self._complete = complete
        self._bells: defaultdict[str, asyncio.Queue[Bell]] = defaultdict(
            lambda: asyncio.Queue(_MOST_BELLS)
        )
        self._listeners: Counter[str] = Counter()
        self._closed = False

    async def ring(self, bell: Bell) -> None:
        """Leave a bell to whoever listens next; what is too many is lost."""
        if self._closed:
            raise ConnectionError("the bell was closed")
        bells = self._bells[bell.queue]
        if not bells.full():
            bells.put_nowait(bell)

    async def listen(self, queue: str, hear: Callable[[Bell], Awaitable[None]], slots: int) -> None:
        """Hear bells until cancelled."""
        bells, free = self._bells[queue], asyncio.Semaphore(slots)

        async def call(bell: Bell) -> None:
            try:
                await hear(bell)
            except Exception:
                # A listener outlives whatever one bell leads to.
                _logger.exception("A bell was heard in vain", extra={"queue": queue})
            finally:
                free.release()

        self._listeners[queue] += 1
        try:
            async with asyncio.TaskGroup() as calls:
                while True:
                    await free.acquire()
                    calls.create_task(call(await bells.get()))
        finally:
            self._listeners[queue] -= 1

    def hears(self, queue: str) -> bool:
        """Tell whether somebody listens to a queue, and hears of all its jobs."""
        return self._complete and not self._closed and self._listeners[queue] > 0

    async def close(self) -> None:
        """Take no more bells, and forget those that nobody heard."""
        self._closed = True
        for bells in self._bells.values():
            while not bells.empty():
                bells.get_nowait()
