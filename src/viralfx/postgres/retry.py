"""Repeats: transient errors, the policy, and the steps of the job ledger with their connections."""

import asyncio
import math
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from asyncpg import exceptions as pg
from asyncpg.connection import Connection
from asyncpg.exceptions import InterfaceError, InternalClientError, PostgresError
from asyncpg.pool import PoolConnectionProxy

from viralfx.core.clock import Clock, default_rng
from viralfx.core.errors import LedgerUnavailableError
from viralfx.core.events import Listener
from viralfx.postgres.connections import run_query
from viralfx.postgres.errors import (
    BAD_VALUE,
    DATABASE_ERRORS,
    POOLER_FULL,
    POOLER_REFUSAL,
    NoServerError,
    PoolerModeError,
    PoolTimeoutError,
    explain,
    map_errors,
    refusal,
    refuses_tls,
)
from viralfx.postgres.pool import end_of_life
from viralfx.resilience.policy import Backoff, BackoffPolicy, Jitter
from viralfx.resilience.retry import Retrier
from viralfx.resilience.retry_decision import RetryEvent
from viralfx.settings import CredentialsError

_TRANSIENT = (
    pg.PostgresConnectionError,
    pg.CannotConnectNowError,
    pg.AdminShutdownError,
    pg.CrashShutdownError,
    pg.TooManyConnectionsError,
    pg.SerializationError,
    pg.DeadlockDetectedError,
)
_NEVER = (
    PoolTimeoutError,
    PoolerModeError,
    ssl.SSLError,
    PermissionError,
    FileNotFoundError,
)


def _is_lasting_refusal(error: BaseException) -> bool:
    """Return True if a pooler refused a call in a way that another attempt does not change."""
    lasting = {POOLER_REFUSAL, "auth", "tls"}
    return isinstance(error, pg.PostgresConnectionError) and explain(error).code in lasting


def refuses_pooling(error: BaseException) -> bool:
    """Return True if a pooler refused the connection in a way that lasts: see ``DB_POOLER``."""
    if isinstance(error, NoServerError):
        return all(refuses_pooling(one) for _, one in error.failures)
    return explain(error).code == POOLER_REFUSAL


def is_transient(error: BaseException) -> bool:
    """Return True if the same call may succeed soon.

    True for lost or refused connections, a server that restarts or has no connection left, and
    transactions that lost against another one (SQLSTATE class 08, 40001, 40P01, 53300,
    57P01-57P03; see "PostgreSQL Error Codes" in its manual). Also True if the server accepts no
    writes (25006): another connection may lead to the new primary. False if the caller's own
    transaction was read-only, and for a timeout of the pool: retries would only lengthen its queue.
    """
    if getattr(error, "not_the_database", False):
        return False
    if isinstance(error, NoServerError):
        return any(is_transient(one) for _, one in error.failures)
    # With EAI_AGAIN the name server did not answer; any other error is its answer.
    unknown_name = isinstance(error, socket.gaierror) and error.errno != socket.EAI_AGAIN
    never = unknown_name or isinstance(error, _NEVER)
    if never or refuses_tls(error) or _is_lasting_refusal(error):
        return False
    if isinstance(error, InternalClientError):
        # The server announced the end of the connection, which is not closed yet.
        return "cannot switch to state" in str(error)
    if isinstance(error, InterfaceError):
        # The driver's texts for a lost connection. Other texts mean wrong use of the driver, or a
        # closed pool.
        text = str(error)
        return "connection" in text and ("closed" in text or "released back" in text)
    of_server: bool = getattr(error, "of_server", False)
    temporary = of_server or explain(error).code == POOLER_FULL
    return temporary or isinstance(error, (*_TRANSIENT, OSError, CredentialsError))


def is_rolled_back(error: BaseException) -> bool:
    """Return True if the server confirmed that the transaction had no effect."""
    unknown = pg.StatementCompletionUnknownError
    lost = (pg.PostgresConnectionError, pg.AdminShutdownError, pg.CrashShutdownError, unknown)
    return isinstance(error, PostgresError) and not isinstance(error, lost)


def is_loss(error: BaseException) -> bool:
    """Return True if an error suggests an outage rather than a failed statement."""
    return is_transient(error) and not isinstance(
        error, pg.SerializationError | pg.DeadlockDetectedError
    )


def retry_policy(attempts: int | None = 3) -> BackoffPolicy:
    """Return the policy of this technology: transient errors, soon and at random moments.

    With equal waits, two transactions that conflicted would conflict again. ``attempts`` None: no
    limit. Raises ``ValueError`` for a number of attempts below one.
    """
    return BackoffPolicy(
        attempts=attempts,
        backoff=Backoff(base=0.1, cap=5.0, jitter=Jitter.FULL),
        retry_on=is_transient,
    )


T = TypeVar("T")

_MAX_ATTEMPTS = 6
"""About three seconds of waiting in total, the time that a server needs to restart."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt of a step."""

    connection: "PoolConnectionProxy[Any]"
    again: bool
    """True if an earlier attempt may have succeeded although its response was lost."""


class RetriedSteps:
    """Runs idempotent steps, with retries and a time limit."""

    def __init__(
        self,
        acquire: Callable[..., AbstractAsyncContextManager[Any]],
        *,
        timeout: float,
        clock: Clock,
        listener: Listener[RetryEvent],
    ) -> None:
        """``acquire`` provides a connection, of the pool or a dedicated one.

        ``timeout``: seconds for a step with all its attempts; ``listener`` gets failed attempts.
        """
        self._acquire = acquire
        self._timeout = timeout
        self._retrier = Retrier(
            retry_policy(_MAX_ATTEMPTS),
            name="ledger",
            idempotent=True,
            listeners=(listener,),
            clock=clock,
        )

    async def run(self, step: Callable[[Attempt], Awaitable[T]], **options: float) -> T:
        """Run a step on a connection; repeat it after a transient error.

        ``options`` are those of ``acquire``.

        Raises :class:`LedgerUnavailableError`, ``BAD_VALUE`` and the errors of ``step`` itself.
        """
        begun, connected = False, False

        async def run_attempt() -> T:
            nonlocal begun, connected
            connected = False
            async with self._acquire(**options) as connection:
                connected = True
                attempt = Attempt(connection, again=begun)
                begun = True
                return await step(attempt)

        with map_errors():
            try:
                async with asyncio.timeout(self._timeout):
                    return await self._retrier.execute(run_attempt)
            except TimeoutError as error:
                if connected:
                    raise
                raise PoolTimeoutError(f"no connection within {self._timeout:g} s") from error


_MAX_REFUSED = 20
"""Refused rows after which the other ones are left to a later call."""
_rng = default_rng()


@dataclass(slots=True)
class Place:
    """Where calls of :func:`in_portions` begin to list rows, so that no refused rows stop them."""

    after: str | None = None
    """The id of a row: the next call lists those that follow it. None: it lists the first ones."""


async def in_portions(
    change: Callable[[Sequence[str] | None], Awaitable[Sequence[T]]],
    list_ids: Callable[[str | None], Awaitable[Sequence[str]]],
    on_refused: Callable[[Sequence[str], str | None], None],
    place: Place | None = None,
) -> list[T]:
    """Change many rows at once, or all but those that the server refuses, such as by a trigger.

    ``change`` gets the ids of the rows to change, or None for all, and returns what it changed;
    ``list_ids`` lists all, or as many as one call may change after a row. Halves the rows until the
    refused ones are alone, and passes these to ``on_refused``, with the SQLSTATE of the last one.
    If there are too many, the next call with the same ``place`` goes on with the rows that follow
    the listed ones.
    Raises other errors than refusals.
    """
    place = Place() if place is None else place
    begin, last = place.after, None
    changed: list[T] = []
    refused: list[str] = []
    code = None
    portions: list[Sequence[str] | None] = [None]
    while portions and len(refused) < _MAX_REFUSED:
        portion = portions.pop()
        try:
            changed += await change(portion)
        except (*BAD_VALUE, PostgresError, LedgerUnavailableError) as error:
            if (refusal_of := refusal(error)) is None:
                raise
            code = refusal_of.code
            if portion is None:
                portion = list(await list_ids(begin))
                if not portion and begin is not None:
                    portion = list(await list_ids(None))
                last = portion[-1] if portion else None
            if len(portion) <= 1:
                refused += portion
            else:
                middle = len(portion) // 2
                halves = [portion[middle:], portion[:middle]]
                # If there are many refused ones, each call begins with others.
                _rng.shuffle(halves)
                portions += halves
    goes_on = len(refused) >= _MAX_REFUSED and await list_ids(last)
    place.after = last if goes_on else None
    if refused:
        on_refused(refused, code)
    return changed


class DedicatedConnection:
    """A connection outside the pool, for one purpose.

    It is opened at its first use and reopened after a failure, so that a new connection finds the
    server that accepts writes. Between two uses it also ends at its greatest age.
    """

    def __init__(
        self, connect: Callable[[], Awaitable["Connection[Any]"]], lifetime: float
    ) -> None:
        """``connect`` opens the connection, on the event loop of its first use.

        ``lifetime``: its greatest age in seconds; 0: none.
        """
        self._connect = connect
        self._lifetime = lifetime
        self._ends_at = math.inf
        self._connection: Connection[Any] | None = None
        self._lock = asyncio.Lock()

    @asynccontextmanager
    async def acquire(self) -> AsyncIterator["CancellableConnection"]:
        """Acquire it for the block, one caller at a time; raises the driver's errors.

        An error or a cancellation in the block closes the connection.
        """
        async with self._lock:
            if self._connection is not None and asyncio.get_running_loop().time() >= self._ends_at:
                self._connection.terminate()
            if self._connection is None or self._connection.is_closed():
                self._connection = await self._connect()
                self._ends_at = end_of_life(self._lifetime)
            try:
                yield CancellableConnection(self._connection)
            except BaseException as error:
                if isinstance(error, pg.ReadOnlySQLTransactionError):
                    # The next attempt has another connection.
                    error.of_server = True  # type: ignore[attr-defined]  # see is_transient
                self._connection.terminate()
                raise

    @property
    def is_open(self) -> bool:
        """True if the next use need not open it."""
        return self._connection is not None and not self._connection.is_closed()

    async def close(self, limit: float) -> None:
        """Close it within ``limit`` seconds, or cut it; the next use reopens it."""
        if self._connection is not None:
            try:
                await self._connection.close(timeout=limit)
            except DATABASE_ERRORS:
                self._connection.terminate()


class CancellableConnection:
    """Runs statements; a cancelled caller does not wait for the server."""

    def __init__(self, connection: "Connection[Any]") -> None:
        self._connection = connection

    async def execute(self, statement: str, *arguments: object) -> Any:
        """Run a statement and return its status."""
        return await run_query(self._connection, self._connection.execute(statement, *arguments))

    async def fetch(self, statement: str, *arguments: object) -> Any:
        """Run a statement and return its rows."""
        return await run_query(self._connection, self._connection.fetch(statement, *arguments))
