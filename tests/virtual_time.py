"""An event loop whose time jumps to the next timer, so that timeouts take no real time."""

import asyncio
import selectors
from collections.abc import Coroutine
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

T = TypeVar("T")

_START = datetime(2026, 1, 6, 12, tzinfo=UTC)


class _JumpingSelector(selectors.SelectSelector):
    """Moves time to the next timer instead of waiting for it."""

    def __init__(self) -> None:
        super().__init__()
        self.time = 1000.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("nothing is scheduled: this would wait without end")
        self.time += timeout
        return super().select(0)


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """The standard loop with a time that only timers move."""

    def __init__(self) -> None:
        self._virtual = _JumpingSelector()
        super().__init__(self._virtual)

    def time(self) -> float:
        """Return seconds that only timers move."""
        return self._virtual.time

    def jump(self, seconds: float) -> None:
        """Advance time as if the process had not run; its timers are late then."""
        self._virtual.time += seconds


class LoopClock:
    """Implements ``viralfx.core.clock.Clock`` with the running loop's time."""

    def monotonic(self) -> float:
        """Read the loop's time."""
        return asyncio.get_running_loop().time()

    def now(self) -> datetime:
        """UTC time that moves along."""
        return _START + timedelta(seconds=self.monotonic())

    async def sleep(self, seconds: float) -> None:
        """Sleep on the loop."""
        await asyncio.sleep(seconds)


def run_in_virtual_time(
    main: Coroutine[Any, Any, T], loop: type[VirtualTimeLoop] = VirtualTimeLoop
) -> T:
    """Run ``main`` to its end on a loop with virtual time."""
    with asyncio.Runner(loop_factory=loop) as runner:
        return runner.run(main)
