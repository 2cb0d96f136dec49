"""Wires the Postgres adapter, and migrates its schema to the version that this code needs.

Imported only if a database is configured.
"""

import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import msgspec

from viralfx.adapters.postgres import (
    PostgresAuditStore,
    PostgresFleetStore,
    PostgresHealthCheck,
    PostgresStateStore,
    close_postgres,
)
from viralfx.core.clock import Clock, SystemClock
from viralfx.core.errors import ConfigurationError, StartupError
from viralfx.domain.audit import AuditStore
from viralfx.domain.fleet import FleetStore
from viralfx.domain.operations import CHECK_SHARE, Backend, StateStore
from viralfx.jobs.ledger import Counts, JobLedger, LeaseStore
from viralfx.jobs.notifier import JobNotifier
from viralfx.jobs.postgres import PostgresJobLedger, PostgresLeaseStore, PostgresNotifier
from viralfx.postgres import (
    CertificateError,
    Connector,
    PostgresConfig,
    PostgresDatabase,
    explain,
    is_rolled_back,
    server_message,
    without_values,
)
from viralfx.postgres.migrate import MigrationLockedError, apply_migrations
from viralfx.postgres.migrations import (
    LOCK_TIMEOUT_SECONDS,
    current_revision,
    is_later,
    lacking_right,
    missing_after,
)
from viralfx.settings import (
    CredentialsCallable,
    DatabaseAddress,
    DatabaseSettings,
    Settings,
)

_MAX_AGE_INTERVALS = 1.25
"""Check intervals for which one result of the health query serves both checks."""


def postgres_config(
    settings: Settings, ask_password: CredentialsCallable | None = None
) -> PostgresConfig:
    """Return address and settings of the database.

    ``ask_password`` returns its password for each connection. Raises :class:`ConfigurationError`
    if DATABASE_URL is missing or invalid.
    """
    try:
        address = settings.database_address
    except ValueError as error:
        raise ConfigurationError([f"DATABASE_URL: {error}"]) from None
    if address is None:
        raise ConfigurationError(["DATABASE_URL: not set, so there is no database"])
    return PostgresConfig(
        address=address,
        settings=settings.db,
        suspect_after=settings.health_check_timeout,
        url=settings.database_url,
        ask_password=ask_password,
    )


def migration_config(settings: Settings) -> PostgresConfig:
    """Return address and settings of the database for migrations.

    They are those of ``DATABASE_MIGRATION_URL``, which leads past a pooler, or else those of
    ``DATABASE_URL``. Raises :class:`ConfigurationError` if the one that counts is invalid.
    """
    try:
        address = settings.database_migration_address
    except ValueError as error:
        raise ConfigurationError([f"DATABASE_MIGRATION_URL: {error}"]) from None
    if address is None:
        return postgres_config(settings)
    address = _with_tls(settings, address)
    return PostgresConfig(
        address=address,
        settings=_past_pooler(settings.db, address),
        url=settings.database_migration_url,
        url_variable="DATABASE_MIGRATION_URL",
    )


def _past_pooler(settings: DatabaseSettings, address: DatabaseAddress) -> DatabaseSettings:
    """Return the settings for an ``address`` that leads past a pooler."""
    if not _has_password(address):
        return msgspec.structs.replace(settings, pooler="none")
    # DB_PASSWORD is that of the user in DATABASE_URL.
    return msgspec.structs.replace(settings, pooler="none", password=None)


def _with_tls(settings: Settings, address: DatabaseAddress) -> DatabaseAddress:
    """Return an ``address`` with the passphrase and versions of DATABASE_URL where it has none."""
    try:
        main = settings.database_address
    except ValueError:
        return address  # not the one that counts
    if main is None:
        return address
    return replace(
        address,
        key_password=address.key_password or main.key_password,
        tls_versions=address.tls_versions or main.tls_versions,
    )


def _has_password(address: DatabaseAddress) -> bool:
    return address.password is not None or address.passfile is not None


def wire_postgres(
    settings: Settings,
    clock: Clock,
    on_suspected_outage: Callable[[], None],
    ask_password: CredentialsCallable | None = None,
) -> tuple[PostgresDatabase, Counts, Backend]:
    """Wire the Postgres adapter; nothing is connected yet.

    The second result counts the queues for their health check; it shares a recent result of the
    database's health query.

    Raises :class:`ConfigurationError` for unusable certificates.
    """
    config = postgres_config(settings, ask_password)
    try:
        database = PostgresDatabase(config, clock=clock, on_suspected_outage=on_suspected_outage)
    except CertificateError as error:
        raise ConfigurationError([str(error)]) from None
    check = PostgresHealthCheck(
        database, clock, timeout=settings.health_check_timeout * CHECK_SHARE
    )
    max_age = settings.health_check_interval * _MAX_AGE_INTERVALS
    return (
        database,
        lambda: check.query.counts(max_age),
        Backend(
            check=check, resource=database, close=partial(close_postgres, database, check, clock)
        ),
    )


def clean_statement(statement: str) -> str:
    """Return a statement without its literal values."""
    return without_values(statement)


def job_ledger(database: PostgresDatabase, clock: Clock, *, notifies: bool) -> JobLedger:
    """Return the job ledger in the database; ``notifies``: whether workers listen to it."""
    return PostgresJobLedger(database, clock=clock, notifies=notifies)


def lease_store(database: PostgresDatabase) -> LeaseStore:
    """Return a store that renews leases from another thread; it has a connection of its own."""
    return PostgresLeaseStore(database)


def notifier(settings: Settings, database: PostgresDatabase, clock: Clock) -> JobNotifier:
    """Return a notifier over LISTEN and NOTIFY.

    It listens at ``DATABASE_LISTEN_URL`` if that is set. Raises :class:`ConfigurationError` if it
    is invalid, or for unusable certificates.
    """
    try:
        address = settings.database_listen_address
    except ValueError as error:
        raise ConfigurationError([f"DATABASE_LISTEN_URL: {error}"]) from None
    if address is None:
        may_listen = settings.db.pooler != "transaction"
        return PostgresNotifier(database, may_listen=may_listen, clock=clock)
    config = replace(
        database.config,
        address=_with_tls(settings, address),
        url=settings.database_listen_url,
        url_variable="DATABASE_LISTEN_URL",
        settings=_past_pooler(settings.db, address),
        # As DB_PASSWORD.
        ask_password=None if _has_password(address) else database.config.ask_password,
    )
    try:
        connector = Connector(config)
    except CertificateError as error:
        raise ConfigurationError([str(error)]) from None
    return PostgresNotifier(database, connector=connector, clock=clock)


def state_store(database: PostgresDatabase) -> StateStore:
    """Return the state store in the database; its key is the host name (the pod's name)."""
    return PostgresStateStore(database, socket.gethostname())


def fleet_store(database: PostgresDatabase) -> FleetStore:
    """Return the store of the fleet in the database."""
    return PostgresFleetStore(database)


def audit_store(database: PostgresDatabase) -> AuditStore:
    """Return the store of the audit trail in the database."""
    return PostgresAuditStore(database)


@contextlib.asynccontextmanager
async def opened_audit_store(settings: Settings) -> AsyncIterator[AuditStore]:
    """Connect once, and return the store of the audit trail for a command.

    Raises :class:`ConfigurationError` for an invalid address, and :class:`StartupError` if the
    database cannot be reached.
    """
    config = postgres_config(settings)
    once = msgspec.structs.replace(config.settings, max_reconnect_attempts=1)
    async with _connected(replace(config, settings=once)) as database:
        yield PostgresAuditStore(database)


# -- migrations ----------------------------------------------------------------------------------

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
