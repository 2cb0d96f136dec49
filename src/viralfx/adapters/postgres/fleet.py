"""The fleet in Postgres: one row for each process and each change."""

from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime, timedelta
from typing import Any, Final, TypeVar

import msgspec

from viralfx.core.errors import LedgerUnavailableError
from viralfx.domain.fleet import (
    MAX_ENDED,
    SILENT_AFTER_SECONDS,
    CheckChange,
    Fleet,
    FleetUnavailableError,
    Instance,
    InstanceReport,
)
from viralfx.domain.health.model import State
from viralfx.jobs.codec import storable
from viralfx.jobs.postgres.ledger_rows import Row
from viralfx.postgres.database import PostgresDatabase, run_within
from viralfx.postgres.migrations import qualified

T = TypeVar("T")

_TIMEOUT_SECONDS = 4.0
_MAX_RUNS = 1000

# One statement, so that a beat is one transaction and one round trip.
_REPORT: Final = """
WITH changed AS (
    INSERT INTO viralfx_transitions (instance, number, check_name, at, old, new, code)
    SELECT $1::text, change.* FROM unnest(
        $14::bigint[], $15::text[], $16::timestamptz[], $17::text[], $18::text[], $19::text[]
    ) AS change
    ON CONFLICT (instance, number) DO NOTHING
)
INSERT INTO viralfx_instances (
    instance, host, role, version, environment, started_at, state, reason, health, checks, jobs,
    queues, backend, seen_at
) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, statement_timestamp())
ON CONFLICT (instance) DO UPDATE SET state = excluded.state, reason = excluded.reason,
    health = excluded.health, checks = excluded.checks, jobs = excluded.jobs,
    queues = excluded.queues, backend = excluded.backend, seen_at = excluded.seen_at
"""
# The connection of the health check tells that a process was killed, at once: the kernel closes it.
# A later connection may have its number, hence the time. Without the right to see the connections
# of another role, its time is NULL. A join, as a subquery would list all connections for each row.
_LIVENESS = """
extract(epoch FROM statement_timestamp() - known.seen_at)::float8 AS age,
    CASE WHEN known.backend IS NOT NULL THEN activity.pid IS NOT NULL
        AND (activity.backend_start IS NULL OR activity.backend_start <= known.seen_at)
    END AS connected
"""
_CONNECTIONS = """
LEFT JOIN pg_catalog.pg_stat_activity AS activity ON activity.pid = known.backend
"""
_FLEET: Final = f"""
SELECT known.*, {_LIVENESS}
FROM (
    SELECT *, count(*) OVER () AS total,
        row_number() OVER (PARTITION BY ended ORDER BY seen_at DESC) AS place
    FROM viralfx_instances CROSS JOIN LATERAL (
        SELECT CASE WHEN state = '{State.STOPPED}' THEN 'stopped'
            WHEN seen_at < statement_timestamp() - interval '{SILENT_AFTER_SECONDS} s' THEN 'silent'
        END AS ended
    ) AS kind
) AS known {_CONNECTIONS}
WHERE known.ended IS NULL OR known.place <= {MAX_ENDED}
ORDER BY known.seen_at DESC
"""  # noqa: S608 - constants
_RUNS: Final = f"""
SELECT known.*, {_LIVENESS}
FROM viralfx_instances AS own
JOIN viralfx_instances AS known ON known.host = own.host AND known.role = own.role
{_CONNECTIONS}
WHERE own.instance = $1
ORDER BY known.seen_at DESC LIMIT {_MAX_RUNS}
"""  # noqa: S608 - constants
_CHANGES: Final = """
SELECT * FROM viralfx_transitions
WHERE ($1::text IS NULL OR check_name = $1) AND ($2::text IS NULL OR instance = $2)
ORDER BY at DESC, number DESC LIMIT $3
"""
_HISTORY: Final = """
SELECT * FROM (
    SELECT DISTINCT ON (instance, check_name) * FROM viralfx_transitions
    WHERE instance = ANY($1::text[]) AND at < $2
    ORDER BY instance, check_name, at DESC, number DESC
) AS before
UNION ALL
SELECT * FROM viralfx_transitions WHERE instance = ANY($1::text[]) AND at >= $2
ORDER BY at, number
"""
_PRUNE: Final = """
WITH instances AS (
    DELETE FROM viralfx_instances WHERE instance IN (
        SELECT instance FROM viralfx_instances WHERE seen_at < statement_timestamp() - $1::interval
        LIMIT $2
    ) RETURNING 1
), transitions AS (
    DELETE FROM viralfx_transitions WHERE (instance, number) IN (
        SELECT instance, number FROM viralfx_transitions
        WHERE at < statement_timestamp() - $1::interval LIMIT $2
    ) RETURNING 1
)
SELECT (SELECT count(*) FROM instances) + (SELECT count(*) FROM transitions)
"""


class PostgresFleetStore:
    """Keeps the fleet in the tables of the schema.

    Behind a pooler a connection of the server is not that of one process, so only the age of a
    report tells whether the process lives.
    """

    kept = "postgres"

    def __init__(self, database: PostgresDatabase) -> None:
        self._database = database
        settings = database.config.settings
        self._may_watch = settings.pooler == "none"
        self._reported_backend: int | None = None
        self._report, self._fleet, self._runs, self._changes, self._history, self._prune = (
            qualified(statement, settings.schema)
            for statement in (_REPORT, _FLEET, _RUNS, _CHANGES, _HISTORY, _PRUNE)
        )

    @property
    def _backend(self) -> int | None:
        return self._database.health_backend if self._may_watch else None

    def moved(self) -> bool:
        """Return True if the health check has another connection than at the last report."""
        return self._backend != self._reported_backend

    async def report(self, report: InstanceReport, changes: Sequence[CheckChange] = ()) -> None:
        """See :class:`viralfx.domain.fleet.FleetStore`."""
        backend = self._backend
        arguments = (
            report.instance,
            report.host,
            report.role,
            report.version,
            report.environment,
            report.started_at,
            report.state,
            storable(report.reason),
            report.health,
            msgspec.json.encode(report.checks).decode(),
            report.jobs,
            list(report.queues),
            backend,
            [each.number for each in changes],
            [each.check for each in changes],
            [each.at for each in changes],
            [each.old for each in changes],
            [each.new for each in changes],
            [None if each.code is None else storable(each.code) for each in changes],
        )
        await self._run(lambda connection: connection.execute(self._report, *arguments))
        self._reported_backend = backend

    async def fleet(self) -> Fleet:
        """See :class:`viralfx.domain.fleet.FleetStore`."""
        rows = await self._run(lambda connection: connection.fetch(self._fleet))
        more = rows[0]["total"] - len(rows) if rows else 0
        return Fleet(instances=[_instance(row) for row in rows], more=more)

    async def runs(self, instance: str) -> Sequence[Instance]:
        """See :class:`viralfx.domain.fleet.FleetStore`."""
        rows = await self._run(lambda connection: connection.fetch(self._runs, instance))
        return [_instance(row) for row in rows]

    async def changes(
        self, *, check: str | None = None, instance: str | None = None, limit: int = 200
    ) -> Sequence[CheckChange]:
        """See :class:`viralfx.domain.fleet.FleetStore`."""
        return await self._changed(self._changes, check, instance, limit)

    async def history(self, instances: Sequence[str], since: datetime) -> Sequence[CheckChange]:
        """See :class:`viralfx.domain.fleet.FleetStore`."""
        return await self._changed(self._history, list(instances), since)

    async def _changed(self, statement: str, *arguments: object) -> Sequence[CheckChange]:
        rows = await self._run(lambda connection: connection.fetch(statement, *arguments))
        return [
            CheckChange(
                instance=row["instance"],
                number=row["number"],
                check=row["check_name"],
                at=row["at"],
                old=row["old"],
                new=row["new"],
                code=row["code"],
            )
            for row in rows
        ]

    async def prune(self, older_than: float, limit: int = 10_000) -> int:
        """See :class:`viralfx.domain.fleet.FleetStore`."""
        age = timedelta(seconds=older_than)
        return int(await self._run(lambda connection: connection.fetchval(self._prune, age, limit)))

    async def _run(self, step: Callable[[Any], Awaitable[T]]) -> T:
        try:
            return await run_within(self._database, step, _TIMEOUT_SECONDS)
        except LedgerUnavailableError as error:
            raise FleetUnavailableError(str(error)) from error


def _instance(row: Row) -> Instance:
    report = InstanceReport(
        instance=row["instance"],
        host=row["host"],
        role=row["role"],
        version=row["version"],
        environment=row["environment"],
        started_at=row["started_at"],
        state=row["state"],
        reason=row["reason"],
        health=row["health"],
        checks=msgspec.json.decode(row["checks"]),
        jobs=row["jobs"],
        queues=tuple(row["queues"]),
    )
    return Instance(
        report=report,
        seen_at=row["seen_at"],
        age=max(0.0, row["age"]),
        connected=row["connected"],
    )
