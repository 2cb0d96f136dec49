"""Graceful degradation: a second-best answer instead of an error."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar, overload

from viralfx.domain.events import Listener, notify
from viralfx.domain.resilience.failures import ErrorFilter, matcher
from viralfx.domain.resilience.guardable import operation_name, refuse_uncallable

T = TypeVar("T")
F = TypeVar("F")


@dataclass(frozen=True, slots=True, kw_only=True)
class FallbackUsed:
    """Event: the caller got the fallback instead of ``error``."""

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
    """Return what ``operation`` returns, or ``fallback`` when it fails with an error in ``on``.

    ``fallback_factory`` makes the fallback from the error instead, and is only then called. A
    cancellation, and an error outside ``on``, reach the caller. Name what may fail in ``on``: a
    mistake in the code is an ``Exception`` too.
    """
    refuse_uncallable(operation)
    try:
        return await operation()
    except Exception as error:
        # A boundary: what is listed is answered with the fallback, the rest goes on.
        if not matcher(on)(error):
            raise
        if listeners:
            what = name or operation_name(operation)
            notify(listeners, FallbackUsed(name=what, error=error))
        return fallback if fallback_factory is None else fallback_factory(error)
