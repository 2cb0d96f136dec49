"""How one queue of the ledger in memory stands: its waiting jobs in order, the others counted."""

from datetime import datetime
from itertools import islice

from viralfx.adapters.memory.due import DueOrder
from viralfx.domain.jobs.job import Job, JobState
from viralfx.domain.jobs.ledger import QueueCounts


class MemoryJobQueue:
    """Knows which jobs wait, by id, and how many are in each state."""

    def __init__(self) -> None:
        self._due = DueOrder()
        self._scheduled = DueOrder()
        self._counted = dict.fromkeys(JobState, 0)

    def put(self, job: Job) -> None:
        """Take note of a job in its state."""
        if job.state is JobState.WAITING:
            # It may be due already: the next look at the time tells.
            self._scheduled.add(job.id, job.run_at)
        else:
            self._counted[job.state] += 1

    def take(self, job: Job) -> None:
        """Forget a job that leaves its state."""
        if job.state is JobState.WAITING:
            self._due.discard(job.id)
            self._scheduled.discard(job.id)
        else:
            self._counted[job.state] -= 1

    def pop_due(self, now: datetime, limit: int) -> list[str]:
        """Take up to ``limit`` jobs that are due out of their order, the longest due first.

        They are still to be put where they go.
        """
        self._move_on(now)
        return [job_id for _, job_id in islice(self._due.pop_until(now), max(0, limit))]

    def counts(self, now: datetime, consumers: int) -> QueueCounts:
        """Say how the queue stands."""
        self._move_on(now)
        first = self._due.first()
        return QueueCounts(
            waiting=len(self._due),
            scheduled=len(self._scheduled),
            active=self._counted[JobState.ACTIVE],
            completed=self._counted[JobState.COMPLETED],
            failed=self._counted[JobState.FAILED],
            cancelled=self._counted[JobState.CANCELLED],
            oldest_due=0.0 if first is None else max(0.0, (now - first[0]).total_seconds()),
            consumers=consumers,
        )

    def _move_on(self, now: datetime) -> None:
        for due, job_id in self._scheduled.pop_until(now):
            self._due.add(job_id, due)
