"""Deadlines, on a loop with virtual time."""

import asyncio
import gc
import math
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from contextvars import Context, ContextVar
from typing import TypeVarTuple

import pytest
from tests.virtual_time import LoopClock, VirtualTimeLoop, run_in_virtual_time

from viralfx.resilience.deadline import Deadline, time_left

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


def test_a_deadline_must_be_left_where_it_was_entered() -> None:
    """Otherwise it raises RuntimeError."""

    async def main() -> None:
        deadline = Deadline(5.0, clock=LoopClock())
        with pytest.raises(RuntimeError, match="where it was entered"):
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


def test_a_block_that_suppresses_its_cancellation_ends_without_an_error() -> None:
    """Its task is not cancelled any more."""

    async def main() -> tuple[bool, int]:
        deadline = Deadline(1.0, clock=LoopClock())
        async with deadline:
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(60.0)
        await asyncio.sleep(1.0)
        return deadline.cut, _cancellations()

    assert run_in_virtual_time(main()) == (False, 0)


def test_an_error_after_the_deadline_is_that_of_the_block() -> None:
    """Its task is not cancelled any more."""

    async def main() -> tuple[bool, int]:
        deadline = Deadline(1.0, clock=LoopClock())

        async def work() -> None:
            async with deadline:
                try:
                    await asyncio.sleep(60.0)
                finally:
                    raise LookupError("of its clean-up")

        with pytest.raises(LookupError):
            await work()
        await asyncio.sleep(1.0)
        return deadline.cut, _cancellations()

    assert run_in_virtual_time(main()) == (False, 0)


@pytest.mark.parametrize("before", [True, False])
def test_a_cancellation_at_the_deadline_is_kept(*, before: bool) -> None:
    """In whichever order both come."""

    async def main() -> None:
        loop = asyncio.get_running_loop()

        async def work() -> None:
            if before:
                loop.call_later(1.0, task.cancel)
            async with Deadline(1.0, clock=LoopClock()):
                if not before:
                    await asyncio.sleep(0)
                    loop.call_at(loop.time() + 1.0, task.cancel)
                await asyncio.sleep(60.0)

        task = asyncio.create_task(work())
        await asyncio.wait([task])
        assert task.cancelled()
        assert task.cancelling() == 1

    run_in_virtual_time(main())


def test_a_deadline_in_the_clean_up_of_a_cancelled_task_is_a_timeout() -> None:
    """The task was cancelled before the block began, and stays so."""

    async def main() -> list[str]:
        ended = list[str]()

        async def work() -> None:
            try:
                await asyncio.sleep(60.0)
            finally:
                try:
                    async with Deadline(1.0, clock=LoopClock()):
                        await asyncio.sleep(60.0)
                except TimeoutError:
                    ended.append("timeout")

        task = asyncio.create_task(work())
        await asyncio.sleep(1.0)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        return ended

    assert run_in_virtual_time(main()) == ["timeout"]


def test_the_outer_of_two_deadlines_that_pass_together_is_raised() -> None:
    """Both have cancelled the task."""

    async def main() -> tuple[bool, bool, int]:
        clock = LoopClock()
        outer, inner = Deadline(2.0, clock=clock), Deadline(2.0, clock=clock)

        async def work() -> None:
            async with outer, inner:
                await asyncio.sleep(60.0)

        with pytest.raises(TimeoutError):
            await work()
        return outer.cut, inner.cut, _cancellations()

    assert run_in_virtual_time(main()) == (True, False, 0)


def test_a_deadline_ends_a_group_of_tasks() -> None:
    """The tasks are cancelled, and the group raises the error of the deadline."""

    async def main() -> tuple[int, int]:
        cancelled = 0

        async def work() -> None:
            nonlocal cancelled
            try:
                await asyncio.sleep(60.0)
            except asyncio.CancelledError:
                cancelled += 1
                raise

        async def run_both() -> None:
            async with Deadline(1.0, clock=LoopClock()), asyncio.TaskGroup() as group:
                group.create_task(work())
                group.create_task(work())

        with pytest.raises(TimeoutError):
            await run_both()
        return cancelled, _cancellations()

    assert run_in_virtual_time(main()) == (2, 0)


def test_a_clock_that_fails_leaves_the_timers_of_other_blocks() -> None:
    """The error goes to the exception handler of the loop, as one of its own block."""
    name = ContextVar("name", default="the loop")

    class FailingClock(LoopClock):
        readings = 0

        def monotonic(self) -> float:
            self.readings += 1
            if self.readings == 3:  # of the timer, after those of the deadline and of the block
                raise LookupError("the clock fails")
            return super().monotonic()

    async def main() -> list[object]:
        async def work(clock: LoopClock, seconds: float) -> None:
            name.set(type(clock).__name__)
            async with Deadline(1.0, clock=clock):
                await asyncio.sleep(seconds)

        seen = list[object]()
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(
            lambda _, context: seen.extend((name.get(), type(context["exception"])))
        )
        works = work(LoopClock(), 60.0), work(FailingClock(), 2.0), work(LoopClock(), 60.0)
        results = await asyncio.gather(*works, return_exceptions=True)
        return [*seen, *map(type, results)]

    assert run_in_virtual_time(main()) == [
        *("FailingClock", LookupError),
        *(TimeoutError, type(None), TimeoutError),
    ]


def test_a_clock_is_read_in_the_context_of_its_block() -> None:
    """It may depend on a context variable."""
    base: ContextVar[float] = ContextVar("base")

    class ContextClock(LoopClock):
        def monotonic(self) -> float:
            return base.get() + super().monotonic()

    async def main() -> None:
        base.set(100.0)
        with pytest.raises(TimeoutError):
            async with Deadline(1.0, clock=ContextClock()):
                await asyncio.sleep(60.0)

    run_in_virtual_time(main())


def test_a_task_that_refuses_the_cancellation_is_not_cut() -> None:
    """A later cancellation by other code is not a timeout."""

    class Refusing(asyncio.Task[None]):
        def cancel(self, msg: object = None) -> bool:  # noqa: ARG002 - that of a task
            return False

    async def main() -> bool:
        deadline = Deadline(1.0, clock=LoopClock())

        async def work() -> None:
            async with deadline:
                await asyncio.sleep(60.0)

        task = Refusing(work())
        await asyncio.sleep(2.0)
        asyncio.Task.cancel(task)
        await asyncio.wait([task])
        return task.cancelled() and not deadline.cut

    assert run_in_virtual_time(main())


def test_a_block_that_is_overdue_at_its_first_wait_is_cut_there() -> None:
    """However short that wait is."""

    async def main() -> list[str]:
        reached = list[str]()

        async def work() -> None:
            async with Deadline(1.0, clock=LoopClock()):
                _running_loop().jump(5.0)
                await asyncio.sleep(0)
                reached.append("its second wait")
                await asyncio.sleep(0)

        with pytest.raises(TimeoutError):
            await work()
        return reached

    assert run_in_virtual_time(main(), _CountingLoop) == []


async def _numbers(deadline: Deadline) -> AsyncGenerator[int, None]:
    async with deadline:
        for number in range(3):
            yield number


def test_a_generator_that_is_not_exhausted_leaves_no_limit() -> None:
    """Its block ends in a task and a context of its own."""

    async def main() -> None:
        clock = LoopClock()
        async with Deadline(3.0, clock=clock):
            async for _ in _numbers(Deadline(1.0, clock=clock)):
                break
            await asyncio.sleep(2.0)
            assert time_left() == pytest.approx(1.0)
            async with Deadline(0.5, clock=clock):
                assert time_left() == pytest.approx(0.5)
        assert time_left() == math.inf
        await asyncio.sleep(5.0)

    run_in_virtual_time(main())


def test_a_generator_may_end_its_block_after_the_block_around_it() -> None:
    """Each has its own time."""

    async def main() -> list[float]:
        clock, left = LoopClock(), list[float]()
        outer = Deadline(3.0, clock=clock)
        async with outer:
            numbers = _numbers(Deadline(9.0, clock=clock))
            await anext(numbers)
            left.append(time_left())
        left.append(time_left())
        await asyncio.sleep(5.0)
        await numbers.aclose()
        left.append(time_left())
        return left

    assert run_in_virtual_time(main()) == [pytest.approx(3.0), pytest.approx(9.0), math.inf]


def test_a_generator_may_be_closed_in_a_context_without_its_block() -> None:
    """Each of its steps ran in another task."""

    async def main() -> tuple[bool, int]:
        deadline = Deadline(1.0, clock=LoopClock())
        numbers = _numbers(deadline)

        async def step() -> int:
            return await anext(numbers)

        for number in range(2):
            assert await asyncio.create_task(step()) == number
        await numbers.aclose()
        await asyncio.sleep(5.0)
        with pytest.raises(RuntimeError, match="where it was entered"):
            await deadline.__aexit__(None, None, None)
        return deadline.cut, _cancellations()

    assert run_in_virtual_time(main()) == (False, 0)


def test_overlapping_blocks_of_generators_do_not_accumulate() -> None:
    """A task may open the next generator before it closes the last."""

    async def main() -> int:
        numbers = _numbers(Deadline(9.0, clock=LoopClock()))
        await anext(numbers)
        for seconds in [*[9.0] * 50, 60.0]:
            last, numbers = numbers, _numbers(Deadline(seconds, clock=LoopClock()))
            await anext(numbers)
            await last.aclose()
        await asyncio.sleep(20.0)  # the loop drops the timers
        gc.collect()
        alive = sum(type(each) is Deadline for each in gc.get_objects())
        await numbers.aclose()
        return alive

    before = sum(type(each) is Deadline for each in gc.get_objects())
    assert run_in_virtual_time(main()) - before <= 3


def test_a_task_that_a_block_leaves_behind_has_no_limit_any_more() -> None:
    """Its retries would otherwise never wait again."""

    async def main() -> list[float]:
        clock = LoopClock()

        async def work() -> list[float]:
            before = time_left()
            await asyncio.sleep(5.0)
            async with Deadline(7.0, clock=clock):
                return [before, time_left()]

        async with Deadline(3.0, clock=clock):
            task = asyncio.create_task(work())
            await asyncio.sleep(1.0)
        return await task

    assert run_in_virtual_time(main()) == [pytest.approx(3.0), pytest.approx(7.0)]


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
            try:
                with pytest.raises(RuntimeError, match="by an asyncio task"):
                    entering.send(None)
            finally:
                entered.set_result(None)

        entered = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_soon(enter)
        await entered

    run_in_virtual_time(main())


def test_a_loop_that_ended_within_a_block_does_not_keep_the_timers_of_the_next() -> None:
    """The first loop had no further turn in which to start its timers."""

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


def test_a_loop_that_has_run_in_another_thread_starts_its_timers_in_this_one() -> None:
    """The other thread has started the timer of the first block."""

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
        asyncio.run(asyncio.to_thread(loop.run_until_complete, asyncio.sleep(1.0)))
        with pytest.raises(TimeoutError):
            loop.run_until_complete(wait())
    finally:
        loop.close()


def _cancellations() -> int:
    task = asyncio.current_task()
    assert task is not None
    return task.cancelling()


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
