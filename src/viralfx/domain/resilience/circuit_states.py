"""The states of a circuit as objects: each owns its counts and makes the tokens of its calls.

The current state object *is* the generation: an outcome whose token belongs to another one changes
nothing. Pure; the breaker brings time, the lock and the events.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

from viralfx.domain.resilience.quantities import require_count, require_positive
from viralfx.domain.resilience.rolling import RollingCounts

_CALLS, _FAILURES, _SLOW = 0, 1, 2


class CircuitState(StrEnum):
    """What a breaker does with calls."""

    CLOSED = "CLOSED"
    """Makes them."""
    OPEN = "OPEN"
    """Rejects them."""
    HALF_OPEN = "HALF_OPEN"
    """Makes one to see, rejects the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RollingWindow:
    """Trip on a rate of the last ``seconds`` instead of on failures in a row.

    The circuit opens when, of at least ``minimum_calls``, a share of ``failure_rate`` has failed
    or ``slow_rate`` took longer than ``slow_after`` seconds (None: no call is slow). Neutral
    calls are not counted.
    """

    seconds: float = 30.0
    failure_rate: float = 0.5
    minimum_calls: int = 20
    slow_after: float | None = None
    slow_rate: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what could never trip or always would (``ValueError``)."""
        require_positive("seconds", self.seconds)
        if self.slow_after is not None:
            require_positive("slow_after", self.slow_after)
        for name, rate in (("failure_rate", self.failure_rate), ("slow_rate", self.slow_rate)):
            if not 0 < rate <= 1:
                raise ValueError(f"{name} must be more than 0 and at most 1, got {rate!r}")
        require_count("minimum_calls", self.minimum_calls)

    def is_slow(self, seconds: float) -> bool:
        """Tell whether a call of that duration is a slow one."""
        return self.slow_after is not None and seconds > self.slow_after


class Closed:
    """Counts failures in a row. It is the token of all its calls, so that they cost nothing."""

    __slots__ = ("gated", "pending", "period", "threshold")
    state = CircuitState.CLOSED

    def __init__(self, threshold: int, failures: int) -> None:
        self.threshold = threshold
        self.gated = False
        """Whether a call must ask before it is made."""
        self.pending = failures
        """What a success has to clear: true if the breaker must be told of one."""
        self.period = self
        """The state that a token belongs to."""

    @property
    def failure_count(self) -> int:
        """Failures in a row."""
        return self.pending

    def admit(self, now: float) -> "Closed":  # noqa: ARG002 - the states answer alike
        """Let a call through."""
        return self

    def succeeded(self, now: float) -> CircuitState | None:  # noqa: ARG002 - likewise
        """Take in a success; return the state that follows, None for no change."""
        self.pending = 0
        return None

    def failed(self, now: float) -> CircuitState | None:  # noqa: ARG002 - likewise
        """Take in a failure; return the state that follows, None for no change."""
        self.pending += 1
        return CircuitState.OPEN if self.pending >= self.threshold else None

    def released(self) -> None:
        """Take in an outcome that says nothing."""


class ClosedByRate:
    """Counts rates over a window. Where no call is slow it is the token of all its calls."""

    __slots__ = ("counts", "gated", "pending", "period", "window")
    state = CircuitState.CLOSED

    def __init__(self, window: RollingWindow) -> None:
        self.counts = RollingCounts(window.seconds, kinds=3)
        self.window = window
        self.gated = window.slow_after is not None
        self.pending = True
        self.period = self

    @property
    def failure_count(self) -> int:
        """Failures in the window."""
        return self.counts.totals[_FAILURES]

    def admit(self, now: float) -> "ClosedByRate | TimedCall":
        """Let a call through."""
        limit = self.window.slow_after
        return self if limit is None else TimedCall(self, now + limit)

    def succeeded(self, now: float) -> None:
        """Take in a success, which changes no state."""
        self.counts.add(now, _CALLS)

    def failed(self, now: float) -> CircuitState | None:
        """Take in a failure; return the state that follows, None for no change."""
        return self.count_against(now, _FAILURES)

    def count_against(self, now: float, *kinds: int) -> CircuitState | None:
        """Count one call that was a failure, slow or both, and judge the window."""
        for kind in (_CALLS, *kinds):
            self.counts.add(now, kind)
        window, (calls, failures, slow) = self.window, self.counts.totals
        if calls < window.minimum_calls:
            return None
        too_many_failed = failures >= window.failure_rate * calls
        # Without a limit none is counted as slow, and none of a positive share is not enough.
        too_many_slow = slow >= window.slow_rate * calls
        return CircuitState.OPEN if too_many_failed or too_many_slow else None

    def released(self) -> None:
        """Take in an outcome that says nothing."""


class TimedCall:
    """Token of one call in a :class:`ClosedByRate` period that tells slow calls."""

    __slots__ = ("pending", "period", "slow_after")

    def __init__(self, period: ClosedByRate, slow_after: float) -> None:
        self.period = period
        self.slow_after = slow_after
        """Monotonic time after which the call is slow."""
        self.pending = True

    def succeeded(self, now: float) -> CircuitState | None:
        """Take in a success; return the state that follows, None for no change."""
        if now > self.slow_after:
            return self.period.count_against(now, _SLOW)
        self.period.succeeded(now)
        return None

    def failed(self, now: float) -> CircuitState | None:
        """Take in a failure; return the state that follows, None for no change."""
        kinds = (_FAILURES, _SLOW) if now > self.slow_after else (_FAILURES,)
        return self.period.count_against(now, *kinds)

    def released(self) -> None:
        """Take in an outcome that says nothing."""


class Open:
    """Rejects calls ``until`` a monotonic time, infinity when held open by hand."""

    __slots__ = ("failure_count", "gated", "until")
    state = CircuitState.OPEN

    def __init__(self, until: float, failures: int) -> None:
        self.until = until
        self.failure_count = failures
        self.gated = True

    def admit(self, now: float) -> None:
        """Let no call through."""


class HalfOpen:
    """Hands out ``permits`` to probe; as many successes close the circuit, one failure opens it.

    A permit is leased: when the lease is over it is issued again, and the probe that had it is
    as stale as a call from an earlier state.
    """

    __slots__ = (
        "_lease",
        "_permits",
        "_probes",
        "_successes",
        "_window",
        "failure_count",
        "gated",
        "until",
    )
    state = CircuitState.HALF_OPEN

    def __init__(
        self, failures: int, *, permits: int, lease: float, window: RollingWindow | None
    ) -> None:
        self.failure_count = failures
        self.gated = True
        self._permits = permits
        self._lease = lease
        self._window = window
        self._successes = 0
        self._probes: list[Probe] = []
        self.until = 0.0
        """Monotonic time by which a permit is free again, whatever the probes do."""

    def admit(self, now: float) -> "Probe | None":
        """Hand out a permit, None when there is none before ``until``."""
        self._probes = [probe for probe in self._probes if now < probe.started + self._lease]
        if len(self._probes) + self._successes >= self._permits:
            self.until = min(probe.started for probe in self._probes) + self._lease
            return None
        probe = Probe(self, now)
        self._probes.append(probe)
        return probe

    def returned(self, probe: "Probe") -> bool:
        """Take a permit back; tell whether the probe still had it."""
        if probe not in self._probes:
            return False
        self._probes.remove(probe)
        return True

    def succeeded(self, seconds: float) -> CircuitState | None:
        """Take in a probe's success; return the state that follows, None for no change."""
        if self._window is not None and self._window.is_slow(seconds):
            return CircuitState.OPEN
        self._successes += 1
        return CircuitState.CLOSED if self._successes >= self._permits else None


class Probe:
    """Token and permit of one call in a :class:`HalfOpen` period."""

    __slots__ = ("pending", "period", "started")

    def __init__(self, period: HalfOpen, started: float) -> None:
        self.period = period
        self.started = started
        self.pending = True

    def succeeded(self, now: float) -> CircuitState | None:
        """Return the permit; return the state that follows, None for no change."""
        return self.period.succeeded(now - self.started) if self.period.returned(self) else None

    def failed(self, now: float) -> CircuitState | None:  # noqa: ARG002 - the tokens answer alike
        """Return the permit; return the state that follows, None for no change."""
        return CircuitState.OPEN if self.period.returned(self) else None

    def released(self) -> None:
        """Return the permit."""
        self.period.returned(self)


Period: TypeAlias = Closed | ClosedByRate | Open | HalfOpen
Token: TypeAlias = Closed | ClosedByRate | TimedCall | Probe
