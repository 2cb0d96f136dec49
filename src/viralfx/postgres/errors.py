"""Classification of errors from Postgres, its driver and the network."""

import contextlib
import re
import socket
import ssl
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import asyncpg
from asyncpg import exceptions as pg
from asyncpg.exceptions import InterfaceError, InternalClientError, PostgresError

from viralfx.core.errors import (
    LedgerLimitError,
    LedgerUnavailableError,
    NotMigratedError,
    UnstorableError,
    ViralFXError,
)
from viralfx.settings import CredentialsError

DATABASE_ERRORS = (
    OSError,
    PostgresError,
    InterfaceError,
    InternalClientError,
    CredentialsError,
)
"""All error types that mean that the database or the connection to it fails."""


class PoolTimeoutError(ViralFXError, TimeoutError):
    """No connection of the pool became free in time; no statement was sent."""


class NotOpenError(ViralFXError, InterfaceError):
    """The pool is not open, or no longer; no statement was sent."""

    def __init__(self, *, started: bool, closed: bool = False) -> None:
        """Name the reason, and the remedy, unless the pool was ``started`` and is being opened."""
        if closed:
            super().__init__(
                "the database's pool is closed: the application has stopped, or has failed to start"
            )
            return
        what = "the database's pool is not open yet"
        remedy = (
            "nothing has started the plugin; in a script, use `async with app.lifespan():`, or"
            " jobs.submit_sync()"
        )
        super().__init__(what if started else f"{what}: {remedy}")


class WrongServerError(ViralFXError, ConnectionError):
    """A server is not of the kind that ``target_session_attrs`` names."""

    def __init__(self, wanted: str) -> None:
        """``wanted`` is the value of ``target_session_attrs``."""
        super().__init__(wanted)
        self.wanted = wanted


class PoolerModeError(ViralFXError, ConnectionError):
    """A pooler gives the server process to another client after each transaction.

    Names of prepared statements and settings of sessions are then those of any client: a statement
    may run that another program has prepared.
    """

    def __init__(self) -> None:
        super().__init__(f"the database {_SHARED.problem}; {_SHARED.remedy}")


class NoServerError(ViralFXError, ConnectionError):
    """None of several hosts can be used."""

    def __init__(self, failures: Sequence[tuple[str, Exception]]) -> None:
        """``failures`` holds each host with its error."""
        super().__init__("; ".join(f"{name} {explain(error).problem}" for name, error in failures))
        self.failures = failures


@dataclass(frozen=True, slots=True)
class ErrorExplanation:
    """Code, problem and remedy of an error; none of them contains data or a secret."""

    code: str
    problem: str
    remedy: str


_READ_ONLY = ErrorExplanation("read_only", "accepts no writes", "name the primary")
_BY_CLASS: tuple[
    tuple[type[BaseException] | tuple[type[BaseException], ...], ErrorExplanation], ...
] = (
    (
        pg.InvalidPasswordError,
        ErrorExplanation("auth", "refuses the user or password", "check the user and password"),
    ),
    (
        # An unknown user with trust authentication, or no matching rule in pg_hba.conf.
        pg.InvalidAuthorizationSpecificationError,
        ErrorExplanation(
            "auth", "does not admit this user", "check user, pg_hba.conf and DB_TLS_MODE"
        ),
    ),
    (
        pg.InvalidCatalogNameError,
        ErrorExplanation(
            "no_database", "has no database of that name", "check the name, or create it"
        ),
    ),
    (
        pg.InvalidSchemaNameError,
        ErrorExplanation(
            "no_schema", "lacks the schema", "run `viralfx migrate`, and check DB_SCHEMA"
        ),
    ),
    (
        pg.TooManyConnectionsError,
        ErrorExplanation(
            "too_many_connections",
            "has no connection left",
            "lower DB_POOL_MAX or raise max_connections",
        ),
    ),
    (
        pg.DiskFullError,
        ErrorExplanation("disk_full", "has a full disk", "free some of it, or enlarge it"),
    ),
    (
        (pg.CannotConnectNowError, pg.AdminShutdownError, pg.CrashShutdownError),
        ErrorExplanation("restarting", "is starting or stopping", "wait, or check its log"),
    ),
    (
        pg.InsufficientPrivilegeError,
        ErrorExplanation("forbidden", "denies this user a permission", "grant it"),
    ),
    (
        pg.QueryCanceledError,
        ErrorExplanation("timeout", "cancelled a statement", "check its load and locks"),
    ),
    (
        pg.LockNotAvailableError,
        ErrorExplanation("locked", "has a lock held too long", "check which session holds it"),
    ),
    (pg.ReadOnlySQLTransactionError, _READ_ONLY),
    (
        ssl.SSLError,
        ErrorExplanation(
            "tls", "cannot be trusted over TLS", "check DB_TLS_MODE and DB_TLS_CA_FILE"
        ),
    ),
    (
        # UnicodeError: the text cannot be a host name.
        (socket.gaierror, UnicodeError),
        ErrorExplanation("unreachable", "has an unknown host name", "check the host"),
    ),
    (
        TimeoutError,
        ErrorExplanation("timeout", "does not answer", "check the server and the network"),
    ),
    (
        ConnectionRefusedError,
        ErrorExplanation(
            "refused", "refuses connections", "check host and port, and that it is running"
        ),
    ),
    (
        (pg.PostgresConnectionError, InterfaceError, InternalClientError, ConnectionError),
        ErrorExplanation("lost", "closed the connection", "check its log"),
    ),
    (
        FileNotFoundError,
        ErrorExplanation("unreachable", "has no socket in that folder", "check the folder"),
    ),
)
_TLS_EXPIRED = ErrorExplanation(
    "tls", "presents a certificate that has expired", "renew it on the server"
)
_AUTH = _BY_CLASS[0][1]
POOLER_FULL = "pooler_full"
_TOO_MANY_CLIENTS = ErrorExplanation(
    POOLER_FULL,
    "is behind a pooler that takes no more clients (max_client_conn)",
    "raise the pooler's max_client_conn, or lower DB_POOL_MAX",
)
_FULL_IN_SUPAVISOR = re.compile(r"\bmax client(?:s| connections) reached", re.IGNORECASE).search
"""Matches Supavisor's words; its SQLSTATE is XX000."""
POOLER_REFUSAL = "pooler_mode"
_SHARED = ErrorExplanation(
    POOLER_REFUSAL,
    "is behind a pooler that gives the server process to another client after each transaction",
    "set DB_POOLER=transaction",
)
_OF_SHARED_PROCESS = (
    PoolerModeError,
    pg.InvalidSQLStatementNameError,  # 26000: the statement is that of another server process
    pg.DuplicatePreparedStatementError,  # 42P05: another client has taken the name
)
_CUT_OFF = ErrorExplanation(
    "pooler_cut_off",
    "is behind a pooler that cannot log in to it",
    "check the server, and the pooler's log",
)
# PgBouncer's words: all are SQLSTATE 08P01, or the reason with which it closed a connection.
_BY_POOLER = (
    ("SASL authentication failed", _AUTH),
    ("password authentication failed", _AUTH),
    ("no authentication method is found", _BY_CLASS[1][1]),
    (
        "query_wait_timeout",
        ErrorExplanation(
            POOLER_FULL,
            "is behind a pooler that had no connection to it in time (query_wait_timeout)",
            "check that the pooler is not paused and reaches the server, or raise its pool size",
        ),
    ),
    (
        "client connections exceeded",
        ErrorExplanation(
            POOLER_FULL,
            "is behind a pooler that takes no more clients of this user or database",
            "raise max_user_client_connections or max_db_client_connections, or lower DB_POOL_MAX",
        ),
    ),
    ("no more connections allowed", _TOO_MANY_CLIENTS),
    ("parameters, but prepared statement", _SHARED),
    (
        "statement pooling mode",
        ErrorExplanation(
            POOLER_REFUSAL,
            "is behind a pooler in statement mode, which allows no transactions",
            "set pool_mode=transaction in the pooler",
        ),
    ),
    (
        "server conn crashed",
        ErrorExplanation(
            "lost", "closed its connection to a pooler", "check its log, and that of the pooler"
        ),
    ),
    (
        "shutting down",
        ErrorExplanation(
            "restarting", "is behind a pooler that is stopping", "wait, or check the pooler's log"
        ),
    ),
    ("server login has been failing", _CUT_OFF),
    ("client_login_timeout", _CUT_OFF),
    ("is disabled", ErrorExplanation("pooler_cut_off", "is disabled in a pooler", "enable it")),
    (
        "SSL required",
        ErrorExplanation("tls", "is behind a pooler that demands TLS", "see DB_TLS_MODE"),
    ),
)
_PROTOCOL = ErrorExplanation(
    "protocol", "broke off the connection (SQLSTATE 08P01)", "check its log, and that of a pooler"
)
_REFUSED_PARAMETER = re.compile(r"unsupported startup parameter(?: in options)?: [a-z_]+")
"""Matches the pooler's words, with the name of a setting and without its value."""
_TLS_NAME_MISMATCH = ErrorExplanation(
    "tls", "presents a certificate for another host", "check the host, or see DB_TLS_MODE"
)
_TLS_CLIENT = ErrorExplanation(
    "tls",
    "refuses the client certificate",
    "check that DB_TLS_CERT_FILE has not expired, and that the server trusts its issuer",
)
_BY_VERIFICATION = {10: _TLS_EXPIRED, 62: _TLS_NAME_MISMATCH, 64: _TLS_NAME_MISMATCH}
"""OpenSSL's verification codes: expired, and a host name or address that does not match."""
_TLS_REFUSED = ErrorExplanation(
    "tls", "does not support TLS", "enable TLS on the server, or see DB_TLS_MODE"
)
_UNREACHABLE = ErrorExplanation(
    "unreachable", "cannot be reached", "check the host and the network"
)
_UNKNOWN = ErrorExplanation("error", "failed", "the log has the error")


_WRONG_KIND = {
    "read-write": _READ_ONLY,
    "primary": ErrorExplanation("read_only", "is a standby", "name the primary"),
}
_NO_STANDBY = ErrorExplanation(
    "no_standby", "is the primary", "name a standby, or see target_session_attrs"
)
_VAGUE_CODES = ("lost", "timeout", "refused", "unreachable")
"""Codes of errors that say little about the cause, the most telling first."""


def most_telling(errors: Sequence[Exception]) -> Exception:
    """Return the error of several servers or addresses that says most about the cause."""

    def vagueness(error: Exception) -> int:
        code = explain(error).code
        return _VAGUE_CODES.index(code) + 1 if code in _VAGUE_CODES else 0

    return min(errors, key=vagueness)


def _explain_own(error: BaseException) -> ErrorExplanation | None:
    if isinstance(error, NoServerError):
        main = explain(most_telling([one for _, one in error.failures]))
        return ErrorExplanation(main.code, f"has no usable server: {error}", main.remedy)
    if isinstance(error, CredentialsError):
        return ErrorExplanation(
            "auth", f"cannot be logged in to: {error}", "correct that callable; see the log"
        )
    if isinstance(error, WrongServerError):
        return _WRONG_KIND.get(error.wanted, _NO_STANDBY)
    if _is_alert_about_certificate(error):
        return _TLS_CLIENT
    return _explain_pooler(error) or _BY_VERIFICATION.get(getattr(error, "verify_code", 0))


def _is_foreign_result(error: BaseException) -> bool:
    # The driver's words for the result of another client's statement of the same name.
    words = "is different from what was described"
    return isinstance(error, InternalClientError) and words in str(error)


def _is_alert_about_certificate(error: BaseException | None) -> bool:
    # With TLS 1.3 the server verifies the client after the handshake, so that the driver sees a
    # lost connection whose cause is the alert.
    while error is not None:
        reason = str(getattr(error, "reason", "")) if isinstance(error, ssl.SSLError) else ""
        if "ALERT" in reason and ("CERT" in reason or "UNKNOWN_CA" in reason):
            return True
        error = error.__cause__
    return False


def explain(error: BaseException) -> ErrorExplanation:
    """Return code, problem and remedy of an error."""
    if (explained := _explain_own(error)) is not None:
        return explained
    if refuses_tls(error):
        return _TLS_REFUSED
    for kinds, explained in _BY_CLASS:
        if isinstance(error, kinds):
            return explained
    if isinstance(error, OSError):
        # If a name has several addresses, asyncio joins their errors into one text.
        text = str(error)
        refused = "Connect call failed" in text or "Connection refused" in text
        return explain(ConnectionRefusedError()) if refused else _UNREACHABLE
    if is_of_login(error) and isinstance(error, PostgresError):
        return ErrorExplanation(
            "login_refused",
            f"refuses the login (SQLSTATE {getattr(error, 'sqlstate', None)})",
            "check its log, and that of a pooler",
        )
    return _UNKNOWN


def mark_login(error: Exception) -> None:
    """Mark an error as one of connecting and logging in: no statement of a caller was sent."""
    error.of_login = True  # type: ignore[attr-defined]  # see is_of_login


def is_of_login(error: BaseException) -> bool:
    """Return True for an error that :func:`mark_login` marked."""
    return getattr(error, "of_login", False)


def is_login_refused(error: BaseException) -> bool:
    """Return True if a server refused the user or the password."""
    if isinstance(error, NoServerError):
        return any(is_login_refused(one) for _, one in error.failures)
    refused = (pg.InvalidPasswordError, pg.InvalidAuthorizationSpecificationError)
    by_pooler = isinstance(error, pg.ProtocolViolationError) and explain(error) is _AUTH
    return isinstance(error, refused) or by_pooler


def _explain_pooler(error: BaseException) -> ErrorExplanation | None:
    message = str(error.args[0]) if error.args else ""
    if isinstance(error, _OF_SHARED_PROCESS) or _is_foreign_result(error):
        return _SHARED
    if not isinstance(error, pg.PostgresConnectionError):
        full = isinstance(error, pg.InternalServerError) and _FULL_IN_SUPAVISOR(message)
        return _TOO_MANY_CLIENTS if full else None
    if refused := _REFUSED_PARAMETER.search(message):
        return ErrorExplanation(
            POOLER_REFUSAL,
            f"is behind a pooler that refuses the settings of a session ({refused[0]})",
            "set DB_POOLER to the pooler's mode: session or transaction",
        )
    for words, explained in _BY_POOLER:
        if words in message:
            return explained
    # An old or another pooler; a server sends this code only for a defect of the driver.
    return _PROTOCOL if isinstance(error, pg.ProtocolViolationError) else None


def refuses_tls(error: BaseException) -> bool:
    """Return True if the server refused TLS."""
    return isinstance(error, ConnectionError) and "SSL upgrade" in str(error)


def server_message(error: BaseException) -> str | None:
    """Return the server's message as one line; None if the error is not from the server.

    Details and hints are omitted because they may quote data.
    """
    return error.args[0] if isinstance(error, PostgresError) and error.args else None


_NOT_MIGRATED = (
    asyncpg.UndefinedTableError,
    asyncpg.UndefinedColumnError,
    asyncpg.InvalidSchemaNameError,
)
BAD_VALUE = (asyncpg.DataError, ValueError)
"""Errors of the server, the driver and our own validation for a value that cannot be stored."""

_NOT_OF_CONTENT = (
    "08",  # the connection
    "25",  # a server that accepts no writes
    "26",  # a prepared statement, which another server process has
    "28",  # the user
    "3D",
    "3F",
    "40",  # another transaction
    "42P05",  # as 26
    "53",  # resources
    "55",  # locks
    "57",  # an operator
    "58",  # the system
    "F0",  # the configuration
    "XX001",  # a damaged table or index
    "XX002",
)
"""Beginnings of the SQLSTATEs that do not depend on the values of a statement."""
_SESSION_ENDS = ("FATAL", "PANIC")
"""Severities with which a server or pooler ends a session: it does not judge a statement so."""
_LIMITS = (TimeoutError, pg.QueryCanceledError, pg.LockNotAvailableError, pg.OutOfMemoryError)


def refusal(error: BaseException | None) -> UnstorableError | None:
    """Return the refusal of a call's content that an error means; None for any other error.

    The error is that of the driver, or the one that :func:`map_errors` made of it.

    Each SQLSTATE is a refusal that the server does not send for a state of its own: also those of
    a user's trigger, of a constraint and of a limit of the server, such as its stack depth.
    """
    if isinstance(error, LedgerUnavailableError):
        error = error.__cause__
    if error is None or is_of_login(error):
        return None
    if not isinstance(error, PostgresError):
        bad = isinstance(error, BAD_VALUE) and not isinstance(error, ssl.SSLError)
        return UnstorableError(str(error)) if bad else None
    code: str | None = getattr(error, "sqlstate", None)
    own = (*_NOT_MIGRATED, pg.InvalidCachedStatementError)
    if code is None or code.startswith(_NOT_OF_CONTENT) or isinstance(error, own):
        return None
    if error.severity_en in _SESSION_ENDS:
        return None
    return UnstorableError(f"{server_message(error)} (SQLSTATE {code})", code)


def is_fault_of_server(code: str | None) -> bool:
    """Return True if a refusal has a cause that other values of the sender would not change.

    Examples are a missing permission and a function that does not exist.
    """
    return code is not None and code.startswith(("0A", "42", "XX"))


@contextlib.contextmanager
def map_errors() -> Iterator[None]:
    """Convert database errors to :class:`LedgerUnavailableError`.

    Except ``BAD_VALUE`` of a statement, which says something about its values.
    """
    try:
        yield
    except ssl.SSLError as error:
        # Before the others: an error of a certificate is a ``ValueError``, too.
        raise unavailable(error) from error
    except BAD_VALUE as error:
        if is_of_login(error):
            raise unavailable(error) from error
        raise
    except DATABASE_ERRORS as error:
        raise unavailable(error) from error


def unavailable(error: Exception) -> LedgerUnavailableError:
    """Convert a database error to an error of the ledger's port."""
    # A trigger of the user's may call a function that is missing, too.
    missing = isinstance(error, asyncpg.UndefinedFunctionError) and "viralfx_" in str(error)
    if missing or isinstance(error, _NOT_MIGRATED):
        return NotMigratedError("the tables of jobs are missing: run `viralfx migrate`")
    if isinstance(error, NotOpenError):
        return LedgerUnavailableError(str(error), explain(error).code)
    # Without a connection no statement was sent, so none asked for too much.
    sent = not (is_of_login(error) or isinstance(error, PoolTimeoutError))
    limited = isinstance(error, _LIMITS) and sent
    kind = LedgerLimitError if limited else LedgerUnavailableError
    refused, explanation = refusal(error), explain(error)
    problem = explanation.problem if refused is None else f"refuses the call: {refused}"
    return kind(f"the database {problem}", explanation.code)
