"""Deadlines, on a loop with virtual time."""

import asyncio
import math

import pytest
from tests.virtual_time import LoopClock, run_in_virtual_time

from viralfx.domain.resilience.deadline import Deadline, time_left


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
