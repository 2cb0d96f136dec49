"""arq over Redis."""

from typing import Any

from arq import create_pool
from arq.connections import RedisSettings
from arq.constants import default_queue_name
from benchmarks.jobs.counter import ran
from benchmarks.jobs.peer import SLOTS, redis_url

DISTRIBUTIONS = ("arq", "redis")
WORKER = (
    *("-m", "benchmarks.jobs.with_uvloop", "arq"),
    "benchmarks.jobs.peers.arq_redis.WorkerSettings",
    *("--custom-log-dict", "benchmarks.jobs.peers.arq_redis.QUIET"),
)
QUIET = {"version": 1, "root": {"level": "WARNING"}}
"""As with the others: no line for each job."""


async def do_nothing(_context: Any) -> None:
    """Do nothing."""
    ran()


class WorkerSettings:
    """Settings of the worker."""

    functions = (do_nothing,)
    redis_settings = RedisSettings.from_dsn(redis_url())
    max_jobs = SLOTS


class Producer:
    """Enqueues with arq's defaults: results are kept for an hour."""

    gathers = True

    async def prepare(self) -> None:
        """Connect."""
        self._pool = await create_pool(WorkerSettings.redis_settings)

    async def enqueue(self) -> None:
        """Enqueue one job."""
        await self._pool.enqueue_job("do_nothing")

    async def unfinished(self) -> int:
        """Count the jobs in the queue; a job leaves it when it ends."""
        return int(await self._pool.zcard(default_queue_name))

    async def close(self) -> None:
        """Disconnect."""
        await self._pool.aclose()
