"""How much memory a Redis uses: asked for now and then in the place of a ping."""

import math
import re
from dataclasses import dataclass

from viralfx.domain.clock import Clock

_INTERVAL = 30.0
"""Seconds from one question to the next: memory is looked at over minutes, not seconds."""
_FORBIDDEN = 3600.0
"""Seconds until somebody who may not ask tries again: rights change, but seldom."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """What Redis said, in bytes."""

    used: int
    limit: int | None
    """None: it has none of its own."""


class MemoryQuestion:
    """Decides when to ask, and keeps the last answer.

    It is never asked for twice in a row, nor before a ping has passed: a server that loads its
    data or cannot save them refuses a ping, but tells its memory as if nothing were the matter.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._passed = False
        self._next = -math.inf
        self.answer: MemoryUse | None = None
        """The last one; None before the first."""

    @property
    def due(self) -> bool:
        """Whether to ask now."""
        return self._passed and self._clock.monotonic() >= self._next

    def pinged(self) -> None:
        """Note a ping that passed."""
        self._passed = True

    def failed(self) -> None:
        """Note that the server did not answer, or not well: pings come first again."""
        self._passed = False

    def answered(self, reply: object) -> None:
        """Take in the reply to ``INFO memory``."""
        self._passed = False
        self._next = self._clock.monotonic() + _INTERVAL
        text = reply.decode("utf-8", "replace") if isinstance(reply, bytes) else str(reply)
        if used := re.search(r"^used_memory:(\d+)", text, re.MULTILINE):
            limit = re.search(r"^maxmemory:(\d+)", text, re.MULTILINE)
            most = int(limit[1]) if limit else 0
            self.answer = MemoryUse(used=int(used[1]), limit=most or None)

    def forbidden(self) -> None:
        """Note that the server would not tell."""
        self._next = self._clock.monotonic() + _FORBIDDEN
