"""Classification of errors of Postgres, its driver and the network."""

import asyncio
import re
import socket
import ssl
from collections.abc import Sequence

import asyncpg
import pytest
from asyncpg import exceptions as pg

from viralfx.core.errors import LedgerLimitError, LedgerUnavailableError
from viralfx.postgres.errors import (
    BAD_VALUE,
    PoolerModeError,
    PoolTimeoutError,
    explain,
    map_errors,
    mark_login,
    refusal,
    unavailable,
)
from viralfx.postgres.retry import (
    Place,
    in_portions,
    is_loss,
    is_rolled_back,
    is_transient,
)

SECRET = "hunter2"


def name_mismatch(code: int) -> ssl.SSLCertVerificationError:
    """Return an error about a certificate for another host."""
    error = ssl.SSLCertVerificationError(1, SECRET)
    error.verify_code = code
    return error


def of_login(error: Exception) -> Exception:
    """Return an error that was raised before any statement of a caller."""
    mark_login(error)
    return error


def ended(error: pg.PostgresError) -> Exception:
    """Return an error with which the server, or a pooler, ended the session."""
    error.severity_en = "FATAL"
    return error


ENDING = asyncpg.InternalClientError(
    "cannot switch to state 15; another operation (2) is in progress"
)
"""The driver's error between the server's announcement of a disconnect and the disconnect."""

NO_TRANSACTIONS = pg.ConnectionDoesNotExistError(
    "connection was closed in the middle of operation:"
    " transaction blocks not allowed in statement pooling mode"
)

CODES: list[tuple[BaseException, str]] = [
    (pg.InvalidPasswordError(SECRET), "auth"),
    (pg.InvalidAuthorizationSpecificationError(SECRET), "auth"),
    (pg.InvalidCatalogNameError(SECRET), "no_database"),
    (pg.InvalidSchemaNameError(SECRET), "no_schema"),
    (pg.LockNotAvailableError(SECRET), "locked"),
    (pg.TooManyConnectionsError(SECRET), "too_many_connections"),
    (pg.CannotConnectNowError(SECRET), "restarting"),
    (pg.AdminShutdownError(SECRET), "restarting"),
    (pg.CrashShutdownError(SECRET), "restarting"),
    (pg.InsufficientPrivilegeError(SECRET), "forbidden"),
    (pg.QueryCanceledError(SECRET), "timeout"),
    (pg.ReadOnlySQLTransactionError(SECRET), "read_only"),
    (ssl.SSLError(1, SECRET), "tls"),
    (ssl.SSLCertVerificationError(1, SECRET), "tls"),
    (name_mismatch(62), "tls"),
    (name_mismatch(64), "tls"),
    (ConnectionError(f'PostgreSQL server at "{SECRET}" rejected SSL upgrade'), "tls"),
    (socket.gaierror(-2, SECRET), "unreachable"),
    (UnicodeError(SECRET), "unreachable"),
    (FileNotFoundError(2, SECRET), "unreachable"),
    (OSError(113, SECRET), "unreachable"),
    (PermissionError(13, SECRET), "unreachable"),
    (ConnectionRefusedError(111, SECRET), "refused"),
    (OSError(f"Multiple exceptions: [Errno 111] Connect call failed ('{SECRET}', 1)"), "refused"),
    (TimeoutError(), "timeout"),
    (PoolTimeoutError(SECRET), "timeout"),
    (pg.ConnectionDoesNotExistError(SECRET), "lost"),
    (pg.ProtocolViolationError(SECRET), "protocol"),
    (pg.ProtocolViolationError("SASL authentication failed"), "auth"),
    (pg.ProtocolViolationError(f"unsupported startup parameter: jit={SECRET}"), "pooler_mode"),
    (pg.ProtocolViolationError("no more connections allowed (max_client_conn)"), "pooler_full"),
    (
        pg.ProtocolViolationError("client connections exceeded (max_db_client_connections)"),
        "pooler_full",
    ),
    (
        pg.ProtocolViolationError("client connections exceeded (max_user_client_connections)"),
        "pooler_full",
    ),
    (pg.ProtocolViolationError("no authentication method is found"), "auth"),
    (pg.ProtocolViolationError("SSL required"), "tls"),
    (pg.ProtocolViolationError("client_login_timeout (server down)"), "pooler_cut_off"),
    (pg.ProtocolViolationError(f'database "{SECRET}" is disabled'), "pooler_cut_off"),
    (NO_TRANSACTIONS, "pooler_mode"),
    (pg.ProtocolViolationError("query_wait_timeout"), "pooler_full"),
    (pg.ProtocolViolationError("server conn crashed?"), "lost"),
    (pg.ProtocolViolationError("pooler is shutting down"), "restarting"),
    (
        pg.ConnectionDoesNotExistError(
            "connection was closed in the middle of operation: query_wait_timeout"
        ),
        "pooler_full",
    ),
    (
        pg.ProtocolViolationError(f"server login has been failing, cached error: {SECRET}"),
        "pooler_cut_off",
    ),
    (ConnectionResetError(104, SECRET), "lost"),
    (pg.InternalServerError("Max client connections reached"), "pooler_full"),
    (pg.InternalServerError("MaxClientsInSessionMode: max clients reached"), "pooler_full"),
    (pg.InvalidSQLStatementNameError(SECRET), "pooler_mode"),
    (pg.DuplicatePreparedStatementError(SECRET), "pooler_mode"),
    (
        pg.ProtocolViolationError(
            "bind message supplies 1 parameters, but prepared statement requires 2"
        ),
        "pooler_mode",
    ),
    (
        asyncpg.InternalClientError(
            "the number of columns in the result row (1) is different from what was described (2)"
        ),
        "pooler_mode",
    ),
    (PoolerModeError(), "pooler_mode"),
    (pg.DiskFullError(SECRET), "disk_full"),
    (of_login(pg.RaiseError(SECRET)), "login_refused"),
    (of_login(pg.InvalidPasswordError(SECRET)), "auth"),
    (asyncpg.InterfaceError("connection is closed"), "lost"),
    (ENDING, "lost"),
    (pg.UniqueViolationError(SECRET), "error"),
    (pg.UndefinedTableError(SECRET), "error"),
    (ValueError(SECRET), "error"),
    (KeyError(), "error"),
]

RELEASED = (
    "cannot call Connection.fetch(): connection has been released back to the pool",
    "cannot call Cursor.fetch(): the underlying connection has been released back to the pool",
    "cannot call Transaction.commit(): the underlying connection is closed",
    "cannot perform operation: connection is closed",
    "connection is closed",
)
TRANSIENT: list[BaseException] = [
    pg.SerializationError(),
    pg.DeadlockDetectedError(),
    pg.TooManyConnectionsError(),
    pg.AdminShutdownError(),
    pg.CrashShutdownError(),
    pg.CannotConnectNowError(),
    pg.PostgresConnectionError(),
    pg.ConnectionDoesNotExistError(),
    pg.ProtocolViolationError("query_wait_timeout"),
    pg.InternalServerError("Max client connections reached"),
    ConnectionRefusedError(),
    ConnectionResetError(),
    TimeoutError(),
    OSError(113, "No route to host"),
    socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"),
    *map(asyncpg.InterfaceError, RELEASED),
    ENDING,
]
PERMANENT: list[BaseException] = [
    pg.UniqueViolationError(),
    pg.QueryCanceledError(),
    pg.PostgresSyntaxError(),
    pg.InvalidPasswordError(),
    pg.ProtocolViolationError("SASL authentication failed"),
    pg.ProtocolViolationError("unsupported startup parameter: search_path"),
    pg.ProtocolViolationError("SSL required"),
    NO_TRANSACTIONS,
    pg.ReadOnlySQLTransactionError(),
    pg.InFailedSQLTransactionError(),
    pg.TransactionIntegrityConstraintViolationError(),
    pg.StatementCompletionUnknownError(),
    PoolTimeoutError(),
    ssl.SSLError(),
    ConnectionError("server rejected SSL upgrade"),
    socket.gaierror(),
    socket.gaierror(socket.EAI_NONAME, "Name or service not known"),
    PermissionError(),
    FileNotFoundError(),
    asyncpg.InterfaceError("the server expects 1 argument for this query, 0 were passed"),
    asyncpg.InterfaceError("cannot perform operation: another operation is in progress"),
    asyncpg.InterfaceError("pool is closing"),
    asyncpg.InternalClientError("got result for unknown protocol state 3"),
    PoolerModeError(),
    asyncpg.InterfaceError("the database's pool is closed"),
    ValueError(),
    asyncio.CancelledError(),
]
ALL = [*(error for error, _ in CODES), *TRANSIENT, *PERMANENT]


def named(errors: list[BaseException]) -> list[str]:
    """Return the test ids."""
    return [f"{number} {type(error).__name__}" for number, error in enumerate(errors)]


@pytest.mark.parametrize(("error", "code"), CODES, ids=named([error for error, _ in CODES]))
def test_each_error_has_a_code(error: BaseException, code: str) -> None:
    """Operators search for it."""
    assert explain(error).code == code


@pytest.mark.parametrize("error", ALL, ids=named(ALL))
def test_explanation_quotes_nothing_from_the_error(error: BaseException) -> None:
    """Errors may quote data: the explanation is one line of our own and a code."""
    trouble = explain(error)

    assert re.fullmatch(r"[a-z][a-z_]*", trouble.code)
    assert SECRET not in f"{trouble}"
    for text in (trouble.problem, trouble.remedy):
        assert text.strip() == text
        assert "\n" not in text


@pytest.mark.parametrize("error", TRANSIENT, ids=named(TRANSIENT))
def test_transient_errors_are_retried(error: BaseException) -> None:
    """They say nothing about the statement."""
    assert is_transient(error)


@pytest.mark.parametrize("error", PERMANENT, ids=named(PERMANENT))
def test_permanent_errors_are_not_retried(error: BaseException) -> None:
    """They would repeat, or the result of the statement is unknown."""
    assert not is_transient(error)
    assert not is_loss(error)


def test_conflict_of_transactions_is_no_outage() -> None:
    """All other transient errors trigger a check."""
    outages = [type(error) for error in TRANSIENT if not is_loss(error)]

    assert outages == [pg.SerializationError, pg.DeadlockDetectedError]


@pytest.mark.parametrize(
    ("error", "rolled_back"),
    [
        (pg.SerializationError(), True),
        (pg.DeadlockDetectedError(), True),
        (pg.UniqueViolationError(), True),
        (pg.TransactionRollbackError(), True),
        (pg.StatementCompletionUnknownError(), False),
        (pg.TransactionResolutionUnknownError(), False),
        (pg.ConnectionDoesNotExistError(), False),
        (pg.AdminShutdownError(), False),
        (pg.CrashShutdownError(), False),
        (asyncpg.InterfaceError("connection is closed"), False),
        (ConnectionResetError(), False),
        (TimeoutError(), False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else str(value),
)
def test_rollback_is_certain_only_if_the_server_confirms_it(
    error: BaseException, *, rolled_back: bool
) -> None:
    """A connection lost during COMMIT leaves the result open."""
    assert is_rolled_back(error) == rolled_back


OF_CONTENT = (pg.RaiseError("no"), pg.CheckViolationError("no"), pg.DataError("no"), ValueError())
"""Errors that mean a refusal of what a statement stores."""
NOT_OF_CONTENT = (
    *(of_login(type(error)("no")) for error in OF_CONTENT),
    of_login(UnicodeError("no name of a host")),
    ended(pg.InternalServerError("Max client connections reached")),
    ended(pg.RaiseError("no login")),
    pg.InvalidSQLStatementNameError("no"),
    pg.DuplicatePreparedStatementError("no"),
    pg.DiskFullError("no"),
)


@pytest.mark.parametrize("error", OF_CONTENT, ids=named([*OF_CONTENT]))
def test_a_refused_value_is_the_fault_of_the_content(error: Exception) -> None:
    """The caller gets it as it is, or as an error of the ledger."""
    assert refusal(error) is not None
    with pytest.raises(type(error) if isinstance(error, BAD_VALUE) else LedgerUnavailableError):
        raise_mapped(error)


@pytest.mark.parametrize("error", NOT_OF_CONTENT, ids=named([*NOT_OF_CONTENT]))
def test_a_refused_login_is_never_the_fault_of_the_content(error: Exception) -> None:
    """Nor the end of a session, nor another session's statement: the call may be repeated."""
    assert refusal(error) is None
    with pytest.raises(LedgerUnavailableError) as caught:
        raise_mapped(error)
    assert refusal(caught.value) is None


@pytest.mark.parametrize(
    ("error", "limited"),
    [
        (TimeoutError(), True),
        (pg.QueryCanceledError(), True),
        (pg.OutOfMemoryError(), True),
        (PoolTimeoutError(), False),
        (of_login(TimeoutError()), False),
        (of_login(pg.QueryCanceledError()), False),
        (of_login(pg.OutOfMemoryError()), False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_only_a_statement_can_ask_for_too_much(error: Exception, *, limited: bool) -> None:
    """A large result is given up after some of its calls have ended at a limit."""
    assert isinstance(unavailable(error), LedgerLimitError) == limited


def raise_mapped(error: Exception) -> None:
    """Raise it as a call of the ledger does."""
    with map_errors():
        raise error


def test_every_error_of_the_driver_is_classified() -> None:
    """No error class makes the functions raise, and each has a code."""
    kinds = [
        kind
        for kind in vars(pg).values()
        if isinstance(kind, type) and issubclass(kind, asyncpg.PostgresError)
    ]
    assert len(kinds) > 200
    for kind in kinds:
        error = kind(SECRET)
        is_transient(error), is_rolled_back(error)
        assert SECRET not in f"{explain(error)}"


@pytest.mark.parametrize(("rows", "after"), [(40, None), (50, "39")])
async def test_many_refused_rows_move_the_place_if_others_follow(
    rows: int, after: str | None
) -> None:
    """A list has 40 rows here. Without others, the next call comes after its pause."""
    ids, place = [f"{number:02}" for number in range(rows)], Place()

    async def refuse(_: object) -> Sequence[str]:
        raise asyncpg.RaiseError("planted")

    async def listed(after: str | None) -> Sequence[str]:
        return [each for each in ids if after is None or each > after][:40]

    await in_portions(refuse, listed, lambda *_: None, place)

    assert place.after == after
