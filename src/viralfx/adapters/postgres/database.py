"""The pool of connections that the application uses, and what it adds to the driver's."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import asyncpg
from asyncpg.connection import Connection
from asyncpg.pool import Pool

from viralfx.adapters.postgres.cleaning import IN_A_HURRY, PATIENTLY, Lease, give_back, roll_back
from viralfx.adapters.postgres.config import PostgresConfig
from viralfx.adapters.postgres.connection import CheckedConnection, connect
from viralfx.adapters.postgres.errors import (
    PoolTimeoutError,
    explain,
    is_loss,
    is_rolled_back,
    retry_policy,
)
from viralfx.adapters.postgres.refilling import quiet_refilling
from viralfx.adapters.postgres.slow_queries import SlowQueryLog
from viralfx.domain.clock import Clock
from viralfx.domain.errors import StartupError
from viralfx.domain.resilience.retry import Retrier
from viralfx.domain.resilience.retry_decision import RetryRelay

_logger = logging.getLogger("viralfx.database")

T = TypeVar("T")


class PostgresDatabase:
    """Postgres, through a pool.

    ``on_doubt`` is called when something looks like a lost database, from the event loop; it
    must not block.
    """

    def __init__(
        self, config: PostgresConfig, *, clock: Clock, on_doubt: Callable[[], None] = lambda: None
    ) -> None:
        """Take the configuration; nothing is connected before :meth:`open`.

        Raises ``OSError`` for certificates that cannot be used.
        """
        self.config = config
        self._arguments = config.connect_arguments()
        self._clock = clock
        self.on_doubt = on_doubt
        self.queries = SlowQueryLog(config.slow_query_threshold)
        self.retries = RetryRelay()
        self._pool: Pool[Any] | None = None
        self._beside: set[Connection[Any]] = set()
        self._opened = asyncio.Event()
        self._closed = False
        self._in_use = 0
        self._waiting = 0
        self._failed_connections = 0
        quiet_refilling()

    # -- life --------------------------------------------------------------------------------

    async def open(self) -> None:
        """Connect, in as many attempts as the configuration allows.

        Raises :class:`StartupError` that names what is wrong and what to look at.
        """
        if self._pool is not None:
            return
        attempts = self.config.connect_attempts
        for attempt in range(1, attempts + 1):
            pool = self._new_pool()
            try:
                _ = await pool
            except Exception as error:
                # Every one: how a driver can fail on what speaks no Postgres has no end.
                pool.terminate()
                trouble = explain(error)
                _logger.warning(
                    "Database connection attempt failed",
                    exc_info=error if trouble.code == "error" else None,
                    extra={"attempt": attempt, "attempts": attempts, "code": trouble.code},
                )
                if attempt == attempts:
                    raise StartupError(
                        f"DATABASE_URL: the database at {self.config.address} {trouble.problem},"
                        f" after {attempts} attempt{'s' * (attempts > 1)}; {trouble.remedy}"
                    ) from error
                await self._clock.sleep(self.config.connect_delay)
            except BaseException:
                pool.terminate()
                raise
            else:
                if self._closed:
                    # Closed meanwhile, when there was none to close.
                    pool.terminate()
                    return
                self._pool = pool
                self._opened.set()
                # The last look at it was before there was a pool to count.
                self._doubt()
                return

    async def close(self) -> None:
        """Wait until every connection was given back, and close them.

        Cancelling it cuts them all. Doing it again, or before anything was opened, is harmless.
        """
        self._refuse()
        if self._pool is not None:
            await self._pool.close()

    def terminate(self) -> None:
        """Cut every connection at once."""
        self._refuse()
        if self._pool is not None:
            self._pool.terminate()

    # -- use ---------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def acquire(self) -> AsyncIterator[Lease]:
        """Take a connection for the block.

        Raises :class:`PoolTimeoutError` when there is none in time, and what the driver raises
        when a new one cannot be made.
        """
        pool = await self._open_pool()
        doubt = asyncio.get_running_loop().call_later(self.config.doubt_after, self._doubt)
        try:
            connection = await self._take(pool)
            self._in_use += 1
            patience = PATIENTLY
            try:
                yield connection
            except asyncio.CancelledError:
                patience = IN_A_HURRY
                raise
            finally:
                self._in_use -= 1
                await give_back(pool, connection, patience)
        finally:
            doubt.cancel()

    async def execute_with_retry(
        self,
        operation: Callable[[Lease], Awaitable[T]],
        attempts: int = 3,
        *,
        idempotent: bool = False,
    ) -> T:
        """Run ``operation`` in a transaction, again from its start after a transient error.

        Each attempt has a connection and a transaction of its own, so an attempt that failed left
        nothing behind, with one exception: the connection was lost while COMMIT was under way.
        Whether that took effect nobody knows, and it is tried again only when the operation is
        declared ``idempotent``. Raises the last error, which then has ``maybe_applied`` true.
        """
        retrier = Retrier(
            retry_policy(attempts), name="database", idempotent=idempotent, clock=self._clock
        )
        retrier.subscribe(self.retries)
        return await retrier.execute(lambda: self._in_transaction(operation))

    async def _in_transaction(self, operation: Callable[[Lease], Awaitable[T]]) -> T:
        async with self.acquire() as connection:
            transaction = connection.transaction()
            try:
                await transaction.start()
                result = await operation(connection)
            except BaseException as error:
                if isinstance(error, OSError) and not connection.is_closed():
                    # A file, another service, a time limit of its own: not the database's error.
                    error.not_the_database = True  # type: ignore[attr-defined]  # see is_transient
                cut = isinstance(error, asyncio.CancelledError)
                await roll_back(connection, transaction, IN_A_HURRY if cut else PATIENTLY)
                raise
            # Raises, as the commit would, where the connection has gone back to the pool.
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
        """Connections of the pool that are open and wait to be used."""
        return self._pool.get_idle_size() if self._pool is not None else 0

    @property
    def in_use(self) -> int:
        """Connections that callers hold, those included that were lost meanwhile."""
        return self._in_use

    @property
    def waiting(self) -> int:
        """Callers that wait for a connection."""
        return self._waiting

    @property
    def failed_connections(self) -> int:
        """Attempts to connect that failed, since the start."""
        return self._failed_connections

    @property
    def slow_queries(self) -> int:
        """Slow queries since the start."""
        return self.queries.count

    async def connect(self, *, cut: bool = False, **settings: str) -> "Connection[Any]":
        """Connect beside the pool, to be ``cut`` with it, ``settings`` of the server changed."""
        settings = {**self._arguments["server_settings"], **settings}
        connection = await self._connect(server_settings=settings)
        if cut:
            self._beside.add(connection)
            if self._closed:
                connection.terminate()
        return connection

    async def _connect(self, **more: Any) -> "Connection[Any]":
        try:
            connection = await connect(self.config, {**self._arguments, **more})
        except Exception:
            self._failed_connections += 1
            raise
        # Also where nobody is at it: that is when a server stops or is cut off.
        connection.add_termination_listener(self._terminated)
        return connection

    def _new_pool(self) -> "Pool[Any]":
        async def make(*_: object, **kwargs: Any) -> "Connection[Any]":
            connection = await self._connect(**kwargs)
            connection.add_query_logger(self.queries)
            return connection

        return asyncpg.create_pool(
            connect=make,
            connection_class=CheckedConnection,
            # One at least, or a pool that may be empty would never show that nothing can be had.
            init_size=max(1, self.config.pool_min),
            min_size=self.config.pool_min,
            max_size=self.config.pool_max,
        )

    async def _open_pool(self) -> "Pool[Any]":
        if self._pool is None and not self._closed:
            # Who comes before the start is over waits for it, as for any connection.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.config.pool_timeout):
                    await self._opened.wait()
        if self._pool is None or self._closed:
            state = "closed" if self._closed else "not open yet"
            raise asyncpg.InterfaceError(f"the database's pool is {state}")
        return self._pool

    async def _take(self, pool: "Pool[Any]") -> Lease:
        self._waiting += 1
        limit = self.config.pool_timeout
        waiting = asyncio.timeout(limit)
        try:
            async with waiting:
                return await pool.acquire()
        except Exception as error:
            if is_loss(error) or waiting.expired():
                self._doubt()
            if not waiting.expired():
                raise
            raise PoolTimeoutError(
                f"Connection timeout: no database connection within {limit:g} s ({self._in_use} of"
                f" {self.config.pool_max} in use, {self._waiting - 1} others wait)"
            ) from error
        finally:
            self._waiting -= 1

    def _terminated(self, connection: Any) -> None:
        self._beside.discard(connection)
        self._doubt()

    def _refuse(self) -> None:
        self._closed = True
        self._opened.set()
        for connection in tuple(self._beside):
            connection.terminate()

    def _doubt(self) -> None:
        if not self._closed:
            self.on_doubt()
