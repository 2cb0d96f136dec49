"""Operations with scripted outcomes, and clocks for tests."""

import asyncio

from tests.manual_clock import ManualClock

from viralfx.resilience.breaker import CircuitBreaker


class BackendError(Exception):
    """The error of the dependency."""


class Scripted:
    """An operation with a list of outcomes: exceptions are raised, other values returned."""

    def __init__(self, *outcomes: object) -> None:
        self.outcomes = list(outcomes)
        self.calls = 0

    def sync(self) -> object:
        """Return or raise the next outcome; the last one repeats."""
        outcome = self.outcomes[min(self.calls, len(self.outcomes) - 1)]
        self.calls += 1
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    async def __call__(self) -> object:
        """Return or raise the next outcome; the last one repeats."""
        return self.sync()


class Gate:
    """An operation whose calls hang until the test ends them."""

    def __init__(self) -> None:
        self.calls: list[asyncio.Future[object]] = []

    async def __call__(self) -> object:
        """Hang."""
        ended: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        self.calls.append(ended)
        return await ended


async def settle(turns: int = 5) -> None:
    """Let runnable tasks run."""
    for _ in range(turns):
        await asyncio.sleep(0)


def state_of(breaker: CircuitBreaker) -> str:
    """Return the state as a string that a type checker does not narrow."""
    return str(breaker.get_state()["state"])


class SkippingClock(ManualClock):
    """A clock on which every sleep ends at once and is recorded."""

    def __init__(self, monotonic: float = 7.0) -> None:
        # Not a multiple of the durations in use, so that times and durations cannot be confused.
        super().__init__(monotonic=monotonic)
        self.slept: list[float] = []

    async def sleep(self, seconds: float) -> None:
        """Advance time by ``seconds``."""
        self.slept.append(seconds)
        await self.advance(seconds)

    def block(self, seconds: float) -> None:
        """Advance time by ``seconds``, for plain functions."""
        self.slept.append(seconds)
        self._monotonic += seconds
