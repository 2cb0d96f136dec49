"""Retry: runs an operation again as its retry policy decides; as a call, decorator or loop."""

import asyncio
import functools
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from types import FunctionType, TracebackType
from typing import Any, ParamSpec, Self, TypeVar, cast, overload

from viralfx.core.clock import Clock, SystemClock, default_rng
from viralfx.core.errors import require_not_negative
from viralfx.core.events import Listener
from viralfx.resilience._callables import (
    CallableT,
    ErrorFilter,
    is_async,
    operation_name,
    reader_of,
    reject_awaitable,
    require_callable,
    with_own_code,
)
from viralfx.resilience.breaker import BreakerWrapper
from viralfx.resilience.deadline import Deadline
from viralfx.resilience.policy import Backoff, BackoffPolicy, RetryBudget, RetryPolicy
from viralfx.resilience.retry_decision import Decider, RetryEvent


class Attempt:
    """One iteration of ``async for attempt in retrier``; put the work inside ``with attempt:``."""

    __slots__ = ("_loop", "delay", "number", "succeeded")

    def __init__(self, loop: "Attempts", number: int) -> None:
        self._loop = loop
        self.number = number
        self.succeeded: bool | None = None
        """None before the block ends, and after an error that is not retried."""
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
        """Suppress an error that the loop will retry; raise any other."""
        if error is None:
            self.succeeded = True
            return False
        if not isinstance(error, Exception):
            return False
        delay = self._loop.next_delay(self.number, error)
        if delay is None:
            return False
        self.succeeded, self.delay = False, delay
        return True


class Attempts:
    """The state of one ``async for``."""

    def __init__(self, decider: Decider, name: str, started: float | None) -> None:
        self._decider = decider
        self._name = name
        self._started = started
        self._failed_at: float | None = None
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
        self._last = Attempt(self, number)
        return self._last

    def next_delay(self, attempt: int, error: Exception) -> float | None:
        """See :meth:`Decider.next_delay`."""
        if self._failed_at is None:
            self._failed_at = self._decider.clock.monotonic()
        return self._decider.next_delay(
            self._name, attempt, error, started=self._started, failed_at=self._failed_at
        )


P = ParamSpec("P")
T = TypeVar("T")


class Retrier:
    """Runs operations until they succeed or the policy gives up.

    The first attempt starts at once. The caller gets the result, or the last error with a note of
    the number of attempts. Only ``Exception`` is retried: a cancellation ends an attempt or a wait
    at once. A retrier keeps no state of a call, so any number of callers can share it.

    Use it as a decorator of ``async def`` and ``def``, with :meth:`execute`, or in a loop:
    ``async for attempt in retrier: with attempt: ...``. It is also a :class:`RetryPolicy`, which
    delegates to its policy.
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
        """``name`` is used in events; ``block`` waits between attempts of a plain function."""
        self._clock = clock or SystemClock()
        self._now = reader_of(self._clock)
        self.name = name
        """The name in events; None: the name of the operation."""
        if deadline is not None:
            require_not_negative("a deadline", deadline)
        self._deadline = deadline
        self.budget = budget
        """The budget that is charged for each retry, or None."""
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
        self._decider.subscribe(listener)

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
        """Call ``operation`` until it succeeds and return its result, awaited if it is awaitable.

        Raises ``TypeError`` for a coroutine object, which cannot run twice, and ``TimeoutError``
        if the deadline cuts an attempt.
        """
        require_callable(operation)
        if self._deadline is None:
            return self._execute(operation)
        return self._execute_within(self._deadline, operation)

    def __aiter__(self) -> AsyncIterator[Attempt]:
        """Start a new loop; it ends after a successful attempt.

        Raises ``TypeError`` if the retrier has a deadline, which cannot cut the body of a loop.
        """
        if self._deadline is not None:
            raise TypeError("put the loop inside `async with Deadline(...)` instead")
        return Attempts(self._decider, self.name or "loop", self._begin())

    # -- running -----------------------------------------------------------------------------

    def _begin(self) -> float | None:
        """Return the start time of a call; None if it is not needed."""
        return self._measured_begin() if self._decider.needs_start else None

    def _measured_begin(self) -> float:
        started = self._now()
        if self.budget is not None:
            self.budget.deposit(started)
        return started

    def _guard_async(self, function: Callable[P, Awaitable[T]]) -> Callable[P, Awaitable[T]]:
        name = self.name or operation_name(function)
        parts = BreakerWrapper.of(function)
        if parts is None:
            guarded = self._guard_alone(function, name)
        else:
            guarded = self._guard_with_breaker(function, name, parts)
        with_own_code(cast("FunctionType", guarded))
        if self._deadline is None:
            return guarded
        seconds, clock = self._deadline, self._clock

        @functools.wraps(function)
        async def limited(*args: P.args, **kwargs: P.kwargs) -> T:
            async with Deadline(seconds, clock=clock):
                return await guarded(*args, **kwargs)

        return limited

    # Both forms contain the first attempt themselves: the call of a helper in a successful call
    # would take a fifth of the time that the guard may add. So would passing empty keywords, and
    # each variable of this scope that a wrapper uses costs every call.

    def _guard_alone(
        self, function: Callable[P, Awaitable[T]], name: str
    ) -> Callable[P, Awaitable[T]]:
        begin, needs_start = self._measured_begin, self._decider.needs_start
        call: Callable[..., Awaitable[T]] = function
        go_on = functools.partial(self._again, name)

        @functools.wraps(function)
        async def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
            started = begin() if needs_start else None
            try:
                return await (call(*args, **kwargs) if kwargs else call(*args))
            except Exception as error:  # noqa: BLE001 - a boundary: any error may be retried
                failure = error
            # Outside the handler, so that an error does not become the context of the next one.
            try:
                again = functools.partial(call, *args, **kwargs)
                return cast("T", await go_on(again, failure, started))
            finally:
                del failure

        return guarded

    def _guard_with_breaker(
        self, function: Callable[P, Awaitable[T]], name: str, parts: BreakerWrapper
    ) -> Callable[P, Awaitable[T]]:
        """Guard a breaker's wrapper by one coroutine that does the work of both.

        The inner ``try`` is that of the breaker's wrapper. Further attempts go through the wrapper.
        """
        begin, needs_start = self._measured_begin, self._decider.needs_start
        breaker, call, circuit_name = parts.breaker, parts.function, parts.name
        go_on = functools.partial(self._again, name)

        @functools.wraps(function)
        async def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
            started = begin() if needs_start else None
            try:
                token: Any = breaker.period
                if token.gated:
                    token = breaker.admit(circuit_name)
                try:
                    result: T = await (call(*args, **kwargs) if kwargs else call(*args))
                except Exception as error:
                    breaker.failed(token, error)
                    raise
                except BaseException:
                    breaker.released(token)
                    raise
                if token.pending:
                    breaker.succeeded(token)
            except Exception as error:  # noqa: BLE001 - as above
                failure = error
            else:
                return result
            try:
                again = functools.partial(function, *args, **kwargs)
                return cast("T", await go_on(again, failure, started))
            finally:
                del failure

        return guarded

    def _guard_sync(self, function: Callable[P, T]) -> Callable[P, T]:
        name = self.name or operation_name(function)

        @functools.wraps(function)
        def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
            started, failed_at = self._begin(), None
            attempt = 1
            while True:
                try:
                    result = function(*args, **kwargs)
                except Exception as error:
                    # A boundary: any error may be retried.
                    failed_at = self._now() if failed_at is None else failed_at
                    delay = self._decider.next_delay(
                        name,
                        attempt,
                        error,
                        started=started,
                        failed_at=failed_at,
                        may_wait=not _on_event_loop(),
                    )
                    if delay is None:
                        raise
                else:
                    reject_awaitable(result, name)
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
        except Exception as error:  # noqa: BLE001 - a boundary: any error may be retried
            failure = error
        try:
            name = self.name or operation_name(operation)
            return await self._again(name, operation, failure, started)
        finally:
            del failure

    async def _again(
        self, name: str, operation: Callable[[], Any], failure: Exception, started: float | None
    ) -> Any:
        """Run the attempts after the first; separate, so that a success does not pay for it."""
        attempt, failed_at = 1, self._now()
        try:
            while True:
                delay = self._decider.next_delay(
                    name, attempt, failure, started=started, failed_at=failed_at
                )
                if delay is None:
                    raise failure
                # The first retry without delay does not yield to the loop. Later ones do, so that
                # a policy without delays does not starve other tasks.
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


class _LeftOut(int):
    """A default number, which shows that the caller has passed none."""


DEFAULT_ATTEMPTS = _LeftOut(3)


def retry(
    attempts: int | None = DEFAULT_ATTEMPTS,
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
    """Make up to ``attempts`` attempts (3), ``base_delay`` (1 s) apart, doubled each time.

    Use it as ``@retry(attempts=3, base_delay=1.0)`` on ``async def`` or ``def``, or use the
    returned :class:`Retrier` directly. Durations are seconds.

    - ``attempts=None`` sets no limit: the waits stay at the cap of the back-off (30 s), until the
      operation succeeds, raises another error than ``retry_on`` selects, or is cancelled, or until
      a deadline or a budget ends them.
    - ``backoff`` replaces ``base_delay``; ``policy`` replaces ``attempts`` and ``backoff``.
    - ``retry_on`` selects the errors to retry: types or a predicate. The default is every
      ``Exception``. Types select an exception group if they select all of its members. A rejection
      by an open circuit is retried only with ``retry_open_circuit``.
    - ``deadline`` limits all attempts and waits together: it cuts an attempt with
      ``TimeoutError``, and no wait starts that would end after it.
    - An error with a true ``maybe_applied`` is retried only if the call is ``idempotent``.
    - ``budget`` is charged for each retry; share one between the callers of a dependency.

    Raises ``ValueError`` or ``TypeError`` for invalid or contradictory arguments.
    """
    if not (attempts is None or isinstance(attempts, int)):
        raise TypeError(f"use @retry() with parentheses; attempts cannot be {attempts!r}")
    given = (base_delay, backoff, retry_on, rng)
    replaced = not isinstance(attempts, _LeftOut) or any(each is not None for each in given)
    if backoff is not None and base_delay is not None:
        raise ValueError("give either base_delay or backoff")
    if policy is None:
        first = 1.0 if base_delay is None else base_delay
        policy = BackoffPolicy(
            attempts=attempts,
            backoff=backoff or Backoff(base=first, cap=max(30.0, first)),
            retry_on=Exception if retry_on is None else retry_on,
            rng=rng or default_rng(),
        )
    elif replaced:
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
