"""What went wrong, in one word: errors of redis-py, of the system and of TLS told apart."""

import errno
import re
import socket
import ssl
from collections.abc import Iterator
from enum import StrEnum

from redis import exceptions


class Trouble(StrEnum):
    """The code of a failed request or check."""

    REFUSED = "refused"
    """Nobody listens there."""
    UNREACHABLE = "unreachable"
    """An unknown host, or no route to it."""
    TIMEOUT = "timeout"
    """No answer in time."""
    AUTH = "auth"
    """Missing or wrong credentials, or a user who may not even ping."""
    TLS = "tls"
    """No TLS there, or a certificate that is not trusted."""
    LOADING = "loading"
    """The server is reading its data and serves nobody yet."""
    LOST = "lost"
    """A connection broke, or there is no primary at the moment."""
    POOL_EXHAUSTED = "pool_exhausted"
    """All connections of this process were in use for too long; Redis was not asked."""
    ERROR = "error"
    """Anything else: the server answered, but with an error."""


MESSAGES = {
    Trouble.REFUSED: "Redis refuses connections",
    Trouble.UNREACHABLE: "Redis cannot be reached: unknown host or no route to it",
    Trouble.TIMEOUT: "Redis does not answer in time",
    Trouble.AUTH: "Redis refuses the credentials",
    Trouble.TLS: "Redis cannot be trusted: the TLS handshake failed",
    Trouble.LOADING: "Redis is loading its data",
    Trouble.LOST: "Redis connection lost",
    Trouble.POOL_EXHAUSTED: "Redis connections are all in use",
    Trouble.ERROR: "Redis answers with an error",
}
"""For people; nothing of an error's own text, which may quote keys, addresses or worse."""


class ClientClosedError(exceptions.ConnectionError):
    """The client was closed; there is no use in trying again."""


_REFUSES_US = (
    exceptions.AuthenticationError,
    exceptions.AuthorizationError,
    exceptions.AuthenticationWrongNumberOfArgsError,
    exceptions.NoPermissionError,
)
# Replies of a server that is not the primary, or not yet, or not any more.
NOT_THE_PRIMARY = (
    exceptions.ReadOnlyError,
    exceptions.MasterDownError,
    exceptions.TryAgainError,
)
_NO_WAY = {
    errno.ENETUNREACH,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.EHOSTDOWN,
    errno.EADDRNOTAVAIL,
    errno.EACCES,  # a packet filter says no
    errno.EPERM,
}
_NUMBER = re.compile(r"\[Errno (\d+)\]").search


def trouble(error: BaseException) -> Trouble:
    """Say what an error, or what caused it, is about."""
    for cause in _causes(error):
        found = _specific(cause)
        if found is not None:
            return found
    if isinstance(error, (exceptions.ConnectionError, OSError, EOFError, *NOT_THE_PRIMARY)):
        return Trouble.LOST
    return Trouble.ERROR


def is_away(error: Exception) -> bool:
    """Tell whether Redis did not do its part: not there, not letting us in, or not answering.

    Any other error reaches who asked: a wrong command, a key of another type, a command that the
    user may not run. So does one that is not redis-py's own, whatever it is.
    """
    if not isinstance(error, exceptions.RedisError) or isinstance(
        error, exceptions.NoPermissionError
    ):
        return False
    return trouble(error) not in {Trouble.POOL_EXHAUSTED, Trouble.ERROR}


def is_exhausted(error: Exception) -> bool:
    """Tell whether a request was not made because too many others were."""
    return isinstance(error, exceptions.MaxConnectionsError)


def is_transient(error: Exception) -> bool:
    """Tell whether another attempt may do better without anybody's help.

    Wrong credentials and untrusted certificates stay so; a name that cannot be resolved may be.
    """
    return (
        is_away(error)
        and not isinstance(error, ClientClosedError)
        and trouble(error) not in {Trouble.AUTH, Trouble.TLS}
    )


# In this order: the first that an error is an instance of says what it is about.
_KINDS: tuple[tuple[type[BaseException] | tuple[type[BaseException], ...], Trouble], ...] = (
    (exceptions.MaxConnectionsError, Trouble.POOL_EXHAUSTED),
    (exceptions.BusyLoadingError, Trouble.LOADING),
    (_REFUSES_US, Trouble.AUTH),
    (ssl.SSLError, Trouble.TLS),
    (ConnectionRefusedError, Trouble.REFUSED),
    ((socket.gaierror, UnicodeError), Trouble.UNREACHABLE),  # the latter: no name at all
    ((exceptions.TimeoutError, TimeoutError), Trouble.TIMEOUT),
)


def _specific(error: BaseException) -> Trouble | None:
    if isinstance(error, ConnectionAbortedError) and "SSL handshake" in str(error):
        # It took the connection and said nothing: what speaks no TLS waits for more.
        return Trouble.TLS
    for kinds, found in _KINDS:
        if isinstance(error, kinds):
            return found
    return _by_number(error) if isinstance(error, OSError) else None


def _by_number(error: OSError) -> Trouble | None:
    number = error.errno
    if number is None and (found := _NUMBER(str(error))):
        # A name with several addresses: asyncio joins their errors into one text.
        number = int(found[1])
    if number == errno.ECONNREFUSED:
        return Trouble.REFUSED
    return Trouble.UNREACHABLE if number in _NO_WAY else None


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        # redis-py raises its own error while it handles the system's, without naming the cause.
        context = None if cause.__suppress_context__ else cause.__context__
        cause = cause.__cause__ or context
