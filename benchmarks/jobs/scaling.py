"""The rate at which a number of worker processes empty one queue, and the cores that are busy."""

import asyncio
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import asyncpg
from benchmarks.jobs.counter import COUNTS, Count, CountReader
from benchmarks.jobs.cpu_seconds import cpu_seconds
from benchmarks.jobs.testbed import Testbed
from benchmarks.servers import Server, worker

from viralfx.core.ids import new_job_id
from viralfx.jobs.model import JobDraft
from viralfx.jobs.postgres import ledger_sql
from viralfx.jobs.postgres.enqueue import accept
from viralfx.postgres.migrations import Statements
from viralfx.settings import DatabaseSettings

BATCH = 1_000
"""Jobs of one statement that fills the queue."""
POLL_SECONDS = 0.005
MAX_SECONDS = 120.0


class ScalingError(Exception):
    """The workers did not finish their jobs; the message holds their output."""


@dataclass(frozen=True)
class Emptied:
    """Jobs per second until the last one ran, and the cores that workers and Postgres used."""

    rate: float
    cores: float


def empty(bed: Testbed, workers: int, task: str, jobs: int) -> Emptied:
    """Let idle workers find all jobs at one moment, and wait until the last one ran.

    The workers have no Redis, so that each of them looks for jobs at the same short interval.
    Raises :class:`ScalingError`.
    """
    database = bed.ledger()
    environment = bed.our_environment(database, with_redis=False)
    try:
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            reader = CountReader(Path(folder))
            program = worker("viralfx worker", **environment, **{COUNTS: folder})
            running = [stack.enter_context(Server(program, anywhere=True)) for _ in range(workers)]
            for each in running:
                each.wait_for_200("/health/ready", seconds=60)
            asyncio.run(_fill(bed.postgres.url(database), task, jobs))
            count, cpu = _wait(bed, reader, running, jobs)
    finally:
        bed.drop(database)
    seconds = count.last - count.first
    return Emptied(rate=jobs / seconds, cores=cpu / seconds)


async def _fill(url: str, task: str, jobs: int) -> None:
    """Accept all jobs in one transaction, so that no worker sees the first of them earlier."""
    connection = await asyncpg.connect(url)
    sql = Statements(DatabaseSettings().schema, ledger_sql)
    try:
        async with connection.transaction():
            for begin in range(0, jobs, BATCH):
                drafts = [
                    JobDraft(id=new_job_id(), queue="default", task=task, payload=b"null")
                    for _ in range(begin, min(begin + BATCH, jobs))
                ]
                await accept(connection, sql, drafts, again=False)
    finally:
        await connection.close()


def _wait(
    bed: Testbed, reader: CountReader, running: list[Server], jobs: int
) -> tuple[Count, float]:
    """Wait until all jobs ran; return the processor time in seconds since the first one, too."""
    deadline = time.monotonic() + MAX_SECONDS
    begun: float | None = None
    while (count := reader.read()).jobs < jobs:
        if count.jobs and begun is None:
            begun = _cpu_seconds(bed, running)
        if time.monotonic() > deadline:
            said = "".join(each.output()[-2000:] for each in running)
            raise ScalingError(f"{count.jobs} of {jobs} jobs ran; the workers said: {said}")
        time.sleep(POLL_SECONDS)
    return count, _cpu_seconds(bed, running) - (begun or 0.0)


def _cpu_seconds(bed: Testbed, running: list[Server]) -> float:
    return cpu_seconds(map(str, (*bed.postgres.pids, *(each.pid for each in running))))
