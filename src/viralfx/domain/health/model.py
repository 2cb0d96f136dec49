"""The model of health: statuses, checks, reports, and the lifecycle of the process."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Protocol, TypeAlias

from viralfx.core.clock import Clock
from viralfx.core.errors import require_count, require_positive
from viralfx.core.events import Listener, notify


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessUsage:
    """Memory in bytes and processor time at one moment.

    The response fields are named after a runtime with a managed heap; ADR-0011 maps each name to
    the value reported here.
    """

    rss: int
    """Resident set size; it counts against the memory limit."""
    heap_used: int
    """Unique set size: memory that would be freed if this process ended."""
    heap_total: int
    """The memory limit: the smaller of the control group's limit and the host's memory."""
    cpu_percent: float
    """Processor time since the previous reading, in percent of one core."""

    @property
    def external(self) -> int:
        """Resident bytes that are shared with other processes, such as libraries."""
        return max(0, self.rss - self.heap_used)

    @property
    def ratio(self) -> float:
        """Resident memory as a share of the limit, from 0 to 1."""
        return self.rss / self.heap_total


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
    """The state of the whole service.

    A failing critical check makes it unhealthy; any other check that does not pass makes it
    degraded.
    """

    HEALTHY = "healthy"
    DEGRADED = "degraded"
    UNHEALTHY = "unhealthy"


Details: TypeAlias = Mapping[str, object] | Sequence[object]
"""Details that responses show: JSON values, never a credential or the text of an exception."""

MAX_MESSAGE_CHARACTERS = 2000
"""Characters of a message or code that are kept; the monitor keeps those of 100 changes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """The result of one attempt of a check.

    ``code`` is a short machine-readable name of the problem (``timeout``, ``usage_high``). All
    readers of the check see it, so it must not contain data. ``error`` is the cause; it appears in
    the log only. A ``message`` or ``code`` of more than 2000 characters is cut.
    """

    status: Status
    message: str
    details: Details = field(default_factory=dict)
    code: str | None = None
    error: BaseException | None = field(default=None, compare=False, repr=False)
    live_details: Callable[[], Mapping[str, object]] | None = field(
        default=None, compare=False, repr=False
    )
    """Returns details as of now, which replace those of the same name. It is called for each
    response, so it must cost microseconds and not raise."""

    def __post_init__(self) -> None:
        """Accept ``"pass"`` for ``Status.PASS``. Raises ``ValueError`` for an unknown status."""
        object.__setattr__(self, "status", Status(self.status))
        for name in ("message", "code"):
            text = getattr(self, name)
            if isinstance(text, str) and len(text) > MAX_MESSAGE_CHARACTERS:
                object.__setattr__(self, name, f"{text[: MAX_MESSAGE_CHARACTERS - 3]}...")


class HealthCheck(Protocol):
    """Port: checks whether one dependency, or one part of the process, is usable now.

    A check does not retry, cache or time itself out: the monitor does. It must tolerate
    cancellation. An exception counts as ``fail`` with code ``error`` and appears in the log only.
    """

    async def check(self) -> Observation:
        """Make one attempt and return the observation."""
        ...


class PlainHealthCheck(Protocol):
    """A :class:`HealthCheck` without ``async``: it may block, because it runs in a thread.

    Nothing can cancel it, so a timeout only ends the wait for it. The next attempt starts after it
    has returned.
    """

    def check(self) -> Observation:
        """Make one attempt and return the observation."""
        ...


AnyHealthCheck: TypeAlias = HealthCheck | PlainHealthCheck
"""A check in either form."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckPolicy:
    """How the monitor treats one check. Durations are seconds.

    ``interval`` runs from the end of one attempt to the start of the next while the check passes,
    ``retry_interval`` while it does not (``None``: the same). The status gets worse after
    ``failure_threshold`` consecutive observations that are worse, and better after
    ``recovery_threshold`` consecutive ones that are better. A result older than ``max_age``
    (``None``: three intervals and a timeout) is a failure with code ``stale``. A ``shared``
    dependency fails for all instances at the same time. A check that ``follows`` another uses the
    results of that check, so a forced round runs it after the other.
    """

    interval: float = 5.0
    retry_interval: float | None = None
    timeout: float = 2.0
    failure_threshold: int = 1
    recovery_threshold: int = 1
    max_age: float | None = None
    critical: bool = False
    required_for_readiness: bool = False
    shared: bool = False
    follows: str | None = None

    def __post_init__(self) -> None:
        """Validate the policy.

        Raises ``ValueError`` for a duration that is not positive or a threshold below one.
        """
        durations = {
            "interval": self.interval,
            "retry_interval": self.interval_when_failing,
            "timeout": self.timeout,
            "max_age": self.oldest_allowed,
        }
        for name, seconds in durations.items():
            require_positive(name, seconds)
        require_count("failure_threshold", self.failure_threshold)
        require_count("recovery_threshold", self.recovery_threshold)

    @property
    def interval_when_failing(self) -> float:
        """Seconds between attempts while the check does not pass."""
        return self.interval if self.retry_interval is None else self.retry_interval

    @property
    def oldest_allowed(self) -> float:
        """Seconds after which a result is stale."""
        if self.max_age is not None:
            return self.max_age
        return 3 * max(self.interval, self.interval_when_failing) + self.timeout


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """The published state of one check, after thresholds and maximum age are applied."""

    name: str
    status: Status
    message: str
    details: Details
    code: str | None
    correlation_id: str | None
    """Correlation id of the attempt's log lines; None before the first attempt."""
    response_time: float | None
    """Duration of the last attempt in seconds; None before the first attempt."""
    checked_at: datetime | None
    since: datetime
    """Time of the last status change."""
    policy: CheckPolicy
    live_details: Callable[[], Mapping[str, object]] | None = field(default=None, compare=False)
    """See :class:`Observation`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthReport:
    """All checks at one moment. Immutable; the same object until a check changes."""

    checks: Mapping[str, CheckReport]
    health: Health
    started: bool
    """True once every check has reported and the checks required for readiness have passed."""
    failing_gates: tuple[str, ...]
    fail_open: bool
    """True if only shared dependencies have failed for so long that readiness ignores them."""
    valid_until: float
    """Monotonic time at which a result of this report becomes stale."""

    @property
    def ready(self) -> bool:
        """True if the checks allow traffic; the lifecycle may still refuse it."""
        return self.started and (not self.failing_gates or self.fail_open)


@dataclass(frozen=True, slots=True, kw_only=True)
class Transition:
    """Event: a check's status changed."""

    check: str
    old: Status | None
    """None for the first result."""
    new: Status
    code: str | None
    message: str
    at: datetime
    correlation_id: str | None


class State(StrEnum):
    """``STARTING -> READY <-> NOT_READY``, then ``LAME_DUCK -> DRAINING -> STOPPED``.

    In ``LAME_DUCK`` the service still answers requests but is not ready; in ``DRAINING`` it
    accepts nothing new.
    """

    STARTING = "starting"
    READY = "ready"
    NOT_READY = "not_ready"
    LAME_DUCK = "lame_duck"
    DRAINING = "draining"
    STOPPED = "stopped"


_ORDER = {
    State.STARTING: 0,
    State.READY: 1,
    State.NOT_READY: 1,
    State.LAME_DUCK: 2,
    State.DRAINING: 3,
    State.STOPPED: 4,
}


class NotReadyReason(StrEnum):
    """Reason of a negative readiness response."""

    STARTING = "starting"
    FAILING = "failing"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True, kw_only=True)
class StateChanged:
    """Event: the state of the process changed."""

    old: State
    new: State
    reason: str
    at: datetime


class Lifecycle:
    """The state of the process. Once shutdown has begun, the state only moves forward."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._began = clock.monotonic()
        self._state = State.STARTING
        self._application_started = False
        self._was_ready = False
        self._listeners: tuple[Listener[StateChanged], ...] = ()
        self._history: deque[StateChanged] = deque(maxlen=100)

    @property
    def state(self) -> State:
        """The current state."""
        return self._state

    @property
    def history(self) -> tuple[StateChanged, ...]:
        """The last 100 changes, oldest first."""
        return tuple(self._history)

    @property
    def stopping(self) -> bool:
        """True once shutdown has begun."""
        return _ORDER[self._state] >= _ORDER[State.LAME_DUCK]

    @property
    def application_started(self) -> bool:
        """True once the application's own start-up has finished."""
        return self._application_started

    @property
    def was_ready(self) -> bool:
        """True if the process has ever been ready."""
        return self._was_ready

    @property
    def uptime(self) -> float:
        """Seconds since this process started."""
        return self._clock.monotonic() - self._began

    def subscribe(self, listener: Listener[StateChanged]) -> None:
        """Call ``listener`` with every :class:`StateChanged`."""
        self._listeners = (*self._listeners, listener)

    def application_ready(self) -> None:
        """Record that the application has started; from now on the checks decide readiness."""
        self._application_started = True

    def follow(self, report: HealthReport) -> NotReadyReason | None:
        """Update the state from the checks; return the reason if not ready, None if ready."""
        if self.stopping:
            return NotReadyReason.DRAINING
        if not (self._application_started and report.started):
            return NotReadyReason.STARTING
        if report.ready:
            self._enter(State.READY, "fail_open" if report.fail_open else "checks pass")
            return None
        self._enter(State.NOT_READY, "failing: " + ", ".join(report.failing_gates))
        return NotReadyReason.FAILING

    def advance(self, state: State, reason: str) -> None:
        """Move forward to a shutdown state; moving backward or to the same state does nothing."""
        if _ORDER[state] > _ORDER[self._state]:
            self._enter(state, reason)

    def _enter(self, state: State, reason: str) -> None:
        if state is self._state:
            return
        event = StateChanged(old=self._state, new=state, reason=reason, at=self._clock.now())
        self._state = state
        self._was_ready = self._was_ready or state is State.READY
        self._history.append(event)
        notify(self._listeners, event)
