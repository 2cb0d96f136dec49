"""Conversions between jobs, columns and rows of the job ledger."""

import json
from collections.abc import Collection, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, TypeVar

from viralfx.core.ids import is_job_id
from viralfx.jobs.ledger import QueueCounts
from viralfx.jobs.limits import FIRST_RUN_AT, LAST_RUN_AT
from viralfx.jobs.model import (
    Claim,
    Job,
    JobAttempt,
    JobDraft,
    JobError,
    JobState,
    Settlement,
    Unique,
)
from viralfx.jobs.postgres.ledger_sql import JOB_TIMES

T = TypeVar("T")

Row = Mapping[str, Any]

MAX_INTERVAL_SECONDS = 100 * 365 * 86400.0
"""A hundred years; later times might exceed the range of the database."""
MAX_KEY_BYTES = 2000
"""An index entry holds little more."""
MAX_CALL_BYTES = 900 * 2**20
"""Bytes of payloads or results in one call. The server reads a message up to 1 GiB; for a longer
one it ends the connection, as in an outage."""
_INFINITE = {"-infinity": FIRST_RUN_AT, "infinity": LAST_RUN_AT}
"""Times of Postgres that Python does not have; an operator may have put them in a row."""


def interval(seconds: float) -> float:
    """Clamp a duration in seconds to the range that the database can add to a time."""
    return min(max(seconds, 0.0), MAX_INTERVAL_SECONDS)


def text(value: str | None) -> str | None:
    """Replace characters that a text column cannot store: NUL and lone surrogates."""
    if value is None:
        return None
    return value.replace("\x00", "\ufffd").encode("utf-8", "replace").decode()


def identifiers(ids: Iterable[str]) -> list[str]:
    """Return the valid ids among ``ids``."""
    return [each for each in ids if is_job_id(each)]


def ids_by_queue(rows: Iterable[Row]) -> dict[str, list[str]]:
    """Group the ids of rows by queue."""
    queues: dict[str, list[str]] = {}
    for row in rows:
        queues.setdefault(row["queue"], []).append(str(row["id"]))
    return queues


def draft_columns(drafts: Collection[JobDraft]) -> tuple[list[Any] | None, ...]:
    """Return the arguments of ``ACCEPT`` up to the last one.

    Raises ``ValueError`` for a payload that is not UTF-8, a key that is too long, and payloads that
    are too large together.
    """
    _check_size("payloads", (draft.payload for draft in drafts))
    for draft in drafts:
        if draft.key is not None and len(draft.key.encode()) > MAX_KEY_BYTES:
            raise ValueError(f"an idempotency key has at most {MAX_KEY_BYTES} bytes")
    # A fixed order prevents deadlocks between calls with the same keys. Of several drafts with one
    # key, the first one stays the first.
    drafts = sorted(drafts, key=lambda draft: draft.key or draft.unique_key or "")
    return (
        [draft.id for draft in drafts],
        [draft.queue for draft in drafts],
        [draft.task for draft in drafts],
        [draft.payload.decode() for draft in drafts],
        [draft.key for draft in drafts],
        [text(draft.correlation_id) for draft in drafts],
        [text(draft.traceparent) for draft in drafts],
        [draft.run_at for draft in drafts],
        _options([draft.priority for draft in drafts]),
        _options([draft.unique_key for draft in drafts]),
        _options([draft.unique is Unique.WAITING for draft in drafts]),
        _options([text(draft.concurrency_key) for draft in drafts]),
        _options([text(draft.user_id) for draft in drafts]),
        _options([draft.max_attempts for draft in drafts]),
    )


def _options(values: list[T]) -> list[T] | None:
    """Return None for options that no draft has, so that the usual call sends and reads none."""
    return values if any(each or each == "" for each in values) else None


def states_within(state: JobState | None) -> list[str]:
    """Return the states of rows whose jobs are in ``state``; None: in any state."""
    states = [each.value for each in JobState if state in (None, each)]
    return [*states, "scheduled"] if JobState.WAITING in states else states


def completion_columns(settlements: Collection[Settlement]) -> tuple[list[Any], ...]:
    """Return the arguments of ``SETTLE_COMPLETED``; raises as :func:`settlement_columns` does."""
    ordered = _ordered(settlements)
    return (
        [each.claim.id for each in ordered],
        [each.claim.number for each in ordered],
        [None if each.result is None else each.result.decode() for each in ordered],
    )


def _ordered(settlements: Collection[Settlement]) -> list[Settlement]:
    _check_size("results", (each.result or b"" for each in settlements))
    # A fixed order prevents deadlocks between statements that settle the same jobs.
    return sorted(settlements, key=lambda settlement: settlement.claim.id)


def settlement_columns(settlements: Collection[Settlement]) -> tuple[list[Any], ...]:
    """Return the arguments of ``SETTLE_ALL``.

    Raises ``ValueError`` for a result that is not UTF-8, and results that are too large together.
    """
    ordered = _ordered(settlements)
    errors = [each.attempt_error for each in ordered]
    return (
        [each.claim.id for each in ordered],
        [each.claim.number for each in ordered],
        [each.state.value for each in ordered],
        [None if each.result is None else each.result.decode() for each in ordered],
        [None if error is None else text(error.code) for error in errors],
        [None if error is None else text(error.message) for error in errors],
        [None if each.delay is None else interval(each.delay) for each in ordered],
        [int(each.spends_attempt) for each in ordered],
        [each.error is not None for each in ordered],
        [None if error is None else text(error.traceback) for error in errors],
        [None if each.progress is None else each.progress.decode() for each in ordered],
    )


def _check_size(what: str, values: Iterable[bytes]) -> None:
    size = sum(map(len, values))
    if size > MAX_CALL_BYTES:
        raise ValueError(
            f"the {what} have {size} bytes together; a call to the database has at most"
            f" {MAX_CALL_BYTES}"
        )


def settled_columns(settlements: Collection[Settlement]) -> tuple[list[Any], ...]:
    """Return the arguments of ``SETTLED_BEFORE``: the jobs' columns after the settlements."""
    return (
        [each.claim.id for each in settlements],
        [each.claim.number for each in settlements],
        [each.state.value for each in settlements],
        [each.claim.attempt - 1 + each.spends_attempt for each in settlements],
        [each.claim.crashes for each in settlements],
    )


def with_times(row: Row) -> Row:
    """Return a row with its times, which came as text."""
    times = {name: _moment(row[name]) for name in JOB_TIMES if name in row}
    return {**row, **times}


def job_of_draft(draft: JobDraft, row: Row) -> Job:
    """Build the job that was just accepted; ``row`` has its times."""
    return Job(
        id=draft.id,
        queue=draft.queue,
        task=draft.task,
        state=JobState.WAITING,
        payload=draft.payload,
        key=draft.key,
        correlation_id=text(draft.correlation_id),
        traceparent=text(draft.traceparent),
        user_id=text(draft.user_id),
        priority=draft.priority,
        concurrency_key=text(draft.concurrency_key),
        created_at=row["created_at"],
        run_at=row["run_at"],
        asked_run_at=None if draft.run_at is None else _finite(draft.run_at),
        started_at=None,
        finished_at=None,
        attempts=0,
        crashes=0,
        claims=0,
        worker=None,
        result=None,
        error=None,
        max_attempts=draft.max_attempts,
    )


def job_of_row(row: Row) -> Job:
    """Build a job from a row."""
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
        user_id=row["user_id"],
        priority=row["priority"],
        concurrency_key=row["concurrency_key"],
        created_at=row["created_at"],
        run_at=_finite(row["run_at"]),
        asked_run_at=None if row["asked_run_at"] is None else _finite(row["asked_run_at"]),
        started_at=row["started_at"],
        finished_at=row["finished_at"],
        attempts=row["attempts"],
        crashes=row["crashes"],
        claims=row["claims"],
        worker=row["worker"],
        result=None if result is None else result.encode(),
        error=None if code is None else JobError(code=code, message=row["error_message"] or ""),
        cancel_requested=row["cancel_requested"],
        progress=None if (progress := row["progress"]) is None else progress.encode(),
        history=() if (history := row["history"]) is None else _attempts(history),
        max_attempts=row["max_attempts"],
    )


def _attempts(history: str) -> tuple[JobAttempt, ...]:
    return tuple(
        JobAttempt(
            number=each["number"],
            worker=each["worker"],
            started_at=_moment(each["started_at"]),
            ended_at=datetime.fromisoformat(each["ended_at"]).astimezone(UTC),
            error=JobError(
                code=each["code"], message=each["message"] or "", traceback=each["traceback"]
            ),
        )
        for each in json.loads(history)
    )


def _moment(moment: str | None) -> datetime | None:
    if moment is None:
        return None
    infinite = _INFINITE.get(moment)
    return datetime.fromisoformat(moment).astimezone(UTC) if infinite is None else infinite


def _finite(moment: datetime) -> datetime:
    """Return a time in the range of jobs; the driver returns infinities as those of Python."""
    if FIRST_RUN_AT.year < moment.year < LAST_RUN_AT.year:
        return moment
    return min(max(moment.replace(tzinfo=UTC), FIRST_RUN_AT), LAST_RUN_AT)


def claims_of_rows(rows: Iterable[Row], queue: str, worker: str) -> list[Claim]:
    """Build the claims of a worker in a queue, in the order in which they run."""
    ordered = sorted(rows, key=lambda row: (-row["priority"], row["due_at"], row["id"]))
    # By position and in the order of the fields, since names cost as much as all the rest.
    return [
        Claim(
            row["id"],
            queue,
            row["task"],
            row["payload"].encode(),
            worker,
            row["claims"],
            row["attempts"] + 1,
            row["crashes"],
            row["correlation_id"],
            row["traceparent"],
            row["user_id"],
            row["created_at"],
            max(0.0, row["due_since"]),
            row["max_attempts"],
        )
        for row in ordered
    ]


def counts_of_rows(rows: Iterable[Row]) -> dict[str, QueueCounts]:
    """Build the counts of queues from the rows of ``COUNTS``."""
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
            blocked=int(row["blocked"]),
            paused=row["paused"],
        )
        for row in rows
    }
