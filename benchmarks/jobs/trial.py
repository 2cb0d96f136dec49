"""One contender, once: fill the queue, see how fast one worker empties it, then do both at once.

    python -m benchmarks.jobs.trial MODULE JOBS ONE_BY_ONE

Runs in the environment of the contender, which need not have this project installed. Prints
the :class:`Trial` as the last line, in JSON.
"""

import asyncio
import importlib
import json
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version

import uvloop
from benchmarks.jobs.counter import Count
from benchmarks.jobs.cpu_seconds import servers_cpu_seconds
from benchmarks.jobs.peer import Peer
from benchmarks.jobs.worker_process import WorkerProcess

PRODUCERS = 100
"""Concurrent calls of enqueue, if the contender supports it."""
POLL_SECONDS = 0.005
MAX_SECONDS = 60.0
"""Seconds for a queue to become empty, plus a share for each job."""
MAX_SECONDS_PER_JOB = 0.02


@dataclass(frozen=True)
class Trial:
    """Results. Rates are jobs per second."""

    versions: dict[str, str]
    one_by_one: float
    """Enqueued one by one."""
    gathered: float | None
    """Enqueued concurrently; None if the contender does not support it."""
    processed: float
    """From the first run until all jobs are done, for the worker and the queue."""
    flowed: float
    """Enqueued and processed at the same time, until all were done."""
    worker_cost: float
    """Microseconds of the worker's processor time for each job processed."""
    servers_cost: float
    """Microseconds of the servers' processor time for each job processed."""


class TrialError(Exception):
    """A worker did not finish its jobs; the message holds its output."""


async def run(module: str, jobs: int, one_by_one: int) -> Trial:
    """Run one contender. Raises :class:`TrialError`."""
    contender = importlib.import_module(module)
    peer: Peer = contender.Producer()
    producers = PRODUCERS if peer.gathers else 1
    await peer.prepare()
    try:
        began = time.monotonic()
        await _enqueue(peer, one_by_one, 1)
        then = time.monotonic()
        await _enqueue(peer, jobs - one_by_one, producers)
        full = time.monotonic()
        servers_cpu = servers_cpu_seconds()
        with WorkerProcess(contender.WORKER) as worker:
            await _first(peer, worker, jobs)
            begun_cpu = worker.cpu_seconds()
            counted, emptied = await _empty(peer, worker, jobs)
            worker_cpu = worker.cpu_seconds() - begun_cpu
            servers_cpu = servers_cpu_seconds() - servers_cpu
            flow_began = time.monotonic()
            await _enqueue(peer, jobs, producers)
            _, flow_ended = await _empty(peer, worker, 2 * jobs)
    finally:
        await peer.close()
    return Trial(
        versions={name: version(name) for name in contender.DISTRIBUTIONS},
        one_by_one=one_by_one / (then - began),
        gathered=(jobs - one_by_one) / (full - then) if peer.gathers else None,
        processed=jobs / (emptied - counted.first),
        flowed=jobs / (flow_ended - flow_began),
        worker_cost=worker_cpu / jobs * 1e6,
        servers_cost=servers_cpu / jobs * 1e6,
    )


async def _enqueue(peer: Peer, count: int, producers: int) -> None:
    left = iter(range(count))

    async def produce() -> None:
        for _ in left:
            await peer.enqueue()

    async with asyncio.TaskGroup() as group:
        for _ in range(producers):
            group.create_task(produce())


async def _first(peer: Peer, worker: WorkerProcess, jobs: int) -> None:
    """Wait until the first job runs."""
    deadline = _deadline(jobs)
    while not worker.count().jobs:
        await _pause(peer, worker, deadline)


async def _empty(peer: Peer, worker: WorkerProcess, jobs: int) -> tuple[Count, float]:
    """Wait until this number of jobs is done; return the worker's count, and the time."""
    deadline = _deadline(jobs)
    while (counted := worker.count()).jobs < jobs:
        await _pause(peer, worker, deadline)
    ended = counted.last
    while await peer.unfinished():
        await _pause(peer, worker, deadline)
        ended = time.monotonic()
    return counted, ended


def _deadline(jobs: int) -> float:
    return time.monotonic() + MAX_SECONDS + jobs * MAX_SECONDS_PER_JOB


async def _pause(peer: Peer, worker: WorkerProcess, deadline: float) -> None:
    if worker.ended or time.monotonic() > deadline:
        unfinished = await peer.unfinished()
        raise TrialError(f"{unfinished} jobs are unfinished; the worker said:\n{worker.said()}")
    await asyncio.sleep(POLL_SECONDS)


if __name__ == "__main__":
    name, jobs_text, one_by_one_text = sys.argv[1:]
    print(json.dumps(asdict(uvloop.run(run(name, int(jobs_text), int(one_by_one_text))))))
