"""The states of a circuit as objects; each has its own counts and creates the tokens of its calls.

The current state object also identifies the generation: an outcome whose token belongs to another
state object changes nothing. Pure; the breaker supplies time, lock and events.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

from viralfx.core.errors import require_count, require_positive


class RollingCounts:
    """Integer counters of several kinds over a window of monotonic time.

    The window is divided into slices. The oldest is dropped when a new one begins, so the window
    is exact to one slice. Once ``stale_at`` has passed call :meth:`forget`; then add to both
    ``current`` and ``totals``: two additions for each count.
    """

    __slots__ = ("_newest", "_slices", "_width", "current", "stale_at", "totals")

    def __init__(self, window: float, kinds: int, slices: int = 10) -> None:
        require_positive("window", window)
        self._slices = [[0] * kinds for _ in range(slices)]
        self._width = window / slices
        self._newest = 0
        self.stale_at = 0.0
        """Monotonic time at which the current slice ends."""
        self.totals = [0] * kinds
        """Counts of the whole window."""
        self.current = self._slices[0]
        """Counts of the current slice."""

    def add(self, now: float, kind: int) -> None:
        """Add one to a counter."""
        if now >= self.stale_at:
            self.forget(now)
        self.current[kind] += 1
        self.totals[kind] += 1

    def forget(self, now: float) -> None:
        """Move the window forward to ``now``; it never moves back."""
        slice_now = int(now // self._width)
        begun = min(slice_now - self._newest, len(self._slices))
        if begun <= 0:
            return
        for number in range(slice_now - begun + 1, slice_now + 1):
            expired = self._slices[number % len(self._slices)]
            for kind, count in enumerate(expired):
                self.totals[kind] -= count
                expired[kind] = 0
        self._newest = slice_now
        self.current = self._slices[slice_now % len(self._slices)]
        self.stale_at = (slice_now + 1) * self._width


_CALLS, _FAILURES, _SLOW = 0, 1, 2


class CircuitState(StrEnum):
    """State of a circuit breaker."""

    CLOSED = "CLOSED"
    """Calls pass."""
    OPEN = "OPEN"
    """Calls are rejected."""
    HALF_OPEN = "HALF_OPEN"
    """Some calls pass as probes, the others are rejected."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RollingWindow:
    """Opens the circuit on a rate over the last ``seconds`` instead of on consecutive failures.

    The circuit opens if there were at least ``minimum_calls`` and a share of ``failure_rate``
    failed, or a share of ``slow_rate`` took longer than ``slow_after`` seconds (None: no call is
    slow). Neutral calls are not counted.
    """

    seconds: float = 30.0
    failure_rate: float = 0.5
    minimum_calls: int = 20
    slow_after: float | None = None
    slow_rate: float = 1.0

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for values with which the circuit would never or always open."""
        require_positive("seconds", self.seconds)
        if self.slow_after is not None:
            require_positive("slow_after", self.slow_after)
        for name, rate in (("failure_rate", self.failure_rate), ("slow_rate", self.slow_rate)):
            if not 0 < rate <= 1:
                raise ValueError(f"{name} must be more than 0 and at most 1, got {rate!r}")
        require_count("minimum_calls", self.minimum_calls)

    def is_slow(self, seconds: float) -> bool:
        """Return whether a call of that duration is slow."""
        return self.slow_after is not None and seconds > self.slow_after


class Closed:
    """Counts consecutive failures. It is the token of all its calls, so no token is allocated."""

    __slots__ = ("gated", "pending", "period", "threshold")
    state = CircuitState.CLOSED

    def __init__(self, threshold: int, failures: int) -> None:
        self.threshold = threshold
        self.gated = False
        """True if a call needs a token from :meth:`admit`."""
        self.pending = failures
        """Failures that a success resets; true if the breaker must record a success."""
        self.period = self
        """The state that a token belongs to."""

    @property
    def failure_count(self) -> int:
        """Number of consecutive failures."""
        return self.pending

    def admit(self, now: float) -> "Closed":  # noqa: ARG002 - the states have one interface
        """Admit a call."""
        return self

    def succeeded(self, now: float) -> CircuitState | None:  # noqa: ARG002 - one interface
        """Record a success; return the next state, None for no change."""
        self.pending = 0
        return None

    def failed(self, now: float) -> CircuitState | None:  # noqa: ARG002 - one interface
        """Record a failure; return the next state, None for no change."""
        self.pending += 1
        return CircuitState.OPEN if self.pending >= self.threshold else None

    def released(self) -> None:
        """Record a neutral outcome."""


class ClosedByRate:
    """Counts rates over a window. Without ``slow_after`` it is the token of all its calls."""

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
        """Number of failures in the window."""
        return self.counts.totals[_FAILURES]

    def admit(self, now: float) -> "ClosedByRate | TimedCall":
        """Admit a call."""
        limit = self.window.slow_after
        return self if limit is None else TimedCall(self, now + limit)

    def succeeded(self, now: float) -> None:
        """Record a success; it does not change the state."""
        self.counts.add(now, _CALLS)

    def failed(self, now: float) -> CircuitState | None:
        """Record a failure; return the next state, None for no change."""
        return self.count_against(now, _FAILURES)

    def count_against(self, now: float, *kinds: int) -> CircuitState | None:
        """Count a call that failed, was slow, or both; return OPEN if a rate is reached."""
        for kind in (_CALLS, *kinds):
            self.counts.add(now, kind)
        window, (calls, failures, slow) = self.window, self.counts.totals
        if calls < window.minimum_calls:
            return None
        too_many_failed = failures >= window.failure_rate * calls
        # Without slow_after no call is slow, and zero never reaches a positive rate.
        too_many_slow = slow >= window.slow_rate * calls
        return CircuitState.OPEN if too_many_failed or too_many_slow else None

    def released(self) -> None:
        """Record a neutral outcome."""


class TimedCall:
    """Token of one call in a :class:`ClosedByRate` period with ``slow_after``."""

    __slots__ = ("pending", "period", "slow_after")

    def __init__(self, period: ClosedByRate, slow_after: float) -> None:
        self.period = period
        self.slow_after = slow_after
        """Monotonic time after which the call is slow."""
        self.pending = True

    def succeeded(self, now: float) -> CircuitState | None:
        """Record a success; return the next state, None for no change."""
        if now > self.slow_after:
            return self.period.count_against(now, _SLOW)
        self.period.succeeded(now)
        return None

    def failed(self, now: float) -> CircuitState | None:
        """Record a failure; return the next state, None for no change."""
        kinds = (_FAILURES, _SLOW) if now > self.slow_after else (_FAILURES,)
        return self.period.count_against(now, *kinds)

    def released(self) -> None:
        """Record a neutral outcome."""


class Open:
    """Rejects calls ``until`` a monotonic time; infinity if the circuit was opened manually."""

    __slots__ = ("failure_count", "gated", "until")
    state = CircuitState.OPEN

    def __init__(self, until: float, failures: int) -> None:
        self.until = until
        self.failure_count = failures
        self.gated = True

    def admit(self, now: float) -> None:
        """Reject the call."""


class HalfOpen:
    """Issues ``permits`` for probes; as many successes close the circuit, one failure opens it.

    A permit is leased. When the lease ends, the permit is issued again, and the outcome of the
    probe that had it no longer counts.
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
        """Monotonic time at which the lease of a permit ends."""

    def admit(self, now: float) -> "Probe | None":
        """Issue a permit; None if none is free before ``until``."""
        self._probes = [probe for probe in self._probes if now < probe.started + self._lease]
        if len(self._probes) + self._successes >= self._permits:
            self.until = min(probe.started for probe in self._probes) + self._lease
            return None
        probe = Probe(self, now)
        self._probes.append(probe)
        return probe

    def returned(self, probe: "Probe") -> bool:
        """Release a probe's permit; return False if its lease had ended."""
        if probe not in self._probes:
            return False
        self._probes.remove(probe)
        return True

    def succeeded(self, seconds: float) -> CircuitState | None:
        """Record a probe's success; return the next state, None for no change."""
        if self._window is not None and self._window.is_slow(seconds):
            return CircuitState.OPEN
        self._successes += 1
        return CircuitState.CLOSED if self._successes >= self._permits else None


class Probe:
    """Token and permit of one probe in a :class:`HalfOpen` period."""

    __slots__ = ("pending", "period", "started")

    def __init__(self, period: HalfOpen, started: float) -> None:
        self.period = period
        self.started = started
        self.pending = True

    def succeeded(self, now: float) -> CircuitState | None:
        """Release the permit; return the next state, None for no change."""
        return self.period.succeeded(now - self.started) if self.period.returned(self) else None

    def failed(self, now: float) -> CircuitState | None:  # noqa: ARG002 - one interface
        """Release the permit; return the next state, None for no change."""
        return CircuitState.OPEN if self.period.returned(self) else None

    def released(self) -> None:
        """Release the permit."""
        self.period.returned(self)


Period: TypeAlias = Closed | ClosedByRate | Open | HalfOpen
Token: TypeAlias = Closed | ClosedByRate | TimedCall | Probe
