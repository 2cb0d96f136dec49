"""Shared by the guards: inspection of callables, clock reading, error filters."""

import contextlib
import functools
import inspect
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from types import FunctionType
from typing import Any, TypeAlias, TypeVar

from viralfx.core.clock import Clock, SystemClock
from viralfx.core.errors import ViralFXError


def reader_of(clock: Clock) -> Callable[[], float]:
    """Return a function that reads the clock; for the system clock ``time.monotonic`` itself.

    This saves a method call, a fifth of the time that a retry may add to a successful call.
    """
    return time.monotonic if isinstance(clock, SystemClock) else clock.monotonic


_logger = logging.getLogger("viralfx.resilience")

Matcher: TypeAlias = Callable[[Exception], bool]
ErrorFilter: TypeAlias = type[Exception] | tuple[type[Exception], ...] | Matcher
"""Selects errors: an exception type, a tuple of types, or a predicate.

Types are also looked for inside exception groups. A predicate gets the group itself.
"""


class CallRejectedError(ViralFXError):
    """The call was rejected by a guard and did not reach the dependency."""


def leaves(error: BaseException) -> Iterator[BaseException]:
    """Yield the error itself, or the errors in a group and in the groups in it."""
    if isinstance(error, BaseExceptionGroup):
        for member in error.exceptions:
            yield from leaves(member)
    else:
        yield error


def matcher(errors: ErrorFilter, of_group: Callable[[Iterable[bool]], bool] = all) -> Matcher:
    """Return a predicate for a filter; the predicate never raises.

    A type selects a group if the group itself is of that type, or if ``of_group`` of its members,
    ``all`` or ``any``, are. If the caller's predicate fails, that is logged and the error counts
    as not selected. Raises ``TypeError`` for an invalid filter, including ``CancelledError`` and
    other types that are not subclasses of ``Exception``: they are not errors of a dependency.
    """
    if isinstance(errors, type | tuple):
        types = errors if isinstance(errors, tuple) else (errors,)
        listed: tuple[object, ...] = types
        for kind in listed:
            if not (isinstance(kind, type) and issubclass(kind, Exception)):
                raise TypeError(f"only subclasses of Exception can be listed, got {kind!r}")

        def is_of_type(error: Exception) -> bool:
            if isinstance(error, types) or not isinstance(error, ExceptionGroup):
                return isinstance(error, types)
            return of_group(isinstance(member, types) for member in leaves(error))

        return is_of_type
    if not callable(errors):
        raise TypeError(
            f"expected an exception type, a tuple of them or a predicate, got {errors!r}"
        )
    predicate = errors

    def matches(error: Exception) -> bool:
        try:
            return bool(predicate(error))
        except Exception:
            # A boundary: the caller gets the dependency's error, not the predicate's.
            _logger.exception("Error predicate failed", extra={"error": type(error).__name__})
            return False

    return matches


def not_rejected(error: Exception) -> bool:
    """Return whether a dependency can have caused the error: True except for rejected calls."""
    return not all(isinstance(member, CallRejectedError) for member in leaves(error))


def retry_after(error: Exception) -> float | None:
    """Return the ``retry_after`` of an error in seconds; None if it is missing or invalid.

    For a group it is the longest of its members.
    """
    hints = (getattr(each, "retry_after", None) for each in (error, *leaves(error)))
    valid = [
        float(hint)
        for hint in hints
        if isinstance(hint, int | float) and not isinstance(hint, bool) and 0 <= hint < math.inf
    ]
    return max(valid, default=None)


def maybe_applied(error: Exception) -> bool:
    """Return whether the operation may have taken effect despite the error.

    Such an error has a true attribute ``maybe_applied``, for example when the connection was lost
    after COMMIT was sent, or the response did not arrive. For a group, one member with it is
    enough.
    """
    return any(bool(getattr(each, "maybe_applied", False)) for each in (error, *leaves(error)))


CallableT = TypeVar("CallableT", bound=Callable[..., object])


def _generator() -> Iterator[None]:
    yield


_CONTEXT_MANAGERS = (
    contextlib.contextmanager(_generator).__code__,
    contextlib.asynccontextmanager(_generator).__code__,  # type: ignore[arg-type]
)
"""The code of the functions that the decorators of contextlib make, shared by all of them."""


def is_async(function: object) -> bool:
    """Return whether a callable is ``async def``; partials and callable objects are resolved.

    Raises ``TypeError`` for objects that cannot be guarded: classes, generator functions, context
    managers, coroutine objects, and static or class methods that are not bound.
    """
    if inspect.isawaitable(function):
        _discard(function)
        raise TypeError(
            "a coroutine object runs at most once and cannot be guarded: "
            "pass the function that makes it"
        )
    if isinstance(function, type):
        raise TypeError(f"class {function.__name__} cannot be guarded: decorate its methods")
    if isinstance(function, staticmethod | classmethod):
        kind = type(function).__name__
        raise TypeError(f"put @{kind} above this decorator: it cannot be guarded from outside")
    if not callable(function):
        raise TypeError(f"expected a function or coroutine function, got {function!r}")
    target: Any = function
    while isinstance(target, functools.partial):
        target = target.func
    if not inspect.isroutine(target):
        target = type(target).__call__
    if inspect.isgeneratorfunction(target) or inspect.isasyncgenfunction(target):
        raise TypeError(
            f"generator {operation_name(function)} cannot be guarded: "
            "values that it yields before it fails cannot be revoked"
        )
    if any(getattr(target, "__code__", None) is code for code in _CONTEXT_MANAGERS):
        raise TypeError(
            f"context manager {operation_name(function)} cannot be guarded: its body runs after "
            "the guard; guard the function that the `with` block calls"
        )
    return inspect.iscoroutinefunction(target)


def with_own_code(function: FunctionType) -> None:
    """Give a wrapper its own copy of its code object, in place.

    All wrappers of a decorator share one code object, which the interpreter specializes for the
    types that it sees. Without a copy, calls through breakers of two modes in one process take
    half as long again.
    """
    function.__code__ = function.__code__.replace()


def operation_name(function: object) -> str:
    """Return the name of ``function`` for logs and events."""
    name = getattr(function, "__qualname__", None)
    return str(name) if name else type(function).__qualname__


def require_callable(operation: object) -> None:
    """Raise ``TypeError`` unless ``operation`` can be called repeatedly."""
    if not callable(operation):
        is_async(operation)


def reject_awaitable(result: object, operation: str) -> None:
    """Raise ``TypeError`` if a plain function returned an awaitable: its work is not done yet."""
    if hasattr(result, "__await__"):
        _discard(result)
        raise TypeError(
            f"{operation} returned an awaitable, which fails outside the guard: make it `async def`"
        )


def _discard(awaitable: object) -> None:
    if inspect.iscoroutine(awaitable):
        awaitable.close()
