"""Classification of errors from redis-py, the system and TLS."""

import errno
import re
import socket
import ssl
from collections.abc import Iterator
from enum import StrEnum

from redis import exceptions

from viralfx.settings import CredentialsError


class RedisProblem(StrEnum):
    """The code of a failed request or check."""

    REFUSED = "refused"
    """The port is closed."""
    UNREACHABLE = "unreachable"
    """An unknown host, no route to it, or no such socket."""
    TIMEOUT = "timeout"
    """No response in time."""
    AUTH = "auth"
    """Missing or wrong credentials, or a user without permission to ping."""
    TLS = "tls"
    """The server does not support TLS, or its certificate is not trusted."""
    LOADING = "loading"
    """The server is loading its data and serves no requests yet."""
    LOST = "lost"
    """The connection was lost, or there is no primary at the moment."""
    TOO_MANY_CONNECTIONS = "too_many_connections"
    """The server has as many clients as its ``maxclients`` allows."""
    POOL_EXHAUSTED = "pool_exhausted"
    """All connections of this process were in use for too long; no request was sent."""
    READ_ONLY = "read_only"
    """The server is a replica, which refuses writes."""
    MEMORY_FULL = "memory_full"
    """The server has no memory for writes, and evicts nothing."""
    WRITES_REFUSED = "writes_refused"
    """The server cannot save its data, or has too few replicas, and refuses writes."""
    CLUSTER = "cluster"
    """The server is a node of a Redis Cluster, which is not supported."""
    SENTINEL = "sentinel"
    """``REDIS_HOST`` names a Sentinel, which keeps no data."""
    UNKNOWN_PRIMARY = "unknown_primary"
    """The Sentinels monitor no primary of that name."""
    ERROR = "error"
    """Anything else: the server replied with an error."""


MESSAGES = {
    RedisProblem.REFUSED: "Redis refuses connections",
    RedisProblem.UNREACHABLE: "Redis cannot be reached: unknown host, no route to it, or no socket",
    RedisProblem.TIMEOUT: "Redis does not answer in time",
    RedisProblem.AUTH: "Redis refuses the credentials",
    RedisProblem.TLS: "Redis cannot be trusted: the TLS handshake failed",
    RedisProblem.LOADING: "Redis is loading its data",
    RedisProblem.LOST: "Redis connection lost",
    RedisProblem.TOO_MANY_CONNECTIONS: (
        "Redis takes no more clients; raise maxclients, or check which clients are connected"
    ),
    RedisProblem.POOL_EXHAUSTED: "Redis connections are all in use",
    RedisProblem.READ_ONLY: (
        "Redis is a replica and refuses writes; set REDIS_HOST to the primary, or use Sentinel"
    ),
    RedisProblem.MEMORY_FULL: (
        "Redis is full and refuses writes; raise maxmemory, or set a maxmemory-policy that evicts"
    ),
    RedisProblem.WRITES_REFUSED: (
        "Redis refuses writes: it cannot save its data, or has too few replicas; check its log"
    ),
    RedisProblem.CLUSTER: (
        "Redis is a node of a Redis Cluster, which is not supported; use a server without cluster"
        " mode"
    ),
    RedisProblem.SENTINEL: (
        "REDIS_HOST is a Sentinel, which keeps no data; set REDIS_SENTINELS to it, and"
        " REDIS_SENTINEL_ENABLED=true"
    ),
    RedisProblem.UNKNOWN_PRIMARY: "Sentinel knows no primary of that name",
    RedisProblem.ERROR: "Redis answers with an error",
}
"""Texts for each code. They do not quote errors, which may contain keys or addresses."""

WRITE_PROBLEMS = frozenset(
    {RedisProblem.READ_ONLY, RedisProblem.MEMORY_FULL, RedisProblem.WRITES_REFUSED}
)
"""The server answers reads and refuses writes."""


class ClientClosedError(exceptions.ConnectionError):
    """The client is closed; the request is not retried."""


class WrongServerError(exceptions.ConnectionError):
    """The server cannot be used as it is configured; the request is not retried.

    The message names the remedy, and holds no secret.
    """

    def __init__(self, problem: RedisProblem, message: str | None = None) -> None:
        super().__init__(message or MESSAGES[problem])
        self.problem = problem


class DemotedError(exceptions.ConnectionError):
    """The primary became a replica. The connection was closed, and a new one may find another."""


class IdleConnectionError(exceptions.TimeoutError):
    """A connection that was idle before does not answer: a firewall may have dropped it."""


_AUTH_ERRORS = (
    exceptions.AuthenticationError,
    exceptions.AuthorizationError,
    exceptions.AuthenticationWrongNumberOfArgsError,
    exceptions.NoPermissionError,
)
# Replies of a server that is not the primary at the moment.
NOT_THE_PRIMARY = (
    exceptions.MasterDownError,
    exceptions.TryAgainError,
)
_UNREACHABLE_ERRNOS = {
    errno.ENETUNREACH,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.EHOSTDOWN,
    errno.EADDRNOTAVAIL,
    errno.EACCES,  # rejected by a packet filter
    errno.EPERM,
    errno.ENOENT,  # no such socket
}
# At the beginning, or after redis-py's words about a command of a pipeline.
_WRITES_REFUSED = re.compile(r"(?:^|error: )[('\"]*(?:MISCONF|NOREPLICAS) ").search
_NUMBER = re.compile(r"\[Errno (\d+)\]").search


def message_of(error: BaseException) -> str:
    """Return a text for an error that names the remedy; it quotes no secret."""
    for cause in _causes(error):
        if isinstance(cause, WrongServerError):
            return str(cause)
        if isinstance(cause, CredentialsError):
            return f"There are no credentials for Redis; {cause}"
    return MESSAGES[problem_of(error)]


def problem_of(error: BaseException) -> RedisProblem:
    """Return the code of an error, based on the error and its causes."""
    for cause in _causes(error):
        found = _specific(cause)
        if found is not None:
            return found
    if isinstance(error, (exceptions.ConnectionError, OSError, EOFError, *NOT_THE_PRIMARY)):
        return RedisProblem.LOST
    return RedisProblem.ERROR


def is_unavailable(error: Exception) -> bool:
    """Return True if Redis is unreachable, refuses the login, or does not respond.

    False for errors that belong to the caller: a wrong command, a key of another type, a missing
    permission, and errors that are not redis-py's. False also while Redis refuses writes only.
    """
    if not isinstance(error, exceptions.RedisError) or isinstance(
        error, exceptions.NoPermissionError
    ):
        return False
    return problem_of(error) not in {
        RedisProblem.POOL_EXHAUSTED,
        RedisProblem.ERROR,
        *WRITE_PROBLEMS,
    }


def refuses_writes(error: Exception) -> bool:
    """Return True if Redis refuses writes of all callers: a replica, or a server without room."""
    return isinstance(error, exceptions.RedisError) and problem_of(error) in WRITE_PROBLEMS


def is_pool_exhausted(error: Exception) -> bool:
    """Return True if the pool had no free connection in time."""
    return isinstance(error, exceptions.MaxConnectionsError)


def is_transient(error: Exception) -> bool:
    """Return True if another attempt may succeed without intervention.

    False for wrong credentials, untrusted certificates and a server that cannot be used; True for
    a failed name lookup.
    """
    return (
        is_unavailable(error)
        and not isinstance(error, (ClientClosedError, WrongServerError))
        and problem_of(error) not in {RedisProblem.AUTH, RedisProblem.TLS, RedisProblem.CLUSTER}
    )


# The first matching type determines the code.
_KINDS: tuple[tuple[type[BaseException] | tuple[type[BaseException], ...], RedisProblem], ...] = (
    (exceptions.MaxConnectionsError, RedisProblem.POOL_EXHAUSTED),
    (DemotedError, RedisProblem.LOST),
    (exceptions.ReadOnlyError, RedisProblem.READ_ONLY),
    (exceptions.OutOfMemoryError, RedisProblem.MEMORY_FULL),
    ((exceptions.MovedError, exceptions.ClusterDownError), RedisProblem.CLUSTER),
    (exceptions.BusyLoadingError, RedisProblem.LOADING),
    (_AUTH_ERRORS, RedisProblem.AUTH),
    (ssl.SSLError, RedisProblem.TLS),
    (ConnectionRefusedError, RedisProblem.REFUSED),
    ((socket.gaierror, UnicodeError), RedisProblem.UNREACHABLE),  # the latter: not a valid name
    ((exceptions.TimeoutError, TimeoutError), RedisProblem.TIMEOUT),
)


def _specific(error: BaseException) -> RedisProblem | None:
    if isinstance(error, WrongServerError):
        return error.problem
    if isinstance(error, exceptions.ResponseError) and _WRITES_REFUSED(str(error)):
        return RedisProblem.WRITES_REFUSED
    if isinstance(error, exceptions.ConnectionError) and "number of clients" in str(error):
        return RedisProblem.TOO_MANY_CONNECTIONS
    if isinstance(error, ConnectionAbortedError) and "SSL handshake" in str(error):
        # A server without TLS accepts the connection and waits for more data.
        return RedisProblem.TLS
    for kinds, found in _KINDS:
        if isinstance(error, kinds):
            return found
    return _by_number(error) if isinstance(error, OSError) else None


def _by_number(error: OSError) -> RedisProblem | None:
    number = error.errno
    if number is None and (found := _NUMBER(str(error))):
        # If a name has several addresses, asyncio joins their errors into one text.
        number = int(found[1])
    if number == errno.ECONNREFUSED:
        return RedisProblem.REFUSED
    return RedisProblem.UNREACHABLE if number in _UNREACHABLE_ERRNOS else None


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        # redis-py raises its own error while it handles the system's, without `from`.
        context = None if cause.__suppress_context__ else cause.__context__
        cause = cause.__cause__ or context
