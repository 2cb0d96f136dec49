"""Plain taskiq over a Redis list, which forgets a job when a worker takes it."""

from benchmarks.jobs.counter import ran
from benchmarks.jobs.peer import SLOTS, redis_url
from benchmarks.jobs.peers.taskiq_redis_broker import worker_of
from redis.asyncio import Redis
from taskiq_redis import ListQueueBroker

DISTRIBUTIONS = ("taskiq", "taskiq-redis", "redis")
WORKER = worker_of("benchmarks.jobs.peers.taskiq_list")

# With redis-py's own limit of 5 s an idle worker ends repeatedly.
broker = ListQueueBroker(redis_url(), max_connection_pool_size=SLOTS + 1, socket_timeout=None)


@broker.task
async def do_nothing() -> None:
    """Do nothing."""
    ran()


class Producer:
    """Enqueues on the list."""

    gathers = True

    async def prepare(self) -> None:
        """Connect."""
        await broker.startup()
        self._redis = Redis(connection_pool=broker.connection_pool)

    async def enqueue(self) -> None:
        """Push one message."""
        await do_nothing.kiq()

    async def unfinished(self) -> int:
        """Count jobs that no worker has taken."""
        return int(await self._redis.llen(broker.queue_name))

    async def close(self) -> None:
        """Disconnect."""
        await broker.shutdown()
