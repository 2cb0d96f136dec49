"""Listeners that write the domain's events as log lines, one per event and no more."""

import logging
from collections.abc import Mapping

from viralfx.domain.attempts import CheckCompleted
from viralfx.domain.health import Status, Transition
from viralfx.domain.lifecycle import StateChanged as LifecycleChanged
from viralfx.domain.monitor import MonitorEvent
from viralfx.domain.resilience.circuit import CircuitEvent, StateChanged
from viralfx.domain.resilience.circuit_states import CircuitState
from viralfx.domain.shutdown import Outcome, ShutdownEvent, ShutdownTriggered

_health = logging.getLogger("viralfx.health")
_lifecycle = logging.getLogger("viralfx.lifecycle")
_circuits = logging.getLogger("viralfx.circuits")
_shutdown = logging.getLogger("viralfx.shutdown")

_CONNECTED = {"schema_behind"}
"""Codes of failures that are told over a connection that works."""

_LEVEL = {Status.PASS: logging.INFO, Status.WARN: logging.WARNING, Status.FAIL: logging.ERROR}


class HealthLog:
    """Writes each transition once, with the exception that caused it when there was one.

    ``connections`` names the checks that look at a connection, as ``{"redis": "Redis"}``: losing
    it and getting it back have messages of their own, which people search their logs for.
    """

    def __init__(self, connections: Mapping[str, str] | None = None) -> None:
        self._connections = connections or {}
        self._lost: set[str] = set()
        self._last_errors: dict[str, tuple[str, BaseException | None]] = {}

    def __call__(self, event: MonitorEvent) -> None:
        """Take in one event of the monitor."""
        if isinstance(event, CheckCompleted):
            # Always the attempt that the transition below comes from: it is told just before.
            self._last_errors[event.check] = (event.correlation_id, event.error)
        if not isinstance(event, Transition):
            return
        attempt, error = self._last_errors.get(event.check, (None, None))
        _health.log(
            _LEVEL[event.new],
            self._message(event),
            exc_info=error if attempt == event.correlation_id else None,
            extra={
                "check": event.check,
                "old": event.old and str(event.old),
                "new": str(event.new),
                **({"code": event.code} if event.code else {}),
                "detail": event.message,
                "correlationId": event.correlation_id,
            },
        )

    def _message(self, event: Transition) -> str:
        name = self._connections.get(event.check)
        if name is not None and event.new is Status.FAIL and event.old is not None:
            if event.code not in _CONNECTED:
                self._lost.add(event.check)
                return f"{name} connection lost"
        elif name is not None and event.new is not Status.FAIL and event.check in self._lost:
            self._lost.discard(event.check)
            return f"{name} connection restored"
        return "Health check changed"


def log_lifecycle(event: LifecycleChanged) -> None:
    """Write each change of the process's state."""
    _lifecycle.info(
        "State changed",
        extra={"old": str(event.old), "new": str(event.new), "reason": event.reason},
    )


def log_shutdown(event: ShutdownEvent) -> None:
    """Write the trigger, and how each stage ended."""
    if isinstance(event, ShutdownTriggered):
        _shutdown.info(
            "Shutdown began",
            extra={"reason": event.reason, "forceTimeout": round(event.force_timeout * 1000)},
        )
        return
    stage = event.report
    _shutdown.log(
        logging.INFO if stage.outcome is Outcome.OK else logging.ERROR,
        "Shutdown stage ended",
        exc_info=stage.error,
        extra={
            "phase": str(event.phase),
            "stage": stage.name,
            "outcome": str(stage.outcome),
            "duration": round(stage.duration * 1000),
        },
    )


def log_circuit(event: CircuitEvent) -> None:
    """Write each change of a circuit; rejected calls are for metrics."""
    if isinstance(event, StateChanged):
        _circuits.log(
            logging.INFO if event.new is CircuitState.CLOSED else logging.WARNING,
            "Circuit changed",
            extra={"circuit": event.name, "old": str(event.old), "new": str(event.new)},
        )
