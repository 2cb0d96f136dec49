"""litestar-queues with its Redis backend."""

from benchmarks.jobs.peer import SLOTS, redis_url
from benchmarks.jobs.peers.litestar_queues_backend import Enqueuer, config_of, worker_of
from litestar import Litestar
from litestar_queues import QueuePlugin
from litestar_queues.backends.redis import RedisBackendConfig
from redis.asyncio import BlockingConnectionPool, Redis

DISTRIBUTIONS = ("litestar-queues", "redis")
WORKER = worker_of("benchmarks.jobs.peers.litestar_queues_redis")

# Its own pool refuses the hundredth connection, and the worker loses that job.
pool = BlockingConnectionPool.from_url(redis_url(), max_connections=SLOTS, decode_responses=True)
config = config_of(RedisBackendConfig(client=Redis(connection_pool=pool)))
app = Litestar(plugins=[QueuePlugin(config)])


class Producer(Enqueuer):
    """Enqueues on Redis."""

    def __init__(self) -> None:
        super().__init__(config)
