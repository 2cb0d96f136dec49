"""One contender, once: fill the queue, see how fast one worker empties it, then do both at once.

    python -m benchmarks.jobs.bout MODULE JOBS ONE_BY_ONE

Runs in the environment of the contender, which need not have this project installed. Prints
the :class:`Bout` as the last line, in JSON.
"""

import asyncio
import importlib
import json
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version

import uvloop
from benchmarks.jobs.peer import Peer
from benchmarks.jobs.servers_cpu import servers_cpu_seconds
from benchmarks.jobs.tally import Tally
from benchmarks.jobs.working import Working

PRODUCERS = 100
"""How many enqueue at once, where the contender can."""
POLL_SECONDS = 0.005
MOST_SECONDS = 60.0
"""For a queue to get empty; the jobs come on top."""
MOST_SECONDS_PER_JOB = 0.02


@dataclass(frozen=True)
class Bout:
    """What was seen. Rates are jobs per second."""

    versions: dict[str, str]
    one_by_one: float
    """Enqueued, each after the one before was in the queue."""
    gathered: float | None
    """Enqueued, several at once; None where the contender cannot."""
    processed: float
    """From when the first job ran until all were done, in the worker's and the queue's eyes."""
    flowed: float
    """Enqueued and processed at the same time, until all were done."""
    worker_cost: float
    """Microseconds of the worker's processor time for each job processed."""
    servers_cost: float
    """Microseconds of the servers' processor time for each job processed."""


class BoutError(Exception):
    """A worker did not do its jobs; the message holds what it said."""


async def run(module: str, jobs: int, one_by_one: int) -> Bout:
    """Let a contender show what it does. Raises :class:`BoutError`."""
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
        with Working(contender.WORKER, jobs) as worker:
            counted, emptied = await _empty(peer, worker, 0, jobs)
            servers_cpu = servers_cpu_seconds() - servers_cpu
            flow_began = time.monotonic()
            await _enqueue(peer, jobs, producers)
            _, flow_ended = await _empty(peer, worker, 1, jobs)
    finally:
        await peer.close()
    return Bout(
        versions={name: version(name) for name in contender.DISTRIBUTIONS},
        one_by_one=one_by_one / (then - began),
        gathered=(jobs - one_by_one) / (full - then) if peer.gathers else None,
        processed=jobs / (emptied - counted.first),
        flowed=jobs / (flow_ended - flow_began),
        worker_cost=counted.cpu / jobs * 1e6,
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


async def _empty(peer: Peer, worker: Working, series: int, jobs: int) -> tuple[Tally, float]:
    """Wait until all jobs of a series are done; return the worker's count, and when that was."""
    deadline = time.monotonic() + MOST_SECONDS + jobs * MOST_SECONDS_PER_JOB
    while (counted := worker.tally(series)) is None:
        await _pause(peer, worker, deadline)
    ended = counted.last
    while await peer.unfinished():
        await _pause(peer, worker, deadline)
        ended = time.monotonic()
    return counted, ended


async def _pause(peer: Peer, worker: Working, deadline: float) -> None:
    if worker.ended or time.monotonic() > deadline:
        unfinished = await peer.unfinished()
        raise BoutError(f"{unfinished} jobs are unfinished; the worker said:\n{worker.said()}")
    await asyncio.sleep(POLL_SECONDS)


if __name__ == "__main__":
    name, jobs_text, one_by_one_text = sys.argv[1:]
    print(json.dumps(asdict(uvloop.run(run(name, int(jobs_text), int(one_by_one_text))))))
