"""Telling others what happened, without depending on them or on their good behaviour."""

import asyncio
import logging
from collections.abc import Callable
from typing import Generic, TypeVar

_logger = logging.getLogger("viralfx.events")

EventT = TypeVar("EventT")

Listener = Callable[[EventT], object]
"""Called synchronously with a frozen event object; it must not block."""


def notify(listeners: tuple[Listener[EventT], ...], event: EventT) -> None:
    """Call each listener; one that raises is logged and never reaches whom the event is about."""
    for listener in listeners:
        try:
            listener(event)
        except (Exception, asyncio.CancelledError):
            # Synchronous code is not what is cancelled: the error is the listener's own.
            _logger.exception("Event listener failed", extra={"event": type(event).__name__})


class Relay(Generic[EventT]):
    """A listener that passes events on to whoever subscribed, before or after it was made known."""

    def __init__(self) -> None:
        self._listeners: tuple[Listener[EventT], ...] = ()

    def subscribe(self, listener: Listener[EventT]) -> None:
        """Call ``listener`` with every event that comes here."""
        self._listeners = (*self._listeners, listener)

    def __call__(self, event: EventT) -> None:
        """Pass it on."""
        notify(self._listeners, event)
