"""Applies the migrations: files of SQL, each in a transaction of its own and under a lock."""

import asyncio
from pathlib import Path

import asyncpg

from viralfx.core.errors import ViralFXError
from viralfx.postgres.connections import Connector, PostgresConfig
from viralfx.postgres.migrations import (
    LOCK_TIMEOUT_SECONDS,
    REVISIONS,
    VERSION_TABLE,
    channel_of,
    current_revision,
    missing_after,
    qualified,
)
from viralfx.postgres.servers import ServerConnection

LOCK = 7_305_981_240_662_115
"""Key of the advisory lock for migrations; an arbitrary number. Every version has the same."""
FOLDER = Path(__file__).parent / "migrations"
_SCHEMA = "viralfx_ops"
"""The schema that the files name."""
_TABLE_LOCK_SECONDS = 0.5
"""How long one try waits for the lock of a table, and with it all statements that come after it.

It is shorter than the default of ``deadlock_timeout``, so that of two transactions that wait for
each other it is the migration that gives way.
"""
_PAUSE_SECONDS = 1.5
"""Between two tries."""
_IN_USE = asyncpg.LockNotAvailableError, asyncpg.DeadlockDetectedError


class MigrationLockedError(ViralFXError):
    """Another run held the lock for too long."""


def file_of(revision: str) -> Path:
    """Return the file of a migration."""
    (path,) = FOLDER.glob(f"{revision}_*.sql")
    return path


def description_of(revision: str) -> str:
    """Return the sentence in the first line of a migration."""
    return file_of(revision).read_text(encoding="utf-8").partition("\n")[0].removeprefix("-- ")


def statements_of(path: Path, schema: str) -> str:
    """Return the statements of a file for ``schema`` in place of the default one."""
    text = path.read_text(encoding="utf-8")
    text = text.replace(f"'{channel_of(_SCHEMA)}'", f"'{channel_of(schema)}'")
    return text.replace(f"{_SCHEMA}.", f'"{schema}".')


async def apply_migrations(
    config: PostgresConfig,
    applied: list[tuple[str, str]] | None = None,
    *,
    target: str = REVISIONS[-1],
    lock_timeout: float = LOCK_TIMEOUT_SECONDS,
) -> list[tuple[str, str]]:
    """Apply pending migrations; return them as pairs of revision and description, as ``applied``.

    Each one runs in a transaction of its own under a lock: a failure leaves nothing of it behind,
    and concurrent runs apply each one once. The duration is not limited, but the wait for another
    run or for the lock of a table is, to ``lock_timeout`` seconds. Cancellation ends it at once.
    Raises :class:`MigrationLockedError` and the driver's errors.
    """
    applied = [] if applied is None else applied
    schema = config.settings.schema
    connection = await Connector(config).connect(statement_timeout="0")

    async def apply() -> None:
        while done := await _apply_next(connection, schema, target, lock_timeout):
            applied.append(done)

    work = asyncio.ensure_future(apply())
    try:
        await asyncio.shield(work)
    finally:
        # Cancelling alone would send a cancel request and wait for the server. The server rolls
        # back by itself when the connection closes.
        connection.terminate()
        work.cancel()
        await asyncio.wait({work})
    return applied


async def _apply_next(
    connection: ServerConnection, schema: str, target: str, lock_timeout: float
) -> tuple[str, str] | None:
    """Apply the next migration, and return it.

    A transaction that has a table in use may last minutes. All other statements would queue behind
    a migration that waits for it, so each try is short, and lets them pass before the next one.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + lock_timeout
    while True:
        try:
            # Other levels would not see the migrations that were made while it waits for the lock.
            async with connection.transaction(isolation="read_committed"):
                await _lock(connection, lock_timeout)
                return await _upgrade(connection, schema, target)
        except _IN_USE:
            if loop.time() + _PAUSE_SECONDS > end:
                raise
        await asyncio.sleep(_PAUSE_SECONDS)


async def _lock(connection: ServerConnection, lock_timeout: float) -> None:
    await connection.execute(_lock_timeout(lock_timeout))
    try:
        await connection.execute(f"SELECT pg_advisory_xact_lock({LOCK})")
    except asyncpg.LockNotAvailableError as error:
        raise MigrationLockedError(
            f"is being migrated by another run, which took longer than {lock_timeout:g} s"
        ) from error
    await connection.execute(_lock_timeout(_TABLE_LOCK_SECONDS))


def _lock_timeout(seconds: float) -> str:
    return f"SET LOCAL lock_timeout = {max(1, round(seconds * 1000))}"


async def _upgrade(
    connection: ServerConnection, schema: str, target: str
) -> tuple[str, str] | None:
    current = await current_revision(connection, schema)
    pending = [revision for revision in missing_after(current) if revision <= target]
    if not pending:
        return None
    revision = pending[0]
    await _make_schema(connection, schema)
    await connection.execute(statements_of(file_of(revision), schema))
    await _record(connection, schema, current, revision)
    return revision, description_of(revision)


async def _make_schema(connection: ServerConnection, schema: str) -> None:
    # With IF NOT EXISTS, Postgres asks for the right to create one also if there is one.
    found = "SELECT true FROM pg_catalog.pg_namespace WHERE nspname = $1"
    if await connection.fetchval(found, schema) is None:
        await connection.execute(f'CREATE SCHEMA "{schema}"')


async def _record(
    connection: ServerConnection, schema: str, before: str | None, revision: str
) -> None:
    """Write the revision into the table, which is the one that Alembic made for 0.2.0."""
    table = qualified(VERSION_TABLE, schema)
    if before is None:
        await connection.execute(
            f"CREATE TABLE IF NOT EXISTS {table} (version_num varchar(32) NOT NULL,"
            f" CONSTRAINT {VERSION_TABLE}_pkc PRIMARY KEY (version_num))"
        )
        await connection.execute(f"INSERT INTO {table} VALUES ($1)", revision)  # noqa: S608 - a constant
    else:
        await connection.execute(f"UPDATE {table} SET version_num = $1", revision)  # noqa: S608 - as above
