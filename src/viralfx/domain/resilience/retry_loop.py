"""Trying again as a loop: ``async for attempt in retrier: with attempt: ...``."""

from types import TracebackType
from typing import Self

from viralfx.domain.resilience.retry_decision import Decider


class Attempt:
    """One turn of ``async for attempt in retrier``: put the work inside ``with attempt:``."""

    __slots__ = ("_decider", "_name", "_started", "delay", "number", "succeeded")

    def __init__(self, decider: Decider, name: str, started: float, number: int) -> None:
        self._decider = decider
        self._name = name
        self._started = started
        self.number = number
        self.succeeded: bool | None = None
        """None until the block has ended, and when its error is not to be retried."""
        self.delay = 0.0

    def __enter__(self) -> Self:
        """Start the attempt."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        """Hide an error that the loop will retry; let every other one out."""
        if error is None:
            self.succeeded = True
            return False
        if not isinstance(error, Exception):
            return False
        delay = self._decider.next_delay(self._name, self.number, error, started=self._started)
        if delay is None:
            return False
        self.succeeded, self.delay = False, delay
        return True


class Attempts:
    """The state of one ``async for``."""

    def __init__(self, decider: Decider, name: str, started: float) -> None:
        self._decider = decider
        self._name = name
        self._started = started
        self._last: Attempt | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Attempt:
        number, last = 1, self._last
        if last is not None:
            if last.succeeded:
                raise StopAsyncIteration
            if last.succeeded is None:
                raise RuntimeError("the body of the loop must be inside `with attempt:`")
            if last.delay > 0 or last.number > 1:
                await self._decider.clock.sleep(last.delay)
            number = last.number + 1
        self._last = Attempt(self._decider, self._name, self._started, number)
        return self._last
