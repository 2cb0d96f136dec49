"""``default.prune``: forgets the jobs that were kept long enough."""

from collections.abc import Awaitable, Callable

from viralfx.domain.jobs.ledger import JobLedger
from viralfx.domain.jobs.tasks import JobContext, task

_BATCH = 1000
_TIMEOUT = 120.0
_MARGIN = 20.0

PruneJobs = Callable[[None, JobContext], Awaitable[dict[str, int]]]


def prune_jobs(ledger: JobLedger, *, retention: float) -> PruneJobs:
    """Return the task. ``retention`` is the seconds that a finished job is kept; 0: for ever."""

    @task("default.prune", queue="default", timeout=_TIMEOUT)
    async def prune(_payload: None, context: JobContext) -> dict[str, int]:
        """Forget jobs in batches; what does not fit into the time is left for the next run."""
        pruned = 0
        while retention and context.deadline.remaining() > _MARGIN:
            batch = await ledger.prune(retention, _BATCH)
            pruned += batch
            if batch < _BATCH:
                break
        return {"pruned": pruned}

    return prune
