"""What applications ask of jobs: accept, look up, retry, cancel."""

from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime
from typing import Any

from viralfx.domain.correlation import current_correlation_id
from viralfx.domain.errors import ViralFXError
from viralfx.domain.jobs.coalescing import Coalescer
from viralfx.domain.jobs.codec import Codec
from viralfx.domain.jobs.job import (
    Job,
    JobDraft,
    JobNotFoundError,
    JobState,
    KeyConflictError,
    LedgerUnavailableError,
    new_job_id,
)
from viralfx.domain.jobs.ledger import Accepted, Found, JobLedger, QueueCounts
from viralfx.domain.jobs.observing import JobObserver, Unobserved
from viralfx.domain.jobs.tasks import TaskRegistry


class UnknownQueueError(ViralFXError):
    """There is no queue of this name."""


class JobService:
    """Accepts jobs durably and answers for them.

    Every method raises :class:`LedgerUnavailableError` when the ledger cannot be reached.
    """

    def __init__(
        self,
        *,
        ledger: JobLedger,
        tasks: TaskRegistry,
        codec: Codec,
        queues: Collection[str],
        ring: Callable[[str, Sequence[str]], None] = lambda _queue, _ids: None,
        observer: JobObserver | None = None,
    ) -> None:
        """``ring`` tells workers of jobs by queue and ids; it neither waits nor raises."""
        self._ledger = ledger
        # Concurrent requests share a step. Drafts of one key do not: the second is told of the
        # first one's job, which is in the ledger by then.
        self._accept = Coalescer(
            self._store, apart=lambda draft: draft.key, shared=LedgerUnavailableError
        )
        self._tasks = tasks
        self._codec = codec
        self._queues = tuple(dict.fromkeys(queues))
        self._ring = ring
        self._observer = observer or Unobserved()

    async def accept(
        self,
        task: str,
        payload: bytes,
        *,
        run_at: datetime | None = None,
        key: str | None = None,
        traceparent: str | None = None,
    ) -> Accepted:
        """Accept a job: when this returns, it is durable and will be run.

        ``run_at`` is in UTC. The same ``key`` again returns the first job. Raises
        :class:`UnknownTaskError`, :class:`PayloadError` and, for a key that was used for another
        job, :class:`KeyConflictError`.
        """
        declared = self._tasks.find(task)
        self._codec.decode(payload, declared.payload_type)
        draft = JobDraft(
            id=new_job_id(),
            queue=declared.queue,
            task=task,
            payload=payload,
            run_at=run_at,
            key=key,
            correlation_id=current_correlation_id(),
            traceparent=traceparent,
        )
        with self._observer.accepting(draft) as draft:
            accepted = await self._accept(draft)
        if accepted.created:
            if accepted.job.run_at <= accepted.job.created_at:
                self._ring(draft.queue, (draft.id,))
        elif not accepted.job.comes_from(draft):
            raise KeyConflictError(
                f"the idempotency key was used for job {accepted.job.id}, which asks for"
                " something else"
            )
        self._observer.accepted(accepted)
        return accepted

    async def _store(self, drafts: Sequence[JobDraft]) -> Sequence[Accepted]:
        with self._observer.storing(drafts):
            return await self._ledger.accept(drafts)

    async def submit(self, task: str, payload: Any, *, key: str | None = None) -> Accepted:
        """Accept a job from a value instead of its JSON; raises as :meth:`accept` does."""
        return await self.accept(task, self._codec.encode(payload), key=key)

    async def get(self, job_id: str) -> Job:
        """Return a job. Raises :class:`JobNotFoundError`."""
        job = await self._ledger.get(job_id)
        if job is None:
            raise JobNotFoundError(f"there is no job {job_id}")
        return job

    async def page(
        self,
        *,
        queue: str | None = None,
        state: JobState | None = None,
        before: str | None = None,
        limit: int = 50,
    ) -> Sequence[Job]:
        """Return jobs, the newest first. Raises :class:`UnknownQueueError`."""
        self._require(queue)
        return await self._ledger.page(queue=queue, state=state, before=before, limit=limit)

    async def find(
        self,
        correlation_id: str,
        *,
        queue: str | None = None,
        state: JobState | None = None,
        before: str | None = None,
        limit: int = 50,
    ) -> Found:
        """Look for the jobs of a conversation. Raises :class:`UnknownQueueError`."""
        self._require(queue)
        return await self._ledger.find(
            correlation_id, queue=queue, state=state, before=before, limit=limit
        )

    def _require(self, queue: str | None) -> None:
        if queue is not None and queue not in self._queues:
            known = ", ".join(sorted(self._queues))
            raise UnknownQueueError(f"there is no queue {queue!r}; there are {known}")

    async def retry(self, job_id: str) -> Job:
        """Run a failed job again. Raises :class:`JobNotFoundError`, :class:`JobStateError`."""
        job = await self._ledger.retry(job_id)
        self._ring(job.queue, (job.id,))
        return job

    async def cancel(self, job_id: str) -> Job:
        """Cancel a waiting job. Raises :class:`JobNotFoundError`, :class:`JobStateError`."""
        return await self._ledger.cancel(job_id)

    async def counts(self) -> Mapping[str, QueueCounts]:
        """Return how each queue stands, also those that never had a job."""
        return self.every_queue(await self._ledger.counts())

    def every_queue(self, known: Mapping[str, QueueCounts]) -> Mapping[str, QueueCounts]:
        """Return counts of the ledger with those of queues that never had a job."""
        return {name: known.get(name, QueueCounts()) for name in (*self._queues, *known)}
