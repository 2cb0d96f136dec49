"""Migrates the database's schema to the version that this code needs."""

import contextlib
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace

import msgspec

from viralfx.adapters.postgres import (
    CertificateError,
    PostgresConfig,
    PostgresDatabase,
    explain,
    is_rolled_back,
    server_message,
)
from viralfx.adapters.postgres.migrations import (
    LOCK_TIMEOUT_SECONDS,
    current_revision,
    is_later,
    lacking_right,
    missing_after,
)
from viralfx.bootstrap.postgres import migration_config
from viralfx.domain.clock import SystemClock
from viralfx.domain.errors import ConfigurationError, StartupError
from viralfx.settings import Settings

_logger = logging.getLogger("viralfx.database")

_UNSPECIFIC_CODES = {"error", "forbidden", "locked", "timeout"}
"""Codes for which the server's message is added, because it is more specific."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemaState:
    """The schema of a database compared with the needs of this code."""

    address: str
    """Host, port and database, without credentials."""
    revision: str | None
    """The last applied migration; None if there is none."""
    pending: tuple[str, ...]
    applied: tuple[tuple[str, str], ...] = ()
    """Migrations applied by this run: revision and description."""

    @property
    def newer(self) -> bool:
        """True if a later version of the service migrated it."""
        return is_later(self.revision)


async def schema_state(settings: Settings, *, migrating: bool = False) -> SchemaState:
    """Return the state of the schema. Raises the same errors as :func:`migrate_schema`.

    ``migrating``: a user that may not apply the pending migrations is an error.
    """
    config = migration_config(settings)
    schema = config.settings.schema
    async with _connected(config) as database:
        try:
            async with database.acquire() as connection:
                lacking = await lacking_right(connection, schema, migrating=False)
                revision = None if lacking else await current_revision(connection, schema)
                pending = missing_after(revision)
                if pending and migrating:
                    lacking = await lacking_right(connection, schema, migrating=True)
        except Exception as error:
            raise _refusal(config, " when queried for its migrations", error) from error
    if lacking is not None:
        raise StartupError(
            f"{config.url_variable}: the user of the database at {config.address}"
            f" {lacking.problem}; let the database's owner run `{lacking.statement}`, and try again"
        )
    return SchemaState(address=str(config.address), revision=revision, pending=pending)


async def migrate_schema(
    settings: Settings, *, lock_timeout: float = LOCK_TIMEOUT_SECONDS
) -> SchemaState:
    """Apply pending migrations; concurrent runs wait for the first, up to ``lock_timeout`` seconds.

    Raises :class:`ConfigurationError` without a usable address in DATABASE_MIGRATION_URL or
    DATABASE_URL, and :class:`StartupError` if the database cannot be reached, refuses a migration,
    or another run is still migrating it.
    """
    config = migration_config(settings)
    before = await schema_state(settings, migrating=True)
    if not before.pending:
        return before
    # Alembic and SQLAlchemy are loaded only if there is a migration to apply.
    from viralfx.adapters.postgres.migrate import (  # noqa: PLC0415
        MigrationLockedError,
        apply_migrations,
    )

    applied: list[tuple[str, str]] = []
    try:
        await apply_migrations(config, applied, lock_timeout=lock_timeout)
    except MigrationLockedError as error:
        raise StartupError(
            f"{config.url_variable}: the database at {before.address} {error}{_left(applied)};"
            " run it again when the other run has ended"
        ) from error
    except Exception as error:
        when = _left(applied) if is_rolled_back(error) else " while it was migrated"
        raise _refusal(config, when, error) from error
    after = await schema_state(settings)
    return replace(after, applied=tuple(applied))


def _left(applied: Sequence[tuple[str, str]]) -> str:
    """Return the state that an error left behind."""
    done = ", ".join(revision for revision, _ in applied)
    return f", so only {done} was applied" if done else ", so nothing was migrated"


@contextlib.asynccontextmanager
async def _connected(config: PostgresConfig) -> AsyncIterator[PostgresDatabase]:
    single = msgspec.structs.replace(config.settings, pool_min=1, pool_max=1)
    try:
        database = PostgresDatabase(replace(config, settings=single), clock=SystemClock())
    except CertificateError as error:
        raise ConfigurationError([str(error)]) from None
    await database.open()
    try:
        yield database
    finally:
        database.terminate()


def _refusal(config: PostgresConfig, when: str, error: Exception) -> StartupError:
    explained, message = explain(error), server_message(error)
    remedy, detail = explained.remedy, ""
    if message is not None and explained.code in _UNSPECIFIC_CODES:
        # The server's message about one of our statements contains no secret.
        detail = f" ({message})"
        if explained.code == "error":
            remedy = "fix the cause, and run it again"
    elif explained.code == "error":
        _logger.error("Migration failed", exc_info=error)
    return StartupError(
        f"{config.url_variable}: the database at {config.address} {explained.problem}{when}"
        f"{detail}; {remedy}"
    )
