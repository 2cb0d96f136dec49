"""The names of a conversation and of its user, from the request to the last log line."""

import os
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_VALID = re.compile(r"[A-Za-z0-9._-]{1,128}", re.ASCII).fullmatch
_TRACEPARENT = re.compile(
    r"(?!ff)(?:(00)|(?!00)[0-9a-f]{2})"
    r"-(?!0{32})(?P<trace>[0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}"
    # Only versions to come may have more.
    r"(?(1)|(?:-.*)?)"
).fullmatch

_MOST_OF_A_USER_ID = 128

_TOGETHER = 256
"""Ids that are made at once: one by one each costs a request several times as much."""
_made: list[str] = []
# A child would give its own conversations the names that its parent gives others.
os.register_at_fork(after_in_child=_made.clear)

_current: ContextVar[str | None] = ContextVar("viralfx_correlation_id", default=None)
_user: ContextVar[str | None] = ContextVar("viralfx_user_id", default=None)


def current_correlation_id() -> str | None:
    """Return the id bound to this task, or None outside a request, job or check."""
    return _current.get()


def new_correlation_id() -> str:
    """Make an id of the shape of a W3C trace id: 32 hexadecimal digits."""
    try:
        return _made.pop()
    except IndexError:
        # A name, not a secret: the ordinary generator is 4 times cheaper than os.urandom.
        digits = random.randbytes(16 * _TOGETHER).hex()  # noqa: S311
        _made.extend([digits[at : at + 32] for at in range(32, len(digits), 32)])
        return digits[:32]


def is_correlation_id(text: str) -> bool:
    """Tell whether a caller's id may be used as it is: ``[A-Za-z0-9._-]{1,128}``."""
    return _VALID(text) is not None


def is_traceparent(text: str) -> bool:
    """Tell whether a text is a W3C ``traceparent`` that names a trace."""
    return _TRACEPARENT(text) is not None


def choose_correlation_id(
    correlation_id: str | None, request_id: str | None, traceparent: str | None
) -> str:
    """Pick the id of a request from its headers, each None when absent.

    The first valid one of ``X-Correlation-ID`` and ``X-Request-ID``, else the trace id of a W3C
    ``traceparent``, else a new one. An invalid value is skipped, never repaired or echoed.
    """
    if correlation_id is not None and _VALID(correlation_id):
        return correlation_id
    if request_id is not None and _VALID(request_id):
        return request_id
    if traceparent is not None and (match := _TRACEPARENT(traceparent)):
        return match["trace"]
    return new_correlation_id()


def bind_correlation_id(correlation_id: str) -> None:
    """Set the id for the rest of this task; a task copies its context, so nothing leaks."""
    _current.set(correlation_id)


def begin_conversation(correlation_id: str) -> None:
    """Set the id for the rest of this task, and nobody as its user."""
    _current.set(correlation_id)
    # A server may begin a task in the context of the connection's last request.
    if _user.get() is not None:
        _user.set(None)


@contextmanager
def correlated(correlation_id: str) -> Iterator[str]:
    """Bind the id for a block and restore what was bound before."""
    token = _current.set(correlation_id)
    try:
        yield correlation_id
    finally:
        _current.reset(token)


def bind_user_id(user_id: str | None) -> None:
    """Name the user in every log line of the rest of this request or task; None: nobody.

    For an application that knows who asks, in a middleware for instance. The name may come from a
    client, so no more than 128 characters of it are kept. Jobs do not inherit it.
    """
    _user.set(None if user_id is None else user_id[:_MOST_OF_A_USER_ID])


def current_user_id() -> str | None:
    """Return the user bound to this task, or None."""
    return _user.get()
