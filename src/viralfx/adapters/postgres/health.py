"""The database check: a connection of its own, the pool's counters, and the schema's version."""

import asyncio
from typing import Any

from asyncpg.connection import Connection

from viralfx.adapters.postgres.connection import answer
from viralfx.adapters.postgres.database import PostgresDatabase
from viralfx.adapters.postgres.errors import explain
from viralfx.adapters.postgres.schema import pending_migrations
from viralfx.domain.clock import Clock, timestamp
from viralfx.domain.health import Observation, Status


class PostgresHealthCheck:
    """Asks the server one question per attempt, over a connection that is used for nothing else.

    The application's pool may be exhausted, which is a warning, without making the check wait. A
    connection that fails or hangs is cut and made anew at the next attempt.
    """

    def __init__(self, database: PostgresDatabase, clock: Clock, *, timeout: float) -> None:
        """``timeout`` in seconds should be shorter than the monitor's.

        The check then says for itself that there is no answer, with the pool's counters; the
        monitor, which cuts it off, could not.
        """
        self._timeout = timeout
        self._database = database
        self._clock = clock
        self._connection: Connection[Any] | None = None
        self._schema_is_current = False
        self._turn = asyncio.Lock()

    async def check(self) -> Observation:
        """Look once. The monitor's timeout may cancel it at any point."""
        async with self._turn:
            try:
                async with asyncio.timeout(self._timeout):
                    return await self._look()
            except Exception as error:  # noqa: BLE001 - every error has a code; the log gets it
                self._drop()
                trouble = explain(error)
                return self._observe(
                    Status.FAIL, f"Database {trouble.problem}", trouble.code, error=error
                )
            except BaseException:
                self._drop()
                raise

    async def close(self) -> None:
        """Cut the connection."""
        self._drop()

    async def _look(self) -> Observation:
        connection = self._connection
        if connection is None or connection.is_closed():
            self._drop()
            name = f"{self._database.config.application_name}-health"
            connection = self._connection = await self._database.connect(name)
            self._schema_is_current = False
        if not self._schema_is_current:
            pending = await answer(connection, pending_migrations(connection))
            if pending:
                return self._observe(
                    Status.FAIL,
                    f"Database schema is behind: {', '.join(pending)} pending;"
                    " run `viralfx migrate`",
                    "schema_behind",
                )
            self._schema_is_current = True
        # As cheap as SELECT 1, and tells a primary from a replica, or from one that was set so.
        question = "SELECT pg_catalog.current_setting('transaction_read_only')"
        if await answer(connection, connection.fetchval(question)) != "off":
            return self._observe(
                Status.WARN,
                "Database accepts no writes: it is a replica, or was set to read only",
                "read_only",
            )
        config, waiting = self._database.config, self._database.waiting
        if waiting and self._active >= config.pool_max:
            return self._observe(
                Status.WARN,
                f"Database connection pool is exhausted: {waiting} wait for a connection",
                "pool_exhausted",
            )
        return self._observe(Status.PASS, "Database is healthy", None)

    @property
    def _active(self) -> int:
        return self._database.total_connections - self._database.idle_connections

    def _observe(
        self,
        status: Status,
        message: str,
        code: str | None,
        error: BaseException | None = None,
    ) -> Observation:
        database, config = self._database, self._database.config
        return Observation(
            status=status,
            message=message,
            code=code,
            error=error,
            details={
                "adapter": "postgres",
                "isConnected": self._connection is not None,
                "stats": {
                    "totalConnections": database.total_connections,
                    "activeConnections": self._active,
                    "idleConnections": database.idle_connections,
                    "waitingRequests": database.waiting,
                    "failedConnections": database.failed_connections,
                    "slowQueries": database.slow_queries,
                    "lastHealthCheck": timestamp(self._clock.now()),
                },
                "poolConfig": {
                    "min": config.pool_min,
                    "max": config.pool_max,
                    "timeout": round(config.pool_timeout * 1000),
                },
            },
        )

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.terminate()
