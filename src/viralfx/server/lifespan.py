"""The lifespan of an application: its start-up and its shutdown, as ASGI has them."""

import asyncio
import logging
import sys
from typing import Any

from viralfx.server.interface import ERROR, ASGIApp, Message, Scope, is_logged

_logger = logging.getLogger("uvicorn.error")
"""Applications and users know the errors of a lifespan by this name."""


class ApplicationLifespan:
    """Runs the lifespan of an ASGI application: its start-up and its shutdown."""

    def __init__(self, app: ASGIApp) -> None:
        """Create it on the running loop; nothing runs yet."""
        self._app = app
        self.state: dict[str, Any] = {}
        """The state that the application has set up for its requests."""
        self._events: asyncio.Queue[Message] = asyncio.Queue()
        self._started, self._stopped = asyncio.Event(), asyncio.Event()
        self._failed = self._stopping = False
        self._running: asyncio.Task[None] | None = None
        self._scope: Scope = {
            "type": "lifespan",
            "asgi": {"version": "3.0", "spec_version": "2.0"},
            "state": self.state,
        }
        self.error: BaseException | None = None
        """The error with which the application's start-up or shutdown failed, if it is known."""

    async def start(self) -> bool:
        """Run the application's start-up; return False if it failed, which is logged."""
        self._events.put_nowait({"type": "lifespan.startup"})
        self._running = asyncio.create_task(self._run(), name="lifespan")
        await self._started.wait()
        return not self._failed

    async def stop(self) -> bool:
        """Run the application's shutdown, if its start-up succeeded; return False if it failed."""
        if not self._started.is_set() or self._failed:
            return True
        self._stopping = True
        self._events.put_nowait({"type": "lifespan.shutdown"})
        await self._stopped.wait()
        return not self._failed

    async def _run(self) -> None:
        try:
            await self._app(self._scope, self._events.get, self._take)
        except BaseException as error:
            self.error = error
            if not self._failed and not is_logged(error):
                _logger.exception("Exception in 'lifespan' protocol")
            # An application that serves goes on without its lifespan.
            self._failed |= not self._started.is_set() or self._stopping
        finally:
            self._started.set()
            self._stopped.set()

    async def _take(self, message: Message) -> None:
        """Take an event of the application. Raises ``RuntimeError`` for one out of order."""
        _, phase, outcome = message["type"].split(".")
        event = self._started if phase == "startup" else self._stopped
        if event.is_set() or (phase == "shutdown") != self._started.is_set():
            raise RuntimeError(f"the application sends {message['type']!r} out of order")
        if outcome == "failed":
            self._failed = True
            # Frameworks send this from their handler of the error.
            self.error = sys.exc_info()[1] or self._scope.get(ERROR)
            if text := message.get("message"):
                _logger.error(text)
        event.set()
