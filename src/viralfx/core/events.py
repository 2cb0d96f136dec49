"""Event listeners: an error in a listener is logged and does not reach the publisher."""

import asyncio
import logging
from collections.abc import Callable
from typing import Generic, TypeVar

_logger = logging.getLogger("viralfx.events")

EventT = TypeVar("EventT")

Listener = Callable[[EventT], object]
"""Called synchronously with a frozen event object; it must not block."""


def notify(listeners: tuple[Listener[EventT], ...], event: EventT) -> None:
    """Call each listener with ``event``. An error in a listener is logged and not raised."""
    for listener in listeners:
        try:
            listener(event)
        except (Exception, asyncio.CancelledError):
            # Listeners are synchronous, so a CancelledError here comes from the listener itself.
            _logger.exception("Event listener failed", extra={"event": type(event).__name__})


class Relay(Generic[EventT]):
    """A listener that forwards events to its own listeners, which may be added at any time."""

    def __init__(self) -> None:
        self._listeners: tuple[Listener[EventT], ...] = ()

    def subscribe(self, listener: Listener[EventT]) -> None:
        """Forward every further event to ``listener``."""
        self._listeners = (*self._listeners, listener)

    def __call__(self, event: EventT) -> None:
        """Forward ``event`` to all listeners."""
        notify(self._listeners, event)


OperationListener = Callable[[str, float, BaseException | None], object]
"""Called synchronously after each database statement or Redis command, with its name (``SELECT``),
its duration in seconds, and its error or None. It must neither block nor raise."""


def ignore_operation(operation: str, seconds: float, error: BaseException | None) -> None:
    """Ignore the operation: the listener that is used when no other is set."""
