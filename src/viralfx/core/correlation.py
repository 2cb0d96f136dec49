"""Correlation ids and user ids: choosing, binding to a task, and reading them."""

import os
import random
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_VALID = re.compile(r"[A-Za-z0-9._-]{1,128}", re.ASCII).fullmatch
_TRACEPARENT = re.compile(
    r"(?!ff)(?:(00)|(?!00)[0-9a-f]{2})"
    r"-(?!0{32})(?P<trace>[0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}"
    # Only a version later than 00 may have more fields.
    r"(?(1)|(?:-.*)?)"
).fullmatch

HEADER = b"x-correlation-id"
"""The header of the id, in requests and responses."""
_ID_HEADERS = frozenset({HEADER, b"x-request-id", b"traceparent"})

MAX_USER_ID_CHARACTERS = 128

ID_BATCH_SIZE = 256
"""Ids are generated in batches: one at a time, each costs a request several times as much."""
_id_pool: list[str] = []
# A forked child must not hand out the ids that are in its parent's pool.
os.register_at_fork(after_in_child=_id_pool.clear)

_current: ContextVar[str | None] = ContextVar("viralfx_correlation_id", default=None)
_user: ContextVar[str | None] = ContextVar("viralfx_user_id", default=None)


def current_correlation_id() -> str | None:
    """Return the id bound to this task, or None outside a request, job or check."""
    return _current.get()


def new_correlation_id() -> str:
    """Return a new id in the form of a W3C trace id: 32 hexadecimal digits."""
    try:
        return _id_pool.pop()
    except IndexError:
        # An id is not a secret, and this generator is 4 times cheaper than os.urandom.
        digits = random.randbytes(16 * ID_BATCH_SIZE).hex()  # noqa: S311
        _id_pool.extend([digits[at : at + 32] for at in range(32, len(digits), 32)])
        return digits[:32]


def is_correlation_id(text: str) -> bool:
    """Return whether a client's id is valid: ``[A-Za-z0-9._-]{1,128}``."""
    return _VALID(text) is not None


def is_traceparent(text: str) -> bool:
    """Return whether ``text`` is a valid W3C ``traceparent`` with a trace id."""
    return _TRACEPARENT(text) is not None


def choose_correlation_id(
    correlation_id: str | None, request_id: str | None, traceparent: str | None
) -> str:
    """Choose the correlation id of a request from its headers; a missing header is None.

    The first valid one of ``X-Correlation-ID`` and ``X-Request-ID``, else the trace id of
    ``traceparent``, else a new id. An invalid value is skipped; it is never repaired or echoed.
    """
    if correlation_id is not None and _VALID(correlation_id):
        return correlation_id
    if request_id is not None and _VALID(request_id):
        return request_id
    if traceparent is not None and (match := _TRACEPARENT(traceparent)):
        return match["trace"]
    return new_correlation_id()


def correlation_id_of(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """Return the correlation id of a request, from its headers or a new one.

    If a header occurs twice, the first value counts. Two ``traceparent`` headers are both ignored,
    as W3C Trace Context requires.
    """
    for name, _ in headers:
        if name in _ID_HEADERS:
            return _choose(headers)
    return new_correlation_id()


def _choose(headers: Iterable[tuple[bytes, bytes]]) -> str:
    found: dict[bytes, str] = {}
    for name, value in headers:
        if name in _ID_HEADERS:
            # latin-1 decodes any bytes; a value that is not ASCII fails the validation later.
            if name not in found:
                found[name] = value.decode("latin-1")
            elif name == b"traceparent":
                found[name] = ""
    return choose_correlation_id(
        found.get(HEADER), found.get(b"x-request-id"), found.get(b"traceparent")
    )


def bind_correlation_id(correlation_id: str) -> None:
    """Set the id for the rest of this task and the tasks it creates; other tasks keep theirs."""
    _current.set(correlation_id)


def start_request_context(correlation_id: str) -> None:
    """Set the correlation id for the rest of this task, and clear its user id."""
    _current.set(correlation_id)
    # A server may start a task in the context of the connection's previous request.
    if _user.get() is not None:
        _user.set(None)


@contextmanager
def correlated(correlation_id: str) -> Iterator[str]:
    """Bind the id for a block, then restore the previous one."""
    token = _current.set(correlation_id)
    try:
        yield correlation_id
    finally:
        _current.reset(token)


def bind_user_id(user_id: str | None) -> None:
    """Add ``userId`` to every further log line of this request or task; None removes it.

    Call it where your application knows the user, for example in a middleware. The id may come
    from a client, so it is cut to 128 characters. Jobs that are submitted meanwhile carry it into
    their log lines and spans.
    """
    _user.set(None if user_id is None else user_id[:MAX_USER_ID_CHARACTERS])


def current_user_id() -> str | None:
    """Return the user id bound to this task, or None."""
    return _user.get()
