"""The rate at which a number of worker processes empty one queue."""

import asyncio
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import asyncpg
from benchmarks.jobs.counter import COUNTS, Count, CountReader
from benchmarks.jobs.empty_task import TASK
from benchmarks.jobs.testbed import Testbed
from benchmarks.servers import Server, worker

from viralfx.adapters.postgres import ledger_sql
from viralfx.adapters.postgres.enqueue import accept
from viralfx.adapters.postgres.migrations import Statements
from viralfx.domain.jobs.model import JobDraft, new_job_id
from viralfx.settings import DatabaseSettings

BATCH = 1_000
"""Jobs of one statement that fills the queue."""
POLL_SECONDS = 0.005
MAX_SECONDS = 120.0


class ScalingError(Exception):
    """The workers did not finish their jobs; the message holds their output."""


def processed_per_second(bed: Testbed, workers: int, jobs: int) -> float:
    """Let idle workers find all jobs at one moment; return jobs per second until the last one ran.

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
            asyncio.run(_fill(bed.postgres.url(database), jobs))
            count = _wait(reader, running, jobs)
    finally:
        bed.drop(database)
    return jobs / (count.last - count.first)


async def _fill(url: str, jobs: int) -> None:
    """Accept all jobs in one transaction, so that no worker sees the first of them earlier."""
    connection = await asyncpg.connect(url)
    sql = Statements(DatabaseSettings().schema, ledger_sql)
    try:
        async with connection.transaction():
            for begin in range(0, jobs, BATCH):
                drafts = [
                    JobDraft(id=new_job_id(), queue="default", task=TASK, payload=b"null")
                    for _ in range(begin, min(begin + BATCH, jobs))
                ]
                await accept(connection, sql, drafts, again=False)
    finally:
        await connection.close()


def _wait(reader: CountReader, running: list[Server], jobs: int) -> Count:
    deadline = time.monotonic() + MAX_SECONDS
    while (count := reader.read()).jobs < jobs:
        if time.monotonic() > deadline:
            said = "".join(each.output()[-2000:] for each in running)
            raise ScalingError(f"{count.jobs} of {jobs} jobs ran; the workers said: {said}")
        time.sleep(POLL_SECONDS)
    return count
