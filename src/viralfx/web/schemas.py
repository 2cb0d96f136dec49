"""The bodies of the operations endpoints, field by field as clients read them."""

from typing import Annotated, Any

import msgspec
from msgspec import Meta

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
        bool, Meta(description="Ready although a shared dependency keeps failing")
    ] = False


class Startup(_Body):
    """``GET /health/startup``."""

    started: bool
    pending: Annotated[list[str], Meta(description="Checks that have not reported, or gate")]


class CheckError(_Body):
    """Why a check does not pass: a code, and the id under which the log tells more."""

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
    response_time: Annotated[float | None, Meta(description="Milliseconds the last attempt took")]
    since: Annotated[str, Meta(description="When the status last changed")]
    checked_at: Annotated[str | None, Meta(description="When it was last checked")]
    error: CheckError | None = None


class NamedCheckState(CheckState, kw_only=True):
    """``GET /health/{check}``: the check with its latest changes."""

    name: str
    history: list[Change]


class MemoryUsage(_Body):
    """Bytes; ADR-0011 says what stands for each name."""

    rss: int
    heap_total: int
    heap_used: int
    external: int


class Metrics(_Body):
    """What the process uses."""

    response_time: Annotated[float, Meta(description="Milliseconds of all checks together")]
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
    """What the process before this one left."""

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


class LoggerState(_Body):
    """``GET`` and ``PUT /health/loggers/{name}``."""

    level: Annotated[
        str | None,
        Meta(description="Of its own; null where it takes that of the logger above it"),
    ]
    effective_level: Annotated[str, Meta(description="What holds for it")]


class Loggers(_Body):
    """``GET /health/loggers``."""

    levels: Annotated[list[str], Meta(description="The words for a level, the least first")]
    loggers: dict[str, LoggerState]


class NewLevel(msgspec.Struct, forbid_unknown_fields=True):
    """The body of ``PUT /health/loggers/{name}``."""

    level: Annotated[
        str | None,
        Meta(description="error, warn, log, debug or verbose; null: what it was before"),
    ]
