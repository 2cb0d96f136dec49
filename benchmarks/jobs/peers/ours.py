"""Ours, wired as the service wires it: a ledger in Postgres, bells over Redis where it is set.

Run as a program it is the worker.
"""

import asyncio
import os
import signal
import uuid
from dataclasses import dataclass

import uvloop
from benchmarks.jobs.noop import TASK, noop

from viralfx.adapters.codec import MsgspecCodec
from viralfx.adapters.memory import MemoryBell
from viralfx.adapters.postgres import PostgresJobLedger
from viralfx.adapters.taskiq import StreamTransport
from viralfx.bootstrap.assembly import Assembly, assemble
from viralfx.domain.jobs.ringing import Ringer
from viralfx.domain.jobs.service import JobService
from viralfx.domain.jobs.tasks import TaskRegistry, declared_task
from viralfx.domain.jobs.transport import JobTransport
from viralfx.domain.jobs.worker import JobWorker
from viralfx.settings import Settings, read_settings

DISTRIBUTIONS = ("viralfx", "asyncpg", "taskiq", "taskiq-redis", "redis")
WORKER = ("-m", "benchmarks.jobs.peers.ours")
DRAIN_SECONDS = 5.0


@dataclass(frozen=True)
class Wired:
    """One process."""

    settings: Settings
    assembly: Assembly
    ledger: PostgresJobLedger
    transport: JobTransport
    tasks: TaskRegistry
    codec: MsgspecCodec


def wire() -> Wired:
    """Wire a process from the environment."""
    settings = read_settings(os.environ)
    assembly = assemble(settings)
    declared = declared_task(noop)
    if assembly.database is None or declared is None:
        raise RuntimeError("DATABASE_URL is not set")
    return Wired(
        settings=settings,
        assembly=assembly,
        ledger=PostgresJobLedger(assembly.database),
        transport=StreamTransport(assembly.redis) if assembly.redis else MemoryBell(),
        tasks=TaskRegistry([declared]),
        codec=MsgspecCodec(),
    )


class Producer:
    """Accepts jobs as the API does, without HTTP."""

    gathers = True

    async def prepare(self) -> None:
        """Connect."""
        self._wired = wired = wire()
        await wired.assembly.operations.start()
        self._ringer = Ringer(wired.transport)
        self._service = JobService(
            ledger=wired.ledger,
            tasks=wired.tasks,
            codec=wired.codec,
            queues=wired.settings.queues,
            ring=self._ringer.ring,
        )

    async def enqueue(self) -> None:
        """Accept one job."""
        await self._service.accept(TASK, b"null")

    async def unfinished(self) -> int:
        """Count what waits or is active."""
        counts = (await self._service.counts())["default"]
        return counts.waiting + counts.scheduled + counts.active

    async def close(self) -> None:
        """Disconnect, as a process does that leaves in order."""
        await self._ringer.close()
        self._wired.assembly.operations.shutdown.trigger("the queue is empty")
        await self._wired.assembly.operations.shutdown.run()


async def work() -> None:
    """Run jobs until SIGTERM."""
    wired = wire()
    await wired.assembly.operations.start()
    worker = JobWorker(
        ledger=wired.ledger,
        transport=wired.transport,
        tasks=wired.tasks,
        codec=wired.codec,
        queues=dict.fromkeys(wired.settings.queues, wired.settings.job.concurrency),
        worker=str(uuid.uuid4()),
    )
    worker.start()
    terminated = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, terminated.set)
    await terminated.wait()
    await worker.drain(DRAIN_SECONDS)


if __name__ == "__main__":
    uvloop.run(work())
