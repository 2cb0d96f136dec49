"""The deciding half of a breaker: which calls may be made, and what their outcomes change."""

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from viralfx.domain.clock import Clock, SystemClock
from viralfx.domain.events import Listener, notify
from viralfx.domain.resilience.circuit_states import (
    CircuitState,
    Closed,
    ClosedByRate,
    HalfOpen,
    Open,
    Period,
    RollingWindow,
    Token,
)
from viralfx.domain.resilience.failures import (
    CallRejectedError,
    ErrorFilter,
    anything_asked,
    matcher,
)
from viralfx.domain.resilience.quantities import require_count, require_positive
from viralfx.domain.resilience.stopwatch import reader_of


class CircuitOpenError(CallRejectedError):
    """The circuit is open: the call was not made.

    Made from the circuit's name, the operation's and the seconds worth waiting. They stay in
    ``args``: a rejection is to cost as little as an exception can.
    """

    @property
    def circuit(self) -> str:
        """The name of the circuit."""
        return str(self.args[0])

    @property
    def operation(self) -> str:
        """What was to be called; empty where it has no name."""
        return str(self.args[1])

    @property
    def retry_after(self) -> float:
        """Seconds until the next call may be made; infinite while it is held open by hand."""
        return float(self.args[2])

    def __str__(self) -> str:
        """Say what was rejected; put together only when somebody reads it."""
        what = f"{self.operation} rejected: " if self.operation else ""
        when = f", next try in {self.retry_after:.1f} s" if self.retry_after < math.inf else ""
        return f"{what}circuit {self.circuit} is open{when}"


@dataclass(frozen=True, slots=True, kw_only=True)
class StateChanged:
    """Event: a circuit changed its state."""

    name: str
    old: CircuitState
    new: CircuitState
    failure_count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CallRejected:
    """Event: a call was not made."""

    name: str
    operation: str
    retry_after: float


CircuitEvent: TypeAlias = StateChanged | CallRejected


class Circuit:
    """One circuit's current state and the rules by which it changes.

    A caller reads ``period``, asks :meth:`admit` for a token if that is ``gated`` (else the period
    is the token), makes the call and reports one of the three outcomes. Safe to use from several
    tasks and threads.
    """

    def __init__(
        self,
        failure_threshold: int = 5,
        open_for: float = 60.0,
        *,
        name: str = "circuit",
        probe_lease: float = 10.0,
        half_open_max_calls: int = 1,
        window: RollingWindow | None = None,
        failure_on: ErrorFilter = anything_asked,
        listeners: tuple[Listener[CircuitEvent], ...] = (),
        clock: Clock | None = None,
    ) -> None:
        require_count("failure_threshold", failure_threshold)
        require_count("half_open_max_calls", half_open_max_calls)
        require_positive("open_for", open_for)
        require_positive("probe_lease", probe_lease)
        self.name = name
        self._threshold = failure_threshold
        self._open_for = open_for
        self._lease = probe_lease
        self._permits = half_open_max_calls
        self._window = window
        self._counts = matcher(failure_on)
        self._listeners = listeners
        self._now = reader_of(clock or SystemClock())
        # Held for the arithmetic of a change only, never during a call or while listeners run.
        self._lock = threading.Lock()
        self.period: Period = self._closed()

    # -- reading and commanding --------------------------------------------------------------

    def subscribe(self, listener: Listener[CircuitEvent]) -> None:
        """Call ``listener`` with every :class:`CircuitEvent`."""
        self._listeners = (*self._listeners, listener)

    @property
    def state(self) -> CircuitState:
        """The state that the next call meets; reading it changes nothing."""
        period = self.period
        if isinstance(period, Open) and self._now() >= period.until:
            return CircuitState.HALF_OPEN
        return period.state

    def get_state(self) -> dict[str, str | int]:
        """Return ``{"state": "CLOSED", "failureCount": 0}``."""
        with self._lock:
            period = self.period
            if isinstance(period, ClosedByRate):
                # Moves the window on to now; what it says of now stays the same.
                period.counts.forget(self._now())
            failures = period.failure_count
        return {"state": str(self.state), "failureCount": failures}

    def open(self) -> None:
        """Reject every call until :meth:`close`."""
        self._command(lambda failures: Open(math.inf, failures))

    def close(self) -> None:
        """Make calls again, with nothing counted; what is under way no longer counts."""
        self._command(lambda _: self._closed())

    def reset(self) -> None:
        """Forget everything: the same as :meth:`close`, which it is often called for."""
        self.close()

    def snapshot(self) -> dict[str, str | int | float | None]:
        """Return plain data for :meth:`restore`.

        ``remaining`` is the seconds that the circuit stays open, None when it is held by hand.
        """
        period = self.period
        remaining: float | None = 0.0
        if isinstance(period, Open):
            remaining = max(0.0, period.until - self._now())
        return {**self.get_state(), "remaining": None if remaining == math.inf else remaining}

    def restore(self, snapshot: Mapping[str, object]) -> None:
        """Continue from a :meth:`snapshot`: an open circuit stays open for what remained.

        The time in between is not subtracted, since no monotonic clock runs through a restart;
        nor does it stay open longer than ``open_for``. Raises ``ValueError`` for what is no
        snapshot, and changes nothing then.
        """
        state, failures = snapshot.get("state"), snapshot.get("failureCount")
        remaining = snapshot.get("remaining")
        if not (
            state in list(CircuitState)
            and isinstance(failures, int)
            and failures >= 0
            and (remaining is None or (isinstance(remaining, int | float) and remaining >= 0))
        ):
            raise ValueError(f"not a snapshot of a circuit breaker: {dict(snapshot)!r}")
        if state == CircuitState.CLOSED:
            self._command(lambda _: self._closed(min(failures, self._threshold - 1)))
        else:
            until = math.inf if remaining is None else self._now() + min(remaining, self._open_for)
            self._command(lambda _: Open(until, failures))

    # -- deciding and learning ----------------------------------------------------------------

    def admit(self, operation: str) -> Token:
        """Return the token of a call that may be made; raise ``CircuitOpenError`` otherwise."""
        now = self._now()
        period = self.period
        if isinstance(period, Open):
            if now < period.until:
                self._tell_rejected(operation, period.until - now)
                raise CircuitOpenError(self.name, operation, period.until - now)
        elif isinstance(period, ClosedByRate):
            return period.admit(now)
        change = None
        with self._lock:
            period = self.period
            if isinstance(period, Open) and now >= period.until:
                period = HalfOpen(
                    period.failure_count,
                    permits=self._permits,
                    lease=self._lease,
                    window=self._window,
                )
                change = self._enter(period)
            # In the same step as the decision, with no await between: two callers cannot both
            # be told that the permit is theirs.
            if isinstance(period, Closed | ClosedByRate):
                # Closed by somebody else, between the two looks.
                return period.admit(now)
            token = period.admit(now)
            retry_after = period.until - now
        self._tell(change)
        if token is None:
            self._tell_rejected(operation, retry_after)
            raise CircuitOpenError(self.name, operation, retry_after)
        return token

    def succeeded(self, token: Token) -> None:
        """Take in that a call returned; needless while its token has nothing ``pending``."""
        now = self._now()
        with self._lock:
            # A token of an earlier period changes nothing: it is another generation's.
            state = token.succeeded(now) if token.period is self.period else None
            if state is None:
                return
            change = self._enter(self._next(state, now))
        self._tell(change)

    def failed(self, token: Token, error: Exception) -> None:
        """Take in that a call raised; an error that is not listed is neutral."""
        if not self._counts(error):
            self.released(token)
            return
        now = self._now()
        with self._lock:
            state = token.failed(now) if token.period is self.period else None
            if state is None:
                return
            change = self._enter(self._next(state, now))
        self._tell(change)

    def released(self, token: Token) -> None:
        """Take in that a call ended in a way that says nothing about the dependency."""
        with self._lock:
            token.released()

    def _tell_rejected(self, operation: str, retry_after: float) -> None:
        if self._listeners:
            event = CallRejected(name=self.name, operation=operation, retry_after=retry_after)
            notify(self._listeners, event)

    def _next(self, state: CircuitState, now: float) -> Period:
        if state is CircuitState.OPEN:
            return Open(now + self._open_for, self.period.failure_count)
        return self._closed()

    def _closed(self, failures: int = 0) -> Period:
        if self._window is None:
            return Closed(self._threshold, failures)
        return ClosedByRate(self._window)

    def _command(self, make: Callable[[int], Period]) -> None:
        with self._lock:
            change = self._enter(make(self.period.failure_count))
        self._tell(change)

    def _enter(self, period: Period) -> StateChanged | None:
        old, self.period = self.period, period
        if old.state is period.state:
            return None
        return StateChanged(
            name=self.name, old=old.state, new=period.state, failure_count=period.failure_count
        )

    def _tell(self, change: StateChanged | None) -> None:
        if change is not None and self._listeners:
            notify(self._listeners, change)
