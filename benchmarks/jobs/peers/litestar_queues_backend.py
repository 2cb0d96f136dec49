"""litestar-queues, whatever keeps its jobs."""

from typing import Any

from benchmarks.jobs.peer import SLOTS
from benchmarks.jobs.tally import ran
from litestar_queues import QueueConfig, QueueService, WorkerConfig, task


def worker_of(module: str) -> tuple[str, ...]:
    """Return the arguments for Python that run its stand-alone worker."""
    litestar = ("-m", "benchmarks.jobs.on_uvloop", "litestar", "--app", f"{module}:app")
    return (*litestar, "queues", "run")


def config_of(backend: Any) -> QueueConfig:
    """Return the configuration of producer and worker."""
    # By default it runs one job at a time and claims ten.
    worker = WorkerConfig(placement="external", max_concurrency=SLOTS, batch_size=SLOTS)
    return QueueConfig(queue_backend=backend, worker=worker)


@task("noop")
async def noop() -> None:
    """Do nothing."""
    ran()


class Enqueuer:
    """Enqueues by its service."""

    gathers = True

    def __init__(self, config: QueueConfig) -> None:
        self._service = QueueService(config)

    async def prepare(self) -> None:
        """Connect, and make a schema where there is one."""
        await self._service.open()

    async def enqueue(self) -> None:
        """Enqueue one job."""
        await self._service.enqueue(noop)

    async def unfinished(self) -> int:
        """Count what is pending, scheduled or running."""
        counts = await self._service.get_statistics()
        return int(counts.pending + counts.scheduled + counts.running)

    async def close(self) -> None:
        """Disconnect."""
        await self._service.close()
