"""Listeners that write the domain's events as log lines, one per event and no more."""

import logging

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

_LEVEL = {Status.PASS: logging.INFO, Status.WARN: logging.WARNING, Status.FAIL: logging.ERROR}


class HealthLog:
    """Writes each transition once, with the exception that caused it when there was one."""

    def __init__(self) -> None:
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
            "Health check changed",
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
