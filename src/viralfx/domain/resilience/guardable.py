"""What may be decorated: functions and coroutine functions, told apart at their definition."""

import functools
import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any, TypeVar

CallableT = TypeVar("CallableT", bound=Callable[..., object])


def is_async(function: object) -> bool:
    """Tell ``async def`` from ``def``, through ``functools.partial`` and objects with a call.

    Raises ``TypeError`` for what cannot be guarded as a whole: classes, generators, an already
    created coroutine, static and class methods that are not bound yet.
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
            "what it yields before failing cannot be taken back"
        )
    return inspect.iscoroutinefunction(target)


def with_own_code(function: FunctionType) -> None:
    """Give a wrapper a copy of its code, in place.

    All wrappers that one decorator makes share one code object, and the interpreter specialises
    that for the types it meets: without a copy, breakers of two modes in one process make each
    other's calls half as dear again.
    """
    function.__code__ = function.__code__.replace()


def operation_name(function: object) -> str:
    """Return a name to log for ``function``."""
    name = getattr(function, "__qualname__", None)
    return str(name) if name else type(function).__qualname__


def refuse_uncallable(operation: object) -> None:
    """Raise ``TypeError`` unless ``operation`` can be called, as often as it has to be."""
    if not callable(operation):
        is_async(operation)


def refuse_awaitable(result: object, operation: str) -> None:
    """Raise ``TypeError`` for the result of a plain function whose work is still to come."""
    if hasattr(result, "__await__"):
        _discard(result)
        raise TypeError(
            f"{operation} returned an awaitable, which fails outside the guard: make it `async def`"
        )


def _discard(awaitable: object) -> None:
    if inspect.iscoroutine(awaitable):
        awaitable.close()
