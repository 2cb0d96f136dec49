"""Operations that do what a test tells them."""

import asyncio

from tests.manual_clock import ManualClock

from viralfx.domain.resilience.breaker import CircuitBreaker


class BackendError(Exception):
    """What the dependency raises."""


class Scripted:
    """An operation that goes through outcomes: an exception is raised, anything else returned."""

    def __init__(self, *outcomes: object) -> None:
        self.outcomes = list(outcomes)
        self.calls = 0

    def sync(self) -> object:
        """Give the next outcome; the last one for ever."""
        outcome = self.outcomes[min(self.calls, len(self.outcomes) - 1)]
        self.calls += 1
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    async def __call__(self) -> object:
        """Give the next outcome; the last one for ever."""
        return self.sync()


class Gate:
    """An operation whose calls hang until the test ends each of them."""

    def __init__(self) -> None:
        self.calls: list[asyncio.Future[object]] = []

    async def __call__(self) -> object:
        """Hang."""
        ended: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        self.calls.append(ended)
        return await ended


async def settle(turns: int = 5) -> None:
    """Let the tasks that can run do so."""
    for _ in range(turns):
        await asyncio.sleep(0)


def state_of(breaker: CircuitBreaker) -> str:
    """Return the shown state as a word, which a type checker does not take for constant."""
    return str(breaker.get_state()["state"])


class SkippingClock(ManualClock):
    """A clock on which every sleep is over at once, and written down."""

    def __init__(self, monotonic: float = 7.0) -> None:
        # Not a round number of the durations in use: differences of times must be differences.
        super().__init__(monotonic=monotonic)
        self.slept: list[float] = []

    async def sleep(self, seconds: float) -> None:
        """Move time on by ``seconds``."""
        self.slept.append(seconds)
        await self.advance(seconds)

    def block(self, seconds: float) -> None:
        """Move time on by ``seconds``, for plain functions."""
        self.slept.append(seconds)
        self._monotonic += seconds
