"""A job that does nothing and one that waits, as tasks of viralfx."""

import asyncio

from benchmarks.jobs.counter import ran

from viralfx import task

TASK = "bench.empty"
WAITING_TASK = "bench.waiting"
WAIT_SECONDS = 0.02
"""As long as a task waits for a server on the network."""


@task(TASK)
async def do_nothing(_payload: None) -> None:
    """Do nothing."""
    ran()


@task(WAITING_TASK)
async def wait(_payload: None) -> None:
    """Wait without use of the processor."""
    await asyncio.sleep(WAIT_SECONDS)
    ran()
