"""The states of the process, and what is derived from them: whether traffic may come."""

from collections import deque
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from viralfx.domain.clock import Clock
from viralfx.domain.events import Listener, notify
from viralfx.domain.health import HealthReport


class State(StrEnum):
    """``STARTING -> READY <-> NOT_READY``, and from any of them forward to the end.

    ``LAME_DUCK`` still serves while readiness says no; ``DRAINING`` accepts nothing new.
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
    """Why readiness is refused."""

    STARTING = "starting"
    FAILING = "failing"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True, kw_only=True)
class StateChanged:
    """Event: the process entered another state."""

    old: State
    new: State
    reason: str
    at: datetime


class Lifecycle:
    """The state of the process; shutdown is sticky, it never goes back."""

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
        """The present state."""
        return self._state

    @property
    def history(self) -> tuple[StateChanged, ...]:
        """The last changes, oldest first; bounded."""
        return tuple(self._history)

    @property
    def stopping(self) -> bool:
        """Whether shutdown has begun."""
        return _ORDER[self._state] >= _ORDER[State.LAME_DUCK]

    @property
    def application_started(self) -> bool:
        """Whether the application's own start-up has finished."""
        return self._application_started

    @property
    def was_ready(self) -> bool:
        """Whether traffic was ever let in."""
        return self._was_ready

    @property
    def uptime(self) -> float:
        """Seconds since this process began."""
        return self._clock.monotonic() - self._began

    def subscribe(self, listener: Listener[StateChanged]) -> None:
        """Call ``listener`` with every :class:`StateChanged`."""
        self._listeners = (*self._listeners, listener)

    def application_ready(self) -> None:
        """Note that the application's start-up finished; from here the checks decide."""
        self._application_started = True

    def follow(self, report: HealthReport) -> NotReadyReason | None:
        """Move between starting, ready and not ready as the checks say; None when ready."""
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
        """Go forward to a state of shutdown; going backward or standing still does nothing."""
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
