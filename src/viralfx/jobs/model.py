"""The model of jobs: drafts, jobs, filters, claims and their settlements."""

from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Final, NamedTuple

from viralfx.core.errors import ViralFXError
from viralfx.jobs.codec import same_json


class JobState(StrEnum):
    """The state of a job. A final state changes only by an explicit retry."""

    WAITING = "waiting"
    """Runs from its ``run_at`` on."""
    ACTIVE = "active"
    """Assigned to a worker."""
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        """True if the job changes no more by itself."""
        return self not in (JobState.WAITING, JobState.ACTIVE)

    @classmethod
    def parse(cls, text: str) -> "JobState":
        """Return the member of this text. Raises ``ValueError``."""
        try:
            return cls(text)
        except ValueError:
            raise ValueError(f"state must be one of {', '.join(cls)}: {text!r}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class JobError:
    """Why an execution did not complete."""

    code: str
    """For programs: ``error``, ``timeout``, ``discarded``, ``unknown_task``, ``payload``,
    ``result`` or ``crashed``; of an attempt also ``cancelled`` or ``handed_back``."""
    message: str
    """For people. The text of the task's exception, with the secrets of the settings redacted."""
    traceback: str | None = None
    """The end of the exception's traceback, redacted as the message is; only of an attempt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobAttempt:
    """A past execution that did not complete the job. Times are UTC.

    A ledger keeps the last :data:`MAX_HISTORY` of a job.
    """

    number: int
    """The number of its claim; it counts from 1."""
    worker: str | None
    started_at: datetime | None
    ended_at: datetime
    error: JobError


MAX_HISTORY = 50
"""Executions that the history of a job has."""
MAX_TRACEBACKS = 5
"""The last executions that keep their tracebacks: each further execution rewrites the history."""


class Unique(StrEnum):
    """How long a job keeps another one with the same task and payload from being accepted."""

    WAITING = "waiting"
    """Until a worker claims it for the first time."""
    UNFINISHED = "unfinished"
    """Until it is completed, failed or cancelled."""

    @classmethod
    def parse(cls, text: str) -> "Unique":
        """Return the member of this text. Raises ``ValueError``."""
        try:
            return cls(text)
        except ValueError:
            allowed = " or ".join(repr(str(each)) for each in cls)
            raise ValueError(f"unique must be {allowed}: {text!r}") from None


MIN_PRIORITY = -100
MAX_PRIORITY = 100
"""The range of priorities; a higher number runs first. Each one in use costs claims and polls."""


def check_priority(priority: Any) -> int:
    """Return a priority. Raises ``ValueError`` for another type or a number out of range."""
    whole = isinstance(priority, int) and not isinstance(priority, bool)
    if not whole or not MIN_PRIORITY <= priority <= MAX_PRIORITY:
        raise ValueError(
            f"priority must be a whole number from {MIN_PRIORITY} to {MAX_PRIORITY}: {priority!r}"
        )
    return int(priority)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobDraft:
    """A requested job that no ledger has accepted yet."""

    id: str
    queue: str
    task: str
    payload: bytes
    """JSON, as received."""
    run_at: datetime | None = None
    """UTC; None: as soon as possible."""
    key: str | None = None
    """Idempotency key: the ledger keeps one job for each key. That of a name has the form of
    :attr:`~viralfx.domain.access.NamedKey.stored`."""
    correlation_id: str | None = None
    traceparent: str | None = None
    user_id: str | None = None
    """The user of the request that submitted it."""
    priority: int = 0
    """Of the due jobs of a queue, one with a higher number runs first."""
    unique: Unique | None = None
    unique_key: str | None = None
    """A digest of the task and the payload; None unless ``unique`` is set."""
    concurrency_key: str | None = None
    """The jobs of its task with the same key share the task's limits."""
    max_attempts: int | None = None
    """The most attempts; None: as many as the retry policy of the task allows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job as the ledger knows it. Times are UTC."""

    id: str
    queue: str
    task: str
    state: JobState
    payload: bytes
    """JSON; empty in a list of jobs."""
    key: str | None
    correlation_id: str | None
    traceparent: str | None
    user_id: str | None
    priority: int
    concurrency_key: str | None
    created_at: datetime
    run_at: datetime
    """When it is due: the requested time, at the earliest its acceptance; later the time of its
    next attempt."""
    asked_run_at: datetime | None
    """The ``run_at`` of its draft."""
    started_at: datetime | None
    """When it was last claimed."""
    finished_at: datetime | None
    """When it reached a final state."""
    attempts: int
    """Attempts spent: failures and time-outs of the task itself."""
    crashes: int
    """Workers whose lease ran out while they ran it."""
    claims: int
    """How often it was claimed; this number never decreases."""
    worker: str | None
    """The worker that has it, while active."""
    result: bytes | None
    """JSON, once completed; None in a list of jobs."""
    error: JobError | None
    """The last error; None once completed."""
    cancel_requested: bool = False
    """True of an active job that its worker has to cancel; it ends as completed or cancelled."""
    progress: bytes | None = None
    """JSON: the last report of its task."""
    history: tuple[JobAttempt, ...] = ()
    """The last executions that did not complete it, the oldest first; empty in a list of jobs."""
    max_attempts: int | None = None

    @property
    def attempts_made(self) -> int:
        """The spent attempts, and the running or successful one."""
        return self.attempts + (self.state in (JobState.ACTIVE, JobState.COMPLETED))

    def comes_from(self, draft: JobDraft) -> bool:
        """Return True if ``draft`` requests the same job, apart from its id and trace context.

        Payloads are compared by their JSON values, and times as moments.
        """
        asked, wanted = (
            (self.queue, self.task, self.asked_run_at),
            (draft.queue, draft.task, draft.run_at),
        )
        return asked == wanted and same_json(self.payload, draft.payload)


def in_utc(moment: object, name: str) -> datetime | None:
    """Return a time in UTC. Raises ``ValueError`` for a value without a time zone."""
    if moment is None:
        return None
    if not isinstance(moment, datetime) or moment.tzinfo is None:
        raise ValueError(
            f"{name} must be a datetime with a time zone, such as datetime.now(UTC) +"
            f" timedelta(minutes=5): {moment!r}"
        )
    try:
        return moment.astimezone(UTC)
    except OverflowError:
        raise ValueError(f"{name} is out of range in UTC: {moment!r}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFilter:
    """The jobs that a call returns or changes; None matches every job.

    Raises ``TypeError`` for a value of a wrong type, and ``ValueError`` for an unknown state, a
    time without a time zone and a limit below one.
    """

    queue: str | None = None
    state: JobState | None = None
    task: str | None = None
    code: str | None = None
    """Only jobs whose last error has this code."""
    created_before: datetime | None = None
    """Only jobs that were accepted before this time."""
    before: str | None = None
    """Only jobs with a lower id. The job of that id may have been pruned; a malformed id matches no
    job."""
    limit: int | None = None
    """The most jobs to return; None: 50. A change of many jobs has no limit."""

    def __post_init__(self) -> None:
        """Check the fields."""
        for name in ("queue", "task", "code", "before"):
            if not isinstance(value := getattr(self, name), str | None):
                hint = "; a time is created_before" if isinstance(value, datetime) else ""
                raise TypeError(f"{name} must be a text, not {type(value).__name__}{hint}")
        if self.state is not None:
            object.__setattr__(self, "state", JobState.parse(self.state))
        object.__setattr__(self, "created_before", in_utc(self.created_before, "created_before"))
        if self.limit is not None:
            if isinstance(self.limit, bool) or not isinstance(self.limit, int):
                raise TypeError(f"limit must be a whole number, not {type(self.limit).__name__}")
            if self.limit < 1:
                raise ValueError(f"limit must be at least 1: {self.limit}")

    @property
    def most(self) -> int:
        """The limit, or its default."""
        return DEFAULT_LIMIT if self.limit is None else self.limit

    @property
    def is_search(self) -> bool:
        """True if it has a field for which a ledger examines each job."""
        return any(each is not None for each in (self.task, self.code, self.created_before))


DEFAULT_LIMIT = 50
ANY_JOB: Final = JobFilter()


def filter_in_words(wanted: JobFilter) -> str:
    """Return the fields of a filter that are set, as the target of a change of many jobs."""
    names = ("queue", "task", "state", "code", "created_before", "before")
    given = {name: getattr(wanted, name) for name in names}
    return ", ".join(f"{name}={value}" for name, value in given.items() if value is not None)


# A worker makes a claim and a settlement for each job. Making a frozen dataclass takes three times
# as long.
class Claim(NamedTuple):
    """The assignment of a job to one worker for one execution.

    ``number`` is the fencing token: the ledger accepts an outcome only for the job's latest claim.
    """

    id: str
    queue: str
    task: str
    payload: bytes
    worker: str
    number: int
    """Counts the claims of this job from 1."""
    attempt: int
    """Counts the attempts from 1; hand-backs and crashes do not count."""
    crashes: int
    correlation_id: str | None
    traceparent: str | None
    user_id: str | None
    created_at: datetime
    due_since: float
    """Seconds between the job's due time and this claim."""
    max_attempts: int | None = None


PAYLOAD = "payload"
"""Code of a job whose payload does not fit its task, of all workers that tried."""
UNKNOWN_TASK = "unknown_task"
"""Code of a job whose task no worker knew."""


def correlation_id_of_job(job: JobDraft | Job | Claim) -> str:
    """Return the correlation id of a job; one without a request has an id of its own.

    All attempts of a job share it.
    """
    return job.correlation_id or job.id.replace("-", "")


class Settlement(NamedTuple):
    """The outcome of a claim, as the ledger records it."""

    claim: Claim
    state: JobState
    """COMPLETED, FAILED, CANCELLED, or WAITING for another execution."""
    result: bytes | None = None
    error: JobError | None = None
    delay: float | None = None
    """Seconds until a waiting job is due again; None: its due time does not change, so that it
    keeps its place in the queue."""
    spends_attempt: bool = False
    progress: bytes | None = None
    """JSON: the last report of the task."""

    @property
    def attempt_error(self) -> JobError | None:
        """The error that the job's history keeps of this execution; None: it keeps none."""
        if self.error is not None:
            return self.error
        if self.state is JobState.CANCELLED:
            return CANCELLED_ON_REQUEST
        handed_back = self.state is JobState.WAITING and self.delay is None
        return HANDED_BACK if handed_back else None

    @property
    def refused(self) -> bool:
        """True if the worker could not decode the payload, so that other workers have to try."""
        waits = self.state is JobState.WAITING
        return waits and self.error is not None and self.error.code == PAYLOAD


CANCELLED_ON_REQUEST = JobError(code="cancelled", message="the task ended on request")
HANDED_BACK = JobError(code="handed_back", message="the worker stopped")


def completed(claim: Claim, result: bytes) -> Settlement:
    """Return the settlement of a job that completed; ``result`` is JSON."""
    return Settlement(claim, JobState.COMPLETED, result)


def failed(claim: Claim, error: JobError) -> Settlement:
    """Return the settlement of a job that failed for good."""
    return Settlement(claim=claim, state=JobState.FAILED, error=error, spends_attempt=True)


def retried(claim: Claim, error: JobError, delay: float) -> Settlement:
    """Return the settlement of a failed attempt; the job is due again in ``delay`` seconds."""
    return Settlement(
        claim=claim, state=JobState.WAITING, error=error, delay=delay, spends_attempt=True
    )


def postponed(claim: Claim, error: JobError, delay: float) -> Settlement:
    """Return the settlement that makes the job due in ``delay`` seconds, its attempt unspent."""
    return Settlement(claim=claim, state=JobState.WAITING, error=error, delay=delay)


def refused(claim: Claim, message: str) -> Settlement:
    """Return the settlement of a job whose payload the worker cannot decode.

    The job is due now, its attempt unspent, for workers that have not refused it.
    """
    return postponed(claim, JobError(code=PAYLOAD, message=message), 0.0)


def handed_back(claim: Claim) -> Settlement:
    """Return the settlement that makes the job due again, as if it had never been claimed."""
    return Settlement(claim=claim, state=JobState.WAITING)


def cancelled(claim: Claim, error: JobError | None = None) -> Settlement:
    """Return the settlement of a job that ended on request; ``error``: of its task meanwhile."""
    return Settlement(claim=claim, state=JobState.CANCELLED, error=error)


class JobNotFoundError(ViralFXError):
    """There is no job of this id."""


class JobStateError(ViralFXError):
    """The job's state does not allow the operation."""

    def __init__(self, message: str, state: JobState) -> None:
        self.state = state
        """The state of the job."""
        super().__init__(message)


class UnknownQueueError(ViralFXError):
    """There is no queue of this name."""


class InvalidFilterError(ViralFXError):
    """A filter does not say which jobs to change, or selects jobs that cannot be changed."""


class KeyConflictError(ViralFXError):
    """The idempotency key belongs to a different job."""

    def __init__(self, message: str, job: "Job | None" = None) -> None:
        self.job = job
        """That job, if the message names it."""
        super().__init__(message)


def unknown_message(task: str, patience: float) -> str:
    """Return the error message of a job whose task no worker knew for ``patience`` seconds."""
    return f"no worker knew the task {task!r} for {patience:g} s; check TASK_MODULES of the workers"


def crash_message(crashes: int, worker: str) -> str:
    """Return the error message of a job that a sweep failed; ``worker`` is the last one.

    It states the knowledge of the ledger: a lease ran out. The worker may have died, or was only
    stopped or cut off from the ledger.
    """
    workers = "worker" if crashes == 1 else "workers"
    return f"the lease of {crashes} {workers} ran out while they ran it; the last was {worker}"
