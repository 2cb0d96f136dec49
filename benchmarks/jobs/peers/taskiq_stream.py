"""Plain taskiq over a Redis stream. Acknowledged entries stay in the stream untrimmed."""

from benchmarks.jobs.counter import ran
from benchmarks.jobs.peer import SLOTS, redis_url
from benchmarks.jobs.peers.taskiq_redis_broker import worker_of
from redis.asyncio import Redis
from taskiq_redis import RedisStreamBroker

DISTRIBUTIONS = ("taskiq", "taskiq-redis", "redis")
WORKER = worker_of("benchmarks.jobs.peers.taskiq_stream")

broker = RedisStreamBroker(redis_url(), consumer_id="0", max_connection_pool_size=SLOTS + 1)


@broker.task
async def do_nothing() -> None:
    """Do nothing."""
    ran()


class Producer:
    """Enqueues on the stream."""

    gathers = True

    async def prepare(self) -> None:
        """Make the stream and its group."""
        await broker.startup()
        self._redis = Redis(connection_pool=broker.connection_pool)

    async def enqueue(self) -> None:
        """Add one entry."""
        await do_nothing.kiq()

    async def unfinished(self) -> int:
        """Count undelivered and unacknowledged jobs."""
        (group,) = await self._redis.xinfo_groups(broker.queue_name)
        return int(group["lag"] or 0) + int(group["pending"])

    async def close(self) -> None:
        """Disconnect."""
        await broker.shutdown()
