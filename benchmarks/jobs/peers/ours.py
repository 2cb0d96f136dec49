"""viralfx: jobs accepted as in the API, without HTTP; run by the service's own worker."""

import os

from benchmarks.jobs.empty_task import TASK

from viralfx.bootstrap.assembly import assemble
from viralfx.settings import read_settings

DISTRIBUTIONS = ("viralfx", "asyncpg", "taskiq", "taskiq-redis", "redis")
WORKER = ("-m", "viralfx", "worker")


class Producer:
    """Accepts jobs in this process."""

    gathers = True

    async def prepare(self) -> None:
        """Wire from the environment, and connect."""
        self._assembly = assemble(read_settings(os.environ))
        await self._assembly.operations.start()
        self._service = self._assembly.jobs.service

    async def enqueue(self) -> None:
        """Accept one job."""
        await self._service.accept(TASK, b"null")

    async def unfinished(self) -> int:
        """Count waiting and active jobs."""
        counts = (await self._service.queues())["default"]
        return counts.waiting + counts.scheduled + counts.active

    async def close(self) -> None:
        """Close in order, after the last notifications."""
        self._assembly.operations.shutdown.trigger("the queue is empty")
        await self._assembly.operations.shutdown.run()
