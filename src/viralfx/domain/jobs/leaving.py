"""How a worker leaves: in order, within a budget, whatever its tasks and its ledger do."""

import asyncio
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from viralfx.domain.clock import Clock, finished_within
from viralfx.domain.errors import WorkLostError
from viralfx.domain.jobs.consumer import QueueConsumer
from viralfx.domain.jobs.ledger import JobLedger
from viralfx.domain.jobs.reach import LedgerReach
from viralfx.domain.jobs.ringing import Ringer
from viralfx.domain.jobs.settling import Settler

_logger = logging.getLogger("viralfx.jobs")

_GRACE = 1.0
"""Seconds, at most, for tasks to end that were cancelled to be handed back."""

_LAST_WORDS = 2.0
"""Seconds, at most, for handing back and for the last bells."""

_LAST_CLAIM = 2.0
"""Seconds, at most, for claims that are under way to end; else what they give is handed back
only at the end."""

_LEAST = 0.05
"""Seconds that a step gets, however late it is."""

_NOTICE = 0.05
"""Seconds between two looks at what a ledger in memory has left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """How a worker left."""

    finished: int
    """Jobs that were active and ended within the budget."""
    handed_back: int
    """Jobs that were active, or just claimed, and wait again at no cost."""
    ignoring: int
    """Tasks that ignored their cancellation and were left behind."""
    unrecorded: int
    """Jobs that could not be handed back, or their outcome recorded: they run again once the
    lease is over."""

    def fields(self) -> dict[str, int]:
        """Return them by the names that they have in log lines."""
        return {
            "finished": self.finished,
            "handedBack": self.handed_back,
            "ignoring": self.ignoring,
            "unrecorded": self.unrecorded,
        }


class Departure:
    """Lets go of everything a worker holds."""

    def __init__(
        self,
        *,
        ledger: JobLedger,
        worker: str,
        consumers: Sequence[QueueConsumer],
        settler: Settler,
        reach: LedgerReach,
        ringer: Ringer,
        clock: Clock,
        durable: bool,
    ) -> None:
        self.keeping: list[asyncio.Task[None]] = []
        """What jobs that still run depend on."""
        self.background: list[asyncio.Task[None]] = []
        self.listeners: list[asyncio.Task[None]] = []
        self.claiming: list[asyncio.Task[None]] = []
        self._ledger = ledger
        self._worker = worker
        self._consumers = consumers
        self._settler = settler
        self._reach = reach
        self._ringer = ringer
        self._clock = clock
        self._durable = durable

    async def run(self, budget: float) -> Left:
        """Leave. Raises :class:`WorkLostError` when jobs are lost."""
        ends_at = self._clock.monotonic() + budget
        last_words = min(_LAST_WORDS, budget / 5)
        call_back_at = ends_at - last_words - min(_GRACE, budget / 5)
        recorded = sum(consumer.slots.recorded for consumer in self._consumers)
        for task in (*self.background, *self.listeners):
            task.cancel()
        if not self._durable and self.claiming:
            await self._run_what_waits(call_back_at)
        for consumer in self._consumers:
            self._ringer.ring(consumer.queue, consumer.stop())
        await self._ended(self.claiming, min(_LAST_CLAIM, budget / 5))
        for task in self.claiming:
            task.cancel()
        await self._until_idle(call_back_at)
        for consumer in self._consumers:
            consumer.slots.call_back()
        await self._until_idle(ends_at - last_words)
        ignoring = sum(consumer.slots.leave_all_behind() for consumer in self._consumers)
        unsettled = sum(consumer.slots.active for consumer in self._consumers) + ignoring
        left_over = await self._hand_back(ends_at - last_words / 4)
        self._settler.cancel()
        await self._ringer.close(max(0.0, ends_at - self._clock.monotonic()))
        left = Left(
            finished=sum(consumer.slots.recorded for consumer in self._consumers) - recorded,
            handed_back=sum(consumer.slots.handed_back for consumer in self._consumers)
            + (left_over or 0),
            ignoring=ignoring,
            unrecorded=unsettled if left_over is None else 0,
        )
        _logger.info("Job worker left", extra=left.fields())
        if not self._durable:
            await self._count_losses(budget)
        return left

    async def _run_what_waits(self, until: float) -> None:
        queues = [consumer.queue for consumer in self._consumers]
        while self._clock.monotonic() < until:
            counts = await self._ledger.counts()
            waiting = any(counts[queue].waiting for queue in queues if queue in counts)
            if not waiting and not any(c.busy_before(until) for c in self._consumers):
                return
            for consumer in self._consumers:
                consumer.look()
            await self._clock.sleep(_NOTICE)

    async def _until_idle(self, until: float) -> None:
        # What is claimed last, and what is recorded under another task, comes while this waits.
        while runners := [r for consumer in self._consumers for r in consumer.slots.runners]:
            left = until - self._clock.monotonic()
            if left <= 0:
                return
            await self._ended(runners, left)

    async def _hand_back(self, until: float) -> int | None:
        """Leave the ledger; return how many jobs were still ours, None when it does not answer."""
        if not self.keeping:
            return 0
        # Ended before, or a late renewal would make this worker known again.
        for task in self.keeping:
            task.cancel()
        await self._ended(self.keeping, _LEAST)
        left = max(_LEAST, until - self._clock.monotonic())
        leaving = asyncio.create_task(self._leave(), name="job-leave")
        await self._ended([leaving], left)
        if not leaving.done():
            leaving.cancel()
            _logger.error("Job worker could not leave the ledger: it does not answer")
            return None
        if (error := leaving.exception()) is not None:
            _logger.error("Job worker could not leave the ledger", exc_info=error)
            return None
        returned = leaving.result()
        for queue, ids in returned.items():
            self._ringer.ring(queue, ids)
        return sum(len(ids) for ids in returned.values())

    async def _leave(self) -> Mapping[str, Sequence[str]]:
        return await self._reach.until_done("leave", lambda: self._ledger.leave(self._worker))

    async def _count_losses(self, budget: float) -> None:
        counts = (await self._ledger.counts()).values()
        lost = sum(queue.waiting + queue.scheduled + queue.active for queue in counts)
        if lost:
            raise WorkLostError(f"{lost} in-memory jobs did not finish within {budget:g} s")

    async def _ended(self, tasks: Iterable[asyncio.Task[Any]], seconds: float) -> None:
        """Return when all tasks are done, or after ``seconds``; they are left alone."""
        if unfinished := [task for task in tasks if not task.done()]:
            ended = asyncio.ensure_future(asyncio.wait(unfinished))
            try:
                _ = await finished_within(ended, seconds, self._clock)
            finally:
                ended.cancel()
