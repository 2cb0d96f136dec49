"""One queue of one worker: when it claims jobs, and which."""

import asyncio
import heapq
import random
from collections.abc import Callable, Sequence

from viralfx.domain.clock import Clock, finished_within
from viralfx.domain.jobs.heartbeat import Heartbeat
from viralfx.domain.jobs.ledger import JobLedger
from viralfx.domain.jobs.reach import LedgerReach
from viralfx.domain.jobs.slots import Slots
from viralfx.domain.jobs.transport import Bell

DEAF_INTERVAL = 0.2
"""Seconds between looks, at most, while no bell would be heard."""

_MOST_DUE_TIMES = 1000

_EXACTLY = 0.002
"""Seconds after the moment a job gets due by this process's clock, so that it is by any."""


class QueueConsumer:
    """Claims jobs of a queue for its free slots.

    It claims what a bell told of, or looks: every ``look_interval``, when a job that it knows of
    gets due, and at once while the last look found as much as it could take. A claim that fails
    is tried again, for ever.
    """

    def __init__(
        self,
        slots: Slots,
        *,
        ledger: JobLedger,
        worker: str,
        heartbeat: Heartbeat,
        reach: LedgerReach,
        clock: Clock,
        look_interval: float,
        hears: Callable[[str], bool],
        ring: Callable[[str, Sequence[str]], None],
    ) -> None:
        self.queue = slots.queue
        self.slots = slots
        self._ledger = ledger
        self._worker = worker
        self._heartbeat = heartbeat
        self._reach = reach
        self._clock = clock
        self._look_interval = look_interval
        self._hears = hears
        self._ring = ring
        self._rng = random.Random()  # noqa: S311 - it spreads load only
        self._rung: dict[str, None] = {}
        self._more = False
        self._look_at = 0.0
        self._not_before = 0.0
        self._due: list[float] = []
        self._stopping = False
        self._wake = asyncio.Event()
        self._covered = asyncio.Event()
        """Set once the next claim was made."""
        slots.subscribe(self.wake, self.remember_due)

    def busy_before(self, moment: float) -> bool:
        """Tell whether it has jobs, or knows of one that gets due before a monotonic time."""
        return self.slots.active > 0 or (bool(self._due) and self._due[0] <= moment)

    # -- why to claim ------------------------------------------------------------------------

    async def hear(self, bell: Bell) -> None:
        """Take in a bell; return when there is time for another.

        That is when a claim was made since, and there is a free slot all the same: who is busy
        takes no more bells than it runs jobs, and leaves the others to workers that have time.
        """
        covered = self._covered
        if not self._more:
            room = max(0, self.slots.free - len(self._rung))
            self._rung.update(dict.fromkeys(bell.ids[:room]))
            if rest := bell.ids[room:]:
                # Others may have time; and from now on this worker looks without being told.
                self._more = True
                self._ring(self.queue, rest)
            self._wake.set()
        await covered.wait()
        await self.slots.room.wait()

    def look(self) -> None:
        """Look into the ledger as soon as there is a free slot."""
        self._look_at = 0.0
        self._wake.set()

    def wake(self) -> None:
        """Think again."""
        self._wake.set()

    def remember_due(self, seconds: float) -> None:
        """Look, too, when ``seconds`` have passed."""
        if len(self._due) < _MOST_DUE_TIMES:
            heapq.heappush(self._due, self._clock.monotonic() + seconds + _EXACTLY)
            self._wake.set()

    def stop(self) -> Sequence[str]:
        """Claim nothing more; return the ids that were heard of and not claimed."""
        self._stopping = True
        self.slots.stop()
        self._wake.set()
        heard, self._rung = tuple(self._rung), {}
        return heard

    # -- claiming ----------------------------------------------------------------------------

    async def run(self) -> None:
        """Claim until stopped."""
        try:
            while not self._stopping:
                self._wake.clear()
                pause = self._pause()
                if pause is not None:
                    await self._wait(pause)
                elif self._more or not self._rung or self._is_time_to_look():
                    # Also while bells keep ringing: for what is due without one, it is the only
                    # way to be run.
                    await self._look()
                else:
                    await self._claim_rung()
        finally:
            self._reach.forget(self._step)

    def _pause(self) -> float | None:
        """Return the seconds to wait for before claiming; None: none."""
        now = self._clock.monotonic()
        if self.slots.free <= 0 or not self._heartbeat.secure(now):
            return float("inf")  # a change of either wakes
        if now < self._not_before:
            return self._not_before - now
        if self._more or self._rung:
            return None
        return None if self._is_time_to_look() else self._next_look() - now

    def _next_look(self) -> float:
        return min(self._look_at, self._due[0]) if self._due else self._look_at

    def _is_time_to_look(self) -> bool:
        return self._clock.monotonic() >= self._next_look()

    async def _wait(self, seconds: float) -> None:
        if seconds == float("inf"):
            await self._wake.wait()
            return
        woken = asyncio.ensure_future(self._wake.wait())
        try:
            _ = await finished_within(woken, seconds, self._clock)
        finally:
            woken.cancel()

    async def _look(self) -> None:
        # Whatever gives reason to look from here on gives reason to look again.
        now, interval = self._clock.monotonic(), self._look_interval
        while self._due and self._due[0] <= now:
            heapq.heappop(self._due)
        if not self._hears(self.queue):
            interval = min(interval, DEAF_INTERVAL)
        self._look_at = now + interval * self._rng.uniform(0.9, 1.0)
        self._rung.clear()
        self._more = False
        limit = self.slots.free
        if await self._claim(limit, None) == limit:
            self._more = True

    async def _claim_rung(self) -> None:
        ids = list(self._rung)[: self.slots.free]
        for job_id in ids:
            del self._rung[job_id]
        if await self._claim(self.slots.free, ids) < len(ids):
            # Somebody found them by looking, maybe in place of others that are due.
            self.look()

    async def _claim(self, limit: int, ids: Sequence[str] | None) -> int:
        covered, self._covered = self._covered, asyncio.Event()
        try:
            claims = await self._ledger.claim(self.queue, self._worker, limit, ids)
        except Exception as error:  # noqa: BLE001 - a queue is never left alone
            # What a bell told of is found by looking.
            pause = self._reach.failed(self._step, error)
            self._look_at = self._not_before = self._clock.monotonic() + pause
            return 0
        finally:
            covered.set()
        self._reach.succeeded(self._step)
        for claim in claims:
            self.slots.begin(claim)
        return len(claims)

    @property
    def _step(self) -> str:
        return f"claim {self.queue}"
