"""Deadlines, on a loop with virtual time."""

import asyncio
import math
from collections.abc import Callable
from contextvars import Context
from typing import TypeVarTuple

import pytest
from tests.virtual_time import LoopClock, VirtualTimeLoop, run_in_virtual_time

from viralfx.domain.resilience.deadline import Deadline, time_left

Arguments = TypeVarTuple("Arguments")


def test_a_block_is_cut_at_the_deadline() -> None:
    """It raises TimeoutError where it waits."""

    async def main() -> float:
        clock = LoopClock()
        started = clock.monotonic()
        with pytest.raises(TimeoutError, match="the deadline of 2 s has passed"):
            async with Deadline(2.0, clock=clock):
                await asyncio.sleep(60.0)
        return clock.monotonic() - started

    assert run_in_virtual_time(main()) == pytest.approx(2.0)


def test_no_block_starts_after_the_deadline() -> None:
    """Not even up to its first await."""

    async def main() -> bool:
        clock, started = LoopClock(), False
        deadline = Deadline(1.0, clock=clock)
        await asyncio.sleep(1.0)
        with pytest.raises(TimeoutError):
            async with deadline:
                started = True
        assert deadline.remaining() == 0.0
        return started

    assert run_in_virtual_time(main()) is False


def test_one_deadline_limits_several_tasks_and_blocks() -> None:
    """It is a point in time."""

    async def main() -> list[float]:
        clock = LoopClock()
        started, deadline, ended = clock.monotonic(), Deadline(3.0, clock=clock), list[float]()

        async def work(delay: float) -> None:
            await asyncio.sleep(delay)
            try:
                async with deadline, deadline:
                    await asyncio.sleep(60.0)
            except TimeoutError:
                ended.append(clock.monotonic() - started)

        await asyncio.wait([asyncio.create_task(work(delay)) for delay in (0.0, 1.0, 2.0)])
        return ended

    assert run_in_virtual_time(main()) == [pytest.approx(3.0)] * 3


def test_the_earliest_enclosing_deadline_counts() -> None:
    """Without a deadline the time left is infinite."""

    async def main() -> None:
        clock = LoopClock()
        assert time_left() == math.inf
        async with Deadline(5.0, clock=clock):
            async with Deadline(50.0, clock=clock):
                await asyncio.sleep(1.0)
                assert time_left() == pytest.approx(4.0)
            async with Deadline(1.0, clock=clock):
                assert time_left() == pytest.approx(1.0)
            assert time_left() == pytest.approx(4.0)
        assert time_left() == math.inf

    run_in_virtual_time(main())


def test_another_cancellation_is_not_a_timeout() -> None:
    """Only the deadline's own cancellation becomes a TimeoutError."""

    async def main() -> None:
        async def work() -> None:
            async with Deadline(5.0, clock=LoopClock()):
                await asyncio.sleep(60.0)

        task = asyncio.create_task(work())
        await asyncio.sleep(1.0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run_in_virtual_time(main())


def test_a_timeout_error_of_the_block_is_unchanged() -> None:
    """Its message reaches the caller."""

    async def main() -> None:
        with pytest.raises(TimeoutError, match="from inside"):
            async with Deadline(5.0, clock=LoopClock()):
                raise TimeoutError("from inside")

    run_in_virtual_time(main())


def test_a_deadline_must_be_left_by_the_task_that_entered_it() -> None:
    """Otherwise it raises RuntimeError."""

    async def main() -> None:
        deadline = Deadline(5.0, clock=LoopClock())
        with pytest.raises(RuntimeError, match="by the task that entered it"):
            await deadline.__aexit__(None, None, None)

    run_in_virtual_time(main())


def test_a_block_that_runs_beyond_its_deadline_is_cut_where_it_waits() -> None:
    """A cancellation cannot reach it earlier."""

    async def main() -> float:
        clock, reached = LoopClock(), list[str]()
        started = clock.monotonic()

        async def work() -> None:
            async with Deadline(1.0, clock=clock):
                _running_loop().jump(5.0)
                reached.append("its first wait")
                await asyncio.sleep(60.0)
                reached.append("its end")

        with pytest.raises(TimeoutError):
            await work()
        assert reached == ["its first wait"]
        return clock.monotonic() - started

    assert run_in_virtual_time(main(), _CountingLoop) == pytest.approx(5.0)


def test_only_a_block_that_waits_starts_a_timer() -> None:
    """Most blocks are short, and a timer costs more than all the rest of them."""

    async def main() -> list[int]:
        clock, loop = LoopClock(), _running_loop()
        timers = [loop.timers]
        for waits in (False, True):
            async with Deadline(5.0, clock=clock):
                if waits:
                    await asyncio.sleep(0)
                    await asyncio.sleep(0)
            await asyncio.sleep(0)
            timers.append(loop.timers)
        return [timer - timers[0] for timer in timers]

    assert run_in_virtual_time(main(), _CountingLoop) == [0, 0, 1]


def test_a_block_without_a_task_is_refused() -> None:
    """Nothing could be cancelled."""

    async def main() -> None:
        entering = Deadline(5.0, clock=LoopClock()).__aenter__()

        def enter() -> None:
            with pytest.raises(RuntimeError, match="by an asyncio task"):
                entering.send(None)
            entered.set_result(None)

        entered = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_soon(enter)
        await entered

    run_in_virtual_time(main())


def test_a_loop_that_ended_within_a_block_does_not_keep_the_timers_of_the_next() -> None:
    """It had no further turn in which it could have started its own."""

    async def leave() -> None:
        async with Deadline(1.0, clock=LoopClock()):
            raise SystemExit(3)

    async def wait() -> None:
        async with Deadline(1.0, clock=LoopClock()):
            await asyncio.sleep(60.0)

    loop = VirtualTimeLoop()
    try:
        with pytest.raises(SystemExit):
            loop.run_until_complete(leave())
    finally:
        loop.close()
    with pytest.raises(TimeoutError):
        run_in_virtual_time(wait())


def _running_loop() -> "_CountingLoop":
    loop = asyncio.get_running_loop()
    assert isinstance(loop, _CountingLoop)
    return loop


class _CountingLoop(VirtualTimeLoop):
    """Counts the timers that were started."""

    timers = 0

    def call_at(
        self,
        when: float,
        callback: Callable[[*Arguments], object],
        *arguments: *Arguments,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        """See :meth:`asyncio.AbstractEventLoop.call_at`."""
        self.timers += 1
        return super().call_at(when, callback, *arguments, context=context)
