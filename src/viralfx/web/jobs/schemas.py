"""The bodies of the jobs API, field by field as clients read and write them.

``viralfx jobs`` prints them too, so nothing here imports Litestar.
"""

from collections.abc import Iterable, Mapping
from datetime import MINYEAR, UTC, datetime
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from viralfx.core.clock import timestamp
from viralfx.core.ids import canonical_job_id
from viralfx.core.keys import owner_and_text
from viralfx.jobs.bulk import BulkCount
from viralfx.jobs.ledger import Accepted, QueueCounts
from viralfx.jobs.limits import FIRST_RUN_AT, LAST_RUN_AT, MAX_ATTEMPTS
from viralfx.jobs.model import (
    MAX_PRIORITY,
    MIN_PRIORITY,
    Job,
    JobAttempt,
    JobFilter,
    JobState,
    Unique,
)
from viralfx.jobs.schedule import ScheduleTimes
from viralfx.web.schemas import Timestamp

PATH = "/api/v1/jobs"
SCHEDULES_PATH = "/api/v1/schedules"

MAX_BATCH_JOBS = 1000
MAX_NAME_CHARACTERS = 200
"""Of the name of a task, or a code."""
MAX_KEY_CHARACTERS = 255
"""Of an idempotency key."""

Name = Annotated[str, Meta(min_length=1, max_length=MAX_NAME_CHARACTERS)]
JobId = Annotated[str, Meta(description="A UUID; ids sort by the time of acceptance")]
State = Annotated[JobState, Meta(description="The state of the job")]


class JobRequest(msgspec.Struct, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """The body of ``POST``: the task to run, with its payload and time."""

    task: Name
    payload: msgspec.Raw = msgspec.Raw(b"null")
    run_at: Annotated[datetime, Meta(tz=True)] | None = None
    # As in JSON Schema, 5.0 is an integer.
    priority: Annotated[float, Meta(ge=MIN_PRIORITY, le=MAX_PRIORITY, multiple_of=1)] | None = None
    unique: Unique | None = None
    queue: Name | None = None
    max_attempts: Annotated[float, Meta(ge=1, le=MAX_ATTEMPTS, multiple_of=1)] | None = None

    @property
    def due(self) -> datetime | None:
        """The due time in UTC, within the range that a job may ask for; None: at once."""
        if self.run_at is None:
            return None
        return min(max(_in_utc(self.run_at), FIRST_RUN_AT), LAST_RUN_AT)

    @property
    def options(self) -> dict[str, Any]:
        """The options of the job; None: that of the task."""
        return {
            "priority": None if self.priority is None else int(self.priority),
            "unique": self.unique,
            "queue": self.queue,
            "max_attempts": None if self.max_attempts is None else int(self.max_attempts),
        }


class FilterRequest(msgspec.Struct, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """The body of a change of many jobs: a job must match every field that is given."""

    queue: str | msgspec.UnsetType = msgspec.UNSET
    task: Name | msgspec.UnsetType = msgspec.UNSET
    state: JobState | msgspec.UnsetType = msgspec.UNSET
    code: Name | msgspec.UnsetType = msgspec.UNSET
    before: str | msgspec.UnsetType = msgspec.UNSET

    @property
    def wanted(self) -> JobFilter:
        """The filter. Raises ``ValueError`` for a ``before`` that is neither a time nor an id."""
        fields: dict[str, Any] = {
            name: value
            for name in ("queue", "task", "state", "code")
            if (value := getattr(self, name)) is not msgspec.UNSET
        }
        if isinstance(self.before, str):
            fields |= _before(self.before)
        return JobFilter(**fields)


def _before(text: str) -> dict[str, Any]:
    if (job_id := canonical_job_id(text)) is not None:
        return {"before": job_id}
    try:
        moment = msgspec.convert(text, _Moment)
    except msgspec.ValidationError:
        message = "`$.before` must be a time with a time zone, or the id of a job"
        raise ValueError(message) from None
    return {"created_before": _in_utc(moment)}


_Moment = Annotated[datetime, Meta(tz=True)]


def _in_utc(moment: datetime) -> datetime:
    """Return a time in UTC: the first or last one that Python has, if it is before or after it."""
    try:
        return moment.astimezone(UTC)
    except OverflowError:
        return _FIRST if moment.year == MINYEAR else _LAST


_FIRST, _LAST = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)


class BatchItem(JobRequest, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """One job of a batch, with the key that a single request has in its header."""

    key: Annotated[str, Meta(pattern=rf"^[!-~]{{1,{MAX_KEY_CHARACTERS}}}\Z")] | None = None


class BatchRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The body of a batch."""

    jobs: Annotated[list[BatchItem], Meta(min_length=1, max_length=MAX_BATCH_JOBS)]


class _View(msgspec.Struct, kw_only=True, rename="camel"):
    pass


class JobLinks(_View):
    """The URLs of a job."""

    self: Annotated[str, Meta(description="The job")]
    events: Annotated[str, Meta(description="Its progress as server-sent events")]


class JobAccepted(_View):
    """A job after a request: accepted, due again or cancelled."""

    id: JobId
    queue: str
    state: State
    links: JobLinks


class BatchedJob(JobAccepted):
    """A job of a batch."""

    created: Annotated[
        bool, Meta(description="False: its key, or a unique job, had been accepted before")
    ]


class JobsAccepted(_View):
    """The jobs of a batch, in the order of the request."""

    jobs: list[BatchedJob]


class JobFailure(_View):
    """The reason why the last attempt did not complete the job."""

    code: Annotated[
        str,
        Meta(description="error, timeout, discarded, unknown_task, payload, result or crashed"),
    ]
    message: str


class FailedExecution(_View):
    """An execution that did not complete the job."""

    number: Annotated[int, Meta(description="Counts every execution of the job")]
    started_at: Annotated[str | None, Meta(description="UTC")]
    ended_at: Timestamp
    worker: str | None
    code: Annotated[
        str, Meta(description="As the code of a job, or cancelled, handed_back or crashed")
    ]
    message: str
    traceback: Annotated[
        str | None,
        Meta(description="The end of the traceback, without secrets; only of the last five"),
    ]


class JobProgress(_View):
    """The last report of the task."""

    current: float | None
    total: float | None
    message: str | None


class JobSummary(_View):
    """A job without payload, result and failures."""

    id: JobId
    queue: str
    task: str
    state: State
    attempts: Annotated[
        int,
        Meta(description="Attempts, including the running one; a worker's death does not count"),
    ]
    max_attempts: Annotated[
        int | None, Meta(description="Its most attempts; null: as the policy of its task decides")
    ]
    crashes: Annotated[int, Meta(description="Workers whose lease ran out while they ran it")]
    error: JobFailure | None
    correlation_id: str | None
    user_id: Annotated[str | None, Meta(description="The user of the request that submitted it")]
    priority: Annotated[int, Meta(description="A higher number runs first")]
    idempotency_key: str | None
    key_owner: Annotated[
        str | None,
        Meta(description="The name in TOKENS whose key it is; null: of API_TOKEN or the service"),
    ]
    created_at: Timestamp
    run_at: Annotated[str, Meta(description="The time at which it is or was due; UTC")]
    started_at: Annotated[str | None, Meta(description="The start of its last attempt; UTC")]
    finished_at: Annotated[
        str | None, Meta(description="The time at which it reached its final state; UTC")
    ]
    worker: Annotated[str | None, Meta(description="The worker that runs it now")]
    cancel_requested: Annotated[
        bool, Meta(description="The job runs, and its worker has to cancel it")
    ]
    progress: Annotated[
        JobProgress | None, Meta(description="The last report of its task; null without one")
    ]
    links: JobLinks


class JobView(JobSummary):
    """A job with payload, result and failures."""

    payload: Annotated[Any, Meta(description="Any JSON: the input of the task")]
    result: Annotated[
        Any, Meta(description="Any JSON: the return value of the task; null until it has completed")
    ]
    failures: Annotated[
        list[FailedExecution],
        Meta(description="The last 50 executions that did not complete it, the oldest first"),
    ]


class JobCount(_View):
    """How many jobs a request has changed."""

    count: int
    more: Annotated[bool, Meta(description="True: it changed as many as a request may change")]


class JobPage(_View):
    """One page of jobs, the newest first."""

    items: list[JobSummary]
    next_cursor: Annotated[
        str | None, Meta(description="The cursor of the next page; null on the last one")
    ]


def links(job: Job) -> JobLinks:
    """Return the URLs of a job."""
    return JobLinks(self=f"{PATH}/{job.id}", events=f"{PATH}/{job.id}/events")


def accepted(job: Job) -> JobAccepted:
    """Return the body for an accepted job."""
    return JobAccepted(id=job.id, queue=job.queue, state=job.state, links=links(job))


def batched(one: Accepted) -> BatchedJob:
    """Return the body for a job of a batch."""
    job = one.job
    return BatchedJob(
        id=job.id, queue=job.queue, state=job.state, links=links(job), created=one.created
    )


def summary(job: Job) -> JobSummary:
    """Return the body of a job in a list."""
    return JobSummary(**_common(job))


def page(jobs: Iterable[Job], next_cursor: str | None) -> JobPage:
    """Return the body of a list of jobs."""
    return JobPage(items=[summary(job) for job in jobs], next_cursor=next_cursor)


def view(job: Job) -> JobView:
    """Return the body of ``GET /api/v1/jobs/{id}``."""
    result = None if job.result is None else msgspec.Raw(job.result)
    return JobView(
        **_common(job),
        payload=msgspec.Raw(job.payload),
        result=result,
        failures=[_failure(each) for each in job.history],
    )


def _failure(attempt: JobAttempt) -> FailedExecution:
    error = attempt.error
    return FailedExecution(
        number=attempt.number,
        started_at=moment(attempt.started_at),
        ended_at=timestamp(attempt.ended_at),
        worker=attempt.worker,
        code=error.code,
        message=error.message,
        traceback=error.traceback,
    )


def _common(job: Job) -> dict[str, Any]:
    error = job.error
    key_owner, key = owner_and_text(job.key)
    return {
        "id": job.id,
        "queue": job.queue,
        "task": job.task,
        "state": job.state,
        "attempts": job.attempts_made,
        "max_attempts": job.max_attempts,
        "crashes": job.crashes,
        "error": None if error is None else JobFailure(code=error.code, message=error.message),
        "correlation_id": job.correlation_id,
        "user_id": job.user_id,
        "priority": job.priority,
        "idempotency_key": key,
        "key_owner": key_owner,
        "created_at": timestamp(job.created_at),
        "run_at": timestamp(job.run_at),
        "started_at": moment(job.started_at),
        "finished_at": moment(job.finished_at),
        "worker": job.worker,
        "cancel_requested": job.cancel_requested,
        "progress": None if job.progress is None else msgspec.Raw(job.progress),
        "links": links(job),
    }


def moment(time: datetime | None) -> str | None:
    """Return a time as the API writes it."""
    return None if time is None else timestamp(time)


def job_count(changed: BulkCount) -> JobCount:
    """Return the body for a change of many jobs."""
    return JobCount(count=changed.count, more=changed.more)


class QueueJobs(_View):
    """The jobs of a queue by state; final states count pruned jobs, too."""

    waiting: Annotated[int, Meta(description="Jobs that are due")]
    scheduled: Annotated[int, Meta(description="Jobs that are due later")]
    active: Annotated[int, Meta(description="Jobs that workers run now")]
    completed: int
    failed: int
    cancelled: int


class Queue(_View):
    """A queue with its counts."""

    name: str
    paused: Annotated[bool, Meta(description="True: workers claim none of its jobs")]
    concurrency: Annotated[
        int | None,
        Meta(description="Its jobs that this process runs at once; null if it runs none"),
    ]
    consumers: Annotated[int, Meta(description="Live workers that consume it")]
    oldest_due: Annotated[
        float, Meta(description="Seconds for which its longest waiting job has been due")
    ]
    counts: QueueJobs


class QueueList(_View):
    """All queues."""

    items: list[Queue]


def queue_list(
    queues: Mapping[str, QueueCounts], concurrency: Mapping[str, int] | None = None
) -> QueueList:
    """Return the body of a list of queues; ``concurrency``: that of this process by queue."""
    return QueueList(items=[queue_view(each, queues[each], concurrency or {}) for each in queues])


def queue_view(name: str, counts: QueueCounts, concurrency: Mapping[str, int]) -> Queue:
    """Return the body of one queue; ``concurrency``: that of this process by queue."""
    return Queue(
        name=name,
        paused=counts.paused,
        concurrency=concurrency.get(name),
        consumers=counts.consumers,
        oldest_due=round(counts.oldest_due, 3),
        counts=QueueJobs(
            waiting=counts.waiting,
            scheduled=counts.scheduled,
            active=counts.active,
            completed=counts.completed,
            failed=counts.failed,
            cancelled=counts.cancelled,
        ),
    )


class Schedule(_View):
    """The schedule of a task."""

    task: str
    cron: Annotated[str, Meta(description="Minute, hour, day of month, month, day of week")]
    timezone: Annotated[str, Meta(description="The time zone of the fields, of the IANA database")]
    paused: Annotated[bool, Meta(description="True: its times are skipped until it is resumed")]
    last_run_at: Annotated[
        str | None, Meta(description="The latest time for which a job was accepted; UTC")
    ]
    next_run_at: Annotated[
        str | None, Meta(description="The next time; null if this process cannot calculate it; UTC")
    ]
    next_runs: Annotated[list[str], Meta(description="The next times, the first one included; UTC")]


class ScheduleList(_View):
    """All schedules, by task."""

    items: list[Schedule]


def schedule_list(found: Iterable[ScheduleTimes]) -> ScheduleList:
    """Return the body of a list of schedules."""
    return ScheduleList(items=[schedule_view(each) for each in found])


def schedule_view(found: ScheduleTimes) -> Schedule:
    """Return the body of one schedule."""
    runs = [timestamp(each) for each in found.next_runs]
    return Schedule(
        task=found.task,
        cron=found.cron,
        timezone=found.timezone,
        paused=found.paused,
        last_run_at=moment(found.last_run_at),
        next_run_at=runs[0] if runs else None,
        next_runs=runs,
    )
