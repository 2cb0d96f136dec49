"""The fallback: a second-best result that replaces an error."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar, overload

from viralfx.core.events import Listener, notify
from viralfx.resilience._callables import (
    ErrorFilter,
    matcher,
    operation_name,
    require_callable,
)

T = TypeVar("T")
F = TypeVar("F")


@dataclass(frozen=True, slots=True, kw_only=True)
class FallbackUsed:
    """Event: the fallback was returned instead of raising ``error``."""

    name: str
    error: Exception


@overload
async def with_fallback(
    operation: Callable[[], Awaitable[T]],
    fallback: F,
    *,
    on: ErrorFilter = ...,
    name: str | None = ...,
    listeners: tuple[Listener[FallbackUsed], ...] = ...,
) -> T | F: ...
@overload
async def with_fallback(
    operation: Callable[[], Awaitable[T]],
    *,
    fallback_factory: Callable[[Exception], F],
    on: ErrorFilter = ...,
    name: str | None = ...,
    listeners: tuple[Listener[FallbackUsed], ...] = ...,
) -> T | F: ...


async def with_fallback(
    operation: Callable[[], Awaitable[Any]],
    fallback: object = None,
    *,
    fallback_factory: Callable[[Exception], object] | None = None,
    on: ErrorFilter = Exception,
    name: str | None = None,
    listeners: tuple[Listener[FallbackUsed], ...] = (),
) -> object:
    """Return the result of ``operation``, or ``fallback`` if it raises an error in ``on``.

    ``fallback_factory`` creates the fallback from the error instead; it is called only when it is
    needed. A cancellation and an error outside ``on`` are raised. List the errors that you expect
    in ``on``: the default, ``Exception``, also hides programming errors.
    """
    require_callable(operation)
    try:
        return await operation()
    except Exception as error:
        # A boundary: an error in ``on`` is replaced by the fallback, any other is raised.
        if not matcher(on)(error):
            raise
        if listeners:
            what = name or operation_name(operation)
            notify(listeners, FallbackUsed(name=what, error=error))
        return fallback if fallback_factory is None else fallback_factory(error)
