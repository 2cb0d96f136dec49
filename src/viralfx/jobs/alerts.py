"""Health alerts: submits a ``notifications`` job for each status change, with deduplication."""

import asyncio
import json
import logging
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from viralfx.core.clock import Clock, finished_within, ignore_error, timestamp, wait_for
from viralfx.core.correlation import correlated, new_correlation_id
from viralfx.core.errors import LedgerUnavailableError
from viralfx.core.ids import new_job_id
from viralfx.domain.health.model import Status, Transition
from viralfx.domain.health.monitor import MonitorEvent
from viralfx.domain.webhooks.signature import WebhookKeys
from viralfx.jobs.model import JobDraft
from viralfx.jobs.service import JobService
from viralfx.resilience.policy import Backoff

_logger = logging.getLogger("viralfx.alerts")

TASK = "notifications.webhook"
SUBMIT_TIMEOUT_SECONDS = 10.0
MAX_DRAIN_SECONDS = 2.0
_BACKOFF = Backoff(base=1.0, cap=30.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Alert:
    transition: Transition
    window: int
    """Number of the time window in which the alert is sent."""

    @property
    def subject(self) -> tuple[str, Status]:
        return self.transition.check, self.transition.new


class HealthAlerts:
    """Sends one alert for each status change: subscribe it to the monitor and run :meth:`run`.

    A check that passes from the start causes no alert. In each window of ``window`` seconds there
    is at most one alert for each check and status: from all instances together if the check is
    ``shared``, else from this instance. If a check returns to a status within the window, the
    alert is sent when the window ends, unless the status has changed again. So the last alert
    always shows the current status.

    While the ledger is unavailable, up to ``capacity`` alerts wait; beyond that the oldest is
    dropped.
    """

    def __init__(
        self,
        service: JobService,
        *,
        clock: Clock,
        instance: str,
        environment: str,
        shared: Callable[[str], bool],
        keys: WebhookKeys | None = None,
        window: float = 300.0,
        capacity: int = 100,
    ) -> None:
        """``shared`` returns whether a check has the same status in all instances.

        Each alert contains ``instance`` and ``environment``, and a proof of ``keys`` by which the
        worker that sends it signs it.
        """
        self._service = service
        self._clock = clock
        self._origin = {"environment": environment, "instance": instance}
        self._shared = shared
        self._keys = keys or WebhookKeys()
        self._window = window
        self._capacity = capacity
        self._waiting: deque[_Alert] = deque()
        self._deferred: dict[str, Transition] = {}
        """The last change of each check that must wait for the next window."""
        self._announced: dict[str, Status] = {}
        """The status of each check in its last alert, sent or waiting."""
        self._windows: dict[tuple[str, Status], int] = {}
        """The window of the last alert for each check and status, sent or waiting."""
        self._woken = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._dropped = 0

    @property
    def waiting(self) -> int:
        """Number of alerts that the ledger has not accepted yet."""
        return len(self._waiting)

    @property
    def dropped(self) -> int:
        """Number of alerts that were dropped, because too many waited or because of an error."""
        return self._dropped

    def __call__(self, event: MonitorEvent) -> None:
        """Handle one event of the monitor, without blocking."""
        if not isinstance(event, Transition):
            return
        if event.old is None and event.new is Status.PASS:
            self._announced[event.check] = event.new
            return
        if self._announced.get(event.check) is event.new:
            self._deferred.pop(event.check, None)
        else:
            self._deferred[event.check] = event
        self._enqueue(event, math.floor(event.at.timestamp() / self._window))
        self._woken.set()

    async def run(self) -> None:
        """Submit alerts to the ledger until cancelled; never raises."""
        failures = 0
        while True:
            self._enqueue_deferred()
            if not self._waiting:
                self._idle.set()
                await self._pause()
                continue
            alert = self._waiting[0]
            if await self._try_submit(alert):
                failures = 0
                # The alert may have been dropped in the meantime.
                if self._waiting and self._waiting[0] is alert:
                    self._waiting.popleft()
            else:
                failures += 1
                await self._clock.sleep(_BACKOFF.longest(failures))

    async def drain(self, budget: float) -> None:
        """Wait until the ledger has accepted every alert, at most 2 s and ``budget`` seconds.

        Alerts that still wait after that are lost with the process.
        """
        await wait_for(self._idle, min(budget, MAX_DRAIN_SECONDS), self._clock)

    def _enqueue(self, transition: Transition, window: int) -> None:
        alert = _Alert(transition=transition, window=window)
        if self._windows.get(alert.subject, window - 1) >= window:
            return
        self._windows[alert.subject] = window
        self._announced[transition.check] = transition.new
        self._deferred.pop(transition.check, None)
        self._idle.clear()
        self._waiting.append(alert)
        if len(self._waiting) > self._capacity:
            self._drop(self._waiting.popleft(), "too many wait")

    def _enqueue_deferred(self) -> None:
        window = math.floor(self._clock.now().timestamp() / self._window)
        for transition in tuple(self._deferred.values()):
            self._enqueue(transition, window)

    async def _pause(self) -> None:
        self._woken.clear()
        if not self._deferred:
            await self._woken.wait()
            return
        now = self._clock.now().timestamp()
        await wait_for(self._woken, self._window - now % self._window, self._clock)

    async def _try_submit(self, alert: _Alert) -> bool:
        """Return False if the alert must be submitted again."""
        submission = asyncio.ensure_future(self._submit(alert))
        # An abandoned submission may still fail; that is not an uncaught exception.
        submission.add_done_callback(ignore_error)
        try:
            if not await finished_within(submission, SUBMIT_TIMEOUT_SECONDS, self._clock):
                _logger.warning("Alert waits: the ledger does not answer")
                return False
        finally:
            submission.cancel()
        error = None if submission.cancelled() else submission.exception()
        if isinstance(error, LedgerUnavailableError):
            _logger.warning("Alert waits: the ledger cannot be reached")
            return False
        if error is not None:
            # Another attempt would fail as well, and the next alerts must not wait for this one.
            self._drop(alert, "an error", error)
        return True

    async def _submit(self, alert: _Alert) -> None:
        # The key returns the job of another instance that has sent this alert.
        transition = alert.transition
        job_id, kind = new_job_id(), "health.changed"
        data = {
            "check": transition.check,
            "status": str(transition.new),
            "previous": transition.old and str(transition.old),
            "code": transition.code,
            "message": transition.message,
            "at": timestamp(transition.at),
            "correlationId": transition.correlation_id,
            **self._origin,
        }
        payload = {"alert": True, "type": kind, "data": data}
        if (proof := self._keys.prove(job_id, kind, data)) is not None:
            payload["proof"] = proof
        correlation_id = transition.correlation_id or new_correlation_id()
        with correlated(correlation_id):
            await self._service.accept_draft(
                JobDraft(
                    id=job_id,
                    queue=self._service.queue_of(TASK),
                    task=TASK,
                    payload=json.dumps(payload, separators=(",", ":")).encode(),
                    key=self._key(alert),
                    correlation_id=correlation_id,
                )
            )

    def _key(self, alert: _Alert) -> str:
        check, status = alert.subject
        scope = "all" if self._shared(check) else self._origin["instance"]
        # The space keeps it apart from the keys of clients, which have none.
        return f"alert {scope}:{check}:{status}:{alert.window}"

    def _drop(self, alert: _Alert, reason: str, error: BaseException | None = None) -> None:
        self._dropped += 1
        check, status = alert.subject
        _logger.error(
            "Alert dropped",
            exc_info=error,
            extra={"check": check, "status": str(status), "reason": reason},
        )
