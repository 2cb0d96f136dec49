"""Turns the domain's reports into the bodies that clients read."""

from collections.abc import Mapping

import msgspec

from viralfx.domain.clock import timestamp
from viralfx.domain.health import CheckReport, HealthReport, Status, Transition
from viralfx.domain.lifecycle import NotReadyReason
from viralfx.domain.operations import Operations
from viralfx.domain.shutdown import PhaseReport
from viralfx.domain.state import SavedState
from viralfx.web import schemas

_HISTORY_SHOWN = 20
_ALWAYS_LISTED = ("database", "redis")


def readiness(report: HealthReport, reason: NotReadyReason | None) -> schemas.Readiness:
    """Say whether traffic may come; ``reason`` is None when it may."""
    return schemas.Readiness(
        ready=reason is None,
        checks={
            name: check.status is not Status.FAIL
            for name, check in report.checks.items()
            if name in _ALWAYS_LISTED or check.policy.gates_readiness
        },
        reason=None if reason is None else str(reason),
        degraded=reason is None and report.fail_open,
    )


def startup(report: HealthReport, *, application_started: bool) -> schemas.Startup:
    """Say whether start-up is over, and what is waited for."""
    started = report.started and application_started
    waiting = [
        name
        for name, check in report.checks.items()
        if check.checked_at is None or name in report.failing_gates
    ]
    return schemas.Startup(started=started, pending=[] if started else waiting)


def detailed(operations: Operations, report: HealthReport) -> schemas.DetailedHealth:
    """Show everything, at time zero: the moment and the uptime are for the reader to fill in."""
    usage = operations.usage()
    times = [c.response_time for c in report.checks.values() if c.response_time is not None]
    return schemas.DetailedHealth(
        status=str(report.health),
        timestamp="",
        uptime=0.0,
        version=operations.version,
        environment=operations.environment,
        checks={name: check_state(check) for name, check in report.checks.items()},
        metrics=schemas.Metrics(
            response_time=round(sum(times) * 1000, 3),
            memory_usage=schemas.MemoryUsage(
                rss=usage.rss,
                heap_total=usage.heap_total,
                heap_used=usage.heap_used,
                external=usage.external,
            ),
            cpu_usage=usage.cpu_percent,
        ),
    )


def check_state(check: CheckReport) -> schemas.CheckState:
    """Show one check."""
    response_time = None if check.response_time is None else round(check.response_time * 1000, 3)
    details = check.details
    if isinstance(details, Mapping):
        # The guide's jq lines read the response time here as well.
        details = {**details, "responseTime": response_time}
    error = None
    if check.status is not Status.PASS:
        error = schemas.CheckError(
            code=check.code or str(check.status), correlation_id=check.correlation_id
        )
    return schemas.CheckState(
        status=str(check.status),
        message=check.message,
        details=details,
        response_time=response_time,
        since=timestamp(check.since),
        checked_at=timestamp(check.checked_at) if check.checked_at else None,
        error=error,
    )


def named_check(check: CheckReport, history: tuple[Transition, ...]) -> schemas.NamedCheckState:
    """Show one check by itself, with its latest changes."""
    changes = [change for change in history if change.check == check.name]
    return schemas.NamedCheckState(
        name=check.name,
        history=[
            schemas.Change(
                at=timestamp(change.at),
                old=str(change.old) if change.old else None,
                new=str(change.new),
                code=change.code,
            )
            for change in changes[-_HISTORY_SHOWN:]
        ],
        **msgspec.structs.asdict(check_state(check)),
    )


def shutdown_accepted(operations: Operations) -> schemas.ShutdownAccepted:
    """Show the shutdown in short."""
    report = operations.shutdown.report()
    return schemas.ShutdownAccepted(
        state=str(operations.lifecycle.state),
        reason=report.reason,
        deadline=timestamp(report.deadline) if report.deadline else None,
    )


def shutdown_status(operations: Operations) -> schemas.ShutdownStatus:
    """Show the shutdown phase by phase, and what the process before left."""
    previous = operations.previous
    return schemas.ShutdownStatus(
        stages=[_phase(phase) for phase in operations.shutdown.report().phases],
        previous=_previous(previous) if previous else None,
        **msgspec.structs.asdict(shutdown_accepted(operations)),
    )


def _phase(phase: PhaseReport) -> schemas.PhaseState:
    return schemas.PhaseState(
        name=str(phase.phase),
        budget=_milliseconds(phase.budget),
        state=phase.state,
        duration=None if phase.duration is None else _milliseconds(phase.duration),
        outcome=str(phase.outcome) if phase.outcome else None,
        parts=[
            schemas.StageState(
                name=stage.name,
                outcome=str(stage.outcome),
                duration=_milliseconds(stage.duration),
            )
            for stage in phase.stages
        ],
    )


def _previous(state: SavedState) -> schemas.PreviousRun:
    return schemas.PreviousRun(
        saved_at=timestamp(state.saved_at),
        starts=state.starts,
        uptime=round(state.uptime, 3),
        health=state.health,
        reason=state.shutdown_reason,
        phases=dict(state.shutdown_phases),
    )


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)
