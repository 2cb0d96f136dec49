"""A job that does nothing, as a task of viralfx."""

from benchmarks.jobs.counter import ran

from viralfx import task

TASK = "bench.empty"


@task(TASK)
async def do_nothing(_payload: None) -> None:
    """Do nothing."""
    ran()
