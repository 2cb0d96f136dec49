"""Applies the migrations: Alembic's order and bookkeeping, our connection and our lock."""

import asyncio
import io
from pathlib import Path
from typing import Any

import asyncpg
from alembic.config import Config
from alembic.runtime.environment import EnvironmentContext
from alembic.runtime.migration import MigrationContext, MigrationInfo
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine
from sqlalchemy.pool import NullPool

from viralfx.adapters.postgres.config import PostgresConfig
from viralfx.adapters.postgres.connection import connect
from viralfx.adapters.postgres.schema import LOCK_PATIENCE, VERSION_TABLE
from viralfx.domain.errors import ViralFXError

LOCK = 7_305_981_240_662_115
"""Of all advisory locks in the database, ours: any number that nobody else uses."""


class MigrationLockedError(ViralFXError):
    """Another run holds the lock, and did not end in time."""


def scripts() -> ScriptDirectory:
    """Return the migrations of this package."""
    config = Config(stdout=io.StringIO())
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.set_main_option("path_separator", "os")
    return ScriptDirectory.from_config(config)


async def apply_migrations(
    config: PostgresConfig, *, patience: float = LOCK_PATIENCE
) -> list[tuple[str, str]]:
    """Apply what is pending and return it, as pairs of revision and meaning.

    All of it is one transaction under a lock: a failure leaves nothing behind, and of several runs
    at once one works and the others find nothing to do. It takes the time it needs, but waits for
    another run no longer than ``patience`` seconds, and ends at once when cancelled. Raises
    :class:`MigrationLockedError` and what the driver does.
    """
    made: list[asyncpg.Connection[Any]] = []
    work = asyncio.ensure_future(_apply(config, made, patience))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        # Cancelling alone would ask the server to cancel, and wait for it. Without its connection
        # it rolls back by itself.
        for connection in made:
            connection.terminate()
        work.cancel()
        await asyncio.wait({work})
        raise
    except DBAPIError as error:
        raise _driver_error(error) from None


async def _apply(
    config: PostgresConfig, made: "list[asyncpg.Connection[Any]]", patience: float
) -> list[tuple[str, str]]:
    async def make() -> "asyncpg.Connection[Any]":
        arguments = {**config.connect_arguments(), "command_timeout": None}
        # A migration may take its time, but not hold up everybody who waits behind its lock.
        arguments["server_settings"] |= {"statement_timeout": "0", "lock_timeout": "10s"}
        connection = await connect(config, arguments)
        made.append(connection)
        return connection

    engine = create_async_engine("postgresql+asyncpg://", async_creator=make, poolclass=NullPool)
    try:
        async with engine.begin() as connection:
            await _lock(connection, patience)
            return await connection.run_sync(_upgrade)
    finally:
        await engine.dispose()


async def _lock(connection: AsyncConnection, patience: float) -> None:
    await connection.execute(text(f"SET LOCAL lock_timeout = {max(1, round(patience * 1000))}"))
    try:
        await connection.execute(text(f"SELECT pg_advisory_xact_lock({LOCK})"))
    except DBAPIError as error:
        if isinstance(_driver_error(error), asyncpg.LockNotAvailableError):
            raise MigrationLockedError(
                f"is being migrated by another run, which took longer than {patience:g} s"
            ) from error
        raise
    await connection.execute(text("SET LOCAL lock_timeout = '10s'"))


def _driver_error(error: BaseException) -> BaseException:
    # SQLAlchemy wraps what the driver raised, sometimes twice.
    while error.__cause__ is not None and not isinstance(error, OSError | asyncpg.PostgresError):
        error = error.__cause__
    return error


def _upgrade(connection: Connection) -> list[tuple[str, str]]:
    directory = scripts()
    applied: list[tuple[str, str]] = []

    def note(ctx: object, step: MigrationInfo, heads: object, run_args: object) -> None:  # noqa: ARG001 - the names are Alembic's
        script = directory.get_revision(str(step.up_revision_id))
        applied.append((script.revision, script.doc))

    def steps(revision: Any, _: MigrationContext) -> Any:
        return directory._upgrade_revs("head", revision)  # noqa: SLF001 - as alembic's own command

    with EnvironmentContext(Config(), directory, fn=steps) as environment:
        environment.configure(
            connection=connection, version_table=VERSION_TABLE, on_version_apply=note
        )
        environment.run_migrations()
    return applied
