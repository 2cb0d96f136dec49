"""Trying again: one runner that asks a retry policy and does the waiting."""

import asyncio
import functools
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from types import FunctionType
from typing import Any, ParamSpec, TypeVar, cast, overload

from viralfx.domain.clock import Clock, SystemClock
from viralfx.domain.events import Listener
from viralfx.domain.resilience.backoff import Backoff
from viralfx.domain.resilience.budget import RetryBudget
from viralfx.domain.resilience.deadline import Deadline
from viralfx.domain.resilience.failures import ErrorFilter
from viralfx.domain.resilience.guardable import (
    CallableT,
    is_async,
    operation_name,
    refuse_awaitable,
    refuse_uncallable,
    with_own_code,
)
from viralfx.domain.resilience.quantities import require_not_negative
from viralfx.domain.resilience.retry_decision import Decider, RetryEvent
from viralfx.domain.resilience.retry_loop import Attempt, Attempts
from viralfx.domain.resilience.retry_policy import BackoffPolicy, RetryPolicy
from viralfx.domain.resilience.stopwatch import reader_of

P = ParamSpec("P")
T = TypeVar("T")


class Retrier:
    """Runs operations until they succeed or the policy gives up.

    The first attempt starts at once; the caller gets its result, or the last error itself, with a
    note of how often it was tried. Only ``Exception`` is ever retried: a cancellation ends it, in
    an attempt as in a wait. It keeps nothing of a call, so one serves any number of callers.

    It is a decorator for ``async def`` and ``def``, runs a callable with :meth:`execute`, and is
    iterated by ``async for attempt in retrier: with attempt: ...``. It answers as a
    :class:`RetryPolicy` too, by its policy.
    """

    def __init__(
        self,
        policy: RetryPolicy,
        *,
        name: str | None = None,
        deadline: float | None = None,
        idempotent: bool = False,
        retry_open_circuit: bool = False,
        budget: RetryBudget | None = None,
        listeners: tuple[Listener[RetryEvent], ...] = (),
        clock: Clock | None = None,
        block: Callable[[float], None] = time.sleep,
    ) -> None:
        """``name`` stands in events and defaults to the operation's; ``block`` waits in ``def``."""
        self._clock = clock or SystemClock()
        self._now = reader_of(self._clock)
        self.name = name
        """What stands in events; None: the name of the operation."""
        if deadline is not None:
            require_not_negative("a deadline", deadline)
        self._deadline = deadline
        self.budget = budget
        """What is charged for each retry, if anything is."""
        self._block = block
        self._decider = Decider(
            policy=policy,
            clock=self._clock,
            budget=budget,
            idempotent=idempotent,
            retry_open_circuit=retry_open_circuit,
            listeners=listeners,
        )

    def subscribe(self, listener: Listener[RetryEvent]) -> None:
        """Call ``listener`` with every :class:`RetryEvent`."""
        self._decider.listeners = (*self._decider.listeners, listener)

    def next_delay(self, attempt: int, error: Exception) -> float | None:
        """See :meth:`RetryPolicy.next_delay`."""
        return self._decider.policy.next_delay(attempt, error)

    def __call__(self, function: CallableT) -> CallableT:
        """Decorate a function or coroutine function.

        Raises ``TypeError`` for anything else, and for a plain function under a deadline.
        """
        if is_async(function):
            coroutine_function = cast("Callable[..., Awaitable[object]]", function)
            return cast("CallableT", self._guard_async(coroutine_function))
        if self._deadline is not None:
            raise TypeError(
                "a deadline cannot cut a plain function: make it `async def` or leave it out"
            )
        return cast("CallableT", self._guard_sync(function))

    @overload
    def execute(self, operation: Callable[[], Awaitable[T]]) -> Coroutine[Any, Any, T]: ...
    @overload
    def execute(self, operation: Callable[[], T]) -> Coroutine[Any, Any, T]: ...

    def execute(self, operation: Callable[[], Any]) -> Coroutine[Any, Any, Any]:
        """Call ``operation`` until it succeeds, and await what it returns if that can be awaited.

        Raises ``TypeError`` for a coroutine object, which could run no second time, and
        ``TimeoutError`` when the deadline cuts an attempt.
        """
        refuse_uncallable(operation)
        if self._deadline is None:
            return self._execute(operation)
        return self._execute_within(self._deadline, operation)

    def __aiter__(self) -> AsyncIterator[Attempt]:
        """Start a loop of its own; it ends after an attempt that succeeded.

        Raises ``TypeError`` under a deadline, which could not cut the body of the loop.
        """
        if self._deadline is not None:
            raise TypeError("put the loop inside `async with Deadline(...)` instead")
        return Attempts(self._decider, self.name or "loop", self._begin())

    # -- running -----------------------------------------------------------------------------

    def _begin(self) -> float:
        started = self._now()
        if self.budget is not None:
            self.budget.deposit(started)
        return started

    def _guard_async(self, function: Callable[P, Awaitable[T]]) -> Callable[P, Awaitable[T]]:
        now, budget, name = self._now, self.budget, self.name or operation_name(function)

        @functools.wraps(function)
        async def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
            started = now()
            if budget is not None:
                budget.deposit(started)
            try:
                return await function(*args, **kwargs)
            except Exception as error:  # noqa: BLE001 - a boundary: what fails may be tried again
                failure = error
            # Outside the handler, so that no attempt's error becomes the context of the next.
            try:
                again = functools.partial(function, *args, **kwargs)
                return cast("T", await self._again(again, name, failure, started))
            finally:
                del failure

        with_own_code(cast("FunctionType", guarded))
        if self._deadline is None:
            return guarded
        seconds, clock = self._deadline, self._clock

        @functools.wraps(function)
        async def limited(*args: P.args, **kwargs: P.kwargs) -> T:
            async with Deadline(seconds, clock=clock):
                return await guarded(*args, **kwargs)

        return limited

    def _guard_sync(self, function: Callable[P, T]) -> Callable[P, T]:
        name = self.name or operation_name(function)

        @functools.wraps(function)
        def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
            started = self._begin()
            attempt = 1
            while True:
                try:
                    result = function(*args, **kwargs)
                except Exception as error:
                    # A boundary: what fails may be tried again.
                    delay = self._decider.next_delay(
                        name, attempt, error, started=started, may_wait=not _on_event_loop()
                    )
                    if delay is None:
                        raise
                else:
                    refuse_awaitable(result, name)
                    return result
                if delay > 0:
                    self._block(delay)
                attempt += 1

        return guarded

    async def _execute_within(self, seconds: float, operation: Callable[[], Any]) -> Any:
        async with Deadline(seconds, clock=self._clock):
            return await self._execute(operation)

    async def _execute(self, operation: Callable[[], Any]) -> Any:
        started = self._begin()
        try:
            result = operation()
            return await result if hasattr(result, "__await__") else result
        except Exception as error:  # noqa: BLE001 - a boundary: what fails may be tried again
            failure = error
        try:
            name = self.name or operation_name(operation)
            return await self._again(operation, name, failure, started)
        finally:
            del failure

    async def _again(
        self, operation: Callable[[], Any], name: str, failure: Exception, started: float
    ) -> Any:
        """Go on after the first attempt: out of line, so that success does not pay for it."""
        attempt = 1
        try:
            while True:
                delay = self._decider.next_delay(name, attempt, failure, started=started)
                if delay is None:
                    raise failure
                # One retry without a wait costs no turn of the loop; more of them do, lest a
                # policy that never waits starve everybody else.
                if delay > 0 or attempt > 1:
                    await self._clock.sleep(delay)
                attempt += 1
                try:
                    result = operation()
                    return await result if hasattr(result, "__await__") else result
                except Exception as error:  # noqa: BLE001 - a boundary, as for the first attempt
                    failure = error
        finally:
            # The error refers to this frame; a reference back would keep both for the collector.
            del failure


def retry(
    attempts: int | None = None,
    base_delay: float | None = None,
    *,
    backoff: Backoff | None = None,
    retry_on: ErrorFilter | None = None,
    policy: RetryPolicy | None = None,
    name: str | None = None,
    deadline: float | None = None,
    idempotent: bool = False,
    retry_open_circuit: bool = False,
    budget: RetryBudget | None = None,
    listeners: tuple[Listener[RetryEvent], ...] = (),
    clock: Clock | None = None,
    rng: random.Random | None = None,
) -> Retrier:
    """Retry up to ``attempts`` times in all (3), after ``base_delay`` (1 s), then twice that, ...

    Use it as ``@retry(attempts=3, base_delay=1.0)`` on ``async def`` or ``def``, or keep what it
    returns: see :class:`Retrier`. Durations are seconds.

    - ``backoff`` replaces ``base_delay`` by a whole schedule, ``policy`` both and ``attempts``.
    - ``retry_on`` narrows what is retried: types or a predicate; the default is every
      ``Exception`` except the rejection of an open breaker, which ``retry_open_circuit`` waits for.
    - ``deadline`` limits everything together: an attempt is cut with ``TimeoutError``, and no wait
      is started that would end later.
    - An error with a true ``maybe_applied`` is retried only if declared ``idempotent``.
    - ``budget`` is charged for each retry; share one between the callers of a dependency.

    Raises ``ValueError`` or ``TypeError`` for what cannot be meant.
    """
    if not (attempts is None or isinstance(attempts, int)):
        raise TypeError(f"use @retry() with parentheses; attempts cannot be {attempts!r}")
    if backoff is not None and base_delay is not None:
        raise ValueError("give either base_delay or backoff")
    if policy is None:
        first = 1.0 if base_delay is None else base_delay
        policy = BackoffPolicy(
            attempts=3 if attempts is None else attempts,
            backoff=backoff or Backoff(base=first, cap=max(30.0, first)),
            retry_on=Exception if retry_on is None else retry_on,
            # Spreads load only; nothing depends on it being unpredictable.
            rng=rng or random.Random(),  # noqa: S311
        )
    elif any(given is not None for given in (attempts, base_delay, backoff, retry_on, rng)):
        raise ValueError("a policy replaces attempts, base_delay, backoff, retry_on and rng")
    return Retrier(
        policy,
        name=name,
        deadline=deadline,
        idempotent=idempotent,
        retry_open_circuit=retry_open_circuit,
        budget=budget,
        listeners=listeners,
        clock=clock,
    )


def _on_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
