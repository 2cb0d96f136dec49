"""The bodies of the jobs API, field by field as clients read and write them."""

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from viralfx.domain.clock import timestamp
from viralfx.domain.jobs.job import Job, JobState
from viralfx.web.schemas import Timestamp

PATH = "/api/v1/jobs"

JobId = Annotated[str, Meta(description="A UUID; ids sort by when their jobs were accepted")]
State = Annotated[str, Meta(description="waiting, active, completed, failed or cancelled")]


class JobRequest(msgspec.Struct, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """What is to be done."""

    task: Annotated[str, Meta(min_length=1, max_length=200)]
    payload: msgspec.Raw = msgspec.Raw(b"null")
    run_at: Annotated[datetime, Meta(tz=True)] | None = None

    @property
    def due(self) -> datetime | None:
        """When it is to be run, in UTC. Raises ``OverflowError`` at the ends of the calendar."""
        return None if self.run_at is None else self.run_at.astimezone(UTC)


class _View(msgspec.Struct, kw_only=True, rename="camel"):
    pass


class JobLinks(_View):
    """Where to go on from a job."""

    self: Annotated[str, Meta(description="The job")]
    events: Annotated[str, Meta(description="Its progress as server-sent events")]


class JobAccepted(_View):
    """A job that is kept and will be run."""

    id: JobId
    queue: str
    state: State
    links: JobLinks


class JobFailure(_View):
    """Why the last attempt did not complete the job."""

    code: Annotated[
        str, Meta(description="error, timeout, unknown_task, payload, result or crashed")
    ]
    message: str


class JobSummary(_View):
    """A job, without what went in and came out."""

    id: JobId
    queue: str
    task: str
    state: State
    attempts: Annotated[
        int,
        Meta(description="Attempts begun, the running one too; no worker's death costs one"),
    ]
    crashes: Annotated[int, Meta(description="Workers that died over it")]
    error: JobFailure | None
    correlation_id: str | None
    idempotency_key: str | None
    created_at: Timestamp
    run_at: Annotated[str, Meta(description="When it is or was due; UTC")]
    started_at: Annotated[str | None, Meta(description="When its last attempt began; UTC")]
    finished_at: Annotated[str | None, Meta(description="When it reached its final state; UTC")]
    worker: Annotated[str | None, Meta(description="Who runs it now")]
    links: JobLinks


class JobView(JobSummary):
    """A job with all that is known of it."""

    payload: Annotated[Any, Meta(description="Any JSON: what the task is given")]
    result: Annotated[
        Any, Meta(description="Any JSON: what the task returned; null before it completed")
    ]


class JobPage(_View):
    """Jobs, the newest first."""

    items: list[JobSummary]
    next_cursor: Annotated[
        str | None, Meta(description="The cursor of the next page; null on the last one")
    ]


def links(job: Job) -> JobLinks:
    """Say where a job is found."""
    return JobLinks(self=f"{PATH}/{job.id}", events=f"{PATH}/{job.id}/events")


def accepted(job: Job) -> JobAccepted:
    """Show that a job was taken."""
    return JobAccepted(id=job.id, queue=job.queue, state=str(job.state), links=links(job))


def summary(job: Job) -> JobSummary:
    """Show a job in a list."""
    return JobSummary(**_common(job))


def page(jobs: Iterable[Job], next_cursor: str | None) -> JobPage:
    """Show a list of jobs."""
    return JobPage(items=[summary(job) for job in jobs], next_cursor=next_cursor)


def view(job: Job) -> JobView:
    """Show a job alone."""
    result = None if job.result is None else msgspec.Raw(job.result)
    return JobView(**_common(job), payload=msgspec.Raw(job.payload), result=result)


def _common(job: Job) -> dict[str, Any]:
    error = job.error
    # An attempt is spent when it fails; one that runs or succeeded was begun all the same.
    unspent = job.state in (JobState.ACTIVE, JobState.COMPLETED)
    return {
        "id": job.id,
        "queue": job.queue,
        "task": job.task,
        "state": str(job.state),
        "attempts": job.attempts + unspent,
        "crashes": job.crashes,
        "error": None if error is None else JobFailure(code=error.code, message=error.message),
        "correlation_id": job.correlation_id,
        "idempotency_key": job.key,
        "created_at": timestamp(job.created_at),
        "run_at": timestamp(job.run_at),
        "started_at": _moment(job.started_at),
        "finished_at": _moment(job.finished_at),
        "worker": job.worker,
        "links": links(job),
    }


def _moment(moment: datetime | None) -> str | None:
    return None if moment is None else timestamp(moment)
