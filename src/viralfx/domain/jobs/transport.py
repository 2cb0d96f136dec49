"""The transport port: a bell that tells workers at once of jobs they would else find by looking."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Bell:
    """Tells that jobs of a queue are due."""

    queue: str
    ids: Sequence[str]


class JobTransport(Protocol):
    """Port: carries bells. It may lose, repeat or delay any: the ledger alone is the truth."""

    async def ring(self, bell: Bell) -> None:
        """Send a bell. Raises ``OSError`` or :class:`ViralFXError` when it cannot, within 5 s."""
        ...

    async def listen(self, queue: str, hear: Callable[[Bell], Awaitable[None]], slots: int) -> None:
        """Call ``hear`` for each bell of a queue until cancelled.

        At most ``slots`` calls run at once, and no bell is taken from others while they all do:
        it belongs to a worker that has time. Never raises; what is lost is found again by itself,
        and what ``hear`` raises is logged. Cancelling cancels the calls that still run, and ends
        when they ended: what must go on after that, ``hear`` only starts and looks at.
        """
        ...

    def hears(self, queue: str) -> bool:
        """Tell whether bells of this queue would be heard now; else workers look more often."""
        ...

    async def close(self) -> None:
        """Let go of what it holds; doing it twice is harmless."""
        ...
