"""What an error of Postgres, of its driver or of the network on the way means."""

import socket
import ssl
from dataclasses import dataclass

from asyncpg import exceptions as pg
from asyncpg.exceptions import InterfaceError, InternalClientError, PostgresError

from viralfx.domain.errors import ViralFXError
from viralfx.domain.resilience.backoff import Backoff, Jitter
from viralfx.domain.resilience.retry_policy import BackoffPolicy

DATABASE_ERRORS = (OSError, PostgresError, InterfaceError, InternalClientError)
"""Every kind of error that the driver raises for a database that does not do what it should."""


class PoolTimeoutError(ViralFXError, TimeoutError):
    """No connection of the pool became free in time; nothing was sent to the database."""


@dataclass(frozen=True, slots=True)
class Trouble:
    """An error, explained. ``remedy`` says what to look at; neither holds data or a secret."""

    code: str
    problem: str
    remedy: str


_BY_CLASS: tuple[tuple[type[BaseException] | tuple[type[BaseException], ...], Trouble], ...] = (
    (
        pg.InvalidPasswordError,
        Trouble("auth", "refuses the user or password", "check the user and password"),
    ),
    (
        # No such user where no password is asked for, or no rule for it, from here, without TLS.
        pg.InvalidAuthorizationSpecificationError,
        Trouble("auth", "does not let this user in", "check user, pg_hba.conf and DB_TLS_MODE"),
    ),
    (
        pg.InvalidCatalogNameError,
        Trouble("no_database", "has no database of that name", "check the name, or create it"),
    ),
    (
        pg.InvalidSchemaNameError,
        Trouble("no_schema", "has no schema of that name", "check the name, or create it"),
    ),
    (
        pg.TooManyConnectionsError,
        Trouble(
            "too_many_connections",
            "has no connection left",
            "lower DB_POOL_MAX or raise max_connections",
        ),
    ),
    (
        (pg.CannotConnectNowError, pg.AdminShutdownError, pg.CrashShutdownError),
        Trouble("restarting", "is starting or stopping", "wait, or look at its log"),
    ),
    (
        pg.InsufficientPrivilegeError,
        Trouble("forbidden", "denies this user a permission", "grant it"),
    ),
    (
        pg.QueryCanceledError,
        Trouble("timeout", "cancelled a statement", "look at its load and locks"),
    ),
    (
        pg.LockNotAvailableError,
        Trouble("locked", "has something locked", "look at what holds it"),
    ),
    (
        pg.ReadOnlySQLTransactionError,
        Trouble("read_only", "accepts no writes", "name the primary"),
    ),
    (
        ssl.SSLError,
        Trouble("tls", "cannot be trusted over TLS", "check DB_TLS_MODE and DB_TLS_CA_FILE"),
    ),
    (
        # The second is what no name of a host can look like.
        (socket.gaierror, UnicodeError),
        Trouble("unreachable", "has a host name that is not known", "check the host"),
    ),
    (
        TimeoutError,
        Trouble("timeout", "does not answer", "look at the server, and at what is in between"),
    ),
    (
        ConnectionRefusedError,
        Trouble("refused", "refuses connections", "check host and port, and that it runs"),
    ),
    (
        (pg.PostgresConnectionError, InterfaceError, InternalClientError, ConnectionError),
        Trouble("lost", "closed the connection", "look at its log"),
    ),
    (
        FileNotFoundError,
        Trouble("unreachable", "has no socket in that folder", "check the folder"),
    ),
)
_TLS_OTHER_NAME = Trouble(
    "tls", "shows a certificate for another host", "check the host, or see DB_TLS_MODE"
)
_OTHER_NAME = {62, 64}
"""OpenSSL's numbers for a host name and for an address that the certificate is not for."""
_TLS_REFUSED = Trouble("tls", "speaks no TLS", "turn it on there, or see DB_TLS_MODE")
_UNREACHABLE = Trouble("unreachable", "cannot be reached", "check the host and the network")
_UNKNOWN = Trouble("error", "failed", "the log has the error")


def explain(error: BaseException) -> Trouble:
    """Say what an error means, for a check's code and a person's eyes."""
    if refuses_tls(error):
        return _TLS_REFUSED
    if getattr(error, "verify_code", None) in _OTHER_NAME:
        return _TLS_OTHER_NAME
    for kinds, trouble in _BY_CLASS:
        if isinstance(error, kinds):
            return trouble
    if isinstance(error, OSError):
        # Several addresses of one name, all tried, come as one error with its parts as text.
        text = str(error)
        refused = "Connect call failed" in text or "Connection refused" in text
        return explain(ConnectionRefusedError()) if refused else _UNREACHABLE
    return _UNKNOWN


def refuses_tls(error: BaseException) -> bool:
    """Tell whether the server said that it speaks no TLS."""
    return isinstance(error, ConnectionError) and "SSL upgrade" in str(error)


_TRANSIENT = (
    pg.PostgresConnectionError,
    pg.CannotConnectNowError,
    pg.AdminShutdownError,
    pg.CrashShutdownError,
    pg.TooManyConnectionsError,
    pg.SerializationError,
    pg.DeadlockDetectedError,
)
_NEVER = (PoolTimeoutError, ssl.SSLError, socket.gaierror, PermissionError, FileNotFoundError)


def is_transient(error: BaseException) -> bool:
    """Tell whether the same call may well succeed soon.

    That is: connections lost or refused, a server that restarts or has no connection left, and
    transactions that lost against another (SQLSTATE class 08, 40001, 40P01, 53300, 57P01-57P03;
    see "PostgreSQL Error Codes" in its manual). A pool that gave out no connection in time is not:
    who waited that long must not double the queue.
    """
    if getattr(error, "not_the_database", False):
        return False
    if isinstance(error, _NEVER) or refuses_tls(error):
        return False
    if isinstance(error, InternalClientError):
        # Its connection has been told that the server ends it, and waits for the end.
        return "cannot switch to state" in str(error)
    if isinstance(error, InterfaceError):
        # The driver's words for a connection that is gone, and so went back to the pool, which has
        # none of ours in use; its other uses are mistakes in the code, or a pool that is closed.
        text = str(error)
        return "connection" in text and ("closed" in text or "released back" in text)
    return isinstance(error, (*_TRANSIENT, OSError))


def said_by_server(error: BaseException) -> str | None:
    """Return the server's own words, in one line; None when they are somebody else's.

    Its details and hints are left out: they may quote data.
    """
    return error.args[0] if isinstance(error, PostgresError) and error.args else None


def is_rolled_back(error: BaseException) -> bool:
    """Tell whether the server itself said that the transaction had no effect."""
    unknown = pg.StatementCompletionUnknownError
    lost = (pg.PostgresConnectionError, pg.AdminShutdownError, pg.CrashShutdownError, unknown)
    return isinstance(error, PostgresError) and not isinstance(error, lost)


def is_loss(error: BaseException) -> bool:
    """Tell whether an error gives reason to doubt the database, rather than the statement."""
    return is_transient(error) and not isinstance(
        error, pg.SerializationError | pg.DeadlockDetectedError
    )


def retry_policy(attempts: int = 3) -> BackoffPolicy:
    """Return the policy of this technology: transient errors, soon and at random moments.

    What lost against another transaction would meet it again, were the waits the same for both.
    Raises ``ValueError`` for a number of attempts below one.
    """
    return BackoffPolicy(
        attempts=attempts,
        backoff=Backoff(base=0.1, cap=5.0, jitter=Jitter.FULL),
        retry_on=is_transient,
    )
