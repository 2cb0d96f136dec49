"""The port that notifies workers of due jobs, and a sender that never blocks its caller."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextvars import Context
from dataclasses import dataclass
from typing import Protocol

from viralfx.core.clock import Clock, SystemClock, finished_within
from viralfx.core.errors import ViralFXError


@dataclass(frozen=True, slots=True)
class JobNotification:
    """Announces that jobs of a queue are due."""

    queue: str
    ids: Sequence[str]


class NotificationNotSentError(ViralFXError):
    """The notification could not be sent."""


class JobNotifier(Protocol):
    """Port: carries notifications to workers.

    It may lose, repeat or delay any of them, and leave out ids: the ledger alone is the truth.
    """

    @property
    def broadcasts(self) -> bool:
        """True if each listener receives each notification; otherwise listeners share them."""
        ...

    async def notify(self, notification: JobNotification) -> None:
        """Send a notification within 5 s, or raise ``OSError`` or :class:`ViralFXError`."""
        ...

    async def listen(
        self,
        queue: str,
        on_notification: Callable[[JobNotification], Awaitable[None]],
        slots: int,
    ) -> None:
        """Call ``on_notification`` for each notification of a queue until cancelled.

        At most ``slots`` calls run at once. While all slots are taken, further notifications wait,
        or go to other workers if listeners share them. Several notifications may arrive as one, and
        one without ids may stand for others that were lost. Never raises: the notifier restores a
        lost connection itself, and logs errors of ``on_notification``. Cancelling cancels the
        running calls and waits until they have ended.
        """
        ...

    def is_connected(self, queue: str) -> bool:
        """Return True if notifications of this queue arrive now; otherwise workers poll faster."""
        ...

    async def close(self) -> None:
        """Release all connections; a second call does nothing."""
        ...


_logger = logging.getLogger("viralfx.jobs")
_queues_logger = logging.getLogger("viralfx.queues")


async def deliver_notifications(
    waiting: "asyncio.Queue[JobNotification]",
    on_notification: Callable[[JobNotification], Awaitable[None]],
    slots: int,
) -> None:
    """Call ``on_notification`` for each notification that waits, as :meth:`JobNotifier.listen`."""
    free = asyncio.Semaphore(slots)

    async def call(notification: JobNotification) -> None:
        try:
            await on_notification(notification)
        except Exception:
            # One failing call must not end the listener.
            _queues_logger.exception("Job notification failed", extra={"queue": notification.queue})
        finally:
            free.release()

    async with asyncio.TaskGroup() as calls:
        while True:
            await free.acquire()
            calls.create_task(call(await waiting.get()))


IDS_PER_NOTIFICATION = 100

MAX_AHEAD_SECONDS = 10.0
"""A job that is due later than this is found by a poll before it is due."""

DUE_MARGIN_SECONDS = 0.002
"""Added to a due time, so that the job is due by the ledger's clock as well."""


class BackgroundNotifier:
    """Sends notifications in the background, and drops them while the notifier is unavailable.

    Ids that arrive during a send share the next notification. Callers never wait, and nothing is
    kept for long: after a lost notification the job waits until a worker polls.
    """

    def __init__(
        self, notifier: JobNotifier, *, clock: Clock | None = None, capacity: int = 10_000
    ) -> None:
        """``capacity`` is how many ids may wait to be sent; further ids are dropped."""
        self._notifier = notifier
        self._clock = clock or SystemClock()
        self._capacity = capacity
        self._waiting: dict[str, dict[str, None]] = {}
        self._count = 0
        self._sending: asyncio.Task[None] | None = None
        self._ahead: set[asyncio.TimerHandle] = set()
        """Of jobs that are due soon."""
        self._closed = False
        self._lost = False
        self.dropped = 0
        """Ids that were dropped instead of sent."""

    def notify(self, queue: str, ids: Iterable[str], due_in: float = 0.0) -> None:
        """Announce jobs when they are due, in seconds from now; neither waits nor raises.

        Jobs that are due later than :data:`MAX_AHEAD_SECONDS` are left to the polls. Does nothing
        after :meth:`close`.
        """
        if self._closed or due_in > MAX_AHEAD_SECONDS:
            return
        if due_in > 0:
            if len(self._ahead) < self._capacity:
                ahead: asyncio.TimerHandle = asyncio.get_running_loop().call_later(
                    due_in + DUE_MARGIN_SECONDS, lambda: self._announce_due(ahead, queue, ids)
                )
                self._ahead.add(ahead)
            return
        waiting = self._waiting.setdefault(queue, {})
        for job_id in ids:
            if self._count >= self._capacity:
                self.dropped += 1
            elif job_id not in waiting:
                waiting[job_id] = None
                self._count += 1
        # A task whose event loop ended before it began is done.
        if self._count and (self._sending is None or self._sending.done()):
            # A fresh context: the task sends ids of other callers as well.
            self._sending = asyncio.create_task(
                self._send_all(), name="job-notifications", context=Context()
            )

    def _announce_due(self, ahead: asyncio.TimerHandle, queue: str, ids: Iterable[str]) -> None:
        self._ahead.discard(ahead)
        self.notify(queue, ids)

    async def close(self, budget: float = 1.0) -> None:
        """Send the ids that wait, within ``budget`` seconds; a second call does nothing."""
        self._closed = True
        for ahead in self._ahead:
            ahead.cancel()
        self._ahead.clear()
        if (sending := self._sending) is not None:
            try:
                await finished_within(sending, budget, self._clock)
            finally:
                sending.cancel()

    async def _send_all(self) -> None:
        try:
            while self._waiting:
                await self._send(self._next())
        finally:
            self._sending = None

    def _next(self) -> JobNotification:
        queue, waiting = next(iter(self._waiting.items()))
        # Moved to the end, so that one busy queue does not starve the others.
        del self._waiting[queue]
        ids = tuple(waiting)
        if rest := ids[IDS_PER_NOTIFICATION:]:
            self._waiting[queue] = dict.fromkeys(rest)
        self._count -= len(ids) - len(rest)
        return JobNotification(queue=queue, ids=ids[:IDS_PER_NOTIFICATION])

    async def _send(self, notification: JobNotification) -> None:
        if not notification.ids:
            return
        try:
            await self._notifier.notify(notification)
        except Exception as error:
            # No caller waits for the result, and every error has the same effect. The ids that
            # wait are dropped too: workers will have polled before the notifier is back.
            self.dropped += len(notification.ids) + self._count
            self._waiting.clear()
            self._count = 0
            if not self._lost:
                self._lost = True
                expected = isinstance(error, OSError | ViralFXError)
                _logger.warning(
                    "Job notifications cannot be sent; workers poll",
                    exc_info=None if expected else error,
                    extra={"reason": str(error)},
                )
        else:
            if self._lost:
                self._lost = False
                _logger.info("Job notifications are sent again")
