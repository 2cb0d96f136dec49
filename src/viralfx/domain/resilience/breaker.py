"""The circuit breaker: stops calling what keeps failing, and looks carefully before it resumes."""

import functools
from collections.abc import Awaitable, Callable
from types import FunctionType, TracebackType
from typing import Any, ParamSpec, TypeVar, cast, overload

from viralfx.domain.clock import Clock
from viralfx.domain.events import Listener
from viralfx.domain.resilience.circuit import Circuit, CircuitEvent
from viralfx.domain.resilience.circuit_states import RollingWindow
from viralfx.domain.resilience.failures import ErrorFilter, anything_asked
from viralfx.domain.resilience.guardable import (
    CallableT,
    is_async,
    operation_name,
    refuse_awaitable,
    refuse_uncallable,
    with_own_code,
)

P = ParamSpec("P")
T = TypeVar("T")


class CircuitBreaker(Circuit):
    """Guards calls of one dependency.

    CLOSED, it makes every call and counts failures in a row (or rates, with a ``window``); at the
    threshold it is OPEN for ``open_for`` seconds and raises :class:`CircuitOpenError` instead;
    then HALF_OPEN, it makes ``half_open_max_calls`` at a time and is CLOSED by as many successes
    or OPEN again by a failure. The caller always gets the original error.

    - An error outside ``failure_on`` is neutral, like a cancellation: it neither counts nor
      resets the count, and a probe that ends so gives its permit back.
    - An outcome counts only in the state the call began in.
    - A probe that has not ended after ``probe_lease`` seconds loses its permit to the next call;
      set it longer than the slowest healthy call.

    A decorator for ``async def`` and ``def``, :meth:`execute` and ``with breaker.guard():`` do the
    same. It may be shared by tasks and threads; no lock is held during a call, and none taken by
    a call that succeeds after a success.

    Raises ``ValueError`` for a number that could not work.
    """

    def __call__(self, function: CallableT) -> CallableT:
        """Decorate a function or coroutine function; raises ``TypeError`` for anything else."""
        if is_async(function):
            coroutine_function = cast("Callable[..., Awaitable[object]]", function)
            return cast("CallableT", self._guard_async(coroutine_function))
        return cast("CallableT", self._guard_sync(function))

    @overload
    async def execute(self, operation: Callable[[], Awaitable[T]], name: str = "") -> T: ...
    @overload
    async def execute(self, operation: Callable[[], T], name: str = "") -> T: ...

    async def execute(self, operation: Callable[[], Any], name: str = "") -> Any:
        """Call ``operation`` and await what it returns if that can be awaited.

        ``name`` says what is called, for events and :class:`CircuitOpenError`. Raises
        ``TypeError`` for a coroutine object: it would never be awaited when it is rejected.
        """
        refuse_uncallable(operation)
        token: Any = self.period
        if token.gated:
            token = self.admit(name)
        try:
            result = operation()
            if hasattr(result, "__await__"):
                result = await result
        except Exception as error:
            self.failed(token, error)
            raise
        except BaseException:
            self.released(token)
            raise
        if token.pending:
            self.succeeded(token)
        return result

    def guard(self, name: str = "") -> "Guard":
        """Return a context manager for one block, in plain or in async code."""
        return Guard(self, name)

    def _guard_async(self, function: Callable[P, Awaitable[T]]) -> Callable[P, Awaitable[T]]:
        name = operation_name(function)

        @functools.wraps(function)
        async def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
            # Any: a union of token types would have to be told apart on the way of every call.
            token: Any = self.period
            if token.gated:
                token = self.admit(name)
            try:
                result = await function(*args, **kwargs)
            except Exception as error:
                self.failed(token, error)
                raise
            except BaseException:
                self.released(token)
                raise
            if token.pending:
                self.succeeded(token)
            return result

        with_own_code(cast("FunctionType", guarded))
        return guarded

    def _guard_sync(self, function: Callable[P, T]) -> Callable[P, T]:
        name = operation_name(function)

        @functools.wraps(function)
        def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
            with Guard(self, name):
                result = function(*args, **kwargs)
            refuse_awaitable(result, name)
            return result

        return guarded


class Guard:
    """One guarded block: enter it once. Its state is here, so that blocks may overlap."""

    __slots__ = ("_breaker", "_name", "_token")

    def __init__(self, breaker: CircuitBreaker, name: str) -> None:
        self._breaker = breaker
        self._name = name
        self._token: Any = None

    def __enter__(self) -> None:
        """Start the block; raises ``CircuitOpenError`` when it may not."""
        token: Any = self._breaker.period
        self._token = self._breaker.admit(self._name) if token.gated else token

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Count how the block ended; its error is let out."""
        token, breaker = self._token, self._breaker
        if error is None:
            if token.pending:
                breaker.succeeded(token)
        elif isinstance(error, Exception):
            breaker.failed(token, error)
        else:
            breaker.released(token)


def circuit_breaker(
    failure_threshold: int = 5,
    open_for: float = 60.0,
    *,
    name: str | None = None,
    probe_lease: float = 10.0,
    half_open_max_calls: int = 1,
    window: RollingWindow | None = None,
    failure_on: ErrorFilter = anything_asked,
    listeners: tuple[Listener[CircuitEvent], ...] = (),
    clock: Clock | None = None,
) -> Callable[[CallableT], CallableT]:
    """Guard each decorated function by a :class:`CircuitBreaker` of its own, named after it.

    To share one, or to read its state, create the breaker and decorate with that.
    """
    # A breaker made now reports a wrong number where it is written.
    CircuitBreaker(
        failure_threshold,
        open_for,
        probe_lease=probe_lease,
        half_open_max_calls=half_open_max_calls,
        failure_on=failure_on,
    )

    def decorate(function: CallableT) -> CallableT:
        breaker = CircuitBreaker(
            failure_threshold,
            open_for,
            name=name or operation_name(function),
            probe_lease=probe_lease,
            half_open_max_calls=half_open_max_calls,
            window=window,
            failure_on=failure_on,
            listeners=listeners,
            clock=clock,
        )
        return breaker(function)

    return decorate
