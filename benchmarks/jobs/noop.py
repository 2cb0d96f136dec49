"""The job that does nothing, as a task of ours."""

from benchmarks.jobs.tally import ran

from viralfx import task

TASK = "bench.noop"


@task(TASK)
async def noop(_payload: None) -> None:
    """Do nothing."""
    ran()
