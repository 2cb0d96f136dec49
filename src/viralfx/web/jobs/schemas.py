"""The bodies of the jobs API, field by field as clients read and write them."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import MINYEAR, UTC, datetime
from typing import Annotated, Any

import msgspec
from litestar.openapi.spec import (
    Example,
    OpenAPIFormat,
    OpenAPIMediaType,
    OpenAPIType,
    Operation,
    Parameter,
    Reference,
    RequestBody,
    Schema,
)
from msgspec import Meta

from viralfx.domain.clock import timestamp
from viralfx.domain.jobs.ledger import Accepted
from viralfx.domain.jobs.limits import FIRST_RUN_AT, LAST_RUN_AT, MAX_ATTEMPTS
from viralfx.domain.jobs.model import (
    MAX_PRIORITY,
    MIN_PRIORITY,
    Job,
    JobAttempt,
    JobFilter,
    JobState,
    Unique,
    canonical_job_id,
)
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
        "idempotency_key": job.key,
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


EXAMPLE_PAYLOAD = {
    "type": "order.shipped",
    "url": "https://hooks.example.com/orders",
    "data": {"order": 17},
}


def name_schema() -> Schema:
    """Return the schema of the name of a task, or of a code."""
    return Schema(type=OpenAPIType.STRING, min_length=1, max_length=MAX_NAME_CHARACTERS)


def _key(*types: OpenAPIType) -> Schema:
    kind = types[0] if len(types) == 1 else list(types)
    return Schema(type=kind, min_length=1, max_length=MAX_KEY_CHARACTERS, pattern="^[!-~]+$")


def _job_request(title: str, **more: Schema) -> Schema:
    """Return the schema of a new job."""
    text, null = OpenAPIType.STRING, OpenAPIType.NULL
    return Schema(
        type=OpenAPIType.OBJECT,
        title=title,
        required=["task"],
        additional_properties=False,
        properties={
            "task": name_schema(),
            "payload": Schema(description="JSON that fits the task"),
            "runAt": Schema(
                type=[text, null],
                format=OpenAPIFormat.DATE_TIME,
                description="The earliest time, with a time zone. Null or missing: at once",
            ),
            "priority": Schema(
                type=[OpenAPIType.INTEGER, null],
                minimum=MIN_PRIORITY,
                maximum=MAX_PRIORITY,
                description="A higher number runs first. Null or missing: that of the task",
            ),
            "unique": Schema(
                type=[text, null],
                enum=[*map(str, Unique), None],
                description="How long it keeps a job with the same task and payload from being"
                " accepted: that request returns this job. Null or missing: that of the task",
            ),
            "queue": Schema(
                type=[text, null], description="Null or missing: that of the task", min_length=1
            ),
            "maxAttempts": Schema(
                type=[OpenAPIType.INTEGER, null],
                minimum=1,
                maximum=MAX_ATTEMPTS,
                description="Its most attempts. Null or missing: as the policy of the task decides",
            ),
            **more,
        },
    )


@dataclass
class AcceptOperation(Operation):
    """Adds the body and Idempotency-Key, which the handler parses to keep the payload's bytes."""

    def __post_init__(self) -> None:
        """Set body and parameters."""
        examples: dict[str, Example | Reference] = {
            "at once": Example(
                summary="A webhook, at once",
                value={"task": "notifications.webhook", "payload": EXAMPLE_PAYLOAD},
            ),
            "later": Example(
                summary="A clean-up at a given time",
                value={"task": "default.prune", "runAt": "2026-01-07T03:00:00Z"},
            ),
        }
        self.request_body = RequestBody(
            required=True,
            content={
                "application/json": OpenAPIMediaType(
                    schema=_job_request("JobRequest"), examples=examples
                )
            },
        )
        key = Parameter(
            name="Idempotency-Key",
            param_in="header",
            description="Identifies the request: one job is accepted for each key",
            schema=_key(OpenAPIType.STRING),
        )
        self.parameters = [*(self.parameters or ()), key]


@dataclass
class BatchOperation(Operation):
    """Adds the body, which the handler parses to keep the bytes of the payloads."""

    def __post_init__(self) -> None:
        """Set the body."""
        jobs = Schema(
            type=OpenAPIType.ARRAY,
            items=_job_request("BatchItem", key=_key(OpenAPIType.STRING, OpenAPIType.NULL)),
            min_items=1,
            max_items=MAX_BATCH_JOBS,
        )
        schema = Schema(
            type=OpenAPIType.OBJECT,
            title="BatchRequest",
            required=["jobs"],
            additional_properties=False,
            properties={"jobs": jobs},
        )
        examples: dict[str, Example | Reference] = {
            "two": Example(
                summary="Two jobs",
                value={
                    "jobs": [
                        {
                            "task": "notifications.webhook",
                            "payload": EXAMPLE_PAYLOAD,
                            "key": "order-17",
                        },
                        {"task": "default.prune", "priority": -1},
                    ]
                },
            ),
        }
        self.request_body = RequestBody(
            required=True,
            content={"application/json": OpenAPIMediaType(schema=schema, examples=examples)},
        )
