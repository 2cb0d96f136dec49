"""Between the words of jobs and the rows of their table."""

import uuid
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from viralfx.domain.jobs.job import Claim, Job, JobDraft, JobError, JobState, Settlement
from viralfx.domain.jobs.ledger import QueueCounts

Row = Mapping[str, Any]

_LONGEST = 100 * 365 * 86400.0
"""Seconds: what is later than this is so late that the database's calendar need not know."""
_LONGEST_KEY = 2000
"""Bytes; an entry of an index holds hardly more."""


def interval(seconds: float) -> float:
    """Return a duration that the database can add to its time."""
    return min(max(seconds, 0.0), _LONGEST)


def text(value: str | None) -> str | None:
    """Return what a column of text can hold: no NUL, no half of a surrogate pair."""
    if value is None:
        return None
    return value.replace("\x00", "\ufffd").encode("utf-8", "replace").decode()


def identifiers(ids: Iterable[str]) -> list[str]:
    """Return those that are ids, in their one spelling."""
    return [each for each in ids if is_identifier(each)]


def identifier(candidate: str) -> str | None:
    """Return an id in its one spelling; None for what is none in any."""
    try:
        return str(uuid.UUID(candidate))
    except ValueError:
        return None


def is_identifier(candidate: str) -> bool:
    """Tell whether this is how an id is written."""
    return identifier(candidate) == candidate


def ids_by_queue(rows: Iterable[Row]) -> dict[str, list[str]]:
    """Return the ids of rows by their queues."""
    queues: dict[str, list[str]] = {}
    for row in rows:
        queues.setdefault(row["queue"], []).append(str(row["id"]))
    return queues


def draft_columns(drafts: Collection[JobDraft]) -> tuple[list[Any], ...]:
    """Return the arguments of ``ACCEPT``.

    Raises ``ValueError`` for a payload that is no UTF-8 and for a key that is too long.
    """
    for draft in drafts:
        if draft.key is not None and len(draft.key.encode()) > _LONGEST_KEY:
            raise ValueError(f"an idempotency key has at most {_LONGEST_KEY} bytes")
    return (
        [draft.id for draft in drafts],
        [draft.queue for draft in drafts],
        [draft.task for draft in drafts],
        [draft.payload.decode() for draft in drafts],
        [draft.key for draft in drafts],
        [text(draft.correlation_id) for draft in drafts],
        [text(draft.traceparent) for draft in drafts],
        [draft.run_at for draft in drafts],
    )


def settlement_columns(settlements: Collection[Settlement]) -> tuple[list[Any], ...]:
    """Return the arguments of ``SETTLE``; raises ``ValueError`` for a result that is no UTF-8."""
    # In one order, so that two who settle the same jobs do not wait for each other.
    ordered = sorted(settlements, key=lambda settlement: settlement.claim.id)
    return (
        [each.claim.id for each in ordered],
        [each.claim.number for each in ordered],
        [each.state.value for each in ordered],
        [None if each.result is None else each.result.decode() for each in ordered],
        [None if each.error is None else text(each.error.code) for each in ordered],
        [None if each.error is None else text(each.error.message) for each in ordered],
        [None if each.delay is None else interval(each.delay) for each in ordered],
        [int(each.spends_attempt) for each in ordered],
    )


def settled_columns(settlements: Collection[Settlement]) -> tuple[list[Any], ...]:
    """Return the arguments of ``SETTLED_BEFORE``: how the jobs look once these were taken."""
    return (
        [each.claim.id for each in settlements],
        [each.claim.number for each in settlements],
        [each.state.value for each in settlements],
        [each.claim.attempt - 1 + each.spends_attempt for each in settlements],
        [each.claim.crashes for each in settlements],
    )


def job_of_draft(draft: JobDraft, row: Row) -> Job:
    """Return the job that was just accepted; ``row`` has its times."""
    return Job(
        id=draft.id,
        queue=draft.queue,
        task=draft.task,
        state=JobState.WAITING,
        payload=draft.payload,
        key=draft.key,
        correlation_id=text(draft.correlation_id),
        traceparent=text(draft.traceparent),
        created_at=row["created_at"],
        run_at=row["run_at"],
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


def job_of_row(row: Row) -> Job:
    """Return a job."""
    code, result = row["error_code"], row["result"]
    return Job(
        id=str(row["id"]),
        queue=row["queue"],
        task=row["task"],
        state=JobState(row["state"]),
        payload=row["payload"].encode(),
        key=row["key"],
        correlation_id=row["correlation_id"],
        traceparent=row["traceparent"],
        created_at=row["created_at"],
        run_at=row["run_at"],
        asked_run_at=row["asked_run_at"],
        started_at=row["started_at"],
        finished_at=row["finished_at"],
        attempts=row["attempts"],
        crashes=row["crashes"],
        claims=row["claims"],
        worker=row["worker"],
        result=None if result is None else result.encode(),
        error=None if code is None else JobError(code=code, message=row["error_message"] or ""),
    )


def claims_of_rows(rows: Iterable[Row], worker: str) -> list[Claim]:
    """Return what a worker was given, the longest due first."""
    ordered = sorted(rows, key=lambda row: (row["run_at"], row["id"]))
    return [
        Claim(
            id=str(row["id"]),
            queue=row["queue"],
            task=row["task"],
            payload=row["payload"].encode(),
            worker=worker,
            number=row["claims"],
            attempt=row["attempts"] + 1,
            crashes=row["crashes"],
            correlation_id=row["correlation_id"],
            traceparent=row["traceparent"],
            created_at=row["created_at"],
            due_since=max(0.0, (row["started_at"] - row["run_at"]).total_seconds()),
        )
        for row in ordered
    ]


def counts_of_rows(rows: Iterable[Row]) -> dict[str, QueueCounts]:
    """Return what ``COUNTS`` found."""
    return {
        row["queue"]: QueueCounts(
            waiting=int(row["waiting"]),
            scheduled=int(row["scheduled"]),
            active=int(row["active"]),
            completed=int(row["completed"]),
            failed=int(row["failed"]),
            cancelled=int(row["cancelled"]),
            oldest_due=float(row["oldest_due"]),
            consumers=int(row["consumers"]),
        )
        for row in rows
    }
