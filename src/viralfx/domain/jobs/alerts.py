"""Alerts: changes of health as ``notifications`` jobs, few enough to be read."""

import asyncio
import logging
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from viralfx.domain.clock import Clock, finished_within, timestamp
from viralfx.domain.correlation import correlated, new_correlation_id
from viralfx.domain.health import Status, Transition
from viralfx.domain.jobs.job import KeyConflictError, LedgerUnavailableError
from viralfx.domain.jobs.service import JobService
from viralfx.domain.monitor import MonitorEvent
from viralfx.domain.resilience.backoff import Backoff

_logger = logging.getLogger("viralfx.alerts")

TASK = "notifications.webhook"
_PATIENCE = 10.0
_BACKOFF = Backoff(base=1.0, cap=30.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Alert:
    transition: Transition
    window: int
    """The number of the window that it is told in."""

    @property
    def subject(self) -> tuple[str, Status]:
        return self.transition.check, self.transition.new


class HealthAlerts:
    """Has each change of health told once: subscribe it to the monitor and keep :meth:`run` going.

    A check that is well from the start is not told. In each window of ``window`` seconds a check
    is told at most once in each status, by all instances together where the check is ``shared``,
    else by this one. What comes back to a status within a window is told when the window is over,
    if it is still so: the last thing that people hear is true.

    While the ledger is away alerts wait, ``capacity`` at most: of more, the oldest is dropped.
    """

    def __init__(
        self,
        service: JobService,
        *,
        clock: Clock,
        instance: str,
        environment: str,
        shared: Callable[[str], bool],
        window: float = 300.0,
        capacity: int = 100,
    ) -> None:
        """``shared`` tells whether all instances see the same in a check.

        ``instance`` and ``environment`` stand in each alert.
        """
        self._service = service
        self._clock = clock
        self._origin = {"environment": environment, "instance": instance}
        self._shared = shared
        self._window = window
        self._capacity = capacity
        self._waiting: deque[_Alert] = deque()
        self._current: dict[str, Transition] = {}
        """The last change of each check."""
        self._told: dict[str, Status] = {}
        """What was last told of each check, or waits to be."""
        self._windows: dict[tuple[str, Status], int] = {}
        """The window in which each status of each check was last told, or waits to be."""
        self._woken = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._dropped = 0

    @property
    def waiting(self) -> int:
        """How many alerts the ledger has not accepted yet."""
        return len(self._waiting)

    @property
    def dropped(self) -> int:
        """How many were never told, because too many waited or because of an error."""
        return self._dropped

    def __call__(self, event: MonitorEvent) -> None:
        """Take in one event of the monitor, without waiting for anything."""
        if not isinstance(event, Transition):
            return
        self._current[event.check] = event
        if event.old is None and event.new is Status.PASS:
            self._told[event.check] = event.new
            return
        self._tell(event, math.floor(event.at.timestamp() / self._window))
        self._woken.set()

    async def run(self) -> None:
        """Hand alerts over to the ledger until cancelled; never raises."""
        failures = 0
        while True:
            self._tell_what_became_of_it()
            if not self._waiting:
                self._idle.set()
                await self._pause()
                continue
            alert = self._waiting[0]
            if await self._hand_over(alert):
                failures = 0
                # It may have been dropped meanwhile.
                if self._waiting and self._waiting[0] is alert:
                    self._waiting.popleft()
            else:
                failures += 1
                await self._clock.sleep(_BACKOFF.longest(failures))

    async def settled(self) -> None:
        """Return once no alert waits."""
        await self._idle.wait()

    def _tell(self, transition: Transition, window: int) -> None:
        alert = _Alert(transition=transition, window=window)
        if self._windows.get(alert.subject, window - 1) >= window:
            return
        self._windows[alert.subject] = window
        self._told[transition.check] = transition.new
        self._idle.clear()
        self._waiting.append(alert)
        if len(self._waiting) > self._capacity:
            self._drop(self._waiting.popleft(), "too many wait")

    def _tell_what_became_of_it(self) -> None:
        window = math.floor(self._clock.now().timestamp() / self._window)
        for transition in self._untold():
            self._tell(transition, window)

    def _untold(self) -> list[Transition]:
        return [t for t in self._current.values() if self._told.get(t.check) is not t.new]

    async def _pause(self) -> None:
        self._woken.clear()
        if not self._untold():
            await self._woken.wait()
            return
        now = self._clock.now().timestamp()
        woken = asyncio.ensure_future(self._woken.wait())
        try:
            await finished_within(woken, self._window - now % self._window, self._clock)
        finally:
            woken.cancel()

    async def _hand_over(self, alert: _Alert) -> bool:
        """Tell whether the alert is done with."""
        handing = asyncio.ensure_future(self._submit(alert))
        handing.add_done_callback(_retrieve)
        try:
            if not await finished_within(handing, _PATIENCE, self._clock):
                _logger.warning("Alert waits: the ledger does not answer")
                return False
        finally:
            handing.cancel()
        error = None if handing.cancelled() else handing.exception()
        if isinstance(error, LedgerUnavailableError):
            _logger.warning("Alert waits: the ledger cannot be reached")
            return False
        if error is not None and not isinstance(error, KeyConflictError):
            # It will not be otherwise the next time, and it must not keep the others.
            self._drop(alert, "an error", error)
        return True

    async def _submit(self, alert: _Alert) -> None:
        # Raises KeyConflictError where another instance told it, in words of its own.
        transition = alert.transition
        payload = {
            "alert": True,
            "type": "health.changed",
            "data": {
                "check": transition.check,
                "status": str(transition.new),
                "previous": transition.old and str(transition.old),
                "code": transition.code,
                "message": transition.message,
                "at": timestamp(transition.at),
                "correlationId": transition.correlation_id,
                **self._origin,
            },
        }
        with correlated(transition.correlation_id or new_correlation_id()):
            await self._service.submit(TASK, payload, key=self._key(alert))

    def _key(self, alert: _Alert) -> str:
        check, status = alert.subject
        whose = "all" if self._shared(check) else self._origin["instance"]
        # With a space, which no client's key has.
        return f"alert {whose}:{check}:{status}:{alert.window}"

    def _drop(self, alert: _Alert, reason: str, error: BaseException | None = None) -> None:
        self._dropped += 1
        check, status = alert.subject
        _logger.error(
            "Alert dropped",
            exc_info=error,
            extra={"check": check, "status": str(status), "reason": reason},
        )


class StopAlerts:
    """Shutdown stage: hands over the alerts that wait, where the ledger takes them at once."""

    def __init__(self, alerts: HealthAlerts, clock: Clock, patience: float = 2.0) -> None:
        """``patience`` is the most seconds that are waited, whatever the budget."""
        self._alerts = alerts
        self._clock = clock
        self._patience = patience

    async def run(self, budget: float) -> None:
        """Wait for the alerts; those that still wait then are told by nobody."""
        settled = asyncio.ensure_future(self._alerts.settled())
        try:
            await finished_within(settled, min(budget, self._patience), self._clock)
        finally:
            settled.cancel()


def _retrieve(task: "asyncio.Future[None]") -> None:
    # Also of one that was left behind, so that its error is not taken for an uncaught one.
    if not task.cancelled():
        task.exception()
