"""The database check: response of the server, pool counters and schema version.

The checks of the database and of the queues share one query on a dedicated connection.
"""

import asyncio
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, Final

from asyncpg.connection import Connection
from asyncpg.exceptions import PostgresError

from viralfx.core.clock import Clock, timestamp
from viralfx.core.errors import LedgerUnavailableError, NotMigratedError
from viralfx.domain.health.model import Observation, Status
from viralfx.jobs.ledger import QueueCounts
from viralfx.jobs.model import JobState
from viralfx.jobs.postgres import ledger_sql
from viralfx.jobs.postgres.ledger_rows import Row, counts_of_rows
from viralfx.jobs.postgres.ledger_sql import COUNTS, PROMOTED_AT_ONCE, SOON_SECONDS
from viralfx.postgres.connections import (
    is_process_shared,
    run_limited,
    run_query,
)
from viralfx.postgres.database import PostgresDatabase, VacuumStatus
from viralfx.postgres.errors import (
    POOLER_REFUSAL,
    PoolerModeError,
    explain,
    unavailable,
)
from viralfx.postgres.migrations import (
    REVISIONS,
    Statements,
    current_revision,
    is_later,
    missing_after,
    qualified,
)
from viralfx.postgres.pool import IS_READ_ONLY, end_of_life
from viralfx.postgres.retry import is_loss
from viralfx.settings import milliseconds

_logger = logging.getLogger("viralfx.database")

# Vacuum keeps each row that the oldest transaction of the database may still see. The times of
# other users' transactions are NULL without the role pg_read_all_stats.
_VACUUM: Final = """
(
    SELECT extract(epoch FROM coalesce(max(statement_timestamp() - begun), '0'))
    FROM (
        SELECT xact_start AS begun FROM pg_catalog.pg_stat_activity
        WHERE datname = current_database()
            AND (backend_xmin IS NOT NULL OR backend_xid IS NOT NULL)
        UNION ALL
        SELECT prepared FROM pg_catalog.pg_prepared_xacts WHERE database = current_database()
    ) AS transactions
) AS oldest_transaction,
pg_catalog.pg_stat_get_dead_tuples('viralfx_jobs'::regclass) AS dead_job_rows
"""
# The start of a server tells it from the one that takes its place.
_STATE: Final = f"""
{IS_READ_ONLY}, pg_catalog.pg_postmaster_start_time() AS server_started,
pg_catalog.pg_backend_pid() AS process
"""
HEALTH_QUERY: Final = f"""
{_STATE}, {_VACUUM}, counted.*
FROM (VALUES (0)) AS one LEFT JOIN ({COUNTS}) AS counted ON true
"""

_COUNT_TIMEOUT_SHARE = 0.4
"""Share of the timeout after which the server cancels counting, if it is locked or busy."""

_SILENT_SHARE = 0.6
"""Share of the timeout after which a kept connection without an answer is left for a new one."""

_PROBE_SHARE = 0.3
"""Share of the timeout in which a pooler must let a second connection in, to prove its mode."""

_MAX_COUNTERS = 10_000
"""Number of counter rows from which the health query folds them: no worker does."""

MAX_FAILURE_AGE_SECONDS = 1.0
"""Failures up to this age are shared with callers that accept a result of that age."""


@dataclass(frozen=True, slots=True)
class HealthQueryResult:
    """Result of the health query."""

    pending: tuple[str, ...]
    """Migrations that this code needs and the database lacks."""
    read_only: bool
    counts: Mapping[str, QueueCounts] | LedgerUnavailableError
    """Counts of the queues that ever had a job, or the error of counting them."""
    server_started: datetime | None = None
    """When the server was started; None if migrations are pending."""


class HealthQuery:
    """Runs one query that serves all checks of the database.

    Callers that accept a result of some age share a recent one. Callers that waited while the
    query failed share the failure. The connection is used for nothing else; if it fails, or the
    caller is cancelled, it is closed and reopened for the next query. It is also reopened for each
    query while the server accepts no writes: that finds the server that does. If it is silent, a
    new one is opened within the same query. If that leads to another primary, all connections to
    the silent one are left.
    """

    def __init__(self, database: PostgresDatabase, clock: Clock, *, timeout: float) -> None:
        """``timeout``: seconds for the query, connecting included."""
        self._database = database
        self._clock = clock
        self._timeout = timeout
        self._schema = database.config.settings.schema
        self._sql = Statements(self._schema, ledger_sql)
        self._statement = qualified(HEALTH_QUERY, self._schema)
        self._connection: Connection[Any] | None = None
        self._ends_at = math.inf
        self._read_only = False
        """True if the last server that was asked accepted no writes."""
        self._primary_started: datetime | None = None
        """When the last server that accepted writes was started."""
        self._silent_since: float | None = None
        """When the first unanswered question began; None after a later answer of a primary."""
        self._schema_is_current = self._pooler_is_judged = False
        self._reported_revision: str | None = None
        self._lock = asyncio.Lock()
        self._result: HealthQueryResult | None = None
        self._started_at = 0.0
        self._failure: Exception | None = None
        self._failed_at = 0.0

    @property
    def connected(self) -> bool:
        """True if there is a connection that has not failed."""
        return self._connection is not None

    async def run(self, max_age: float = 0.0) -> HealthQueryResult:
        """Return a result whose query started at most ``max_age`` seconds before the call.

        Raises the driver's errors and ``TimeoutError``; also those of another caller's query that
        failed since the call, or at most ``max_age`` (and one second) before it.
        """
        began = self._clock.monotonic()
        async with self._lock:
            if self._result is not None and self._started_at >= began - max_age:
                return self._result
            shared_for = min(max_age, MAX_FAILURE_AGE_SECONDS)
            if self._failure is not None and self._failed_at >= began - shared_for:
                raise self._failure
            # The time before the query: changes after the server counted are not in the result.
            self._started_at = self._clock.monotonic()
            try:
                async with asyncio.timeout(self._timeout):
                    self._result = await self._query()
            except BaseException as error:
                self.close()
                self._result = self._database.vacuum = None
                self._failure = error if isinstance(error, Exception) else None
                self._failed_at = self._clock.monotonic()
                raise
            self._failure = None
            return self._result

    async def counts(self, max_age: float = 0.0) -> Mapping[str, QueueCounts]:
        """Return the counts of the queues; raises :class:`LedgerUnavailableError`."""
        try:
            counts = (await self.run(max_age)).counts
        except Exception as error:
            raise unavailable(error) from error
        if isinstance(counts, LedgerUnavailableError):
            raise counts
        return counts

    def close(self) -> None:
        """Close the connection at once."""
        connection, self._connection = self._connection, None
        self._database.health_backend = None
        if connection is not None:
            connection.terminate()

    async def _query(self) -> HealthQueryResult:
        finds_primary = self._database.config.needs_writes
        if self._read_only and finds_primary:
            self.close()
        before = self._connection
        began = asyncio.get_running_loop().time()
        waiting = asyncio.timeout(None if before is None else _SILENT_SHARE * self._timeout)
        try:
            async with waiting:
                result = await self._ask(await self._open())
        except TimeoutError:
            if not waiting.expired():
                raise
            # A server that is gone without a word; another one may have its place.
            self._silent_since = self._silent_since or began
            self.close()
            result = await self._ask(await self._open())
        if result.read_only and finds_primary and self._connection is before:
            # The connection outlived a change of the primary.
            self.close()
            result = await self._ask(await self._open())
        if finds_primary and not result.read_only and result.server_started is not None:
            self._found_primary(result.server_started)
        if result.read_only is not self._read_only and not result.pending:
            self._read_only = result.read_only
            if finds_primary:
                # Connections of the pool may still lead to the other server.
                reason = "read_only" if result.read_only else "writable"
                self._database.members.replace_all(reason)
        return result

    def _found_primary(self, started: datetime) -> None:
        """Leave a silent server if another one has its place."""
        before, self._primary_started = self._primary_started, started
        since, self._silent_since = self._silent_since, None
        if since is not None and before not in {None, started}:
            self._database.members.leave_silent(since)

    async def _open(self) -> "Connection[Any]":
        """Return the connection; open it if there is none, or if it reached its greatest age."""
        connection = self._connection
        now = asyncio.get_running_loop().time()
        if connection is None or connection.is_closed() or now >= self._ends_at:
            self.close()
            connection = self._connection = await self._connect()
            self._database.health_backend = connection.get_server_pid()
            connection.add_termination_listener(self._on_ended)
            self._ends_at = end_of_life(self._database.config.settings.max_lifetime)
            self._schema_is_current = self._pooler_is_judged = False
        return connection

    async def _judge_pooler(self, connection: "Connection[Any]", process: int) -> None:
        """Raise :class:`PoolerModeError` if ``DB_POOLER`` does not say how the pooler works.

        ``process`` answered; a pooler's greeting names another one. A connection is judged once.
        """
        database, known = self._database, self._pooler_is_judged
        self._pooler_is_judged = True
        if known or database.config.settings.pooler == "transaction":
            return
        database.members.share_processes = (
            connection.get_server_pid() != process
            and await is_process_shared(
                database.connector, connection, _PROBE_SHARE * self._timeout
            )
        )
        if database.members.share_processes:
            raise PoolerModeError

    def _on_ended(self, connection: object) -> None:
        # The server may end it long before the next query. Reported until then, it would show that
        # this process was killed.
        if connection is self._connection:
            self._database.health_backend = None

    async def _ask(self, connection: "Connection[Any]") -> HealthQueryResult:
        if not self._schema_is_current and (behind := await self._judge_schema(connection)):
            return behind
        try:
            rows = await run_limited(
                connection, lambda: connection.fetch(self._statement, JobState.WAITING)
            )
        except PostgresError as error:
            if is_loss(error) or connection.is_closed():
                raise
            self._database.vacuum, counts = None, unavailable(error)
            # The tables may have been dropped since, as by migrations of an application.
            dropped = isinstance(counts, NotMigratedError)
            if dropped and (behind := await self._judge_schema(connection)):
                return behind
            # A locked or huge table of jobs does not make the server unhealthy.
            state = await run_query(connection, connection.fetchrow(_STATE))
            await self._judge_pooler(connection, state["process"])
            return HealthQueryResult(
                (),
                read_only=state["read_only"] != "off",
                counts=counts,
                server_started=state["server_started"],
            )
        await self._judge_pooler(connection, rows[0]["process"])
        read_only = rows[0]["read_only"] != "off"
        self._database.vacuum = VacuumStatus(
            oldest_transaction=max(0.0, float(rows[0]["oldest_transaction"])),
            dead_job_rows=rows[0]["dead_job_rows"],
        )
        counted = [row for row in rows if row["queue"] is not None]
        if not read_only:
            await self._maintain(connection, counted)
        return HealthQueryResult(
            (),
            read_only=read_only,
            counts=counts_of_rows(counted),
            server_started=rows[0]["server_started"],
        )

    async def _judge_schema(self, connection: "Connection[Any]") -> HealthQueryResult | None:
        """Return the result for a database that lacks migrations; None if it has all."""
        revision = await run_query(connection, current_revision(connection, self._schema))
        pending = missing_after(revision)
        self._schema_is_current = not pending
        if pending:
            behind = NotMigratedError("the tables of jobs are behind: run `viralfx migrate`")
            return HealthQueryResult(pending, read_only=False, counts=behind)
        self._warn_of_later_schema(revision)
        return None

    async def _maintain(self, connection: "Connection[Any]", counted: Sequence[Row]) -> None:
        """Do a part of the sweep's work if it was not done, because no worker is alive."""
        steps: list[tuple[str, tuple[int | None, ...]]] = []
        if sum(row["counters"] for row in counted) > _MAX_COUNTERS:
            steps.append((self._sql.FOLD, (_MAX_COUNTERS,)))
        if any(row["overdue"] for row in counted):
            steps.append((self._sql.PROMOTE, (SOON_SECONDS, PROMOTED_AT_ONCE, None)))
        try:
            for statement, arguments in steps:
                await run_limited(connection, partial(connection.execute, statement, *arguments))
        except PostgresError as error:
            if is_loss(error) or connection.is_closed():
                raise

    def _warn_of_later_schema(self, revision: str | None) -> None:
        # Usable, for example after a rollback of a deployment; the log shows a wrong image.
        if is_later(revision) and revision != self._reported_revision:
            extra = {"revision": revision, "known": REVISIONS[-1]}
            _logger.warning("Database schema is of a later version", extra=extra)
            self._reported_revision = revision

    async def _connect(self) -> "Connection[Any]":
        limit = str(max(1, round(self._timeout * _COUNT_TIMEOUT_SHARE * 1000)))
        return await self._database.connect("health", statement_timeout=limit)


class PostgresHealthCheck:
    """Runs one query per check on a dedicated connection.

    So the check does not wait for the application's pool; an exhausted pool is a warning.
    """

    def __init__(self, database: PostgresDatabase, clock: Clock, *, timeout: float) -> None:
        """``timeout`` in seconds should be shorter than the monitor's.

        Then the check reports the timeout itself, with the pool's counters, before the monitor
        cancels it.
        """
        self._database = database
        self._clock = clock
        self.query = HealthQuery(database, clock, timeout=timeout)
        """The query; other checks may share its result."""

    async def check(self) -> Observation:
        """Run the query once and judge the result. May be cancelled at any point."""
        try:
            result = await self.query.run()
        except Exception as error:  # noqa: BLE001 - every error has a code and is logged
            explained = explain(error)
            message = f"Database {explained.problem}"
            if explained.code == POOLER_REFUSAL:
                message += f"; {explained.remedy}"
            return self._observe(Status.FAIL, message, explained.code, error=error)
        if result.pending:
            return self._observe(
                Status.FAIL,
                f"Database schema is behind: {', '.join(result.pending)} pending;"
                " run `viralfx migrate`",
                "schema_behind",
            )
        if result.read_only and self._database.config.needs_writes:
            return self._observe(
                Status.FAIL,
                "Database accepts no writes: it is a standby, or was set to read only; name the"
                " primary, or set target_session_attrs for a standby",
                "read_only",
            )
        settings, waiting = self._database.config.settings, self._database.waiting
        if waiting and self._active >= settings.pool_max:
            return self._observe(
                Status.WARN,
                f"Database connection pool is exhausted: {waiting} wait for a connection",
                "pool_exhausted",
            )
        return self._observe(Status.PASS, "Database is healthy", None)

    async def close(self) -> None:
        """Close the connection at once."""
        self.query.close()

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
        database, settings = self._database, self._database.config.settings
        checked_at = timestamp(self._clock.now())

        def statistics() -> dict[str, object]:
            total, idle = database.total_connections, database.idle_connections
            return {
                "stats": {
                    "totalConnections": total,
                    "activeConnections": total - idle,
                    "idleConnections": idle,
                    "waitingRequests": database.waiting,
                    "failedConnections": database.failed_connections,
                    "slowQueries": database.slow_queries,
                    "lastHealthCheck": checked_at,
                }
            }

        return Observation(
            status=status,
            message=message,
            code=code,
            error=error,
            live_details=statistics,
            details={
                "adapter": "postgres",
                "isConnected": self.query.connected,
                **statistics(),
                "poolConfig": {
                    "min": settings.pool_min,
                    "max": settings.pool_max,
                    "timeout": milliseconds(settings.pool_timeout),
                },
            },
        )
