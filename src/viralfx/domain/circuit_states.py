"""The states of a circuit as objects: each owns its counts and makes the tokens of its calls.

The current state object *is* the generation: an outcome whose token belongs to another one changes
nothing. Pure; the breaker brings time, the lock and the events.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

from viralfx.domain.quantities import require_count, require_positive
from viralfx.domain.rolling import RollingCounts

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
        slow_after = 1.0 if self.slow_after is None else self.slow_after
        require_positive("seconds", self.seconds)
        require_positive("slow_after", slow_after)
        for name, rate in (("failure_rate", self.failure_rate), ("slow_rate", self.slow_rate)):
            if not 0 < rate <= 1:
                raise ValueError(f"{name} must be more than 0 and at most 1, got {rate!r}")
        require_count("minimum_calls", self.minimum_calls)

    def is_slow(self, seconds: float) -> bool:
        """Tell whether a call of that duration is a slow one."""
        return self.slow_after is not None and seconds > self.slow_after


class Closed:
    """Counts failures in a row. It is the token of all its calls, so that they cost nothing."""

    __slots__ = ("failures", "gated", "threshold")
    state = CircuitState.CLOSED

    def __init__(self, threshold: int, failures: int = 0) -> None:
        self.threshold = threshold
        self.failures = failures
        self.gated = False
        """Whether a call must ask before it is made."""

    @property
    def period(self) -> "Closed":
        """The state that the token belongs to."""
        return self

    def admit(self, now: float) -> "Closed":  # noqa: ARG002 - the states answer alike
        """Let a call through."""
        return self

    def succeeded(self, now: float) -> CircuitState | None:  # noqa: ARG002 - likewise
        """Take in a success; return the state that follows, None for no change."""
        self.failures = 0
        return None

    def failed(self, now: float) -> CircuitState | None:  # noqa: ARG002 - likewise
        """Take in a failure; return the state that follows, None for no change."""
        self.failures += 1
        return CircuitState.OPEN if self.failures >= self.threshold else None

    def released(self) -> None:
        """Take in an outcome that says nothing."""


class ClosedByRate:
    """Counts rates over a window; each call has a token, which remembers when it began."""

    __slots__ = ("_window", "counts", "gated")
    state = CircuitState.CLOSED

    def __init__(self, window: RollingWindow) -> None:
        self.counts = RollingCounts(window.seconds, kinds=3)
        self._window = window
        self.gated = True

    @property
    def failures(self) -> int:
        """Failures in the window."""
        return self.counts.totals[_FAILURES]

    def admit(self, now: float) -> "TimedCall":
        """Let a call through."""
        return TimedCall(self, now)

    def record(self, now: float, seconds: float, *, failed: bool) -> CircuitState | None:
        """Take in an outcome; return the state that follows, None for no change."""
        counts, window = self.counts, self._window
        counts.forget(now)
        counts.add(_CALLS)
        slow = window.is_slow(seconds)
        if failed:
            counts.add(_FAILURES)
        if slow:
            counts.add(_SLOW)
        if not (failed or slow):
            return None
        calls, failures, slow_calls = counts.totals
        if calls < window.minimum_calls:
            return None
        tripped = failures >= window.failure_rate * calls or (
            window.slow_after is not None and slow_calls >= window.slow_rate * calls
        )
        return CircuitState.OPEN if tripped else None


class TimedCall:
    """Token of one call in a :class:`ClosedByRate` period."""

    __slots__ = ("failures", "period", "started")

    def __init__(self, period: ClosedByRate, started: float) -> None:
        self.period = period
        self.started = started
        # Not a count here: true, so that the breaker is told of a success as well.
        self.failures = 1

    def succeeded(self, now: float) -> CircuitState | None:
        """See :meth:`ClosedByRate.record`."""
        return self.period.record(now, now - self.started, failed=False)

    def failed(self, now: float) -> CircuitState | None:
        """See :meth:`ClosedByRate.record`."""
        return self.period.record(now, now - self.started, failed=True)

    def released(self) -> None:
        """Take in an outcome that says nothing."""


class Open:
    """Rejects calls ``until`` a monotonic time, infinity when held open by hand."""

    __slots__ = ("failures", "gated", "until")
    state = CircuitState.OPEN

    def __init__(self, until: float, failures: int) -> None:
        self.until = until
        self.failures = failures
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
        "failures",
        "gated",
        "until",
    )
    state = CircuitState.HALF_OPEN

    def __init__(
        self, failures: int, *, permits: int, lease: float, window: RollingWindow | None
    ) -> None:
        self.failures = failures
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

    __slots__ = ("failures", "period", "started")

    def __init__(self, period: HalfOpen, started: float) -> None:
        self.period = period
        self.started = started
        # Not a count here: true, so that the breaker is told of a success as well.
        self.failures = 1

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
Token: TypeAlias = Closed | TimedCall | Probe
