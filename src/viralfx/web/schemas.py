"""The bodies of the operations endpoints, field by field as clients read them, and their values."""

import platform
from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from viralfx.core.clock import timestamp
from viralfx.domain.health.model import (
    CheckReport,
    HealthReport,
    NotReadyReason,
    Status,
    Transition,
)
from viralfx.domain.operations import Operations, SavedState
from viralfx.domain.shutdown import PhaseReport
from viralfx.telemetry.logging.lines import LoggerLevel

Timestamp = Annotated[str, Meta(description="UTC, like 2026-01-06T12:00:00.000Z")]
Seconds = Annotated[float, Meta(description="Seconds")]
Milliseconds = Annotated[int, Meta(description="Milliseconds")]


class _Body(msgspec.Struct, kw_only=True, rename="camel"):
    pass


class BasicHealth(_Body):
    """``GET /health``."""

    status: Annotated[str, Meta(description="ok or shutting_down")]
    timestamp: Timestamp
    uptime: Seconds
    environment: str


class Liveness(_Body):
    """``GET /health/live``."""

    alive: bool
    uptime: Seconds
    timestamp: Timestamp


class Readiness(_Body, kw_only=True, omit_defaults=True):
    """``GET /health/ready``."""

    ready: bool
    checks: dict[str, bool]
    reason: Annotated[
        str | None, Meta(description="starting, draining or failing; absent when ready")
    ] = None
    degraded: Annotated[
        bool,
        Meta(description="Ready although a shared dependency fails for READINESS_FAIL_OPEN_AFTER"),
    ] = False


class Startup(_Body):
    """``GET /health/startup``."""

    started: bool
    pending: Annotated[
        list[str],
        Meta(
            description="Checks that have no result yet, or that readiness requires and that fail"
        ),
    ]


class CheckError(_Body):
    """The reason why a check does not pass: a code, and the correlation id of its log lines."""

    code: str
    correlation_id: str | None


class Change(_Body):
    """One change of a check's status."""

    at: Timestamp
    old: str | None
    new: str
    code: str | None


class CheckState(_Body, kw_only=True, omit_defaults=True):
    """One check, as in ``GET /health/detailed``."""

    status: Annotated[str, Meta(description="pass, warn or fail")]
    message: str
    details: Any
    response_time: Annotated[
        int | None, Meta(description="Duration of the last attempt in milliseconds")
    ]
    since: Annotated[str, Meta(description="Time of the last change of status")]
    checked_at: Annotated[str | None, Meta(description="Time of the last check")]
    error: CheckError | None = None


class NamedCheckState(CheckState, kw_only=True):
    """``GET /health/{check}``: the check with its latest changes."""

    name: str
    history: list[Change]


class GroupState(_Body):
    """``GET /health/group/{group}``."""

    name: str
    status: Annotated[str, Meta(description="The worst status: pass, warn or fail")]
    timestamp: Timestamp
    checks: Annotated[dict[str, CheckState], Meta(description="The checks of the group")]


class MemoryUsage(_Body):
    """Memory in bytes; ADR-0011 defines the fields."""

    rss: int
    heap_total: int
    heap_used: int
    external: int


class Metrics(_Body):
    """The resources that the process uses."""

    response_time: Annotated[int, Meta(description="Milliseconds of all checks together")]
    memory_usage: MemoryUsage
    cpu_usage: Annotated[float, Meta(description="Percent of one core since the last check")]


class DetailedHealth(_Body):
    """``GET /health/detailed``."""

    status: Annotated[str, Meta(description="healthy, degraded or unhealthy")]
    timestamp: Timestamp
    uptime: Seconds
    version: str
    environment: str
    checks: dict[str, CheckState]
    metrics: Metrics


class StageState(_Body):
    """One stage of a phase of the shutdown."""

    name: str
    outcome: Annotated[str, Meta(description="ok, failed or timeout")]
    duration: Milliseconds


class PhaseState(_Body):
    """One phase of the shutdown."""

    name: str
    budget: Milliseconds
    state: Annotated[str, Meta(description="pending, running or done")]
    duration: Milliseconds | None
    outcome: Annotated[str | None, Meta(description="ok, failed or timeout")]
    parts: list[StageState]


class ShutdownAccepted(_Body):
    """``POST /health/shutdown``."""

    state: Annotated[str, Meta(description="The state of the process, such as lame_duck")]
    reason: str | None
    deadline: Timestamp | None


class PreviousRun(_Body):
    """The saved state of the previous process."""

    saved_at: Timestamp
    starts: int
    uptime: Seconds
    health: str
    reason: str | None
    phases: dict[str, str]


class ShutdownStatus(ShutdownAccepted):
    """``GET /health/shutdown``."""

    stages: list[PhaseState]
    previous: PreviousRun | None


class Info(_Body):
    """``GET /health/info``."""

    version: str
    commit: Annotated[str | None, Meta(description="The value of REVISION")]
    started_at: Annotated[str, Meta(description="Time when this process started")]
    python: Annotated[str, Meta(description="Version of Python, like 3.13.1")]
    environment: str
    instance: Annotated[str, Meta(description="Name of this process, as in the fleet")]
    role: Annotated[str, Meta(description="api or worker")]
    adapters: Annotated[
        dict[str, str],
        Meta(description="Technology of each port: postgres, redis, memory and so on"),
    ]


class LoggerState(_Body):
    """``GET`` and ``PUT /health/loggers/{name}``."""

    level: Annotated[
        str | None,
        Meta(description="The logger's own level; null if it inherits its parent's"),
    ]
    effective_level: Annotated[str, Meta(description="The level in force")]


class Loggers(_Body):
    """``GET /health/loggers``."""

    levels: Annotated[list[str], Meta(description="The levels, the most severe first")]
    loggers: dict[str, LoggerState]


class NewLevel(msgspec.Struct, forbid_unknown_fields=True):
    """The body of ``PUT /health/loggers/{name}``."""

    level: Annotated[
        str | None,
        Meta(description="error, warn, log, debug or verbose; null: the original level"),
    ]


# -- their values --------------------------------------------------------------------------------


_HISTORY_SHOWN = 20
_ALWAYS_LISTED = ("database", "redis")


def readiness(report: HealthReport, reason: NotReadyReason | None) -> Readiness:
    """Return the body of the readiness probe; ``reason`` is None if the service is ready."""
    return Readiness(
        ready=reason is None,
        checks={
            name: check.status is not Status.FAIL
            for name, check in report.checks.items()
            if name in _ALWAYS_LISTED or check.policy.required_for_readiness
        },
        reason=None if reason is None else str(reason),
        degraded=reason is None and report.fail_open,
    )


def startup(report: HealthReport, *, application_started: bool) -> Startup:
    """Return the body of the startup probe, with the checks that start-up waits for."""
    started = report.started and application_started
    waiting = [
        name
        for name, check in report.checks.items()
        if check.checked_at is None or name in report.failing_gates
    ]
    return Startup(started=started, pending=[] if started else waiting)


def detailed(operations: Operations, report: HealthReport) -> DetailedHealth:
    """Return all checks and figures; the endpoint replaces time and uptime."""
    usage = operations.usage()
    times = [c.response_time for c in report.checks.values() if c.response_time is not None]
    return DetailedHealth(
        status=str(report.health),
        timestamp="",
        uptime=0.0,
        version=operations.version,
        environment=operations.environment,
        checks={name: check_state(check) for name, check in report.checks.items()},
        metrics=Metrics(
            response_time=_milliseconds(sum(times)),
            memory_usage=MemoryUsage(
                rss=usage.rss,
                heap_total=usage.heap_total,
                heap_used=usage.heap_used,
                external=usage.external,
            ),
            cpu_usage=usage.cpu_percent,
        ),
    )


def check_state(check: CheckReport) -> CheckState:
    """Return the body of one check, as in ``GET /health/detailed``."""
    seconds = check.response_time
    response_time = None if seconds is None else _milliseconds(seconds)
    details = check.details
    if isinstance(details, Mapping):
        # The jq filters of docs/operations.md read the response time here as well.
        live = {} if check.live_details is None else check.live_details()
        details = {**details, **live, "responseTime": response_time}
    error = None
    if check.status is not Status.PASS:
        error = CheckError(
            code=check.code or str(check.status), correlation_id=check.correlation_id
        )
    return CheckState(
        status=str(check.status),
        message=check.message,
        details=details,
        response_time=response_time,
        since=timestamp(check.since),
        checked_at=timestamp(check.checked_at) if check.checked_at else None,
        error=error,
    )


def named_check(check: CheckReport, history: tuple[Transition, ...]) -> NamedCheckState:
    """Return the body of ``GET /health/{check}``: the check with its latest changes."""
    changes = [change for change in history if change.check == check.name]
    return NamedCheckState(
        name=check.name,
        history=[
            Change(
                at=timestamp(change.at),
                old=str(change.old) if change.old else None,
                new=str(change.new),
                code=change.code,
            )
            for change in changes[-_HISTORY_SHOWN:]
        ],
        **msgspec.structs.asdict(check_state(check)),
    )


def shutdown_accepted(operations: Operations) -> ShutdownAccepted:
    """Return the summary of the shutdown."""
    report = operations.shutdown.report()
    return ShutdownAccepted(
        state=str(operations.lifecycle.state),
        reason=report.reason,
        deadline=timestamp(report.deadline) if report.deadline else None,
    )


def shutdown_status(operations: Operations) -> ShutdownStatus:
    """Return all phases of the shutdown, and the saved state of the previous process."""
    previous = operations.previous
    return ShutdownStatus(
        stages=[_phase(phase) for phase in operations.shutdown.report().phases],
        previous=_previous(previous) if previous else None,
        **msgspec.structs.asdict(shutdown_accepted(operations)),
    )


def _phase(phase: PhaseReport) -> PhaseState:
    return PhaseState(
        name=str(phase.phase),
        budget=_milliseconds(phase.budget),
        state=phase.state,
        duration=None if phase.duration is None else _milliseconds(phase.duration),
        outcome=str(phase.outcome) if phase.outcome else None,
        parts=[
            StageState(
                name=stage.name,
                outcome=str(stage.outcome),
                duration=_milliseconds(stage.duration),
            )
            for stage in phase.stages
        ],
    )


def _previous(state: SavedState) -> PreviousRun:
    return PreviousRun(
        saved_at=timestamp(state.saved_at),
        starts=state.starts,
        uptime=round(state.uptime, 3),
        health=state.health,
        reason=state.shutdown_reason,
        phases=dict(state.shutdown_phases),
    )


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)


def group_state(
    name: str, checks: Mapping[str, CheckReport], worst: Status, now: datetime
) -> GroupState:
    """Return the body of ``GET /health/group/{group}``."""
    return GroupState(
        name=name,
        status=str(worst),
        timestamp=timestamp(now),
        checks={check: check_state(report) for check, report in checks.items()},
    )


def info(operations: Operations) -> Info:
    """Return the body of ``GET /health/info``."""
    return Info(
        version=operations.version,
        commit=operations.revision,
        started_at=timestamp(operations.started_at),
        python=platform.python_version(),
        environment=operations.environment,
        instance=operations.instance,
        role=operations.role,
        adapters=dict(operations.adapters),
    )


def logger_state(level: LoggerLevel) -> LoggerState:
    """Return the level of one logger."""
    return LoggerState(level=level.level, effective_level=level.effective)
