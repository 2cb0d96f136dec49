"""The facts of the console as the page reads them: JSON values, and the frames of its stream."""

import secrets
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from itertools import islice
from typing import Any, NamedTuple

import msgspec

from viralfx.bootstrap.doctor import ConfigurationSource
from viralfx.core.clock import Clock, timestamp
from viralfx.core.keys import owner_and_text
from viralfx.domain.doctor import Finding
from viralfx.domain.fleet import CheckChange, CheckHistory, Instance
from viralfx.domain.health.model import CheckReport, HealthReport, Status, Transition
from viralfx.domain.operations import Operations, SavedState
from viralfx.domain.shutdown import PhaseReport
from viralfx.jobs.ledger import QueueCounts
from viralfx.jobs.model import Job, JobAttempt
from viralfx.jobs.schedule import ScheduleTimes
from viralfx.resilience.breaker import CircuitBreaker
from viralfx.settings import Settings, fields, show, sources
from viralfx.web.responses import encode

View = dict[str, Any]

MAX_TEXT_CHARACTERS = 64 * 1024
"""Characters of a payload or result that are shown."""


def moment(value: datetime | None) -> str | None:
    """Return a time as text."""
    return None if value is None else timestamp(value)


def _ms(seconds: float | None) -> int | None:
    return None if seconds is None else round(seconds * 1000)


# -- the process ---------------------------------------------------------------------------------


def check_view(check: CheckReport) -> View:
    """Return one check."""
    details = check.details
    if check.live_details is not None and isinstance(details, Mapping):
        details = {**details, **check.live_details()}
    return {
        "name": check.name,
        "status": str(check.status),
        "message": check.message,
        "code": None if check.status is Status.PASS else check.code or str(check.status),
        "correlationId": check.correlation_id,
        "responseMs": _ms(check.response_time),
        "checkedAt": moment(check.checked_at),
        "since": timestamp(check.since),
        "critical": check.policy.critical,
        "gates": check.policy.required_for_readiness,
        "intervalMs": _ms(
            check.policy.interval
            if check.status is Status.PASS
            else check.policy.interval_when_failing
        ),
        "details": details,
    }


def checks_view(report: HealthReport, names: Sequence[str] | None = None) -> View:
    """Return the health with all checks, or with those of some names."""
    wanted = report.checks if names is None else [n for n in names if n in report.checks]
    return {
        "health": str(report.health),
        "failingGates": list(report.failing_gates),
        "failOpen": report.fail_open,
        "checks": [check_view(report.checks[name]) for name in wanted],
    }


def change_view(change: Transition) -> View:
    """Return a change of a check of this process."""
    return {
        "check": change.check,
        "old": None if change.old is None else str(change.old),
        "new": str(change.new),
        "code": change.code,
        "message": change.message,
        "at": timestamp(change.at),
        "correlationId": change.correlation_id,
    }


def stop_view(operations: Operations) -> View:
    """Return the whole stop of this process."""
    report = operations.shutdown.report()
    triggered = operations.shutdown.triggered
    return {
        "state": str(operations.lifecycle.state),
        "reason": report.reason,
        "deadline": moment(report.deadline),
        "remaining": round(operations.shutdown.remaining(), 1) if triggered else None,
        "stages": [_phase(phase) for phase in report.phases],
        "previous": None if operations.previous is None else _previous(operations.previous),
    }


def _phase(phase: PhaseReport) -> View:
    ended = {stage.name: stage for stage in phase.stages}
    names = list(dict.fromkeys((*phase.planned, *ended)))
    return {
        "name": str(phase.phase),
        "budgetMs": _ms(phase.budget),
        "state": phase.state,
        "durationMs": _ms(phase.duration),
        "outcome": None if phase.outcome is None else str(phase.outcome),
        "parts": [
            {
                "name": name,
                "state": "done"
                if name in ended
                else "running"
                if name in phase.running
                else "pending",
                "outcome": str(ended[name].outcome) if name in ended else None,
                "durationMs": _ms(ended[name].duration) if name in ended else None,
                "began": moment(phase.running.get(name)),
            }
            for name in names
        ],
    }


def _previous(state: SavedState) -> View:
    return {
        "savedAt": timestamp(state.saved_at),
        "starts": state.starts,
        "uptime": round(state.uptime, 3),
        "health": state.health,
        "reason": state.shutdown_reason,
        "phases": dict(state.shutdown_phases),
    }


def circuit_view(
    breaker: CircuitBreaker, rejected: int, since: datetime | None, now: datetime
) -> View:
    """Return one circuit; ``probeAt`` is when it lets a call pass."""
    snapshot = breaker.snapshot()
    remaining = snapshot["remaining"]
    probe_at = None
    if isinstance(remaining, float) and remaining:  # no duration, as a page may get this later
        probe_at = now + timedelta(seconds=min(remaining, 1e9))  # a time has a greatest value
    return {
        "name": breaker.name,
        "state": snapshot["state"],
        "failureCount": snapshot["failureCount"],
        "probeAt": moment(probe_at),
        "rejected": rejected,
        "since": moment(since),
    }


def queue_view(name: str, counts: QueueCounts, concurrency: Mapping[str, int]) -> View:
    """Return one queue, with the fields of ``GET /api/v1/queues``."""
    states = ("waiting", "scheduled", "active", "completed", "failed", "cancelled")
    return {
        "name": name,
        "paused": counts.paused,
        "concurrency": concurrency.get(name),
        "consumers": counts.consumers,
        "oldestDue": round(counts.oldest_due, 3),
        "counts": {state: getattr(counts, state) for state in states},
    }


# -- the fleet -----------------------------------------------------------------------------------

_ORDER = {"silent": 1, "stopped": 2}


def fleet_view(instances: Sequence[Instance], own: str) -> list[View]:
    """Return the instances: those that run first, then silent ones, then stopped ones."""
    shown = sorted(instances, key=lambda each: (_ORDER.get(each.state, 0), each.report.role))
    return [
        {
            "instance": each.report.instance,
            "host": each.report.host,
            "role": each.report.role,
            "version": each.report.version,
            "environment": each.report.environment,
            "startedAt": timestamp(each.report.started_at),
            "seenAt": timestamp(each.seen_at),
            "age": round(each.age, 1),
            "connected": each.connected,
            "state": each.state,
            "lastState": each.report.state,
            "reason": each.report.reason,
            "health": each.report.health,
            "checks": each.report.checks,
            "jobs": each.report.jobs,
            "queues": list(each.report.queues),
            "self": each.report.instance == own,
        }
        for each in shown
    ]


def fleet_change_view(change: CheckChange) -> View:
    """Return a change of a check of an instance."""
    return {
        "instance": change.instance,
        "check": change.check,
        "at": timestamp(change.at),
        "old": change.old,
        "new": change.new,
        "code": change.code,
    }


def history_view(found: Mapping[str, CheckHistory]) -> View:
    """Return the history of each check."""
    return {
        name: {
            "uptime": None if each.uptime is None else round(100 * each.uptime, 2),
            "segments": [
                {"at": timestamp(one.at), "status": one.status, "instance": one.instance}
                for one in each.segments
            ],
        }
        for name, each in found.items()
    }


# -- jobs ----------------------------------------------------------------------------------------


def job_view(job: Job) -> View:
    """Return a job without payload, result and failures, as ``GET /api/v1/jobs`` does."""
    error = job.error
    key_owner, key = owner_and_text(job.key)
    return {
        "id": job.id,
        "queue": job.queue,
        "task": job.task,
        "state": str(job.state),
        "attempts": job.attempts_made,
        "crashes": job.crashes,
        "error": None if error is None else {"code": error.code, "message": error.message},
        "correlationId": job.correlation_id,
        "userId": job.user_id,
        "priority": job.priority,
        "idempotencyKey": key,
        "keyOwner": key_owner,
        "createdAt": timestamp(job.created_at),
        "runAt": timestamp(job.run_at),
        "startedAt": moment(job.started_at),
        "finishedAt": moment(job.finished_at),
        "worker": job.worker,
        "cancelRequested": job.cancel_requested,
        "progress": None if job.progress is None else msgspec.Raw(job.progress),
    }


def job_details(job: Job, payload: str | None, result: str | None, *, hidden: bool) -> View:
    """Return a job with its failures; payload and result are texts that may be shown."""
    texts = (payload, result)
    return {
        **job_view(job),
        "payload": None if payload is None else payload[:MAX_TEXT_CHARACTERS],
        "result": None if result is None else result[:MAX_TEXT_CHARACTERS],
        "payloadHidden": hidden,
        "payloadBytes": len(job.payload),
        "resultBytes": 0 if job.result is None else len(job.result),
        "cut": any(text is not None and len(text) > MAX_TEXT_CHARACTERS for text in texts),
        "failures": [_failure(each) for each in reversed(job.history)],
    }


def _failure(attempt: JobAttempt) -> View:
    error = attempt.error
    return {
        "number": attempt.number,
        "startedAt": moment(attempt.started_at),
        "endedAt": timestamp(attempt.ended_at),
        "worker": attempt.worker,
        "code": error.code,
        "message": error.message,
        "traceback": error.traceback,
    }


def schedule_view(found: ScheduleTimes) -> View:
    """Return a schedule with its next times."""
    runs = [timestamp(each) for each in found.next_runs]
    return {
        "task": found.task,
        "cron": found.cron,
        "timezone": found.timezone,
        "paused": found.paused,
        "lastRunAt": moment(found.last_run_at),
        "nextRunAt": runs[0] if runs else None,
        "nextRuns": runs,
    }


def settings_view(settings: Settings, source: ConfigurationSource) -> View:
    """Return all settings with their sources in the environment; secrets are masked."""
    names = {field.variable: f"{source.env_prefix}{field.variable}" for field in fields()}
    origins = {
        variable: names.get(origin, origin)
        for variable, origin in sources(source.environ()).items()
    }
    items = [
        {
            "name": names[field.variable],
            "value": show(field.of(settings)),
            "default": show(field.default),
            "source": origins.get(field.variable, "default"),
            "meaning": field.meaning,
            "secret": field.secret,
        }
        for field in fields()
    ]
    return {"items": items}


def diagnosis_view(found: tuple[datetime, Sequence[Finding]] | None) -> View:
    """Return the findings of the doctor with their time; None: it has not run."""
    if found is None:
        return {"at": None, "findings": []}
    at, findings = found
    return {"at": timestamp(at), "findings": [_finding(each) for each in findings]}


def _finding(finding: Finding) -> View:
    return {
        "area": str(finding.area),
        "verdict": str(finding.verdict),
        "found": finding.found,
        "remedy": finding.remedy,
    }


# -- the stream ----------------------------------------------------------------------------------

_MAX_FRAMES = 256
MAX_FRAME_BYTES = 1024 * 1024
"""Size of the buffer of frames; a single larger frame is kept until the next one."""
PIECE_BYTES = 16 * 1024
"""Bytes that a reader is given at once; it holds no more bytes of its own."""
_START_SECONDS = 0.25
"""Time for which the readers that begin share a snapshot."""


class Reader:
    """A place in :class:`Frames`."""

    __slots__ = ("cut", "everything", "position", "rest", "sent", "taken_at")

    def __init__(self, *, everything: bool) -> None:
        self.everything = everything
        """Whether it gets the data that need a session."""
        self.position = -1
        """The number of the last frame that it has; -1: it needs a snapshot."""
        self.rest = b""
        """Frames that it is given piece by piece: shared with other readers, unless it is small."""
        self.sent = 0
        """Bytes of ``rest`` that it was given."""
        self.taken_at = 0.0
        """When it took the last piece, in monotonic time."""
        self.cut = False
        """True if it was given the first part of a frame only."""

    def drop_before(self, until: float) -> None:
        """Forget the rest of a frame, if the last piece was taken before this time.

        The next frame is a snapshot then.
        """
        if self.rest and self.taken_at < until:
            self.rest, self.cut, self.position = b"", True, -1


class _Snapshot(NamedTuple):
    made_at: float
    number: int
    """The last frame that it has."""
    frame: bytes
    json: bytes


class Frames:
    """The last events as frames of a stream, of a limited size; readers share them.

    Numbers are consecutive. ``snapshot(everything=...)`` returns the data to begin with.
    """

    def __init__(self, clock: Clock, snapshot: Callable[..., View]) -> None:
        self._clock = clock
        self._make = snapshot
        self._boot = secrets.token_hex(4).encode()
        self._recent: deque[tuple[int, bytes, bytes]] = deque()
        """The number of each frame, its form for a reader with a session, and the one without."""
        self._snapshots: dict[bool, _Snapshot] = {}
        self.last = 0
        """The number of the last frame."""
        self.size = 0
        """Bytes of all frames."""

    def append(self, event: str, data: bytes, *, everyone: bool) -> None:
        """Add an event; without ``everyone`` only readers with a session get it."""
        head = b"id: %s.%d\nevent: %s\n" % (self._boot, self.last + 1, event.encode())
        frame = head + b"data: %s\n\n" % data
        self.append_unnamed(frame, frame if everyone else b"")

    def append_unnamed(self, frame: bytes, public: bytes) -> None:
        """Add a frame that no reader misses, so it has no id; ``public`` needs no session."""
        self.last += 1
        recent = self._recent
        recent.append((self.last, frame, public))
        self.size += len(frame)
        # A check may have details of any size, so the number of frames alone bounds nothing.
        while len(recent) > _MAX_FRAMES or (self.size > MAX_FRAME_BYTES and len(recent) > 1):
            self.size -= len(recent.popleft()[1])

    def clear(self) -> None:
        """Make all positions and snapshots old."""
        self._snapshots.clear()
        self._recent.clear()
        self.size = 0
        self.last += 1

    def position_of(self, last_id: str) -> int:
        """Return the position after a frame with this id; -1 for the id of another process."""
        boot, _, number = last_id.partition(".")
        if boot != self._boot.decode() or not number.isascii() or not number.isdecimal():
            return -1
        position = int(number) if len(number) < 16 else -1  # noqa: PLR2004 - no count is longer
        return position if position <= self.last else -1

    def start(self, *, everything: bool) -> msgspec.Raw:
        """Return a snapshot and its id as JSON; a stream from this id on misses nothing."""
        found = self._snapshot(everything=everything)
        name = f"{self._boot.decode()}.{found.number}"
        return msgspec.Raw(encode({"id": name, "snapshot": msgspec.Raw(found.json)}))

    def _snapshot(self, *, everything: bool) -> _Snapshot:
        now = self._clock.monotonic()
        found = self._snapshots.get(everything)
        if (
            found is None
            or now - found.made_at >= _START_SECONDS
            or not self._has_all_after(found.number)
        ):
            json = encode(self._make(everything=everything))
            frame = b"id: %s.%d\nevent: snapshot\ndata: %s\n\n" % (self._boot, self.last, json)
            found = self._snapshots[everything] = _Snapshot(now, self.last, frame, json)
        return found

    def _has_all_after(self, position: int) -> bool:
        oldest = self._recent[0][0] if self._recent else self.last + 1
        return position >= oldest - 1

    def next_piece(self, reader: Reader) -> bytes:
        """Return bytes that a reader has not got; empty if there are none for it."""
        while not reader.rest and reader.position != self.last:
            reader.rest, reader.sent = self._after(reader), 0
        reader.taken_at = self._clock.monotonic()
        piece = reader.rest[reader.sent : reader.sent + PIECE_BYTES]
        reader.sent += len(piece)
        if reader.sent >= len(reader.rest):
            reader.rest = b""
        if reader.cut:
            reader.cut = False
            # The part that it has ends as an event that no page listens to.
            return b"\nevent: cut\n\n" + piece
        return piece

    def all_after(self, reader: Reader) -> bytes:
        """Return all bytes that a reader has not got."""
        return b"".join(iter(lambda: self.next_piece(reader), b""))

    def _after(self, reader: Reader) -> bytes:
        """Return one shared frame, or small ones that are one piece together.

        It is a snapshot if a frame after the position has left.
        """
        if not self._has_all_after(reader.position):
            shared = self._snapshot(everything=reader.everything)
            reader.position = shared.number
            return shared.frame
        frames: list[bytes] = []
        size = 0
        for number, frame, public in islice(
            self._recent, reader.position + 1 - self._recent[0][0], None
        ):
            form = frame if reader.everything else public
            if frames and size + len(form) > PIECE_BYTES:
                break
            frames.append(form)
            size += len(form)
            reader.position = number
        return frames[0] if len(frames) == 1 else b"".join(frames)
