"""taskiq over our ledger, under taskiq's own worker; without Redis."""

from benchmarks.jobs.counter import ran
from benchmarks.jobs.peers.taskiq_redis_broker import worker_of

from viralfx.taskiq import LedgerBroker

DISTRIBUTIONS = ("taskiq", "viralfx", "asyncpg")
WORKER = worker_of("benchmarks.jobs.peers.taskiq_ledger")

broker = LedgerBroker()


@broker.task
async def do_nothing() -> None:
    """Do nothing."""
    ran()


class Producer:
    """Enqueues in the ledger."""

    gathers = True

    async def prepare(self) -> None:
        """Connect."""
        await broker.startup()
        self._jobs = await broker.job_service()

    async def enqueue(self) -> None:
        """Accept one message as a job."""
        await do_nothing.kiq()

    async def unfinished(self) -> int:
        """Count waiting and active jobs."""
        counts = (await self._jobs.queues())["default"]
        return counts.waiting + counts.scheduled + counts.active

    async def close(self) -> None:
        """Disconnect."""
        await broker.shutdown()
