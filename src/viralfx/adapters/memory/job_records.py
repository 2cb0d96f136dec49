"""Jobs and claims as a ledger in memory makes them."""

from datetime import datetime

from viralfx.domain.jobs.job import Claim, Job, JobDraft, JobState


def new_job(draft: JobDraft, now: datetime) -> Job:
    """Make the job of a draft that is accepted."""
    return Job(
        id=draft.id,
        queue=draft.queue,
        task=draft.task,
        state=JobState.WAITING,
        payload=draft.payload,
        key=draft.key,
        correlation_id=draft.correlation_id,
        traceparent=draft.traceparent,
        created_at=now,
        run_at=now if draft.run_at is None else max(now, draft.run_at),
        asked_run_at=draft.run_at,
        started_at=None,
        finished_at=None,
        attempts=0,
        crashes=0,
        claims=0,
        worker=None,
        result=None,
        error=None,
    )


def claim_of(job: Job, worker: str, now: datetime) -> Claim:
    """Make the claim of a job that was just given to a worker."""
    return Claim(
        id=job.id,
        queue=job.queue,
        task=job.task,
        payload=job.payload,
        worker=worker,
        number=job.claims,
        attempt=job.attempts + 1,
        crashes=job.crashes,
        correlation_id=job.correlation_id,
        traceparent=job.traceparent,
        created_at=job.created_at,
        due_since=max(0.0, (now - job.run_at).total_seconds()),
    )


def is_due(job: Job, queue: str, now: datetime) -> bool:
    """Tell whether a job can be given to a worker of a queue."""
    return job.queue == queue and job.state is JobState.WAITING and job.run_at <= now


def is_of(job: Job, queue: str | None, state: JobState | None) -> bool:
    """Tell whether a job is of a queue and in a state; None: of any."""
    return queue in (None, job.queue) and state in (None, job.state)
