"""Circuit breaker: rejects calls to a failing dependency, and resumes after a successful probe."""

import functools
import math
import threading
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from types import FunctionType, TracebackType
from typing import Any, NamedTuple, ParamSpec, TypeAlias, TypeVar, cast, overload

from viralfx.core.clock import Clock, SystemClock
from viralfx.core.errors import require_count, require_positive
from viralfx.core.events import Listener, notify
from viralfx.resilience._callables import (
    CallableT,
    CallRejectedError,
    ErrorFilter,
    is_async,
    matcher,
    not_rejected,
    operation_name,
    reader_of,
    reject_awaitable,
    require_callable,
    with_own_code,
)
from viralfx.resilience.breaker_states import (
    CircuitState,
    Closed,
    ClosedByRate,
    HalfOpen,
    Open,
    Period,
    RollingWindow,
    Token,
)


class CircuitOpenError(CallRejectedError):
    """The circuit is open: the call was rejected.

    ``args`` are the name of the circuit, the name of the operation, and the seconds to wait. The
    message is formatted only when it is read, so that a rejection costs little.
    """

    @property
    def circuit(self) -> str:
        """The name of the circuit."""
        return str(self.args[0])

    @property
    def operation(self) -> str:
        """The name of the rejected operation; empty if it has none."""
        return str(self.args[1])

    @property
    def retry_after(self) -> float:
        """Seconds until the next call may pass; infinite if the circuit was opened manually."""
        return float(self.args[2])

    def __str__(self) -> str:
        """Return the message: operation, circuit, and the time of the next attempt."""
        what = f"{self.operation} rejected: " if self.operation else ""
        when = f", next try in {self.retry_after:.1f} s" if self.retry_after < math.inf else ""
        return f"{what}circuit {self.circuit} is open{when}"


@dataclass(frozen=True, slots=True, kw_only=True)
class StateChanged:
    """Event: the state of a circuit changed."""

    name: str
    old: CircuitState
    new: CircuitState
    failure_count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CallRejected:
    """Event: a call was rejected."""

    name: str
    operation: str
    retry_after: float


CircuitEvent: TypeAlias = StateChanged | CallRejected


class Circuit:
    """The state of one circuit and its transitions.

    A caller reads ``period``. If it is ``gated``, the caller gets a token from :meth:`admit`;
    otherwise the period is the token. The caller makes the call and reports one of three outcomes.
    Safe for concurrent use by tasks and threads.
    """

    def __init__(
        self,
        failure_threshold: int = 5,
        open_for: float = 60.0,
        *,
        name: str = "circuit",
        probe_lease: float = 10.0,
        half_open_max_calls: int = 1,
        window: RollingWindow | None = None,
        failure_on: ErrorFilter = not_rejected,
        listeners: tuple[Listener[CircuitEvent], ...] = (),
        clock: Clock | None = None,
    ) -> None:
        require_count("failure_threshold", failure_threshold)
        require_count("half_open_max_calls", half_open_max_calls)
        require_positive("open_for", open_for)
        require_positive("probe_lease", probe_lease)
        self.name = name
        """The name of the circuit in errors, events and logs."""
        self._threshold = failure_threshold
        self._open_for = open_for
        self._lease = probe_lease
        self._permits = half_open_max_calls
        self._window = window
        self._counts = matcher(failure_on, any)
        self._listeners = listeners
        self._now = reader_of(clock or SystemClock())
        # Held only while counts and state change, never during a call or a listener.
        self._lock = threading.Lock()
        self.period: Period = self._closed()
        """The period that the circuit is in."""

    # -- reading and control -----------------------------------------------------------------

    def subscribe(self, listener: Listener[CircuitEvent]) -> None:
        """Call ``listener`` with every :class:`CircuitEvent`."""
        self._listeners = (*self._listeners, listener)

    @property
    def state(self) -> CircuitState:
        """The state that applies to the next call; reading it changes nothing."""
        period = self.period
        if isinstance(period, Open) and self._now() >= period.until:
            return CircuitState.HALF_OPEN
        return period.state

    def get_state(self) -> dict[str, str | int]:
        """Return ``{"state": "CLOSED", "failureCount": 0}``."""
        with self._lock:
            period = self.period
            if isinstance(period, ClosedByRate):
                # Drops expired slices, so that the count is current.
                period.counts.forget(self._now())
            failures = period.failure_count
        return {"state": str(self.state), "failureCount": failures}

    def open(self) -> None:
        """Reject every call until :meth:`close`."""
        self._command(lambda failures: Open(math.inf, failures))

    def close(self) -> None:
        """Close the circuit and reset its counts; calls in progress no longer count."""
        self._command(lambda _: self._closed())

    def reset(self) -> None:
        """Close the circuit; an alias of :meth:`close`."""
        self.close()

    def snapshot(self) -> dict[str, str | int | float | None]:
        """Return plain data for :meth:`restore`.

        ``remaining`` is the seconds that the circuit stays open, None if it was opened manually.
        """
        period = self.period
        remaining: float | None = 0.0
        if isinstance(period, Open):
            remaining = max(0.0, period.until - self._now())
        return {**self.get_state(), "remaining": None if remaining == math.inf else remaining}

    def restore(self, snapshot: Mapping[str, object]) -> None:
        """Restore a :meth:`snapshot`; an open circuit stays open for the remaining time.

        The time between snapshot and restore is not subtracted, because monotonic time does not
        survive a restart. The circuit stays open for at most ``open_for``. Raises ``ValueError``
        for an invalid snapshot and changes nothing then.
        """
        state, failures = snapshot.get("state"), snapshot.get("failureCount")
        remaining = snapshot.get("remaining")
        if not (
            state in list(CircuitState)
            and isinstance(failures, int)
            and failures >= 0
            and (remaining is None or (isinstance(remaining, int | float) and remaining >= 0))
        ):
            raise ValueError(f"not a snapshot of a circuit breaker: {dict(snapshot)!r}")
        if state == CircuitState.CLOSED:
            self._command(lambda _: self._closed(min(failures, self._threshold - 1)))
        else:
            until = math.inf if remaining is None else self._now() + min(remaining, self._open_for)
            self._command(lambda _: Open(until, failures))

    # -- calls and outcomes -------------------------------------------------------------------

    def admit(self, operation: str) -> Token:
        """Return the token of an admitted call; raise ``CircuitOpenError`` for a rejected one."""
        now = self._now()
        period = self.period
        if isinstance(period, Open):
            if now < period.until:
                self._notify_rejected(operation, period.until - now)
                raise CircuitOpenError(self.name, operation, period.until - now)
        elif isinstance(period, ClosedByRate):
            return period.admit(now)
        change = None
        with self._lock:
            period = self.period
            if isinstance(period, Open) and now >= period.until:
                period = HalfOpen(
                    period.failure_count,
                    permits=self._permits,
                    lease=self._lease,
                    window=self._window,
                )
                change = self._enter(period)
            # Decided under the lock, so that two callers cannot get the same permit.
            if isinstance(period, Closed | ClosedByRate):
                # Another caller closed the circuit after the first check.
                return period.admit(now)
            token = period.admit(now)
            retry_after = period.until - now
        self._notify(change)
        if token is None:
            self._notify_rejected(operation, retry_after)
            raise CircuitOpenError(self.name, operation, retry_after)
        return token

    def succeeded(self, token: Token) -> None:
        """Record a success. Not needed while the token has nothing ``pending``."""
        now = self._now()
        with self._lock:
            # A token of an earlier period belongs to another generation and changes nothing.
            state = token.succeeded(now) if token.period is self.period else None
            if state is None:
                return
            change = self._enter(self._next(state, now))
        self._notify(change)

    def failed(self, token: Token, error: Exception) -> None:
        """Record an error; an error outside ``failure_on`` is neutral."""
        if not self._counts(error):
            self.released(token)
            return
        now = self._now()
        with self._lock:
            state = token.failed(now) if token.period is self.period else None
            if state is None:
                return
            change = self._enter(self._next(state, now))
        self._notify(change)

    def released(self, token: Token) -> None:
        """Record a neutral outcome, which says nothing about the dependency."""
        with self._lock:
            token.released()

    def _notify_rejected(self, operation: str, retry_after: float) -> None:
        if self._listeners:
            event = CallRejected(name=self.name, operation=operation, retry_after=retry_after)
            notify(self._listeners, event)

    def _next(self, state: CircuitState, now: float) -> Period:
        if state is CircuitState.OPEN:
            return Open(now + self._open_for, self.period.failure_count)
        return self._closed()

    def _closed(self, failures: int = 0) -> Period:
        if self._window is None:
            return Closed(self._threshold, failures)
        return ClosedByRate(self._window)

    def _command(self, make: Callable[[int], Period]) -> None:
        with self._lock:
            change = self._enter(make(self.period.failure_count))
        self._notify(change)

    def _enter(self, period: Period) -> StateChanged | None:
        old, self.period = self.period, period
        if old.state is period.state:
            return None
        return StateChanged(
            name=self.name, old=old.state, new=period.state, failure_count=period.failure_count
        )

    def _notify(self, change: StateChanged | None) -> None:
        if change is not None and self._listeners:
            notify(self._listeners, change)


P = ParamSpec("P")
T = TypeVar("T")


_MARK = "_viralfx_breaker"


class BreakerWrapper(NamedTuple):
    """The parts of a breaker's wrapper around a coroutine function."""

    wrapper: Callable[..., Awaitable[Any]]
    breaker: "CircuitBreaker"
    function: Callable[..., Awaitable[Any]]
    name: str

    @staticmethod
    def of(function: object) -> "BreakerWrapper | None":
        """Return the parts of a breaker's wrapper; None for any other function."""
        mark = getattr(function, _MARK, None)
        # A function around the wrapper has a copy of its attributes, but is not the wrapper.
        return mark if isinstance(mark, BreakerWrapper) and mark.wrapper is function else None


class CircuitBreaker(Circuit):
    """Guards the calls of one dependency.

    In CLOSED, every call passes and consecutive failures are counted (rates, with a ``window``).
    At the threshold the circuit is OPEN for ``open_for`` seconds, and calls raise
    :class:`CircuitOpenError`. Then it is HALF_OPEN: ``half_open_max_calls`` calls pass as probes.
    As many successes close the circuit, one failure opens it again. Callers get the original
    error of a call.

    - An error outside ``failure_on`` and a cancellation are neutral: they neither count nor reset
      the count, and a probe that ends this way releases its permit. Types in ``failure_on`` select
      an exception group if they select one of its members.
    - An outcome counts only if the state has not changed since the call began.
    - A probe that takes longer than ``probe_lease`` seconds loses its permit to the next call. Set
      it longer than the slowest healthy call.

    Use it as a decorator of ``async def`` and ``def``, with :meth:`execute`, or as
    ``with breaker.guard():``. Tasks and threads may share it. No lock is held during a call, and
    no lock is taken by a success that follows a success.

    Raises ``ValueError`` for an invalid number.
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
        """Call ``operation`` and return its result, awaited if it is awaitable.

        ``name`` is the operation in events and :class:`CircuitOpenError`. Raises ``TypeError`` for
        a coroutine object: if the call is rejected, it would never be awaited.
        """
        require_callable(operation)
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
        """Return a context manager for one block of plain or async code."""
        return Guard(self, name)

    def _guard_async(self, function: Callable[P, Awaitable[T]]) -> Callable[P, Awaitable[T]]:
        name = operation_name(function)
        call: Callable[..., Awaitable[T]] = function

        @functools.wraps(function)
        async def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
            # Any: narrowing a union of token types would cost every call.
            token: Any = self.period
            if token.gated:
                token = self.admit(name)
            try:
                # Passing keywords costs time even if there are none.
                result = await (call(*args, **kwargs) if kwargs else call(*args))
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
        setattr(guarded, _MARK, BreakerWrapper(guarded, self, function, name))
        return guarded

    def _guard_sync(self, function: Callable[P, T]) -> Callable[P, T]:
        name = operation_name(function)

        @functools.wraps(function)
        def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
            with Guard(self, name):
                result = function(*args, **kwargs)
            reject_awaitable(result, name)
            return result

        return guarded


class Guard:
    """One guarded block; enter it once. It keeps the state of the block, so blocks may overlap."""

    __slots__ = ("_breaker", "_name", "_token")

    def __init__(self, breaker: CircuitBreaker, name: str) -> None:
        self._breaker = breaker
        self._name = name
        self._token: Any = None

    def __enter__(self) -> None:
        """Start the block; raises ``CircuitOpenError`` if the call is rejected."""
        token: Any = self._breaker.period
        self._token = self._breaker.admit(self._name) if token.gated else token

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Record the outcome of the block; an error of the block is raised."""
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
    failure_on: ErrorFilter = not_rejected,
    listeners: tuple[Listener[CircuitEvent], ...] = (),
    clock: Clock | None = None,
) -> Callable[[CallableT], CallableT]:
    """Guard each decorated function by its own :class:`CircuitBreaker`, named after it.

    To share a breaker or read its state, create a :class:`CircuitBreaker` and decorate with it.
    """
    if callable(failure_threshold):
        what = "use @circuit_breaker() with parentheses; failure_threshold cannot be"
        raise TypeError(f"{what} {failure_threshold!r}")
    # Created now, so that an invalid number is reported at the decorator.
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
