"""What an error says: whether it is of a listed kind, when to come back, and what it may hide."""

import logging
import math
from collections.abc import Callable
from typing import TypeAlias

from viralfx.domain.errors import ViralFXError

_logger = logging.getLogger("viralfx.resilience")

Matcher: TypeAlias = Callable[[Exception], bool]
ErrorFilter: TypeAlias = type[Exception] | tuple[type[Exception], ...] | Matcher
"""The errors meant: a type, several types, or a predicate."""


class CallRejectedError(ViralFXError):
    """The call was not made; the dependency has not been asked."""


def matcher(errors: ErrorFilter) -> Matcher:
    """Turn a filter into a predicate that never raises.

    A predicate of the caller's that fails is logged and the error taken for an unlisted one.
    Raises ``TypeError`` for what is no filter, ``CancelledError`` and its like included: they are
    not errors of a dependency.
    """
    if isinstance(errors, type | tuple):
        types = errors if isinstance(errors, tuple) else (errors,)
        listed: tuple[object, ...] = types
        for kind in listed:
            if not (isinstance(kind, type) and issubclass(kind, Exception)):
                raise TypeError(f"only subclasses of Exception can be listed, got {kind!r}")
        return lambda error: isinstance(error, types)
    if not callable(errors):
        raise TypeError(
            f"expected an exception type, a tuple of them or a predicate, got {errors!r}"
        )
    predicate = errors

    def matches(error: Exception) -> bool:
        try:
            return bool(predicate(error))
        except Exception:
            # A boundary: the caller is owed the dependency's error, not that of a predicate.
            _logger.exception("Error predicate failed", extra={"error": type(error).__name__})
            return False

    return matches


def anything_asked(error: Exception) -> bool:
    """Match what a dependency can have caused: all but calls that were never made."""
    return not isinstance(error, CallRejectedError)


def retry_after(error: Exception) -> float | None:
    """Return the error's own ``retry_after`` in seconds, None where it has no usable one."""
    hint = getattr(error, "retry_after", None)
    if isinstance(hint, int | float) and not isinstance(hint, bool) and 0 <= hint < math.inf:
        return float(hint)
    return None


def maybe_applied(error: Exception) -> bool:
    """Tell whether the operation may have taken effect in spite of the error.

    The error says so with a true attribute ``maybe_applied``: a connection lost after COMMIT was
    sent, a response that never came.
    """
    return bool(getattr(error, "maybe_applied", False))
