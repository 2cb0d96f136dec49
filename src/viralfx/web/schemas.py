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
