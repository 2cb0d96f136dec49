"""litestar-queues with Postgres, by sqlspec and asyncpg."""

from benchmarks.jobs.peer import database_url
from benchmarks.jobs.peers.litestar_queues_backend import Enqueuer, config_of, worker_of
from litestar import Litestar
from litestar_queues import QueuePlugin
from litestar_queues.backends.sqlspec import SQLSpecBackendConfig
from sqlspec.adapters.asyncpg import AsyncpgConfig

DISTRIBUTIONS = ("litestar-queues", "sqlspec", "asyncpg")
WORKER = worker_of("benchmarks.jobs.peers.litestar_queues_postgres")
POOL = 20

postgres = AsyncpgConfig(connection_config={"dsn": database_url(), "max_size": POOL})
config = config_of(SQLSpecBackendConfig(sqlspec_config=postgres))
app = Litestar(plugins=[QueuePlugin(config)])


class Producer(Enqueuer):
    """Enqueues on Postgres."""

    def __init__(self) -> None:
        super().__init__(config)

    async def prepare(self) -> None:
        """Connect, and make the tables."""
        await super().prepare()
        await self._service.get_queue_backend().create_schema()
