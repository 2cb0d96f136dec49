"""The rules of docs/resilience-rules.md for retries, with at least one test each."""

import asyncio
import contextlib
import functools
import inspect
import math
import random
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from tests.manual_clock import ManualClock
from tests.unit.resilience.scripted import BackendError, Gate, Scripted, SkippingClock, settle
from tests.virtual_time import LoopClock, run_in_virtual_time

from viralfx.resilience import retry_decision
from viralfx.resilience.breaker import CircuitBreaker, CircuitOpenError
from viralfx.resilience.deadline import Deadline
from viralfx.resilience.policy import Backoff, BackoffPolicy, Jitter, RetryBudget
from viralfx.resilience.retry import Retrier, retry
from viralfx.resilience.retry_decision import (
    AttemptFailed,
    BudgetExhausted,
    GaveUp,
    GiveUpReason,
    RetryEvent,
)


@pytest.fixture(autouse=True)
def _no_listener_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the listener of tracing that a test before may have left."""
    monkeypatch.setattr(retry_decision, "_global_listeners", ())


class PermanentError(Exception):
    """An error that is not retried."""


class BusyError(BackendError):
    """An error with a ``retry_after``."""

    def __init__(self, retry_after: object) -> None:
        super().__init__()
        self.retry_after = retry_after


class LostReplyError(BackendError):
    """An error after which the operation may have taken effect."""

    maybe_applied = True


@pytest.fixture
def clock() -> SkippingClock:
    """Return a clock that only waits move."""
    return SkippingClock()


def notes(error: BaseException) -> list[str]:
    """Return the notes of an error."""
    return getattr(error, "__notes__", [])


async def test_rule_01_a_cancellation_during_an_attempt_ends_it(clock: SkippingClock) -> None:
    """R1: one call, and the cancellation reaches the caller."""
    gate = Gate()
    task = asyncio.create_task(retry(clock=clock).execute(gate))
    await settle()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (len(gate.calls), clock.slept) == (1, [])


async def test_rule_01_a_cancellation_during_a_wait_ends_it() -> None:
    """R2: no further attempt is made."""
    clock, operation = ManualClock(), Scripted(BackendError())
    task = asyncio.create_task(retry(clock=clock).execute(operation))
    await settle()
    assert clock.sleeping == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (operation.calls, clock.sleeping) == (1, 0)


@pytest.mark.parametrize("raised", [asyncio.CancelledError, KeyboardInterrupt, SystemExit])
async def test_rule_01_only_exceptions_are_retried(
    clock: SkippingClock, raised: type[BaseException]
) -> None:
    """Other errors are raised, in every form of use."""
    retrier = retry(clock=clock)
    for attempt in (_decorated, _executed, _looped):
        operation = Scripted(raised())
        # Awaited in this task: a task re-raises KeyboardInterrupt into the loop.
        with pytest.raises(raised):
            await attempt(retrier, operation)
        assert operation.calls == 1
    sync = Scripted(raised())
    with pytest.raises(raised):
        retrier(sync.sync)()
    assert sync.calls == 1


async def _decorated(retrier: Retrier, operation: Scripted) -> object:
    @retrier
    async def call() -> object:
        return await operation()

    return await call()


async def _executed(retrier: Retrier, operation: Scripted) -> object:
    return await retrier.execute(operation)


def _plain() -> int:
    """Return one."""
    return 1


async def _looped(retrier: Retrier, operation: Scripted) -> object:
    async for attempt in retrier:
        with attempt:
            return await operation()
    raise AssertionError("a loop ends by returning or raising")


async def _plainly(retrier: Retrier, operation: Scripted) -> object:
    return retrier(operation.sync)()


@pytest.mark.parametrize("form", [_decorated, _executed, _looped])
async def test_rule_05_the_original_error_with_a_note(clock: SkippingClock, form: object) -> None:
    """R4: the last error itself, with the number of attempts and the time."""
    errors = [BackendError(str(number)) for number in range(3)]
    operation = Scripted(*errors)
    with pytest.raises(BackendError) as caught:
        await form(retry(attempts=3, base_delay=1.0, clock=clock), operation)  # type: ignore[operator]  # one of three
    assert caught.value is errors[2]
    assert notes(errors[2]) == ["gave up after 3 attempts, 3.0 s after the first failure"]
    assert notes(errors[0]) == notes(errors[1]) == []
    assert all(error.__context__ is None for error in errors)


@pytest.mark.parametrize("form", [_decorated, _executed, _looped])
async def test_rule_07_waits_are_made_on_the_given_clock(
    clock: SkippingClock, form: object
) -> None:
    """R5: the schedule of docs/operations.md: at once, after 1 s, after 2 s."""
    operation = Scripted(BackendError(), BackendError(), "done")
    result = await form(retry(attempts=3, base_delay=1.0, clock=clock), operation)  # type: ignore[operator]  # one of three
    assert result == "done"
    assert (operation.calls, clock.slept) == (3, [1.0, 2.0])


@pytest.mark.parametrize("form", [_decorated, _executed, _looped, _plainly])
async def test_rule_07_none_is_no_limit_of_attempts(form: Any) -> None:
    """The waits stay at the cap of the back-off."""
    clock, operation = SkippingClock(), Scripted(*[BackendError()] * 2000, "done")
    retrier = retry(attempts=None, base_delay=1.0, clock=clock)
    if form is _plainly:  # on an event loop a plain function does not wait
        retrier = retry(attempts=None, base_delay=0.0, clock=clock)
    assert await form(retrier, operation) == "done"
    assert operation.calls == 2001
    waits = [1.0, 2.0, 4.0, 8.0, 16.0] + [30.0] * 1995
    assert form is _plainly or clock.slept == waits


async def test_rule_09_a_deadline_ends_attempts_without_limit() -> None:
    """No wait starts that would end after it."""
    clock, operation = SkippingClock(), Scripted(*[BackendError()] * 100)
    retrier = retry(attempts=None, base_delay=1.0, deadline=40.0, clock=clock)
    with pytest.raises(BackendError) as caught:
        await retrier.execute(operation)
    assert (operation.calls, clock.slept) == (6, [1.0, 2.0, 4.0, 8.0, 16.0])
    assert notes(caught.value)[0].endswith(": the next would start after the deadline")


async def test_rule_12_a_budget_ends_attempts_without_limit() -> None:
    """Each retry is charged."""
    clock, operation = SkippingClock(), Scripted(*[BackendError()] * 100)
    budget = RetryBudget(ratio=0.0, per_second=0.5, window=10.0)
    retrier = retry(attempts=None, base_delay=0.0, budget=budget, clock=clock)
    with pytest.raises(BackendError) as caught:
        await retrier.execute(operation)
    assert operation.calls == 6
    assert notes(caught.value)[0].endswith(": the retry budget is spent")


async def test_rule_07_the_note_measures_attempts_after_the_first_failure(
    clock: SkippingClock,
) -> None:
    """The time is that of waits and further attempts."""

    async def slow() -> None:
        await clock.advance(5.0)
        raise BackendError

    with pytest.raises(BackendError) as caught:
        await retry(attempts=2, base_delay=1.0, clock=clock).execute(slow)
    assert notes(caught.value) == ["gave up after 2 attempts, 6.0 s after the first failure"]


class CountingClock(SkippingClock):
    """A clock that counts its readings."""

    reads = 0

    def monotonic(self) -> float:
        """Read the time."""
        self.reads += 1
        return super().monotonic()


@pytest.mark.parametrize("form", [_decorated, _executed, _looped, _plainly])
async def test_a_success_reads_the_clock_only_for_a_budget_or_a_listener(form: Any) -> None:
    """Otherwise the start time of a call is not needed."""
    clock = CountingClock()
    await form(retry(clock=clock), Scripted("done"))
    assert clock.reads == 0

    await form(retry(budget=RetryBudget(), clock=clock), Scripted("done"))
    assert clock.reads == 1

    await form(retry(listeners=(lambda _: None,), clock=clock), Scripted("done"))
    assert clock.reads == 2

    subscribed = retry(clock=clock)
    subscribed.subscribe(lambda _: None)
    await form(subscribed, Scripted("done"))
    assert clock.reads == 3


@pytest.mark.parametrize("form", [_decorated, _executed, _looped])
async def test_elapsed_runs_from_the_start_of_the_call(form: Any) -> None:
    """It includes the first attempt, unlike the note."""
    clock, events = SkippingClock(), list[RetryEvent]()

    class Slow(Scripted):
        async def __call__(self) -> object:
            await clock.advance(5.0)
            return await super().__call__()

    retrier = retry(attempts=2, base_delay=1.0, listeners=(events.append,), clock=clock)
    with pytest.raises(BackendError):
        await form(retrier, Slow(BackendError()))
    assert [event.elapsed for event in events if isinstance(event, GaveUp)] == [11.0]


async def test_elapsed_of_a_call_older_than_its_listener_runs_from_the_first_failure() -> None:
    """The start of such a call was not measured."""
    clock, events = SkippingClock(), list[RetryEvent]()
    retrier = retry(attempts=2, base_delay=1.0, clock=clock)

    async def slow() -> None:
        await clock.advance(5.0)
        retrier.subscribe(events.append)
        raise BackendError

    with pytest.raises(BackendError):
        await retrier.execute(slow)
    assert {event.elapsed for event in events if isinstance(event, GaveUp)} == {6.0}


async def test_rule_05_an_error_not_worth_a_retry_has_no_note(clock: SkippingClock) -> None:
    """It was tried once, as without retries."""
    error = PermanentError()
    with pytest.raises(PermanentError):
        await retry(retry_on=BackendError, clock=clock).execute(Scripted(error))
    assert notes(error) == []


async def test_rule_05_an_error_raised_again_and_again_keeps_one_note(
    clock: SkippingClock,
) -> None:
    """Nested retries do not accumulate notes; other notes stay."""
    error = BackendError()
    error.add_note("from elsewhere")
    for _ in range(3):
        with pytest.raises(BackendError):
            await retry(attempts=2, clock=clock).execute(Scripted(error))
    assert notes(error) == [
        "from elsewhere",
        "gave up after 2 attempts, 1.0 s after the first failure",
    ]


async def test_rule_08_twenty_concurrent_calls_get_three_attempts_each() -> None:
    """R3: calls of a decorated function share no state."""
    clock, calls = ManualClock(), [0] * 20

    @retry(attempts=3, base_delay=1.0, clock=clock)
    async def call(number: int) -> None:
        calls[number] += 1
        raise BackendError(number)

    tasks = [asyncio.create_task(call(number)) for number in range(20)]
    for _ in range(3):
        await clock.advance(3.0)
    assert calls == [3] * 20
    assert all(isinstance(task.exception(), BackendError) for task in tasks)


async def test_rule_08_twenty_loops_over_one_retrier_get_three_attempts_each() -> None:
    """R3b: each loop has its own attempts."""
    clock, calls = ManualClock(), [0] * 20
    shared = retry(attempts=3, base_delay=1.0, clock=clock)

    async def loop(number: int) -> None:
        async for attempt in shared:
            with attempt:
                calls[number] += 1
                raise BackendError(number)

    tasks = [asyncio.create_task(loop(number)) for number in range(20)]
    for _ in range(3):
        await clock.advance(3.0)
    assert calls == [3] * 20
    assert all(isinstance(task.exception(), BackendError) for task in tasks)


def test_rule_09_the_deadline_cuts_a_hanging_attempt() -> None:
    """R6: a deadline of 50 ms ends an attempt of 500 ms after 50 ms."""

    async def main() -> float:
        clock = LoopClock()
        started = clock.monotonic()
        retrier = retry(attempts=3, deadline=0.05, clock=clock)
        with pytest.raises(TimeoutError, match=r"the deadline of 0\.05 s has passed"):
            await retrier.execute(functools.partial(asyncio.sleep, 0.5))
        return clock.monotonic() - started

    assert run_in_virtual_time(main()) == pytest.approx(0.05)


def test_rule_09_the_deadline_cuts_a_decorated_function_in_a_later_attempt() -> None:
    """The deadline covers all attempts and waits together."""

    async def main() -> None:
        clock, calls = LoopClock(), 0

        @retry(attempts=3, base_delay=1.0, deadline=2.0, clock=clock)
        async def call() -> None:
            nonlocal calls
            calls += 1
            if calls == 1:
                raise BackendError
            await asyncio.sleep(60.0)

        started = clock.monotonic()
        with pytest.raises(TimeoutError):
            await call()
        assert clock.monotonic() - started == pytest.approx(2.0)
        assert calls == 2

    run_in_virtual_time(main())


def test_rule_09_no_wait_is_started_that_ends_after_the_deadline() -> None:
    """The error is raised at once, with the reason."""

    async def main() -> float:
        clock, error = LoopClock(), BackendError()
        started = clock.monotonic()
        with pytest.raises(BackendError):
            await retry(base_delay=5.0, deadline=2.0, clock=clock).execute(Scripted(error))
        assert notes(error) == ["gave up after 1 attempt: the next would start after the deadline"]
        return clock.monotonic() - started

    assert run_in_virtual_time(main()) == 0.0


def test_rule_09_a_wait_that_ends_at_the_deadline_is_not_started_either() -> None:
    """No time would be left for the attempt."""

    async def main() -> int:
        clock, operation = LoopClock(), Scripted(BackendError())
        async with Deadline(1.0, clock=clock):
            with pytest.raises(BackendError):
                await retry(base_delay=1.0, clock=clock).execute(operation)
        return operation.calls

    assert run_in_virtual_time(main()) == 1


def test_rule_09_the_earliest_enclosing_deadline_counts() -> None:
    """For any nesting."""

    async def main() -> int:
        clock, operation = LoopClock(), Scripted(BackendError())
        async with Deadline(1.5, clock=clock), Deadline(100.0, clock=clock):
            with pytest.raises(BackendError):
                await retry(attempts=9, base_delay=1.0, clock=clock).execute(operation)
        return operation.calls

    assert run_in_virtual_time(main()) == 2


async def test_rule_10_a_longer_retry_after_is_the_delay(
    clock: SkippingClock,
) -> None:
    """A shorter one does not shorten the delay."""
    operation = Scripted(BusyError(7.0), BusyError(0.5), "done")
    await retry(clock=clock).execute(operation)
    assert clock.slept == [7.0, 2.0]


async def test_rule_10_a_retry_after_beyond_the_cap_gives_up(clock: SkippingClock) -> None:
    """A server cannot block the caller for an hour."""
    operation = Scripted(BusyError(30.0), BusyError(30.1))
    with pytest.raises(BusyError):
        await retry(backoff=Backoff(cap=30.0), clock=clock).execute(operation)
    assert (operation.calls, clock.slept) == (2, [30.0])


def test_rule_10_a_retry_after_beyond_the_deadline_gives_up() -> None:
    """Waiting would be useless."""

    async def main() -> int:
        clock, operation = LoopClock(), Scripted(BusyError(7))
        with pytest.raises(BusyError):
            await retry(deadline=5.0, clock=clock).execute(operation)
        return operation.calls

    assert run_in_virtual_time(main()) == 1


@pytest.mark.parametrize("hint", ["7", None, True, -1.0, float("nan"), float("inf")])
async def test_rule_10_an_invalid_retry_after_is_ignored(
    clock: SkippingClock, hint: object
) -> None:
    """Other libraries use the name with another meaning."""
    await retry(clock=clock).execute(Scripted(BusyError(hint), "done"))
    assert clock.slept == [1.0]


@pytest.mark.parametrize("jitter", [Jitter.FULL, Jitter.EQUAL, Jitter.DECORRELATED])
def test_rule_11_jitter_survives_at_the_cap_and_never_exceeds_it(jitter: Jitter) -> None:
    """Delays at the cap are spread over the range of the jitter."""
    backoff, rng = Backoff(base=1.0, cap=8.0, jitter=jitter), random.Random(7)  # noqa: S311 - a test
    drawn = [backoff.delay(20, rng) for _ in range(1000)]
    lower = {Jitter.FULL: 0.0, Jitter.EQUAL: 4.0, Jitter.DECORRELATED: 1.0}[jitter]
    assert min(drawn) >= lower
    assert max(drawn) <= 8.0
    assert len(set(drawn)) == 1000
    assert min(drawn) < lower + 0.5
    assert max(drawn) > 7.5


async def test_rule_12_the_budget_limits_the_retries_of_all_callers(
    clock: SkippingClock,
) -> None:
    """20 % of the calls plus the reserve; then the error is raised with the reason."""
    budget = RetryBudget(ratio=0.2, per_second=0.1, window=10.0)
    events: list[RetryEvent] = []
    retrier = retry(attempts=2, base_delay=0.0, name="op", budget=budget, clock=clock)
    retrier.subscribe(events.append)
    operation = Scripted(BackendError())
    for _ in range(100):
        with pytest.raises(BackendError):
            await retrier.execute(operation)
    assert operation.calls == 100 + 20 + 1
    assert events.count(BudgetExhausted(name="op")) == 79
    with pytest.raises(BackendError) as caught:
        await retrier.execute(Scripted(BackendError()))
    assert notes(caught.value) == ["gave up after 1 attempt: the retry budget is spent"]


async def test_rule_12_the_budget_is_charged_before_the_wait() -> None:
    """Of two calls that fail together, one uses the last retry."""
    clock, budget = ManualClock(), RetryBudget(ratio=0.0, per_second=0.1, window=10.0)
    retrier = retry(attempts=2, base_delay=1.0, budget=budget, clock=clock)
    tasks = [asyncio.create_task(retrier.execute(Scripted(BackendError()))) for _ in range(2)]
    await settle()
    assert clock.sleeping == 1
    assert [task.done() for task in tasks] == [False, True]
    await clock.advance(1.0)
    assert all(isinstance(task.exception(), BackendError) for task in tasks)


async def test_rule_12_only_a_retry_is_charged(clock: SkippingClock) -> None:
    """A permanent error, an exhausted policy and an open circuit are not."""
    budget = RetryBudget(ratio=0.0, per_second=1.0, window=10.0)
    retrier = retry(attempts=1, budget=budget, clock=clock)
    with pytest.raises(BackendError):
        await retrier.execute(Scripted(BackendError()))
    assert budget.available(clock.monotonic()) == 10.0


@pytest.mark.parametrize(("idempotent", "calls"), [(False, 1), (True, 3)])
async def test_rule_13_an_ambiguous_write_is_retried_only_if_idempotent(
    clock: SkippingClock, *, idempotent: bool, calls: int
) -> None:
    """The error has ``maybe_applied``; the retrier is declared ``idempotent``."""
    error, operation = LostReplyError(), Scripted(LostReplyError())
    operation.outcomes = [error]
    with pytest.raises(LostReplyError):
        await retry(idempotent=idempotent, clock=clock).execute(operation)
    assert operation.calls == calls
    if not idempotent:
        assert notes(error) == [
            ("gave up after 1 attempt: it may have been applied and is not declared idempotent")
        ]


async def test_rule_14_execute_rejects_a_coroutine_object() -> None:
    """It cannot run twice; it is closed, so there is no 'never awaited' warning."""
    with pytest.raises(TypeError, match="pass the function that makes it"):
        await retry().execute(Scripted(None)())  # type: ignore[call-overload]  # the point


async def test_rule_14_execute_accepts_plain_functions(clock: SkippingClock) -> None:
    """A result that is not awaitable is returned, also by later attempts."""
    assert await retry(clock=clock).execute(lambda: 42) == 42
    operation = Scripted(BackendError(), 42)
    assert await retry(clock=clock).execute(operation.sync) == 42


def generator() -> Iterator[int]:
    """Yield."""
    yield 1


async def async_generator() -> AsyncIterator[int]:
    """Yield."""
    yield 1


@contextlib.contextmanager
def block() -> Iterator[None]:
    """Do nothing around a block."""
    yield


@contextlib.asynccontextmanager
async def async_block() -> AsyncIterator[None]:
    """Do nothing around a block."""
    yield


@functools.wraps(generator)
def consuming() -> list[int]:
    """Consume a generator, so that it fails inside the guard."""
    return list(generator())


class CallableObject:
    """An object with an async call."""

    def __init__(self) -> None:
        self.calls = 0

    async def __call__(self) -> int:
        """Fail once."""
        self.calls += 1
        if self.calls == 1:
            raise BackendError
        return self.calls


@pytest.mark.parametrize("guard", [retry(), CircuitBreaker()])
@pytest.mark.parametrize(
    ("target", "message"),
    [
        (generator, "generator generator cannot be guarded"),
        (functools.partial(generator), "cannot be guarded"),
        (async_generator, "generator async_generator cannot be guarded"),
        (block, "context manager block cannot be guarded: its body runs after"),
        (async_block, "context manager async_block cannot be guarded"),
        (functools.partial(block), "cannot be guarded"),
        (CallableObject, "class CallableObject cannot be guarded: decorate its methods"),
        (staticmethod(generator), "put @staticmethod above"),
        (classmethod(lambda _: None), "put @classmethod above"),
        (42, "expected a function or coroutine function, got 42"),
    ],
)
def test_rule_14_invalid_callables_are_rejected_at_definition(
    guard: object, target: object, message: str
) -> None:
    """The TypeError gives the reason and a remedy."""
    with pytest.raises(TypeError, match=message):
        guard(target)  # type: ignore[operator]  # the point


def test_rule_14_a_function_that_consumes_a_generator_is_guarded() -> None:
    """Even if it looks like the generator, as a decorator's wrapper does."""
    assert retry()(consuming)() == [1]


def test_rule_14_a_coroutine_object_is_rejected_at_definition() -> None:
    """It is closed, so there is no warning."""
    with pytest.raises(TypeError, match="pass the function that makes it"):
        retry()(Scripted(None)())  # type: ignore[type-var,unused-coroutine]  # the point


def test_rule_14_a_plain_function_with_an_awaitable_result_is_rejected() -> None:
    """Its error would be raised outside the guard."""

    def forgetful() -> object:
        return Scripted(None)()

    for guarded in (retry()(forgetful), CircuitBreaker()(forgetful)):
        with pytest.raises(TypeError, match="returned an awaitable"):
            guarded()


async def test_rule_14_objects_and_partials_are_resolved(
    clock: SkippingClock,
) -> None:
    """An async call behind either is retried as async."""
    retrier = retry(clock=clock)
    assert await retrier(CallableObject())() == 2
    assert await retrier(functools.partial(CallableObject().__call__))() == 2


def test_rule_14_a_decorated_plain_function_blocks_its_own_thread_only(
    clock: SkippingClock,
) -> None:
    """It has the same schedule and waits with the injected ``block``."""
    operation = Scripted(BackendError(), BackendError(), "done")
    policy = retry(attempts=3)
    guarded = Retrier(policy, clock=clock, block=clock.block)(operation.sync)
    assert guarded() == "done"
    assert clock.slept == [1.0, 2.0]


async def test_rule_14_a_plain_function_never_blocks_the_loop(clock: SkippingClock) -> None:
    """On an event loop, only retries without a wait are made."""
    operation = Scripted(BackendError(), "done")
    guarded = Retrier(retry(), clock=clock, block=clock.block)(operation.sync)
    with pytest.raises(BackendError) as caught:
        guarded()
    assert (operation.calls, clock.slept) == (1, [])
    assert "would block the event loop" in notes(caught.value)[0]
    immediate = Scripted(BackendError(), BackendError(), "done")
    assert retry(base_delay=0.0)(immediate.sync)() == "done"


async def test_rule_15_listeners_get_every_failed_attempt_and_the_end(
    clock: SkippingClock,
) -> None:
    """Frozen events, in order; none for successful calls."""
    events: list[RetryEvent] = []
    retrier = retry(attempts=2, name="op", listeners=(events.append,), clock=clock)
    await retrier.execute(Scripted("fine"))
    assert events == []
    first, second = BackendError(), BackendError()
    with pytest.raises(BackendError):
        await retrier.execute(Scripted(first, second))
    assert events == [
        AttemptFailed(name="op", attempt=1, delay=1.0, error=first),
        AttemptFailed(name="op", attempt=2, delay=None, error=second),
        GaveUp(name="op", attempts=2, elapsed=1.0, reason=GiveUpReason.ATTEMPTS, error=second),
    ]


async def test_rule_15_a_listener_error_does_not_affect_the_retry(
    clock: SkippingClock, caplog: pytest.LogCaptureFixture
) -> None:
    """The error is logged."""

    def broken(_: RetryEvent) -> None:
        raise ValueError("broken listener")

    retrier = retry(listeners=(broken,), clock=clock)
    assert await retrier.execute(Scripted(BackendError(), "done")) == "done"
    assert "Event listener failed" in caplog.text


@pytest.mark.parametrize(
    ("retrier", "outcome", "reason"),
    [
        (retry(retry_on=BackendError), PermanentError(), "permanent"),
        (retry(attempts=1), BackendError(), "permanent"),
        (retry(attempts=2, base_delay=0.0), BackendError(), "attempts"),
        (retry(), CircuitOpenError("c", "op", 1.0), "circuit_open"),
        (retry(), LostReplyError(), "maybe_applied"),
        (retry(budget=RetryBudget(ratio=0.0, per_second=0.0)), BackendError(), "budget"),
    ],
)
async def test_giving_up_has_a_reason(retrier: Retrier, outcome: Exception, reason: str) -> None:
    """Each reason is a label of a metric."""
    events: list[RetryEvent] = []
    retrier.subscribe(events.append)
    with pytest.raises(type(outcome)):
        await retrier.execute(Scripted(outcome))
    assert [event.reason for event in events if isinstance(event, GaveUp)] == [reason]


async def test_an_open_circuit_is_retried_only_on_request() -> None:
    """With ``retry_open_circuit`` the delay is that of the rejection."""
    clock = SkippingClock()
    breaker = CircuitBreaker(1, 20.0, clock=clock)
    operation = Scripted(BackendError(), "done")
    with pytest.raises(CircuitOpenError):
        await retry(clock=clock).execute(lambda: breaker.execute(operation))
    assert clock.slept == [1.0]
    patient = retry(retry_open_circuit=True, clock=clock)
    assert await patient.execute(lambda: breaker.execute(operation)) == "done"
    assert clock.slept == [1.0, pytest.approx(19.0)]


async def test_retries_without_a_wait_yield_from_the_second_on(clock: SkippingClock) -> None:
    """A policy without delays does not starve other tasks."""
    for form in (_decorated, _executed, _looped):
        clock.slept.clear()
        operation = Scripted(BackendError(), BackendError(), BackendError(), "done")
        assert await form(retry(attempts=4, base_delay=0.0, clock=clock), operation) == "done"
        assert clock.slept == [0.0, 0.0]


def test_a_plain_function_does_not_block_for_zero_seconds(clock: SkippingClock) -> None:
    """A delay of zero needs no wait."""
    operation = Scripted(BackendError(), "done")
    policy = retry(base_delay=0.0)
    assert Retrier(policy, clock=clock, block=clock.block)(operation.sync)() == "done"
    assert clock.slept == []


@pytest.mark.parametrize("error", [LostReplyError(), CircuitOpenError("c", "op", 1.0)])
async def test_ambiguous_and_rejected_calls_are_not_retried_by_default(
    clock: SkippingClock, error: Exception
) -> None:
    """An ambiguous write and an open circuit are final."""
    operation = Scripted(error)
    with pytest.raises(type(error)):
        await Retrier(retry(), clock=clock).execute(operation)
    assert operation.calls == 1


async def test_events_name_the_operation_unless_the_retrier_has_a_name(
    clock: SkippingClock,
) -> None:
    """In each form of use; a loop has no operation."""
    events: list[RetryEvent] = []
    unnamed = retry(attempts=1, listeners=(events.append,), clock=clock)
    named = retry(attempts=1, name="users", listeners=(events.append,), clock=clock)
    for retrier in (unnamed, named):
        for form in (_decorated, _executed, _looped):
            with pytest.raises(BackendError):
                await form(retrier, Scripted(BackendError()))
        with pytest.raises(BackendError):
            retrier(Scripted(BackendError()).sync)()
    names = [event.name for event in events if isinstance(event, GaveUp)]
    assert names == [
        "_decorated.<locals>.call",
        "Scripted",
        "loop",
        "Scripted.sync",
        *["users"] * 4,
    ]


@pytest.mark.parametrize("guard", [retry(), retry(deadline=1.0), CircuitBreaker()], ids=range(3))
def test_a_guarded_function_keeps_its_name_and_documentation(guard: Any) -> None:
    """Tracebacks and API documentation show them."""
    targets = [_looped] if guard.__dict__.get("_deadline") else [_looped, _plain]
    for function in targets:
        guarded = guard(function)
        assert guarded.__name__ == function.__name__
        assert guarded.__wrapped__ is function
        assert inspect.iscoroutinefunction(guarded) == inspect.iscoroutinefunction(function)


def test_the_defaults_are_the_documented_ones() -> None:
    """Three attempts from one second on; the cap is 30 s, or the base delay if that is longer."""
    assert [retry().next_delay(n, OSError()) for n in (1, 2, 3)] == [1.0, 2.0, None]
    assert [retry(9).next_delay(n, OSError()) for n in (5, 6, 7)] == [16.0, 30.0, 30.0]
    assert [retry(base_delay=45.0).next_delay(n, OSError()) for n in (1, 2)] == [45.0, 45.0]


def test_a_policy_and_a_random_source_can_be_given() -> None:
    """Each replaces the default."""
    policy = retry(policy=BackoffPolicy(attempts=1))
    assert policy.next_delay(1, OSError()) is None
    jittered = Backoff(base=1.0, jitter=Jitter.FULL)
    first = retry(backoff=jittered, rng=random.Random(5)).next_delay(1, OSError())  # noqa: S311 - a test
    assert first == random.Random(5).uniform(0.0, 1.0)  # noqa: S311 - a test


async def test_a_loop_must_put_its_body_inside_the_attempt(clock: SkippingClock) -> None:
    """Otherwise the outcome of the attempt is unknown."""
    attempts = aiter(retry(clock=clock))
    assert (await anext(attempts)).number == 1
    with pytest.raises(RuntimeError, match="inside `with attempt:`"):
        await anext(attempts)


async def test_a_loop_numbers_its_attempts_and_ends_after_a_success(clock: SkippingClock) -> None:
    """Numbers start at one; the code after the loop runs."""
    numbers = []
    async for attempt in retry(clock=clock):
        with attempt:
            numbers.append(attempt.number)
            if attempt.number < 3:
                raise BackendError
    assert (numbers, clock.slept) == ([1, 2, 3], [1.0, 2.0])


async def test_a_broken_policy_hides_no_error(
    clock: SkippingClock, caplog: pytest.LogCaptureFixture
) -> None:
    """A policy that raises or returns an invalid delay is logged and gives up."""

    class Broken:
        def __init__(self, answer: float | None) -> None:
            self.answer = answer

        def next_delay(self, attempt: int, error: Exception) -> float | None:
            if self.answer is None:
                raise ValueError(attempt, error)
            return self.answer

    events: list[RetryEvent] = []
    for answer in (None, -1.0, math.nan, math.inf):
        operation = Scripted(BackendError())
        broken = Retrier(Broken(answer), listeners=(events.append,), clock=clock)
        with pytest.raises(BackendError):
            await broken.execute(operation)
        assert (operation.calls, clock.slept) == (1, [])
    assert [event.reason for event in events if isinstance(event, GaveUp)] == ["permanent"] * 4
    assert set(caplog.messages) == {"Retry policy failed", "Retry policy gave no delay"}
