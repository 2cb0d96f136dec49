"""Brings the database's schema to the version that this code needs."""

import contextlib
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

from viralfx.adapters.postgres import (
    PostgresConfig,
    PostgresDatabase,
    explain,
    is_rolled_back,
    said_by_server,
)
from viralfx.adapters.postgres.schema import (
    LOCK_PATIENCE,
    current_revision,
    is_later,
    pending_migrations,
)
from viralfx.bootstrap.backend import unusable_certificates
from viralfx.bootstrap.postgres import postgres_config
from viralfx.domain.clock import SystemClock
from viralfx.domain.errors import StartupError
from viralfx.settings import Settings

_logger = logging.getLogger("viralfx.database")

_SAYS_LITTLE = {"error", "forbidden", "locked", "timeout"}
"""Codes that leave open what it is about; the server's own words do not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemaState:
    """What a database's schema is, against what this code needs."""

    address: str
    """Where the database is, without credentials."""
    revision: str | None
    """The last migration that was applied; None when there was none."""
    pending: tuple[str, ...]
    applied: tuple[tuple[str, str], ...] = ()
    """What was applied just now, with what it means."""

    @property
    def newer(self) -> bool:
        """Whether a later version of the service migrated it."""
        return is_later(self.revision)


async def schema_state(settings: Settings) -> SchemaState:
    """Look at the schema. Raises as :func:`migrate_schema`."""
    config = postgres_config(settings)
    async with _connected(config) as database:
        try:
            async with database.acquire() as connection:
                return SchemaState(
                    address=config.address,
                    revision=await current_revision(connection),
                    pending=await pending_migrations(connection),
                )
        except Exception as error:
            raise _refusal(config.address, " when asked for its migrations", error) from error


async def migrate_schema(settings: Settings, *, patience: float = LOCK_PATIENCE) -> SchemaState:
    """Apply what is pending; of several runs at once one does it and the others wait.

    They do so for ``patience`` seconds. Raises :class:`ConfigurationError` without a usable
    DATABASE_URL, and :class:`StartupError` when the database cannot be reached, refuses a
    migration, or is still being migrated by another run.
    """
    before = await schema_state(settings)
    if not before.pending:
        return before
    # Alembic and SQLAlchemy are only loaded where there is something for them to do.
    from viralfx.adapters.postgres.migrate import (  # noqa: PLC0415
        MigrationLockedError,
        apply_migrations,
    )

    try:
        applied = await apply_migrations(postgres_config(settings), patience=patience)
    except MigrationLockedError as error:
        raise StartupError(
            f"DATABASE_URL: the database at {before.address} {error}, so nothing was migrated;"
            " run it again when that one has ended"
        ) from error
    except Exception as error:
        sure = is_rolled_back(error)
        when = ", so nothing was migrated" if sure else " while it was migrated"
        raise _refusal(before.address, when, error) from error
    after = await schema_state(settings)
    return replace(after, applied=tuple(applied))


@contextlib.asynccontextmanager
async def _connected(config: PostgresConfig) -> AsyncIterator[PostgresDatabase]:
    try:
        database = PostgresDatabase(replace(config, pool_min=1, pool_max=1), clock=SystemClock())
    except OSError as error:
        raise unusable_certificates("DB_TLS_CA_FILE", config.tls_ca_file, error) from None
    await database.open()
    try:
        yield database
    finally:
        database.terminate()


def _refusal(address: str, when: str, error: Exception) -> StartupError:
    trouble, said = explain(error), said_by_server(error)
    remedy, detail = trouble.remedy, ""
    if said is not None and trouble.code in _SAYS_LITTLE:
        # What it says about a statement of ours holds no secret.
        detail = f" ({said})"
        if trouble.code == "error":
            remedy = "mend that, and run it again"
    elif trouble.code == "error":
        _logger.error("Migration failed", exc_info=error)
    return StartupError(
        f"DATABASE_URL: the database at {address} {trouble.problem}{when}{detail}; {remedy}"
    )
