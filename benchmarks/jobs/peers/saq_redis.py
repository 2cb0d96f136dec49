"""SAQ over Redis."""

from typing import Any

from benchmarks.jobs.counter import ran
from benchmarks.jobs.peer import SLOTS, redis_url
from saq import Queue

DISTRIBUTIONS = ("saq", "redis")
WORKER = (
    *("-m", "benchmarks.jobs.with_uvloop", "saq"),
    "benchmarks.jobs.peers.saq_redis.settings",
)

queue = Queue.from_url(redis_url())


async def do_nothing(_context: Any) -> None:
    """Do nothing."""
    ran()


settings = {"queue": queue, "functions": [do_nothing], "concurrency": SLOTS}


class Producer:
    """Enqueues with SAQ's defaults: results are kept for ten minutes."""

    gathers = True

    async def prepare(self) -> None:
        """Connect."""
        await queue.connect()

    async def enqueue(self) -> None:
        """Enqueue one job."""
        await queue.enqueue("do_nothing")

    async def unfinished(self) -> int:
        """Count queued, scheduled and active jobs."""
        return int(await queue.count("incomplete"))

    async def close(self) -> None:
        """Disconnect."""
        await queue.disconnect()
