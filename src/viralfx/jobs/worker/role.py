"""The parts of a worker that run in asyncio tasks of their own."""

import asyncio
from abc import ABC, abstractmethod

from viralfx.core.clock import supervised


class Role(ABC):
    """A part of a worker that runs in an asyncio task of its own."""

    name: str
    """The name of the task."""
    task: asyncio.Task[None] | None = None
    """None before the start."""
    stopping: bool = False
    """True after :meth:`cancel`: the work must end even if a call suppressed its cancellation."""

    def start(self) -> None:
        """Start on the running loop; call it once."""
        self.task = supervised(self.run(), self.name)

    def cancel(self) -> None:
        """Cancel the task, if it was started; it ends in a later turn of the loop."""
        self.stopping = True
        if self.task is not None:
            self.task.cancel()

    @abstractmethod
    async def run(self) -> None:
        """Do the work until cancelled."""
