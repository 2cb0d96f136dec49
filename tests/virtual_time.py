"""An event loop whose time jumps to the next timer: the loop's own timeouts without real time."""

import asyncio
import selectors
from collections.abc import Coroutine
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

T = TypeVar("T")

_START = datetime(2026, 1, 6, 12, tzinfo=UTC)


class _JumpingSelector(selectors.SelectSelector):
    """Instead of waiting for a timer, moves time to it."""

    def __init__(self) -> None:
        super().__init__()
        self.time = 1000.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("nothing is scheduled: this would wait for ever")
        self.time += timeout
        return super().select(0)


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """The standard loop on a clock that only timers move."""

    def __init__(self) -> None:
        self._virtual = _JumpingSelector()
        super().__init__(self._virtual)

    def time(self) -> float:
        """Seconds, moved by timers only."""
        return self._virtual.time

    def jump(self, seconds: float) -> None:
        """Let time pass in which the process does not run; its timers are late then."""
        self._virtual.time += seconds


class LoopClock:
    """Implements ``viralfx.domain.clock.Clock`` by the running loop's own time."""

    def monotonic(self) -> float:
        """Read the loop's time."""
        return asyncio.get_running_loop().time()

    def now(self) -> datetime:
        """UTC time that moves along."""
        return _START + timedelta(seconds=self.monotonic())

    async def sleep(self, seconds: float) -> None:
        """Sleep on the loop."""
        await asyncio.sleep(seconds)


def run_in_virtual_time(main: Coroutine[Any, Any, T]) -> T:
    """Run ``main`` to its end on a loop of virtual time."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main)
