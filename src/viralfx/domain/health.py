"""What health means: the check port, its observations, and how many checks become one answer."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Protocol, TypeAlias


class Status(StrEnum):
    """The state of one check."""

    PASS = "pass"
    WARN = "warn"
    FAIL = "fail"

    @property
    def severity(self) -> int:
        """0 for pass, 1 for warn, 2 for fail."""
        return _SEVERITY[self]


_SEVERITY = {Status.PASS: 0, Status.WARN: 1, Status.FAIL: 2}


class Health(StrEnum):
    """The state of the whole service."""

    HEALTHY = "healthy"
    DEGRADED = "degraded"
    UNHEALTHY = "unhealthy"


Details: TypeAlias = Mapping[str, object] | Sequence[object]
"""What a check wants shown: JSON-able values; never a credential or an exception's text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What a check saw this time.

    ``code`` is a short machine word for what is wrong (``timeout``, ``usage_high``); it is shown
    to anyone who may read the check, so it must not carry data. ``error`` is what caused it, for
    the log only.
    """

    status: Status
    message: str
    details: Details = field(default_factory=dict)
    code: str | None = None
    error: BaseException | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Take the status's word for the status. Raises ``ValueError`` for another word."""
        object.__setattr__(self, "status", Status(self.status))


class HealthCheck(Protocol):
    """Port: answers "can I use you now?" for one technology.

    A check does not retry, cache or time itself out: the monitor does. It must survive being
    cancelled. Raising counts as ``fail`` with code ``error``; the exception goes to the log only.
    """

    async def check(self) -> Observation:
        """Look once and say what is seen."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckPolicy:
    """How the monitor treats one check. Durations are seconds.

    ``interval`` runs from the end of one attempt to the start of the next while the check passes,
    ``retry_interval`` while it does not (``None``: the same). A status changes for the worse after
    ``failure_threshold`` observations in a row that are worse, and for the better after
    ``recovery_threshold`` in a row that are better. A result older than ``max_age`` (``None``:
    three intervals and a timeout) is a failure with code ``stale``. A ``shared`` dependency is one
    that every instance loses together. A check that ``follows`` another shares what that one
    found out, so a forced round looks at it only once it has looked at the other.
    """

    interval: float = 5.0
    retry_interval: float | None = None
    timeout: float = 2.0
    failure_threshold: int = 1
    recovery_threshold: int = 1
    max_age: float | None = None
    critical: bool = False
    gates_readiness: bool = False
    shared: bool = False
    follows: str | None = None

    def __post_init__(self) -> None:
        """Refuse what could never work.

        Raises ``ValueError`` for a duration that is not positive or a threshold below one.
        """
        durations = {
            "interval": self.interval,
            "retry_interval": self.interval_when_failing,
            "timeout": self.timeout,
            "max_age": self.oldest_allowed,
        }
        for name, seconds in durations.items():
            if not 0 < seconds < float("inf"):
                raise ValueError(f"{name} must be a positive number of seconds, got {seconds!r}")
        for name, count in (
            ("failure_threshold", self.failure_threshold),
            ("recovery_threshold", self.recovery_threshold),
        ):
            if count < 1:
                raise ValueError(f"{name} must be at least 1, got {count!r}")

    @property
    def interval_when_failing(self) -> float:
        """Seconds between attempts while the check does not pass."""
        return self.interval if self.retry_interval is None else self.retry_interval

    @property
    def oldest_allowed(self) -> float:
        """Seconds after which a result says nothing any more."""
        if self.max_age is not None:
            return self.max_age
        return 3 * max(self.interval, self.interval_when_failing) + self.timeout


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """The state of one check as others see it: thresholds and age are already applied."""

    name: str
    status: Status
    message: str
    details: Details
    code: str | None
    correlation_id: str | None
    """The id that the log lines of the attempt carry; None before the first."""
    response_time: float | None
    """Seconds the last attempt took; None before the first."""
    checked_at: datetime | None
    since: datetime
    """When the status last changed."""
    policy: CheckPolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthReport:
    """All checks at one moment. Immutable, and the same object until something changes."""

    checks: Mapping[str, CheckReport]
    health: Health
    started: bool
    """Every check has reported and those that gate readiness have passed, once."""
    failing_gates: tuple[str, ...]
    fail_open: bool
    """Gates fail on shared dependencies alone, for so long that they no longer gate."""
    valid_until: float
    """Monotonic time at which age alone makes this report untrue."""

    @property
    def ready(self) -> bool:
        """Whether the checks allow traffic (the lifecycle may still forbid it)."""
        return self.started and (not self.failing_gates or self.fail_open)


@dataclass(frozen=True, slots=True, kw_only=True)
class Transition:
    """Event: a check's status changed."""

    check: str
    old: Status | None
    """None when this is the first result."""
    new: Status
    code: str | None
    message: str
    at: datetime
    correlation_id: str | None


def overall_health(checks: Iterable[CheckReport]) -> Health:
    """Aggregate: a failing critical check is unhealthy, anything else that is not pass degrades."""
    health = Health.HEALTHY
    for check in checks:
        if check.status is Status.FAIL and check.policy.critical:
            return Health.UNHEALTHY
        if check.status is not Status.PASS:
            health = Health.DEGRADED
    return health
