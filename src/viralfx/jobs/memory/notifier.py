"""Notifies workers of the same process."""

import asyncio
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable

from viralfx.jobs.notifier import JobNotification, deliver_notifications

_MAX_NOTIFICATIONS = 10_000
"""For each queue; workers find the jobs of dropped notifications by polling."""


class MemoryNotifier:
    """Implements ``JobNotifier`` in process. The listeners of a queue share its notifications."""

    broadcasts = False

    def __init__(self) -> None:
        self._queues: defaultdict[str, asyncio.Queue[JobNotification]] = defaultdict(
            lambda: asyncio.Queue(_MAX_NOTIFICATIONS)
        )
        self._listeners: Counter[str] = Counter()
        self._closed = False

    async def notify(self, notification: JobNotification) -> None:
        """Queue a notification for the next free listener; drop it if the queue is full."""
        if self._closed:
            raise ConnectionError("the notifier is closed")
        waiting = self._queues[notification.queue]
        if not waiting.full():
            waiting.put_nowait(notification)

    async def listen(
        self,
        queue: str,
        on_notification: Callable[[JobNotification], Awaitable[None]],
        slots: int,
    ) -> None:
        """Receive notifications until cancelled."""
        self._listeners[queue] += 1
        try:
            await deliver_notifications(self._queues[queue], on_notification, slots)
        finally:
            self._listeners[queue] -= 1

    def is_connected(self, queue: str) -> bool:
        """Return True if a queue has a listener."""
        return not self._closed and self._listeners[queue] > 0

    async def close(self) -> None:
        """Accept no more notifications, and drop those that wait."""
        self._closed = True
        for waiting in self._queues.values():
            while not waiting.empty():
                waiting.get_nowait()
