"""One limit for a whole operation: what runs under it is cut, what would overrun it not begun."""

import asyncio
import math
from contextvars import ContextVar
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from viralfx.domain.clock import Clock, SystemClock
from viralfx.domain.resilience.quantities import require_not_negative


class Deadline:
    """A point in time, ``seconds`` after its creation, that bounds ``async with`` blocks.

    The block is cancelled when the time comes and ``TimeoutError`` raised; if there is none left
    at the start, it is raised at once. Retries inside know the deadline and do not start a wait
    that ends after it. One deadline may bound several blocks, nested or in several tasks. A block
    that refuses to be cancelled is waited for.

    Raises ``ValueError`` for a negative or non-finite number of seconds.
    """

    __slots__ = ("_clock", "_cut", "_expires_at", "_seconds")

    def __init__(self, seconds: float, *, clock: Clock | None = None) -> None:
        require_not_negative("a deadline", seconds)
        self._seconds = seconds
        self._clock = clock or SystemClock()
        self._expires_at = self._clock.monotonic() + seconds
        self._cut = False

    def remaining(self) -> float:
        """Return the seconds left, zero once it has passed."""
        return max(0.0, self._expires_at - self._clock.monotonic())

    @property
    def cut(self) -> bool:
        """Whether a block was cancelled because the time had come."""
        return self._cut

    async def __aenter__(self) -> Self:
        """Start the block.

        Raises ``TimeoutError`` when there is no time left for it.
        """
        remaining = self.remaining()
        if remaining <= 0:
            # Not asyncio.timeout(0): that would still run the block up to its first await.
            raise TimeoutError(self._message)
        timeout = asyncio.timeout(remaining)
        await timeout.__aenter__()
        _innermost.set(_Block(deadline=self, timeout=timeout, outer=_innermost.get()))
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End the block; a cancellation by this deadline becomes ``TimeoutError``."""
        block = _innermost.get()
        if block is None or block.deadline is not self:
            raise RuntimeError("a deadline must be left by the task that entered it")
        _innermost.set(block.outer)
        try:
            await block.timeout.__aexit__(kind, error, traceback)
        except TimeoutError as expired:
            self._cut = True
            expired.args = (self._message,)
            raise

    @property
    def _message(self) -> str:
        return f"the deadline of {self._seconds:g} s has passed"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Block:
    """One ``async with`` under way. Kept in the task's context: a deadline can bound several."""

    deadline: Deadline
    timeout: asyncio.Timeout
    outer: "_Block | None"


_innermost: ContextVar[_Block | None] = ContextVar("viralfx_deadline", default=None)


def time_left() -> float:
    """Return the seconds that the strictest deadline around this code leaves, else infinity."""
    left, block = math.inf, _innermost.get()
    while block is not None:
        left = min(left, block.deadline.remaining())
        block = block.outer
    return left
