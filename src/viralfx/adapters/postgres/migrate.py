"""Applies the migrations with Alembic, on a connection of the adapter and under a lock."""

import asyncio
import io
from pathlib import Path
from typing import Any

import asyncpg
from alembic.config import Config
from alembic.runtime.environment import EnvironmentContext
from alembic.runtime.migration import MigrationContext, MigrationInfo
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, TextClause, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine
from sqlalchemy.pool import NullPool

from viralfx.adapters.postgres.connections import Connector, PostgresConfig
from viralfx.adapters.postgres.migrations import LOCK_TIMEOUT_SECONDS, VERSION_TABLE
from viralfx.domain.errors import ViralFXError

LOCK = 7_305_981_240_662_115
"""Key of the advisory lock for migrations; an arbitrary number."""
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


def scripts() -> ScriptDirectory:
    """Return the migrations of this package."""
    config = Config(stdout=io.StringIO())
    folder = str(Path(__file__).parent / "migrations")
    config.set_main_option("script_location", folder)
    config.set_main_option("version_locations", folder)
    config.set_main_option("path_separator", "os")
    return ScriptDirectory.from_config(config)


async def apply_migrations(
    config: PostgresConfig,
    applied: list[tuple[str, str]] | None = None,
    *,
    target: str = "head",
    lock_timeout: float = LOCK_TIMEOUT_SECONDS,
) -> list[tuple[str, str]]:
    """Apply pending migrations; return them as pairs of revision and description, as ``applied``.

    Each one runs in a transaction of its own under a lock: a failure leaves nothing of it behind,
    and concurrent runs apply each one once. The duration is not limited, but the wait for another
    run or for the lock of a table is, to ``lock_timeout`` seconds. Cancellation ends it at once.
    Raises :class:`MigrationLockedError` and the driver's errors.
    """
    applied = [] if applied is None else applied
    made: list[asyncpg.Connection[Any]] = []
    work = asyncio.ensure_future(_apply(config, made, applied, target, lock_timeout))
    try:
        await asyncio.shield(work)
    except asyncio.CancelledError:
        # Cancelling alone would send a cancel request and wait for the server. The server rolls
        # back by itself when the connection closes.
        for connection in made:
            connection.terminate()
        work.cancel()
        await asyncio.wait({work})
        raise
    except DBAPIError as error:
        raise _driver_error(error) from None
    return applied


async def _apply(
    config: PostgresConfig,
    made: "list[asyncpg.Connection[Any]]",
    applied: list[tuple[str, str]],
    target: str,
    lock_timeout: float,
) -> None:
    connector = Connector(config)

    async def make() -> "asyncpg.Connection[Any]":
        connection = await connector.connect(statement_timeout="0")
        made.append(connection)
        return connection

    engine = create_async_engine(
        "postgresql+asyncpg://",
        async_creator=make,
        poolclass=NullPool,
        # Statements without a name: behind a pooler another client may have taken the name.
        connect_args={"prepared_statement_name_func": str, "prepared_statement_cache_size": 0},
    )
    try:
        async with engine.connect() as connection:
            while done := await _apply_next(
                connection, config.settings.schema, target, lock_timeout
            ):
                applied += done
    finally:
        await engine.dispose()


async def _apply_next(
    connection: AsyncConnection, schema: str, target: str, lock_timeout: float
) -> list[tuple[str, str]]:
    """Apply the next migration, and return it.

    A transaction that has a table in use may last minutes. All other statements would queue behind
    a migration that waits for it, so each try is short, and lets them pass before the next one.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + lock_timeout
    while True:
        try:
            async with connection.begin():
                await _lock(connection, lock_timeout)
                await _make_schema(connection, schema)
                return await connection.run_sync(_upgrade, schema, target)
        except DBAPIError as error:
            if not isinstance(_driver_error(error), _IN_USE) or loop.time() + _PAUSE_SECONDS > end:
                raise
        await asyncio.sleep(_PAUSE_SECONDS)


async def _lock(connection: AsyncConnection, lock_timeout: float) -> None:
    await connection.execute(_lock_timeout(lock_timeout))
    try:
        await connection.execute(text(f"SELECT pg_advisory_xact_lock({LOCK})"))
    except DBAPIError as error:
        if isinstance(_driver_error(error), asyncpg.LockNotAvailableError):
            raise MigrationLockedError(
                f"is being migrated by another run, which took longer than {lock_timeout:g} s"
            ) from error
        raise
    await connection.execute(_lock_timeout(_TABLE_LOCK_SECONDS))


def _lock_timeout(seconds: float) -> TextClause:
    return text(f"SET LOCAL lock_timeout = {max(1, round(seconds * 1000))}")


async def _make_schema(connection: AsyncConnection, schema: str) -> None:
    # With IF NOT EXISTS, Postgres asks for the right to create one also if there is one.
    found = text("SELECT true FROM pg_catalog.pg_namespace WHERE nspname = :name")
    if (await connection.execute(found, {"name": schema})).first() is None:
        await connection.execute(text(f'CREATE SCHEMA "{schema}"'))


def _driver_error(error: BaseException) -> BaseException:
    # SQLAlchemy wraps the driver's error, sometimes twice.
    while error.__cause__ is not None and not isinstance(error, OSError | asyncpg.PostgresError):
        error = error.__cause__
    return error


def _upgrade(connection: Connection, schema: str, target: str) -> list[tuple[str, str]]:
    directory = scripts()
    applied: list[tuple[str, str]] = []

    def note(ctx: object, step: MigrationInfo, heads: object, run_args: object) -> None:  # noqa: ARG001 - the names are Alembic's
        script = directory.get_revision(str(step.up_revision_id))
        applied.append((script.revision, script.doc))

    def steps(revision: Any, _: MigrationContext) -> Any:
        return directory._upgrade_revs(target, revision)[:1]  # noqa: SLF001 - as alembic's own command

    with EnvironmentContext(Config(), directory, fn=steps) as environment:
        environment.configure(
            connection=connection,
            version_table=VERSION_TABLE,
            version_table_schema=schema,
            on_version_apply=note,
        )
        environment.run_migrations()
    return applied
