"""The database check: what the server answers, the pool's counters, the schema's version."""

from viralfx.adapters.postgres.database import PostgresDatabase
from viralfx.adapters.postgres.errors import explain
from viralfx.adapters.postgres.health_question import HealthQuestion
from viralfx.domain.clock import Clock, timestamp
from viralfx.domain.health import Observation, Status


class PostgresHealthCheck:
    """Asks the server once per attempt, over a connection that is used for nothing else.

    The application's pool may be exhausted, which is a warning, without making the check wait.
    """

    def __init__(self, database: PostgresDatabase, clock: Clock, *, timeout: float) -> None:
        """``timeout`` in seconds should be shorter than the monitor's.

        The check then says for itself that there is no answer, with the pool's counters; the
        monitor, which cuts it off, could not.
        """
        self._database = database
        self._clock = clock
        self.question = HealthQuestion(database, clock, timeout=timeout)
        """What is asked; other checks may share the answer."""

    async def check(self) -> Observation:
        """Look once. The monitor's timeout may cancel it at any point."""
        try:
            answer = await self.question.ask()
        except Exception as error:  # noqa: BLE001 - every error has a code; the log gets it
            trouble = explain(error)
            return self._observe(
                Status.FAIL, f"Database {trouble.problem}", trouble.code, error=error
            )
        if answer.pending:
            return self._observe(
                Status.FAIL,
                f"Database schema is behind: {', '.join(answer.pending)} pending;"
                " run `viralfx migrate`",
                "schema_behind",
            )
        if answer.read_only:
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

    async def close(self) -> None:
        """Cut the connection."""
        self.question.close()

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
                "isConnected": self.question.connected,
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
