"""The words of jobs: what is accepted, what a worker is given, and how it ends."""

import secrets
import time
import uuid
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from viralfx.domain.errors import ViralFXError


class JobState(StrEnum):
    """Where a job is. It leaves the last three only by a retry that somebody asked for."""

    WAITING = "waiting"
    """To be run; not before its ``run_at``."""
    ACTIVE = "active"
    """A worker was given it."""
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        """Whether nothing more happens to the job by itself."""
        return self not in (JobState.WAITING, JobState.ACTIVE)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobError:
    """Why an execution did not complete."""

    code: str
    """For programs: ``error``, ``timeout``, ``unknown_task``, ``payload``, ``result`` or
    ``crashed``."""
    message: str
    """For people. What the task raised, so it may hold what the task put into it, but for the
    secrets that the process knows of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobDraft:
    """What is asked for: a job that no ledger has accepted yet."""

    id: str
    queue: str
    task: str
    payload: bytes
    """JSON, as it came."""
    run_at: datetime | None = None
    """UTC; None: as soon as possible."""
    key: str | None = None
    """Idempotency key: the ledger keeps one job under it."""
    correlation_id: str | None = None
    traceparent: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job as the ledger knows it. Times are UTC."""

    id: str
    queue: str
    task: str
    state: JobState
    payload: bytes
    key: str | None
    correlation_id: str | None
    traceparent: str | None
    created_at: datetime
    run_at: datetime
    """When it is due: what was asked for, but not before it was accepted; then the time of its
    next attempt."""
    asked_run_at: datetime | None
    """The ``run_at`` of its draft."""
    started_at: datetime | None
    """When it was last given to a worker."""
    finished_at: datetime | None
    """When it reached a final state."""
    attempts: int
    """Attempts spent: failures and time-outs of the task itself."""
    crashes: int
    """Workers that died over it."""
    claims: int
    """How often a worker was given it; never less than before, whatever happens to the job."""
    worker: str | None
    """Who has it, while active."""
    result: bytes | None
    """JSON, once completed."""
    error: JobError | None
    """The last one; none once completed."""

    def comes_from(self, draft: JobDraft) -> bool:
        """Tell whether ``draft`` asks for just this job, but for its id and traces."""
        return (self.queue, self.task, self.payload, self.asked_run_at) == (
            draft.queue,
            draft.task,
            draft.payload,
            draft.run_at,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One execution of a job, given to one worker.

    ``number`` is the fence: the ledger takes an outcome only from the job's latest claim.
    """

    id: str
    queue: str
    task: str
    payload: bytes
    worker: str
    number: int
    """Counts the claims of this job from 1."""
    attempt: int
    """Counts the attempts from 1; it does not grow with hand-backs and crashes."""
    crashes: int
    correlation_id: str | None
    traceparent: str | None
    created_at: datetime
    due_since: float
    """Seconds from when the job was due until it was given away."""


def conversation_of(job: JobDraft | Job | Claim) -> str:
    """Return the correlation id of a job's lines: one that nobody's request asked for is its own.

    So all attempts of such a job are one conversation, too.
    """
    return job.correlation_id or job.id.replace("-", "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settlement:
    """What becomes of a claimed job."""

    claim: Claim
    state: JobState
    """COMPLETED, FAILED, or WAITING to be run again."""
    result: bytes | None = None
    error: JobError | None = None
    delay: float | None = None
    """Seconds until it is due again, where it waits; None: due as it was, so that it keeps its
    place."""
    spends_attempt: bool = False


def completed(claim: Claim, result: bytes) -> Settlement:
    """Settle by its result."""
    return Settlement(claim=claim, state=JobState.COMPLETED, result=result)


def failed(claim: Claim, error: JobError) -> Settlement:
    """Settle for good after the last attempt."""
    return Settlement(claim=claim, state=JobState.FAILED, error=error, spends_attempt=True)


def retried(claim: Claim, error: JobError, delay: float) -> Settlement:
    """Run again in ``delay`` seconds; the attempt is spent."""
    return Settlement(
        claim=claim, state=JobState.WAITING, error=error, delay=delay, spends_attempt=True
    )


def postponed(claim: Claim, error: JobError, delay: float) -> Settlement:
    """Run again in ``delay`` seconds, the attempt unspent: not the task's own failure."""
    return Settlement(claim=claim, state=JobState.WAITING, error=error, delay=delay)


def handed_back(claim: Claim) -> Settlement:
    """Give the job to whoever comes next, as if it had never been claimed."""
    return Settlement(claim=claim, state=JobState.WAITING)


class JobNotFoundError(ViralFXError):
    """There is no job of this id."""


class JobStateError(ViralFXError):
    """The job is in a state that does not allow what was asked for."""

    def __init__(self, message: str, state: JobState) -> None:
        self.state = state
        super().__init__(message)


class KeyConflictError(ViralFXError):
    """The idempotency key belongs to a job that was asked for otherwise."""


class LedgerUnavailableError(ViralFXError):
    """The ledger cannot be reached now, or not in time; what was asked for may have happened."""


class UnstorableError(ViralFXError):
    """What an outcome says, its result or its message, is nothing that the ledger can keep."""


class NotMigratedError(LedgerUnavailableError):
    """The ledger's tables are missing: ``viralfx migrate`` has not been run."""


class _Ids:
    """Makes UUIDs of version 7 (RFC 9562)."""

    def __init__(self) -> None:
        self._last = 0

    def make(self) -> uuid.UUID:
        # Of the system: no two processes draw the same, whoever forked or seeded them.
        chance = secrets.randbits(73)
        # The time in milliseconds and what follows it are one number that only grows: also within
        # a millisecond, and while the clock is set back.
        moment = time.time_ns() // 1_000_000 << 12 | chance >> 62
        self._last = max(self._last + 1, moment)
        milliseconds, count = divmod(self._last, 1 << 12)
        value = milliseconds << 80 | 0x7 << 76 | count << 64
        return uuid.UUID(int=value | 0b10 << 62 | chance & 2**62 - 1)


_ids = _Ids()


def new_job_id() -> str:
    """Make a UUID that no other job has; those of one process sort in the order they were made."""
    return str(_ids.make())
