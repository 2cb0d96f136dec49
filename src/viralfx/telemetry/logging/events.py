"""Listeners that write the events of the domain as log lines, one line per event."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from time import perf_counter
from types import TracebackType

from viralfx.domain.health.check_runner import CheckCompleted
from viralfx.domain.health.model import StateChanged as LifecycleChanged
from viralfx.domain.health.model import Status, Transition
from viralfx.domain.health.monitor import MonitorEvent
from viralfx.domain.shutdown import Outcome, ShutdownEvent, ShutdownTriggered, StageFinished
from viralfx.jobs.hooks import Ended, JobHooks, names_of
from viralfx.jobs.ledger import Accepted
from viralfx.jobs.model import Claim, JobDraft, JobState, Settlement, correlation_id_of_job
from viralfx.resilience.breaker import CircuitEvent, StateChanged
from viralfx.resilience.breaker_states import CircuitState
from viralfx.settings import Settings

_health = logging.getLogger("viralfx.health")
_lifecycle = logging.getLogger("viralfx.lifecycle")
_circuits = logging.getLogger("viralfx.circuits")
_shutdown = logging.getLogger("viralfx.shutdown")
_settings = logging.getLogger("viralfx.settings")


def log_settings(settings: Settings) -> None:
    """Log each part of the configuration that has no effect, or not the intended one."""
    for warning in settings.warnings:
        _settings.warning("Setting without effect: %s", warning)


_CONNECTED = {"schema_behind"}
"""Codes of failures that the server reports over a working connection."""

_LEVEL = {Status.PASS: logging.INFO, Status.WARN: logging.WARNING, Status.FAIL: logging.ERROR}


class HealthLog:
    """Logs each transition of a check once, with the exception that caused it.

    ``connections`` maps checks of a connection to a display name, as ``{"redis": "Redis"}``. Loss
    and recovery of a connection have messages of their own, so that they are easy to search for.
    """

    def __init__(self, connections: Mapping[str, str] | None = None) -> None:
        self._connections = connections or {}
        self._lost: set[str] = set()
        self._last_errors: dict[str, tuple[str, BaseException | None]] = {}

    def __call__(self, event: MonitorEvent) -> None:
        """Handle one event of the monitor."""
        if isinstance(event, CheckCompleted):
            # The monitor publishes the attempt just before the transition that it causes.
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
    """Log each change of the process's state."""
    _lifecycle.info(
        "State changed",
        extra={"old": str(event.old), "new": str(event.new), "reason": event.reason},
    )


def log_shutdown(event: ShutdownEvent) -> None:
    """Log the trigger of a shutdown and the outcome of each stage."""
    if isinstance(event, ShutdownTriggered):
        _shutdown.info(
            "Shutdown began",
            extra={"reason": event.reason, "forceTimeout": round(event.force_timeout * 1000)},
        )
        return
    if not isinstance(event, StageFinished):
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
    """Log each change of a circuit's state; rejected calls are only counted in metrics."""
    if isinstance(event, StateChanged):
        _circuits.log(
            logging.INFO if event.new is CircuitState.CLOSED else logging.WARNING,
            "Circuit changed",
            extra={"circuit": event.name, "old": str(event.old), "new": str(event.new)},
        )


_logger = logging.getLogger("viralfx.jobs")
_is_debug = partial(_logger.isEnabledFor, logging.DEBUG)


class JobLog:
    """Adds debug log lines to other :class:`JobHooks`, inside their contexts.

    While the logger ``viralfx.jobs`` is not at debug, every call goes to the inner hooks alone.
    Failures of jobs are logged elsewhere, at any level.
    """

    def __init__(self, hooks: JobHooks) -> None:
        self._hooks = hooks

    def accepting(self, draft: JobDraft) -> AbstractContextManager[JobDraft]:
        """Return the inner hooks' context."""
        return self._hooks.accepting(draft)

    def storing(self, drafts: Sequence[JobDraft]) -> AbstractContextManager[None]:
        """Return the inner hooks' context."""
        return self._hooks.storing(drafts)

    def accepted(self, accepted: Accepted) -> None:
        """Log an accepted job.

        The line of a repeated idempotency key has the correlation id of the repeating request.
        """
        self._hooks.accepted(accepted)
        if not _is_debug():
            return
        job = accepted.job
        names = {"job": job.id, "task": job.task, "queue": job.queue}
        if accepted.created:
            names["correlationId"] = correlation_id_of_job(job)
            _logger.debug("Job accepted", extra=names)
        else:
            _logger.debug("Job accepted before", extra=names)

    def executing(self, claim: Claim) -> AbstractContextManager[Ended]:
        """Log the start of an execution and its outcome."""
        inner = self._hooks.executing(claim)
        return _LoggedExecution(inner, claim) if _is_debug() else inner


class _LoggedExecution:
    __slots__ = ("_began", "_claim", "_inner", "_inner_ended")

    def __init__(self, inner: AbstractContextManager[Ended], claim: Claim) -> None:
        self._inner = inner
        self._claim = claim

    def __enter__(self) -> Ended:
        self._inner_ended = self._inner.__enter__()
        _logger.debug("Job started", extra=names_of(self._claim))
        self._began = perf_counter()
        return self._ended

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        return self._inner.__exit__(kind, error, traceback)

    def _ended(self, settlement: Settlement | None) -> None:
        milliseconds = round((perf_counter() - self._began) * 1000, 3)
        self._inner_ended(settlement)
        if message := _message(settlement):
            _logger.debug(message, extra={**names_of(self._claim), "duration": milliseconds})


def _message(settlement: Settlement | None) -> str | None:
    """Return the message for an outcome; None for those that are logged elsewhere, at any level."""
    if settlement is None or settlement.state is JobState.COMPLETED:
        return "Job completed"
    logged = settlement.state in (JobState.FAILED, JobState.CANCELLED)
    if logged or settlement.spends_attempt:
        return None
    unchanged = settlement.error is None and settlement.delay is None
    return "Job handed back" if unchanged else "Job postponed"
