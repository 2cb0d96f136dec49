"""The connection pool of the application: which of its connections are used, and for how long."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Literal, TypeAlias, TypeVar

import asyncpg
import msgspec
from asyncpg.connection import Connection
from asyncpg.pool import Pool, PoolConnectionProxy
from asyncpg.transaction import Transaction

from viralfx.core.clock import Clock, ignore_error
from viralfx.core.errors import LedgerUnavailableError, StartupError
from viralfx.core.loops import ForeignLoopError, HomeLoop, at_home
from viralfx.postgres.connections import (
    CheckedConnection,
    Connector,
    PostgresConfig,
    cut,
)
from viralfx.postgres.errors import (
    DATABASE_ERRORS,
    NotOpenError,
    PoolerModeError,
    PoolTimeoutError,
    explain,
    unavailable,
)
from viralfx.postgres.pool import PING_AFTER, QUIET_PING_AFTER, PoolMembers, SlowQueryLog
from viralfx.postgres.retry import (
    DedicatedConnection,
    is_loss,
    is_rolled_back,
    refuses_pooling,
    retry_policy,
)
from viralfx.resilience.retry import Retrier
from viralfx.resilience.retry_decision import RetryRelay

_logger = logging.getLogger("viralfx.database")

Lease: TypeAlias = "PoolConnectionProxy[Any]"
"""A connection of the pool, valid inside the block that acquired it."""

RESET_TIMEOUT = 5.0
"""Seconds to reset a released connection; a connection that takes longer is closed."""
FAST_RESET_TIMEOUT = 1.0
"""The same for a caller that was cancelled."""
_START_SECONDS = 1.0
"""How long a caller waits for the start of the application."""


async def roll_back(connection: Lease, transaction: Transaction, limit: float) -> None:
    """Roll a transaction back within ``limit`` seconds, or close the connection."""
    try:
        async with asyncio.timeout(limit):
            await transaction.rollback()
    except DATABASE_ERRORS:
        # A server that does not respond must not delay a cancelled caller. The server rolls back
        # by itself when the connection closes.
        with contextlib.suppress(asyncpg.InterfaceError):  # already closed
            connection.terminate()


async def release(pool: "Pool[Any]", connection: Lease, limit: float) -> None:
    """Reset a connection within ``limit`` seconds for its next use, or close it; never raises."""
    try:
        await pool.release(connection, timeout=limit)
    except DATABASE_ERRORS as error:
        # The reset failed and the driver closed the connection; the caller's work is done.
        _logger.debug("Database connection dropped", exc_info=error)


_OWN_MODULE = "viralfx.postgres.database"


def filter_pool_log() -> None:
    """Drop the driver's warnings about refilling our pool; idempotent.

    The driver repeats them during an outage. The health check logs the outage once.
    """
    logging.getLogger("asyncpg.pool").addFilter(_is_not_about_own_pool)


def _is_not_about_own_pool(record: logging.LogRecord) -> bool:
    # An application may have asyncpg pools of its own; their warnings stay.
    refilling = record.msg == "Failed to restore the pool connection floor; retrying"
    return not (refilling and record.exc_info and _passes_own_module(record.exc_info[2]))


def _passes_own_module(traceback: TracebackType | None) -> bool:
    while traceback is not None:
        if traceback.tb_frame.f_globals.get("__name__") == _OWN_MODULE:
            return True
        traceback = traceback.tb_next
    return False


T = TypeVar("T")

Isolation: TypeAlias = Literal["read_committed", "repeatable_read", "serializable"]
"""Isolation level of a transaction."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VacuumStatus:
    """Causes of slow claims: rows that vacuum has not removed or may not remove."""

    oldest_transaction: float
    """Seconds for which the oldest transaction of the database has been open."""
    dead_job_rows: int
    """Dead rows in the table of unfinished jobs."""


class PostgresDatabase:
    """Postgres, through a pool.

    ``on_suspected_outage`` is called from the event loop when an error or a delay suggests that
    the database is unavailable; it must not block.
    """

    def __init__(
        self,
        config: PostgresConfig,
        *,
        clock: Clock,
        on_suspected_outage: Callable[[], None] = lambda: None,
    ) -> None:
        """Prepare the pool; nothing is connected before :meth:`open`.

        Raises ``OSError`` for certificates that cannot be used.
        """
        self.config = config
        """The address, the credentials and the settings."""
        self.connector = Connector(config)
        """Makes each connection to the server."""
        self._clock = clock
        self.on_suspected_outage = on_suspected_outage
        """Called when the database may be unavailable."""
        self.queries = SlowQueryLog(config.settings.slow_query_threshold)
        """Logs and counts the slow statements."""
        self.retries = RetryRelay()
        """Forwards the events of :meth:`execute_with_retry`."""
        self._pool: Pool[Any] | None = None
        self._dedicated: set[Connection[Any]] = set()
        limit = min(config.settings.pool_timeout, _START_SECONDS)
        self.home = HomeLoop(start_seconds=limit)
        """The event loop that the connections belong to: the one of :meth:`open`."""
        self._home = self.home
        self._opened = asyncio.Event()
        self._closed = False
        self._in_use = self._waiting = self._failed_connections = 0
        self.members = PoolMembers(config)
        """Decides when a connection of the pool ends."""
        self.vacuum: VacuumStatus | None = None
        """From the last health query; None if that failed."""
        self.health_backend: int | None = None
        """The server's process for the connection of the health query; None without one."""
        filter_pool_log()

    def twin(self) -> "PostgresDatabase":
        """Return the same database with a pool for another event loop, which keeps no connection.

        Opening it takes one attempt.
        """
        settings = msgspec.structs.replace(
            self.config.settings, pool_min=0, max_reconnect_attempts=1
        )
        return PostgresDatabase(replace(self.config, settings=settings), clock=self._clock)

    # -- life --------------------------------------------------------------------------------

    async def open(self) -> None:
        """Connect, with up to ``DB_MAX_RECONNECT_ATTEMPTS`` attempts.

        There is one attempt if a pooler refuses the connection because of ``DB_POOLER``.
        Raises :class:`StartupError` that names the problem and the remedy.
        """
        if self._pool is not None:
            return
        self._home.settle()
        attempts = self.config.settings.max_reconnect_attempts
        for attempt in range(1, attempts + 1):
            pool = self._new_pool()
            try:
                _ = await pool
            except Exception as error:
                # Every kind: a driver may fail in any way on a server that is not Postgres.
                pool.terminate()
                explained = explain(error)
                _logger.warning(
                    "Database connection attempt failed",
                    exc_info=error if explained.code == "error" else None,
                    extra={"attempt": attempt, "attempts": attempts, "code": explained.code},
                )
                if attempt == attempts or refuses_pooling(error):
                    raise StartupError(
                        f"{self.config.url_variable}: the database at {self.config.address}"
                        f" {explained.problem}, after {attempt} attempt{'s' * (attempt > 1)};"
                        f" {explained.remedy}"
                    ) from error
                await self._clock.sleep(self.config.settings.reconnect_delay)
            except BaseException:
                pool.terminate()
                raise
            else:
                if self._closed:
                    # close() was called while there was no pool yet.
                    pool.terminate()
                    return
                self._pool = pool
                self._opened.set()
                # The last health check ran without a pool.
                self._suspect_outage()
                return

    async def close(self) -> None:
        """Wait until every connection is released, and close them.

        Cancelling it closes them all at once. Idempotent, also before :meth:`open`.
        """
        self._refuse_new()
        if self._pool is not None:
            await self._pool.close()

    def terminate(self) -> None:
        """Close every connection at once."""
        self._refuse_new()
        if self._pool is not None:
            self._pool.terminate()

    async def cut(self, limit: float) -> None:
        """Close every connection at once, and cancel in the server the statements on those in use.

        Waits up to ``limit`` seconds for the server to take the requests; without an answer the
        server finds out by itself.
        """
        requests = [cut(each) for each in self.members.lent()]
        self.terminate()
        if sent := [request for request in requests if request is not None]:
            await asyncio.wait(sent, timeout=limit)

    # -- use ---------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def acquire(
        self, *, reset: bool = True, max_idle: float | None = None
    ) -> AsyncIterator[Lease]:
        """Acquire a connection for the block.

        Its session is reset for the next caller, which takes a round trip. With ``reset`` false
        the round trip is made only if the block raises. Its statements must then leave the session
        as it was, without settings, locks, cursors, listeners and temporary tables.

        A connection that was idle for ``max_idle`` seconds is tested first, by another round trip.
        The default is ``PING_AFTER``, and ``QUIET_PING_AFTER`` with ``reset`` false.

        Raises :class:`PoolTimeoutError` if none is free within ``DB_POOL_TIMEOUT``, and the
        driver's errors if a new one cannot be opened; :class:`PoolerModeError` while ``DB_POOLER``
        does not say that the pooler works in transaction mode. Raises ``RuntimeError`` on another
        event loop than that of the application: use :meth:`execute_with_retry` there.
        """
        pool = await self._open_pool()
        loop = asyncio.get_running_loop()
        suspicion = loop.call_later(self.config.suspect_after, self._suspect_outage)
        try:
            if max_idle is None:
                max_idle = PING_AFTER if reset else QUIET_PING_AFTER
            connection = await self._acquire(pool, max_idle)
            checked: Any = connection  # a proxy of a CheckedConnection
            # Not by the proxy, which loses it when the server closes it.
            own: CheckedConnection = checked.itself
            self._in_use += 1
            limit = RESET_TIMEOUT
            try:
                yield connection
                if not reset:
                    own.mark_session_clean()
            except asyncio.CancelledError:
                limit = FAST_RESET_TIMEOUT
                raise
            except asyncpg.PostgresError as error:
                await self.members.judge(own, error)
                raise
            finally:
                self._in_use -= 1
                await release(pool, connection, limit)
        finally:
            suspicion.cancel()

    @at_home
    async def execute_with_retry(
        self,
        operation: Callable[[Lease], Awaitable[T]],
        attempts: int | None = 3,
        *,
        idempotent: bool = False,
        isolation: Isolation | None = None,
        readonly: bool = False,
    ) -> T:
        """Run ``operation`` in a transaction; repeat it from its start after a transient error.

        ``attempts`` is their maximum, the first included. None sets no limit, so put such a call
        inside a :class:`Deadline`. ``isolation`` is the level of the transaction, by default that
        of the database. With ``readonly`` it may not write.

        Each attempt has a connection and a transaction of its own, so a failed attempt leaves
        nothing behind, with one exception: if the connection is lost during COMMIT, the result is
        unknown. Such an operation is repeated only if it is declared ``idempotent``; otherwise
        the error is raised with ``maybe_applied`` true. Raises the error of the last attempt.

        You may await it on any event loop. ``operation`` runs on that of the application, so it
        must not block, nor use a client of another loop.
        """
        retrier = Retrier(
            retry_policy(attempts), name="database", idempotent=idempotent, clock=self._clock
        )
        retrier.subscribe(self.retries)
        return await retrier.execute(
            lambda: self._in_transaction(operation, isolation=isolation, readonly=readonly)
        )

    async def _in_transaction(
        self, operation: Callable[[Lease], Awaitable[T]], **options: Any
    ) -> T:
        async with self.acquire() as connection:
            transaction = connection.transaction(**options)
            checked: Any = connection  # a proxy, which loses its connection when that is closed
            own: CheckedConnection = checked.itself
            try:
                await self.members.begin(connection, transaction)
                result = await operation(connection)
            except BaseException as error:
                if isinstance(error, OSError) and not own.is_closed():
                    # Caused by a file, another service or the operation's own time limit.
                    error.not_the_database = True  # type: ignore[attr-defined]  # see is_transient
                cut = isinstance(error, asyncio.CancelledError)
                await roll_back(
                    connection, transaction, FAST_RESET_TIMEOUT if cut else RESET_TIMEOUT
                )
                raise
            # Raises, as the commit would, if the connection was released already.
            can_be_sent = not connection.is_closed()
            try:
                await transaction.commit()
            except Exception as error:
                if can_be_sent and not is_rolled_back(error):
                    error.maybe_applied = True  # type: ignore[attr-defined]  # read by the retrier
                raise
            return result

    # -- statistics --------------------------------------------------------------------------

    @property
    def total_connections(self) -> int:
        """Connections of the pool that are open."""
        return self._pool.get_size() if self._pool is not None else 0

    @property
    def idle_connections(self) -> int:
        """Open connections of the pool that are free."""
        return self._pool.get_idle_size() if self._pool is not None else 0

    @property
    def in_use(self) -> int:
        """Connections that callers hold, lost ones included."""
        return self._in_use

    @property
    def waiting(self) -> int:
        """Callers that are waiting for a connection."""
        return self._waiting

    @property
    def failed_connections(self) -> int:
        """Attempts to connect that failed, since the start."""
        return self._failed_connections

    @property
    def slow_queries(self) -> int:
        """Slow queries since the start."""
        return self.queries.count

    async def connect(
        self, purpose: str, *, cut: bool = False, **settings: str
    ) -> "Connection[Any]":
        """Open a connection outside the pool, with server ``settings`` changed.

        ``purpose`` is appended to the application name that the server shows. With ``cut``,
        closing the pool closes it too.
        """
        connection = await self._connect(purpose=purpose, **settings)
        if cut:
            self._dedicated.add(connection)
            if self._closed:
                connection.terminate()
        return connection

    def dedicated(self, purpose: str) -> "DedicatedConnection":
        """Return a connection outside the pool, which is opened at its first use.

        ``purpose`` is appended to the application name that the server shows. Closing the pool
        closes the connection, too.
        """
        lifetime = self.config.settings.max_lifetime
        return DedicatedConnection(lambda: self.connect(purpose, cut=True), lifetime)

    async def _connect(self, **arguments: Any) -> "Connection[Any]":
        try:
            connection = await self.connector.connect(**arguments)
        except Exception:
            self._failed_connections += 1
            raise
        # Idle connections too: they are the first to notice that a server stopped.
        connection.add_termination_listener(self._terminated)
        return connection

    def _new_pool(self) -> "Pool[Any]":
        async def make(*_: object, **__: object) -> "Connection[Any]":
            connection = await self.members.add(self._connect)
            connection.add_query_logger(self.queries)
            return connection

        return asyncpg.create_pool(
            connect=make,
            connection_class=CheckedConnection,
            reset=self.members.reset,
            # At least one, so that opening a pool with a minimum of 0 tests the connection.
            init_size=max(1, self.config.settings.pool_min),
            min_size=self.config.settings.pool_min,
            max_size=self.config.settings.pool_max,
        )

    async def _open_pool(self) -> "Pool[Any]":
        if self._pool is None and not self._closed:
            # Callers that come before the start wait for it, up to the pool's timeout.
            limit = self.config.settings.pool_timeout
            await self._home.known()
            if self._home.is_here:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(limit):
                        await self._opened.wait()
        if self._closed:
            raise NotOpenError(started=True, closed=True)
        if self._home.is_known and not self._home.is_here:
            raise ForeignLoopError(
                "a connection of the database works on the event loop of the application only; pass"
                " your statements as a function to execute_with_retry(), which runs it there"
            )
        if self._pool is None:
            raise NotOpenError(started=self._home.is_known)
        if self.members.share_processes:
            raise PoolerModeError
        return self._pool

    async def _acquire(self, pool: "Pool[Any]", max_idle: float) -> Lease:
        self._waiting += 1
        limit = self.config.settings.pool_timeout
        waiting = asyncio.timeout(limit)
        try:
            async with waiting:
                while True:
                    connection = await pool.acquire()
                    if await self.members.can_be_used(connection, max_idle):
                        return connection
        except Exception as error:
            if is_loss(error) or waiting.expired():
                self._suspect_outage()
            if not waiting.expired():
                raise
            raise PoolTimeoutError(
                f"Connection timeout: no database connection within {limit:g} s ({self._in_use} of"
                f" {self.config.settings.pool_max} in use, {self._waiting - 1} others wait)"
            ) from error
        finally:
            self._waiting -= 1

    def _terminated(self, connection: Any) -> None:
        self._dedicated.discard(connection)
        if self.members.discard(connection):
            self._suspect_outage()

    def _refuse_new(self) -> None:
        self._closed = True
        self._opened.set()
        for connection in tuple(self._dedicated):
            connection.terminate()

    def _suspect_outage(self) -> None:
        if not self._closed:
            self.on_suspected_outage()


async def run_within(
    database: PostgresDatabase, step: Callable[[Any], Awaitable[T]], seconds: float
) -> T:
    """Return the result of a step with a connection, which leaves its session as it was.

    Raises :class:`LedgerUnavailableError` if the database does not answer in ``seconds``, or fails.
    """

    async def on_connection() -> T:
        async with database.acquire(reset=False) as connection:
            return await step(connection)

    # Cancelled once at most: a second cancellation while the connection is given back would leave
    # the driver with an error that is not retrieved.
    task = asyncio.ensure_future(on_connection())
    try:
        await asyncio.wait({task}, timeout=seconds)
    finally:
        if not task.done():
            task.cancel()
            task.add_done_callback(ignore_error)
    if not task.done():
        raise LedgerUnavailableError("the database does not answer in time")
    try:
        return task.result()
    except DATABASE_ERRORS as error:
        raise unavailable(error) from error
