"""litestar-queues with any backend."""

from typing import Any

from benchmarks.jobs.counter import ran
from benchmarks.jobs.peer import SLOTS
from litestar_queues import QueueConfig, QueueService, WorkerConfig, task


def worker_of(module: str) -> tuple[str, ...]:
    """Return the arguments for Python that run its stand-alone worker."""
    litestar = ("-m", "benchmarks.jobs.with_uvloop", "litestar", "--app", f"{module}:app")
    return (*litestar, "queues", "run")


def config_of(backend: Any) -> QueueConfig:
    """Return the configuration of producer and worker."""
    # By default it runs one job at a time and claims ten.
    worker = WorkerConfig(placement="external", max_concurrency=SLOTS, batch_size=SLOTS)
    return QueueConfig(queue_backend=backend, worker=worker)


@task("do_nothing")
async def do_nothing() -> None:
    """Do nothing."""
    ran()


class Enqueuer:
    """Enqueues by its service."""

    gathers = True

    def __init__(self, config: QueueConfig) -> None:
        self._service = QueueService(config)

    async def prepare(self) -> None:
        """Connect, and create a schema if there is one."""
        await self._service.open()

    async def enqueue(self) -> None:
        """Enqueue one job."""
        await self._service.enqueue(do_nothing)

    async def unfinished(self) -> int:
        """Count pending, scheduled and running jobs."""
        counts = await self._service.get_statistics()
        return int(counts.pending + counts.scheduled + counts.running)

    async def close(self) -> None:
        """Disconnect."""
        await self._service.close()
