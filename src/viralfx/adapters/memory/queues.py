"""In-process queues: jobs that live and end with this process, drained before it stops."""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable

from viralfx.domain.clock import Clock, finished_within
from viralfx.domain.errors import WorkLostError
from viralfx.domain.health import Observation, Status

_logger = logging.getLogger("viralfx.queues")

MemoryJob = Callable[[], Awaitable[None]]


class MemoryQueues:
    """Named queues of callables, each run in order, ``concurrency`` at a time per queue.

    Also their health check. Nothing survives the process: :class:`DrainQueues` therefore runs
    what waits as well, where queues that keep their jobs would hand them back.
    """

    def __init__(self, names: Iterable[str], *, concurrency: int = 10) -> None:
        self._queues = {name: _Queue(name, concurrency) for name in names}

    def submit(self, queue: str, job: MemoryJob) -> None:
        """Accept a job.

        Raises ``KeyError`` for an unknown queue and :class:`WorkLostError` once draining began.
        """
        self._queues[queue].submit(job)

    async def check(self) -> Observation:
        """Pass, with the counts of each queue."""
        return Observation(
            status=Status.PASS,
            message="All queues are healthy, in memory: their jobs end with this process",
            details=[queue.describe() for queue in self._queues.values()],
        )

    def close(self) -> None:
        """Accept nothing more."""
        for queue in self._queues.values():
            queue.closed = True

    @property
    def unfinished(self) -> int:
        """How many jobs wait or run."""
        return sum(len(queue.waiting) + len(queue.active) for queue in self._queues.values())

    async def join(self) -> None:
        """Return when no job waits or runs."""
        while running := [task for queue in self._queues.values() for task in queue.active]:
            await asyncio.wait(running)

    def cancel(self) -> None:
        """Give up what waits and cancel what runs."""
        for queue in self._queues.values():
            queue.waiting.clear()
            for task in queue.active:
                task.cancel()


class DrainQueues:
    """Shutdown stage: accepts no more jobs and finishes all there are."""

    def __init__(self, queues: MemoryQueues, clock: Clock) -> None:
        self._queues = queues
        self._clock = clock

    async def run(self, budget: float) -> None:
        """Wait for the jobs; raises :class:`WorkLostError` when some are left at the budget."""
        self._queues.close()
        if not self._queues.unfinished:
            return
        joined = asyncio.ensure_future(self._queues.join())
        try:
            if await finished_within(joined, budget, self._clock):
                return
        finally:
            joined.cancel()
        lost = self._queues.unfinished
        self._queues.cancel()
        raise WorkLostError(f"{lost} in-memory jobs did not finish within {budget:g} s")


class _Queue:
    def __init__(self, name: str, concurrency: int) -> None:
        self.name = name
        self.closed = False
        self.waiting: deque[MemoryJob] = deque()
        self.active: set[asyncio.Task[None]] = set()
        self._concurrency = concurrency
        self._completed = 0
        self._failed = 0

    def submit(self, job: MemoryJob) -> None:
        if self.closed:
            raise WorkLostError(f"queue {self.name} accepts no more jobs: the process is stopping")
        self.waiting.append(job)
        self._fill()

    def _fill(self) -> None:
        while self.waiting and len(self.active) < self._concurrency:
            task = asyncio.create_task(_run(self.waiting.popleft()), name=f"job-{self.name}")
            self.active.add(task)
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self.active.discard(task)
        if task.cancelled() or (error := task.exception()) is not None:
            self._failed += 1
            if not task.cancelled():
                _logger.error("Job failed", exc_info=error, extra={"queue": self.name})
        else:
            self._completed += 1
        self._fill()

    def describe(self) -> dict[str, object]:
        return {
            "name": self.name,
            "status": "ok",
            "metrics": {
                "waiting": len(self.waiting),
                "active": len(self.active),
                "completed": self._completed,
                "failed": self._failed,
            },
        }


async def _run(job: MemoryJob) -> None:
    await job()
