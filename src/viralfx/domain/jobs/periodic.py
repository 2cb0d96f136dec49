"""Jobs that are due once per period over all workers, without anybody in charge of that."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from viralfx.domain.clock import Clock
from viralfx.domain.correlation import new_correlation_id
from viralfx.domain.jobs.job import JobDraft, new_job_id
from viralfx.domain.jobs.ledger import JobLedger
from viralfx.domain.jobs.reach import LedgerReach
from viralfx.domain.jobs.tasks import TaskRegistry
from viralfx.domain.resilience.quantities import require_positive

_LONGEST_SLEEP = 60.0
"""Seconds after which the wall clock is read again: it may be set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Periodic:
    """A task to be run once in each period of ``every`` seconds since 1970, in UTC.

    Its job's key holds the number of the period, so that the ledger keeps one of those that the
    workers ask for. Finished jobs must be kept for longer than a period.
    """

    task: str
    every: float
    payload: bytes = b"null"

    def __post_init__(self) -> None:
        """Refuse a period that is not above zero. Raises ``ValueError``."""
        require_positive("every", self.every)

    def period(self, timestamp: float) -> int:
        """Return the number of the period that a time, in seconds since 1970, is in."""
        return math.floor(timestamp / self.every)


class Schedule:
    """Asks for the periodic jobs when their periods begin, and at the start for those begun."""

    def __init__(
        self,
        periodic: Iterable[Periodic],
        *,
        ledger: JobLedger,
        tasks: TaskRegistry,
        reach: LedgerReach,
        clock: Clock,
        ring: Callable[[str, Sequence[str]], None],
    ) -> None:
        """Find the queues of the tasks. Raises :class:`UnknownTaskError`."""
        self._periodic = tuple(periodic)
        self._queues = {each.task: tasks.find(each.task).queue for each in self._periodic}
        self._ledger = ledger
        self._reach = reach
        self._clock = clock
        self._ring = ring
        self._asked: dict[Periodic, int] = {}
        """The period that was last asked for."""

    async def run(self) -> None:
        """Ask until cancelled."""
        try:
            while self._periodic:
                await self._clock.sleep(await self._ask_for_all())
        finally:
            self._reach.forget("periodic")

    async def _ask_for_all(self) -> float:
        """Return the seconds until something is to be asked for again."""
        pause = _LONGEST_SLEEP
        for each in self._periodic:
            now = self._clock.now().timestamp()
            period = each.period(now)
            if self._asked.get(each, period - 1) < period:
                try:
                    await self._ask_for(each, period)
                except Exception as error:  # noqa: BLE001 - it must not keep the others
                    pause = min(pause, self._reach.failed("periodic", error))
                    continue
                self._asked[each] = period
                self._reach.succeeded("periodic")
            pause = min(pause, (period + 1) * each.every - now)
        return pause

    async def _ask_for(self, each: Periodic, period: int) -> None:
        draft = JobDraft(
            id=new_job_id(),
            queue=self._queues[each.task],
            task=each.task,
            payload=each.payload,
            # With a space, which no client's key has.
            key=f"periodic {each.task}:{period}",
            correlation_id=new_correlation_id(),
        )
        (accepted,) = await self._ledger.accept([draft])
        if accepted.created:
            self._ring(draft.queue, (draft.id,))
