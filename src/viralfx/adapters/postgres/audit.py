"""The audit trail in Postgres: one row for each event."""

from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta
from typing import Any, Final, TypeVar

import asyncpg

from viralfx.core.errors import LedgerUnavailableError, NotMigratedError
from viralfx.domain.audit import (
    ANY_EVENT,
    PRUNED_AT_ONCE,
    AuditEvent,
    AuditFilter,
    AuditUnavailableError,
)
from viralfx.jobs.codec import storable
from viralfx.jobs.postgres.ledger_rows import Row
from viralfx.postgres.database import PostgresDatabase, run_within
from viralfx.postgres.migrations import qualified

T = TypeVar("T")

_TIMEOUT_SECONDS = 4.0

_WRITE: Final = """
INSERT INTO viralfx_audit_events (
    id, at, actor, address, action, target, outcome, before, after, detail, correlation_id, instance
) SELECT * FROM unnest(
    $1::uuid[], $2::timestamptz[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[],
    $8::text[], $9::text[], $10::text[], $11::text[], $12::text[]
) ON CONFLICT (id) DO NOTHING
"""
_READ: Final = """
SELECT * FROM viralfx_audit_events
WHERE ($1::uuid IS NULL OR id < $1)
    AND ($2::timestamptz IS NULL OR at >= $2) AND ($3::timestamptz IS NULL OR at < $3)
    AND ($4::text IS NULL OR actor = $4) AND ($5::text IS NULL OR action = $5)
    AND ($6::text IS NULL OR outcome = $6)
ORDER BY id DESC LIMIT $7
"""
_PRUNE: Final = """
WITH pruned AS (
    DELETE FROM viralfx_audit_events WHERE id IN (
        SELECT id FROM viralfx_audit_events WHERE at < statement_timestamp() - $1::interval
        ORDER BY at LIMIT $2
    ) RETURNING 1
)
SELECT count(*) FROM pruned
"""


class PostgresAuditStore:
    """Keeps the events of all processes in a table of the schema."""

    kept = "postgres"

    def __init__(self, database: PostgresDatabase) -> None:
        self._database = database
        schema = database.config.settings.schema
        self._write, self._read, self._prune = (
            qualified(statement, schema) for statement in (_WRITE, _READ, _PRUNE)
        )

    async def write(self, events: Sequence[AuditEvent]) -> None:
        """See :class:`viralfx.domain.audit.AuditStore`."""

        async def insert(connection: Any) -> None:
            try:
                await connection.execute(self._write, *_columns(events, _storable))
            except asyncpg.UntranslatableCharacterError:
                # The database is not in UTF-8, and a client has chosen a character that it lacks.
                await connection.execute(self._write, *_columns(events, _ascii))

        await self._run(insert)

    async def read(
        self, wanted: AuditFilter = ANY_EVENT, *, before: str | None = None, limit: int = 100
    ) -> Sequence[AuditEvent]:
        """See :class:`viralfx.domain.audit.AuditStore`."""
        rows = await self._run(
            lambda connection: connection.fetch(
                self._read,
                before,
                wanted.since,
                wanted.until,
                _storable(wanted.actor),
                _storable(wanted.action),
                _storable(wanted.outcome),
                limit,
            )
        )
        return [_event(row) for row in rows]

    async def prune(self, older_than: float, limit: int = PRUNED_AT_ONCE) -> int:
        """See :class:`viralfx.domain.audit.AuditStore`."""
        age = timedelta(seconds=older_than)
        return int(await self._run(lambda connection: connection.fetchval(self._prune, age, limit)))

    async def _run(self, step: Callable[[Any], Awaitable[T]]) -> T:
        try:
            return await run_within(self._database, step, _TIMEOUT_SECONDS)
        except NotMigratedError as error:
            raise AuditUnavailableError(
                "the table of the audit trail is missing: run `viralfx migrate`"
            ) from error
        except LedgerUnavailableError as error:
            raise AuditUnavailableError(str(error)) from error


_TEXTS = (
    *("actor", "address", "action", "target", "outcome", "before", "after"),
    *("detail", "correlation_id", "instance"),
)


def _columns(
    events: Sequence[AuditEvent], text_of: Callable[[str | None], str | None]
) -> tuple[list[Any], ...]:
    return (
        [each.id for each in events],
        [each.at for each in events],
        *([text_of(getattr(each, name)) for each in events] for name in _TEXTS),
    )


def _ascii(text: str | None) -> str | None:
    return None if text is None else storable(text).encode("ascii", "backslashreplace").decode()


def _storable(text: str | None) -> str | None:
    return None if text is None else storable(text)


def _event(row: Row) -> AuditEvent:
    return AuditEvent(
        id=str(row["id"]),
        at=row["at"],
        actor=row["actor"],
        address=row["address"],
        action=row["action"],
        target=row["target"],
        outcome=row["outcome"],
        before=row["before"],
        after=row["after"],
        detail=row["detail"],
        correlation_id=row["correlation_id"],
        instance=row["instance"],
    )
