"""Ringing without waiting: who accepts a job never depends on the transport."""

import asyncio
import logging
from collections.abc import Iterable
from contextvars import Context

from viralfx.domain.clock import Clock, SystemClock, finished_within
from viralfx.domain.errors import ViralFXError
from viralfx.domain.jobs.transport import Bell, JobTransport

_logger = logging.getLogger("viralfx.jobs")

IDS_PER_BELL = 100


class Ringer:
    """Sends bells in the background: few, and none when the transport is away.

    What is rung while a bell is being sent goes into the next one. Nothing is ever waited for,
    and nothing kept for long: a bell that is lost, here as anywhere, costs its jobs no more than
    the time until a worker looks by itself.
    """

    def __init__(
        self, transport: JobTransport, *, clock: Clock | None = None, capacity: int = 10_000
    ) -> None:
        """``capacity`` is how many ids may wait to be rung; beyond it they are dropped."""
        self._transport = transport
        self._clock = clock or SystemClock()
        self._capacity = capacity
        self._waiting: dict[str, dict[str, None]] = {}
        self._count = 0
        self._sending: asyncio.Task[None] | None = None
        self._closed = False
        self._lost = False
        self.dropped = 0
        """Ids that were not rung."""

    def ring(self, queue: str, ids: Iterable[str]) -> None:
        """Have workers told of due jobs. Neither waits nor raises; after :meth:`close` in vain."""
        if self._closed:
            return
        waiting = self._waiting.setdefault(queue, {})
        for job_id in ids:
            if self._count >= self._capacity:
                self.dropped += 1
            elif job_id not in waiting:
                waiting[job_id] = None
                self._count += 1
        if self._count and self._sending is None:
            # Not in the caller's context: it serves others, too.
            self._sending = asyncio.create_task(
                self._send_all(), name="job-bells", context=Context()
            )

    async def close(self, budget: float = 1.0) -> None:
        """Send what waits, within ``budget`` seconds; doing it twice is harmless."""
        self._closed = True
        if (sending := self._sending) is not None:
            try:
                await finished_within(sending, budget, self._clock)
            finally:
                sending.cancel()

    async def _send_all(self) -> None:
        try:
            while self._waiting:
                await self._send(self._next())
        finally:
            self._sending = None

    def _next(self) -> Bell:
        queue, waiting = next(iter(self._waiting.items()))
        # Taken out and put back at the end, so that one busy queue does not silence the others.
        del self._waiting[queue]
        ids = tuple(waiting)
        if rest := ids[IDS_PER_BELL:]:
            self._waiting[queue] = dict.fromkeys(rest)
        self._count -= len(ids) - len(rest)
        return Bell(queue=queue, ids=ids[:IDS_PER_BELL])

    async def _send(self, bell: Bell) -> None:
        if not bell.ids:
            return
        try:
            await self._transport.ring(bell)
        except Exception as error:
            # A boundary: nobody waits for this, and any error means the same here. What waits is
            # dropped as well: by the time the transport is back, workers have found it.
            self.dropped += len(bell.ids) + self._count
            self._waiting.clear()
            self._count = 0
            if not self._lost:
                self._lost = True
                foreseen = isinstance(error, OSError | ViralFXError)
                _logger.warning(
                    "Job bells cannot be rung; workers look by themselves",
                    exc_info=None if foreseen else error,
                    extra={"reason": str(error)},
                )
        else:
            if self._lost:
                self._lost = False
                _logger.info("Job bells ring again")
