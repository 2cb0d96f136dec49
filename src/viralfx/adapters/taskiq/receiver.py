"""taskiq's receiver, for bells: it admits as many as there are slots, and leaves none running."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from taskiq import AckableMessage
from taskiq.receiver import Receiver

from viralfx.adapters.taskiq.broker import BellBroker
from viralfx.adapters.taskiq.message import UnknownMessageError, decode
from viralfx.domain.jobs.transport import Bell

_logger = logging.getLogger("viralfx.queues")


class BellReceiver(Receiver):
    """Calls ``hear`` for each bell of a broker.

    taskiq's own receiver runs tasks: it takes a cancellation for the task's result, acknowledges
    what was cancelled, and goes away without those that still run.
    """

    def __init__(
        self, broker: BellBroker, hear: Callable[[Bell], Awaitable[None]], slots: int
    ) -> None:
        super().__init__(broker, run_startup=False, validate_params=False, max_async_tasks=slots)
        broker.slots = slots
        self._bells = broker
        self._queue = broker.queue
        self._hear = hear
        self._calls: set[asyncio.Task[None]] = set()
        self._stopped = False

    async def run(self) -> None:
        """Hear until cancelled or until the broker is closed; ends when all calls ended."""
        try:
            await self.listen(asyncio.Event())
        finally:
            self._stopped = True
            # The turn in which calls that were only scheduled begin, and end.
            await asyncio.sleep(0)
            for call in self._calls:
                call.cancel()
            if self._calls:
                await asyncio.wait(self._calls)

    async def callback(self, message: bytes | AckableMessage, raise_err: bool = False) -> None:  # noqa: ARG002, FBT001, FBT002 - taskiq's signature
        """Hear one bell."""
        call = asyncio.current_task()
        if self._stopped or call is None:
            return
        self._calls.add(call)
        try:
            data = message if isinstance(message, bytes) else message.data
            await self._hear(decode(self._queue, data))
        except UnknownMessageError as error:
            _logger.warning(
                "What is no bell was dropped", extra={"queue": self._queue, "reason": str(error)}
            )
        except Exception:
            # A listener outlives whatever one bell leads to.
            _logger.exception("A bell was heard in vain", extra={"queue": self._queue})
        finally:
            self._calls.remove(call)
            self._bells.held -= 1
