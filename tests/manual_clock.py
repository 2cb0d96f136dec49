"""A clock that stands still until a test moves it: hours pass in microseconds."""

import asyncio
import heapq
from datetime import UTC, datetime, timedelta

_START = datetime(2026, 1, 6, 12, tzinfo=UTC)
MAX_TURNS = 1000


class ManualClock:
    """Implements ``viralfx.core.clock.Clock`` without any real time.

    Monotonic and wall-clock time move together. A cancelled sleep is removed.
    """

    def __init__(self, *, monotonic: float = 1000.0, now: datetime = _START) -> None:
        self._monotonic = monotonic
        self._epoch = now - timedelta(seconds=monotonic)
        self._order = 0
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []

    def monotonic(self) -> float:
        """Return seconds that only :meth:`advance` and :meth:`jump` move."""
        return self._monotonic

    def now(self) -> datetime:
        """Return UTC time that moves with the monotonic time."""
        return self._epoch + timedelta(seconds=self._monotonic)

    @property
    def sleeping(self) -> int:
        """Number of sleeps that have neither ended nor been cancelled."""
        return len(self._sleepers)

    async def sleep(self, seconds: float) -> None:
        """Return once the clock has advanced by ``seconds``; zero or less yields once."""
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        self._order += 1
        woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        sleeper = (self._monotonic + seconds, self._order, woken)
        heapq.heappush(self._sleepers, sleeper)
        try:
            await woken
        finally:
            if sleeper in self._sleepers:
                self._sleepers.remove(sleeper)
                heapq.heapify(self._sleepers)

    async def advance(self, seconds: float) -> None:
        """Move on, waking the sleepers that are due in order of time; then let the loop settle."""
        if seconds < 0:
            raise ValueError("time does not go backwards")
        until = self._monotonic + seconds
        await self.settle()
        while self._sleepers and self._sleepers[0][0] <= until:
            due, _, woken = heapq.heappop(self._sleepers)
            self._monotonic = max(self._monotonic, due)
            if not woken.done():
                woken.set_result(None)
            await self.settle()
        self._monotonic = until
        await self.settle()

    def jump(self, seconds: float) -> None:
        """Move on without waking sleepers, like a blocking call."""
        self._monotonic += seconds

    async def settle(self) -> None:
        """Run the loop until all tasks wait for time or for an external event."""
        # Only the loop's own queue shows exactly whether a task can run. A loop without it (uvloop)
        # gets a fixed, generous number of turns.
        queue = getattr(asyncio.get_running_loop(), "_ready", None)
        for turn in range(MAX_TURNS):
            await asyncio.sleep(0)
            idle = turn >= 200 if queue is None else not queue
            if idle:
                return
